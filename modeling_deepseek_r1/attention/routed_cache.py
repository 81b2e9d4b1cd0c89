"""The cache of a routed layer: all keys, the cluster of each, and for every cluster the most recent keys beyond the window.

While decoding, a key enters the list of its cluster when it leaves the window, so a step looks at lists of bounded length and
costs the same at any context. The lists are made from the clusters when decoding starts, and again after anything else than
one regular token after the other.
"""

import torch

from .cache import GrowingStates, PatternLayer
from .pattern import AttentionLayout, AttentionPattern

SPARE = 32
"""Entries that a list holds beyond `routed_tokens`, so that as many drafts can be taken back."""


class RoutedLayer(PatternLayer):
    """`PatternLayer` that also keeps clusters.

    Attributes:
        clusters: `[B, G, K, 1]` int32, the cluster of each key in `keys`.
    """

    def __init__(self, pattern: AttentionPattern, num_clusters: int, record_past: bool = False):
        self._cluster_store = GrowingStates()
        self.num_clusters = num_clusters
        super().__init__(pattern, record_past)
        self.is_sliding = False

    def _forget(self) -> None:
        super()._forget()
        self.clusters = self.lists = None
        self._cluster_store.clear()

    def update(self, key_states, value_states, *args, layout: AttentionLayout | None = None, clusters=None, **kwargs):
        """As in `PatternLayer`, with the clusters `[B, G, Q]` of the new keys."""
        new = clusters.to(torch.int32).unsqueeze(-1)
        if self.lists is not None and (key_states.shape[2] > SPARE or not (layout is None or layout.is_regular)):
            self.lists = None
        if torch.is_grad_enabled():
            self.clusters = new if self.clusters is None else torch.cat((self.clusters, new), 2)
        else:
            self.clusters = self._cluster_store.append(self.clusters, new, self.reserve)
        return super().update(key_states, value_states, *args, layout=layout, **kwargs)

    def _keep(self, kept: torch.Tensor) -> None:
        order = (~kept).long().argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
        self.clusters = self.clusters.gather(2, order[:, None, :, None].expand(-1, self.clusters.shape[1], -1, -1))
        super()._keep(kept)

    def take_out(self, first: int, count: int | torch.Tensor, turn=None) -> None:
        if self.positions is None:
            self.clusters = torch.cat((self.clusters[:, :, :first], self.clusters[:, :, first + count :]), 2)
        self.lists = None
        self._cluster_store.clear()
        super().take_out(first, count, turn)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.clusters is not None:
            removed = self.clusters.shape[2] - self.keys.shape[2]
            self.clusters = self._cluster_store.take_back(self.clusters, removed)
            if removed >= min(SPARE, self.pattern.window):
                self.lists = None

    def _select(self, select) -> None:
        super()._select(select)
        if self.keys is not None:
            self.clusters = select(self.clusters)
            if self.lists is not None:
                self.lists = tuple(select(x) for x in self.lists)

    def recent(self, query_clusters: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The remote keys of the query at `position`, of regular rows.

        Args:
            query_clusters: `[B, H, R]`.

        Returns:
            Numbers of the keys `[B, H, N]` and which of them count, `[B, H, N]` bool.
        """
        until = max(position - self.pattern.window + 1, self.pattern.num_sink_tokens)
        self._list_until(until)
        slots, counts = self.lists
        batch, heads, choices = query_clusters.shape
        lists = self._list_numbers(query_clusters.unflatten(1, (slots.shape[1], -1)).flatten(2))
        held = slots.view(-1, slots.shape[-1]).index_select(0, lists).view(batch, heads, choices, -1)
        count = counts.view(-1).index_select(0, lists).view(batch, heads, choices)
        # Drafts that were taken back have left keys in the lists that are in the window again.
        count = count - (held >= until).sum(-1) if self._listed > until else count
        width = min(self.pattern.routed_tokens, int(count.max()))
        number = count[..., None] - 1 - torch.arange(width, device=slots.device)
        index = held.gather(-1, number.remainder(slots.shape[-1]))
        return index.flatten(2), (number >= 0).flatten(2)

    def _list_numbers(self, clusters: torch.Tensor) -> torch.Tensor:
        """Numbers of the lists of clusters `[B, G, N]` among all lists, as a vector: one index is much faster than three."""
        batch, groups = clusters.shape[:2]
        first = torch.arange(batch * groups, device=clusters.device).view(batch, groups, 1) * self.num_clusters
        return (clusters + first).flatten()

    def _list_until(self, until: int) -> None:
        """Brings the lists up to the keys before position `until`."""
        if self.lists is None:
            self._make_lists(until)
        slots, counts = (x.view(-1) for x in self.lists)
        length = self.lists[0].shape[-1]
        for position in range(self._listed, until):
            lists = self._list_numbers(self.clusters[:, :, position].long())
            place = counts.index_select(0, lists)
            slots.index_fill_(0, lists * length + place.remainder(length), position)
            counts.index_copy_(0, lists, place + 1)
        self._listed = max(self._listed, until)

    def _make_lists(self, until: int) -> None:
        """From the clusters of all keys: `slots` `[B, G, C, L]` with the number of the t-th key of a cluster at t mod L, and
        `counts` `[B, G, C]`."""
        first, length = self.pattern.num_sink_tokens, self.pattern.routed_tokens + SPARE
        batch, groups = self.clusters.shape[:2]
        keys = max(until - first, 0)
        # All rows in one vector: a CPU sorts that several times faster than the rows one by one.
        lists = self._list_numbers(self.clusters[:, :, first:until, 0].long())
        counts = torch.bincount(lists, minlength=batch * groups * self.num_clusters)
        ordered, order = lists.sort(stable=True)
        rank = torch.arange(len(lists), device=lists.device) - (counts.cumsum(0) - counts)[ordered]
        kept = (rank >= counts[ordered] - length).nonzero().flatten()
        slots = lists.new_full((len(counts) * length,), -1)
        slots[ordered[kept] * length + rank[kept].remainder(length)] = order[kept].remainder(max(keys, 1)) + first
        sizes = batch, groups, self.num_clusters
        self.lists = slots.view(*sizes, length), counts.view(sizes)
        self._listed = max(until, first)
