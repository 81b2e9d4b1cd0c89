"""What can be read, and what is refused before anything is written."""

import json
import struct

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.conversion.source import open_source

from .sources import assert_same_tensors, edit_config, model_of, save, save_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def source(tmp_path):
    return save(model_of("llama"), tmp_path / "source")


def refuse(source, destination, error, words):
    with pytest.raises(error, match=words):
        convert_checkpoint(source, destination)
    assert not destination.exists()
    assert not list(destination.parent.glob(f".{destination.name}*"))


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_sharded_source_and_sharded_result(tmp_path):
    source = save(model_of("qwen2"), tmp_path / "source", max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    convert_checkpoint(source, tmp_path / "converted", max_shard_size="25KB")
    assert_same_tensors(tmp_path / "converted", source)
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "converted" / file)
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes
        for file in set(index["weight_map"].values())
        for tensor in load_file(tmp_path / "converted" / file).values()
    )
    assert len(set(index["weight_map"].values())) > 3


def test_single_file_of_another_name(source, tmp_path):
    (source / WEIGHTS).rename(source / "weights.safetensors")
    convert_checkpoint(source, tmp_path / "converted")
    assert_same_tensors(tmp_path / "converted", source)


def test_hub_id_from_the_local_cache(source, tmp_path, monkeypatch):
    save_tokenizer(source)
    (source / "pytorch_model.bin").write_bytes(b"never read")
    repository = tmp_path / "cache" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    (repository / "snapshots").mkdir()
    source.rename(repository / "snapshots" / "0123abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    report = convert_checkpoint("someone/tiny", tmp_path / "converted")
    assert report.exact and (tmp_path / "converted" / "tokenizer.json").is_file()
    assert_same_tensors(tmp_path / "converted", repository / "snapshots" / "0123abc")


@pytest.mark.parametrize("missing", ["someone/absent", "./no/such/folder", "/no/such/folder"])
def test_missing_source(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refuse(missing, tmp_path / "converted", FileNotFoundError, missing)


def test_pickles_are_refused(source, tmp_path):
    (source / WEIGHTS).unlink()
    torch.save({}, source / "pytorch_model.bin")
    for given in (source, source / "pytorch_model.bin"):
        refuse(given, tmp_path / "converted", ValueError, "pytorch_model.bin.*save_pretrained.*safetensors")


def test_folder_without_weights_or_configuration(source, tmp_path):
    (source / WEIGHTS).unlink()
    refuse(source, tmp_path / "converted", FileNotFoundError, "holds no model.safetensors")
    (source / "config.json").unlink()
    refuse(source, tmp_path / "converted", FileNotFoundError, "holds no config.json")
    (source / "adapter_config.json").write_text("{}")
    refuse(source, tmp_path / "converted", ValueError, "PEFT adapter; merge it")


def test_configuration_that_is_no_json(source, tmp_path):
    (source / "config.json").write_text("{")
    refuse(source, tmp_path / "converted", ValueError, "config.json is not valid JSON")
    (source / "config.json").write_text("[]")
    refuse(source, tmp_path / "converted", ValueError, "config.json must hold a JSON object")


def test_quantised_source_is_refused(source, tmp_path):
    edit_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(source, tmp_path / "converted", ValueError, "is quantised \\(gptq\\)")


def test_integer_weights_are_refused(source, tmp_path):
    rewrite(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    refuse(source, tmp_path / "converted", ValueError, r"model.norm.weight \(I8\)")


@pytest.mark.parametrize("length", [4, 100, -8])
def test_truncated_weights_name_the_file(source, tmp_path, length):
    content = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(content[:length])
    refuse(source, tmp_path / "converted", ValueError, "model.safetensors is damaged or incomplete")


def test_header_that_lies_about_its_length(source, tmp_path):
    (source / WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + b"{}")
    refuse(source, tmp_path / "converted", ValueError, "model.safetensors is damaged or incomplete")


def test_index_with_a_missing_file_or_tensor(tmp_path):
    source = save(model_of("llama"), tmp_path / "source", max_shard_size="30KB")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    weight_map = content["weight_map"]
    first, last = sorted(set(weight_map.values()))[0], sorted(set(weight_map.values()))[-1]
    name = next(name for name, file in weight_map.items() if file == last)
    index.write_text(json.dumps(content | {"weight_map": weight_map | {name: first}}))
    refuse(source, tmp_path / "converted", ValueError, f"not in their files: {name} \\({first}\\)")
    index.write_text(json.dumps(content | {"weight_map": weight_map | {name: "../secret.safetensors"}}))
    refuse(source, tmp_path / "converted", ValueError, "'../secret.safetensors', which is not a file of its folder")
    index.write_text(json.dumps(content))
    (source / last).unlink()
    refuse(source, tmp_path / "converted", FileNotFoundError, f"{last} is missing")


def test_all_wrong_tensors_are_in_one_message(source, tmp_path):
    def change(tensors):
        for layer in range(2):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        tensors["model.layers.1.extra.weight"] = torch.ones(2)
        tensors["model.norm.weight"] = torch.ones(47)

    rewrite(source, change)
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(source, tmp_path / "converted")
    message = str(caught.value)
    assert "missing: model.layers.{0,1}.mlp.up_proj.weight" in message
    assert "not part of the model: model.layers.1.extra.weight" in message
    assert "model.norm.weight has shape [47] instead of [48]" in message
    assert not (tmp_path / "converted").exists()


def test_other_heads_are_named(source, tmp_path):
    edit_config(source, architectures=["LlamaForSequenceClassification"])
    rewrite(source, lambda tensors: tensors.pop("lm_head.weight"))
    refuse(source, tmp_path / "converted", ValueError, "it is a LlamaForSequenceClassification.*missing: lm_head.weight")


def test_harmless_surplus_is_skipped_and_reported(tmp_path):
    source = save(model_of("llama_tied"), tmp_path / "source")
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[inv_freq] = torch.ones(4)

    rewrite(source, change)
    report = convert_checkpoint(source, tmp_path / "converted")
    assert report.tensors_skipped == [
        f"{inv_freq}: recomputed from the configuration",
        "lm_head.weight: tied to the embeddings",
    ]
    assert not {"lm_head.weight", inv_freq} & set(load_file(tmp_path / "converted" / WEIGHTS))


def test_tied_head_with_other_values_is_an_error(tmp_path):
    source = save(model_of("llama_tied"), tmp_path / "source")
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    refuse(source, tmp_path / "converted", ValueError, "lm_head.weight differs from model.embed_tokens.weight")


def test_values_that_are_not_finite_are_reported(source, tmp_path):
    rewrite(source, lambda tensors: tensors["model.norm.weight"].__setitem__(3, float("nan")))
    report = convert_checkpoint(source, tmp_path / "converted")
    assert report.warnings[-1] == "model.norm.weight holds values that are not finite"


def test_dtype_is_changed_and_reported(source, tmp_path):
    report = convert_checkpoint(source, tmp_path / "half", dtype="bfloat16")
    assert not report.exact and report.tensors_cast == report.tensors_matched and report.dtype == "bfloat16"
    assert "casting to bfloat16 rounds the weights" in report.warnings
    stored, original = load_file(tmp_path / "half" / WEIGHTS), load_file(source / WEIGHTS)
    assert all(torch.equal(stored[name], original[name].bfloat16()) for name in original)
    widened = convert_checkpoint(tmp_path / "half", tmp_path / "wide", dtype=torch.float32)
    assert widened.exact and json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(ValueError, match="dtype='int8' must be one of float32, bfloat16, float16"):
        convert_checkpoint(source, tmp_path / "converted", dtype="int8")


def test_overflow_of_a_cast_is_reported(source, tmp_path):
    rewrite(source, lambda tensors: tensors["model.norm.weight"].__setitem__(0, 1e6))
    report = convert_checkpoint(source, tmp_path / "converted", dtype="float16")
    assert "model.norm.weight holds values that are not finite" in report.warnings


def test_mixed_dtypes_are_kept_as_stored(source, tmp_path):
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].half()}))
    assert convert_checkpoint(source, tmp_path / "converted").exact
    assert_same_tensors(tmp_path / "converted", source)


def test_reading_is_lazy(source):
    opened = open_source(source)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(source / WEIGHTS).items()}
    assert {name: info.shape for name, info in opened.tensors.items()} == shapes
    assert opened.read("model.norm.weight").shape == (48,)
