"""Full and local attention by blocks of queries: never a tensor of n x n scores.

A plan says, for each block of queries, which ranges of keys it meets and under which mask; the autograd function below runs
any plan, forward and backward, with one small product per part, and keeps nothing but its inputs, the output and the
log-sum-exp. Parts over disjoint keys are merged exactly: with outputs o_p and log-sum-exps l_p,

    l = logsumexp_p l_p        o = sum_p exp(l_p - l) o_p

and the gradient of a part is the one of its own kernel, called with the merged o and l (FlashAttention's backward,
https://arxiv.org/abs/2307.08691, needs no more than these). A part under a gate g counts with l_p + log g; its kernel is called
with l - log g, and the gradient of log g is exp(l_p + log g - l) (o_p - o) . do.

Cost of the local plan: n (W + S + block) query-key pairs, linear in n.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from .flash import FlashKernel
from .kernels import attend, attend_backward
from .pattern import AttentionPattern

LOCAL_BLOCK = 128
"""Queries per block of the local plan. Smaller blocks compute fewer masked pairs, larger ones multiply faster."""


@dataclass(frozen=True)
class Part:
    """Keys that a block of queries meets in one product: `ranges` of the key sequence, joined; `mask` `[Q, K]` additive; `kernel`
    computes the product, or that of this library."""

    ranges: tuple[tuple[int, int], ...]
    mask: torch.Tensor | None = None
    causal: bool = False
    kernel: FlashKernel | None = None


@dataclass(frozen=True)
class Block:
    """Queries `start:stop` and the parts that make up their visible keys."""

    start: int
    stop: int
    parts: tuple[Part, ...]


def full_plan(num_queries: int, num_keys: int, kernel: FlashKernel | None = None) -> list[Block]:
    """Every query sees all keys up to its own position; the queries are the last `num_queries` positions."""
    if kernel is not None:
        return [Block(0, num_queries, (Part(((0, num_keys),), causal=True, kernel=kernel),))]
    past = num_keys - num_queries
    own = Part(((past, num_keys),), causal=True)
    return [Block(0, num_queries, (Part(((0, past),)), own) if past else (own,))]


def local_plan(
    pattern: AttentionPattern,
    num_queries: int,
    num_keys: int,
    seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
    kernel: FlashKernel | None = None,
) -> list[Block]:
    """Sliding window and sink tokens; where the pattern is not causal, queries and keys are a whole document.

    Args:
        num_queries: the queries are the positions `seq_len - num_queries ... seq_len - 1`.
        num_keys: the keys are the first tokens of the document followed by the last ones, `num_keys` in all; what lies
            between has been dropped by the cache and must be visible to none of the queries.
        seq_len: tokens of the document so far.
        kernel: computes the products of a plan without masks; default: those of this library.
    """
    if not pattern.causal:
        return _two_sided_plan(pattern, num_keys, dtype, device)
    if kernel is not None:
        return _plan_without_masks(pattern, num_queries, num_keys, seq_len, kernel)
    window, sinks = pattern.window, min(pattern.num_sink_tokens, num_keys)
    dropped = seq_len - num_keys
    first = seq_len - num_queries
    interior = None
    blocks = []
    for start in range(0, num_queries, LOCAL_BLOCK):
        stop = min(num_queries, start + LOCAL_BLOCK)
        # First position in the window of the block's first query; sink tokens that the window reaches are met only once.
        low = max(first + start - window + 1, sinks)
        ranges = (
            ((0, first + stop - dropped),) if low <= sinks + dropped else ((0, sinks), (low - dropped, first + stop - dropped))
        )
        ranges = tuple(r for r in ranges if r[0] < r[1])
        is_interior = (
            len(ranges) == (2 if sinks else 1) and low == first + start - window + 1 > sinks and stop - start == LOCAL_BLOCK
        )
        mask = interior if is_interior else None
        if mask is None:
            mask = _local_mask(window, sinks, first + start, first + stop, ranges, dropped, dtype, device)
            interior = mask if is_interior else interior
        blocks.append(Block(start, stop, (Part(ranges, mask),)))
    return blocks


def _local_mask(window, sinks, start, stop, ranges, dropped, dtype, device) -> torch.Tensor:
    slots = torch.cat([torch.arange(a, b, device=device) for a, b in ranges])
    keys = torch.where(slots < sinks, slots, slots + dropped)
    queries = torch.arange(start, stop, device=device)[:, None]
    return _additive(AttentionPattern(window, sinks).sees(queries, keys), dtype)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _two_sided_plan(pattern: AttentionPattern, length: int, dtype: torch.dtype, device: torch.device) -> list[Block]:
    """Windows to both sides, the first tokens and the last ones."""
    window, edge = pattern.window, min(pattern.num_sink_tokens, length)
    interior, blocks = None, []
    for start in range(0, length, LOCAL_BLOCK):
        stop = min(length, start + LOCAL_BLOCK)
        low, high = max(start - window + 1, edge), min(stop + window - 1, length - edge)
        ranges = ((0, edge), (low, high), (length - edge, length)) if 2 * edge < length else ((0, length),)
        ranges = tuple(r for r in ranges if r[0] < r[1])
        is_interior = stop - start == LOCAL_BLOCK and edge < low and high < length - edge
        mask = interior if is_interior else None
        if mask is None:
            keys = torch.cat([torch.arange(a, b, device=device) for a, b in ranges])
            queries = torch.arange(start, stop, device=device)[:, None]
            mask = _additive(pattern.sees(queries, keys, length - 1 - keys), dtype)
            interior = mask if is_interior else interior
        blocks.append(Block(start, stop, (Part(ranges, mask),)))
    return blocks


def _plan_without_masks(pattern, num_queries, num_keys, seq_len, kernel: FlashKernel) -> list[Block]:
    """At most three blocks: queries whose window reaches all earlier keys, those that see some of the sink tokens besides (the
    first ones up to `position - window`, again a causal product), and those that see all of them besides."""
    window, sinks = pattern.window, min(pattern.num_sink_tokens, num_keys)
    first, dropped = seq_len - num_queries, seq_len - num_keys
    turns = (window, window + sinks - 1) if sinks else ()
    blocks = []
    for start, stop in pairwise(sorted({first, seq_len, *(turn for turn in turns if first < turn < seq_len)})):
        low = max(start - window + 1, 0)
        parts = [Part(((low - dropped, stop - dropped),), causal=True, kernel=replace(kernel, window=window))]
        if sinks and start >= window:
            all_sinks = start >= window + sinks - 1
            parts.append(Part(((0, sinks if all_sinks else stop - window),), causal=not all_sinks, kernel=kernel))
        blocks.append(Block(start - first, stop - first, tuple(parts)))
    return blocks


def blockwise_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: list[Block], scale: float
) -> torch.Tensor:
    """Runs a plan.

    Args:
        query: `[B, H, Q, D]`.
        key, value: `[B, G, K, D]`, G dividing H.

    Returns:
        `[B, H, Q, D]`.
    """
    return _BlockwiseAttention.apply(query, key, value, plan, scale)


def _gather(states: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    pieces = [states[:, :, a:b] for a, b in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def run_plan(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: list[Block], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Q, D]` and log-sum-exp `[B, H, Q]` of a plan, without autograd. Queries before its first block
    and after its last one see nothing: 0 and -inf."""
    output = torch.empty_like(query)
    logsumexp = query.new_empty(query.shape[:3], dtype=sum_dtype(query))
    first, last = (plan[0].start, plan[-1].stop) if plan else (query.shape[2],) * 2
    for unseeing in (slice(0, first), slice(last, None)):
        output[:, :, unseeing] = 0.0
        logsumexp[:, :, unseeing] = float("-inf")
    for block in plan:
        rows = query[:, :, block.start : block.stop]
        results = [
            (part.kernel.attend if part.kernel else attend)(
                rows, _gather(key, part.ranges), _gather(value, part.ranges), scale, part.mask, part.causal
            )
            for part in block.parts
        ]
        merged, total = results[0] if len(results) == 1 else merge_parts(results)
        output[:, :, block.start : block.stop] = merged
        logsumexp[:, :, block.start : block.stop] = total
    return output, logsumexp


def run_plan_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    plan: list[Block],
    scale: float,
) -> list[torch.Tensor]:
    """Gradients of query, key and value, in float32 at least; `output` and `logsumexp` may be those of a larger merge."""
    # Many blocks add to the gradient of one key (all of them to a sink token's), too many for a sum in bfloat16.
    grads = [torch.zeros(x.shape, dtype=sum_dtype(x), device=x.device) for x in (query, key, value)]
    for block in plan:
        rows = slice(block.start, block.stop)
        for part in block.parts:
            shares = (part.kernel.attend_backward if part.kernel else attend_backward)(
                grad[:, :, rows], query[:, :, rows], _gather(key, part.ranges), _gather(value, part.ranges),
                output[:, :, rows], logsumexp[:, :, rows], scale, part.mask, part.causal,
            )  # fmt: skip
            grads[0][:, :, rows] += shares[0]
            offset = 0
            for a, b in part.ranges:
                grads[1][:, :, a:b] += shares[1][:, :, offset : offset + b - a]
                grads[2][:, :, a:b] += shares[2][:, :, offset : offset + b - a]
                offset += b - a
    return grads


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plan, scale):
        output, logsumexp = run_plan(query, key, value, plan, scale)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *tensors, output, logsumexp = ctx.saved_tensors
        grads = run_plan_backward(grad, *tensors, output, logsumexp, ctx.plan, ctx.scale)
        return *(x.to(y.dtype) for x, y in zip(grads, tensors, strict=True)), None, None


def merge_parts(results: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of one softmax over several disjoint key sets, from those of each set.

    Args:
        results: outputs `[B, H, Q, D]` with log-sum-exps `[B, H, Q]`.
    """
    sums = torch.stack([logsumexp for _, logsumexp in results])
    total = sums.logsumexp(0)
    shares = (sums - total).exp()
    merged = sum(share.unsqueeze(-1) * output for share, (output, _) in zip(shares, results, strict=True))
    return merged.to(results[0][0].dtype), total


def merge_gated(
    local: tuple[torch.Tensor, torch.Tensor], remotes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """One softmax over a part that is never empty and others, each under a gate.

    Args:
        local: output `[B, H, Q, D]` and log-sum-exp `[B, H, Q]`.
        remotes: the same of other parts (log-sum-exp -inf where one is empty), and the logarithm of each one's gate `[B, H, Q]`.

    Returns:
        Merged output and log-sum-exp, and the share of each remote part in the output, `[B, H, Q]`.
    """
    output, total = local
    raised = [logsumexp + log_gate for _, logsumexp, log_gate in remotes]
    for one in raised:
        total = torch.logaddexp(total, one)
    shares = [(one - total).exp() for one in raised]
    merged = output.to(total.dtype) * (local[1] - total).exp().unsqueeze(-1)
    for share, (remote, _, _) in zip(shares, remotes, strict=True):
        merged.addcmul_(share.unsqueeze(-1), remote.to(total.dtype))
    return merged.to(output.dtype), total, shares


def gate_gradient(grad: torch.Tensor, output: torch.Tensor, remote: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Gradient `[B, H, Q]` of the logarithm of a remote part's gate; `output` is the merged one."""
    return ((remote.to(share.dtype) - output) * grad).sum(-1) * share


def sum_dtype(states: torch.Tensor) -> torch.dtype:
    """The dtype in which log-sum-exps and sums of gradients are kept."""
    return torch.promote_types(states.dtype, torch.float32)
