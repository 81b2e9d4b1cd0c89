"""Routed attention: a query sees its window, the sink tokens, and the most recent keys of its clusters, under a gate.

One softmax over the local set L and the remote set R of a query, the remote logits raised by log g; equivalently, with outputs
o and log-sum-exps l of the two parts,

    l = log(exp(l_L) + g exp(l_R))      o = exp(l_L - l) o_L + g exp(l_R - l) o_R

The remote set of a query at position i: in each cluster that it looks into, the most recent `routed_tokens` keys at positions
num_sink_tokens <= j <= i - window.

How it is computed without touching n x n pairs: keys are sorted by (cluster, position), and so are the (query, chosen cluster)
pairs. The keys of a pair are then a contiguous band that ends at the last key of the cluster not later than i - window, the
bands of neighbouring pairs overlap, and a block of pairs meets one short strip of keys. An empty band contributes exactly
nothing, forward and backward.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, R chosen clusters, D head size, P pairs.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .blockwise import gate_gradient, local_plan, merge_gated, run_plan, run_plan_backward
from .flash import FlashKernel
from .kernels import attend, attend_backward
from .pattern import AttentionPattern

PAIR_BLOCK = 64
"""Pairs per block."""
MAX_BATCH_SCORES = 2**18, 2**25
"""Scores of the blocks that are multiplied together, on a CPU and on other devices."""


class Routing(NamedTuple):
    """What a routed layer knows about its queries and keys.

    Attributes:
        query_clusters: `[B, H, Q, R]`.
        key_clusters: `[B, G, K]`.
        log_gate: `[B, H, Q]` float32.
    """

    query_clusters: torch.Tensor
    key_clusters: torch.Tensor
    log_gate: torch.Tensor

    def cached(self, layer) -> "Routing":
        """With what the layer of a cache holds."""
        return self._replace(key_clusters=layer.clusters.squeeze(-1))

    def rows(self, index: torch.Tensor) -> "Routing":
        """Of some rows of the batch."""
        return Routing(*(x.index_select(0, index) for x in self))

    def split(self, lengths: list[int]) -> list["Routing"]:
        """Of consecutive runs of queries and their own keys, the last ones."""
        own = self._replace(key_clusters=self.key_clusters[:, :, -sum(lengths) :])
        return [Routing(*pieces) for pieces in zip(*(x.split(lengths, 2) for x in own), strict=True)]

    def mirrored(self) -> "Routing":
        """Of the tokens in reversed order."""
        return Routing(self.query_clusters.flip(2), self.key_clusters.flip(2), self.log_gate.flip(2))

    @staticmethod
    def join(pieces: list["Routing"]) -> "Routing":
        return Routing(*(torch.cat(x, 2) for x in zip(*pieces, strict=True)))


@dataclass
class PairBatch:
    """Blocks of pairs with strips of nearly equal length.

    Attributes:
        pairs: `[N, PAIR_BLOCK]` numbers of the pairs, as (batch, head, query, choice) in row-major order; the last of a block
            may repeat, see `real`.
        real: `[N, PAIR_BLOCK]` bool.
        keys: `[N, S]` numbers of the keys: rows of `_flat(key, spacing)`.
        begin, end: `[N, PAIR_BLOCK]` int32, the band of each pair within its strip.
    """

    pairs: torch.Tensor
    real: torch.Tensor
    keys: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """`[N, 1, PAIR_BLOCK, S]` additive; made when it is needed, since the masks of all blocks would fill the memory."""
        column = torch.arange(self.keys.shape[1], device=self.keys.device, dtype=self.begin.dtype)
        hidden = (column < self.begin[:, None, :, None]) | (column >= self.end[:, None, :, None])
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def plan_pairs(routing: Routing, pattern: AttentionPattern, spacing: int | None = None) -> list[PairBatch]:
    """Sorts keys and pairs as described above. The queries are the last Q of the K positions.

    Args:
        spacing: rows of memory from the first key of a (batch, key/value head) to that of the next; default: K.
    """
    query_clusters, key_clusters = routing.query_clusters, routing.key_clusters
    batch, heads, queries, choices = query_clusters.shape
    groups, length = key_clusters.shape[1:]
    device, rows = key_clusters.device, batch * groups
    span = length + 1
    positions = torch.arange(length, device=device)
    # All rows in one vector: a CPU sorts that several times faster than the rows one by one.
    highest = max(int(query_clusters.max()), int(key_clusters.max()))
    row = torch.arange(rows, device=device)[:, None] * (highest + 2) * span
    # Sink tokens belong to no cluster: they come before all others.
    edge = positions < pattern.num_sink_tokens
    if not pattern.causal:
        edge = edge | edge.flip(0)
    clusters = torch.where(edge, -1, key_clusters.reshape(rows, length).long())
    codes, order = (row + (clusters + 1) * span + positions).flatten().sort()
    wanted = row + (query_clusters.reshape(rows, -1) + 1) * span
    last = (positions[length - queries :] - pattern.window).repeat_interleave(choices).repeat(heads // groups)
    first = torch.searchsorted(codes, wanted)
    stop = torch.maximum(torch.searchsorted(codes, wanted + last, right=True), first)
    start = torch.maximum(stop - pattern.routed_tokens, first)
    # Sorting by (row, cluster, position); empty bands go.
    filled = (stop > start).flatten().nonzero().flatten()
    if not len(filled):
        return []
    pairs = filled[(wanted + last.clamp(min=0)).flatten()[filled].argsort(stable=True)]
    if spacing is not None and spacing != length:
        order = order + order // length * (spacing - length)
    return _blocks(pairs, *(edge.flatten()[pairs] for edge in (wanted, start, stop)), order)


def plan_both_sides(routing: Routing, pattern: AttentionPattern) -> list[PairBatch]:
    """The plan of a whole document in which a query looks into its clusters twice: choices 0 ... R - 1 are the keys before its
    window, R ... 2 R - 1 those behind it, which are the former of the reversed document."""
    length, choices, batches = routing.key_clusters.shape[2], routing.query_clusters.shape[3], []
    for side, own in enumerate((routing, routing.mirrored())):
        for batch in plan_pairs(own, pattern):
            rows, keys = batch.pairs // choices, batch.keys
            if side:
                rows, keys = (x + length - 1 - 2 * (x % length) for x in (rows, keys))
            pairs = (2 * rows + side) * choices + batch.pairs % choices
            batches.append(replace(batch, pairs=pairs, keys=keys))
    return batches


def _blocks(pairs, cluster, start, stop, order) -> list[PairBatch]:
    """Cuts the sorted pairs into blocks of one cluster each, and sorts the blocks by the length of their strips."""
    device, total = pairs.device, len(pairs)
    number = torch.arange(total, device=device)
    begins = torch.ones(total, dtype=torch.bool, device=device)
    begins[1:] = cluster[1:] != cluster[:-1]
    since = number - begins.nonzero().flatten()[begins.cumsum(0) - 1]
    heads = (since % PAIR_BLOCK == 0).nonzero().flatten()
    lengths = torch.diff(heads, append=heads.new_tensor([total]))
    low = start[heads]
    strips = stop[heads + lengths - 1] - low
    by_strip = strips.argsort(descending=True)
    heads, lengths, low, strips = heads[by_strip], lengths[by_strip], low[by_strip], strips[by_strip]
    within = torch.arange(PAIR_BLOCK, device=device)
    most = MAX_BATCH_SCORES[int(device.type != "cpu")]
    batches, at, longest = [], 0, strips.tolist()
    while at < len(longest):
        strip = longest[at]
        until = min(len(longest), at + max(1, most // (PAIR_BLOCK * strip)))
        chosen = slice(at, until)
        real = within < lengths[chosen, None]
        index = heads[chosen, None] + torch.where(real, within, 0)
        column = low[chosen, None] + torch.arange(strip, device=device)
        bands = (_pick(edge, index) - low[chosen, None] for edge in (start, stop))
        bands = (band.to(torch.int32) for band in bands)
        batches.append(PairBatch(_pick(pairs, index), real, _pick(order, column.clamp(max=len(order) - 1)), *bands))
        at = until
    return batches


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, log_gate, local, batches, choices, scale, spacing):
        near = run_plan(query, key, value, local, scale)
        remote, remote_sum = _run_pairs(query, _flat(key, spacing), _flat(value, spacing), batches, choices, scale)
        output, merged, (share,) = merge_gated(near, [(remote, remote_sum, log_gate)])
        ctx.save_for_backward(query, key, value, log_gate, output, merged, remote, share)
        ctx.plans = local, batches, choices, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, log_gate, output, merged, remote, share = ctx.saved_tensors
        local, batches, choices, scale = ctx.plans
        grads = run_plan_backward(grad, query, key, value, output, merged, local, scale)
        _run_pairs_backward(grads, grad, query, key, value, output, merged - log_gate, batches, choices, scale)
        grad_gate = gate_gradient(grad, output, remote, share)
        casts = (x.to(y.dtype) for x, y in zip(grads, (query, key, value), strict=True))
        return *casts, grad_gate.to(log_gate.dtype), None, None, None, None, None


def routed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routing: Routing,
    pattern: AttentionPattern,
    scale: float,
    kernel: FlashKernel | None = None,
) -> torch.Tensor:
    """Routed attention of the last Q tokens of one document, all of whose K keys are given; of all its tokens, where the pattern is
    not causal.

    Args:
        query: `[B, H, Q, D]` after rotation. key, value: `[B, G, K, D]`.
        routing: clusters and gate.
        kernel: computes the local part; default: the products of this library.

    Returns:
        `[B, H, Q, D]`.
    """
    length = key.shape[2]
    local = local_plan(pattern, query.shape[2], length, length, query.dtype, query.device, kernel)
    choices = routing.query_clusters.shape[-1]
    if not pattern.causal:
        batches, choices, spacing = plan_both_sides(routing, pattern), 2 * choices, length
    else:
        # Gradients have no room between the heads.
        spacing = (None if torch.is_grad_enabled() else _spacing(key, value)) or length
        batches = plan_pairs(routing, pattern, spacing)
    return _RoutedAttention.apply(query, key, value, routing.log_gate, local, batches, choices, scale, spacing)


def _spacing(key: torch.Tensor, value: torch.Tensor) -> int | None:
    """Rows of memory from one head to the next where keys and values lie alike, as in a cache with room at its end; else None."""
    _, groups, _, size = key.shape
    steps = key.stride()
    regular = steps[3] == 1 and steps[2] == size and steps[1] % size == 0 and (len(key) == 1 or steps[0] == groups * steps[1])
    return steps[1] // size if regular and value.stride() == steps and value.shape == key.shape else None


def _flat(states: torch.Tensor, spacing: int) -> torch.Tensor:
    """Keys or values `[B, G, K, D]` as rows `[R, D]`; without a copy where the memory allows it (a cache may hold a long text)."""
    batch, groups, length, size = states.shape
    if spacing == length:
        return states.reshape(-1, size)
    return states.as_strided(((batch * groups - 1) * spacing + length, size), (size, 1))


def _pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`values[index]` of a vector, several times faster on a CPU."""
    return values.index_select(0, index.flatten()).view(index.shape)


def _rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `[N, 1, M, D]` of `states` `[rows, D]` by their numbers `[N, M]`."""
    # Several times faster on a CPU than states[index].
    return states.index_select(0, index.flatten()).view(index.shape[0], 1, index.shape[1], -1)


def _run_pairs(query, keys, values, batches, choices, scale):
    """The remote part: `[B, H, Q, D]` float32 and its log-sum-exp `[B, H, Q]`, 0 and -inf where it is empty.

    Args:
        keys, values: `[R, D]`, see `_flat`.
    """
    rows, size = query.shape[0] * query.shape[1] * query.shape[2], query.shape[3]
    # One row more than there are pairs takes what the last blocks have repeated.
    spare = rows * choices
    outputs = query.new_zeros(spare + 1, size)
    sums = torch.full((spare + 1,), float("-inf"), dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    queries = query.reshape(-1, size)
    for batch in batches:
        strips = (_rows(states, batch.keys) for states in (keys, values))
        part, part_sum = attend(_rows(queries, batch.pairs // choices), *strips, scale, batch.mask(query.dtype))
        target = batch.pairs.masked_fill(~batch.real, spare).flatten()
        outputs.index_copy_(0, target, part.flatten(0, 2))
        sums.index_copy_(0, target, part_sum.flatten().to(sums.dtype))
    sums, outputs = sums[:spare].view(rows, choices), outputs[:spare].view(rows, choices, size)
    total = sums.logsumexp(-1)
    shares = (sums - total.masked_fill(total.isinf(), 0.0).unsqueeze(-1)).exp()
    remote = (shares.unsqueeze(-1) * outputs).sum(1)
    return remote.view(query.shape), total.view(query.shape[:3])


def _run_pairs_backward(grads, grad, query, key, value, output, merged, batches, choices, scale) -> None:
    """Adds the remote part's gradients to `grads`, float32 tensors in the shapes of query, key and value."""
    size = query.shape[3]
    flat = [x.reshape(-1, size) for x in (query, key, value, grad, output)]
    sums = merged.reshape(-1)
    targets = [x.view(-1, size) for x in grads]
    for batch in batches:
        rows = batch.pairs // choices
        # A repeated pair at the end of a block must not count twice: with an infinite log-sum-exp its weights are zero.
        row_sums = sums[rows].masked_fill(~batch.real, float("inf"))
        shares = attend_backward(
            *(_rows(flat[i], rows) for i in (3, 0)), *(_rows(flat[i], batch.keys) for i in (1, 2)),
            _rows(flat[4], rows), row_sums.unsqueeze(1), scale, batch.mask(query.dtype),
        )  # fmt: skip
        targets[0].index_add_(0, rows.flatten(), shares[0].flatten(0, 2).to(targets[0].dtype))
        for target, share in zip(targets[1:], shares[1:], strict=True):
            target.index_add_(0, batch.keys.flatten(), share.flatten(0, 2).to(target.dtype))


def routed_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    found: torch.Tensor,
    log_gate: torch.Tensor,
    pattern: AttentionPattern,
    scale: float,
) -> torch.Tensor:
    """Routed attention of the last token of one document, without gradients; its cost does not depend on K.

    Args:
        query: `[B, H, 1, D]`. key, value: `[B, G, K, D]`.
        index: `[B, H, N]` remote keys of each query head; found: `[B, H, N]` bool, which of them count (others may be -1).
        log_gate: `[B, H, 1]`.
    """
    length, near = key.shape[2], pattern.num_sink_tokens + pattern.window
    ends = [key, value]
    if length > near:
        ends = [torch.cat((x[:, :, : pattern.num_sink_tokens], x[:, :, length - pattern.window :]), 2) for x in ends]
    local = attend(query, *ends, scale)
    if not index.shape[2]:
        return local[0]
    batch, groups = key.shape[:2]
    spacing = _spacing(key, value) or length
    head = torch.arange(query.shape[1], device=key.device)[:, None] // (query.shape[1] // groups)
    row = torch.arange(batch, device=key.device)[:, None, None] * groups + head
    flat_index = (index.clamp(min=0) + row * spacing).flatten()
    states = (_flat(x, spacing).index_select(0, flat_index).view(*index.shape, -1) for x in (key, value))
    empty = ~found.any(-1, keepdim=True)
    mask = torch.zeros(found.shape, dtype=query.dtype, device=key.device).masked_fill_(~(found | empty), float("-inf"))
    remote, remote_sum = attend(query, *states, scale, mask.unsqueeze(2))
    remote_sum = remote_sum.masked_fill(empty, float("-inf"))
    return merge_gated(local, [(remote, remote_sum, log_gate)])[0]
