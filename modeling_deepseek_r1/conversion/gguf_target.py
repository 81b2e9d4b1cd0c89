"""A checkpoint of this library as a GGUF file of the family that expresses it exactly, for llama.cpp and what is built on it.

The inverse of `gguf_source.py`, in llama.cpp's own layout: names, interleaved query and key rows where its code for a family wants
them, vectors in float32. The tokenizer goes along as tokens, merges and the name of llama.cpp's rule that splits text.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from .convert import as_dtype, weights_dtype
from .families import TARGET_MODEL_TYPE, Family
from .gguf_source import NAMES, ROPE_FREQUENCIES, STORED_DTYPES
from .plan import plan_tensors
from .source import open_source
from .target import read_source_config
from .to_dense import choose_family, with_full_attention
from .tokenizer_files import CONTROL, USER_DEFINED

try:
    import gguf
except ImportError as error:
    raise ImportError('writing GGUF files needs the package gguf: pip install "modeling-deepseek-r1[gguf]"') from error

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
"""Family -> llama.cpp's name of its architecture. Mistral without a window is Llama."""

ENCODINGS = {dtype: encoding for encoding, dtype in STORED_DTYPES.items()}
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
NORMAL, UNUSED = 1, 5
YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe"}
"""Pattern of a `Split` before byte-level BPE -> llama.cpp's name for it."""


@dataclass
class GGUFReport:
    """What was written.

    Attributes:
        path: the file.
        architecture: as llama.cpp calls it.
        dtype: of the matrices.
        tensors, bytes: how many, and how large the file is.
        exact: the file is the same function as the checkpoint, apart from rounding to `dtype`.
        warnings: what is not.
    """

    path: Path
    architecture: str
    dtype: str
    tensors: int
    bytes: int = 0
    exact: bool = True
    warnings: list[str] = field(default_factory=list)


class Entry(NamedTuple):
    """A tensor of the file: `make(dtype)` reads it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[torch.dtype], torch.Tensor]


def to_gguf(
    folder: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    allow_pattern_change: bool = False,
    split: str | None = None,
    overwrite: bool = False,
) -> GGUFReport:
    """Writes a `deepseek_r1_text` checkpoint as one GGUF file, which appears when it is complete.

    Args:
        folder: folder or hub id of the checkpoint.
        destination: the file.
        dtype: of the matrices: "float32", "float16" or "bfloat16"; default: as stored.
        allow_pattern_change: write windowed, routed and local_global layers with full attention. That is another function.
        split: llama.cpp's name of the rule that splits text before BPE (`tokenizer.ggml.pre`), where it is not recognised.
        overwrite: replace a file that is there.

    Raises:
        ValueError: llama.cpp has nothing that computes the same; the message says what stands in the way. Or a tokenizer that is
            not byte-level BPE, or values that the dtype cannot hold.
        OSError: a missing checkpoint, an existing or unwritable destination.
    """
    destination = Path(destination).expanduser().resolve()
    if destination.exists() and not overwrite:
        raise FileExistsError(f"{destination} exists already; overwrite replaces it")
    origin = open_source(folder)
    if origin.config.get("model_type") != TARGET_MODEL_TYPE:
        raise ValueError(f"{folder} has model_type {origin.config.get('model_type')!r}; to_gguf takes {TARGET_MODEL_TYPE!r}")
    config = read_source_config(origin)
    windows = sorted(set(config.layer_types) - {"full_attention"})
    if windows and not allow_pattern_change:
        raise ValueError(
            f"{folder} has layers of {', '.join(windows)}, and llama.cpp reads all tokens in every layer of these families."
            " allow_pattern_change writes the same weights with full attention, which is another function; serve it as it is instead"
        )
    dense = with_full_attention(config) if windows else config
    family, _ = choose_family(dense, False)
    rope = _rope_metadata(dense)
    _check(family, dense)
    matrices = weights_dtype(origin, config, dtype)
    plan = plan_tensors(origin, config, as_dtype(dtype))
    report = GGUFReport(destination, ARCHITECTURES[family.model_type], str(matrices).removeprefix("torch."), len(plan.tensors))
    if windows:
        report.exact = False
        report.warnings.append("the attention pattern was dropped: with full attention in all layers it is another function")

    permuted = dense if family.permuted_in_gguf else None
    entries = [
        Entry(
            gguf_name(name),
            info.shape,
            matrices if len(info.shape) > 1 else torch.float32,
            lambda dtype, name=name: _as_stored(origin.read(name), name, dtype, permuted),
        )
        for name, info in plan.tensors.items()
    ]
    if (frequencies := rope.frequencies) is not None:
        entries.append(Entry(ROPE_FREQUENCIES, tuple(frequencies.shape), torch.float32, lambda dtype: frequencies))
    own = {f"{report.architecture}.{key}": value for key, value in (_model_metadata(dense) | rope.metadata).items()}
    metadata = {"general.name": Path(folder).name, "general.file_type": FILE_TYPES[matrices]} | own
    metadata |= _tokenizer_metadata(origin.path, dense, split)
    handle, temporary = tempfile.mkstemp(dir=destination.parent, prefix=destination.name, suffix=".partial")
    os.close(handle)
    try:
        _write(temporary, report.architecture, metadata, entries)
        os.chmod(temporary, 0o644)
        os.replace(temporary, destination)
    except BaseException:
        os.unlink(temporary)
        raise
    report.bytes = destination.stat().st_size
    return report


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    short = {theirs: own for own, theirs in NAMES.items()}
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{short[module]}.{kind}"
    number, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{short[rest]}.{kind}"


def permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection `[heads * head_dim, ...]` from split halves to interleaved pairs."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _as_stored(tensor: torch.Tensor, name: str, dtype: torch.dtype, permuted: DeepseekR1TextConfig | None) -> torch.Tensor:
    if permuted is not None and ".q_proj." in name:
        tensor = permute(tensor, permuted.num_attention_heads)
    elif permuted is not None and ".k_proj." in name:
        tensor = permute(tensor, permuted.num_key_value_heads)
    stored = tensor.to(dtype).contiguous()
    if not bool(stored.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite in {stored.dtype}; choose another dtype")
    return stored


def _write(path: str, architecture: str, metadata: dict[str, Any], entries: list[Entry]) -> None:
    """One tensor at a time is in memory."""
    writer = gguf.GGUFWriter(path, architecture)
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        kinds.get(type(value), writer.add_array)(key, value)
    for entry in entries:
        size = prod(entry.shape) * entry.dtype.itemsize
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=ENCODINGS[entry.dtype])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.make(entry.dtype).view(torch.uint8).numpy())
    finally:
        writer.close()


def _check(family: Family, config: DeepseekR1TextConfig) -> None:
    """ValueError where llama.cpp's code for the family does something else."""
    if family.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"models of the family {family.model_type} are not written as GGUF here; {known} are. Try to_dense")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act!r}: llama.cpp computes silu in models of this family")
    without = [number for number, rotary in enumerate(config.no_rope_layers or ()) if not rotary]
    if family.model_type == "smollm3" and without != list(range(3, config.num_hidden_layers, 4)):
        raise ValueError(f"no rotary embedding in layers {without}: llama.cpp leaves it out in every fourth layer of SmolLM3")


@dataclass
class _Rope:
    metadata: dict[str, Any]
    frequencies: torch.Tensor | None = None


def _rope_metadata(config: DeepseekR1TextConfig) -> _Rope:
    rope = {key: value for key, value in config.rope_parameters.items() if value is not None}
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2).double() / config.head_dim)
        return _Rope({}, (plain / scaled.double()).float())
    if kind == "linear":
        return _Rope({"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])})
    if kind == "yarn" and not set(rope) - YARN:
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        keys = {"type": "yarn", "factor": float(rope["factor"]), "original_context_length": int(original)}
        return _Rope({f"rope.scaling.{key}": value for key, value in keys.items()})
    if kind != "default":
        raise ValueError(f"rope_parameters {rope} are not written as GGUF; default, linear, llama3 and plain yarn are")
    return _Rope({})


def _model_metadata(config: DeepseekR1TextConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": config.head_dim,
    }


def _tokenizer_metadata(folder: Path, config: DeepseekR1TextConfig, split: str | None) -> dict[str, Any]:
    """ValueError where the tokenizer is not byte-level BPE, or does not fit the embeddings."""
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json, which a GGUF file has to hold")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    if document["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(document["pre_tokenizer"]):
        raise ValueError(f"the tokenizer in {folder} is not byte-level BPE, the only kind that is written as GGUF here")
    tokens = [f"[PAD{number}]" for number in range(config.vocab_size)]
    types = [UNUSED] * len(tokens)
    entries = [(token, number, NORMAL) for token, number in document["model"]["vocab"].items()]
    entries += [(t["content"], t["id"], CONTROL if t["special"] else USER_DEFINED) for t in document["added_tokens"]]
    for token, number, kind in entries:
        if number >= len(tokens):
            raise ValueError(f"token {number} ({token!r}) is beyond the {len(tokens)} rows of the embeddings")
        tokens[number], types[number] = token, kind
    first = tokenizer("a").input_ids[0]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split or _split_of(document["pre_tokenizer"]),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": first == tokenizer.bos_token_id,
    }
    ends = GenerationConfig.from_pretrained(folder).eos_token_id if (folder / "generation_config.json").is_file() else None
    ends = ends if isinstance(ends, list) else [ends]
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id}
    special |= {"padding": tokenizer.pad_token_id, "eot": next((end for end in ends if end != tokenizer.eos_token_id), None)}
    metadata |= {f"tokenizer.ggml.{name}_token_id": number for name, number in special.items() if number is not None}
    return metadata | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})


def _split_of(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that splits text. ValueError where it is none of those known here."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    pattern = parts[0].get("pattern", {}).get("Regex")
    if kinds == ["Split", "ByteLevel"] and pattern in SPLITS and not parts[1]["use_regex"]:
        return SPLITS[pattern]
    raise ValueError(f"the tokenizer splits text by {' + '.join(kinds)} in a way not known here; give llama.cpp's name (split)")
