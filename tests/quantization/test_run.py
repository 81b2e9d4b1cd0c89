"""From folder to folder: what is written, the report, what is refused."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from modeling_deepseek_r1 import DeepseekR1ForConditionalGeneration, DeepseekR1QuantizationConfig
from modeling_deepseek_r1.cli import main
from modeling_deepseek_r1.quantization.modules import QuantizedLinear
from modeling_deepseek_r1.quantization.run import quantize_checkpoint, quantize_model, spread_windows
from modeling_deepseek_r1.training import Recipe, train_checkpoint
from tests.data.tokenizers import make_tokenizer
from tests.models import random_ids, tiny_model
from tests.multimodal.models import mixed_batch, multimodal_model

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    size = {
        "hidden_size": 64,
        "vocab_size": 259,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_attention_heads": 8,
    }
    tiny_model("experts", tie_word_embeddings=True, **size).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def test_the_command_writes_a_checkpoint_and_says_what_it_did(checkpoint, tmp_path, capsys):
    text, made = checkpoint.parent / "text.txt", tmp_path / "made"
    options = ["--bits", "4", "--method", "gptq", "--text", str(text), "--windows", "4", "--length", "64"]
    assert main(["quantize", str(checkpoint), str(made), *options]) == 0
    table = capsys.readouterr().out
    assert "model.layers.2" in table and "same experts" in table and f"{made}: " in table
    report = json.loads((made / "quantization_report.json").read_text())
    assert report["tokens"] == 256 and report["share_of_bfloat16"] < 0.36  # norms and routers weigh much in so small a model
    assert report["bytes_after"] == (made / "model.safetensors").stat().st_size
    names = {matrix["name"]: matrix for matrix in report["matrices"]}
    assert {"model.embed_tokens", "model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.up_proj"} < names.keys()
    assert "lm_head" not in names and not any("router" in name or "norm" in name for name in names)
    down = names["model.layers.1.mlp.down_proj"]
    assert (down["bytes_before"], down["bytes_after"]) == (64 * 64 * 2, 64 * 64 // 2 + 64 * 2 * 2 + 64)
    assert [layer["router_agreement"] is None for layer in report["layers"]] == [False, True, False]
    model, ids = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)("fox", return_tensors="pt")
    assert model.config.quantization_config.to_dict() == report["config"] and model.dtype == torch.bfloat16
    assert torch.isfinite(model(**ids).logits).all()
    assert main(["quantize", str(checkpoint), str(made)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["quantize", str(checkpoint), str(made), "--embedding", "none", "--overwrite", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == [] and report["config"]["embedding_bits"] is None
    assert not any("embed" in matrix["name"] for matrix in report["matrices"])
    with pytest.raises(ValueError, match=r"is quantized.*checkpoint that it was made of"):
        train_checkpoint(recipe(made, text, tmp_path))


def recipe(model, text, folder):
    return Recipe(model=str(model), data=[str(text)], output=str(folder / "trained"), max_steps=1, length=32)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"bits": 4, "method": "gptq"}, {}, r"method 'gptq' needs a text to calibrate on \(--text\)"),
        (
            {"bits": 8},
            {"texts": ["text.txt"], "num_windows": 400},
            "400 windows of 64 tokens need 25600 tokens of text, but there",
        ),
        (
            {"bits": 4, "group_size": 128},
            {},
            r"model.embed_tokens: groups of 128 do not divide 64 inputs; group_size may be 8 or",
        ),
    ],
)
def test_what_cannot_be_done_leaves_nothing_behind(checkpoint, tmp_path, settings, options, message):
    options = options | {"texts": [str(checkpoint.parent / name) for name in options.get("texts", ())], "length": 64}
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(checkpoint, tmp_path / "made", DeepseekR1QuantizationConfig(**settings), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, "method='best' must be one of rtn, gptq, awq"),
        ({"bits": 5}, "bits=5 must be one of"),
        ({"bits": 8, "group_size": 32}, "group_size=32 belongs to 4 bits"),
        ({"version": 2}, "weights of format version 2 need another release"),
    ],
)
def test_settings_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        DeepseekR1QuantizationConfig(**settings)


def test_windows_are_spread_over_the_whole_text():
    ids = torch.arange(103)
    assert spread_windows(ids, 10, 4)[:, 0].tolist() == [0, 30, 60, 90]
    assert spread_windows(ids, 10, 10).shape == (10, 10) and spread_windows(ids, 10, 1)[0, 0] == 0
    assert spread_windows(ids, 11, 4, bos_token_id=7)[:, :2].tolist() == [[7, 0], [7, 30], [7, 60], [7, 90]]
    for length, count in ((10, 11), (1, 2), (10, 0)):
        with pytest.raises(ValueError):
            spread_windows(ids, length, count)


def test_weights_that_are_damaged_or_quantized_already(checkpoint, tmp_path):
    model, config = tiny_model("experts"), DeepseekR1QuantizationConfig(8)
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.experts.down_proj has weights that are not finite"):
        quantize_model(model, config)
    quantize_checkpoint(checkpoint, tmp_path / "made", config)
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_checkpoint(tmp_path / "made", tmp_path / "again", config)
    BertConfig(hidden_size=16, num_attention_heads=2, architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert checkpoint; convert it first"):
        quantize_checkpoint(tmp_path / "bert", tmp_path / "again", config)


def test_other_models_are_rounded_too(tmp_path):
    model = BertModel(
        BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64, vocab_size=50)
    )
    ids = random_ids(1, 12, vocab_size=50)
    before = model.eval()(ids).last_hidden_state.detach()
    with pytest.raises(ValueError, match="BertModel cannot read a text here"):
        quantize_model(model, DeepseekR1QuantizationConfig(8), ids)
    quantize_model(model, DeepseekR1QuantizationConfig(8, modules_to_not_convert=["encoder.layer.1"]))
    assert {name.split(".")[2] for name, module in model.named_modules() if isinstance(module, QuantizedLinear)} == {"0"}
    model.save_pretrained(tmp_path)
    after = BertModel.from_pretrained(tmp_path)(ids).last_hidden_state
    assert torch.equal(after, model(ids).last_hidden_state)
    assert 0 < float((after - before).detach().norm() / before.norm()) < 0.05


def test_encoders_of_a_multimodal_model(tmp_path):
    model, batch = multimodal_model(), mixed_batch()
    before = model(**batch).logits
    quantize_model(model, DeepseekR1QuantizationConfig(8), random_ids(2, 20))
    parts = {
        name.split(".")[1] for name, module in model.named_modules() if isinstance(module, QuantizedLinear) and "." in name
    }
    assert {"language_model", "vision_tower", "audio_tower"} <= parts
    model.save_pretrained(tmp_path)
    again = DeepseekR1ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert float((again(**batch).logits - before).norm() / before.norm()) < 0.1
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["bits"] == 8
