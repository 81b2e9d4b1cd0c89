"""GGUF files: names, permutation, dequantisation, rotary scaling, tokenizer."""

import json
import math
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling_deepseek_r1.configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from modeling_deepseek_r1.conversion import convert_checkpoint, to_dense

from .gguf_files import permuted, write_gguf
from .sources import config_of, input_ids, model_of

F16, Q8_0, BF16 = (gguf.GGMLQuantizationType[name] for name in ("F16", "Q8_0", "BF16"))
UNQUANTISED = ["llama", "llama_tied", "llama_biases", "llama_head_dim", "mistral", "qwen2", "qwen3", "smollm3"]


def wide(variant, **fields):
    """A model whose rows are whole blocks of 32."""
    return model_of(variant, hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2, **fields)


@pytest.mark.parametrize("variant", UNQUANTISED)
def test_float32_file_gives_the_model_that_was_written(variant, tmp_path):
    # What a GGUF file cannot say: another activation, and other layers without rotary embedding than every fourth.
    told = {"llama_head_dim": {"hidden_act": "silu"}, "smollm3": {"no_rope_layers": None, "num_hidden_layers": 4}}
    model = model_of(variant, **told.get(variant, {}))
    report = convert_checkpoint(write_gguf(tmp_path / "a.gguf", model), tmp_path / "converted")
    assert report.exact and report.tensors_cast == 0
    to_dense(tmp_path / "converted", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        assert torch.equal(dense(input_ids()).logits, model(input_ids()).logits)


@pytest.mark.parametrize(("encoding", "dtype"), [(F16, torch.float16), (BF16, torch.bfloat16), (Q8_0, torch.float32)])
def test_encodings(encoding, dtype, tmp_path):
    model = wide("llama")
    report = convert_checkpoint(write_gguf(tmp_path / "a.gguf", model, encoding), tmp_path / "converted")
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert any("is quantised (Q8_0)" in line for line in report.warnings) == (encoding is Q8_0)
    stored = load_file(tmp_path / "converted" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            assert stored[name].dtype is torch.float32 and torch.equal(stored[name], tensor)
        else:
            assert stored[name].dtype is dtype
            blocks = gguf.quants.quantize(tensor.numpy(), encoding)
            # Blocks lie within a row, so permuting rows and quantising commute.
            assert torch.equal(stored[name].float(), torch.from_numpy(gguf.quants.dequantize(blocks, encoding)))


def test_agrees_with_the_reader_of_transformers(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", wide("llama"), Q8_0)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    convert_checkpoint(tmp_path, tmp_path / "converted", gguf_file=path.name)
    stored = load_file(tmp_path / "converted" / "model.safetensors")
    assert sorted(stored) == sorted(expected) and all(torch.equal(stored[name], expected[name]) for name in stored)


def test_configuration_of_a_file(tmp_path):
    metadata = {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0}
    metadata["qwen3.rope.scaling.original_context_length"] = 32
    convert_checkpoint(write_gguf(tmp_path / "a.gguf", model_of("qwen3"), metadata=metadata), tmp_path / "converted")
    config = DeepseekR1TextConfig.from_pretrained(tmp_path / "converted")
    assert (config.rms_norm_eps, config.head_dim, config.qk_norm, config.tie_word_embeddings) == (1e-5, 16, "head", True)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.vocab_size) == (1, 2, 3, 101)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    assert config.rope_parameters == yarn


def test_window_of_a_mistral_file(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", model_of("mistral_window"), metadata={"llama.attention.sliding_window": 7})
    report = convert_checkpoint(path, tmp_path / "converted")
    assert (report.source_family, report.pattern) == ("mistral", "3 x sliding_attention (7 tokens)")


def llama3_divisors(head_dim=64, factor=32.0):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = config_of("llama", head_dim=head_dim, rope_parameters=rope | {"original_max_position_embeddings": 8192})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")
    plain = 1.0 / (5e5 ** (torch.arange(0, head_dim, 2).float() / head_dim))
    return (plain / frequencies).numpy(), scaled.rope_parameters


def test_rotary_scaling_of_llama3(tmp_path):
    divisors, expected = llama3_divisors()
    model = model_of("llama", head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    path = write_gguf(tmp_path / "a.gguf", model, extra={"rope_freqs.weight": divisors})
    convert_checkpoint(path, tmp_path / "converted")
    rope = DeepseekR1TextConfig.from_pretrained(tmp_path / "converted").rope_parameters
    assert rope == expected and math.isclose(rope["factor"], 32.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"extra": {"rope_freqs.weight": np.linspace(1, 9, 4, dtype=np.float32)}}, "not Llama 3's rotary scaling"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "rotary scaling 'longrope'"),
        ({"metadata": {"llama.rope.dimension_count": 4}}, "rotates 4 of 8 dimensions"),
        ({"metadata": {"llama.expert_count": 8}}, "'mixtral': mixture-of-experts"),
        ({"metadata": {"llama.feed_forward_length": [40, 40, 48]}}, "feed_forward_length differs between layers"),
        ({"metadata": {"llama.block_count": None}}, "has no llama.block_count"),
        ({"metadata": {"llama.block_count": 4}}, "missing: model.layers.3"),
        ({"metadata": {"general.architecture": "gemma3"}}, "'gemma3' .* is not supported"),
        ({"metadata": {"general.architecture": "deepseek2"}}, "latent attention"),
        ({"extra": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "not part of the model: blk.0.attn_sinks.weight"),
        ({"metadata": {"split.count": 2}}, "one of 2 files; give the first one"),
    ],
)
def test_files_that_cannot_be_converted(arguments, words, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", model_of("llama"), **arguments)
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(path, tmp_path / "converted")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("length", [0, 3, 20, 2000, -1])
def test_truncated_file(length, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", model_of("llama"))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="a.gguf is (incomplete|not a .* GGUF file)"):
        convert_checkpoint(path, tmp_path / "converted")


def test_choice_of_the_file(tmp_path):
    write_gguf(tmp_path / "a.gguf", model_of("llama"))
    assert convert_checkpoint(tmp_path, tmp_path / "x", dry_run=True).source_family == "llama"
    write_gguf(tmp_path / "b.gguf", model_of("qwen2"))
    with pytest.raises(ValueError, match="choose one with gguf_file: a.gguf, b.gguf"):
        convert_checkpoint(tmp_path, tmp_path / "x")
    assert convert_checkpoint(tmp_path, tmp_path / "x", gguf_file="b.gguf", dry_run=True).source_family == "qwen2"
    with pytest.raises(FileNotFoundError, match="c.gguf does not exist"):
        convert_checkpoint(tmp_path, tmp_path / "x", gguf_file="c.gguf")


def test_file_in_several_parts(tmp_path):
    model = model_of("llama")
    convert_checkpoint(write_gguf(tmp_path / "whole.gguf", model), tmp_path / "expected")
    write_gguf(tmp_path / "part.gguf", model, split_max_tensors=12)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert [part.name for part in parts] == [f"part-0000{k}-of-00003.gguf" for k in (1, 2, 3)]
    convert_checkpoint(parts[0], tmp_path / "converted")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    parts[2].unlink()
    with pytest.raises(FileNotFoundError, match="missing beside it: part-00003-of-00003.gguf"):
        convert_checkpoint(parts[0], tmp_path / "again")
    with pytest.raises(ValueError, match="one of 3 files; give the first one, whose name ends in -00001-of-00003.gguf"):
        convert_checkpoint(parts[1], tmp_path / "again")


def test_tokenizer_keeps_the_ids_of_the_file(tmp_path):
    model = model_of("llama")
    report = convert_checkpoint(write_gguf(tmp_path / "a.gguf", model), tmp_path / "converted")
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(report.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert len(tokenizer) == 101 and tokenizer.model_max_length == 128
    ids = tokenizer("he<｜User｜><think>!").input_ids
    vocab = tokenizer.get_vocab()
    assert ids == [1, 100, 4, 5, vocab["!"]]
    assert tokenizer.decode(ids) == "<｜begin▁of▁sentence｜>he<｜User｜><think>!"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he<think>!"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert chat == "<｜User｜>he"
    settings = json.loads((tmp_path / "converted" / "generation_config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (1, 2, 3)


def test_end_of_turn_stops_generation_too(tmp_path):
    metadata = {"tokenizer.ggml.eot_token_id": 0}
    convert_checkpoint(write_gguf(tmp_path / "a.gguf", model_of("llama"), metadata=metadata), tmp_path / "converted")
    assert json.loads((tmp_path / "converted" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_file_without_vocabulary(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", model_of("llama"), vocabulary=False)
    report = convert_checkpoint(path, tmp_path / "converted")
    assert report.tokenizer == [] and any("the file holds no vocabulary" in line for line in report.warnings)


def test_permutation_of_the_fixture_is_llama_cpps():
    rows = np.arange(16).reshape(16, 1)
    halves = rows.reshape(2, 2, 4, 1).swapaxes(1, 2).reshape(16, 1)
    assert (permuted(rows, heads=2) == halves).all()


def test_missing_package_names_the_extra(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", model_of("llama"))
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from modeling_deepseek_r1.conversion import convert_checkpoint\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "converted"], capture_output=True, text=True, env=os.environ
    )
    assert result.stderr.splitlines()[-1] == (
        'ImportError: reading GGUF files needs the package gguf: pip install "modeling-deepseek-r1[gguf]"'
    )
