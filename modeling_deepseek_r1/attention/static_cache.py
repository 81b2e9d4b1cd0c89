"""The layers of a `StaticCache`: buffers of a fixed shape, so that a decoding step can be compiled without graph breaks.

A layer is in one of two states. While a prompt is read it is a `PatternLayer` (`open_layer`), with everything that can do. When
the forward is over its keys are put into slots (`close`), and from then on a step of one token writes and reads these in
place: every shape is fixed, and how far each row has come is a tensor. More tokens at once open the layer again, except in
compiled code, where they meet old and new keys under one mask.

Which position a slot holds follows from the number of tokens alone, so that nothing is kept about it. With S sink tokens, a
window of W, n tokens so far, T the length of the cache:

    full, routed layers: slot p holds position p < T
    local layers:        slots 0 ... S - 1 the sink tokens, then a ring of W: position p in S + (p - S) mod W
    global layers:       behind these slot k of the nodes holds node k, and then come the memory tokens
    all layers:          the last slot takes what is not kept (padding, for instance), and is never seen

Positions count the real tokens of a row, so rows with padding on the left are at different slots. Packed documents end when a
layer is closed: only the document in progress is kept, as later tokens see no other.
"""

import torch
from transformers.cache_utils import CacheLayerMixin

from .cache import UNLIMITED, PatternLayer
from .pattern import AttentionPattern


class Slots:
    """Numbers of the slots of a layer; see the module's docstring.

    Attributes:
        sinks, ring, nodes, memory: slots of each kind, in this order; one more follows.
    """

    def __init__(self, pattern: AttentionPattern, length: int, memory: int):
        self.pattern = pattern
        self.sinks = min(pattern.num_sink_tokens, length) if pattern.drops_keys else 0
        self.ring = min(pattern.window, max(length - self.sinks, 1)) if pattern.drops_keys else length
        self.nodes = len(range(pattern.first_node, length, pattern.global_stride)) if pattern.global_stride else 0
        self.memory = memory
        self.local = self.sinks + self.ring
        self.total = self.local + self.nodes + memory + 1

    def of(self, positions: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Slot of each of the positions `[B, Q]` once the next position is `following` `[B, 1]`."""
        late = self.sinks + (positions - self.sinks).remainder(self.ring)
        slots = torch.where(positions < self.sinks, positions, late) if self.pattern.drops_keys else positions
        kept = (positions >= 0) & ((positions < self.sinks) | (positions >= following - self.ring))
        return torch.where(kept, slots, self.total - 1)

    def of_nodes(self, positions: torch.Tensor) -> torch.Tensor:
        """Slot of each of the positions `[B, Q]` among the nodes."""
        number = (positions - self.pattern.first_node).div(self.pattern.global_stride, rounding_mode="floor")
        return torch.where(self.pattern.are_nodes(positions), self.local + number, self.total - 1)

    def held(self, following: torch.Tensor) -> torch.Tensor:
        """Position in each of the first slots, `[B, sinks + ring]`, -1 = none, when the next position is `following`."""
        slots, last = torch.arange(self.local, device=following.device), following - 1
        if not self.pattern.drops_keys:
            return torch.where(slots <= last, slots, -1)
        late = last - (last - slots).remainder(self.ring)
        late = torch.where(late >= self.sinks, late, -1)
        return torch.where(slots < self.sinks, torch.where(slots <= last, slots, -1), late)

    def held_nodes(self, following: torch.Tensor) -> torch.Tensor:
        """Likewise for the slots of the nodes."""
        positions = self.pattern.first_node + self.pattern.global_stride * torch.arange(self.nodes, device=following.device)
        return torch.where(positions < following, positions, -1)


class StaticPatternLayer(CacheLayerMixin):
    """The cache of one layer in a `StaticCache`. It has no gradients, and takes no tokens back.

    Args:
        open_layer: an empty layer of the dynamic kind for the same pattern.
        max_cache_len: tokens of a row at most.
        num_memory_tokens: of a global layer.
        is_compileable: False where the decoder layer around it cannot be compiled.

    Attributes:
        keys, values: `[B, G, slots, D]`; clusters: `[B, G, slots, 1]` int32, or None.
        next_positions: `[B, 1]`; seen: `[]`, tokens given to this layer so far, padding included. Tensors like the others.
        kind: layers with the same number have the same pattern and slots.
    """

    is_croppable = False

    def __init__(self, open_layer: PatternLayer, max_cache_len: int, num_memory_tokens: int = 0, is_compileable: bool = True):
        super().__init__()
        self.pattern, self.open_layer, self.kind = open_layer.pattern, open_layer, 0
        self.is_sliding, self.is_compileable = self.pattern.drops_keys, is_compileable
        self.max_cache_len = max_cache_len
        self.slots = Slots(self.pattern, max_cache_len, num_memory_tokens)
        self.clusters = self.next_positions = self.seen = None

    @property
    def is_closed(self) -> bool:
        """Whether the keys are in their slots."""
        return self.open_layer is None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates, for states of these sizes `[B, G, any, D]`."""
        batch, device = key_states.shape[0], key_states.device
        self.dtype, self.device = key_states.dtype, device
        self.keys, self.values = (
            x.new_zeros(batch, x.shape[1], self.slots.total, x.shape[3]) for x in (key_states, value_states)
        )
        if self.pattern.routed_clusters:
            self.clusters = torch.zeros(*self.keys.shape[:3], 1, dtype=torch.int32, device=device)
        self.next_positions = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.seen = torch.zeros((), dtype=torch.long, device=device)
        for tensor in self._tensors():
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _tensors(self) -> list[torch.Tensor]:
        tensors = (self.keys, self.values, self.clusters, self.next_positions, self.seen)
        return [tensor for tensor in tensors if tensor is not None]

    def update(self, key_states, value_states, *args, layout=None, clusters=None, memory=None, **kwargs):
        """Adds the keys `[B, G, Q, D]` of the new tokens; returns those to attend to: of the open layer, or all slots.

        Raises:
            ValueError: gradients are asked for, or more tokens than the cache was made for.
        """
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise ValueError("a static cache has no gradients: call the model under torch.no_grad(), or pass a DynamicCache()")
        if self.open_layer is not None:
            self._check_room(self.open_layer.seen, key_states.shape[2])
            own = {"clusters": clusters} if clusters is not None else {}
            return self.open_layer.update(key_states, value_states, layout=layout, **own)
        if not torch.compiler.is_compiling():
            self._check_room(int(self.seen), key_states.shape[2])
        if memory is not None:
            first = self.slots.local + self.slots.nodes
            for buffer, states in ((self.keys, memory.key), (self.values, memory.value)):
                buffer[:, :, first:-1] = states.to(buffer.dtype)
        # A ring forgets what earlier ones of several new tokens still see.
        joined = key_states.shape[2] > 1 and self.pattern.drops_keys
        states = [torch.cat(pair, 2) for pair in ((self.keys, key_states), (self.values, value_states))] if joined else None
        self._write(key_states, value_states, clusters, layout.positions, layout.after)
        self.seen.add_(key_states.shape[2])
        return states or (self.keys, self.values)

    def _check_room(self, seen: int, new: int) -> None:
        if seen + new > self.max_cache_len:
            raise ValueError(
                f"this static cache was made for {self.max_cache_len} tokens: {seen} are in it and {new} more are given; make a"
                " new StaticCache with a larger max_cache_len"
            )

    def _write(self, key_states, value_states, clusters, positions, following) -> None:
        slots = self.slots.of(positions, following)
        self._put_states(slots, key_states, value_states)
        if clusters is not None:
            _put(self.clusters, slots, clusters.to(torch.int32).unsqueeze(-1))
        if self.slots.nodes:
            self._put_states(self.slots.of_nodes(positions), key_states, value_states)
        self.next_positions.copy_(following)

    def _put_states(self, slots, key_states, value_states) -> None:
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            _put(buffer, slots, states)

    @torch.no_grad()
    def close(self) -> None:
        """Puts what the open layer holds into the slots."""
        layer = self.open_layer
        if layer.keys is not None:
            layer.prefetch()
            self._fill(layer)
            layer.reset()
        if self.is_initialized:
            self._spare_layer, self.open_layer = layer, None

    def _fill(self, layer: PatternLayer) -> None:
        if self.keys is None or len(self.keys) != len(layer.keys):
            self.lazy_initialization(layer.keys, layer.values)
        positions, following = layer.positions, layer.next_positions
        if positions is None:
            positions = layer.regular_positions()
            following = positions.new_full((len(positions), 1), layer.seen)
        clusters = layer.clusters.squeeze(-1) if self.clusters is not None else None
        self._write(layer.keys, layer.values, clusters, positions, following)
        if self.slots.nodes and layer.nodes is not None:
            count = layer.nodes[0].shape[2]
            for buffer, states in zip((self.keys, self.values), layer.nodes, strict=True):
                buffer[:, :, self.slots.local : self.slots.local + count] = states
        self.seen.fill_(layer.seen)

    @torch.no_grad()
    def open(self) -> None:
        """Takes the keys out of their slots again, in the order of their positions."""
        layer, self.open_layer = self._spare_layer, self._spare_layer
        layer.seen = int(self.seen)
        if not layer.seen:
            return
        layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
        following, slots = self.next_positions, self.slots
        positions = slots.held(following)
        pattern = self.pattern.local if slots.nodes else self.pattern
        positions = positions.masked_fill(~pattern.kept(positions, following), -1)
        keys, values = (x[:, :, : slots.local] for x in (self.keys, self.values))
        regular = bool((following == self.seen).all())
        if slots.nodes:
            held = [x[:, :, slots.local : slots.local + slots.nodes] for x in (self.keys, self.values)]
            nodes = slots.held_nodes(following)
            if regular:
                count = int((nodes[0] >= 0).sum())
                layer.nodes = tuple(x[:, :, :count].clone() for x in held)
            else:
                # Those in the window are among its keys already.
                positions = torch.cat((positions, nodes.masked_fill(nodes > following - self.pattern.window, -1)), 1)
                keys, values = (torch.cat(pair, 2) for pair in zip((keys, values), held, strict=True))
        order = positions.argsort(dim=1, stable=True)[:, positions.shape[1] - int((positions >= 0).sum(1).max()) :]
        index = order[:, None, :, None].expand(-1, keys.shape[1], -1, -1)
        layer.keys, layer.values = (x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
        if self.clusters is not None:
            layer.clusters = self.clusters.gather(2, index)
        if not regular:
            layer.positions, layer.next_positions = positions.gather(1, order), following.clone()

    def get_seq_length(self):
        """Tokens so far, padding included; in compiled code a tensor."""
        if self.open_layer is not None:
            return self.open_layer.seen
        return self.seen if torch.compiler.is_compiling() else int(self.seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.total, 0

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len == UNLIMITED else self.max_cache_len

    def reset(self) -> None:
        if self.open_layer is None:
            self.open_layer = self._spare_layer
        self.open_layer.reset()
        for tensor in self._tensors():
            tensor.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Always refused, but for 0."""
        if tokens_to_remove:
            raise RuntimeError("a static cache takes no tokens back; use a DynamicCache(), as for assisted decoding")

    def offload(self) -> None:
        super().offload() if self.open_layer is None else self.open_layer.offload()

    def prefetch(self) -> None:
        super().prefetch() if self.open_layer is None else self.open_layer.prefetch()

    def _select(self, select) -> None:
        if self.open_layer is not None:
            self.open_layer._select(select)
            return
        for name in ("keys", "values", "clusters", "next_positions"):
            old = getattr(self, name)
            if old is not None:
                new = select(old)
                # In place where that is possible: compiled code knows the addresses.
                setattr(self, name, old.copy_(new) if new.shape == old.shape else new)

    reorder_cache = PatternLayer.reorder_cache
    batch_repeat_interleave = PatternLayer.batch_repeat_interleave
    batch_select_indices = PatternLayer.batch_select_indices


def _put(buffer: torch.Tensor, slots: torch.Tensor, states: torch.Tensor) -> None:
    """Writes states `[B, G, Q, D]` to the slots `[B, Q]`; compiled code does so in place, where it copies for `scatter_`."""
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    buffer.transpose(1, 2).index_put_((rows, slots), states.transpose(1, 2).to(buffer.dtype))
