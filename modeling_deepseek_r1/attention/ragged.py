"""Padded, packed and otherwise irregular batches, one document at a time.

Rows of the same structure are taken together; each row is cut into its documents, and each document, free of padding, goes
through the blockwise implementation. Nothing is computed for padding or between documents. For a few new tokens (decoding) a
mask over the cached keys is cheaper than cutting, since it is small.
"""

import torch
import torch.nn.functional as F

from .blockwise import blockwise_attention, full_plan, local_plan
from .cuda_kernels import torch_kernel
from .flash import FlashKernel
from .kernels import masked_attention
from .nodes import Nodes, dense_inputs, global_attention
from .pattern import AttentionLayout, AttentionPattern, RowGroup, remote_keys, visible_keys
from .routed import Routing, routed_attention

MASKED_QUERIES = 16
"""Up to this many new tokens a mask `[B, Q, K]` is built instead of cutting the batch into documents."""


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    scale: float,
    seq_len: int,
    routing: Routing | Nodes | None = None,
    kernel: FlashKernel | None = None,
) -> torch.Tensor:
    """Attention of the last tokens of one document, equal in all rows of the batch.

    Args:
        query: `[B, H, Q, D]`, the positions `seq_len - Q ... seq_len - 1`.
        key, value: `[B, G, K, D]`, the first tokens of the document followed by its last ones.
        seq_len: tokens of the document so far.
        routing: clusters and gate of a routed layer, which holds all keys; or gate, memory and nodes of a global one.
        kernel: computes the products that need no mask; default: torch's on an NVIDIA GPU, else those of this library.

    Returns:
        `[B, H, Q, D]`.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    kernel = kernel or torch_kernel(query)
    if isinstance(routing, Nodes):
        # Without remote keys it is the local layer; in training the gate gets its (zero) gradient nevertheless.
        reached = seq_len > pattern.first_node + pattern.window or not pattern.causal
        if routing.memory is not None or reached or torch.is_grad_enabled():
            return global_attention(query, key, value, routing, pattern, scale, seq_len, kernel)
        routing, pattern = None, pattern.local
    if routing is not None and seq_len > pattern.window + pattern.num_sink_tokens:
        return routed_attention(query, key, value, routing, pattern, scale, kernel)
    if num_queries == 1 and (pattern.capacity is None or num_keys <= pattern.capacity + 1):
        # Whatever the cache has kept is visible to the next token.
        return masked_attention(query, key, value, scale)
    if pattern.window is None or pattern.window >= seq_len:
        if num_queries == num_keys and (kernel is None or kernel.in_sdpa or not pattern.causal):
            return F.scaled_dot_product_attention(query, key, value, is_causal=pattern.causal, scale=scale, enable_gqa=True)
        plan = full_plan(num_queries, num_keys, kernel)
    else:
        plan = local_plan(pattern, num_queries, num_keys, seq_len, query.dtype, query.device, kernel)
    return blockwise_attention(query, key, value, plan, scale)


def ragged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    scale: float,
    layout: AttentionLayout,
    key_positions: torch.Tensor,
    key_documents: torch.Tensor | None,
    routing: Routing | Nodes | None = None,
    kernel: FlashKernel | None = None,
) -> torch.Tensor:
    """Attention over an irregular layout.

    Args:
        query: `[B, H, Q, D]`.
        key, value: `[B, G, K, D]`: the cached keys followed by the Q new ones.
        key_positions: `[B, K]`, -1 = not a key.
        key_documents: `[B, K]` or None.
        routing: clusters and gate of a routed layer, or gate and memory of a global one.
        kernel: as in `document_attention`.

    Returns:
        `[B, H, Q, D]`; rows of padding are finite and mean nothing.
    """
    if query.shape[2] <= MASKED_QUERIES and key.shape[2] > query.shape[2]:
        mask = layout.masks.get(pattern)
        if mask is None:
            mask = visible_keys(pattern, layout.positions, key_positions, layout.documents, key_documents)[:, None]
            layout.masks[pattern] = mask
        if routing is not None:
            positions = layout.positions, key_positions, layout.documents, key_documents
            if isinstance(routing, Nodes):
                key, value, mask, remote, log_gate = dense_inputs(key, value, mask[:, 0], routing, pattern, positions)
                mask = mask[:, None]
            else:
                remote = remote_keys(pattern, routing.query_clusters, routing.key_clusters, *positions)
                log_gate = routing.log_gate[..., None]
            hidden = torch.full((), float("-inf"), dtype=query.dtype, device=query.device)
            mask = torch.where(remote, log_gate.to(query.dtype), torch.where(mask, 0.0, hidden))
        return masked_attention(query, key, value, scale, mask)
    groups = layout.row_groups
    if len(groups) == 1:
        return _group_attention(query, key, value, pattern, scale, groups[0], key_positions, routing, kernel)
    outputs = []
    for group in groups:
        rows = torch.tensor(group.rows, device=query.device)
        selected = (x.index_select(0, rows) for x in (query, key, value))
        own = routing and routing.rows(rows)
        outputs.append(_group_attention(*selected, pattern, scale, group, key_positions[rows], own, kernel))
    order = torch.tensor([row for group in groups for row in group.rows], device=query.device)
    return torch.cat(outputs).index_select(0, order.argsort())


def _group_attention(query, key, value, pattern, scale, group: RowGroup, key_positions, routing, kernel=None):
    num_queries = query.shape[2]
    num_cached = key.shape[2] - num_queries
    lengths = [length for _, length in group.runs]
    # `split` has one backward for all pieces; slicing would make a full-size gradient for each.
    queries = query.split(lengths, 2)
    keys, values = (x[:, :, num_cached:].split(lengths, 2) for x in (key, value))
    routings = routing and routing.split(lengths)
    pieces: dict[int, list[int]] = {}
    for number, (document, _) in enumerate(group.runs):
        if document is not None:
            pieces.setdefault(document, []).append(number)
    outputs = [torch.zeros_like(piece) for piece in queries]
    for document, numbers in pieces.items():
        own = [_joined(x, numbers) for x in (queries, keys, values)]
        own_routing = routing and _joined(routings, numbers, routing.join)
        seq_len = own[0].shape[2]
        if document == group.current_document and num_cached and group.past_length:
            seq_len += group.past_length
            own[1:] = [
                torch.cat((_cached(x, key_positions, num_cached), y), 2) for x, y in zip((key, value), own[1:], strict=True)
            ]
            if isinstance(routing, Nodes):
                positions = key_positions[0, :num_cached]
                own[1:], nodes = _without_nodes(own[1:], positions[positions >= 0], group.past_length, pattern)
                own_routing = own_routing._replace(held=nodes)
            elif routing is not None:
                held = _cached(routing.key_clusters.unsqueeze(-1), key_positions, num_cached).squeeze(-1)
                own_routing = own_routing._replace(key_clusters=torch.cat((held, own_routing.key_clusters), 2))
        result = document_attention(*own, pattern, scale, seq_len, own_routing, kernel)
        for number, piece in zip(numbers, result.split([lengths[n] for n in numbers], 2), strict=True):
            outputs[number] = piece
    return torch.cat(outputs, 2)


def _joined(pieces, numbers: list[int], join=lambda pieces: torch.cat(pieces, 2)):
    return join([pieces[n] for n in numbers]) if len(numbers) > 1 else pieces[numbers[0]]


def _without_nodes(states: list[torch.Tensor], positions: torch.Tensor, past: int, pattern: AttentionPattern):
    """Keys and values (the cached ones of a document, at `positions` `[K]`, and the new ones) as the cache of a global layer
    holds them without padding: first tokens and last ones, and apart from them all nodes."""
    later = torch.arange(past, past + states[0].shape[2] - len(positions), device=positions.device)
    positions = torch.cat((positions, later))
    local = ((positions > past - pattern.window) | (positions < pattern.num_sink_tokens)).nonzero().flatten()
    nodes = pattern.are_nodes(positions).nonzero().flatten()
    return ([x.index_select(2, index) for x in states] for index in (local, nodes))


def _cached(states: torch.Tensor, key_positions: torch.Tensor, num_cached: int) -> torch.Tensor:
    """The cached keys of the document in progress, in order; rows of a group hold equally many."""
    held = key_positions[:, :num_cached] >= 0
    index = held.nonzero()[:, 1].view(states.shape[0], 1, -1, 1).expand(-1, states.shape[1], -1, states.shape[3])
    return states[:, :, :num_cached].gather(2, index)
