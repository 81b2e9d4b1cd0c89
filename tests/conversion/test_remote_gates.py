"""Gates of routed layers are fitted to what full attention adds to the hidden states."""

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_deepseek_r1 import DeepseekR1ForCausalLM
from modeling_deepseek_r1.attention.layer import layer_pattern
from modeling_deepseek_r1.conversion.recorded import record, sampled_positions
from modeling_deepseek_r1.conversion.remote_gates import Errors, fit_gate_bias, remote_errors
from tests.models import random_ids, tiny_config, tiny_model

ROUTED = {"sliding_window": 5, "layer_types": "R", "max_position_embeddings": 64}
LENGTH = 40


def models(**sparse):
    """A routed model, and the same weights with full attention."""
    torch.manual_seed(0)
    routed = tiny_model("routed", **ROUTED, sparse_attention={"num_sink_tokens": 2, "num_clusters": 4, **sparse})
    full = DeepseekR1ForCausalLM(tiny_config("full", max_position_embeddings=64)).eval()
    full.load_state_dict({name: value for name, value in routed.state_dict().items() if ".router." not in name})
    with torch.no_grad():
        routed.model.layers[0].self_attn.router.weight.zero_()
        routed.model.layers[0].self_attn.router.bias.zero_()
    return routed, full


def errors_of(routed, full, windows, monkeypatch):
    monkeypatch.setattr("modeling_deepseek_r1.conversion.remote_gates.EVERY", 1)
    monkeypatch.setattr("modeling_deepseek_r1.conversion.recorded.KEPT", torch.float32)
    pattern = layer_pattern(routed.config, 0)
    positions = sampled_positions(pattern, windows.shape[1], len(windows), seed=0)
    recorded = record(full, {0: positions}, windows)[0]
    attention = routed.model.layers[0].self_attn
    centroids = attention.router.centroids, attention.router.query_centroids
    return positions, remote_errors(recorded, *centroids, pattern, True, attention.o_proj.weight)


def added(model, windows):
    """What the first layer's attention adds to the hidden states."""
    seen = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        model(windows)
    hook.remove()
    return seen[0]


def squares(errors, bias):
    share = torch.sigmoid(errors.odds + math.log(2.0) + F.logsigmoid(bias))
    return torch.einsum("ph,phk,pk->p", share, errors.gram, share) + 2 * (share * errors.cross).sum(-1)


def test_errors_are_those_of_the_layer(monkeypatch):
    """Squared distances of what both models add, for two different gates: the forms lack what the gates do not change."""
    routed, full = models(routed_clusters=2, routed_tokens=3)
    windows = random_ids(2, LENGTH)
    positions, errors = errors_of(routed, full, windows, monkeypatch)
    found = []
    for bias in (torch.zeros(6), torch.linspace(-2, 3, 6)):
        with torch.no_grad():
            routed.model.layers[0].self_attn.router.bias.copy_(bias)
        distances = (added(routed, windows) - added(full, windows))[:, positions].square().sum(-1).flatten()
        found.append((squares(errors, bias), distances))
    first, second = zip(*found, strict=True)
    torch.testing.assert_close(first[1] - first[0], second[1] - second[0], rtol=1e-3, atol=1e-5)
    assert (first[1] - first[0]).abs().mean() > 0.01 * second[0].mean()


def test_a_layer_that_sees_all_keeps_its_gates_open(monkeypatch):
    routed, full = models(routed_clusters=4, routed_tokens=LENGTH)
    _, errors = errors_of(routed, full, random_ids(2, LENGTH), monkeypatch)
    torch.testing.assert_close(fit_gate_bias(errors), torch.zeros(6), atol=1e-3, rtol=0)


def test_found_keys_stand_for_those_that_are_not(monkeypatch):
    """One of four clusters is looked into, and all keys are alike: what is missing is found three times over."""
    routed, full = models(routed_clusters=1, routed_tokens=LENGTH)
    windows = random_ids(4, LENGTH)
    _, errors = errors_of(routed, full, windows, monkeypatch)
    bias = fit_gate_bias(errors)
    zero = squares(errors, torch.zeros(6)).mean()
    assert squares(errors, bias).mean() < zero
    for head in range(6):
        for step in (-0.1, 0.1):
            other = bias.clone()
            other[head] += step
            assert squares(errors, bias).mean() < squares(errors, other).mean() + 1e-6 * zero.abs()


def test_nothing_to_fit():
    empty = Errors(torch.zeros(0, 3, 3), torch.zeros(0, 3), torch.zeros(0, 3))
    blind = Errors(torch.zeros(5, 3, 3), torch.zeros(5, 3), torch.zeros(5, 3))
    assert not fit_gate_bias(empty).any() and not fit_gate_bias(blind).any()


@pytest.mark.parametrize("missing", [0.2, 0.6])
def test_the_gate_is_the_weight_that_is_missing(missing):
    """Values of found and missing keys are the same on average: the remote part counts for both."""
    generator = torch.Generator().manual_seed(0)
    odds = torch.randn(500, 2, generator=generator)
    local, remote = torch.ones(500, 2), odds.exp()
    truth = (remote * (1 + missing)) / (local + remote * (1 + missing))
    spread = torch.randn(500, 2, 7, generator=generator)
    error = -torch.einsum("ph,phk->pk", truth, spread)
    errors = Errors(spread @ spread.transpose(1, 2), (spread @ error[..., None]).squeeze(-1), odds)
    gate = 2 * torch.sigmoid(fit_gate_bias(errors))
    torch.testing.assert_close(gate, torch.full((2,), 1 + missing), rtol=1e-3, atol=0)
