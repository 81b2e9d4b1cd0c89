"""Which keys a query sees: the definition that every implementation must agree with.

A token's position is its number among the real tokens of its own document, from 0; padding has position -1 and is excluded
before anything is selected. For a query at position i of a document, in a layer with window W and S sink tokens, the visible
keys are those of the same document at positions

    full layer:   j <= i
    local layer:  i - W < j <= i   or   j < min(S, i + 1)
    routed layer: those of the local layer; and, in each of the query's clusters, the most recent `routed_tokens` keys with
                  S <= j <= i - W, under a gate (`routed.py`)
    global layer: those of the local layer; and, under a gate, the nodes S <= j <= i - W with (j + 1) mod `global_stride` = 0
                  and the layer's memory tokens, which have no position (`nodes.py`)

Where the pattern is not causal (`causal`), for classification and embeddings, every rule holds for both sides: of a document of n
tokens a full layer sees all, a local layer those with |i - j| < W, the first S and the last S; remote keys are sought at j <= i - W
and at j >= i + W without the first and last S, by a routed layer up to `routed_tokens` of each of its clusters on either side, the
nearest ones.

The window is that of Mistral (https://arxiv.org/abs/2310.06825), the sink tokens those of StreamingLLM
(https://arxiv.org/abs/2309.17453). With W at least the length of the document both rows are the same.

Shapes: B batch, Q new tokens (queries), K keys.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .row_groups import RowGroup, token_runs


@dataclass(frozen=True)
class AttentionPattern:
    """What one layer sees.

    Attributes:
        window: number of tokens seen, the current one included; None = all earlier ones.
        num_sink_tokens: the first tokens of the document that stay visible beside the window.
        routed_clusters: clusters that a query looks into besides; 0 = none.
        routed_tokens: the most recent keys that it sees in each.
        global_stride: beyond the window, the last of every so many tokens stays visible (a node); 0 = none.
        causal: whether a query sees nothing behind its own position.
    """

    window: int | None = None
    num_sink_tokens: int = 0
    routed_clusters: int = 0
    routed_tokens: int = 0
    global_stride: int = 0
    causal: bool = True

    @property
    def local(self) -> "AttentionPattern":
        """The pattern without its remote keys."""
        return AttentionPattern(self.window, self.num_sink_tokens, causal=self.causal)

    @property
    def drops_keys(self) -> bool:
        """Whether there are keys that no later token can see."""
        return self.window is not None and not self.routed_clusters

    @property
    def capacity(self) -> int | None:
        """Keys that later tokens can still see, per sequence; None where that grows without bound."""
        return self.num_sink_tokens + self.window - 1 if self.drops_keys and not self.global_stride else None

    @property
    def first_node(self) -> int:
        """Position of the first node; the others follow `global_stride` by `global_stride`."""
        return -(-(self.num_sink_tokens + 1) // self.global_stride) * self.global_stride - 1

    def are_nodes(self, positions: torch.Tensor) -> torch.Tensor:
        """Which positions are nodes, bool in the shape of `positions`."""
        if not self.global_stride:
            return torch.zeros_like(positions, dtype=torch.bool)
        return (positions >= self.num_sink_tokens) & ((positions + 1) % self.global_stride == 0)

    def sees(self, query: torch.Tensor, key: torch.Tensor, after: torch.Tensor | None = None) -> torch.Tensor:
        """Whether queries see keys without any gate, by their positions; tensors of any shapes that go together.

        Args:
            after: how many keys of its document follow a key; only read where the pattern is not causal.
        """
        visible = (key >= 0) & (key <= query) if self.causal else key >= 0
        if self.window is None:
            return visible
        near = key > query - self.window
        if not self.causal:
            near = near & (key < query + self.window)
        return visible & (near | self._on_edge(key, after))

    def behind(self, query: torch.Tensor, key: torch.Tensor, after: torch.Tensor | None = None) -> torch.Tensor:
        """Whether keys lie before the queries' windows and may be remote ones; arguments as in `sees`."""
        return (key >= 0) & (key <= query - self.window) & ~self._on_edge(key, after)

    def ahead(self, query: torch.Tensor, key: torch.Tensor, after: torch.Tensor | None = None) -> torch.Tensor:
        """The same for keys after the windows, of which a causal pattern has none."""
        if self.causal:
            return torch.zeros_like(key <= query)
        return (key >= query + self.window) & ~self._on_edge(key, after)

    def _on_edge(self, key: torch.Tensor, after: torch.Tensor | None) -> torch.Tensor:
        head = key < self.num_sink_tokens
        return head if self.causal else head | (after < self.num_sink_tokens)

    def kept(self, key_positions: torch.Tensor, next_positions: torch.Tensor) -> torch.Tensor:
        """Which keys the tokens from `next_positions` on can still see.

        Args:
            key_positions: `[B, K]`, -1 = not a key.
            next_positions: `[B, 1]`, the position of the next token of each row.

        Returns:
            `[B, K]` bool.
        """
        kept = key_positions >= 0
        if self.drops_keys:
            in_window = key_positions > next_positions - self.window
            kept = kept & (in_window | (key_positions < self.num_sink_tokens) | self.are_nodes(key_positions))
        return kept


def visible_keys(
    pattern: AttentionPattern,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition above as a mask.

    Args:
        query_positions: `[B, Q]`, -1 = padding. A padding query sees every key, so that its (unused) output stays finite.
        key_positions: `[B, K]`, -1 = padding, seen by no real query.
        query_documents, key_documents: `[B, Q]` and `[B, K]` numbers of the document; None = one document per row.

    Returns:
        `[B, Q, K]` bool.
    """
    query, key, after = _in_pairs(pattern, query_positions, key_positions, key_documents)
    visible = pattern.sees(query, key, after)
    if query_documents is not None:
        visible = visible & (query_documents[:, :, None] == key_documents[:, None, :])
    return visible | (query < 0)


def keys_after(key_positions: torch.Tensor, key_documents: torch.Tensor | None = None) -> torch.Tensor:
    """`[B, K]`: how many keys of its document follow each key; arguments as in `visible_keys`."""
    if key_documents is None:
        return key_positions.amax(1, keepdim=True) - key_positions
    last = key_positions.new_zeros(len(key_positions), int(key_documents.max()) + 1)
    return last.scatter_reduce(1, key_documents, key_positions, "amax").gather(1, key_documents) - key_positions


def _in_pairs(pattern, query_positions, key_positions, key_documents):
    """Positions of queries `[B, Q, 1]` and keys `[B, 1, K]`, and the keys after the latter."""
    after = None if pattern.causal else keys_after(key_positions, key_documents)[:, None, :]
    return query_positions[:, :, None], key_positions[:, None, :], after


def remote_keys(
    pattern: AttentionPattern,
    query_clusters: torch.Tensor,
    key_clusters: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """The remote set of a routed layer as a mask, disjoint from `visible_keys`.

    Args:
        query_clusters: `[B, H, Q, R]`; key_clusters: `[B, G, K]`; the others as in `visible_keys`. The keys of a document are in
            the order of their positions.

    Returns:
        `[B, H, Q, K]` bool.
    """
    places = _in_pairs(pattern, query_positions, key_positions, key_documents)
    same = True if query_documents is None else query_documents[:, :, None] == key_documents[:, None, :]
    behind, ahead = (pattern.behind(*places) & same)[:, None], (pattern.ahead(*places) & same)[:, None]
    keys = key_clusters.repeat_interleave(query_clusters.shape[1] // key_clusters.shape[1], 1)[:, :, None]
    remote = torch.zeros((), dtype=torch.bool, device=keys.device)
    for choice in query_clusters.unbind(-1):
        chosen = keys == choice[..., None]
        member = behind & chosen
        age = member.flip(-1).cumsum(-1).flip(-1)
        remote = remote | (member & (age <= pattern.routed_tokens))
        if not pattern.causal:
            member = ahead & chosen
            remote = remote | (member & (member.cumsum(-1) <= pattern.routed_tokens))
    return remote


def visible_nodes(
    pattern: AttentionPattern,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """The nodes that a query of a global layer sees, `[B, Q, K]`, disjoint from `visible_keys`; arguments as there."""
    places = _in_pairs(pattern, query_positions, key_positions, key_documents)
    nodes = pattern.are_nodes(places[1]) & (pattern.behind(*places) | pattern.ahead(*places))
    if query_documents is not None:
        nodes = nodes & (query_documents[:, :, None] == key_documents[:, None, :])
    return nodes


@dataclass
class AttentionLayout:
    """Where the new tokens of one forward stand; built once and handed to every layer.

    The common case, in which every row holds `past` tokens of one document and adds equally many, needs no tensors at all:
    `positions` is None ("regular"), and implementations compute with integers.

    Attributes:
        batch_size, num_queries: B and Q.
        past: tokens already seen, padding included.
        positions: `[B, Q]` position in the document, -1 = padding; None = `past, past + 1, ...` in every row.
        documents: `[B, Q]` number of the document, never falling along a row; None = each row is one document.
        past_positions: `[B, 1]` position that the next token of the document in progress would have had before this forward.
        past_documents: `[B, 1]` number of the document in progress before this forward.
    """

    batch_size: int
    num_queries: int
    past: int = 0
    positions: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    past_positions: torch.Tensor | None = None
    past_documents: torch.Tensor | None = None

    @property
    def is_regular(self) -> bool:
        return self.positions is None

    @classmethod
    def build(
        cls,
        batch_size: int,
        num_queries: int,
        *,
        past: int = 0,
        past_positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cached: bool = True,
    ) -> "AttentionLayout":
        """Derives the layout from what a transformers model is called with.

        Args:
            past: tokens in the cache, padding included.
            past_positions: `[B, 1]` next position of each row where the cached rows differ, else None.
            attention_mask: `[B, past + Q]` or `[B, Q]`, 0 = padding. Only the last Q columns are read: the cache knows the rest.
            position_ids: `[B or 1, Q]`; without `attention_mask` and `seq_idx`, a position that does not continue the previous
                one starts a new document (packing without padding, as in transformers).
            seq_idx: `[B or 1, Q]` number of each token's document, for packed rows.
            cached: whether other tokens than these, or earlier ones, will see them. If not, padding at the end of the rows changes
                nothing and is ignored.

        Raises:
            ValueError: a mask or index whose shape does not fit.
        """
        valid = valid_tokens(attention_mask, batch_size, num_queries, past)
        if valid is not None and not cached and _holds(valid[:, :-1] >= valid[:, 1:]):
            valid = None
        starts = _document_starts(batch_size, num_queries, past, position_ids, seq_idx, attention_mask is not None)
        if valid is None and starts is None and past_positions is None:
            return cls(batch_size, num_queries, past)
        device = next(x.device for x in (valid, starts, past_positions) if x is not None)
        if valid is None:
            valid = torch.ones(batch_size, num_queries, dtype=torch.bool, device=device)
        if past_positions is None:
            past_positions = torch.full((batch_size, 1), past, dtype=torch.long, device=device)
        count = valid.long().cumsum(-1)
        positions = past_positions + count - 1
        documents = past_documents = None
        if starts is not None:
            starts = starts & valid
            documents = starts.long().cumsum(-1)
            past_documents = documents.new_zeros(batch_size, 1)
            # Real tokens before the current document began; 0 for the document in progress.
            before = torch.where(starts, count - valid.long(), 0).cummax(-1).values
            positions = torch.where(documents > 0, count - before - 1, positions)
        positions = positions.masked_fill(~valid, -1)
        return cls(batch_size, num_queries, past, positions, documents, past_positions, past_documents)

    def slice(self, start: int, stop: int) -> "AttentionLayout":
        """The layout of the new tokens `start:stop`, those before `start` having become the past."""
        if self.is_regular:
            return AttentionLayout(self.batch_size, stop - start, self.past + start)
        before = AttentionLayout(
            self.batch_size, start, self.past, self.positions[:, :start],
            self.documents[:, :start] if self.documents is not None else None, self.past_positions, self.past_documents,
        )  # fmt: skip
        return AttentionLayout(
            self.batch_size, stop - start, self.past + start, self.positions[:, start:stop],
            self.documents[:, start:stop] if self.documents is not None else None, before.next_positions, before.last_documents,
        )  # fmt: skip

    def to(self, device: torch.device, non_blocking: bool = False) -> "AttentionLayout":
        """The layout with its tensors on another device (accelerate calls this where layers are spread over devices)."""
        tensors = ("positions", "documents", "past_positions", "past_documents")
        held = {name: getattr(self, name) for name in tensors if getattr(self, name) is not None}
        if all(tensor.device == torch.device(device) for tensor in held.values()):
            return self
        return replace(self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in held.items()})

    @cached_property
    def last_documents(self) -> torch.Tensor | None:
        """`[B, 1]` number of the document in progress after these tokens; None = each row is one document."""
        if self.documents is None:
            return None
        return torch.cat((self.past_documents, self.documents), 1)[:, -1:]

    @cached_property
    def next_positions(self) -> torch.Tensor:
        """`[B, 1]` position of the token that would come next in each row (irregular layouts only)."""
        following = torch.cat((self.past_positions, self.positions + 1), 1)
        if self.documents is not None:
            following = following.masked_fill(torch.cat((self.past_documents, self.documents), 1) != self.last_documents, 0)
        return following.amax(1, keepdim=True)

    @cached_property
    def masks(self) -> dict[AttentionPattern, torch.Tensor]:
        """Masks already made in this forward; layers of one pattern hold the same keys and share them."""
        return {}

    @cached_property
    def row_groups(self) -> "list[RowGroup]":
        """Rows of the same structure, for implementations that go document by document (irregular layouts only)."""
        positions = self.positions.tolist()
        documents = self.documents.tolist() if self.documents is not None else [[0] * self.num_queries] * self.batch_size
        in_progress = self.past_documents.flatten().tolist() if self.documents is not None else [0] * self.batch_size
        past = self.past_positions.flatten().tolist()
        groups: dict[tuple, list[int]] = {}
        for row in range(self.batch_size):
            groups.setdefault((past[row], in_progress[row], token_runs(positions[row], documents[row])), []).append(row)
        return [RowGroup(rows, past_length, current, runs) for (past_length, current, runs), rows in groups.items()]


def _holds(conditions: torch.Tensor) -> bool:
    """Whether all are true; never in a graph that is exported, which must be right for other inputs too."""
    return not torch.compiler.is_exporting() and bool(conditions.all())


def valid_tokens(attention_mask: torch.Tensor | None, batch_size: int, num_queries: int, past: int) -> torch.Tensor | None:
    """`[B, Q]` bool, or None where there is no padding among the new tokens."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; pass a 2-D mask [batch, tokens] with 0 for padding, and"
            " seq_idx [batch, tokens] for packed documents"
        )
    if attention_mask.shape[0] != batch_size or attention_mask.shape[1] not in (num_queries, past + num_queries):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; with {past} cached and {num_queries} new tokens it must be"
            f" [{batch_size}, {past + num_queries}]"
        )
    valid = attention_mask[:, attention_mask.shape[1] - num_queries :].bool()
    return None if _holds(valid) else valid


def _document_starts(
    batch_size: int,
    num_queries: int,
    past: int,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    has_mask: bool,
) -> torch.Tensor | None:
    """`[B, Q]` bool, true where a document begins that does not continue the one before; None where there is none."""
    if seq_idx is not None:
        if seq_idx.dim() != 2 or seq_idx.shape[1] != num_queries or seq_idx.shape[0] not in (1, batch_size):
            raise ValueError(
                f"seq_idx has shape {list(seq_idx.shape)}; it must be [{batch_size}, {num_queries}], one number a token"
            )
        starts = torch.zeros_like(seq_idx, dtype=torch.bool)
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        if past and position_ids is not None:
            starts[:, 0] = position_ids[:, 0] == 0
    elif position_ids is not None and position_ids.dim() == 2 and not has_mask and num_queries > 1:
        starts = torch.zeros_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if past:
            starts[:, 0] = position_ids[:, 0] == 0
    else:
        return None
    return None if _holds(~starts) else starts.expand(batch_size, -1)
