"""Growing, splitting, pruning and merging experts: what stays the same function, and that the result is a model like any other."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1.moe.metrics import ExpertUsage
from modeling_deepseek_r1.moe.surgery import grow_experts, measure_usage, merge_experts, prune_experts, split_experts
from modeling_deepseek_r1.training import BiasUpdate, DeepseekR1Trainer, DeepseekR1TrainingArguments
from tests.models import random_ids, tiny_model

TWO_STAGES = {"expert_topology": [{"text": 3, "code": 2}, {"fusion": 6}]}
LOW_RANK = {"routing": {"expert_rank": 2}, "num_experts": 4}


def used(model):
    return measure_usage(model, random_ids(3, 40))


def save_and_load(model, folder):
    model.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


def assert_is_a_model(model, tmp_path):
    """It is saved and loaded, generates and trains."""
    loaded, ids = save_and_load(model, tmp_path / "model"), random_ids(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert loaded.generate(ids[:, :5], max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 8)
    outputs = loaded.train()(ids, labels=ids)
    outputs.loss.backward()
    grads = [router.scores.weight.grad for router in loaded.model.routers]
    assert outputs.aux_loss > 0 and all(grad.isfinite().all() and grad.any() for grad in grads)


def assert_same_function(actual, expected):
    ids = random_ids(3, 33, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(actual(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)


def test_usage_is_what_the_model_chose():
    model, ids = tiny_model("experts"), random_ids(3, 40)
    usage = measure_usage(model, ids)
    with torch.no_grad():
        routed = model.model(ids, output_router_logits=True).routed
    assert list(usage) == [0, 2]
    for counts, layer in zip(usage.values(), routed, strict=True):
        assert counts.slots.tolist() == torch.bincount(layer.top_k_index.flatten(), minlength=5).tolist()


@pytest.mark.parametrize(
    ("pattern", "fields", "number"),
    [
        ("experts", {}, 2),
        ("experts", {"routing": {"bias_balancing": True}, "shared_expert_intermediate_size": 12}, 5),
        ("expert_domains", {"routing": TWO_STAGES}, {"code": 1, "fusion": 3}),
        ("low_rank_experts", {**LOW_RANK, "mlp_bias": False}, 1),
    ],
)
def test_copies_of_the_busiest_change_nothing(pattern, fields, number, tmp_path):
    model = tiny_model(pattern, **fields)
    usage = used(model)
    grown, origins = grow_experts(model, usage, number)
    assert_same_function(grown, model)
    assert all(counts.unused_experts for counts in used(grown).values())
    for layer_idx, groups in origins.items():
        experts, old = grown.model.layers[layer_idx].mlp.experts, model.model.layers[layer_idx].mlp.experts
        name = "gate_up_proj_a" if "low" in pattern else "gate_up_proj"
        added = [group[0] for place, group in enumerate(groups) if group in groups[:place]]
        assert torch.equal(getattr(experts, name), getattr(old, name)[[group[0] for group in groups]])
        assert grown.config.per_layer_config[layer_idx].num_experts == len(groups) == experts.num_experts
        if isinstance(number, int):
            busiest = usage[layer_idx].slots.argsort(descending=True, stable=True)
            assert sorted(added) == sorted(busiest[:number].tolist())
    if pattern == "expert_domains":
        assert [stage["code"] for stage in grown.config.routing["expert_topology"][:1]] == [3]
        assert grown.config.expert_domains(2) == {"fusion": 9}
    assert_is_a_model(grown, tmp_path)


def test_bias_balancing_gives_a_copy_its_share(tmp_path):
    model = tiny_model("experts", num_experts_per_tok=1, vocab_size=40)
    ids = random_ids(16, 24, vocab_size=40)
    grown, origins = grow_experts(model, measure_usage(model, ids), 1)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = DeepseekR1TrainingArguments(
        output_dir=tmp_path, max_steps=40, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[], save_strategy="no"
    )
    trainer = DeepseekR1Trainer(grown, arguments, train_dataset=rows, callbacks=[BiasUpdate(0.03)])
    assert sum(isinstance(callback, BiasUpdate) for callback in trainer.callback_handler.callbacks) == 1
    trainer.train()
    for counts in measure_usage(grown.eval(), ids).values():
        assert counts.slots[-1] / counts.slots.sum() > 0.05
    assert all(router.load is None for router in grown.model.routers)


@pytest.mark.parametrize(
    ("pattern", "fields"),
    [
        ("experts", {}),
        ("shared_expert", {"layer_types": "F"}),
        ("expert_domains", {}),
        ("experts", {"per_layer_config": {2: {"num_experts": 3, "moe_intermediate_size": 8}}}),
    ],
)
def test_halves_of_all_experts_change_nothing(pattern, fields, tmp_path):
    model = tiny_model(pattern, **fields)
    split, _ = split_experts(model)
    assert_same_function(split, model)
    assert split.config.num_experts_per_tok == 2 * model.config.num_experts_per_tok
    for layer, old in zip(split.config.per_layer_config, model.config.per_layer_config, strict=True):
        assert (layer.num_experts, 2 * layer.moe_intermediate_size) == (2 * old.num_experts, old.moe_intermediate_size)
    if pattern != "expert_domains":  # whose scores have another name
        assert_is_a_model(split, tmp_path)


def test_the_least_used_go_and_the_others_stay(tmp_path):
    model = tiny_model("experts", norm_topk_prob=False, routing={"bias_balancing": True})
    usage = used(model)
    pruned, origins = prune_experts(model, usage, 2)
    for layer_idx, groups in origins.items():
        kept = sorted(usage[layer_idx].slots.argsort(descending=True, stable=True)[:3].tolist())
        assert groups == [[expert] for expert in kept]
        block, old = pruned.model.layers[layer_idx].mlp, model.model.layers[layer_idx].mlp
        assert torch.equal(block.experts.down_proj, old.experts.down_proj[kept])
        assert torch.equal(block.router.scores.weight, old.router.scores.weight[kept])
    assert_is_a_model(pruned, tmp_path)


def test_pruning_experts_that_nobody_chooses_changes_nothing():
    model = tiny_model("expert_domains", routing=TWO_STAGES, num_experts_per_tok=2)
    grown, _ = grow_experts(model, used(model), {"text": 1, "fusion": 2})
    pruned, origins = prune_experts(grown, used(grown), {"text": 1, "fusion": 2})
    assert origins[0] == [[0], [1], [2], [3], [4]]
    assert_same_function(pruned, model)


def test_merging_like_experts_changes_nothing_and_unlike_ones_by_their_use(tmp_path):
    model = tiny_model("experts", num_experts_per_tok=1, num_experts=4)
    with torch.no_grad():
        for layer in (model.model.layers[0], model.model.layers[2]):
            for tensor in layer.mlp.experts.parameters():
                tensor[2] = tensor[0]
            layer.mlp.router.scores.weight[2] = layer.mlp.router.scores.weight[0] + 1e-7
    usage = {layer_idx: ExpertUsage({"all": 4}) for layer_idx in (0, 2)}
    for counts in usage.values():
        counts.slots += torch.tensor([5.0, 3.0, 1.0, 3.0])
    merged, origins = merge_experts(model, usage, 1)
    assert origins == {0: [[0, 2], [1], [3]], 2: [[0, 2], [1], [3]]}
    assert_same_function(merged, model)
    assert_is_a_model(merged, tmp_path)
    fewer, origins = merge_experts(model, usage, 3)
    assert origins[0][0][0] == 0 and len(origins[0]) == 1
    expected = torch.einsum("e,eoi->oi", torch.tensor([5.0, 3.0, 1.0, 3.0]) / 12, model.model.layers[0].mlp.experts.down_proj)
    torch.testing.assert_close(fewer.model.layers[0].mlp.experts.down_proj[0], expected)


@pytest.mark.parametrize(
    ("operation", "pattern", "fields", "number", "words"),
    [
        (grow_experts, "experts", {"norm_topk_prob": False}, 1, "with norm_topk_prob=False another expert changes"),
        (grow_experts, "expert_domains", {}, {"text": 1}, "router_scoring'.='attention'"),
        (grow_experts, "experts", {"routing": {"min_experts_per_tok": 1}}, 1, "min_experts_per_tok'.=1"),
        (grow_experts, "experts", {}, 6, "6 experts cannot be copies of 5"),
        (prune_experts, "experts", {}, 5, "5 of 5 experts cannot be removed"),
        (prune_experts, "experts", {}, 4, "1 experts would be left, but a token gets num_experts_per_tok=2"),
        (prune_experts, "expert_domains", {}, 1, "number=1 must be a positive number .*'code', 'fusion', 'text'"),
        (prune_experts, "expert_domains", {}, {"image": 1}, "some of the domains"),
        (prune_experts, "experts", {}, 0, "number=0 must be a positive number"),
        (merge_experts, "low_rank_experts", {}, 1, "low-rank experts cannot be merged"),
    ],
)
def test_what_cannot_be_done_is_refused(operation, pattern, fields, number, words):
    model = tiny_model(pattern, **fields)
    with pytest.raises(ValueError, match=words):
        operation(model, used(model), number)


def test_models_that_cannot_be_split():
    with pytest.raises(ValueError, match="no layer with experts"):
        split_experts(tiny_model("full"))
    with pytest.raises(ValueError, match="low-rank experts share one MLP"):
        split_experts(tiny_model("low_rank_experts"))
    with pytest.raises(ValueError, match="moe_intermediate_size=15 is odd"):
        split_experts(tiny_model("experts", moe_intermediate_size=15))
