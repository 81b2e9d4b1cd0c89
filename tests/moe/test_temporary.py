"""Experts for one task come, are trained alone, are saved and loaded, and go without a trace."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_deepseek_r1.moe.surgery import measure_usage
from modeling_deepseek_r1.moe.temporary import TemporaryExperts, add_temporary_experts, remove_temporary_experts
from modeling_deepseek_r1.training import BiasUpdate, TemporaryTraining
from tests.models import random_ids, tiny_model
from tests.training.runs import losses, make_trainer

DOMAINS = {"routing": {"expert_topology": [{"text": 3, "code": 2}, {"fusion": 6}]}}


def fields(model):
    return {name: value for name, value in model.config.to_dict().items() if name != "dtype"}


def trained(grown, temporary, folder, **given):
    callbacks = [TemporaryTraining(temporary), BiasUpdate(0.01)]
    arguments = {"arguments_class": TrainingArguments, "max_steps": 12, **given}
    trainer = make_trainer(grown, folder, Trainer, callbacks=callbacks, **arguments)
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize(
    ("pattern", "given", "number"),
    [
        ("experts", {}, 2),
        ("experts", {"routing": {"bias_balancing": True}}, 1),
        ("expert_domains", DOMAINS, {"code": 1, "fusion": 2}),
    ],
)
def test_they_come_and_go(pattern, given, number, tmp_path):
    model, ids = tiny_model(pattern, **given), random_ids(3, 40)
    grown, temporary = add_temporary_experts(model, measure_usage(model, ids), number)
    before = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
    history = trained(grown, temporary, tmp_path / "run")
    assert sum(history[-3:]) < sum(history[:3])
    changed = {name for name, tensor in grown.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("experts.down_proj" in name for name in changed) and any("router.scores" in name for name in changed)
    assert all(".mlp.experts." in name or ".router." in name for name in changed)
    grown.save_pretrained(tmp_path / "grown")
    temporary.save(tmp_path / "grown")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, grown.eval()(ids).logits)
    again = remove_temporary_experts(loaded, TemporaryExperts.load(tmp_path / "grown"))
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys() and fields(again) == fields(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_inactive_ones_change_nothing_and_active_ones_are_used():
    model, ids = tiny_model("experts"), random_ids(3, 40)
    usage = measure_usage(model, ids)
    for active in (False, True):
        grown, temporary = add_temporary_experts(model, usage, 1, active)
        used = measure_usage(grown, ids)
        slots = [float(used[layer].slots[places].sum()) for layer, places in temporary.places.items()]
        assert all(slots) if active else not any(slots)
    with torch.no_grad():
        grown, _ = add_temporary_experts(model, usage, 1, False)
        torch.testing.assert_close(grown(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_refused(tmp_path):
    model, ids = tiny_model("experts"), random_ids(3, 40)
    grown, temporary = add_temporary_experts(model, measure_usage(model, ids), 1)
    with pytest.raises(ValueError, match="weight_decay=0.1 would move the other experts"):
        trained(grown, temporary, tmp_path, weight_decay=0.1)
    with pytest.raises(ValueError, match="has 5 experts, so that"):
        remove_temporary_experts(model, temporary)
