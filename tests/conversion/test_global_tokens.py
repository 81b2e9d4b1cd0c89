"""Conversion to local_global layers: gates at zero, a memory that hardly counts, everything else as in the source."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1.conversion import convert_checkpoint, to_dense
from modeling_deepseek_r1.conversion.global_tokens import START_LOGIT
from tests.models import random_ids, tiny_model

GLOBAL = {"layer_types": "FGG", "sliding_window": 8, "num_sink_tokens": 2, "global_stride": 4}


@pytest.fixture
def source(tmp_path):
    tiny_model("full").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def test_nodes_count_like_near_keys_and_the_memory_hardly(source, tmp_path):
    report = convert_checkpoint(source, tmp_path / "global", num_memory_tokens=6, **GLOBAL)
    before, model = load(source), load(tmp_path / "global")
    assert "2 x local_global_attention (8 tokens + 2 sink tokens + 1 of every 4 tokens + 6 memory tokens)" in report.pattern
    assert report.parameters == model.num_parameters() and not report.exact and report.calibration is None
    # 64 numbers of 4 bytes per token and layer: all tokens of the first layer, every fourth one of two others.
    assert report.cache_after.growth_bytes == 1000 * 2 * 2 * 8 * 4 * (1 + 2 / 4)
    assert report.cache_after.fixed_bytes == 2 * 2 * 2 * 8 * 4 * (2 + 7)
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    tokens = model.model.layers[2].self_attn.global_tokens
    assert not tokens.weight.any() and not tokens.bias.any()
    assert torch.allclose(tokens.memory_bias, torch.full((6,), START_LOGIT - math.log(6)))
    assert 0.01 < tokens.memory_key.std() < 0.04 and tokens.memory_key[0].unique(dim=0).shape[0] == 6
    ids = random_ids(1, 8)
    torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=0, atol=1e-2)
    convert_checkpoint(source, tmp_path / "all", **GLOBAL | {"global_stride": 1})
    longer = random_ids(1, 60)
    torch.testing.assert_close(load(tmp_path / "all")(longer).logits, before(longer).logits, rtol=1e-4, atol=1e-5)


def test_what_was_learned_is_kept_where_it_fits(source, tmp_path):
    convert_checkpoint(source, tmp_path / "first", num_memory_tokens=6, **GLOBAL)
    model = load(tmp_path / "first")
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            for parameter in layer.self_attn.global_tokens.parameters():
                parameter.normal_()
    model.save_pretrained(tmp_path / "trained")
    convert_checkpoint(tmp_path / "trained", tmp_path / "wider", sliding_window=16, dtype="bfloat16")
    wider, before = load(tmp_path / "wider").state_dict(), model.state_dict()
    for name, value in wider.items():
        own = ".global_tokens." in name
        assert value.dtype == (torch.float32 if own else torch.bfloat16)
        assert torch.equal(value, before[name] if own else before[name].bfloat16()), name
    convert_checkpoint(tmp_path / "trained", tmp_path / "more", num_memory_tokens=9)
    more = load(tmp_path / "more").model.layers[1].self_attn.global_tokens
    assert torch.equal(more.weight, model.model.layers[1].self_attn.global_tokens.weight)
    assert more.memory_key.shape == (2, 9, 8) and more.memory_key.std() < 0.04
    assert torch.allclose(more.memory_bias, torch.full((6,), START_LOGIT - math.log(9)))
    convert_checkpoint(tmp_path / "trained", tmp_path / "experts", num_experts=2, expert_layers="E")
    experts = load(tmp_path / "experts").state_dict()
    assert all(torch.equal(experts[name], wider[name]) for name in wider if ".global_tokens." in name)
    report = convert_checkpoint(tmp_path / "trained", tmp_path / "sliding", layer_types="FSS")
    assert len(report.tensors_skipped) == 10 and not [
        name for name in load(tmp_path / "sliding").state_dict() if "global" in name
    ]


def test_the_way_back_and_refusals(source, tmp_path):
    convert_checkpoint(source, tmp_path / "global", **GLOBAL)
    with pytest.raises(ValueError, match="2 of 3 are local_global_attention"):
        to_dense(tmp_path / "global", tmp_path / "dense")
    report = to_dense(tmp_path / "global", tmp_path / "dense", allow_pattern_change=True)
    assert len(report.tensors_skipped) == 4
    before, after = load(source).state_dict(), load(tmp_path / "dense").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="global_stride has no effect: no layer is local_global_attention"):
        convert_checkpoint(source, tmp_path / "x", layer_types="SF", sliding_window=4, global_stride=3)
    with pytest.raises(ValueError, match=r"'global_stride'\]=0 must be at least 1"):
        convert_checkpoint(source, tmp_path / "x", **GLOBAL | {"global_stride": 0})
    dry = convert_checkpoint(source, tmp_path / "x", layer_types="G", sliding_window=8, dry_run=True)
    assert "1 of every 64 tokens" in dry.pattern and not (tmp_path / "x").exists()
