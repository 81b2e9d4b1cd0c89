"""The attention kernels that torch has for NVIDIA GPUs: one for plans without masks, and products under a mask.

The former is FlashAttention-2 (https://arxiv.org/abs/2307.08691) in half precision, which needs no package besides torch. The
latter, of any precision, are the memory-efficient ones (https://arxiv.org/abs/2112.05682, as xFormers wrote them). Unlike the
functions around `scaled_dot_product_attention` the operators themselves know windows, causal products of fewer queries than keys,
and return the log-sum-exp. (The memory-efficient ones know windows too, but with fewer queries than keys their gradients are wrong
in torch 2.11.)

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D head size.
"""

import torch
import torch.nn.functional as F

from .flash import FlashKernel

_aten = torch.ops.aten
_CAUSAL = 2
"""The memory-efficient kernels' name for causal products aligned at the last query and the last key."""
_ALIGNED = 8
"""Numbers of a row of a mask must be a multiple of this in memory."""
_SUM_ROWS = 32
"""And those of a log-sum-exp, of this."""


def suits(states: torch.Tensor) -> bool:
    """Whether these kernels compute such tensors."""
    known = states.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return states.device.type == "cuda" and torch.version.hip is None and known


def torch_kernel(states: torch.Tensor) -> FlashKernel | None:
    """The kernel for plans over `[B, H, Q, D]` states of this dtype on this device; None where torch has none."""
    if not suits(states) or states.dtype == torch.float32 or states.shape[-1] > 256:
        return None
    return _FLASH if torch.cuda.get_device_capability(states.device) >= (8, 0) else None


def masked_attend(query, key, value, scale, mask=None, causal=False):
    """As `kernels.attend`."""
    states = [x.transpose(1, 2) for x in (query, *_wide(key, value, query.shape[1]))]
    kind, bias = _CAUSAL if causal else 0, _bias(mask, query, key)
    output, logsumexp, *_ = _aten._efficient_attention_forward(
        *_padded(states), bias, None, None, None, None, 0.0, kind, True, scale=scale
    )
    return output[..., : query.shape[3]].transpose(1, 2), logsumexp[:, :, : query.shape[2]]


def masked_attend_backward(grad, query, key, value, output, logsumexp, scale, mask=None, causal=False):
    """As `kernels.attend_backward`."""
    states = [x.transpose(1, 2) for x in (grad, query, *_wide(key, value, query.shape[1]), output)]
    kind, bias, (*states, output) = _CAUSAL if causal else 0, _bias(mask, query, key), _padded(states)
    sums = F.pad(logsumexp.float(), (0, -logsumexp.shape[2] % _SUM_ROWS), value=float("inf")).contiguous()
    none = torch.zeros((), dtype=torch.int64, device=query.device)
    *grads, _ = _aten._efficient_attention_backward(
        *states, bias, output, None, None, query.shape[2], key.shape[2], sums, 0.0, none, none, kind, False, scale=scale
    )
    grads = [x[..., : query.shape[3]].transpose(1, 2) for x in grads]
    # The gradient of a key/value head from those of its copies.
    return grads[0], *(x.unflatten(1, (key.shape[1], -1)).sum(2) for x in grads[1:])


def _padded(states: list[torch.Tensor]) -> list[torch.Tensor]:
    return [F.pad(x, (0, -x.shape[3] % _ALIGNED)).contiguous() for x in states]


def _bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The mask `[Q, K]` or `[B, 1, Q, K]` for all rows and heads, in rows of the length that the kernels want. Its lowest numbers
    are finite: a row that begins with many hidden keys would otherwise become NaN on the way."""
    if mask is None:
        return None
    lowest = torch.finfo(query.dtype).min / 2
    rows = F.pad(mask.to(query.dtype).clamp(min=lowest), (0, -mask.shape[-1] % _ALIGNED), value=lowest).contiguous()
    return rows[..., : mask.shape[-1]].expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _wide(key: torch.Tensor, value: torch.Tensor, heads: int) -> list[torch.Tensor]:
    groups = heads // key.shape[1]
    return [x if groups == 1 else x.repeat_interleave(groups, 1) for x in (key, value)]


# The signatures are those of flash_attn's functions, as `FlashKernel` calls them.


def _flash_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
):
    return _aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False,
        scale=softmax_scale, window_size_left=window_size_left, window_size_right=window_size_right,
    )[:2]  # fmt: skip


def _flash_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv,
    dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
):  # fmt: skip
    none = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = _aten._flash_attention_backward(
        dout, q, k, v, out, softmax_lse, None, None, q.shape[1], k.shape[1], 0.0, causal, none, none,
        scale=softmax_scale, window_size_left=window_size_left, window_size_right=window_size_right,
    )  # fmt: skip
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)


_FLASH = FlashKernel(_flash_forward, _flash_backward, in_sdpa=True)
