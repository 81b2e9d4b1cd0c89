"""Training the scales of stored weights: gradients, what stays as it was, whole runs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1 import DeepseekR1QuantizationConfig, cli
from modeling_deepseek_r1.quantization.modules import QuantizedLowRankExperts
from modeling_deepseek_r1.quantization.run import quantize_checkpoint, quantize_model
from modeling_deepseek_r1.quantization.scales import fold_scales, stored_matrices, train_scales
from modeling_deepseek_r1.training import Recipe, train_checkpoint
from tests.data.tokenizers import make_tokenizer
from tests.models import random_ids, tiny_model
from tests.training.runs import StopAfter, make_trainer


def quantized(pattern="mixed", bits=4, method="rtn", **fields):
    model = tiny_model(pattern, **fields)
    config = DeepseekR1QuantizationConfig(bits, method, group_size=8 if bits == 4 else None)
    quantize_model(model, config, None if method == "rtn" else random_ids(2, 24))
    return model


@pytest.mark.parametrize(
    ("pattern", "bits", "method"),
    [
        ("mixed", 4, "rtn"),
        ("mixed", 8, "awq"),
        ("experts", 4, "awq"),
        ("experts", "fp8", "rtn"),
        ("low_rank_experts", 4, "rtn"),
    ],
)
def test_gradients_are_those_of_plain_weights_times_what_was_stored(pattern, bits, method):
    model = quantized(pattern, bits, method, tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = random_ids(2, 20)
    expected = model(ids).logits
    count = train_scales(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count and all(
        name.endswith(("scale_change", "norm.weight")) for name in trained
    )
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)
    model(ids, labels=ids, use_cache=False).loss.backward()
    plain = quantized(pattern, bits, method, tie_word_embeddings=True).dequantize()
    plain.requires_grad_(True)(ids, labels=ids, use_cache=False).loss.backward()
    plain_weights = dict(plain.named_parameters())
    for name, parameter in trained.items():
        if name.endswith("norm.weight"):
            torch.testing.assert_close(parameter.grad, plain_weights[name].grad, rtol=1e-3, atol=1e-6, msg=name)
            continue
        path = name.removesuffix(".scale_change").replace(".factors", "")
        weight = plain_weights.get(f"{path}.weight", plain_weights.get(path))
        shares = weight * weight.grad  # a change of a scale by itself changes its weights by themselves
        shares = shares.transpose(-1, -2) if path.endswith(QuantizedLowRankExperts.TRANSPOSED) else shares
        expected_grad = shares.unflatten(-1, (parameter.shape[-1], -1)).sum(-1)
        torch.testing.assert_close(parameter.grad, expected_grad, rtol=1e-3, atol=1e-6, msg=name)
    fold_scales(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(p.requires_grad for p in model.parameters())


def test_any_trainer_trains_them_and_only_scales_change(tmp_path):
    model = quantized("experts", tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="purely quantized"):
        make_trainer(model, tmp_path)
    train_scales(model)
    trainer = make_trainer(model, tmp_path, max_steps=24, learning_rate=0.02)
    before_training = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before_training - 0.05
    trained, ids = model(random_ids(1, 12)).logits, random_ids(1, 12)
    fold_scales(model)
    torch.testing.assert_close(model(ids).logits, trained, rtol=0.05, atol=0.05)  # scales have 8 bits of precision
    changed = {name.rpartition(".")[2] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"scales", "weight"}
    assert all(
        "norm" in name or name.endswith("scales") for name, t in model.state_dict().items() if not torch.equal(t, before[name])
    )
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_interrupted_run_goes_on(tmp_path):
    results = []
    for stop in (None, 3):
        model = quantized()
        train_scales(model)
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        folder = tmp_path / str(stop)
        make_trainer(model, folder, callbacks=[StopAfter(stop)] if stop else None, **options).train()
        if stop:
            model = quantized()
            train_scales(model)
            make_trainer(model, folder, **options).train(resume_from_checkpoint=True)
        results.append(torch.cat([one.scale_change.detach().flatten() for one in stored_matrices(model)]))
    assert results[0].any()
    torch.testing.assert_close(*results)


def test_decoding_in_bfloat16_sees_the_scales_of_the_moment():
    model = quantized(hidden_size=64, num_attention_heads=4, intermediate_size=128, bits=8).to(torch.bfloat16).eval()
    ids = random_ids(1, 4)
    with torch.no_grad():
        before = model(ids).logits
        train_scales(model)
        model.model.layers[0].mlp.down_proj.scale_change.fill_(1.0)
        during = model(ids).logits
        fold_scales(model)
        after = model(ids).logits
    assert not torch.allclose(before, during, rtol=0.05, atol=0.05)
    torch.testing.assert_close(during, after, rtol=0.05, atol=0.05)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scales")
    tiny_model("routed_mixed", vocab_size=259, qk_norm="head").save_pretrained(folder / "source")
    make_tokenizer().save_pretrained(folder / "source")
    quantize_checkpoint(folder / "source", folder / "made", DeepseekR1QuantizationConfig(4, group_size=8))
    for name, times in (("text.txt", 40), ("other.txt", 10)):
        (folder / name).write_text("The quick brown fox jumps over the lazy dog, again and again. " * times)
    return folder


def test_the_command_brings_a_quantized_checkpoint_nearer_to_its_source(checkpoints, tmp_path, capsys):
    source, made, text = (checkpoints / name for name in ("source", "made", "text.txt"))
    out = tmp_path / "out"
    options = ["--train-scales", "--heal-from", str(source), "--max-steps", "40", "--length", "48", "--learning-rate", "0.02"]
    assert (
        cli.main(
            [
                "train",
                str(made),
                str(text),
                "--output",
                str(out),
                *options,
                "--eval-data",
                str(checkpoints / "other.txt"),
                "--json",
            ]
        )
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["metrics"]["eval_divergence"] < 0.7 * report["metrics"]["before_divergence"]
    plain = AutoModelForCausalLM.from_pretrained(source)
    assert (
        f" of {plain.num_parameters():,} weights" in report["trained"]
        and "scales of matrices, with the norms" in report["trained"]
    )
    assert (out / "config.json").exists() and AutoModelForCausalLM.from_pretrained(out).config.quantization_config.bits == 4
    size = (made / "model.safetensors").stat().st_size
    assert (out / "model.safetensors").stat().st_size == pytest.approx(size, rel=1e-3)


def test_what_is_refused(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="only a quantized model has scales"):
        train_scales(tiny_model("mixed"))
    recipe = Recipe().changed(
        {"model": str(checkpoints / "source"), "data": [str(checkpoints / "text.txt")], "output": str(tmp_path / "o")}
    )
    with pytest.raises(ValueError, match="is not quantized; train_scales is for"):
        train_checkpoint(recipe.changed({"train_scales": True}))
    for name, value in {
        "lora_rank": 4,
        "freeze": ["*"],
        "expert_config": {"text": 1},
        "quantization_aware": {"bits": 4},
    }.items():
        with pytest.raises(
            ValueError, match=f"train_scales trains the scales of stored weights, and norms, alone: leave out {name}"
        ):
            recipe.changed({"train_scales": True, name: value}).check()
    with pytest.raises(ValueError, match=r"or train its scales alone \(train_scales\)"):
        train_checkpoint(recipe.changed({"model": str(checkpoints / "made")}))


def test_defaults_that_suit_scales():
    recipe = Recipe().changed({"heal_from": "dense", "train_scales": True})
    assert (recipe.learning_rate, recipe.lora_rank, recipe.heal_window) == (2e-3, None, None)
    assert Recipe().changed({"train_scales": True, "learning_rate": 1e-4}).learning_rate == 1e-4
    assert Recipe().changed({"train_scales": True}).changed({"heal_from": "dense"}).heal_window is None
