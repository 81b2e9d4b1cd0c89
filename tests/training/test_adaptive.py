"""Callbacks that follow the run: clipping, learning rate, accumulation; each where a fixed setting does worse, and resumed."""

import math

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_deepseek_r1.training import (
    AdaptiveAccumulation,
    AdaptiveClipping,
    AdaptiveLearningRate,
    last_checkpoint,
)
from modeling_deepseek_r1.training.learning_rate import fitted_slope
from tests.models import tiny_model

from .runs import StopAfter, losses, make_arguments, make_rows, make_trainer

SIZE = 40


class Bowl(nn.Module):
    """`|w - x|^2 / 2`, whose gradient `w - x` has a known mean and covariance."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))

    def forward(self, x):
        return {"loss": (self.weight - x).square().sum(-1).mean() / 2}


class Spiking(nn.Module):
    """A model whose gradients are a hundredth of what they would be, but once."""

    def __init__(self, step, factor):
        super().__init__()
        self.model, self.step, self.factor, self.calls = tiny_model("full"), step, factor, 0

    def forward(self, **batch):
        self.calls += 1
        output = self.model(**batch)
        output.loss = output.loss * 0.01 * (self.factor if self.calls == self.step else 1.0)
        return output


def points(count=4000, mean=0.0, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    return [{"x": mean + spread * torch.randn(SIZE, generator=generator)} for _ in range(count)]


def bowl_trainer(folder, callbacks, rows=None, **fields):
    values = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "disable_tqdm": True, "logging_steps": 5}
    arguments = make_arguments(folder, TrainingArguments, **{**values, **fields})
    return Trainer(Bowl(), arguments, train_dataset=points() if rows is None else rows, callbacks=callbacks)


def spiking_trainer(folder, callbacks, factor, max_grad_norm):
    fields = {"max_steps": 45, "optim": "sgd", "learning_rate": 50.0, "lr_scheduler_type": "constant"}
    arguments = {"arguments_class": TrainingArguments, "remove_unused_columns": False, "max_grad_norm": max_grad_norm}
    trainer = make_trainer(Spiking(30, factor), folder, Trainer, callbacks=callbacks, **fields, **arguments)
    trainer.train()
    return sum(losses(trainer)[-5:]) / 5


def test_a_spike_destroys_a_run_with_a_fixed_bound_but_not_with_an_adaptive_one(tmp_path):
    calm = spiking_trainer(tmp_path, [AdaptiveClipping()], 1.0, 0.0)
    fixed = spiking_trainer(tmp_path, [], 1e5, 1.0)
    callback = AdaptiveClipping()
    adaptive = spiking_trainer(tmp_path, [callback], 1e5, 0.0)
    assert max(calm, adaptive) < 0.03 and fixed > 0.04, "at the beginning it is 0.05"
    assert 1 <= callback.clipped < 20 and callback.dropped == 0
    callback = AdaptiveClipping()
    assert spiking_trainer(tmp_path, [callback], float("inf"), 0.0) < 0.03
    assert callback.dropped == 1


def test_clipping_is_that_of_the_definition():
    callback = AdaptiveClipping(threshold=2.0, decay=0.5, warmup=4)
    for norm in (1.0, 3.0, 1.0, 3.0):
        callback._remember(norm)
    assert (callback.mean, callback.variance) == (2.0, 1.0)
    assert callback.bound(3.9) == 3.9 and callback.bound(0.1) == 0.1
    # z = 8: two plus four eighths of a deviation.
    assert callback.bound(10.0) == pytest.approx(2.0 + 4.0 / 8.0)
    callback._remember(4.0)
    assert (callback.mean, callback.variance) == (3.0, 1.0)
    assert AdaptiveClipping().bound(1e9) == 1e9


def distance(trainer):
    return float(trainer.model.weight.detach().square().sum())


def test_a_learning_rate_falls_where_the_loss_has_stopped_to(tmp_path):
    fields = {"max_steps": 250, "learning_rate": 0.5, "logging_steps": 3}
    callback = AdaptiveLearningRate(window=10)
    fixed = bowl_trainer(tmp_path, [], **fields)
    fixed.train()
    adaptive = bowl_trainer(tmp_path, [callback], **fields)
    adaptive.train()
    assert callback.scale < 0.2 and distance(adaptive) < 0.3 * distance(fixed)
    assert adaptive.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * callback.scale)
    # As long as it falls, nothing changes: from far away, without noise.
    callback = AdaptiveLearningRate(window=10)
    far = [{"x": torch.full((SIZE,), 100.0)}] * 4000
    bowl_trainer(tmp_path, [callback], far, max_steps=60, learning_rate=0.002, logging_steps=3).train()
    assert callback.scale == 1.0


def test_the_fitted_slope():
    slope, error = fitted_slope([3.0, 2.0, 1.0, 0.0])
    assert (slope, error) == (-1.0, 0.0)
    values = torch.randn(9, dtype=torch.float64)
    design = torch.stack((torch.ones(9), torch.arange(9.0)), 1).double()
    solution = torch.linalg.lstsq(design, values[:, None]).solution
    residual = (values - (design @ solution)[:, 0]).square().sum() / 7
    expected = float(solution[1]), math.sqrt(residual * torch.linalg.inv(design.T @ design)[1, 1])
    assert fitted_slope(values.tolist()) == pytest.approx(expected)


@pytest.mark.parametrize(("mean", "steps"), [(0.2, 3), (2.0, 1), (0.0, 8)])
def test_accumulation_follows_the_noise(mean, steps, tmp_path):
    """Two points per micro-batch: S = 40 / 2, |G|^2 = 40 mean^2, so B = 12.5, 0.125 or infinite."""
    callback = AdaptiveAccumulation(highest=32, decay=0.98)
    fields = {"max_steps": 250, "gradient_accumulation_steps": 4, "learning_rate": 1e-6, "logging_steps": 250}
    bowl_trainer(tmp_path, [callback], points(3200, mean), **fields).train()
    assert callback.merged_steps == pytest.approx(steps, abs=1 if steps > 1 else 0)
    if mean:
        assert callback.noise_scale == pytest.approx(0.5 / mean**2, rel=0.4)


class ThreeSteps(AdaptiveAccumulation):
    def wanted_steps(self, accumulation):
        return 3


def language_trainer(folder, callback, **fields):
    values = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1, "max_grad_norm": 0.0}
    values |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    callbacks = callback if isinstance(callback, list) else [callback]
    kind = {"trainer_class": Trainer, "arguments_class": TrainingArguments}
    return make_trainer(
        tiny_model("full").train(), folder, rows=make_rows(90), callbacks=callbacks, **kind, **{**values, **fields}
    )


def test_merged_steps_are_one_step_of_a_larger_batch(tmp_path):
    callback = ThreeSteps(highest=6)
    callback.merged_steps = 3
    merged = language_trainer(tmp_path / "merged", callback, max_steps=8, optim="sgd", train_sampling_strategy="sequential")
    merged.train()
    # The last two steps of the Trainer are all that is left for the third update.
    assert callback._count == 0 and not callback._held
    model, rows = tiny_model("full").train(), make_rows(90)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    batches = [[merged.data_collator([rows[2 * n], rows[2 * n + 1]]) for n in (2 * k, 2 * k + 1)] for k in range(8)]
    for steps in (batches[:3], batches[3:6], batches[6:]):
        for step in steps:
            items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step)
            for batch in step:
                (model(**batch, num_items_in_batch=items).loss / len(steps)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    found = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert found == ["checkpoint-6", "checkpoint-8"], "a checkpoint waits until nothing is held"


@pytest.mark.parametrize(
    "make",
    [
        lambda: [AdaptiveClipping(threshold=0.1, decay=0.5, warmup=3)],
        lambda: [AdaptiveLearningRate(window=3, significance=9.0)],
        lambda: [AdaptiveAccumulation(highest=8, decay=0.5), AdaptiveClipping(threshold=0.1, decay=0.5, warmup=3)],
    ],
    ids=["clipping", "learning rate", "accumulation"],
)
def test_a_resumed_run_has_the_history(make, tmp_path):
    whole_callbacks, callbacks = make(), make()
    whole = language_trainer(tmp_path / "whole", whole_callbacks)
    whole.train()
    language_trainer(tmp_path / "parts", [*make(), StopAfter(9)]).train()
    resumed = language_trainer(tmp_path / "parts", callbacks)
    checkpoint = last_checkpoint(tmp_path / "parts")
    assert checkpoint.name != "checkpoint-12"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    for mine, theirs in zip(callbacks, whole_callbacks, strict=True):
        assert mine.state() == theirs.state() != type(mine)().state()
    changed = {"clipped": 0, "scale": 1.0, "merged_steps": 1}
    assert any(getattr(callbacks[0], name, start) != start for name, start in changed.items()), (
        "the callback has done nothing that a resumed run could forget"
    )


def test_a_checkpoint_without_the_callback_can_be_resumed_with_it(tmp_path):
    language_trainer(tmp_path, [], max_steps=4).train()
    trainer = language_trainer(tmp_path, AdaptiveClipping(warmup=2), max_steps=8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 8


@pytest.mark.parametrize(
    ("callbacks", "fields", "message"),
    [
        ([AdaptiveClipping()], {"max_grad_norm": 1.0}, "the Trainer clips already, at max_grad_norm=1.0; set it to 0"),
        ([AdaptiveClipping(), AdaptiveClipping()], {}, "the Trainer has 2 of these callbacks; one is enough"),
        (
            [AdaptiveLearningRate()],
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "choose another schedule",
        ),
        (
            [AdaptiveAccumulation()],
            {"gradient_accumulation_steps": 1},
            r"gradient_accumulation_steps=1, the least, .* 2 \.\.\. 128",
        ),
        ([AdaptiveAccumulation()], {"max_grad_norm": 1.0}, "clipping hides the norms; set max_grad_norm=0"),
    ],
)
def test_what_does_not_go_together(callbacks, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        language_trainer(tmp_path, callbacks, **fields).train()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveClipping(threshold=0), "threshold=0 must be positive"),
        (lambda: AdaptiveLearningRate(window=2), "window=2 must be at least 3"),
        (lambda: AdaptiveAccumulation(highest=1), "highest=1 must be at least 2"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
