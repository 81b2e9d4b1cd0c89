"""Packed weights: the same results, saved as they were, and clear errors for what they cannot do."""

import copy

import pytest
import torch
from torch import nn

from modeling_deepseek_r1 import DeepseekR1ForCausalLM
from modeling_deepseek_r1.generation import pack_weights
from modeling_deepseek_r1.generation.packed import PackedLinear
from tests.models import random_ids, tiny_model
from tests.test_generate import generate


def packed_copy(model):
    model = copy.deepcopy(model)
    count = sum(type(module) is nn.Linear for module in model.modules())
    assert pack_weights(model) == count == len(packed(model)) > 0
    return model


def packed(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("pattern", ["mixed", "experts", "global_mixed"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_results_are_the_same(pattern, dtype, tolerance):
    model, ids = tiny_model(pattern).to(dtype), random_ids(2, 30)
    other = packed_copy(model)
    with torch.no_grad():
        expected, actual = model(ids).logits, other(ids).logits
        assert (actual - expected).norm() / expected.norm() < tolerance
    if dtype == torch.float32:
        assert torch.equal(generate(other, ids), generate(model, ids))


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_is_saved_as_it_was(tied, tmp_path):
    model = tiny_model("mixed", tie_word_embeddings=tied)
    other = packed_copy(model)
    assert (other.get_output_embeddings().weight is other.get_input_embeddings().weight) == tied
    other.save_pretrained(tmp_path)
    loaded = DeepseekR1ForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys() == other.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_odd_sizes_biases_and_other_dtypes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.Linear(13, 1, bias=False), nn.Linear(1, 3).double()).requires_grad_(
        False
    )
    inputs = torch.randn(2, 5, 7)
    expected = model[:3](inputs)
    assert pack_weights(model) == 2 and type(model[3]) is nn.Linear
    torch.testing.assert_close(model[:3](inputs), expected)
    assert model[:3](inputs[:0]).shape == (0, 5, 1)
    assert "in_features=7, out_features=13, bias=True" in repr(model)


def test_autocast_is_ignored():
    model, ids = tiny_model("mixed"), random_ids(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        pack_weights(model)
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(ids).logits.float()
    assert (actual - expected).norm() / expected.norm() < 3e-2


def test_a_cpu_without_bfloat16_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert pack_weights(nn.Linear(4, 4).bfloat16()) == pack_weights(nn.Sequential(nn.Linear(4, 4).bfloat16())) == 0
    assert pack_weights(nn.Sequential(nn.Linear(4, 4))) == 1


def test_what_is_impossible_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    pack_weights(model)
    with pytest.raises(RuntimeError, match="no gradients"):
        model(torch.zeros(1, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"before pack_weights\(\)"):
        model.to(torch.bfloat16)
    assert model.to("cpu") is model
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(model)
    with pytest.raises(Exception, match="packed weights cannot be compiled"):
        torch.compile(model, fullgraph=True, backend="eager")(torch.zeros(1, 4))
