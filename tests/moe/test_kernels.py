"""Products of tokens with their experts against the definition and against every implementation in transformers."""

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from modeling_deepseek_r1.moe.experts import DeepseekR1Experts, DeepseekR1LowRankExperts, low_rank_experts_reference
from modeling_deepseek_r1.moe.kernels import (
    experts_forward,
    experts_reference,
    grouped_linear,
    grouped_linear_reference,
    sort_pairs,
)
from modeling_deepseek_r1.moe.mlp import DeepseekR1MLP
from modeling_deepseek_r1.moe.select import select_experts
from tests.models import randomise, tiny_config

EXPERTS, SLOTS, HIDDEN, WIDTH = 7, 3, 12, 8


def choice(tokens, experts=EXPERTS, slots=SLOTS, threshold=0.2, seed=0):
    """Weights and indices with some inactive slots."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator)
    return select_experts(logits, slots, 1, torch.tensor(threshold), True)


def inputs(tokens, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, HIDDEN), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    return [(torch.randn(shape, generator=generator) * 0.5).to(dtype).requires_grad_() for shape in shapes]


def outcome(function, tensors, weights):
    """Output and the gradients of all tensors."""
    tensors = [*tensors, weights.detach().requires_grad_()]
    output = function(*tensors)
    direction = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, tensors, direction)]


def assert_all_close(actual, expected, tolerance=1e-5):
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine.float() - theirs.float()).norm() <= tolerance * theirs.float().norm() + 3e-7


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu6", "linear"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 63])
def test_experts_equal_the_definition(tokens, activation):
    act_fn = ACT2FN[activation]
    weights, index = choice(tokens)
    tensors = inputs(tokens)
    actual = outcome(lambda x, gate_up, down, w: experts_forward(x, gate_up, down, index, w, act_fn), tensors, weights)
    # A slot without weight takes part in nothing: it has no gradient either.
    expected = outcome(lambda x, gate_up, down, w: experts_reference(x, gate_up, down, index, w, act_fn), tensors, weights)
    expected[-1] = expected[-1].masked_fill(weights == 0, 0.0)
    assert_all_close(actual, expected)
    with torch.no_grad():
        untracked = experts_forward(*tensors, index, weights, act_fn)
    assert_all_close([untracked], expected[:1])


@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_in_bfloat16(tokens):
    weights, index = choice(tokens)
    act_fn = ACT2FN["silu"]
    exact = outcome(lambda *t: experts_forward(*t[:3], index, t[3], act_fn), inputs(tokens), weights)
    half = outcome(lambda *t: experts_forward(*t[:3], index, t[3], act_fn), inputs(tokens, torch.bfloat16), weights)
    assert half[0].dtype == half[1].dtype == torch.bfloat16 and half[-1].dtype == torch.float32
    assert_all_close(half, exact, tolerance=0.03)


def test_frozen_tensors_get_no_gradient():
    weights, index = choice(20)
    x, gate_up, down = inputs(20)
    expected = outcome(lambda *t: experts_forward(*t[:3], index, t[3], torch.relu), (x, gate_up, down), weights)
    for trained in (0, 1, 2):
        tensors = [
            tensor.detach().clone().requires_grad_(number == trained) for number, tensor in enumerate((x, gate_up, down))
        ]
        output = experts_forward(*tensors, index, weights, torch.relu)
        direction = torch.linspace(-1, 1, output.numel()).view(output.shape)
        output.backward(direction)
        assert_all_close([tensors[trained].grad], [expected[1 + trained]])
        assert all(tensor.grad is None for number, tensor in enumerate(tensors) if number != trained)


def test_a_token_without_active_experts_gets_zero():
    tensors = [tensor.detach() for tensor in inputs(4)]
    weights, index = torch.zeros(4, SLOTS), torch.zeros(4, SLOTS, dtype=torch.long)
    assert torch.equal(experts_forward(*tensors, index, weights, torch.relu), torch.zeros(4, HIDDEN))
    assert torch.equal(
        experts_forward(tensors[0][:1], *tensors[1:], index[:1], weights[:1], torch.relu), torch.zeros(1, HIDDEN)
    )


def test_pairs_are_sorted_by_expert_and_inactive_ones_are_gone():
    index = torch.tensor([[2, 0], [1, 2], [2, 1]])
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]])
    slots, sizes = sort_pairs(index, weights, 4)
    assert slots.tolist() == [2, 5, 0, 3, 4]
    assert sizes == [0, 2, 3, 0]


@pytest.mark.parametrize("sizes", [[3, 0, 1], [0, 0, 5], [1, 1, 1]])
def test_grouped_linear_equals_the_definition(sizes):
    rows, weight = torch.randn(sum(sizes), 4, requires_grad=True), torch.randn(3, 6, 4, requires_grad=True)
    direction, results = torch.randn(sum(sizes), 6), []
    for function in (grouped_linear, grouped_linear_reference):
        output = function(rows, weight, sizes)
        results.append([output.detach(), *torch.autograd.grad(output, (rows, weight), direction)])
    assert_all_close(*results)


def experts_config(**fields):
    config = tiny_config("full", num_experts=EXPERTS, num_experts_per_tok=SLOTS, moe_intermediate_size=WIDTH, **fields)
    config._experts_implementation = "eager"
    return config


def new_experts(config):
    experts = DeepseekR1Experts(config, 0)
    experts.init_weights(0.2)
    return experts


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("tokens", [1, 33])
def test_every_implementation_of_transformers_agrees(tokens, implementation):
    """On the same packed parameters, called by the same name, with inactive slots."""
    config = experts_config()
    own = new_experts(config)
    theirs = Qwen3MoeExperts(config)
    theirs.load_state_dict(own.state_dict())
    weights, index = choice(tokens)
    x = torch.randn(tokens, config.hidden_size, requires_grad=True)

    def results(module, implementation):
        config._experts_implementation = implementation
        output = module(x, index, weights)
        direction = torch.linspace(-1, 1, output.numel()).view(output.shape)
        return [output.detach(), *torch.autograd.grad(output, (x, *module.parameters()), direction)]

    expected = results(own, "eager")
    assert_all_close(results(theirs, implementation), expected)
    assert_all_close(results(own, implementation), expected)


def test_autocast_computes_in_its_dtype():
    config = experts_config()
    own = new_experts(config)
    weights, index = choice(20)
    x = torch.randn(20, config.hidden_size)
    exact = own(x, index, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = own(x, index, weights)
    rounded.sum().backward()
    assert rounded.dtype == torch.float32 and own.down_proj.grad.dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.02


def low_rank(rank=3, **fields):
    return experts_config(routing={"expert_rank": rank}, mlp_bias=True, **fields)


@pytest.mark.parametrize("tokens", [1, 2, 31])
def test_low_rank_experts_equal_their_full_matrices(tokens):
    config = low_rank()
    experts = DeepseekR1LowRankExperts(config, 0)
    experts.init_weights(0.2)
    randomise(experts)
    weights, index = choice(tokens)
    x, weights = torch.randn(tokens, config.hidden_size, requires_grad=True), weights.requires_grad_()
    results = []
    for output in (experts(x, index, weights), low_rank_experts_reference(experts, x, index, weights)):
        direction = torch.linspace(-1, 1, output.numel()).view(output.shape)
        results.append([output.detach(), *torch.autograd.grad(output, (x, *experts.parameters()), direction)])
    assert_all_close(*results)


def test_new_low_rank_experts_are_the_dense_mlp():
    config = low_rank(intermediate_size=WIDTH)
    experts, dense = DeepseekR1LowRankExperts(config, 0), DeepseekR1MLP(config)
    experts.init_weights(0.02)
    assert experts.gate_up_proj_a.std() > 0.1
    missing = experts.load_state_dict(dense.state_dict(), strict=False)
    assert all(name.endswith(("_a", "_b")) for name in missing.missing_keys) and not missing.unexpected_keys
    x = torch.randn(19, config.hidden_size)
    weights, index = choice(19)
    torch.testing.assert_close(experts(x, index, weights), dense(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_identical_experts_are_the_dense_mlp(threshold):
    config = experts_config(intermediate_size=WIDTH)
    experts, dense = DeepseekR1Experts(config, 0), DeepseekR1MLP(config)
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat((dense.gate_proj.weight, dense.up_proj.weight)))
        experts.down_proj.copy_(dense.down_proj.weight)
    x = torch.randn(23, config.hidden_size)
    weights, index = choice(23, threshold=threshold)
    torch.testing.assert_close(experts(x, index, weights), dense(x), rtol=1e-5, atol=1e-6)
