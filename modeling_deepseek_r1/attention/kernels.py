"""One attention product that also returns its log-sum-exp, and its backward.

On a CPU these are the fused kernels behind `scaled_dot_product_attention`, which share key/value heads between query heads
without copying them; on an NVIDIA GPU its memory-efficient ones (`cuda_kernels.py`); elsewhere they are computed in float32 from
the scores, a bounded number of rows at a time. The log-sum-exp is what lets results over disjoint key sets be merged exactly
(`blockwise.py`). Neither function is differentiable by autograd: the CPU kernel's log-sum-exp carries no gradient, so its users
bring a backward of their own.

Shapes: query `[B, H, Q, D]`, key and value `[B, G, K, D]` with G dividing H, mask `[Q, K]` additive in the query's dtype,
log-sum-exp `[B, H, Q]` float32.
"""

import torch
import torch.nn.functional as F

from .cuda_kernels import masked_attend, masked_attend_backward, suits

_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

MAX_SCORES = 2**24
"""Scores held at once by the portable computation, per batch row and head."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of a block. `causal` needs Q = K and excludes `mask`.

    Returns:
        The output `[B, H, Q, D]` in the query's dtype and the log-sum-exp `[B, H, Q]` of the scaled scores.
    """
    if suits_products(query):
        return single_query(query, key, value, scale, mask)
    if query.device.type == "cpu":
        return _cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return (masked_attend if suits(query) else portable_attend)(query, key, value, scale, mask, causal)


def attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. With the output and log-sum-exp of a merged softmax they are this part's share of it."""
    if query.device.type == "cpu":
        return _cpu_backward(grad, query, key, value, output, logsumexp, 0.0, causal, attn_mask=mask, scale=scale)
    compute = masked_attend_backward if suits(query) else portable_attend_backward
    return compute(grad, query, key, value, output, logsumexp, scale, mask, causal)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`scaled_dot_product_attention` by the faster of its kernel and plain products. The mask may be bool, or `[B, H, Q, K]`."""
    if suits_products(query):
        return single_query(query, key, value, scale, mask)[0]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def suits_products(query: torch.Tensor) -> bool:
    """Whether `single_query` is the faster way: for one query in bfloat16 torch's kernel for CPUs takes up to 20 times as long."""
    return query.shape[2] == 1 and query.dtype == torch.bfloat16 and query.device.type == "cpu"


def single_query(query, key, value, scale, mask=None):
    """`attend` for `[B, H, 1, D]` by two products, whose results are rounded to the dtype; a query that sees nothing gets a mean."""
    rows = query.reshape(len(query), key.shape[1], -1, query.shape[3])
    scores = (rows @ key.transpose(2, 3)).float() * scale
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        mask = mask.reshape(len(mask), *rows.shape[1:3], -1) if mask.dim() == 4 and mask.shape[1] > 1 else mask
        scores = (scores + mask).clamp(min=torch.finfo(torch.float32).min)
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    output = (weights / total).to(value.dtype) @ value
    return output.view(query.shape), (highest + total.log()).view(query.shape[:3])


def portable_attend(query, key, value, scale, mask=None, causal=False):
    """`attend` from plain tensor operations, on any device."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    outputs, sums = [], []
    for start, stop in _rows(query.shape[2], key.shape[2]):
        scores = _scores(query, key, scale, mask, causal, start, stop)
        sums.append(scores.logsumexp(-1))
        outputs.append(((scores - sums[-1].unsqueeze(-1)).exp() @ value).to(query.dtype))
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def portable_attend_backward(grad, query, key, value, output, logsumexp, scale, mask=None, causal=False):
    """`attend_backward` from plain tensor operations, on any device."""
    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    delta = (grad.float() * output.float()).sum(-1, keepdim=True)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.zeros_like(wide_key), torch.zeros_like(wide_value)
    for start, stop in _rows(query.shape[2], key.shape[2]):
        rows = slice(start, stop)
        weights = (_scores(query, wide_key, scale, mask, causal, start, stop) - logsumexp[:, :, rows, None]).exp()
        grad_value += weights.transpose(2, 3) @ grad[:, :, rows].float()
        grad_scores = weights * (grad[:, :, rows].float() @ wide_value.transpose(2, 3) - delta[:, :, rows]) * scale
        grad_query[:, :, rows] = (grad_scores @ wide_key).to(query.dtype)
        grad_key += grad_scores.transpose(2, 3) @ query[:, :, rows].float()
    grad_key, grad_value = (x.unflatten(1, (key.shape[1], groups)).sum(2).to(key.dtype) for x in (grad_key, grad_value))
    return grad_query, grad_key, grad_value


def _rows(num_queries: int, num_keys: int) -> list[tuple[int, int]]:
    step = max(1, MAX_SCORES // num_keys)
    return [(start, min(num_queries, start + step)) for start in range(0, num_queries, step)]


def _scores(query, key, scale, mask, causal, start, stop):
    scores = query[:, :, start:stop].float() @ key.transpose(2, 3) * scale
    if mask is not None:
        scores = scores + mask[..., start:stop, :].float()
    if causal:
        positions = torch.arange(key.shape[2], device=key.device)
        scores = scores.masked_fill(positions > positions[start:stop, None], float("-inf"))
    return scores
