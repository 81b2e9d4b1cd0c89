"""What engines that keep keys in pages of their own (continuous batching, vLLM) can serve: full attention and one sliding window."""

from .layer import layer_pattern

LAYER_SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "moe_intermediate_size")
"""That all layers must have in common there."""


def check_pages(config, engine: str) -> None:
    """ValueError where the layers of a text configuration see more than pages hold: remote keys, nodes, sink tokens, several
    windows. `engine` begins the message."""
    own = sorted({kind for kind in config.layer_types if kind.startswith("local_")})
    patterns = [layer_pattern(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
    sinks = sorted({pattern.num_sink_tokens for pattern in patterns if pattern.num_sink_tokens})
    windows = sorted({pattern.window for pattern in patterns if pattern.window is not None})
    if own or sinks or len(windows) > 1:
        what = f"{own[0]} layers" if own else f"sink tokens ({sinks[0]})" if sinks else f"different windows {windows}"
        raise ValueError(
            f"{engine} keeps keys in pages that know full_attention and one sliding window; this model has {what}."
            " Use generate(), or convert the checkpoint without them"
        )


def check_vllm(config) -> None:
    """As `check_pages`; and ValueError for what vLLM's Transformers backend would compute wrongly without a word: it takes sizes
    from the configuration of the whole model, and SiLU for the activation of experts."""
    check_pages(config, "vLLM")
    for name in LAYER_SIZES:
        sizes = sorted({getattr(layer, name) for layer in config.per_layer_config})
        if len(sizes) > 1:
            raise ValueError(f"vLLM knows one {name} for all layers; this model has {sizes}. Use generate()")
    if config.num_experts and config.hidden_act != "silu":
        raise ValueError(f"vLLM computes experts with silu; this model has hidden_act={config.hidden_act!r}. Use generate()")
