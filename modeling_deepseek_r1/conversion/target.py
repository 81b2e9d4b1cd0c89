"""The configuration of a result: the source's own, and what a pattern argument makes of it."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig, SparseAttention
from ..configuration.presets import preset_fields
from .families import FAMILIES, LATENT_ATTENTION, TARGET_ARCHITECTURE, TARGET_MODEL_TYPE, target_fields
from .source import FolderSource, Source

AUTO = "auto"
"""Instead of a pattern: let `recommend.py` find one."""

AUTO_WINDOW, AUTO_SINK_TOKENS = 512, 32
DEFAULT_CONTEXT = 8192
TOKENS_PER_CLUSTER = 128


def clusters_for(context_length: int) -> int:
    """Centroids per key/value head: with as many as keeps a cluster small, and few enough to compare every query with."""
    return max(16, 16 * round(context_length / TOKENS_PER_CLUSTER / 16))


def read_source_config(origin: Source) -> PreTrainedConfig:
    """The source's configuration object.

    Raises:
        ValueError: a model type that does not convert, or an invalid configuration.
    """
    model_type = origin.config.get("model_type")
    if model_type in LATENT_ATTENTION:
        raise ValueError(
            f"model_type {model_type!r}: this library is not DeepSeek's own 671B model with latent attention; convert a"
            " DeepSeek-R1-Distill-Qwen or DeepSeek-R1-Distill-Llama checkpoint instead"
        )
    if model_type in FAMILIES and FAMILIES[model_type].mixture is not None and not isinstance(origin, FolderSource):
        raise ValueError(
            f"model_type {model_type!r}: mixture-of-experts checkpoints in GGUF files are not supported; convert the original"
            " folder of safetensors files"
        )
    if model_type != TARGET_MODEL_TYPE and model_type not in FAMILIES:
        supported = ", ".join([*FAMILIES, TARGET_MODEL_TYPE])
        raise ValueError(f"model_type {model_type!r} of {origin.path} is not supported; supported: {supported}")
    if model_type != TARGET_MODEL_TYPE and origin.config.get("per_layer_config"):
        raise ValueError(f"{origin.path}: per_layer_config in a {model_type} checkpoint is not supported")
    config_class = DeepseekR1TextConfig if model_type == TARGET_MODEL_TYPE else CONFIG_MAPPING[model_type]
    try:
        return config_class.from_dict(dict(origin.config))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{origin.path} has no valid {model_type} configuration: {error}") from error


def plain_target(source_config: PreTrainedConfig, dtype: torch.dtype) -> DeepseekR1TextConfig:
    """The configuration under which this library computes the source's function."""
    if source_config.model_type == TARGET_MODEL_TYPE:
        fields = source_config.to_dict()
    else:
        fields = target_fields(FAMILIES[source_config.model_type], source_config)
        fields["source_model_type"] = source_config.model_type
    fields |= {"architectures": [TARGET_ARCHITECTURE], "dtype": dtype}
    try:
        return DeepseekR1TextConfig.from_dict(fields)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def apply_pattern(
    config: DeepseekR1TextConfig,
    *,
    preset: str | None = None,
    layer_types: list[str] | str | None = None,
    sliding_window: int | None = None,
    num_sink_tokens: int | None = None,
    num_clusters: int | None = None,
    global_stride: int | None = None,
    num_memory_tokens: int | None = None,
    context_length: int | None = None,
) -> DeepseekR1TextConfig:
    """`config` with another attention pattern, or itself where none is asked for; the arguments are `convert_checkpoint`'s."""
    fields = config.to_dict()
    wanted: dict[str, Any] = preset_fields(preset) if preset is not None else {}
    sparse = wanted.pop("sparse_attention", None) or (None if preset else fields.get("sparse_attention"))
    if layer_types == AUTO:
        _check_all_full(config)
        # From these the calibration chooses; in the end some layers may be full or local instead.
        layer_types = "R"
        wanted = {"sliding_window": AUTO_WINDOW, **wanted}
        sparse = {"num_sink_tokens": AUTO_SINK_TOKENS, **(sparse or {})}
    given = {"layer_types": layer_types, "sliding_window": sliding_window}
    wanted |= {name: value for name, value in given.items() if value is not None}
    pattern = wanted.get("layer_types", fields["layer_types"])
    routed = "R" in pattern or "local_routed_attention" in pattern
    if (num_clusters is not None or context_length is not None) and not routed:
        name = "num_clusters" if num_clusters is not None else "context_length"
        raise ValueError(f"{name} has no effect: no layer is local_routed_attention; give layer_types (such as 'RF') too")
    if num_clusters is None and routed and (context_length or "num_clusters" not in (sparse or {})):
        num_clusters = clusters_for(context_length or min(config.max_position_embeddings, DEFAULT_CONTEXT))
    remote = {"global_stride": global_stride, "num_memory_tokens": num_memory_tokens}
    remote = {name: value for name, value in remote.items() if value is not None}
    global_layers = "G" in pattern or "local_global_attention" in pattern
    if remote and not global_layers:
        raise ValueError(
            f"{next(iter(remote))} has no effect: no layer is local_global_attention; give layer_types (such as 'GF') too"
        )
    given = remote | {"num_sink_tokens": num_sink_tokens, "num_clusters": num_clusters}
    given = {name: value for name, value in given.items() if value is not None}
    if global_layers and not sparse:
        given.setdefault("global_stride", SparseAttention.global_stride)
    if given or preset is not None:
        wanted["sparse_attention"] = {**(sparse or {}), **given} or None
    if not wanted:
        return config
    overrides = fields.pop("per_layer_config", None) or {}
    kept = {layer: {k: v for k, v in values.items() if k not in wanted} for layer, values in overrides.items()}
    fields["per_layer_config"] = {int(layer): values for layer, values in kept.items() if values} or None
    try:
        result = DeepseekR1TextConfig.from_dict(fields | wanted)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    local = {"sliding_window": sliding_window, "num_sink_tokens": num_sink_tokens}
    idle = [name for name, value in local.items() if value]
    if idle and not set(result.layer_types) - {"full_attention"}:
        raise ValueError(
            f"{idle[0]} has no effect: every layer is full_attention; give layer_types (such as 'SF') or a preset too"
        )
    return result


def _check_all_full(config: DeepseekR1TextConfig) -> None:
    others = sorted(set(config.layer_types) - {"full_attention"})
    if others:
        raise ValueError(
            f"layer_types='auto' starts from full attention in all layers; the source has {others[0]}: give layer_types='F' first,"
            " or a pattern"
        )
