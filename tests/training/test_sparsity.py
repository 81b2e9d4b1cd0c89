"""Capacity, sampling, clipping by expert and progressive sparsity: what each does to a training, saved and resumed."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_deepseek_r1.moe.outputs import RouterOutput
from modeling_deepseek_r1.training import (
    ExpertCapacity,
    ExpertClipping,
    ExpertSampling,
    ProgressiveSparsity,
    fit_thresholds,
    last_checkpoint,
)
from tests.models import random_ids, tiny_model

from .runs import StopAfter, losses, make_trainer

ADAPTIVE = {"routing": {"expert_topology": [{"a": 6}], "min_experts_per_tok": 1, "target_experts_per_tok": 2.0}}


def routed_in_training(model, ids, **inputs):
    return model.train().model(ids, output_router_logits=True, **inputs).routed


def expected_capacity(routed: RouterOutput, factor: float, real: list[bool]) -> list[set[tuple[int, int]]]:
    """Kept (token, expert) pairs of each expert, one after the other."""
    pairs = [
        (float(weight), -token, int(expert))
        for token, (row, weights) in enumerate(zip(routed.top_k_index, routed.top_k_weights, strict=True))
        for expert, weight in zip(row, weights, strict=True)
        if weight and real[token]
    ]
    capacity = math.ceil(factor * len(pairs) / routed.logits.shape[-1])
    return [{(-t, e) for _, t, e in sorted((p for p in pairs if p[2] == expert), reverse=True)[:capacity]} for expert in range(routed.logits.shape[-1])]  # fmt: skip


@pytest.mark.parametrize("pattern", ["experts", "expert_domains", "shared_expert"])
def test_capacity_drops_the_least_and_counts(pattern):
    model, ids = tiny_model(pattern), random_ids(2, 19)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    before = routed_in_training(model, ids, attention_mask=mask)
    capacity = ExpertCapacity(0.7)
    capacity.attach(model)
    after = routed_in_training(model, ids, attention_mask=mask)
    real = mask.flatten().bool().tolist()
    # Later layers see what the first one dropped.
    first = after[0].top_k_weights != 0
    kept = {
        (t, int(e)) for t, row in enumerate(after[0].top_k_index) for e, a in zip(row, first[t], strict=True) if a and real[t]
    }
    assert kept == set().union(*expected_capacity(before[0], 0.7, real))
    padding = ~torch.tensor(real)
    assert torch.equal(first[padding], before[0].top_k_weights[padding] != 0)
    sums = after[0].top_k_weights.sum(-1)[first.any(-1)]
    if model.model.routers[0].normalise:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    counted = [sum(int((layer.top_k_weights[~padding] != 0).sum()) for layer in routed) for routed in (before, after)]
    assert capacity.dropped > 0 and counted[1] == capacity.slots - capacity.dropped
    assert 0 < capacity.dropped_share < 0.5
    model.eval()
    seen = capacity.slots
    with torch.no_grad():
        assert torch.equal(
            model.model(ids, output_router_logits=True).routed[0].top_k_weights != 0, before_in_evaluation(model, ids)
        )
    assert capacity.slots == seen
    capacity.detach()
    again = routed_in_training(model, ids, attention_mask=mask)
    assert torch.equal(again[0].top_k_weights, before[0].top_k_weights)


def before_in_evaluation(model, ids):
    return model.model(ids, output_router_logits=True).routed[0].top_k_weights != 0


def test_sampling_draws_by_probability_and_ends():
    model = tiny_model("experts")
    router = model.model.routers[0].train()
    states = torch.randn(1, 48).expand(20_000, -1)
    logits = router(states).logits[0].detach()
    sampling = ExpertSampling(start=1.0, share=0.5)
    sampling.attach(model)
    for temperature in (1.0, 2.0):
        sampling.temperature = temperature
        routed = router(states)
        first = torch.bincount(routed.top_k_index[:, 0], minlength=5) / len(states)
        torch.testing.assert_close(first, (logits / temperature).softmax(-1), atol=0.02, rtol=0)
        own = logits.softmax(-1)[routed.top_k_index]
        torch.testing.assert_close(routed.top_k_weights, own / own.sum(-1, keepdim=True))
    sampling.temperature = 0.0
    assert router(states).top_k_index.unique(dim=0).shape[0] == 1


@pytest.mark.parametrize("pattern", ["experts", "low_rank_experts"])
def test_an_overloaded_expert_is_cut_and_the_others_are_not(pattern):
    model, ids = tiny_model(pattern), random_ids(2, 30)
    model(ids, labels=ids).loss.backward()
    packed = [p for p in model.model.layers[0].mlp.experts.parameters() if p.dim() == 3]
    for parameter in packed:
        parameter.grad[1] *= 1000
    before = [parameter.grad.clone() for parameter in packed]
    clipping = ExpertClipping(3.0)
    clipping.clip(model)
    norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in before]).norm(dim=0)
    bound = 3 * norms[norms > 0].median()
    after = torch.stack([parameter.grad.flatten(1).norm(dim=1) for parameter in packed]).norm(dim=0)
    torch.testing.assert_close(after, norms.clamp(max=bound))
    assert after[1] == pytest.approx(float(bound), rel=1e-5)
    assert clipping.clipped["model.layers.0.mlp.experts"][1] == 1
    untouched = norms <= bound
    assert all(torch.equal(p.grad[untouched], old[untouched]) for p, old in zip(packed, before, strict=True))


def test_progressive_sparsity_follows_its_schedule(tmp_path):
    schedule = ProgressiveSparsity()
    assert [schedule.target(p / 10, 6, 2) for p in range(11)] == pytest.approx(
        [6, 6, 6, 6 - 2 / 3, 6 - 4 / 3, 4, 4 - 2 / 3, 4 - 4 / 3, 2, 2, 2]
    )
    model = tiny_model("expert_domains", num_experts_per_tok=6, routing=ADAPTIVE["routing"])
    seen = []

    class Watch(ProgressiveSparsity):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.model.routers[0].target_experts)

    trainer = make_trainer(
        model, tmp_path, Trainer, arguments_class=TrainingArguments, callbacks=[Watch(rate=0.5)], max_steps=60
    )
    trainer.train()
    assert seen[:12] == [6.0] * 12 and seen[-12:] == [2.0] * 12 and seen == sorted(seen, reverse=True)
    assert all(router.target_experts == 2.0 for router in model.model.routers)
    ids = random_ids(4, 24)
    with torch.no_grad():
        active = [
            (r.top_k_weights != 0).sum(-1).float().mean() for r in model.eval().model(ids, output_router_logits=True).routed
        ]
    assert torch.stack(active).mean() < 3.5


@pytest.mark.parametrize("target", [1.0, 1.7, 3.0])
def test_thresholds_fitted_to_a_text(target):
    model, ids = tiny_model("expert_domains"), random_ids(4, 40)
    fit_thresholds(model, ids, target)
    fit_thresholds(model, ids, target)
    with torch.no_grad():
        routed = model.model(ids, output_router_logits=True).routed
    assert [float((layer.top_k_weights != 0).sum(-1).float().mean()) for layer in routed] == pytest.approx(
        [target] * 3, abs=0.15
    )
    for wrong, value, message in ((model, 3.5, "between 1 and 3"), (tiny_model("experts"), 1.0, "none has a threshold")):
        with pytest.raises(ValueError, match=message):
            fit_thresholds(wrong, ids, value)


@pytest.mark.parametrize("trainer_class", [Trainer, None], ids=["plain", "own"])
def test_all_of_them_in_a_trainer_and_resumed(trainer_class, tmp_path):
    fields = {"num_experts_per_tok": 3, "routing": {**ADAPTIVE["routing"]}}

    def callbacks():
        return [ExpertCapacity(1.0), ExpertSampling(), ExpertClipping(1.0), ProgressiveSparsity()]

    def run(folder, more=(), resume=None, **arguments):
        kind = {"trainer_class": Trainer, "arguments_class": TrainingArguments} if trainer_class else {}
        torch.manual_seed(0)
        own = callbacks()
        trainer = make_trainer(
            tiny_model("expert_domains", **fields), folder, callbacks=[*own, *more], max_steps=6, **kind, **arguments
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, own

    whole, own = run(tmp_path / "whole")
    assert own[0].dropped > 0 and sum(map(sum, own[2].clipped.values())) > 0
    assert all(0 <= entry["dropped_share"] < 1 for entry in whole.state.log_history if "loss" in entry)
    half = {"save_strategy": "steps", "save_steps": 3}
    run(tmp_path / "half", [StopAfter(3)], **half)
    resumed, again = run(tmp_path / "half", resume=last_checkpoint(tmp_path / "half"), **half)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    assert (again[0].slots, again[0].dropped, again[2].clipped) == (own[0].slots, own[0].dropped, own[2].clipped)


def test_what_cannot_be_is_refused():
    for make, message in (
        (lambda: ExpertCapacity(0), "factor=0"),
        (lambda: ExpertClipping(0.5), "at least 1"),
        (lambda: ExpertSampling(share=0), "share=0"),
        (lambda: ProgressiveSparsity(0.5, 0.6), "together at most 1"),
        (lambda: ExpertCapacity().attach(tiny_model("full")), "no layer with experts"),
        (lambda: ExpertCapacity().attach(tiny_model("low_rank_experts")), "share one MLP"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
