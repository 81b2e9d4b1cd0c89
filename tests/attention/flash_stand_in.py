"""Functions with the signatures of flash_attn's kernels that compute densely, so that what calls them can be tested anywhere."""

import torch

from modeling_deepseek_r1.attention.flash import FlashKernel


def _scores(q, k, softmax_scale, causal, window_size_left, window_size_right):
    """States `[B, n, heads, D]`; scores `[B, H, Q, K]`, aligned at the last query and the last key."""
    assert all(x.is_contiguous() and x.shape[3] % 8 == 0 for x in (q, k))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)).float() * softmax_scale
    own = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    keys = torch.arange(k.shape[1])
    right = 0 if causal else window_size_right
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    if window_size_left >= 0:
        hidden |= keys < own - window_size_left
    if right >= 0:
        hidden |= keys > own + right
    assert not hidden.all(1).any(), "a query without keys has a log-sum-exp of +inf there"
    return scores.masked_fill(hidden, float("-inf"))


def forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
):
    scores = _scores(q, k, softmax_scale, causal, window_size_left, window_size_right)
    values = v.repeat_interleave(q.shape[2] // k.shape[2], 2)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(v.dtype), values)
    return out, scores.logsumexp(-1), None, None


def backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv,
    dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert softmax_lse.is_contiguous() and dout.is_contiguous() and out.is_contiguous()
    groups = q.shape[2] // k.shape[2]
    weights = (_scores(q, k, softmax_scale, causal, window_size_left, window_size_right) - softmax_lse[..., None]).exp()
    dout, out, wide_k, wide_v = (x.float() for x in (dout, out, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    delta = (dout * out).sum(-1).transpose(1, 2)[..., None]
    ds = weights * (torch.einsum("bqhd,bkhd->bhqk", dout, wide_v) - delta) * softmax_scale
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", ds, wide_k))
    for target, grad in (
        (dk, torch.einsum("bhqk,bqhd->bkhd", ds, q.float())),
        (dv, torch.einsum("bhqk,bqhd->bkhd", weights, dout)),
    ):
        target.copy_(grad.unflatten(2, (-1, groups)).sum(3))


STAND_IN = FlashKernel(forward, backward)
