"""What a text says of the matrices of a block while it is quantized."""

import pytest
import torch
from torch.nn.functional import silu

from modeling_deepseek_r1 import DeepseekR1QuantizationConfig
from modeling_deepseek_r1.quantization.calibrate import Calibration, _look, _of_experts, _stages, calibrated
from modeling_deepseek_r1.quantization.targets import targets
from tests.models import random_ids, tiny_model

CONFIG = DeepseekR1QuantizationConfig(4, "gptq", group_size=8)


def inside(model, name: str) -> dict:
    return {one.name.removeprefix(f"{name}."): one for one in targets(model, CONFIG) if one.name.startswith(f"{name}.")}


@pytest.mark.parametrize(
    ("pattern", "layer", "expected"),
    [
        ("mixed", 1, [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("experts", 0, [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["experts"]]),
        (
            "low_rank_experts",
            0,
            [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"], ["experts"]],
        ),
    ],
)
def test_layers_are_quantized_in_the_order_in_which_they_act(pattern, layer, expected):
    model = tiny_model(pattern).eval()
    calibration = Calibration(model, random_ids(2, 12))
    chosen = inside(model, calibration.names[layer])
    order = calibration.read(layer, calibration.blocks[layer], list(chosen), 0, torch.randn(1, 12, model.config.hidden_size))
    stages = [[name.rpartition(".")[2] for name in stage] for stage in _stages(order, chosen) if "shared" not in stage[0]]
    assert stages == expected
    missing = dict(chosen, never=chosen[next(iter(chosen))])
    assert _stages(order, missing)[-1] == ["never"]


@torch.no_grad()
def test_a_block_is_left_behind_the_last_module_that_is_read():
    model = tiny_model("mixed").eval()
    calibration, run = Calibration(model, random_ids(1, 12)), []
    calibration.blocks[0].mlp.register_forward_hook(lambda *_: run.append(1))
    states = torch.randn(1, 12, model.config.hidden_size)
    found = calibration.read(0, calibration.blocks[0], ["self_attn.o_proj", "self_attn.q_proj"], 0, states)
    assert list(found) == ["self_attn.q_proj", "self_attn.o_proj"] and not run
    assert torch.equal(found["self_attn.q_proj"][0][0], calibration.blocks[0].input_layernorm(states))
    assert not any(module._forward_hooks for module in calibration.blocks[0].self_attn.modules())


@torch.no_grad()
def test_what_is_added_to_the_stream_makes_up_for_what_is_missing_there():
    """The shortfall of o_proj is what the whole sum behind it lacks."""
    model = tiny_model("mixed").eval()
    calibration, name = Calibration(model, random_ids(3, 12)), "self_attn.o_proj"
    reference = [torch.randn(1, 12, model.config.hidden_size) for _ in range(3)]
    states = [one + 0.1 * torch.randn_like(one) for one in reference]
    block, target = calibration.blocks[0], inside(model, calibration.names[0])[name]
    seen = _look(calibration, 0, block, {name: target}, states, reference)[name][""]
    sums = {}
    for label, stream in (("own", states), ("other", reference)):
        behind = [calibration.read(0, block, ["post_attention_layernorm"], i, one) for i, one in enumerate(stream)]
        sums[label] = torch.cat([one["post_attention_layernorm"][0][0][0] for one in behind])
    rows = torch.cat([calibration.read(0, block, [name], i, one)[name][0][0][0] for i, one in enumerate(states)])
    torch.testing.assert_close(seen.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.shortfall, (sums["other"] - sums["own"]).T @ rows, rtol=1e-3, atol=1e-3)
    assert _look(calibration, 0, None, {name: target}, states, reference)[name][""].shortfall is None


@torch.no_grad()
def test_experts_are_seen_token_by_token():
    experts = tiny_model("experts").model.layers[0].mlp.experts
    width, count = experts.gate_up_proj.shape[-1], experts.num_experts
    states, wanted = torch.randn(9, width), torch.randn(9, width)
    index = torch.stack([torch.randperm(count)[:2] for _ in range(9)])
    index[index == count - 1] = 0  # nobody goes to the last one; a token may have weight in two slots of one expert
    weights = torch.rand(9, 2)
    seen = _of_experts(experts, states, index, weights, wanted)
    for expert in range(count):
        gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
        expected = {
            name: [torch.zeros(w.shape[1], w.shape[1]), torch.zeros_like(w)]
            for name, w in (("gate_up_proj", gate_up), ("down_proj", down))
        }
        for token, slot in (index == expert).nonzero().tolist():
            weight, rows = weights[token, slot], {"own": states[token], "other": wanted[token]}
            inner = {k: silu(gate_up.chunk(2)[0] @ x) * (gate_up.chunk(2)[1] @ x) * weight for k, x in rows.items()}
            outer = {k: x * weight for k, x in rows.items()}
            for name, matrix, pair in (("gate_up_proj", gate_up, outer), ("down_proj", down, inner)):
                expected[name][0] += torch.outer(pair["own"], pair["own"])
                expected[name][1] += torch.outer(matrix @ (pair["other"] - pair["own"]), pair["own"])
        for name, (gram, shortfall) in expected.items():
            torch.testing.assert_close(seen[name].of(expert).gram, gram, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen[name].of(expert).shortfall, shortfall, rtol=1e-4, atol=1e-5)
    assert not seen["gate_up_proj"].gram[-1].any()


@pytest.mark.parametrize("pattern", ["experts", "mixed"])
def test_later_blocks_make_up_for_the_embedding(pattern):
    """With an embedding of 4 bits and blocks of 8 the error of the stream falls from block to block; rounding cannot do that."""
    errors = {}
    for method in ("rtn", "gptq"):
        model = tiny_model(pattern, tie_word_embeddings=True).eval()
        with torch.no_grad():
            config = DeepseekR1QuantizationConfig(8, method, embedding_bits=4, group_size=8)
            _, layers = calibrated(model, config, random_ids(24, 48))
        errors[method] = [layer.output_error for layer in layers]
    assert errors["gptq"][-1] < 0.8 * errors["rtn"][-1]
