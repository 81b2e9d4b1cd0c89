"""Named settings and the letters in which a layer pattern is written.

A pattern such as `"SSSF"` repeats over the layers: with 30 layers, layers 3, 7, 11, ... attend to everything and the others
to their window and the sink tokens. A preset is a row of configuration fields and nothing else: whatever it sets can be set
by hand. Rows that also change the shape of the model (`shape`) are for new models only, since no existing checkpoint fits them.
"""

from typing import Any

LAYER_LETTERS = {
    "F": "full_attention",
    "S": "sliding_attention",
    "R": "local_routed_attention",
    "G": "local_global_attention",
}
"""Letter -> layer type, as accepted by `expand_layer_pattern` and by `DeepseekR1TextConfig(layer_types="SF")`."""

PRESETS: dict[str, dict[str, Any]] = {
    # Every layer attends to everything: the behaviour of the checkpoint that was converted.
    "dense": {"layer_types": "F"},
    # Every layer sees its window, the sink tokens, and from the rest the keys of the four clusters that fit a query best.
    "balanced": {
        "layer_types": "R",
        "sliding_window": 512,
        "sparse_attention": {"num_sink_tokens": 32, "routed_clusters": 4, "routed_tokens": 128},
    },
    # No layer grows with the context: constant time per generated token, the least memory, the largest loss of quality.
    "low_latency": {"layer_types": "S", "sliding_window": 128, "sparse_attention": {"num_sink_tokens": 32}},
    # Wider windows, and fewer but larger clusters: the least work for every further token of a very long text.
    "long_document": {
        "layer_types": "R",
        "sliding_window": 1024,
        "sparse_attention": {"num_sink_tokens": 64, "routed_clusters": 2, "routed_tokens": 256},
    },
    # Closest to dense: half of the layers keep everything, the other half is routed.
    "high_accuracy": {
        "layer_types": "RF",
        "sliding_window": 512,
        "sparse_attention": {"num_sink_tokens": 64, "routed_clusters": 4, "routed_tokens": 128},
    },
    # A small model for phones, with an activation that integer hardware computes exactly.
    "mobile": {
        "layer_types": "SSSF",
        "sliding_window": 256,
        "sparse_attention": {"num_sink_tokens": 16},
        "shape": {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "hidden_act": "relu6",
            "tie_word_embeddings": True,
        },
    },
}


def expand_layer_pattern(pattern: str, num_hidden_layers: int) -> list[str]:
    """Repeats a pattern string over the layers.

    Args:
        pattern: letters of `LAYER_LETTERS`, e.g. `"SSSF"`; its length need not divide the number of layers.
        num_hidden_layers: length of the result.

    Raises:
        ValueError: an empty pattern, or a letter that names no layer type.
    """
    unknown = sorted(set(pattern) - set(LAYER_LETTERS))
    if not pattern or unknown:
        known = ", ".join(f"{letter} = {name}" for letter, name in LAYER_LETTERS.items())
        raise ValueError(f"layer_types={pattern!r}: a pattern is one or more of the letters {known}")
    return [LAYER_LETTERS[pattern[i % len(pattern)]] for i in range(num_hidden_layers)]


def preset_fields(name: str, *, new_model: bool = False) -> dict[str, Any]:
    """The configuration fields of a preset, to be passed to `DeepseekR1TextConfig`.

    Args:
        name: a key of `PRESETS`.
        new_model: whether a model is made from nothing; only then may a preset choose the model's shape.

    Raises:
        ValueError: an unknown name, or a preset with a shape of its own asked for an existing checkpoint.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not known; choose one of {', '.join(PRESETS)}")
    fields = {key: value for key, value in PRESETS[name].items() if key != "shape"}
    if isinstance(fields.get("sparse_attention"), dict):
        fields["sparse_attention"] = dict(fields["sparse_attention"])
    shape = PRESETS[name].get("shape", {})
    if shape and not new_model:
        raise ValueError(
            f"preset={name!r} sets the shape of the model ({', '.join(shape)}) and fits new models only, not an existing checkpoint"
        )
    return {**shape, **fields}
