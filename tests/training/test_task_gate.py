"""Gates on neurons: nothing at first, trained alone, saved, and folded into a smaller model."""

import copy
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_deepseek_r1 import DeepseekR1ForSequenceClassification
from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.evaluation import load_model, load_tokenizer
from modeling_deepseek_r1.training import (
    attach_task_gates,
    detach_task_gates,
    last_checkpoint,
    load_task_gates,
    measure_neurons,
    save_task_gates,
    select_task,
    specialise,
)
from modeling_deepseek_r1.training.task_gate import NeuronUse, gated_mlps, mean_loss
from tests.models import random_ids, tiny_config, tiny_model

from .runs import StopAfter, losses, make_trainer
from .test_experts import batches, moved

WIDTHS = {0: 64, 1: 40, 2: 64}


def gated_model(pattern="mixed", tasks=("code", "prose"), **fields):
    model = tiny_model(pattern, **fields)
    attach_task_gates(model, tasks)
    return model


def uneven_model(**fields):
    return gated_model(per_layer_config={1: {"intermediate_size": 40}}, **fields)


def test_gates_change_nothing_at_first_and_are_all_that_is_trained():
    model, ids = tiny_model("mixed"), random_ids(2, 16)
    expected = model(ids).logits
    report = attach_task_gates(model, ["code", "prose"])
    assert report.matched == {"task gates": 3} and report.trainable == 3 * 64 * (48 + 2)
    assert torch.equal(model(ids).logits, expected)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == [f"model.layers.{n}.mlp.task_gate.{part}" for n in range(3) for part in ("weight", "scales")]
    changed = moved(model)(ids).logits
    select_task(model, "prose")
    assert not torch.equal(model(ids).logits, changed)
    select_task(model, None)
    assert torch.equal(model(ids).logits, expected)
    select_task(model, "code")
    assert torch.equal(model(ids).logits, changed)
    detach_task_gates(model)
    assert torch.equal(model(ids).logits, expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == tiny_model("mixed").state_dict().keys()


@pytest.mark.parametrize("chunk_size", [0, 3])
def test_the_gate_is_what_its_formula_says(chunk_size):
    model = moved(gated_model(chunk_size_feed_forward=chunk_size))
    select_task(model, "prose")
    mlp, x = model.model.layers[1].mlp, torch.randn(2, 7, 48)
    gate = 2 * (x @ mlp.task_gate.weight.T).sigmoid() * mlp.task_gate.scales[1]
    expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * gate)
    torch.testing.assert_close(mlp(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plain_trainer_trains_and_resumes(checkpointing, tmp_path):
    def run(folder, stop=None, resume=None):
        model = gated_model().train()
        kind = {"trainer_class": Trainer, "arguments_class": TrainingArguments, "gradient_checkpointing": checkpointing}
        fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        trainer = make_trainer(model, folder, callbacks=[StopAfter(stop)] if stop else [], **fields, **kind)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, start = run(tmp_path / "whole"), gated_model()
    assert losses(whole)[-1] < losses(whole)[0]
    for name, parameter in start.named_parameters():
        assert torch.equal(whole.model.get_parameter(name), parameter) != parameter.requires_grad, name
    # Nobody has trained for the other task.
    assert all(bool((mlp.task_gate.scales[1] == 1).all()) for mlp in gated_mlps(whole.model).values())
    run(tmp_path / "parts", stop=4)
    resumed = run(tmp_path / "parts", resume=str(last_checkpoint(tmp_path / "parts")))
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_gates_are_saved_and_loaded_beside_the_model(tmp_path):
    model, ids = uneven_model(), random_ids(2, 16)
    select_task(moved(model), "prose")
    expected = model(ids).logits
    save_task_gates(model, tmp_path)
    plain = copy.deepcopy(model)
    detach_task_gates(plain)
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    report = load_task_gates(loaded, tmp_path)
    select_task(loaded, "prose")
    assert torch.equal(loaded(ids).logits, expected) and report.matched == {"task gates": 3}
    with pytest.raises(ValueError, match=r"does not fit this model: 1.scales is \[2, 40\] there and \[2, 64\] here"):
        load_task_gates(tiny_model("mixed"), tmp_path)


def test_what_is_measured():
    """Against the definition, from the rows without their padding."""
    model = moved(gated_model())
    use = measure_neurons(model.train(), batches())
    assert model.training and not any(mlp.task_gate._forward_hooks for mlp in gated_mlps(model).values())
    mlp, seen = model.model.layers[1].mlp, []
    hook = mlp.task_gate.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0][0], output[0])))
    model.eval()
    with torch.no_grad():
        for batch in batches():
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(ids[mask.bool()][None])
    hook.remove()
    before, after = (torch.cat(rows) for rows in zip(*seen, strict=True))
    output = torch.einsum("ti,hi->tih", after, mlp.down_proj.weight)
    torch.testing.assert_close(use[1].scores, output.square().sum(-1).mean(0))
    fitted = [torch.linalg.lstsq(before[:, i : i + 1], after[:, i : i + 1]).solution.item() for i in range(64)]
    torch.testing.assert_close(use[1].factors, torch.tensor(fitted), rtol=1e-4, atol=1e-4)


def test_neurons_without_use_are_dropped_exactly(tmp_path):
    model, ids = uneven_model(mlp_bias=True), random_ids(2, 16)
    unused = {layer: random.Random(layer).sample(range(width), width // 4) for layer, width in WIDTHS.items()}
    with torch.no_grad():
        for layer, mlp in gated_mlps(model).items():
            mlp.task_gate.scales.uniform_(0.5, 2)
            mlp.task_gate.scales[0, unused[layer]] = 0
    expected, held_out = model(ids).logits, list(batches())
    small, report = specialise(model, measure_neurons(model, batches()), keep=0.75, held_out=held_out)
    torch.testing.assert_close(small(ids).logits, expected)
    torch.testing.assert_close(model(ids).logits, expected)
    assert report.kept == {0: 48, 1: 30, 2: 48} and report.widths == WIDTHS
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-5)
    # Weights of gate and up with their biases, and columns of down.
    assert report.bytes_before - report.bytes_after == 4 * (16 + 10 + 16) * (3 * 48 + 2)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [layer.mlp.up_proj.out_features for layer in loaded.model.layers] == [48, 30, 48]
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert "126 of 168 in 3 layers" in report.summary()
    select_task(model, "prose")
    other, _ = specialise(model, measure_neurons(model, batches()), keep=1.0)
    torch.testing.assert_close(other(ids).logits, model(ids).logits)


def test_held_out_loss_is_the_mean_over_the_documents():
    """Without padding, and without the first token of a packed document."""
    model, total, count = tiny_model("mixed"), 0.0, 0
    packed = {"input_ids": random_ids(1, 12, seed=9), "position_ids": torch.tensor([[*range(5), *range(7)]])}
    documents = [packed["input_ids"][:, :5], packed["input_ids"][:, 5:]]
    for batch in batches():
        documents += [ids[mask.bool()][None] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    for row in documents:
        total += float(model(row, labels=row).loss.detach()) * (row.shape[1] - 1)
        count += row.shape[1] - 1
    assert mean_loss(model, [*batches(), packed]) == pytest.approx(total / count, rel=1e-5)


def test_layers_with_experts_stay_as_they_are():
    model, ids = gated_model("experts"), random_ids(1, 12)
    assert list(gated_mlps(model)) == [1]
    select_task(model, "prose")
    use = measure_neurons(model, batches())
    whole, _ = specialise(model, use, keep=1.0)
    torch.testing.assert_close(whole(ids).logits, model(ids).logits)
    small, report = specialise(model, use, keep=0.5)
    assert report.kept == {1: 32} and small.config.is_sparse(0) and torch.isfinite(small(ids).logits).all()
    with pytest.raises(ValueError, match="every layer of this model has experts.*choose_experts.*prune_experts"):
        attach_task_gates(tiny_model("expert_domains"), ["code"])


def test_a_new_head_is_trained_as_well():
    classifier = DeepseekR1ForSequenceClassification(tiny_config("mixed", num_labels=3))
    attach_task_gates(classifier, ["code"])
    assert classifier.score.weight.requires_grad


def test_what_is_refused():
    plain, model = tiny_model("mixed"), gated_model()
    use = measure_neurons(model, batches())
    for call, message in (
        (lambda: attach_task_gates(plain, []), r"tasks=\[\] must be a list of different names"),
        (lambda: attach_task_gates(plain, "code"), "tasks='code' must be a list"),
        (lambda: attach_task_gates(model, ["code"]), "has task gates already"),
        (lambda: select_task(model, "law"), "there is no task 'law'; the gates know code, prose"),
        (lambda: detach_task_gates(plain), "has no task gate"),
        (lambda: measure_neurons(model, []), "there is no token"),
        (lambda: specialise(model, use, keep=0), r"keep=0 must be a share of the neurons in \(0, 1\]"),
        (lambda: specialise(uneven_model(), use, keep=0.5), "use must have the scores of this model's"),
        (lambda: specialise(torch.nn.Sequential(model), use, keep=0.5), "Sequential wraps the model; unwrap it"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    select_task(model, None)
    with pytest.raises(ValueError, match="no task is selected"):
        measure_neurons(model, batches())


@pytest.mark.slow
def test_a_real_model_specialises_to_python(tmp_path, monkeypatch):
    """Without the quarter of SmolLM2's neurons that code uses least, the loss rises far less than without any quarter."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    from demo import packaged_checkpoint
    from two_domains import write_domain_texts

    convert_checkpoint(packaged_checkpoint(), tmp_path / "model")
    (own, aside), tokenizer = write_domain_texts(tmp_path / "texts")["code"], load_tokenizer(tmp_path / "model")

    def rows(file, count):
        ids = torch.tensor(tokenizer(file.read_text(encoding="utf-8")[: count * 2000]).input_ids)
        return [{"input_ids": row[None]} for row in ids[: count * 256].view(-1, 256)]

    model, held_out = load_model(tmp_path / "model"), rows(aside, 4)
    attach_task_gates(model, ["code"])
    use = measure_neurons(model, rows(own, 8))
    _, report = specialise(model, use, keep=0.75, held_out=held_out)
    chance = {n: NeuronUse(torch.rand(len(neurons.scores)), neurons.factors) for n, neurons in use.items()}
    _, by_chance = specialise(model, chance, keep=0.75, held_out=held_out)
    print(report.summary(), by_chance.summary(), sep="\n")
    assert by_chance.kept == report.kept == dict.fromkeys(range(30), 1152)
    assert report.loss_after - report.loss_before < 0.25 * (by_chance.loss_after - by_chance.loss_before)
