"""What runs where an NVIDIA GPU is: torch's kernels there against the reference, and models against themselves on a CPU."""

import copy

import pytest
import torch
from transformers import DynamicCache

from modeling_deepseek_r1.attention.cuda_kernels import suits
from modeling_deepseek_r1.attention.kernels import attend, attend_backward, portable_attend, portable_attend_backward
from modeling_deepseek_r1.attention.pattern import AttentionLayout
from modeling_deepseek_r1.attention.ragged import document_attention
from modeling_deepseek_r1.attention.reference import key_layout, layer_reference
from modeling_deepseek_r1.quantization import DeepseekR1QuantizationConfig
from modeling_deepseek_r1.quantization.run import quantize_model
from tests.attention.test_flash import PATTERNS, SIZES, assert_agree, problem
from tests.attention.test_flex import BOTH_SIDES
from tests.models import PATTERNS as MODELS
from tests.models import random_ids, tiny_model

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
CASES = [(pattern, *size) for pattern in PATTERNS for size in SIZES] + [
    (pattern, n, 0) for pattern in BOTH_SIDES for n in (7, 300)
]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("pattern,queries,past", CASES, ids=str)
def test_a_layer_is_the_reference(pattern, queries, past, dtype):
    states, routing = problem(pattern, queries, queries + past, dtype, "cuda")
    places = key_layout(AttentionLayout(2, queries, past), pattern, queries + past, states[0].device)
    expected = layer_reference(*states, pattern, 0.3, places, routing)[0]
    actual = document_attention(*states, pattern, 0.3, queries + past, routing)
    assert_agree(actual, expected, states, routing, TOLERANCES[dtype], floor=0.1 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(5, 4, 2, 64, 321), (1, 2, 2, 1, 7), (3, 6, 2, 33, 33)], ids=str)
def test_products_under_a_mask_that_begins_hidden(shape, dtype):
    """The first 256 keys of a row may be hidden, more than a kernel looks at in one go."""
    rows, heads, groups, queries, keys = shape
    states = [
        torch.randn(rows, h, n, 24, device="cuda").to(dtype) for h, n in ((heads, queries), (groups, keys), (groups, keys))
    ]
    first = torch.randint(min(256, keys - 1), (rows, 1, queries, 1), device="cuda")
    mask = torch.zeros(rows, 1, queries, keys, device="cuda", dtype=dtype)
    mask.masked_fill_(torch.arange(keys, device="cuda") < first, float("-inf"))
    assert suits(states[0])
    output, logsumexp = attend(*states, 0.3, mask)
    expected = portable_attend(*(x.float() for x in states), 0.3, mask.float())
    tolerance = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    torch.testing.assert_close(output.float(), expected[0], **tolerance)
    torch.testing.assert_close(logsumexp.float(), expected[1], **tolerance)
    grad = torch.randn_like(output)
    actual = attend_backward(grad, *states, output, logsumexp, 0.3, mask)
    wide = [x.float() for x in (grad, *states)]
    expected = portable_attend_backward(*wide, *expected, 0.3, mask.float())
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine.float() - theirs).norm() <= TOLERANCES[dtype] * theirs.norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_itself_on_a_cpu(name):
    reference = tiny_model(name)
    model = copy.deepcopy(reference).cuda()
    ids, mask = random_ids(2, 45), torch.ones(2, 45, dtype=torch.long)
    mask[0, :17] = 0
    real = mask.bool()
    results = []
    for one, device in ((model, "cuda"), (reference, "cpu")):
        logits = one(ids.to(device), attention_mask=mask.to(device)).logits[real.to(device)]
        logits.square().sum().backward()
        results.append((logits.detach().cpu(), {n: x.grad.cpu() for n, x in one.named_parameters() if x.grad is not None}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        cache, parts = DynamicCache(), []
        for part, end in zip(ids.cuda().split([20, 22, 3], 1), (20, 42, 45), strict=True):
            given = {"attention_mask": mask[:, :end].cuda(), "past_key_values": cache, "use_cache": True}
            parts.append(model(part, **given).logits.cpu())
    torch.testing.assert_close(torch.cat(parts, 1)[real], results[1][0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["full", "sinks", "routed", "global", "experts"])
def test_generated_tokens_are_those_of_a_cpu(name):
    model, ids = tiny_model(name), random_ids(2, 30)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    model, ids = model.cuda(), ids.cuda()
    for more in ({}, {"cache_implementation": "static"}):
        actual = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)
        assert torch.equal(actual.cpu(), expected), more


@pytest.mark.parametrize("bits,method", [(8, "rtn"), (8, "gptq"), (4, "rtn"), (4, "awq"), ("fp8", "rtn")])
def test_quantized_there_it_is_what_it_is_on_a_cpu(bits, method):
    fields = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64}
    config = DeepseekR1QuantizationConfig(bits, method, 16 if bits == 4 else None)
    plain = tiny_model("experts", **fields)
    results, text = [], random_ids(4, 32)
    for device in ("cuda", "cpu"):
        model = copy.deepcopy(plain).to(device)
        quantize_model(model, config, text)
        with torch.no_grad():
            results.append(model(text.to(device)).logits.cpu())
    difference, size = (results[0] - results[1]).norm(), results[1].norm()
    # Sums are rounded in another order, and with them the odd weight to its other neighbour.
    assert difference <= (1e-4 if method == "rtn" else 5e-2) * size
