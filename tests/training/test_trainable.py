"""What is trained: adapters on the chosen parts, or everything but the frozen."""

import sys

import pytest
import torch

from modeling_deepseek_r1 import DeepseekR1ForSequenceClassification
from modeling_deepseek_r1.training import add_adapters, freeze
from tests.models import random_ids, tiny_config, tiny_model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("pattern", "gates"), [("routed_mixed", 1), ("global", 3)])
def test_adapters_begin_as_the_model_itself_and_merge_back(pattern, gates):
    ids = random_ids(2, 20)
    expected = tiny_model(pattern)(ids).logits
    model, report = add_adapters(tiny_model(pattern), rank=3, targets=["attention", "mlp", "router"])
    assert torch.equal(model(ids).logits, expected)
    assert report.matched == {"attention": 12, "mlp": 9, "router": gates}
    assert report.trainable == sum(model.get_parameter(name).numel() for name in trainable(model))
    assert f"attention (12), mlp (9), router ({gates})" in report.summary()
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.02
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(model.get_parameter(name).grad is not None for name in trainable(model))
    model.eval()
    changed = model(ids).logits
    assert (changed - expected).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == tiny_model(pattern).state_dict().keys()
    torch.testing.assert_close(merged(ids).logits, changed, rtol=1e-4, atol=1e-4)


def test_one_target_alone():
    model, report = add_adapters(tiny_model("routed"), rank=2, targets=["mlp"])
    assert report.matched == {"mlp": 9}
    assert all(".mlp." in name and ".lora_" in name for name in trainable(model))


def test_a_new_head_is_trained_with_the_adapters():
    model, _ = add_adapters(DeepseekR1ForSequenceClassification(tiny_config(num_labels=3)), rank=2)
    assert any("score" in name for name in trainable(model))


def test_freezing():
    model = tiny_model("mixed")
    report = freeze(model, ["model.embed_tokens.*", "*.mlp.*"])
    assert report.matched == {"without model.embed_tokens.*": 1, "without *.mlp.*": 9}
    assert report.trainable == report.total - 97 * 48 - 9 * 48 * 64
    assert not any(".mlp." in name or "embed" in name for name in trainable(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "the rank of the adapters, 0, must be at least 1"),
        ({"targets": ["mlps"]}, r"adapters for \['mlps'\]: choose some of attention, mlp, experts, router"),
        ({"targets": []}, "adapters for nothing"),
        ({"targets": ["router"]}, "routers alone are trained as they are"),
        ({"targets": ["attention", "router"]}, "the model has no router or global_tokens; leave out 'router'"),
        ({"targets": ["experts"]}, "the model has no experts.gate_up_proj or experts.down_proj"),
        ({"targets": ["experts"], "dropout": 0.1}, "fused experts cannot have dropout"),
    ],
)
def test_adapters_that_match_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(tiny_model("mixed"), **{"rank": 2, **arguments})


def test_patterns_that_match_nothing_or_everything():
    with pytest.raises(ValueError, match=r"no parameter is called 'embed\*'; names are like model.embed_tokens.weight"):
        freeze(tiny_model(), ["embed*"])
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(tiny_model(), ["*"])


def test_a_missing_peft_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"modeling-deepseek-r1\[train\]"):
        add_adapters(tiny_model(), rank=2)
