"""Chosen experts beside frozen ones: the same function as changed weights, gradients for the chosen alone."""

import pytest
import torch

from modeling_deepseek_r1.moe.adapters import make_adapter
from modeling_deepseek_r1.moe.kernels import adapted_linear, adapted_linear_reference
from tests.models import tiny_model

KINDS = [("experts", 3), ("experts", None), ("expert_domains", 2), ("expert_domains", None), ("low_rank_experts", None)]


def test_the_adapted_product_is_its_definition():
    sizes, experts = [4, 0, 7], [1, 2, 5]
    shapes = (11, 6), (6, 5, 6), (3, 2, 6), (3, 5, 2)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    rows, weight, a, b = inputs
    results = []
    for function in (adapted_linear, adapted_linear_reference):
        output = function(rows, weight, a, b, experts, sizes)
        results.append((output, *torch.autograd.grad(output.square().sum(), (rows, a, b))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def adapted(pattern, rank, chosen=(0, 3)):
    """A block with an adapter away from its start."""
    block = tiny_model(pattern).model.layers[0].mlp
    block.requires_grad_(False)
    block.expert_adapter = make_adapter(block.experts, chosen, rank)
    with torch.no_grad():
        for parameter in block.expert_adapter.parameters():
            parameter += torch.randn(parameter.shape) * 0.1
    return block


def everything_trained(block, weights):
    """The plain block with `weights` in place of the chosen experts' own, all of its experts trainable."""
    block.expert_adapter = None
    with torch.no_grad():
        for name, (numbers, value) in weights.items():
            getattr(block.experts, name)[numbers] = value
    block.experts.requires_grad_(True)
    return block


@pytest.mark.parametrize(("pattern", "rank"), KINDS)
def test_an_adapter_is_the_block_with_other_weights(pattern, rank):
    block, adapter = adapted(pattern, rank), None
    adapter = block.expert_adapter
    before = {name: parameter.clone() for name, parameter in block.experts.named_parameters()}
    rows, direction = torch.randn(2, 1, 19, 48, requires_grad=True).unbind(), torch.randn(1, 19, 48)
    output = block(rows[0])[0]
    grads = torch.autograd.grad(output, [rows[0], *adapter.parameters()], direction)
    assert all(grad.any() for grad in grads)
    new = {name: (adapter.chosen, value) for name, value in adapter.weights(block.experts).items()}
    plain = everything_trained(block, {name: (numbers, value.detach()) for name, (numbers, value) in new.items()})
    expected = plain(rows[0])[0]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    names = list(new)
    whole = torch.autograd.grad(expected, [rows[0], *(getattr(plain.experts, name) for name in names)], direction)
    torch.testing.assert_close(grads[0], whole[0], rtol=1e-3, atol=1e-4)
    # Through the weights that the parameters make.
    through = (
        torch.autograd.grad(
            [new[name][1] for name in names],
            list(adapter.parameters()),
            [grad[adapter.chosen] for grad in whole[1:]],
        )
        if rank
        else [grad[adapter.chosen] for grad in whole[1:]]
    )
    for actual, expected in zip(grads[1:], through, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    unchosen = [expert for expert in range(plain.experts.num_experts) if expert not in adapter.chosen]
    assert all(torch.equal(getattr(plain.experts, name)[unchosen], before[name][unchosen]) for name in names)


@pytest.mark.parametrize(("pattern", "rank"), KINDS)
def test_merged_and_unmerged(pattern, rank):
    block = adapted(pattern, rank)
    before = {name: parameter.clone() for name, parameter in block.experts.named_parameters()}
    rows = torch.randn(2, 9, 48)
    separate = block(rows)[0]
    block.expert_adapter.merge(block.experts)
    merged = block(rows)[0]
    torch.testing.assert_close(merged, separate, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in block.experts.named_parameters())
    block.expert_adapter.unmerge(block.experts)
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.experts.named_parameters())
    assert torch.equal(block(rows)[0], separate)


def test_half_precision_keeps_the_deltas_in_float32():
    block = adapted("experts", 2)
    expected = block(torch.ones(1, 5, 48))[0]
    block.experts.to(torch.bfloat16)
    output = block(torch.ones(1, 5, 48, dtype=torch.bfloat16))[0]
    assert output.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in block.expert_adapter.parameters()} == {torch.float32}
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    block.expert_adapter.merge(block.experts)
    torch.testing.assert_close(block(torch.ones(1, 5, 48, dtype=torch.bfloat16))[0].float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("pattern", "arguments", "message"),
    [
        ("experts", {"chosen": []}, r"chosen experts \[\] must be different numbers of 0 ... 4"),
        ("experts", {"chosen": [1, 1]}, "must be different"),
        ("experts", {"chosen": [5]}, r"0 \.\.\. 4"),
        ("experts", {"chosen": [1], "rank": 0}, "the rank of the adapters, 0, must be at least 1"),
        ("experts", {"chosen": [1], "alpha": 4.0}, "alpha=4.0 scales low-rank deltas; give their rank too"),
        ("low_rank_experts", {"chosen": [1], "rank": 2}, "low-rank deltas themselves"),
    ],
)
def test_impossible_adapters(pattern, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_adapter(tiny_model(pattern).model.layers[0].mlp.experts, **arguments)


@pytest.mark.parametrize(("pattern", "rank"), KINDS)
def test_tokens_that_no_chosen_expert_gets(pattern, rank):
    """One token, and several; nothing of them reaches what is trained."""
    block = adapted(pattern, rank, chosen=(0,))
    adapter, experts = block.expert_adapter, block.experts
    for count in (1, 6):
        rows = torch.randn(count, 48)
        index, weights = torch.tensor([[1, 2]] * count), torch.tensor([[0.25, 0.75]] * count)
        with torch.no_grad():
            expected = experts(rows, index, weights)
            torch.testing.assert_close(adapter(experts, rows, index, weights), expected)
        output = adapter(experts, rows, index, weights)
        grads = torch.autograd.grad(output.sum(), list(adapter.parameters()))
        assert not any(grad.any() for grad in grads)
