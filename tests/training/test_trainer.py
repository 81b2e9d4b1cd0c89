"""What the Trainer adds, and that a plain one trains the same models."""

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from modeling_deepseek_r1 import DeepseekR1ForSequenceClassification
from modeling_deepseek_r1.training import CentroidUpdate, DeepseekR1TrainingArguments, ThresholdUpdate
from modeling_deepseek_r1.training.thresholds import adaptive_routers
from tests.models import random_ids, randomise, tiny_config, tiny_model

from .runs import losses, make_arguments, make_rows, make_trainer


def parameters_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("pattern", ["full", "routed_mixed"])
def test_a_plain_trainer_computes_the_same(pattern, tmp_path):
    """With centroids left alone the two are one and the same run; sequence numbers survive the removal of unused columns."""
    models = tiny_model(pattern), tiny_model(pattern)
    ours = make_trainer(models[0], tmp_path, centroid_decay=1.0)
    plain = make_trainer(models[1], tmp_path, Trainer, arguments_class=TrainingArguments)
    ours.train()
    plain.train()
    assert losses(ours) == losses(plain)
    assert losses(ours)[-1] < losses(ours)[0]
    for name, tensor in parameters_of(models[0]).items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name


def test_accumulation_equals_one_large_batch(tmp_path):
    models = tiny_model("mixed"), tiny_model("mixed")
    common = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    make_trainer(models[0], tmp_path, per_device_train_batch_size=6, **common).train()
    make_trainer(models[1], tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, **common).train()
    for name, tensor in parameters_of(models[0]).items():
        torch.testing.assert_close(models[1].state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("trainer_class", [Trainer, None], ids=["plain", "own"])
def test_accumulation_of_a_classification_is_a_mean(trainer_class, tmp_path):
    rows = [{"input_ids": ids, "labels": int(ids[0]) % 3} for ids in random_ids(12, 9)]
    results = []
    for size, steps in ((6, 1), (2, 3)):
        torch.manual_seed(0)
        model = randomise(DeepseekR1ForSequenceClassification(tiny_config("mixed", num_labels=3)))
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2, "optim": "sgd"}
        arguments = make_arguments(tmp_path, max_grad_norm=0.0, train_sampling_strategy="sequential", **fields)
        trainer = (trainer_class or make_trainer(model, tmp_path).__class__)(model, arguments, train_dataset=rows)
        trainer.train()
        results.append((losses(trainer), parameters_of(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def smoothed_cross_entropy(model, batch, amount):
    """By definition: the target is `1 - amount` on the label and `amount` spread over the vocabulary."""
    logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=amount)


def test_label_smoothing_is_that_of_torch(tmp_path):
    model = tiny_model("routed_mixed").train()
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=0.3)
    batch = trainer.data_collator([make_rows()[number] for number in range(3)])
    expected = smoothed_cross_entropy(model, batch, 0.3)
    assert expected > trainer.compute_loss(model.eval(), batch) + 0.05, "an evaluation is not smoothed"
    loss = trainer.compute_loss(model.train(), batch)
    torch.testing.assert_close(loss, expected)
    items = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(trainer.compute_loss(model, batch, num_items_in_batch=4 * items), expected / 4)
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(trainer.compute_loss(model, {**batch, "shift_labels": shifted}), expected)
    gradients = [torch.autograd.grad(value, model.lm_head.weight)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_noise_against_the_model_is_added_in_training_alone(tmp_path):
    model = tiny_model("mixed").train()
    trainer = make_trainer(model, tmp_path, adversarial_noise=0.1)
    batch = trainer.data_collator([make_rows()[number] for number in range(3)])
    plain = trainer.compute_loss(model.eval(), batch)
    torch.testing.assert_close(plain, model(**batch).loss)
    loss = trainer.compute_loss(model.train(), batch)
    assert loss - plain > plain + 0.01, "what is added is a loss at worse embeddings"
    items = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(trainer.compute_loss(model, batch, num_items_in_batch=4 * items), loss / 4)
    trainer = make_trainer(model, tmp_path, adversarial_noise=0.1)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(line["loss"] > line["adversarial_loss"] > line["loss"] / 2 for line in lines) and len(lines) == 4
    with pytest.raises(ValueError, match="adversarial_noise=-1 must be 0 or more"):
        make_arguments(tmp_path, adversarial_noise=-1)


def test_label_smoothing_of_a_classification(tmp_path):
    torch.manual_seed(0)
    model = randomise(DeepseekR1ForSequenceClassification(tiny_config("mixed", num_labels=3))).train()
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=0.2)
    batch = {"input_ids": random_ids(4, 9), "labels": torch.tensor([0, 2, 1, 2])}
    expected = torch.nn.functional.cross_entropy(model(batch["input_ids"]).logits, batch["labels"], label_smoothing=0.2)
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected)


def with_parts(model):
    """Gives the model's output a dictionary of parts, scaled like the loss, and one about utilisation."""
    forward = model.forward

    def wrapped(*args, num_items_in_batch=None, **kwargs):
        output = forward(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        if output.loss is None:
            return output
        output = CausalLMOutputWithPast(loss=output.loss + 0.5, logits=output.logits)
        output.loss_parts = {"cross_entropy": output.loss - 0.5, "balance": torch.tensor(0.5)}
        output.utilisation = {"active_experts": torch.tensor(3.0)}
        return output

    model.forward = wrapped
    return model


def test_parts_of_the_loss_are_logged_and_add_up(tmp_path):
    model = with_parts(tiny_model("mixed"))
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=2, logging_steps=2, remove_unused_columns=False)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["balance"] == pytest.approx(2 * 0.5)
        assert entry["cross_entropy"] + entry["balance"] == pytest.approx(entry["loss"], rel=1e-4)
        assert entry["active_experts"] == 3.0
        assert entry["train_tokens_per_second"] > 0 and entry["num_input_tokens_seen"] > 0
    real = sum(len(row["input_ids"]) for row in make_rows())
    assert entries[0]["num_input_tokens_seen"] <= real
    assert "balance" not in trainer.evaluate()


def test_single_numbers_of_the_output_are_logged_as_means(tmp_path):
    model, values = tiny_model("mixed"), iter(range(8))
    model.register_forward_hook(lambda module, args, output: output.__setitem__("aux_loss", torch.tensor(float(next(values)))))
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=2, logging_steps=2)
    trainer.train()
    assert [entry["aux_loss"] for entry in trainer.state.log_history if "loss" in entry] == [1.5, 5.5]


def test_centroids_follow_unless_told_otherwise(tmp_path):
    for fields, moved in (({}, True), ({"centroid_decay": 1.0}, False)):
        model = tiny_model("routed")
        router = model.model.layers[0].self_attn.router
        before = router.centroids.clone()
        make_trainer(model, tmp_path, **fields).train()
        assert torch.equal(router.centroids, before) != moved
        assert not router.gathers_statistics
    trainer = make_trainer(tiny_model("routed"), tmp_path, callbacks=[CentroidUpdate(0.5)])
    assert [callback.decay for callback in trainer.callback_handler.callbacks if isinstance(callback, CentroidUpdate)] == [0.5]
    assert not any(isinstance(x, CentroidUpdate) for x in make_trainer(tiny_model("full"), tmp_path).callback_handler.callbacks)


def test_thresholds_follow_their_target_once_per_optimizer_step(tmp_path):
    routing = tiny_config("expert_domains").routing | {"target_experts_per_tok": 1.5}
    model = tiny_model("expert_domains", routing=routing)
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=2)
    assert any(isinstance(callback, ThresholdUpdate) for callback in trainer.callback_handler.callbacks)
    routers = adaptive_routers(model)
    before = [float(router.threshold) for router in routers]
    trainer.train()
    assert all(float(router.threshold) != old for router, old in zip(routers, before, strict=True))
    without = make_trainer(tiny_model("full"), tmp_path).callback_handler.callbacks
    assert not any(isinstance(callback, ThresholdUpdate) for callback in without)


@pytest.mark.parametrize("fields", [{"bf16": True}, {"checkpointing": True}, {"bf16": True, "checkpointing": True}])
@pytest.mark.parametrize("pattern", ["mixed", "per_layer", "routed_mixed"])
def test_mixed_precision_and_checkpointing(fields, pattern, tmp_path):
    """Close to the run in float32; the weights stay float32."""
    fields = dict(fields)
    if fields.pop("checkpointing", False):
        known = DeepseekR1TrainingArguments.__dataclass_fields__
        fields["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = True
    expected = make_trainer(tiny_model(pattern), tmp_path)
    expected.train()
    trainer = make_trainer(tiny_model(pattern), tmp_path, **fields)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=0.02 if "bf16" in fields else 1e-5)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_impossible_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"centroid_decay=1.5 must lie in \[0, 1\]"):
        DeepseekR1TrainingArguments(str(tmp_path), centroid_decay=1.5)
    with pytest.raises(ValueError, match="fp16=True: mixed precision in float16 needs an accelerator"):
        make_arguments(tmp_path, fp16=True)


def test_arguments_of_a_script(tmp_path):
    (arguments,) = HfArgumentParser(DeepseekR1TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--centroid_decay", "0.9", "--use_cpu"]
    )
    assert (arguments.centroid_decay, arguments.include_num_input_tokens_seen) == (0.9, "non_padding")
