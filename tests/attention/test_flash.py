"""flash_attention_2: what its kernels are called with, and how the parts are merged, by kernels that compute densely."""

import itertools

import pytest
import torch
from transformers import DynamicCache

from modeling_deepseek_r1.attention import layer
from modeling_deepseek_r1.attention.blockwise import run_plan, run_plan_backward
from modeling_deepseek_r1.attention.flash import flash_kernel
from modeling_deepseek_r1.attention.nodes import Memory, Nodes
from modeling_deepseek_r1.attention.pattern import AttentionLayout, AttentionPattern
from modeling_deepseek_r1.attention.ragged import document_attention
from modeling_deepseek_r1.attention.reference import key_layout, layer_reference
from modeling_deepseek_r1.attention.routed import Routing
from tests.attention.flash_stand_in import STAND_IN
from tests.models import random_ids, tiny_config, tiny_model

PATTERNS = [
    AttentionPattern(),
    AttentionPattern(9),
    AttentionPattern(9, 5),
    AttentionPattern(1, 1),
    AttentionPattern(70, 10),
    AttentionPattern(9, 5, global_stride=4),
    AttentionPattern(5, 0, global_stride=7),
    AttentionPattern(9, 3, 2, 4),
]
SIZES = [(1, 0), (90, 0), (20, 3), (33, 60), (5, 200)]


def problem(pattern, queries, keys, dtype=torch.float32, device="cpu"):
    shapes = [(2, 6, queries, 12), (2, 2, keys, 12), (2, 2, keys, 12)]
    states = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    log_gate, routing = torch.randn(2, 6, queries, device=device, requires_grad=True), None
    if pattern.global_stride:
        memory = [torch.randn(2, 3, 12, device=device, requires_grad=True) for _ in range(2)]
        routing = Nodes(log_gate, Memory(*memory, torch.randn(6, device=device, requires_grad=True)))
    if pattern.routed_clusters:
        clusters = torch.rand(2, 6, queries, 4, device=device).argsort(-1)[..., : pattern.routed_clusters]
        routing = Routing(clusters, torch.randint(4, (2, 2, keys), device=device), log_gate)
    return states, routing


def assert_agree(actual, expected, states, routing, tolerance=2e-5, floor=0.1):
    tensors = list(states)
    if routing is not None:
        tensors += [routing.log_gate, *(getattr(routing, "memory", None) or ())]
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, tensors, grad, materialize_grads=True)
    found = torch.autograd.grad(actual, tensors, grad, materialize_grads=True)
    for mine, theirs in zip((actual, *found), (expected, *wanted), strict=True):
        assert (mine - theirs).float().norm() <= tolerance * theirs.float().norm().clamp(min=floor)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_merged_parts_are_the_reference(pattern, size):
    queries, past = size
    states, routing = problem(pattern, queries, queries + past)
    places = key_layout(AttentionLayout(2, queries, past), pattern, queries + past, torch.device("cpu"))
    expected = layer_reference(*states, pattern, 0.3, places, routing)[0]
    assert_agree(document_attention(*states, pattern, 0.3, queries + past, routing, STAND_IN), expected, states, routing)


@pytest.mark.parametrize("stride,lead,queries", list(itertools.product([1, 3], [0, 2], [1, 2, 7, 30])))
def test_queries_that_see_equally_many_keys_become_heads(stride, lead, queries):
    """Against the masked plan for the same nodes."""
    from modeling_deepseek_r1.attention.nodes import node_plan

    lead = lead % stride
    pattern = AttentionPattern(2, 1, global_stride=stride)
    seq_len = pattern.first_node + pattern.window + lead + queries + 2 * stride
    args = pattern, queries, seq_len, torch.float32, torch.device("cpu")
    states, _ = problem(AttentionPattern(), queries, len(range(pattern.first_node, seq_len, stride)))
    states = [x.detach() for x in states]
    expected = run_plan(*states, node_plan(*args), 0.3)
    actual = run_plan(*states, node_plan(*args, STAND_IN), 0.3)
    torch.testing.assert_close(actual, expected)
    grads = [
        run_plan_backward(torch.ones_like(expected[0]), *states, *expected, node_plan(*args, kernel), 0.3)
        for kernel in (None, STAND_IN)
    ]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("pattern", ["full", "sinks", "routed", "global"])
def test_a_model_with_padding_packing_and_cache(pattern, monkeypatch):
    monkeypatch.setattr(layer, "flash_kernel", lambda: STAND_IN)
    reference, model = tiny_model(pattern, "eager"), tiny_model(pattern)
    model.config._attn_implementation = "flash_attention_2"
    ids, mask = random_ids(2, 45), torch.ones(2, 45, dtype=torch.long)
    mask[0, :17] = 0
    real = mask.bool()
    seq_idx = (torch.arange(45) // 20)[None].expand(2, -1)
    for extra in ({"attention_mask": mask}, {"seq_idx": seq_idx}):
        chosen = real if "attention_mask" in extra else torch.ones_like(real)
        results = []
        for one in (model, reference):
            one.zero_grad()
            logits = one(ids, **extra).logits[chosen]
            logits.square().sum().backward()
            results.append((logits, {name: x.grad for name, x in one.named_parameters()}))
        torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        cache, expected = DynamicCache(), reference(ids, attention_mask=mask).logits
        parts = [
            model(part, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits
            for part, end in zip(ids.split([20, 22, 3], 1), (20, 42, 45), strict=True)
        ]
        torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], rtol=1e-4, atol=1e-4)


def test_without_the_package_its_extra_is_named():
    with pytest.raises(ImportError, match=r'pip install "modeling-deepseek-r1\[flash\]"'):
        type(tiny_model())._from_config(tiny_config(), attn_implementation="flash_attention_2")
    with pytest.raises(ImportError, match="flash-attn"):
        tiny_model().set_attn_implementation("flash_attention_2")


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_real_kernels_on_a_gpu(pattern, size):
    pytest.importorskip("flash_attn")
    queries, past = size
    states, routing = problem(pattern, queries, queries + past, torch.bfloat16, "cuda")
    places = key_layout(AttentionLayout(2, queries, past), pattern, queries + past, states[0].device)
    expected = layer_reference(*states, pattern, 0.3, places, routing)[0]
    actual = document_attention(*states, pattern, 0.3, queries + past, routing, flash_kernel())
    assert_agree(actual, expected, states, routing, tolerance=3e-2, floor=1.0)
