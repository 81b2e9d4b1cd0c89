"""A run that was interrupted and resumed is the run that was not."""

from itertools import islice

import pytest
import torch

from modeling_deepseek_r1.data import DocumentStream, PackedStream, Record
from modeling_deepseek_r1.training import add_adapters, last_checkpoint
from tests.models import random_ids, tiny_model

from .runs import StopAfter, losses, make_rows, make_trainer

STEPS = 50


def make_stream():
    records = [Record({"text": number}, "") for number in range(30)]

    def encode(record):
        number = record.fields["text"]
        return [{"input_ids": random_ids(1, 4 + number % 11, seed=number)[0].tolist()}]

    return PackedStream(DocumentStream(records, encode, shuffle_buffer=10, seed=3, repeat=True), 24, buffer=7)


def make_model(adapters):
    model = tiny_model("routed_mixed", attention_dropout=0.1).train()
    return add_adapters(model, rank=2, targets=["attention", "router"])[0] if adapters else model


def run(folder, rows, adapters, stop=None, resume=None):
    callbacks = [StopAfter(stop)] if stop else []
    fields = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 23, "save_total_limit": 1}
    model = make_model(adapters)
    trainer = make_trainer(
        model,
        folder,
        rows=rows,
        callbacks=callbacks,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        centroid_decay=0.9,
        **fields,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("make", [make_rows, make_stream], ids=["in memory", "streaming"])
def test_resumed_equals_uninterrupted(make, adapters, tmp_path):
    """Weights, centroids, losses; with dropout, accumulation, several passes over the data, and a stop in the middle of one."""
    whole = run(tmp_path / "whole", make(), adapters)
    run(tmp_path / "parts", make(), adapters, stop=30)
    torch.manual_seed(99)
    found = last_checkpoint(tmp_path / "parts")
    assert found.name == "checkpoint-23"
    resumed = run(tmp_path / "parts", make(), adapters, resume=str(found))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    assert len(losses(resumed)) == STEPS
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    moved = make_model(adapters).state_dict()
    names = [name for name in moved if name.endswith("centroids")]
    assert names and any(not torch.equal(moved[name], whole.model.state_dict()[name]) for name in names)


def test_the_stream_itself_does_not_repeat_its_order():
    first, second = (list(islice(make_stream(), 40)) for _ in range(2))
    assert first == second
    assert len({str(row) for row in first}) > 35


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for number in (5, 9, 10, 11):
        (tmp_path / f"checkpoint-{number}").mkdir()
    for number, content in ((5, "{}"), (9, '{"step": 9}'), (10, '{"st')):
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path).name == "checkpoint-9"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(tiny_model("full"), tmp_path)
    tiny_model("full", attention_bias=True).save_pretrained(tmp_path / "more", max_shard_size="20KB")
    tiny_model("full").save_pretrained(tmp_path / "same", max_shard_size="20KB")
    trainer.model.lm_head.weight.data.zero_()
    trainer._load_from_checkpoint(str(tmp_path / "same"))
    assert torch.equal(trainer.model.lm_head.weight, tiny_model("full").lm_head.weight)
    with pytest.raises(ValueError, match=r"more is no checkpoint of this model: it lacks \[\], and the model lacks .*bias"):
        trainer._load_from_checkpoint(str(tmp_path / "more"))
    other = make_trainer(tiny_model("full", attention_bias=True), tmp_path)
    with pytest.raises(ValueError, match=r"it lacks \['model.layers.0.self_attn.q_proj.bias'"):
        other._load_from_checkpoint(str(tmp_path / "same"))
