"""Routers: scores, domain gates, how many experts a token gets, and what is counted of it."""

import json
import math

import pytest
import torch

from modeling_deepseek_r1.moe.gates import DeepseekR1ExpertRouter, attention_scores, attention_scores_reference
from modeling_deepseek_r1.moe.metrics import ExpertUsage
from modeling_deepseek_r1.moe.outputs import RouterOutput, slot_counts
from modeling_deepseek_r1.moe.select import moved_threshold, select_experts, select_experts_reference
from tests.models import randomise, tiny_config


def router(layer_idx=0, **fields):
    torch.manual_seed(0)
    module = DeepseekR1ExpertRouter(tiny_config("expert_domains", **fields), layer_idx)
    for part in module.modules():
        part.init_weights(0.2)
    return module


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_scores_equal_the_definition(tokens, heads):
    query, keys = torch.randn(tokens, heads, 4, requires_grad=True), torch.randn(6, heads, 4, requires_grad=True)
    direction, results = torch.randn(tokens, 6), []
    for function in (attention_scores, attention_scores_reference):
        output = function(query, keys)
        results.append([output.detach(), *torch.autograd.grad(output, (query, keys), direction)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][0].exp().sum(-1), torch.ones(tokens))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("minimum, threshold", [(1, 0.0), (1, 0.2), (2, 0.15), (1, 1.0), (3, None)])
@pytest.mark.parametrize("bias", [None, [0.3, -0.2, 0.0, 0.1, -0.4, 0.0]])
def test_selection_equals_the_definition(minimum, threshold, normalise, bias):
    logits = torch.randn(17, 6, requires_grad=True)
    direction, results = torch.randn(17, 3), []
    for function, limit in (
        (select_experts, torch.tensor(threshold) if threshold is not None else None),
        (select_experts_reference, threshold),
    ):
        weights, index = function(logits, 3, minimum, limit, normalise, torch.tensor(bias) if bias else None)
        results.append((weights.detach(), index, torch.autograd.grad(weights, logits, direction)[0]))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2])
    active = (results[0][0] > 0).sum(-1)
    assert active.min() >= minimum
    if normalise:
        torch.testing.assert_close(results[0][0].sum(-1), torch.ones(17))
    if threshold in (0.0, None):
        assert bool((active == 3).all())
    elif threshold == 1.0:
        assert bool((active == minimum).all())
    else:
        assert 0 < (active > minimum).sum() < 17


@pytest.mark.parametrize("scoring", ["linear", "attention"])
def test_zero_domain_parameters_cancel_exactly(scoring):
    fields = {"expert_topology": [{"text": 3, "code": 2}], "router_scoring": scoring, "min_experts_per_tok": 1}
    gated = router(routing=fields)
    x = torch.randn(11, 48)
    with_gate = gated(x)
    gated.domain_gate = None
    for mine, theirs in zip(with_gate, gated(x), strict=True):
        assert torch.equal(mine, theirs)


def test_domain_gates_multiply_the_probabilities():
    module = randomise(router())
    x, modalities = torch.randn(11, 48), torch.arange(11) % 2
    gate = module.domain_gate
    scores = x @ gate.weight.T + gate.bias + gate.modality_bias[modalities]
    shares = scores.sigmoid().repeat_interleave(torch.tensor(list(module.domains.values())), 1) * module.scores(x).exp()
    expected = shares / shares.sum(-1, keepdim=True)
    torch.testing.assert_close(module(x, modalities).logits.softmax(-1), expected)
    assert torch.equal(module(x).logits, module(x, torch.zeros(11, dtype=torch.long)).logits)
    assert not torch.equal(module(x).logits, module(x, modalities).logits)


def test_every_stage_has_its_experts_and_one_domain_has_no_gate():
    config = tiny_config("expert_domains")
    assert [config.expert_domains(layer) for layer in range(3)] == [{"code": 2, "text": 3}] * 2 + [{"fusion": 6}]
    assert [layer.num_experts for layer in config.per_layer_config] == [5, 5, 6]
    assert router(0).domain_gate is not None and router(2).domain_gate is None
    assert router(0).balance_target == pytest.approx([1 / 8, 1 / 8, 2 / 8, 2 / 8, 2 / 8])


def test_routers_compute_in_float32_whatever_surrounds_them():
    module = randomise(router())
    x = torch.randn(40, 48)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x).logits, expected.logits)
    exact = module.scores.keys.detach().clone()
    module.to(torch.bfloat16)
    assert torch.equal(module.scores.keys, exact) and module.threshold.dtype == torch.float32
    assert module(x.bfloat16()).logits.dtype == torch.float32


def test_the_threshold_exists_only_where_it_decides_something():
    assert router().threshold == pytest.approx(0.2)
    fixed = router(routing={"expert_topology": [{"text": 5}]})
    assert fixed.threshold is None and fixed.minimum == fixed.slots == 3


def test_the_controller_reaches_its_target():
    module = router(routing={"expert_topology": [{"a": 5}], "min_experts_per_tok": 1, "target_experts_per_tok": 2.0})
    x = torch.randn(400, 48)
    assert module.threshold == 0
    for _ in range(80):
        module.gather(module(x), None)
        module.move_threshold(0.2)
    active = (module(x).top_k_weights > 0).sum(-1).float().mean()
    assert float(active) == pytest.approx(2.0, abs=0.05)
    before = module.threshold.clone()
    module.move_threshold(0.2)
    assert torch.equal(module.threshold, before)


def test_a_balance_bias_evens_out_the_load_and_leaves_the_weights_alone():
    module = router(routing={"expert_topology": [{"a": 5}], "bias_balancing": True}, num_experts_per_tok=2)
    x = torch.randn(600, 48) + 2.0  # what all tokens have in common makes some experts popular
    before = slot_counts(module(x), None) / 1200
    for _ in range(200):
        module.gather(module(x), None)
        module.move_balance_bias(0.003)
    routed = module(x)
    after = slot_counts(routed, None) / 1200
    assert before.max() > 0.35 and before.min() < 0.05
    assert after.max() < 0.22 and after.min() > 0.18
    chosen = routed.logits.softmax(-1).gather(-1, routed.top_k_index)
    torch.testing.assert_close(routed.top_k_weights, chosen / chosen.sum(-1, keepdim=True))
    unchanged = module.balance_bias.clone()
    module.move_balance_bias(0.003)
    assert torch.equal(module.balance_bias, unchanged)


def test_a_threshold_moves_towards_the_target_and_stays_a_probability():
    def moved(threshold, active):
        return float(moved_threshold(torch.tensor(threshold), torch.tensor(active), 2.0, 0.1, 0.001))

    assert moved(0.2, 2.0) == pytest.approx(0.2)
    assert moved(0.2, 3.0) == pytest.approx(0.2 * math.exp(0.1))
    assert moved(0.2, 1.0) == pytest.approx(0.2 * math.exp(-0.1))
    assert moved(0.0, 3.0) == pytest.approx(0.001 * math.exp(0.1))
    assert moved(0.999, 9.0) == 1.0 and moved(0.001, 0.0) == pytest.approx(0.001)


def test_padding_is_not_counted():
    module = router()
    routed, real = module(torch.randn(10, 48)), torch.arange(10) >= 4
    module.gather(routed, real)
    assert module.statistics.tolist() == [float((routed.top_k_weights[4:] > 0).sum()), 6.0]


def test_usage_by_domain_modality_and_expert():
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.6, 0.4], [0.7, 0.3]])
    index = torch.tensor([[0, 2], [1, 0], [0, 1], [3, 2]])
    usage = ExpertUsage({"code": 2, "text": 3})
    routed = RouterOutput(torch.zeros(4, 5), weights, index)
    usage.add(routed, torch.tensor([True, True, True, False]), torch.tensor([0, 1, 0, 1]))
    assert usage.slots.tolist() == [2, 2, 1, 0, 0]
    assert usage.expert_utilization_rate == pytest.approx({"code": 0.8, "text": 0.2})
    assert usage.token_share == {"code": 1.0, "text": 0.0}
    assert usage.mean_active_experts == {0: 2.0, 1: 1.0}
    assert usage.unused_experts == [3, 4]
    entropy = -sum(p * math.log(p) for p in (0.4, 0.4, 0.2)) / math.log(5)
    assert usage.relative_entropy == pytest.approx(entropy)
    usage.add(routed)
    assert usage.slots.sum() == 5 + 7
    assert json.loads(json.dumps(usage.to_dict()))["unused_experts"] == [4]


def test_entropy_at_its_ends():
    even, one = ExpertUsage({"all": 2}), ExpertUsage({"all": 2})
    even.add(RouterOutput(torch.zeros(2, 2), torch.ones(2, 1), torch.tensor([[0], [1]])))
    one.add(RouterOutput(torch.zeros(2, 2), torch.ones(2, 1), torch.tensor([[1], [1]])))
    assert even.relative_entropy == pytest.approx(1.0) and one.relative_entropy == 0.0
