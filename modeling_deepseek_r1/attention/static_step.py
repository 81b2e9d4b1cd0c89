"""A forward over the slots of a static cache (`static_cache.py`), every shape of which is fixed, and the choice between it and
the ordinary one.

All tensors are masked, none is cut: a step costs what all slots cost, however few are filled.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from .kernels import masked_attention, single_query
from .nodes import Nodes
from .pattern import AttentionLayout, remote_keys, visible_keys, visible_nodes
from .routed import Routing
from .static_cache import StaticPatternLayer

FUSED_KEYS = 2048
"""So many keys are read faster by fused sums than by matrix products, for one query in bfloat16 on a CPU."""


@dataclass
class StaticLayout:
    """Where the new tokens of a forward stand, as tensors only.

    Attributes:
        positions: `[B, Q]` position in the document, -1 = padding.
        before, after: `[B, 1]` position of the next token before and after this forward.
        masks: those already made in this forward, by `StaticPatternLayer.kind`.
    """

    positions: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    masks: dict[int, tuple] = field(default_factory=dict)

    @classmethod
    def build(cls, before: torch.Tensor, num_queries: int, attention_mask: torch.Tensor | None) -> "StaticLayout":
        """From the next positions `[B, 1]` and the mask of a call, of which the last `num_queries` columns count."""
        if attention_mask is None:
            valid = torch.ones((), dtype=torch.long, device=before.device).expand(len(before), num_queries)
        else:
            valid = attention_mask[:, -num_queries:].to(device=before.device, dtype=torch.bool).long()
        count = valid.cumsum(-1)
        # The layers move their counters on while this layout is in use.
        before = before.clone()
        positions = torch.where(valid.bool(), before + count - 1, -1)
        return cls(positions, before, before + count[:, -1:])

    def to(self, device, non_blocking: bool = False) -> "StaticLayout":
        """On another device; `masks` are made anew there."""
        tensors = (x.to(device, non_blocking=non_blocking) for x in (self.positions, self.before, self.after))
        return StaticLayout(*tensors)


def static_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: StaticPatternLayer,
    layout: StaticLayout,
    routing: Routing | Nodes | None,
    scale: float,
) -> torch.Tensor:
    """Attention over what a closed layer's `update` has returned.

    Args:
        query: `[B, H, Q, D]`. key, value: `[B, G, slots or slots + Q, D]`.
        routing: clusters and gate of a routed layer, or gate and memory of a global one.

    Returns:
        `[B, H, Q, D]`; rows of padding are finite and mean nothing.
    """
    if layer.kind not in layout.masks:
        layout.masks[layer.kind] = _visible(layer, layout, key.shape[2])
    positions, mask, far, bias = layout.masks[layer.kind]
    if routing is not None:
        log_gate = routing.log_gate[..., None]
        if isinstance(routing, Routing):
            clusters = layer.clusters.squeeze(-1)
            far = remote_keys(layer.pattern, routing.query_clusters, clusters, layout.positions, positions)
        elif routing.memory is not None:
            first = layer.slots.local + layer.slots.nodes
            ends = first, key.shape[2] - first - layer.slots.memory
            log_gate = log_gate + F.pad(routing.memory.bias[:, None, None].expand(-1, -1, layer.slots.memory), ends)
        hidden = torch.full((), float("-inf"), dtype=query.dtype, device=query.device)
        mask = bias = _computed_once(torch.where(far, log_gate.to(query.dtype), torch.where(mask, 0.0, hidden)))
    if query.shape[2] == 1 and query.device.type == "cpu" and torch.compiler.is_compiling():
        return _one_query(query, key, value, bias, scale)
    return masked_attention(query, key, value, scale, mask)


def _one_query(query, key, value, bias, scale: float) -> torch.Tensor:
    """The same from products and sums, which compiled code fuses; torch's kernel for the CPU is slow for a single query."""
    if key.shape[2] > FUSED_KEYS and query.dtype == torch.bfloat16:
        return single_query(query, key, value, scale, bias)[0]
    groups = key.shape[1]
    query, bias = query.float().unflatten(1, (groups, -1)), bias.float()
    bias = bias.unflatten(1, (groups, -1)) if bias.shape[1] > 1 else bias.unsqueeze(2)
    scores = (query * key.float()[:, :, None]).sum(-1) * scale + bias[..., 0, :]
    output = (scores.softmax(-1)[..., None] * value.float()[:, :, None]).sum(-2)
    return output.to(value.dtype).flatten(1, 2).unsqueeze(2)


def _visible(layer: StaticPatternLayer, layout: StaticLayout, num_keys: int):
    """Positions of the keys `[B, K]` as far as the window is concerned, the local keys `[B, 1, Q, K]`, in a global layer the nodes
    and memory tokens, else None, and the local keys as what is added to scores: loops with a bool in them are not vectorised."""
    slots, pattern = layer.slots, layer.pattern
    joined = num_keys > slots.total
    following = layout.before if joined else layout.after
    new = [layout.positions] if joined else []
    held = slots.held(following)

    def keys(local, nodes, memory):
        return torch.cat((local, nodes, memory, held.new_full((len(held), 1), -1), *new), 1)

    blank = [held.new_full((len(held), count), -1) for count in (slots.local, slots.nodes, slots.memory)]
    positions = keys(held, *blank[1:])
    near, far = _computed_once(visible_keys(pattern, layout.positions, positions)[:, None]), None
    if pattern.global_stride:
        nodes = visible_nodes(pattern, layout.positions, keys(blank[0], slots.held_nodes(following), blank[2]))
        numbers = torch.arange(num_keys, device=held.device) - slots.local - slots.nodes
        far = _computed_once((nodes | ((numbers >= 0) & (numbers < slots.memory)))[:, None])
    return positions, near, far, _computed_once(torch.zeros(near.shape, device=held.device).masked_fill(~near, float("-inf")))


def _computed_once(mask: torch.Tensor) -> torch.Tensor:
    """The same tensor; compiled code would compute it anew wherever it is used, but for one with strides of its own."""
    mask = mask.contiguous()
    return mask.as_strided(mask.shape, mask.stride()) if torch.compiler.is_compiling() else mask


def forward_layout(
    cache: Cache | None, inputs: torch.Tensor, attention_mask, position_ids, seq_idx, config
) -> tuple[AttentionLayout | StaticLayout, torch.Tensor]:
    """Where the new tokens of a forward stand, and the positions by which they are rotated.

    Closed layers of a static cache are opened where this forward is not a step for them: several tokens outside of compiled
    code, packed documents, or the reference implementation.

    Args:
        inputs: `[B, Q]` ids or `[B, Q, hidden]` embeddings; the others as in `DeepseekR1TextModel.forward`.
        config: the text model's; its dense reference has no steps, and bidirectional layers need every position.
    """
    batch, length = inputs.shape[:2]
    past, past_positions = 0, None
    if cache is not None:
        closed = getattr(cache.layers[0], "is_closed", False)
        compiling = torch.compiler.is_compiling()
        if closed and config._attn_implementation != "eager" and seq_idx is None and (length == 1 or compiling):
            layout = StaticLayout.build(cache.layers[0].next_positions, length, attention_mask)
            return layout, layout.positions.clamp(min=0) if position_ids is None else position_ids
        for layer in cache.layers if closed else ():
            layer.open()
        first = cache.layers[0].open_layer
        past, past_positions = first.seen, first.next_positions
    layout = AttentionLayout.build(
        batch,
        length,
        past=past,
        past_positions=past_positions,
        attention_mask=attention_mask,
        position_ids=position_ids,
        seq_idx=seq_idx,
        cached=cache is not None or config.use_bidirectional_attention,
    )
    if position_ids is None and layout.is_regular:
        position_ids = torch.arange(past, past + length, device=inputs.device).unsqueeze(0)
    elif position_ids is None:
        position_ids = layout.positions.clamp(min=0)
    return layout, position_ids


def close_cache(cache: Cache | None) -> None:
    """Ends a forward: the layers of a static cache put what they have got into their slots."""
    for layer in cache.layers if cache is not None else ():
        if isinstance(layer, StaticPatternLayer) and layer.open_layer is not None:
            layer.close()
