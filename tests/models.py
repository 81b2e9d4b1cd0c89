"""Tiny random models of this architecture, with every norm and bias away from its initial value."""

import torch

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1TextConfig

PATTERNS = {
    "full": {"layer_types": "F"},
    "sliding": {"layer_types": "S", "sliding_window": 7},
    "sinks": {"layer_types": "S", "sliding_window": 7, "sparse_attention": {"num_sink_tokens": 3}},
    "mixed": {"layer_types": "SF", "sliding_window": 7, "sparse_attention": {"num_sink_tokens": 3}},
    "routed": {
        "layer_types": "R",
        "sliding_window": 5,
        "sparse_attention": {"num_sink_tokens": 2, "num_clusters": 4, "routed_clusters": 2, "routed_tokens": 3},
    },
    "routed_mixed": {
        "layer_types": "SRF",
        "sliding_window": 7,
        "sparse_attention": {"num_clusters": 6, "routed_clusters": 1, "routed_tokens": 100},
        "qk_norm": "head",
    },
    "global": {
        "layer_types": "G",
        "sliding_window": 5,
        "sparse_attention": {"num_sink_tokens": 2, "global_stride": 4, "num_memory_tokens": 3},
    },
    "global_mixed": {
        "layer_types": "GSR",
        "sliding_window": 7,
        "sparse_attention": {"num_sink_tokens": 5, "global_stride": 3, "num_clusters": 4, "routed_tokens": 3},
        "per_layer_config": {1: {"sparse_attention": None}},
        "qk_norm": "head",
    },
    "per_layer": {
        "layer_types": "SFS",
        "sliding_window": 5,
        "sparse_attention": {"num_sink_tokens": 2},
        "qk_norm": "head",
        "no_rope_layers": [1, 0, 1],
        "per_layer_config": {
            0: {"sliding_window": 9, "attention_bias": True},
            1: {"head_dim": 16, "num_key_value_heads": 1},
            2: {"sparse_attention": None},
        },
    },
    "experts": {
        "layer_types": "SF",
        "sliding_window": 7,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "num_experts": 5,
        "moe_intermediate_size": 24,
    },
    "expert_domains": {
        "layer_types": "F",
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "routing": {
            "expert_topology": [{"text": 3, "code": 2}, {"fusion": 6}],
            "router_scoring": "attention",
            "min_experts_per_tok": 1,
            "expert_activation_threshold": 0.2,
            "router_z_loss_ratio": 0.01,
            "expert_cost_ratio": 0.02,
            "domain_weights": {"text": 2.0},
            "num_modalities": 2,
        },
    },
    "shared_expert": {
        "layer_types": "RF",
        "sliding_window": 6,
        "sparse_attention": {"num_clusters": 4, "routed_clusters": 2, "routed_tokens": 3},
        "qk_norm": "projection",
        "clip_qkv": 0.7,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 20,
        "norm_topk_prob": False,
        "routing": {"bias_balancing": True},
    },
    "low_rank_experts": {
        "layer_types": "S",
        "sliding_window": 7,
        "num_experts": 4,
        "routing": {"expert_rank": 2},
        "mlp_bias": True,
    },
}
"""Name -> configuration fields, over three layers."""

EXPERT_PATTERNS = [name for name, fields in PATTERNS.items() if "num_experts" in fields or "routing" in fields]


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter away from its initial value, so that a forgotten norm or bias shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def tiny_config(pattern: str = "mixed", **fields) -> DeepseekR1TextConfig:
    values = dict(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        chunk_size_feed_forward=0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return DeepseekR1TextConfig(**{**values, **PATTERNS[pattern], **fields})


def tiny_model(pattern: str = "mixed", implementation: str = "sdpa", **fields) -> DeepseekR1ForCausalLM:
    torch.manual_seed(0)
    model = DeepseekR1ForCausalLM._from_config(tiny_config(pattern, **fields), attn_implementation=implementation)
    return randomise(model).eval()


def random_ids(batch_size: int, length: int, seed: int = 0, vocab_size: int = 97) -> torch.Tensor:
    """`[batch, length]` token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (batch_size, length), generator=generator)
