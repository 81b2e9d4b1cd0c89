"""Healing: the loss, the teacher that shares the student's weights, and whole runs."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_deepseek_r1 import cli
from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.data import CausalCollator
from modeling_deepseek_r1.training import (
    DeepseekR1TrainingArguments,
    DistillationConfig,
    DistillationTrainer,
    Recipe,
    add_adapters,
    last_checkpoint,
    load_teacher,
)
from modeling_deepseek_r1.training.distillation import POSITIONS_PER_CHUNK, divergence
from tests.conversion.sources import input_ids, model_of, save
from tests.data.tokenizers import make_tokenizer
from tests.models import random_ids, tiny_model

from .runs import StopAfter, losses, make_rows, make_trainer


def dense():
    return tiny_model("full", qk_norm="head")


def hybrid(pattern="routed_mixed", adapters=True, **fields):
    """A student with the weights of `dense()`; its gates are as conversion leaves them."""
    model = tiny_model(pattern, **{"qk_norm": "head", **fields})
    model.load_state_dict(dense().state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data.zero_()
    targets = ["attention", *(["router"] if "routed" in pattern else [])]
    return add_adapters(model, rank=2, targets=targets)[0] if adapters else model


def make(student, folder, teacher=None, settings=None, **fields):
    class WithTeacher(DistillationTrainer):
        def __init__(self, *args, **named):
            super().__init__(*args, teacher=teacher or dense(), distillation=settings, **named)

    return make_trainer(student, folder, WithTeacher, **fields)


def batch_of(trainer, count=3):
    return trainer.data_collator([make_rows()[number] for number in range(count)])


def reference(student, teacher, batch, settings):
    """Token by token, by the definition; the sum over the predicted tokens, and their number."""
    names = ("input_ids", "attention_mask", "position_ids", "seq_idx")
    inputs = {name: batch[name] for name in names if name in batch}
    own = student(**inputs, output_hidden_states=True)
    with torch.no_grad():
        target = teacher(**inputs, output_hidden_states=True)
    total, count = 0.0, 0
    for row, label in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        p = (target.logits[row, label].double() / settings.temperature).softmax(-1)
        q = (own.logits[row, label].double() / settings.temperature).softmax(-1)
        if settings.top_k:
            best = p.argsort(descending=True)[: settings.top_k]
            p, q = (torch.cat((x[best], 1 - x[best].sum(-1, keepdim=True))) for x in (p, q))
        total = total + settings.temperature**2 * (p * (p.log() - q.log())).sum()
        word = batch["labels"][row, label + 1]
        total = total - settings.ce_weight * own.logits[row, label].double().log_softmax(-1)[word]
        pairs = list(zip(own.hidden_states[1:], target.hidden_states[1:], strict=True))
        errors = [(h - t)[row, label].square().sum() / t[row, label].square().sum() for h, t in pairs]
        total = total + settings.hidden_weight * sum(errors) / len(errors)
        count += 1
    return total, count


@pytest.mark.parametrize(
    "settings",
    [
        DistillationConfig(),
        DistillationConfig(temperature=2.5, ce_weight=0.3),
        DistillationConfig(top_k=7, temperature=0.7, hidden_weight=0.4),
    ],
    ids=["plain", "temperature", "top k, hidden states"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "all weights"])
def test_loss_and_gradients_are_those_of_the_definition(settings, whole, tmp_path, monkeypatch):
    """Over packed, padded rows and several chunks; all weights means the head's too."""
    monkeypatch.setattr("modeling_deepseek_r1.training.distillation.POSITIONS_PER_CHUNK", 16)
    student = hybrid(adapters=not whole).train()
    trainer = make(student, tmp_path, settings=settings)
    batch = batch_of(trainer)
    expected, count = reference(student, dense(), batch, settings)
    loss = trainer.compute_loss(student, batch)
    torch.testing.assert_close(loss, (expected / count).float())
    torch.testing.assert_close(trainer.compute_loss(student, batch, num_items_in_batch=4 * count), loss / 4)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    found, wanted = (torch.autograd.grad(value, trained, allow_unused=True) for value in (loss, expected / count))
    assert any(gradient is not None and gradient.abs().max() > 1e-4 for gradient in wanted)
    for gradient, own in zip(wanted, found, strict=True):
        torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-6)


def test_padding_changes_nothing(tmp_path):
    student, rows = hybrid().train(), [{"input_ids": random_ids(1, n, seed=n)[0].tolist()} for n in (9, 20)]
    trainer, values = make(student, tmp_path), []
    for side in ("left", "right"):
        tokenizer = make_tokenizer()
        tokenizer.padding_side, tokenizer.pad_token_id = side, 0
        values.append(trainer.compute_loss(student, CausalCollator(tokenizer)(rows)))
    single = [trainer.compute_loss(student, CausalCollator(tokenizer)([row]), num_items_in_batch=8 + 19) for row in rows]
    torch.testing.assert_close(values, [sum(single)] * 2)


@pytest.mark.parametrize("settings", [None, DistillationConfig(top_k=5, temperature=2.0, hidden_weight=1.0)])
def test_a_student_that_is_its_teacher_learns_nothing(settings, tmp_path):
    student = hybrid("full").train()
    trainer = make(student, tmp_path, settings=settings)
    loss = trainer.compute_loss(student, batch_of(trainer))
    assert abs(float(loss)) < 1e-6
    loss.backward()
    gradients = [parameter.grad for parameter in student.parameters() if parameter.requires_grad]
    assert max(gradient.abs().max() for gradient in gradients) < 1e-6
    other = hybrid("routed").train()
    make(other, tmp_path, settings=settings).compute_loss(other, batch_of(trainer)).backward()
    assert max(p.grad.abs().max() for p in other.parameters() if p.requires_grad) > 1e-4


def test_windows_are_narrow_only_while_training(tmp_path):
    wide, narrow, results = {"sliding_window": 30}, {"sliding_window": 5}, []
    for name, fields, window in (("wide", wide, None), ("limited", wide, 5), ("narrow", narrow, None), ("higher", narrow, 9)):
        trainer = make(hybrid(**fields), tmp_path / name, settings=DistillationConfig(window=window), max_steps=3)
        patterns = [layer.self_attn.pattern for layer in trainer.student.model.layers]
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert [layer.self_attn.pattern for layer in trainer.student.model.layers] == patterns
        results.append((before, losses(trainer)))
    assert results[1][0] == results[0][0] != results[2][0]
    assert results[1][1] == results[2][1] == results[3][1] != results[0][1]


def test_the_rest_beside_the_best_tokens():
    student, teacher = torch.randn(2, 5, 11)
    full = divergence(student, teacher)
    few = [divergence(student, teacher, top_k=k) for k in (1, 4, 10)]
    for smaller, larger in zip(few, [*few[1:], full], strict=True):
        assert (smaller <= larger + 1e-6).all()
    torch.testing.assert_close(divergence(student, teacher, top_k=11), full)
    certain = torch.tensor([[100.0, 0.0, 0.0]], requires_grad=True)
    value = divergence(certain, torch.tensor([[0.0, 100.0, 0.0]]), top_k=1)
    (gradient,) = torch.autograd.grad(value.sum(), certain)
    assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("variant", ["llama_tied", "qwen2", "qwen3_window"])
def test_the_teacher_is_the_source(variant, tmp_path):
    """Bit for bit the converted one, also after it has taken over the student's weights; and close to the family's own class."""
    source = model_of(variant)
    save(source, tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "same")
    convert_checkpoint(tmp_path / "source", tmp_path / "student", layer_types="S", sliding_window=3)
    teacher, ids = load_teacher(tmp_path / "source"), input_ids()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "same").eval()(ids).logits
    assert torch.equal(teacher(ids).logits, expected)
    torch.testing.assert_close(expected, source(ids).logits, atol=1e-5, rtol=0)
    student, _ = add_adapters(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), rank=2)
    trainer = make(student, tmp_path, teacher)
    assert torch.equal(trainer.teacher(ids).logits, expected)
    own = {weight.data_ptr() for weight in student.parameters()}
    assert all(weight.data_ptr() in own and not weight.requires_grad for weight in teacher.parameters())
    assert trainer.shared_weights == sum(weight.numel() for weight in teacher.parameters())
    assert torch.equal(load_teacher(tmp_path / "same")(ids).logits, expected)


def test_what_is_trained_is_not_shared(tmp_path):
    student = hybrid(adapters=False)
    student.requires_grad_(False).model.layers[0].requires_grad_(True)
    teacher = dense()
    teacher.model.norm.weight.data += 1
    trainer = make(student, tmp_path, teacher)
    own = {name: weight.data_ptr() for name, weight in student.named_parameters()}
    same = {name for name, weight in teacher.named_parameters() if own[name] == weight.data_ptr()}
    assert {name for name in own if name in dict(teacher.named_parameters())} - same == {
        name for name in dict(teacher.named_parameters()) if name.startswith(("model.layers.0.", "model.norm"))
    }
    expected = teacher(random_ids(1, 9)).logits
    trainer.train()
    assert torch.equal(teacher(random_ids(1, 9)).logits, expected)


def test_logits_exist_for_a_chunk_at_a_time(tmp_path):
    student = hybrid().train()
    trainer = make(student, tmp_path)
    rows = trainer.data_collator.__class__(0)(
        [{"input_ids": (x := random_ids(1, 700)[0].tolist()), "labels": x, "position_ids": [*range(700)]}]
    )
    sizes = []
    for head in (trainer.student.lm_head, trainer.teacher.lm_head):
        head.register_forward_hook(lambda module, args, output: sizes.append(output.numel() // output.shape[-1]))
    trainer.compute_loss(student, rows).backward()
    assert max(sizes) == POSITIONS_PER_CHUNK and sum(sizes) == 1 + 2 * 699


def test_training_closes_the_gap(tmp_path):
    """An evaluation reports it."""
    trainer = make(hybrid("sinks"), tmp_path, max_steps=30, learning_rate=1e-2)
    before = trainer.evaluate()
    assert before["eval_perplexity"] == pytest.approx(before["eval_teacher_perplexity"] * (1 + before["eval_gap"]))
    assert before["eval_loss"] == pytest.approx(math.log(before["eval_perplexity"]), rel=1e-5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_divergence"] < 0.7 * before["eval_divergence"]
    assert after["eval_teacher_perplexity"] == before["eval_teacher_perplexity"]
    entries = [entry for entry in trainer.state.log_history if "divergence" in entry]
    assert entries[0]["divergence"] == pytest.approx(entries[0]["loss"], rel=1e-3)


def test_accumulation_equals_one_large_batch(tmp_path):
    models = hybrid("sinks"), hybrid("sinks")
    common = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    make(models[0], tmp_path, per_device_train_batch_size=6, **common).train()
    make(models[1], tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, **common).train()
    assert any(not torch.equal(tensor, hybrid("sinks").state_dict()[name]) for name, tensor in models[0].state_dict().items())
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_experts_keep_their_auxiliary_losses(tmp_path):
    fields = {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_experts": 4,
        "routing": {"expert_rank": 2},
        "qk_norm": "head",
    }
    student = tiny_model("sinks", **fields).train()
    trainer = make(student, tmp_path, settings=DistillationConfig(ce_weight=0.5), gradient_accumulation_steps=2)
    batch = batch_of(trainer)
    items = (batch["labels"][:, 1:] != -100).sum()
    loss, outputs = trainer.compute_loss(student, batch, True, num_items_in_batch=2 * items)
    assert float(outputs.aux_loss) > 0.5
    torch.testing.assert_close(outputs.loss_parts["router_loss"], student.config.router_aux_loss_coef * outputs.aux_loss / 2)
    torch.testing.assert_close(sum(outputs.loss_parts.values()), loss)
    gradients = torch.autograd.grad(loss, list(student.model.routers[0].parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    trainer = make(student, tmp_path, settings=DistillationConfig(ce_weight=0.5), gradient_accumulation_steps=2)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "router_loss" in entry)
    assert entry["divergence"] + entry["cross_entropy"] + entry["router_loss"] == pytest.approx(entry["loss"], rel=1e-4)


@pytest.mark.parametrize("fields", [{"bf16": True}, {"checkpointing": True}], ids=["bf16", "checkpointing"])
def test_mixed_precision_and_checkpointing(fields, tmp_path):
    if "checkpointing" in fields:
        known = DeepseekR1TrainingArguments.__dataclass_fields__
        fields = {"activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing": True}
    settings = DistillationConfig(hidden_weight=0.5)
    results = []
    for more in ({}, fields):
        torch.manual_seed(0)
        trainer = make(hybrid(), tmp_path, settings=settings, **more)
        trainer.train()
        results.append(losses(trainer))
    assert results[1] == pytest.approx(results[0], rel=0.05 if "bf16" in fields else 1e-5)


def test_resumed_equals_uninterrupted(tmp_path):
    def run(folder, stop=None, resume=None):
        fields = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, "centroid_decay": 0.9, "learning_rate": 3e-3}
        torch.manual_seed(0)
        callbacks = [StopAfter(stop)] if stop else []
        trainer = make(hybrid(), folder, callbacks=callbacks, gradient_accumulation_steps=2, **fields)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=6)
    torch.manual_seed(99)
    resumed = run(tmp_path / "parts", resume=str(last_checkpoint(tmp_path / "parts")))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6) and len(losses(resumed)) == 9
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healing")
    tiny_model("full", vocab_size=259).save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    text = "the quick brown fox jumps over the lazy dog and "
    (folder / "text.txt").write_text(text * 60)
    (folder / "few.txt").write_text(text * 5)
    options = ["--layer-types", "RS", "--sliding-window", 8, "--num-sink-tokens", 2, "--num-clusters", 4]
    options += ["--calibration", folder / "text.txt"]
    assert cli.main(["convert", str(folder / "dense"), str(folder / "hybrid"), *map(str, options)]) == 0
    return folder


def test_the_command(checkpoints, tmp_path, capsys):
    arguments = ["train", checkpoints / "hybrid", checkpoints / "text.txt", "--output", tmp_path / "out"]
    arguments += ["--heal-from", checkpoints / "dense", "--eval-data", checkpoints / "few.txt"]
    arguments += ["--max-steps", 12, "--length", 64, "--learning-rate", 1e-2]
    assert cli.main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    assert "attention (12), router (2)" in printed and "before_gap" in printed
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    settings, metrics = report["settings"], report["metrics"]
    assert (settings["lora_rank"], settings["packing"], settings["length"], settings["accumulation"]) == (
        8,
        "concatenate",
        64,
        1,
    )
    assert metrics["eval_divergence"] < metrics["before_divergence"]
    healed, before, teacher = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (tmp_path / "out", checkpoints / "hybrid", checkpoints / "dense")
    )
    assert healed.state_dict().keys() == before.state_dict().keys()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer((checkpoints / "text.txt").read_text()[:64], return_tensors="pt").input_ids
    with torch.no_grad():
        target = teacher(ids).logits
        gaps = [divergence(model(ids).logits[0], target[0]).mean() for model in (healed, before)]
    assert gaps[0] < gaps[1]


def test_settings_that_healing_brings_and_does_not():
    recipe = Recipe().changed({"heal_from": "dense"})
    assert (recipe.lora_rank, recipe.packing, recipe.length, recipe.accumulation) == (8, "concatenate", 2048, 1)
    assert recipe.learning_rate > Recipe().learning_rate
    assert recipe.changed({"heal_from": "other", "length": 1024}).length == 1024
    assert Recipe().changed({"length": 512}).changed({"heal_from": "dense", "accumulation": 8}).accumulation == 8
    assert Recipe().changed({"length": 512}).changed({"heal_from": "dense"}).length == 512
    assert Recipe().changed({"heal_from": "dense", "lora_rank": None}).lora_rank is None
    assert Recipe().changed({"heal_from": "dense", "freeze": ["*.mlp.*"]}).lora_rank is None


def test_errors(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="vocabulary has 97 tokens and the teacher's 50; they must be the same"):
        make(hybrid(), tmp_path, tiny_model("full", vocab_size=50))
    with pytest.raises(ValueError, match="compares layers one by one, but the student has 3 of width 48 and the teacher 2"):
        make(hybrid(), tmp_path, tiny_model("full", num_hidden_layers=2), DistillationConfig(hidden_weight=1.0))
    with pytest.raises(ValueError, match="the teacher is a LlamaForCausalLM"):
        make(hybrid(), tmp_path, model_of("llama"))
    with pytest.raises(ValueError, match="label smoothing"):
        make(hybrid(), tmp_path, label_smoothing_factor=0.1)
    for fields in ({"temperature": 0.0}, {"top_k": 0}, {"window": 0}, {"ce_weight": -1.0}, {"hidden_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            DistillationConfig(**fields)


def test_errors_of_the_command(checkpoints, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_model("full", vocab_size=300).save_pretrained(other)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    start = ["train", checkpoints / "hybrid", checkpoints / "text.txt", "--output", tmp_path / "out"]
    for more, message in [
        (["--heal-from", other], "different vocabularies"),
        (["--heal-from", tmp_path / "nothing"], "nothing"),
        (["--heal-from", checkpoints / "dense", "--label-smoothing", 0.1], "no label_smoothing"),
        (["--heal-from", checkpoints / "dense", "--heal-temperature", 0], "temperature=0.0"),
    ]:
        assert cli.main([str(argument) for argument in [*start, *more, "--length", 32]]) != 0
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
