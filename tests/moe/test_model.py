"""Models with experts: the auxiliary loss in outputs and in training, recording, implementations, the dense model as a limit."""

import re

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from modeling_deepseek_r1.moe.losses import router_losses, router_losses_reference, share_of_batch
from modeling_deepseek_r1.moe.outputs import slot_counts
from modeling_deepseek_r1.training import ThresholdUpdate, move_thresholds
from tests.models import EXPERT_PATTERNS, random_ids, tiny_model

COEFFICIENT = 0.1
ADAPTIVE = {
    "expert_topology": [{"text": 3, "code": 2}],
    "min_experts_per_tok": 1,
    "target_experts_per_tok": 1.5,
    "expert_activation_threshold": 0.1,
}


def cross_entropy(logits, labels, reduction="mean"):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


def grads(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_grads(actual, expected):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def padded(side):
    ids, mask = random_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    for row, length in enumerate((0, 6, 11)):
        mask[row, slice(0, length) if side == "left" else slice(20 - length, 20)] = 0
    return ids, mask


@pytest.mark.parametrize("pattern", EXPERT_PATTERNS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_the_auxiliary_loss_is_the_definition_on_what_was_chosen(pattern, side):
    model = tiny_model(pattern).train()
    ids, mask = padded(side)
    mask = mask if side else None
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    outputs = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    chosen = model.model(ids, attention_mask=mask).routed
    real = mask.flatten().bool() if side else None
    expected = router_losses_reference(model.model.routers, chosen, real)
    parts = [outputs.aux_loss, outputs.balance_loss, outputs.router_z_loss, outputs.expert_cost]
    assert [float(part.detach()) for part in parts] == pytest.approx(expected, rel=1e-5)
    loss = cross_entropy(outputs.logits, labels) + COEFFICIENT * outputs.aux_loss
    torch.testing.assert_close(outputs.loss, loss)
    assert len(outputs.router_logits) == len(model.model.routers)
    for mine, theirs in zip(outputs.router_logits, chosen, strict=True):
        assert torch.equal(mine, theirs.logits)


def test_padding_changes_no_loss():
    model = tiny_model("expert_domains").train()
    alone = random_ids(1, 12)
    expected = model(alone, labels=alone)
    for side in ("left", "right"):
        zeros = torch.zeros(1, 5, dtype=torch.long)
        ids = torch.cat((zeros, alone) if side == "left" else (alone, zeros), 1)
        mask = (ids > 0).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, int(mask[0].argmax())] = -100  # has nothing to be predicted from but padding
        outputs = model(ids, attention_mask=mask, labels=labels)
        torch.testing.assert_close(outputs.aux_loss, expected.aux_loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-4, atol=1e-5)


def test_packed_documents_count_like_single_ones():
    model = tiny_model("expert_domains").train()
    rows = [random_ids(1, length, seed=length) for length in (7, 12)]
    packed = torch.cat(rows, 1)
    seq_idx = torch.tensor([[0] * 7 + [1] * 12])
    together = model(packed, labels=packed, seq_idx=seq_idx)
    chosen = [model.model(row).routed for row in rows]
    joined = [type(a)(*(torch.cat(pair) for pair in zip(a, b, strict=True))) for a, b in zip(*chosen, strict=True)]
    torch.testing.assert_close(together.aux_loss, router_losses(model.model.routers, joined).aux_loss, rtol=1e-4, atol=1e-6)


def test_training_includes_it_by_itself_and_evaluation_does_not():
    model, ids = tiny_model("experts"), random_ids(2, 20)
    evaluated = model(ids, labels=ids)
    assert evaluated.aux_loss is None and evaluated.router_logits is None
    torch.testing.assert_close(evaluated.loss, cross_entropy(evaluated.logits, ids))
    asked = model(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(asked.loss, evaluated.loss + COEFFICIENT * asked.aux_loss)
    trained = model.train()(ids, labels=ids)
    torch.testing.assert_close(trained.loss, asked.loss)
    assert trained.router_logits is None and trained.aux_loss is not None
    model.config.router_aux_loss_coef = 0.0
    without = model(ids, labels=ids)
    assert without.aux_loss is None
    torch.testing.assert_close(without.loss, evaluated.loss)


def test_the_configuration_may_ask():
    model, ids = tiny_model("experts", output_router_logits=True), random_ids(2, 9)
    assert model(ids).aux_loss is not None and len(model(ids).router_logits) == 2
    assert model(ids, output_router_logits=False).aux_loss is None


def test_a_dense_model_that_is_asked_says_zero():
    model, ids = tiny_model("mixed").train(), random_ids(2, 9)
    outputs = model(ids, labels=ids, output_router_logits=True)
    assert outputs.aux_loss == 0 and outputs.router_logits == ()
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits, ids))
    assert model(ids, labels=ids).aux_loss is None


def test_micro_batches_add_up_to_the_token_weighted_mean():
    model = tiny_model("expert_domains").train()
    batches = [random_ids(1, 24, seed=1), random_ids(2, 7, seed=2)]
    labels = [ids.clone() for ids in batches]
    labels[0][:, :10] = -100
    items = [int((x[:, 1:] != -100).sum()) for x in labels]
    outputs = [model(x, labels=y, num_items_in_batch=sum(items)) for x, y in zip(batches, labels, strict=True)]
    entropy = sum(cross_entropy(o.logits, y, "sum") for o, y in zip(outputs, labels, strict=True)) / sum(items)
    aux = sum(o.aux_loss * n for o, n in zip(outputs, items, strict=True)) / sum(items)
    torch.testing.assert_close(sum(o.loss for o in outputs), entropy + COEFFICIENT * aux)
    assert share_of_batch(labels[0], torch.tensor(sum(items))) == pytest.approx(items[0] / sum(items))
    assert share_of_batch(labels[0], 20, shift_labels=labels[0]) == pytest.approx(14 / 20)


@pytest.mark.parametrize("pattern", EXPERT_PATTERNS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradients_of_the_auxiliary_loss(pattern, reentrant):
    model, ids = tiny_model(pattern, router_aux_loss_coef=5.0).train(), random_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    expected = grads(model)
    assert any(".router.scores." in name and grad.abs().sum() > 0 for name, grad in expected.items())
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert_same_grads(grads(model), expected)


def test_the_auxiliary_loss_alone_balances_the_experts():
    model = tiny_model("experts", num_experts_per_tok=1).train()
    with torch.no_grad():
        for router in model.model.routers:
            router.scores.weight[0] += 0.5
            router.scores.weight[0] *= 4
    ids, losses = random_ids(4, 30), []
    optimizer = torch.optim.Adam([router.scores.weight for router in model.model.routers], lr=0.05)
    for _ in range(60):
        aux = model(ids, labels=ids).aux_loss
        losses.append(float(aux.detach()))
        optimizer.zero_grad()
        aux.backward()
        optimizer.step()
    assert losses[0] > 1.3
    assert losses[-1] < 1.1


@pytest.mark.parametrize("pattern", ["experts", "expert_domains"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_every_experts_implementation_gives_the_same_model(pattern, implementation, tmp_path):
    model, ids = tiny_model(pattern), random_ids(2, 20)
    assert model.config._experts_implementation == "eager"
    expected = model(ids).logits
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
    assert loaded.model.layers[0].mlp.experts.config._experts_implementation == implementation
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_modalities_reach_the_routers_in_chunks_too():
    model = tiny_model("expert_domains", chunk_size_feed_forward=7)
    ids = random_ids(2, 20)
    types = torch.zeros_like(ids)
    types[:, 5:12] = 1
    with torch.no_grad():
        whole = model(ids, mm_token_type_ids=types, use_cache=False).logits
        chunked = model(ids, mm_token_type_ids=types, past_key_values=DynamicCache(), use_cache=True).logits
        plain = model(ids, use_cache=False).logits
        options = {"mm_token_type_ids": types, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        generated = [model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False)]
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, whole, rtol=1e-3, atol=1e-3)
    assert torch.equal(*generated)


@pytest.mark.parametrize("pattern", ["experts", "low_rank_experts"])
def test_equal_experts_are_the_dense_model(pattern):
    """Whatever the routers say."""
    dense = tiny_model("sliding")
    width = {"moe_intermediate_size": 64, "mlp_bias": False, "layer_types": "S", "mlp_layer_types": ["sparse"] * 3}
    sparse, ids = tiny_model(pattern, **width), random_ids(2, 20)
    source = dense.state_dict()
    state = {name: tensor for name, tensor in source.items() if ".mlp." not in name}
    for layer in range(3):
        gate, up, down = (source[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        prefix = f"model.layers.{layer}.mlp.experts"
        if pattern == "experts":
            state[f"{prefix}.gate_up_proj"] = torch.cat((gate, up)).expand(5, -1, -1)
            state[f"{prefix}.down_proj"] = down.expand(5, -1, -1)
        else:
            state |= {f"{prefix}.{name}_proj.weight": x for name, x in (("gate", gate), ("up", up), ("down", down))}
            for name in ("gate_up_proj_b", "down_proj_b"):
                state[f"{prefix}.{name}"] = torch.zeros_like(sparse.state_dict()[f"{prefix}.{name}"])
    missing = sparse.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", EXPERT_PATTERNS)
def test_parallel_plans_name_packed_experts_and_only_those(pattern):
    model = tiny_model(pattern).model
    names = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in (*model.named_parameters(), *model.named_modules())}
    experts = {name for plan in (model._tp_plan, model._ep_plan) for name in plan if ".experts" in name}
    if pattern == "low_rank_experts":
        assert not experts
    else:
        assert experts == {f"layers.*.mlp.experts{name}" for name in ("", ".gate_up_proj", ".down_proj")} and experts <= names
    assert "plan" not in " ".join(model.config.to_dict())
    assert not tiny_model("mixed").model._ep_plan


def test_experts_of_other_ranks_cost_nothing_and_add_nothing():
    """Expert parallelism marks them with an index behind the last one and weight 0."""
    experts, x = tiny_model("experts").model.layers[0].mlp.experts, torch.randn(6, 48)
    index, weights = torch.arange(12).view(6, 2) % 5, torch.rand(6, 2) + 0.1
    mine = index < 3
    expected = experts(x, index.masked_fill(~mine, 0), weights.masked_fill(~mine, 0.0))
    assert torch.equal(experts(x, index.masked_fill(~mine, 5), weights.masked_fill(~mine, 0.0)), expected)


def test_shares_are_counted_over_all_ranks():
    """Two ranks with half of the rows each: the mean of their balance losses is that of all rows."""
    model = tiny_model("expert_domains").train()
    ids = random_ids(4, 12)
    routers = model.model.routers
    whole = model.model(ids).routed
    halves = [[type(layer)(*(field.tensor_split(2)[rank] for field in layer)) for layer in whole] for rank in range(2)]
    counts = [torch.cat([slot_counts(layer, None) for layer in half]) for half in halves]

    def reduce_on(rank):
        return lambda tensor: tensor.add_(counts[1 - rank])

    expected = router_losses(routers, whole)
    actual = [router_losses(routers, half, None, reduce_on(rank)) for rank, half in enumerate(halves)]
    torch.testing.assert_close((actual[0].balance_loss + actual[1].balance_loss) / 2, expected.balance_loss)
    assert not torch.allclose(router_losses(routers, halves[0]).balance_loss, actual[0].balance_loss)


def rows(count=8):
    return [{"input_ids": ids, "labels": ids} for ids in random_ids(count, 20)]


def arguments(folder, **options):
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **options}
    return TrainingArguments(folder, report_to=[], save_strategy="no", use_cpu=True, **options)


def test_a_plain_trainer_trains_with_the_auxiliary_loss(tmp_path):
    results = {}
    for coefficient in (0.0, 20.0):
        model = tiny_model("experts", router_aux_loss_coef=coefficient)
        trainer = Trainer(model, arguments(tmp_path, max_steps=8, learning_rate=0.01), train_dataset=rows())
        trainer.train()
        with torch.no_grad():
            results[coefficient] = float(model.eval()(random_ids(8, 20), output_router_logits=True).balance_loss)
    assert results[20.0] < results[0.0]


def test_a_trainer_moves_the_thresholds_by_the_callback(tmp_path):
    model = tiny_model("expert_domains", routing=ADAPTIVE)
    before = [router.threshold.clone() for router in model.model.routers]
    Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[ThresholdUpdate(rate=0.5)]).train()
    for router, threshold in zip(model.model.routers, before, strict=True):
        assert router.threshold != threshold
        assert router.statistics is None and not router.gathers_statistics
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(loaded.model.routers[0].threshold, model.model.routers[0].threshold)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_recomputation_and_padding_are_not_counted(reentrant):
    model = tiny_model("expert_domains", routing=ADAPTIVE).train()
    ids, mask = padded("right")
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    for router in model.model.routers:
        router.gathers_statistics = True
    model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    assert [float(router.statistics[1]) for router in model.model.routers] == [float(mask.sum())] * 3
    with torch.no_grad():
        model(ids)  # As a Trainer that generates in training mode.
    model.eval()(ids)
    assert float(model.model.routers[0].statistics[1]) == float(mask.sum())


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="rate=0 must be positive"):
        move_thresholds(tiny_model("experts"), rate=0)
    with pytest.raises(ValueError, match=r"no layer has routing\['target_experts_per_tok'\]"):
        Trainer(tiny_model("experts"), arguments(tmp_path), train_dataset=rows(), callbacks=[ThresholdUpdate()]).train()
    with pytest.raises(ValueError, match="is not supported"):
        tiny_model("experts").set_experts_implementation("fastest")


def test_label_smoothing_of_the_trainer_finds_logits():
    """What reads `outputs["logits"]` or `outputs[0]` of a model without labels meets no auxiliary field first."""
    model, ids = tiny_model("experts").train(), random_ids(2, 9)
    outputs = model(ids)
    assert outputs[0] is outputs.logits
    assert torch.isfinite(LabelSmoother(0.1)(outputs, ids, shift_labels=True))
