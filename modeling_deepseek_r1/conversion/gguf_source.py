"""Reading GGUF files: metadata as a family's configuration, tensors dequantised one at a time under their usual names.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here because the reader of the package
`gguf` makes several Python objects per vocabulary entry (half a gigabyte for 150,000 tokens); its tables of block sizes and its
dequantisation are used.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .families import FAMILIES, Family
from .write import TensorInfo

try:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize
except ImportError as error:
    raise ImportError('reading GGUF files needs the package gguf: pip install "modeling-deepseek-r1[gguf]"') from error

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
STORED_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ARCHITECTURE_NAMES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "deepseek2": "deepseek_v3"}
"""llama.cpp's name of an architecture -> transformers' model type, where they differ and the refusal depends on it."""

ROPE_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in which file (`offset` from its start) and how it is encoded."""

    file: Path
    shape: tuple[int, ...]
    encoding: GGMLQuantizationType
    offset: int
    nbytes: int


class GGUFSource:
    """A GGUF file, or the first of several `*-00001-of-0000N.gguf`."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        self.path = path
        self.metadata, stored = read_header(path)
        for part in _parts(path, self.metadata.get("split.count", 1)):
            stored |= read_header(part)[1]
        self._rope_frequencies = stored.pop(ROPE_FREQUENCIES, None)
        self._stored = {_tensor_name(name): tensor for name, tensor in stored.items()}
        self.config = self._read_config()
        family = FAMILIES.get(self.config["model_type"])
        self._permuted = bool(family and family.permuted_in_gguf)
        encodings = {tensor.encoding for tensor in self._stored.values()}
        self.quantized = sorted(encoding.name for encoding in encodings if encoding not in STORED_DTYPES)
        self.tensors = {
            name: TensorInfo(tensor.shape, torch.float32 if self.quantized else STORED_DTYPES[tensor.encoding])
            for name, tensor in self._stored.items()
        }

    def read(self, name: str) -> torch.Tensor:
        values = _dequantized(self._stored[name])
        if self._permuted and ".self_attn.q_proj." in name:
            values = unpermute(values, self.config["num_attention_heads"])
        elif self._permuted and ".self_attn.k_proj." in name:
            values = unpermute(values, self.config["num_key_value_heads"])
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.tensors[name].dtype)

    def _read_config(self) -> dict[str, Any]:
        architecture = self.metadata.get("general.architecture", "unknown")
        model_type = ARCHITECTURE_NAMES.get(architecture, architecture)
        if self._value("expert_count", 0):
            model_type = "mixtral" if model_type == "llama" else model_type
        if model_type == "llama" and self._value("attention.sliding_window"):
            model_type = "mistral"
        config = {"model_type": model_type}
        if model_type not in FAMILIES or FAMILIES[model_type].mixture is not None:
            return config
        embedding = self._stored.get("model.embed_tokens.weight")
        if embedding is None:
            raise ValueError(f"{self.path} has no tensor token_embd.weight")
        config |= {
            "vocab_size": embedding.shape[0],
            "hidden_size": self._count("embedding_length"),
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": self._count("attention.head_count"),
            "num_key_value_heads": self._count("attention.head_count_kv", self._count("attention.head_count")),
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": _short_float(self._value("attention.layer_norm_rms_epsilon", 1e-6)),
            "tie_word_embeddings": "lm_head.weight" not in self._stored,
        }
        config["head_dim"] = self._count("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
        for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            config[f"{kind}_token_id"] = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        config["rope_parameters"] = self._rope_parameters(config)
        return config | self._family_fields(FAMILIES[model_type])

    def _family_fields(self, family: Family) -> dict[str, Any]:
        fields = {}
        if "attention_bias" in family.read:
            fields["attention_bias"] = "model.layers.0.self_attn.o_proj.bias" in self._stored
        if "mlp_bias" in family.read:
            fields["mlp_bias"] = "model.layers.0.mlp.down_proj.bias" in self._stored
        window = self._value("attention.sliding_window")
        if family.window == "uniform" or window:
            fields["sliding_window"] = window
        return fields

    def _rope_parameters(self, config: dict[str, Any]) -> dict[str, Any]:
        rotated = self._value("rope.dimension_count", config["head_dim"])
        if rotated != config["head_dim"]:
            raise ValueError(
                f"{self.path} rotates {rotated} of {config['head_dim']} dimensions per head, which is not supported"
            )
        rope = {"rope_type": "default", "rope_theta": _short_float(self._value("rope.freq_base", 10000.0))}
        kind = self._value("rope.scaling.type", "none")
        factor = self._value("rope.scaling.factor") or self._value("rope.scale_linear") or 1.0
        original = self._value("rope.scaling.original_context_length")
        if self._rope_frequencies is not None:
            divisors = _dequantized(self._rope_frequencies).astype(np.float64)
            rope |= llama3_parameters(divisors, rope["rope_theta"], config["head_dim"], str(self.path))
        elif kind == "yarn":
            rope |= {"rope_type": "yarn", "factor": _short_float(factor)}
            rope |= {"original_max_position_embeddings": original} if original else {}
        elif kind == "linear" or (kind == "none" and factor != 1.0):
            rope |= {"rope_type": "linear", "factor": _short_float(factor)}
        elif kind != "none":
            raise ValueError(f"{self.path}: rotary scaling {kind!r} in a GGUF file is not supported; use linear, yarn or none")
        return rope

    def _value(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}", default)

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ValueError(f"{self.path}: {key} differs between layers ({value[:8]}...), which is not supported")
            value = value[0]
        if not isinstance(value, int):
            raise ValueError(f"{self.path} has no {self.metadata.get('general.architecture')}.{key} in its metadata")
        return value


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection from interleaved (dimensions 2i, 2i + 1 rotate together) to split halves.

    `values`: [heads * head_dim, ...]
    """
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def llama3_parameters(divisors: np.ndarray, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """The parameters of Llama 3's rotary scaling whose frequency divisors a GGUF file stores as a tensor.

    The original context, 8192 tokens, and the two wavelength limits are the same in all Llama 3 releases; the factor is not.

    Raises:
        ValueError: no such parameters give these divisors.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = round(float(divisors.max()), 4)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelengths - low) / (high - low)
    expected = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, expected))
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"{where}: {ROPE_FREQUENCIES} is not Llama 3's rotary scaling; convert the original safetensors checkpoint"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensor table of one file.

    Raises:
        ValueError: not a GGUF file of version 2 or 3, or cut off.
    """
    with open(path, "rb") as file:
        magic = file.read(8)
        if magic[:4] != b"GGUF" or struct.unpack("<I", magic[4:].ljust(4, b"\0"))[0] not in (2, 3):
            raise ValueError(f"{path} is not a (little-endian, version 2 or 3) GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _Header(data)
                metadata = header.metadata()
                tensors = header.tensors(path, metadata.get("general.alignment", 32))
            except (struct.error, IndexError) as error:
                raise ValueError(f"{path} is incomplete: its header is cut off; fetch it again") from error
            cut = [name for name, tensor in tensors.items() if tensor.offset + tensor.nbytes > len(data)]
    if cut:
        raise ValueError(
            f"{path} is incomplete: {len(cut)} of {len(tensors)} tensors lie beyond its end ({cut[0]}, ...); fetch it again"
        )
    return metadata, tensors


class _Header:
    """A cursor over the header."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 8
        self.tensor_count, self.metadata_count = self._unpack("QQ")

    def metadata(self) -> dict[str, Any]:
        return {self._string(): self._value(self._unpack("I")[0]) for _ in range(self.metadata_count)}

    def tensors(self, path: Path, alignment: int) -> dict[str, StoredTensor]:
        entries = []
        for _ in range(self.tensor_count):
            name, dimensions = self._string(), self._unpack("I")[0]
            shape = tuple(reversed(self._unpack(f"{dimensions}Q")))
            encoding, offset = self._unpack("IQ")
            entries.append((name, shape, _encoding(encoding, path), offset))
        start = -(-self.position // alignment) * alignment
        return {
            name: StoredTensor(path, shape, encoding, start + offset, _stored_bytes(shape, encoding))
            for name, shape, encoding, offset in entries
        }

    def _unpack(self, layout: str) -> tuple:
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        if self.position + length > len(self.data):
            raise IndexError
        self.position += length
        return self.data[self.position - length : self.position].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            element, count = self._unpack("IQ")
            return (
                list(self._unpack(f"{count}{SCALARS[element]}"))
                if element in SCALARS
                else [self._value(element) for _ in range(count)]
            )
        if kind not in SCALARS:
            raise IndexError
        return self._unpack(SCALARS[kind])[0]


def _parts(path: Path, count: int) -> list[Path]:
    if count <= 1:
        return []
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})", path.stem)
    if not match:
        raise ValueError(f"{path} is one of {count} files; give the first one, whose name ends in -00001-of-{count:05d}.gguf")
    parts = [path.with_name(f"{match[1]}-{number:05d}-of-{match[2]}.gguf") for number in range(2, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise FileNotFoundError(f"{path} is one of {count} files; missing beside it: {', '.join(missing)}")
    return parts


def _encoding(number: int, path: Path) -> GGMLQuantizationType:
    try:
        return GGMLQuantizationType(number)
    except ValueError as error:
        raise ValueError(f"{path}: tensor type {number} is unknown to this version of the package gguf") from error


def _stored_bytes(shape: tuple[int, ...], encoding: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[encoding]
    return prod(shape) // block * size


def _dequantized(tensor: StoredTensor) -> np.ndarray:
    raw = np.memmap(tensor.file, mode="r", dtype=np.uint8, offset=tensor.offset, shape=(tensor.nbytes,))
    if tensor.encoding == GGMLQuantizationType.F32:
        return np.array(raw).view(np.float32).reshape(tensor.shape)
    if tensor.encoding == GGMLQuantizationType.F16:
        return np.array(raw).view(np.float16).reshape(tensor.shape)
    rows = tensor.shape[:-1] or (1,)
    try:
        return dequantize(raw.reshape(*rows, -1), tensor.encoding).reshape(tensor.shape)
    except NotImplementedError as error:
        raise ValueError(f"{tensor.file}: the package gguf cannot dequantise {tensor.encoding.name} tensors") from error


def _tensor_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in NAMES:
        return name
    return f"model.layers.{match[1]}.{NAMES[match[2]]}.{match[3]}" if match[1] else f"{NAMES[match[2]]}.{match[3]}"


def _short_float(value: float) -> float:
    # 9.999999747378752e-06, a float32, is the 1e-05 of the original configuration.
    return float(str(np.float32(value)))
