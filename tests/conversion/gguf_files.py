"""Writes tiny GGUF files the way llama.cpp's converter does."""

from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedModel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PERMUTED = ("llama", "mistral", "smollm3")
CONTROL, USER_DEFINED, NORMAL = 3, 4, 1


def gguf_name(name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"
    return f"{NAMES['.'.join(parts[:-1])]}.{parts[-1]}"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """From split halves to interleaved pairs: row i of a head goes to 2i, row i + half to 2i + 1."""
    result = np.empty_like(rows)
    half = rows.shape[0] // heads // 2
    for head in range(heads):
        start = head * 2 * half
        for i in range(half):
            result[start + 2 * i] = rows[start + i]
            result[start + 2 * i + 1] = rows[start + half + i]
    return result


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = tensor.numpy()
        if config.model_type in PERMUTED and "q_proj" in name:
            rows = permuted(rows, config.num_attention_heads)
        elif config.model_type in PERMUTED and "k_proj" in name:
            rows = permuted(rows, config.num_key_value_heads)
        tensors[gguf_name(name)] = rows
    return tensors


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    encoding: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, object] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    vocabulary: bool = True,
    split_max_tensors: int = 0,
) -> Path:
    """Matrices in `encoding`, vectors in float32; `metadata` (None removes a key) wins over what the model says."""
    config = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if config.model_type in PERMUTED:
        values["rope.dimension_count"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "head_dim", None):
        values["attention.key_length"] = config.head_dim
    keys = {f"{architecture}.{key}": value for key, value in values.items()}
    for kind, number in (("bos", config.bos_token_id), ("eos", config.eos_token_id), ("padding", config.pad_token_id)):
        keys[f"tokenizer.ggml.{kind}_token_id"] = number
    if vocabulary:
        keys |= byte_level_vocabulary(config.vocab_size)
    for key, value in (keys | (metadata or {})).items():
        _add(writer, key, value)
    for name, tensor in (tensors_of(model) | (extra or {})).items():
        if tensor.ndim == 1 or encoding == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(tensor), encoding), raw_dtype=encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_vocabulary(size: int) -> dict[str, object]:
    """A GPT-2 style vocabulary with special tokens that lie outside of the byte alphabet, as DeepSeek-R1's do."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<|endoftext|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<pad>", "<｜User｜>", "<think>"]
    tokens = [*special, *sorted(ByteLevel.alphabet())[: size - len(special) - 1], "he"]
    types = [*[CONTROL] * 5, USER_DEFINED, *[NORMAL] * (size - 6)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-r1-qwen",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}<｜User｜>{{ m['content'] }}{% endfor %}",
    }


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
