"""The blockwise implementation against the reference: outputs and gradients, and no tensor of n x n."""

import itertools

import pytest
import torch

from modeling_deepseek_r1.attention import blockwise, kernels
from modeling_deepseek_r1.attention.pattern import AttentionLayout, AttentionPattern, visible_keys
from modeling_deepseek_r1.attention.ragged import document_attention, ragged_attention
from modeling_deepseek_r1.attention.reference import attention_reference, key_layout

W = 24
LENGTHS = [1, 63, W - 1, W, W + 1, 2 * W + 3, 300]
PATTERNS = [AttentionPattern(), AttentionPattern(W), AttentionPattern(W, 5), AttentionPattern(1, 3), AttentionPattern(150, 10)]
HEADS = [(4, 4), (6, 2), (7, 1)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def relative(actual, expected):
    return ((actual - expected).float().norm() / expected.float().norm().clamp(min=1e-6)).item()


def inputs(batch, heads, groups, queries, keys, dtype):
    shapes = [(batch, heads, queries, 16), (batch, groups, keys, 16), (batch, groups, keys, 16)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def assert_agree(actual, expected, tensors, dtype, real=None):
    grad = torch.randn_like(expected)
    if real is not None:
        actual, expected, grad = (x * real for x in (actual, expected, grad))
    assert relative(actual, expected) < TOLERANCE[dtype]
    wanted = torch.autograd.grad(expected, tensors, grad)
    for mine, theirs in zip(torch.autograd.grad(actual, tensors, grad), wanted, strict=True):
        assert relative(mine, theirs) < TOLERANCE[dtype] or (mine - theirs).abs().max() < 1e-6


def reference(tensors, pattern, layout, keys):
    visible = visible_keys(pattern, *key_layout(layout, pattern, keys, tensors[0].device))
    return attention_reference(*tensors, visible, 0.25)[0]


CASES = list(itertools.product(PATTERNS, LENGTHS, [0, 1, 40, 200], HEADS, [torch.float32, torch.bfloat16]))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.full] if number % 7 else []) for number, case in enumerate(CASES)], ids=str
)
def test_blockwise_is_the_reference(case):
    pattern, queries, past, (heads, groups), dtype = case
    tensors = inputs(2, heads, groups, queries, queries + past, dtype)
    expected = reference(tensors, pattern, AttentionLayout(2, queries, past), queries + past)
    actual = document_attention(*tensors, pattern, 0.25, queries + past)
    assert_agree(actual, expected, tensors, dtype)


@pytest.mark.parametrize("pattern", PATTERNS[1:])
@pytest.mark.parametrize("queries", [1, 5, 64, 200])
def test_keys_that_the_cache_has_dropped_are_not_missed(pattern, queries):
    past = 400
    query, key, value = inputs(1, 6, 2, queries, past + queries, torch.float32)
    expected = reference((query, key, value), pattern, AttentionLayout(1, queries, past), past + queries)
    held = torch.cat((torch.arange(pattern.num_sink_tokens), torch.arange(past - pattern.window + 1, past + queries)))
    kept = query, key[:, :, held], value[:, :, held]
    assert relative(document_attention(*kept, pattern, 0.25, past + queries), expected) < 2e-5
    assert relative(reference(kept, pattern, AttentionLayout(1, queries, past), len(held)), expected) < 2e-5


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["left", "right", "holes", "packed", "packed_and_padded"])
def test_ragged_is_the_reference(pattern, dtype, kind):
    n = 90
    mask, seq_idx = torch.ones(3, n, dtype=torch.long), None
    if kind == "left":
        mask[0, :30], mask[2, :89] = 0, 0
    if kind == "right":
        mask[0, 60:], mask[2, 1:] = 0, 0
    if kind == "holes":
        mask[0, 10:20], mask[1, ::3] = 0, 0
    if kind.startswith("packed"):
        seq_idx = torch.stack([torch.arange(n) // 45, torch.arange(n) // 7, torch.zeros(n, dtype=torch.long)])
    if kind == "packed_and_padded":
        mask[:, 80:], mask[1, :3] = 0, 0
    layout = AttentionLayout.build(3, n, attention_mask=mask, seq_idx=seq_idx)
    tensors = inputs(3, 6, 2, n, n, dtype)
    visible = visible_keys(pattern, layout.positions, layout.positions, layout.documents, layout.documents)
    expected = attention_reference(*tensors, visible, 0.25)[0]
    actual = ragged_attention(*tensors, pattern, 0.25, layout, layout.positions, layout.documents)
    assert torch.isfinite(actual).all()
    assert_agree(actual, expected, tensors, dtype, real=mask[:, None, :, None])


@pytest.mark.parametrize("heads,groups", HEADS)
@pytest.mark.parametrize("causal,masked,keys", [(True, False, 33), (False, False, 50), (False, True, 50)])
def test_portable_kernels_are_the_fused_ones(heads, groups, causal, masked, keys, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_SCORES", 7 * keys)
    query, key, value = (x.detach() for x in inputs(2, heads, groups, 33, keys, torch.float32))
    mask = torch.zeros(33, keys).masked_fill(torch.rand(33, keys) < 0.4, float("-inf")) if masked else None
    output, logsumexp = kernels.attend(query, key, value, 0.3, mask, causal)
    portable = kernels.portable_attend(query, key, value, 0.3, mask, causal)
    torch.testing.assert_close(portable[0], output)
    torch.testing.assert_close(portable[1], logsumexp)
    grad = torch.randn_like(output)
    arguments = (grad, query, key, value, output, logsumexp, 0.3, mask, causal)
    for mine, theirs in zip(kernels.portable_attend_backward(*arguments), kernels.attend_backward(*arguments), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_pass_the_numerical_check():
    query, key, value = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 9, 9))
    plans = [blockwise.full_plan(6, 9), blockwise.local_plan(AttentionPattern(3, 2), 6, 9, 9, torch.float64, query.device)]
    for plan in plans:

        def product(*tensors, plan=plan):
            return blockwise.blockwise_attention(*tensors, plan, 0.5)

        assert torch.autograd.gradcheck(product, (query, key, value))


@pytest.mark.parametrize("training", [False, True])
def test_no_tensor_grows_with_the_square_of_the_length(training):
    from torch.profiler import ProfilerActivity, profile

    def largest(n):
        pattern = AttentionPattern(64, 8)
        mask = torch.ones(2, n, dtype=torch.long)
        mask[0, : n // 4] = 0
        layout = AttentionLayout.build(2, n, attention_mask=mask)
        tensors = inputs(2, 2, 1, n, n, torch.float32)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            for one in (pattern, AttentionPattern()):
                for run in (
                    lambda one=one: document_attention(*tensors, one, 0.25, n),
                    lambda one=one: ragged_attention(*tensors, one, 0.25, layout, layout.positions, None),
                ):
                    with torch.set_grad_enabled(training):
                        output = run()
                    if training:
                        output.sum().backward()
        return max(event.cpu_memory_usage for event in record.events())

    small, large = largest(2048), largest(8192)
    assert large < 6 * small, (small, large)
    assert large < 8192 * 8192


@pytest.mark.parametrize("keys", [1, 40])
@pytest.mark.parametrize("mask_shape", [None, (1, 1), (3, 1, 1), (3, 6, 1)], ids=str)
@pytest.mark.parametrize("is_bool", [True, False])
def test_one_query_by_products(keys, mask_shape, is_bool, monkeypatch):
    query, key, value = (x.detach() for x in inputs(3, 6, 2, 1, keys, torch.bfloat16))
    mask = None
    if mask_shape is not None:
        hidden = torch.rand(*mask_shape, keys) < 0.4
        hidden[..., 0] = False
        mask = ~hidden if is_bool else torch.randn(hidden.shape).masked_fill(hidden, float("-inf"))
    wide = mask.float().log() if mask is not None and is_bool else mask
    expected = kernels.portable_attend(*(x.float() for x in (query, key, value)), 0.3, wide)
    assert kernels.suits_products(query)
    for name in ("_cpu", "F"):
        monkeypatch.setattr(kernels, name, None)
    output, logsumexp = kernels.attend(query, key, value, 0.3, mask)
    assert output.dtype == torch.bfloat16 and relative(output, expected[0]) < 1e-2
    assert (logsumexp - expected[1]).abs().max() < 2e-2
    assert torch.equal(kernels.masked_attention(query, key, value, 0.3, mask), output)


def test_one_query_that_sees_nothing_is_finite():
    query, key, value = (x.detach() for x in inputs(2, 4, 2, 1, 5, torch.bfloat16))
    nothing = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    assert kernels.masked_attention(query, key, value, 0.3, nothing).isfinite().all()
