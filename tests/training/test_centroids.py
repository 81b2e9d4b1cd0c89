"""Centroids move once per optimizer step, by the keys of the first forward only."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from modeling_deepseek_r1.attention.kmeans import assign_keys
from modeling_deepseek_r1.training import CentroidUpdate, move_centroids
from tests.models import random_ids, tiny_model


def router_of(model):
    return model.model.layers[0].self_attn.router


def test_centroids_move_to_the_mean_of_their_keys():
    model, ids = tiny_model("routed").train(), random_ids(2, 30)
    router, seen = router_of(model), []
    router.gathers_statistics = True
    router.register_forward_hook(lambda module, args, output: seen.append(F.normalize(args[2].detach(), dim=-1)))
    before = router.centroids.clone()
    model(ids)
    model(ids[:, :20])
    keys = torch.cat([x.transpose(0, 1).flatten(1, 2) for x in seen], 1)
    which = assign_keys(keys[None], before)[0]
    move_centroids(model, decay=0.5)
    for group in range(before.shape[0]):
        for cluster in range(before.shape[1]):
            members = keys[group][which[group] == cluster]
            mean = F.normalize(members.sum(0), dim=-1)
            expected = (
                F.normalize(0.5 * before[group, cluster] + 0.5 * mean, dim=-1) if len(members) else before[group, cluster]
            )
            torch.testing.assert_close(router.centroids[group, cluster], expected)
    moved = router.centroids.clone()
    move_centroids(model, decay=0.5)
    assert torch.equal(router.centroids, moved)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_nothing_twice(reentrant):
    ids, counts = random_ids(2, 30), []
    for checkpointing in (False, True):
        model = tiny_model("routed").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        router_of(model).gathers_statistics = True
        model(ids, labels=ids, use_cache=False).loss.backward()
        counts.append(router_of(model).statistics[1])
    assert torch.equal(*counts)
    assert int(counts[0].sum()) == 2 * 2 * 30


def test_evaluation_gathers_nothing():
    model = tiny_model("routed")
    router_of(model).gathers_statistics = True
    model(random_ids(1, 9))
    assert router_of(model).statistics is None


def test_a_plain_trainer_moves_them_by_the_callback(tmp_path):
    model = tiny_model("routed")
    before = router_of(model).centroids.clone()
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 20)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[CentroidUpdate(decay=0.9)]).train()
    assert not torch.equal(router_of(model).centroids, before)
    torch.testing.assert_close(router_of(model).centroids.norm(dim=-1), torch.ones(2, 4))
    assert router_of(model).statistics is None
    assert not router_of(model).gathers_statistics


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"decay=2 must lie in \[0, 1\]"):
        move_centroids(tiny_model("routed"), decay=2)
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True)
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(2, 20)]
    with pytest.raises(ValueError, match="no local_routed_attention layer"):
        Trainer(tiny_model("full"), arguments, train_dataset=rows, callbacks=[CentroidUpdate()]).train()


def test_routers_stay_float32_whatever_the_model_is_cast_to():
    model = tiny_model("routed")
    exact = router_of(model).centroids.clone()
    model.to(torch.bfloat16)
    assert router_of(model).weight.dtype == torch.float32
    assert torch.equal(router_of(model).centroids, exact)
    assert model.lm_head.weight.dtype == torch.bfloat16
