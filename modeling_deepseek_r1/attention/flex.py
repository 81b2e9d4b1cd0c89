"""Every pattern as one call of torch's flex_attention (https://arxiv.org/abs/2412.05496): the pattern's predicate as a mask for
single pairs, blocks of pairs that nobody sees left out, and log-gates added to the scores of remote keys.

flex_attention has no gradients on a CPU, and once a call has failed for that reason the compiled function silently runs as a dense
one; so gradients there are refused before it runs. The map of blocks is made from a few rows of pairs at a time.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, R chosen clusters, D head size.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .nodes import Nodes, extended_keys
from .pattern import AttentionPattern, keys_after
from .routed import Routing

BLOCK = 128
"""Queries and keys of a block of the mask."""
MAX_COMPILATIONS = 1024
"""On a CPU every length is compiled for itself: with lengths left open, inductor's code for it does not compile."""


@cache
def compiled_flex(device_type: str) -> Callable:
    """flex_attention, compiled. It raises where it would otherwise give up compiling and fill the memory."""
    return torch.compile(flex_attention, fullgraph=True, dynamic=False if device_type == "cpu" else None)


def flex_pattern_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    scale: float,
    places: tuple,
    routing: Routing | Nodes | None = None,
) -> torch.Tensor:
    """Attention over the keys of a pattern, in one call.

    Args:
        query: `[B, H, Q, D]`. key, value: `[B, G, K, D]`.
        places: positions of queries `[B, Q]` and keys `[B, K]`, and their documents or None, as in `visible_keys`.
        routing: clusters and gate of a routed layer, or gate, memory and nodes of a global one.

    Returns:
        `[B, H, Q, D]`; rows of padding are finite and mean nothing.

    Raises:
        NotImplementedError: gradients are needed on a CPU.
    """
    _check_gradients(query, key, value, *([routing.log_gate] if routing is not None else []))
    if not torch.is_grad_enabled():
        # On a CPU it refuses tensors that could have a gradient, even where none is computed.
        query, key, value = query.detach(), key.detach(), value.detach()
    log_gate, is_memory, is_node, bias = routing.log_gate if routing is not None else None, None, None, None
    if isinstance(routing, Nodes):
        key, value, places, is_node, is_memory = extended_keys(key, value, routing, pattern, places)
        bias = routing.memory.bias if routing.memory is not None else None
    local, remote = _local(pattern, places, is_node, is_memory), None
    if isinstance(routing, Nodes):
        remote = _nodes(pattern, places, is_node, is_memory)
    elif routing is not None:
        remote = _clusters(pattern, places, routing)

    def visible(b, h, q, k):
        return local(b, h, q, k) | remote(b, h, q, k) if remote is not None else local(b, h, q, k)

    def gated(score, b, h, q, k):
        raised = score + log_gate[b, h, q]
        if bias is not None:
            raised = torch.where(is_memory[k], raised + bias[h], raised)
        return torch.where(local(b, h, q, k), score, raised)

    heads = query.shape[1] if isinstance(routing, Routing) else 1
    blocks = block_mask(visible, query.shape[0], heads, query.shape[2], key.shape[2], query.device)
    score_mod = gated if remote is not None else None
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILATIONS):
        compiled = compiled_flex(query.device.type)
        # Its kernels for GPUs want heads of 16 numbers at least.
        states = [F.pad(x, (0, max(0, 16 - x.shape[3]))) for x in (query, key, value)]
        output = compiled(*states, score_mod, blocks, scale, query.shape[1] != key.shape[1])
        return output[..., : query.shape[3]]


def _check_gradients(*states: torch.Tensor) -> None:
    if states[0].device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in states):
        raise NotImplementedError(
            'attn_implementation="flex_attention" has no gradients on a CPU; wrap the call in torch.no_grad(), or train with "sdpa"'
        )


def block_mask(visible: Callable, batch: int, heads: int, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    """Which blocks of pairs are seen wholly, in part or not at all, from a block's row of pairs at a time.

    Args:
        visible: of indices `(b, h, q, k)` of any shapes that go together.
    """
    b, h, k = (torch.arange(n, device=device) for n in (batch, heads, num_keys))
    some, whole = [], []
    for start in range(0, num_queries, BLOCK):
        q = torch.arange(start, min(start + BLOCK, num_queries), device=device)
        seen = visible(b[:, None, None, None], h[:, None, None], q[:, None], k).expand(batch, heads, len(q), num_keys)
        seen = F.pad(seen, (0, -num_keys % BLOCK)).unflatten(-1, (-1, BLOCK))
        some.append(seen.any(-1).any(2))
        whole.append(seen.all(-1).all(2))
    some, whole = torch.stack(some, 2), torch.stack(whole, 2)
    lists = [*_listed(some & ~whole), *_listed(whole)]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(num_queries, num_keys))


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of blocks, how many are true, and their numbers, followed by those of the others."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32), order.to(torch.int32)


def _pair(pattern: AttentionPattern, places: tuple) -> Callable:
    """Of indices `(b, q, k)`: both positions and the keys after the latter, and whether they are of one document."""
    queries, keys, own, others = places
    after = None if pattern.causal else keys_after(keys, others)

    def pair(b, q, k):
        place = queries[b, q], keys[b, k], None if after is None else after[b, k]
        return place, True if own is None else own[b, q] == others[b, k]

    return pair


def _local(pattern: AttentionPattern, places: tuple, is_node, is_memory) -> Callable:
    pair, apart = _pair(pattern, places), is_node is not None and is_node.dim() == 1

    def local(b, h, q, k):
        place, same = pair(b, q, k)
        visible = pattern.sees(*place) & same
        if apart:
            visible = visible & ~is_node[k]
        return visible if is_memory is None else visible & ~is_memory[k]

    return local


def _nodes(pattern: AttentionPattern, places: tuple, is_node, is_memory) -> Callable:
    pair, apart = _pair(pattern, places), is_node.dim() == 1

    def remote(b, h, q, k):
        place, same = pair(b, q, k)
        far = pattern.behind(*place) if pattern.causal else pattern.behind(*place) | pattern.ahead(*place)
        node = far & same & (is_node[k] if apart else is_node[b, k])
        return node if is_memory is None else node | is_memory[k]

    return remote


def _clusters(pattern: AttentionPattern, places: tuple, routing: Routing) -> Callable:
    pair, limit = _pair(pattern, places), pattern.routed_tokens
    wanted, clusters, choices = routing.query_clusters, routing.key_clusters, routing.query_clusters.shape[-1]
    groups = wanted.shape[1] // clusters.shape[1]
    rank, before, until = _ranks(pattern, places, routing)

    def remote(b, h, q, k):
        place, same = pair(b, q, k)
        behind, group = pattern.behind(*place) & same, h // groups
        found = behind & False
        for choice in range(choices):
            member = clusters[b, group, k] == wanted[b, h, q, choice]
            near = behind & (rank[b, group, k] >= before[b, h, q, choice] - limit)
            if not pattern.causal:
                near = near | (pattern.ahead(*place) & same & (rank[b, group, k] < until[b, h, q, choice] + limit))
            found = found | (member & near)
        return found

    return remote


def _ranks(pattern: AttentionPattern, places: tuple, routing: Routing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The number of each key among the keys of its cluster and document that may be remote, `[B, G, K]`; and how many of these there
    are in each of a query's clusters before its window, and before the first one behind it, `[B, H, Q, R]`."""
    queries, keys, own, others = places
    wanted, clusters = routing.query_clusters, routing.key_clusters.long()
    batch, groups, _ = clusters.shape
    own, others = (torch.zeros_like(x) if y is None else y for x, y in ((queries, own), (keys, others)))
    number, span = int(max(clusters.max(), wanted.max())) + 1, int(max(queries.max(), keys.max())) + 2
    edge = keys < pattern.num_sink_tokens
    if not pattern.causal:
        edge = edge | (keys_after(keys, None if places[3] is None else others) < pattern.num_sink_tokens)
    codes = (others[:, None] * number + clusters) * span + keys[:, None]
    codes = codes.masked_fill((edge | (keys < 0))[:, None], -1)
    ordered = codes.sort(-1).values

    def count(bound):
        bound = bound.reshape(batch, groups, -1)
        return torch.searchsorted(ordered, bound)

    rank = count(codes) - count(codes - keys[:, None])
    first = (own[:, None, :, None] * number + wanted.long()) * span
    position = queries[:, None, :, None]
    ends = (position - pattern.window + 1).clamp(min=0), (position + pattern.window).clamp(max=span - 1)
    before, until = ((count(first + end) - count(first)).view(wanted.shape) for end in ends)
    return rank.view(clusters.shape), before, until
