"""What engines that keep keys in pages of their own (continuous batching) can serve: full attention and one sliding window."""

from .layer import layer_pattern


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
