"""The key/value cache of one layer, full or local, and how a transformers cache gets such layers.

A full layer keeps every key. A local layer keeps the sink tokens, the last `window - 1` keys and, between two forwards, up to
`SLACK` keys more: its memory does not grow with the context. As long as all rows hold the same positions of one document, keys
need no bookkeeping (`positions` is None). With padding or packing the layer keeps the position of each key, and drops what
belongs to an earlier document.

`generate()` and users make a `DynamicCache` or `StaticCache`; `adopt_cache` gives it these layers before its first use, so that
every entry point of transformers gets a bounded cache without a cache class of its own.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .pattern import AttentionLayout, AttentionPattern

SLACK = 64
"""Tokens appended in place before a local layer moves its keys together."""
UNLIMITED = 2**31
"""Length of a static cache that has only local layers, which hold all that is needed of any length."""


class UnadoptedLayer(DynamicLayer):
    """What `DynamicCache(config=...)` holds for a routed layer until `adopt_cache` replaces it."""

    _layer_type = "local_routed_attention"


class UnadoptedGlobalLayer(DynamicLayer):
    """Likewise for a global layer."""

    _layer_type = "local_global_attention"


class UnadoptedStaticLayer(StaticLayer):
    """Likewise for `StaticCache`."""

    _layer_type = "local_routed_attention"


class UnadoptedStaticGlobalLayer(StaticLayer):
    """Likewise for a global layer."""

    _layer_type = "local_global_attention"


REPLACEABLE = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
    UnadoptedLayer,
    UnadoptedGlobalLayer,
    UnadoptedStaticLayer,
    UnadoptedStaticGlobalLayer,
)
"""Layers that transformers makes by default and that hold nothing a `PatternLayer` could not."""


class GrowingStates:
    """Keys or values `[B, G, K, D]` in a buffer with room at the end, so that appending a token does not copy the others."""

    def __init__(self):
        self.buffer: torch.Tensor | None = None
        self.view: torch.Tensor | None = None
        self.start = 0

    def append(self, current: torch.Tensor | None, new: torch.Tensor, reserve: int = 0) -> torch.Tensor:
        """`current` followed by `new`. Where `current` is the view that this object returned last, in place if room is left;
        `reserve` is the number of keys to expect in all."""
        held = 0 if current is None else current.shape[2]
        total = held + new.shape[2]
        in_place = current is not None and current is self.view and self.buffer.shape[2] - self.start >= total
        if not in_place:
            room = max(reserve, total + max(SLACK, total // 16) if held else total)
            self.buffer, self.start = new.new_empty(*new.shape[:2], room, new.shape[3]), 0
            if held:
                self.buffer[:, :, :held] = current
        self.buffer[:, :, self.start + held : self.start + total] = new
        self.view = self.buffer[:, :, self.start : self.start + total]
        return self.view

    def keep_ends(self, current: torch.Tensor, head: int, tail: int) -> torch.Tensor:
        """Drops what lies between the first `head` and the last `tail` keys, moving only the head."""
        surplus = current.shape[2] - head - tail
        if surplus <= 0:
            return current
        if current is not self.view:
            return torch.cat((current[:, :, :head], current[:, :, -tail:] if tail else current[:, :, :0]), 2)
        self.buffer[:, :, self.start + surplus : self.start + surplus + head] = current[:, :, :head].clone()
        self.start += surplus
        self.view = self.view[:, :, surplus:]
        return self.view

    def take_back(self, current: torch.Tensor, count: int) -> torch.Tensor:
        """`current` without its last `count` keys, whose room is used again."""
        shorter = current[:, :, : current.shape[2] - count]
        if current is self.view:
            self.view = shorter
        return shorter

    def clear(self) -> None:
        self.buffer = self.view = None
        self.start = 0


class PatternLayer(DynamicLayer):
    """Cache of a layer with the given pattern. See the module's docstring.

    Attributes:
        keys, values: `[B, G, K, D]`.
        positions: `[B, K]` position of each key in the document in progress, -1 = none; None = regular.
        seen: tokens given to this layer so far, padding included.
        next_positions: `[B, 1]` position of the next token where `positions` is not None.
        key_positions, key_documents: those of the keys that the last `update` returned, or None.
    """

    def __init__(self, pattern: AttentionPattern, record_past: bool = False):
        super().__init__()
        self.pattern = pattern
        self.is_sliding = pattern.drops_keys
        self.record_past = record_past
        self.reserve = 0
        self._stores = (GrowingStates(), GrowingStates())
        self._forget()

    @property
    def open_layer(self) -> "PatternLayer":
        """The layer itself; in a `StaticCache` what stands in for it while a prompt is read (`static_cache.py`)."""
        return self

    def _forget(self) -> None:
        self.keys = self.values = self.positions = self.next_positions = None
        self.key_positions = self.key_documents = None
        self.seen = 0
        for store in self._stores:
            store.clear()

    def activate_past_recording(self) -> None:
        """From now on keys are dropped only by `crop`, so that drafts can be taken back (assisted decoding)."""
        self.record_past = True

    def update(self, key_states, value_states, *args, layout: AttentionLayout | None = None, **kwargs):
        """Adds the keys `[B, G, Q, D]` of the new tokens; returns those to attend to `[B, G, K + Q, D]`."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        held = 0 if self.keys is None else self.keys.shape[2]
        if held and self.keys.shape[0] != key_states.shape[0]:
            raise ValueError(f"the cache holds {self.keys.shape[0]} rows, but {key_states.shape[0]} rows are given")
        if (layout is None or layout.is_regular) and self.positions is None:
            return self._update_regular(key_states, value_states, held)
        return self._update_irregular(key_states, value_states, held, layout)

    def _update_regular(self, key_states, value_states, held):
        new = key_states.shape[2]
        self.key_positions = self.key_documents = None
        tracked = torch.is_grad_enabled() and key_states.requires_grad
        if self.is_sliding and not self.record_past and held:
            self._drop_regular(tracked)
        self.seen += new
        if tracked or (self.is_sliding and new > SLACK):
            # Either autograd must not see a buffer written twice, or the keys would stay alive until the next forward.
            states = [
                torch.cat((x, y), 2) if held else y
                for x, y in zip((self.keys, self.values), (key_states, value_states), strict=True)
            ]
            self.keys, self.values = states
            for store in self._stores:
                store.clear()
            if self.is_sliding and not self.record_past:
                self._drop_regular(tracked)
            return states[0], states[1]
        self.keys = self._stores[0].append(self.keys, key_states, self.reserve)
        self.values = self._stores[1].append(self.values, value_states, self.reserve)
        return self.keys, self.values

    def _drop_regular(self, tracked: bool = False) -> None:
        head, tail = self.pattern.num_sink_tokens, self.pattern.window - 1
        if self.keys.shape[2] <= head + tail:
            return
        stores = (GrowingStates(), GrowingStates()) if tracked else self._stores
        self.keys, self.values = (s.keep_ends(x, head, tail) for s, x in zip(stores, (self.keys, self.values), strict=True))

    def _update_irregular(self, key_states, value_states, held, layout):
        new = key_states.shape[2]
        if layout is None or layout.is_regular:
            raise ValueError("this cache holds padded or packed rows; the new tokens' layout must say where each row stands")
        if held and self.positions is None:
            self.positions = self.regular_positions()
        positions, documents = layout.positions, layout.documents
        if held:
            states = zip(self._stores, (self.keys, self.values), (key_states, value_states), strict=True)
            if self.is_sliding or (torch.is_grad_enabled() and key_states.requires_grad):
                key_states, value_states = (torch.cat((held_states, new_states), 2) for _, held_states, new_states in states)
            else:
                key_states, value_states = (
                    s.append(held_states, new_states, self.reserve) for s, held_states, new_states in states
                )
            positions = torch.cat((self.positions, positions), 1)
            if documents is not None:
                documents = torch.cat((layout.past_documents.expand(-1, held), documents), 1)
        self.seen += new
        self.keys, self.values, self.key_positions, self.key_documents = key_states, value_states, positions, documents
        self.positions = positions if documents is None else positions.masked_fill(documents != layout.last_documents, -1)
        self.next_positions = layout.next_positions
        if self.is_sliding and not self.record_past:
            self._drop_irregular()
        return key_states, value_states

    def regular_positions(self) -> torch.Tensor:
        """`[B, K]` positions of the keys where `positions` is None."""
        (batch_size, _, held, _), device = self.keys.shape, self.keys.device
        head = min(self.pattern.num_sink_tokens, held) if held < self.seen else 0
        tail = torch.arange(self.seen - held + head, self.seen, device=device)
        return torch.cat((torch.arange(head, device=device), tail)).expand(batch_size, -1)

    def _drop_irregular(self) -> None:
        self._keep(self.pattern.kept(self.positions, self.next_positions))

    def _keep(self, kept: torch.Tensor) -> None:
        """Drops the keys that are not in `kept` `[B, K]`; rows that keep fewer have empty slots at the end."""
        count = int(kept.sum(1).max())
        order = (~kept).long().argsort(dim=1, stable=True)[:, :count]
        index = order[:, None, :, None].expand(-1, self.keys.shape[1], -1, -1)
        self.keys = self.keys.gather(2, index.expand(-1, -1, -1, self.keys.shape[3]))
        self.values = self.values.gather(2, index.expand(-1, -1, -1, self.values.shape[3]))
        self.positions = self.positions.masked_fill(~kept, -1).gather(1, order)

    def take_out(self, first: int, count: int | torch.Tensor, turn: Callable[..., torch.Tensor] | None = None) -> None:
        """Drops the keys at positions `first <= j < first + count`, as if these tokens had never been: later ones move up.

        Args:
            first: at least the number of sink tokens; the last tokens that stay must fill the window.
            count: tokens to take out of every row, or `[B, 1]` where rows differ, as with padding; 0 = none.
            turn: `turn(keys, positions, count)` gives keys the rotation of `positions - count`; None = they keep theirs.
        """
        if self.positions is not None:
            behind = self.positions >= first + count
            if turn is not None:
                turned = turn(self.keys, self.positions.clamp(min=0), count)
                self.keys = torch.where((behind & (count > 0))[:, None, :, None], turned, self.keys)
            kept = (self.positions >= 0) & (behind | (self.positions < first))
            self.positions = torch.where(behind, self.positions - count, self.positions)
            self.next_positions = self.next_positions - count
            self._keep(kept)
            return
        held, behind = self.keys.shape[2], self.seen - first - count
        head = first if held == self.seen else self.pattern.num_sink_tokens
        tail = min(held - head, behind)
        keys, positions = self.keys[:, :, held - tail :], torch.arange(self.seen - tail, self.seen, device=self.keys.device)
        keys = keys if turn is None else turn(keys, positions[None], count)
        self.keys = torch.cat((self.keys[:, :, :head], keys), 2)
        self.values = torch.cat((self.values[:, :, :head], self.values[:, :, held - tail :]), 2)
        self.seen -= count
        for store in self._stores:
            store.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens (a negative number, or 0 to only drop what is out of reach).

        Raises:
            RuntimeError: earlier keys that would be visible again have been dropped already.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass the number of tokens to take back as a negative number")
        removed = min(-tokens_to_remove, self.seen)
        if self.keys is None or (removed == 0 and not self.record_past):
            return
        complete = self.positions is None and self.keys.shape[2] == self.seen
        if removed and self.is_sliding and not (self.record_past or complete):
            raise RuntimeError(
                f"cannot take back {removed} tokens: a layer with a window of {self.pattern.window} has dropped keys that would be"
                " visible again; call activate_past_recording() on the cache before adding tokens that may be taken back"
            )
        if removed:
            self.seen -= removed
            self.keys, self.values = (
                s.take_back(x, removed) for s, x in zip(self._stores, (self.keys, self.values), strict=True)
            )
            if self.positions is not None:
                taken, self.positions = self.positions[:, -removed:], self.positions[:, :-removed]
                self.next_positions = self.next_positions - (taken >= 0).sum(1, keepdim=True)
        if self.is_sliding:
            self._drop_regular() if self.positions is None else self._drop_irregular()

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = 0 if self.keys is None else self.keys.shape[2]
        return held + query_length, self.seen - held

    def reset(self) -> None:
        self._forget()
        self.is_initialized = False

    def offload(self) -> None:
        super().offload()
        for store in self._stores:
            store.clear()

    def _select(self, select) -> None:
        if self.keys is None:
            return
        self.keys, self.values = select(self.keys), select(self.values)
        if self.positions is not None:
            self.positions, self.next_positions = select(self.positions), select(self.next_positions)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)] if isinstance(indices, torch.Tensor) else x[indices])


def adopt_cache(
    cache: Cache, num_layers: int, make_layer: Callable[[int, bool, int | None], PatternLayer], device: torch.device
) -> None:
    """Gives an unused `DynamicCache` or `StaticCache` one layer of this library per model layer.

    On a CPU there is nowhere to offload to: `offloading=True` then does nothing.

    Args:
        make_layer: called with the number of a layer, whether to record the past, and the length of a static cache or None.

    Raises:
        ValueError: a cache of another kind (quantized, for instance), or one that other layers have filled.
    """
    layers = cache.layers
    if len(layers) == num_layers and all(hasattr(layer, "open_layer") for layer in layers):
        return
    foreign = [type(layer).__name__ for layer in layers if type(layer) not in REPLACEABLE]
    filled = any(int(layer.get_seq_length()) > 0 for layer in layers)
    if foreign or filled or len(layers) not in (0, num_layers):
        found = f"{type(cache).__name__} with {len(layers)} layers" + (f" of type {foreign[0]}" if foreign else "")
        raise ValueError(
            f"past_key_values is a {found}{', already filled' if filled else ''}; pass an empty DynamicCache() or StaticCache, or one"
            f" that this model has filled ({num_layers} layers)"
        )
    cache.offloading = cache.offloading and device.type != "cpu"
    recording = any(getattr(layer, "record_past", False) for layer in layers)
    length, kinds = _static_length(layers), []
    cache.layers = [make_layer(layer_idx, recording, length) for layer_idx in range(num_layers)]
    for layer, old in zip(cache.layers, layers, strict=False) if length else ():
        kind = layer.pattern, layer.slots.total
        kinds += [] if kind in kinds else [kind]
        layer.kind = kinds.index(kind)
        if old.is_initialized:
            layer.lazy_initialization(old.keys, old.values)
            layer.close()


def _static_length(layers: list) -> int | None:
    """Tokens that a `StaticCache` was made for, None for another cache. A layer with a window knows no more than that."""
    static = [layer for layer in layers if isinstance(layer, StaticLayer)]
    lengths = [layer.max_cache_len for layer in static if not isinstance(layer, StaticSlidingWindowLayer)]
    return max(lengths, default=UNLIMITED) if static else None
