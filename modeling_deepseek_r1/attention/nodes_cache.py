"""The cache of a global layer: sink tokens, the last `window - 1` keys, and the nodes, to which others are only appended."""

import torch

from .cache import GrowingStates, PatternLayer


class GlobalLayer(PatternLayer):
    """`PatternLayer` that also keeps nodes. With padding or packing they stay among the other keys, which have positions there.

    Attributes:
        nodes: keys and values `[B, G, N, D]` of all nodes so far, those in the window included; None with padding or packing.
    """

    def __init__(self, *args, **kwargs):
        self._node_stores = (GrowingStates(), GrowingStates())
        super().__init__(*args, **kwargs)

    def _forget(self) -> None:
        super()._forget()
        self.nodes = None
        for store in self._node_stores:
            store.clear()

    def _num_nodes(self, seq_len: int) -> int:
        return max(0, -(-(seq_len - self.pattern.first_node) // self.pattern.global_stride))

    def _update_regular(self, key_states, value_states, held):
        known = self._num_nodes(self.seen)
        first = self.pattern.first_node + known * self.pattern.global_stride - self.seen
        states = [x[:, :, first :: self.pattern.global_stride] for x in (key_states, value_states)]
        if self.nodes is None:
            self.nodes = tuple(x[:, :, :0] for x in states)
        if torch.is_grad_enabled():
            self.nodes = tuple(torch.cat(pair, 2) for pair in zip(self.nodes, states, strict=True))
        elif states[0].shape[2]:
            self.nodes = tuple(s.append(x, y) for s, x, y in zip(self._node_stores, self.nodes, states, strict=True))
        return super()._update_regular(key_states, value_states, held)

    def _update_irregular(self, key_states, value_states, held, layout):
        if self.nodes is not None and held:
            held = self._bring_in_nodes(held)
        self.nodes = None
        return super()._update_irregular(key_states, value_states, held, layout)

    def _bring_in_nodes(self, held: int) -> int:
        """Puts the nodes that have been dropped between the sink tokens and the last keys; returns the number of keys."""
        positions = self.regular_positions()
        if held < self.seen:
            head = self.pattern.num_sink_tokens
            count = self._num_nodes(self.seen - held + head)
            numbers = torch.arange(count, device=self.keys.device)
            nodes = (self.pattern.first_node + self.pattern.global_stride * numbers).expand(len(self.keys), -1)
            positions = torch.cat((positions[:, :head], nodes, positions[:, head:]), 1)
            self.keys, self.values = (
                torch.cat((x[:, :, :head], y[:, :, :count], x[:, :, head:]), 2)
                for x, y in zip((self.keys, self.values), self.nodes, strict=True)
            )
        self.positions = positions
        return self.keys.shape[2]

    def take_out(self, first: int, count: int | torch.Tensor, turn=None) -> None:
        """As in `PatternLayer`; `count` must be a multiple of the stride, so that nodes stay nodes."""
        if self.nodes is not None:
            before, after = self._num_nodes(first), self._num_nodes(first + count)
            keys, values = (x[:, :, after:] for x in self.nodes)
            numbers = torch.arange(after, after + keys.shape[2], device=keys.device)
            positions = self.pattern.first_node + self.pattern.global_stride * numbers
            keys = keys if turn is None else turn(keys, positions[None], count)
            self.nodes = tuple(torch.cat((x[:, :, :before], y), 2) for x, y in zip(self.nodes, (keys, values), strict=True))
            for store in self._node_stores:
                store.clear()
        super().take_out(first, count, turn)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.nodes is not None:
            surplus = self.nodes[0].shape[2] - self._num_nodes(self.seen)
            self.nodes = tuple(s.take_back(x, surplus) for s, x in zip(self._node_stores, self.nodes, strict=True))

    def _select(self, select) -> None:
        super()._select(select)
        if self.nodes is not None:
            self.nodes = tuple(select(x) for x in self.nodes)
