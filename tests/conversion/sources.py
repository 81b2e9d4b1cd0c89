"""Tiny random checkpoints of every source family, with every norm and bias away from its initial value."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCAB_SIZE = 101
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
RATIO_1 = {"num_attention_heads": 6, "num_key_value_heads": 6}
RATIO_3 = {"num_attention_heads": 6, "num_key_value_heads": 2}
RATIO_7 = {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}

VARIANTS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "llama": (LlamaConfig, RATIO_3),
    "llama_tied": (LlamaConfig, {"tie_word_embeddings": True, **RATIO_7}),
    "llama_biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, **RATIO_1}),
    "llama_head_dim": (LlamaConfig, {"head_dim": 12, "hidden_act": "gelu", **RATIO_3}),
    "llama_old_linear": (LlamaConfig, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0}),
    "llama_yarn": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "llama_llama3": (LlamaConfig, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}}),
    "qwen2": (Qwen2Config, RATIO_7),
    "qwen2_window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, **RATIO_3}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True, **RATIO_3}),
    "qwen3_window": (
        Qwen3Config,
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 10, **RATIO_3}),
    "mistral_window": (MistralConfig, {"sliding_window": 7, **RATIO_1}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True, **RATIO_3}),
    "smollm3_window": (
        SmolLM3Config,
        {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "router_aux_loss_coef": 0.02, **RATIO_3}),
    "mixtral_window": (
        MixtralConfig,
        {"num_local_experts": 3, "sliding_window": 6, "head_dim": 10, "tie_word_embeddings": True, **RATIO_7},
    ),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            **RATIO_3,
        },
    ),
    "qwen2_moe_window": (
        Qwen2MoeConfig,
        {
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 8,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
            "mlp_only_layers": [3],
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "head_dim": 16, "mlp_only_layers": [0]},
    ),
    "qwen3_moe_window": (
        Qwen3MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 52,
            "norm_topk_prob": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": (OlmoeConfig, {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 0.6, **RATIO_3}),
    "olmoe_biases": (
        OlmoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
            "output_router_logits": True,
        },
    ),
}
"""Name -> the family's configuration class and the fields that differ from `config_of`'s."""


MIXTURES = [name for name in VARIANTS if name.startswith(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"))]


def config_of(variant: str, **fields) -> PreTrainedConfig:
    config_class, differing = VARIANTS[variant]
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return config_class(**{**values, **differing, **fields})


def model_of(variant: str, **fields) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(variant, **fields)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def save(model: PreTrainedModel, folder: Path, **arguments) -> Path:
    model.save_pretrained(folder, **arguments)
    return folder


def edit_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(actual: Path, expected: Path) -> None:
    actual_tensors, expected_tensors = stored_tensors(actual), stored_tensors(expected)
    assert sorted(actual_tensors) == sorted(expected_tensors)
    for name, tensor in expected_tensors.items():
        assert torch.equal(actual_tensors[name], tensor), name


def input_ids(length: int = 40) -> torch.Tensor:
    """`[2, length]`, longer than every window of `VARIANTS`."""
    return torch.randint(4, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(2))


def save_tokenizer(folder: Path, eos: str = "<|im_end|>", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose first tokens are special."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB_SIZE - len(special)]]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token=eos, pad_token="<pad>", chat_template=chat_template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[:3]})
    tokenizer.save_pretrained(folder)
    return tokenizer
