"""The way back: a checkpoint of this library as one of the family it came from, for tools that know only that family."""

import os

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from .convert import as_dtype, build_report, weights_dtype, write_checkpoint
from .families import FAMILIES, TARGET_MODEL_TYPE, Family, family_obstacles, source_fields
from .mixtures import family_plan
from .plan import plan_tensors
from .report import ConversionReport
from .source import open_source
from .target import read_source_config

PATTERN_FIELDS = ("layer_types", "sliding_window", "sparse_attention")


def to_dense(
    folder: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    allow_pattern_change: bool = False,
    dtype: str | torch.dtype | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    token: str | bool | None = None,
) -> ConversionReport:
    """Writes a `deepseek_r1_text` checkpoint in the layout of a family that other tools know: Llama, Mistral, Qwen2, Qwen3 or
    SmolLM3; with experts Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE, with one tensor per expert and projection, as in their own
    files. Routers stay float32.

    The family that the checkpoint came from is preferred; otherwise the first one that expresses the model exactly is taken.

    Args:
        folder: folder or hub id of the checkpoint.
        destination: folder to be made; it appears only when it is complete.
        allow_pattern_change: where no family has the attention pattern, write the same weights with full attention in all
            layers. That is another function, and the report says so (`exact=False`).
        dtype: dtype of the written weights, e.g. `"bfloat16"`; default: as stored.
        dry_run: check and report, reading no weights and writing nothing.
        overwrite: replace a checkpoint that is at `destination`.
        max_shard_size: bytes per weights file, or a string such as `"5GB"`.
        revision: branch, tag or commit of a hub repository.
        token: access token of the hub.

    Returns:
        A [`ConversionReport`].

    Raises:
        ValueError: the source is of another model type, or no family expresses the model; the message names the fields.
        OSError: a missing source, an existing or unwritable destination, a full disk.
    """
    origin = open_source(folder, revision=revision, token=token)
    if origin.config.get("model_type") != TARGET_MODEL_TYPE:
        raise ValueError(
            f"{folder} has model_type {origin.config.get('model_type')!r}; to_dense takes {TARGET_MODEL_TYPE!r} checkpoints"
        )
    config = read_source_config(origin)
    config.dtype = weights_dtype(origin, config, dtype)
    family, dense = choose_family(config, allow_pattern_change)
    plan = family_plan(plan_tensors(origin, config, as_dtype(dtype)), family)
    report = build_report(origin, config, dense, plan, (folder, destination), TARGET_MODEL_TYPE, family.model_type)
    if dense is not config:
        report.warnings.append(
            f"the attention pattern was dropped: with full attention in all layers this {family.model_type} model is not the same"
            " function"
        )
    family_config = family_configuration(family, dense)
    write_checkpoint(origin, config, family_config, plan, report, dry_run, overwrite, max_shard_size)
    return report


def choose_family(config: DeepseekR1TextConfig, allow_pattern_change: bool) -> tuple[Family, DeepseekR1TextConfig]:
    """The family to write, and the configuration that it expresses: `config` itself, or `config` with full attention.

    Raises:
        ValueError: no family expresses it.
    """
    origin = getattr(config, "source_model_type", None)
    families = sorted(FAMILIES.values(), key=lambda family: family.model_type != origin)
    candidates = [config, with_full_attention(config)] if allow_pattern_change else [config]
    for candidate in candidates:
        fields = candidate.to_dict()
        obstacles = {family.model_type: family_obstacles(family, fields) for family in families}
        for family in families:
            if not obstacles[family.model_type]:
                return family, candidate
    reasons = "; ".join(f"{name}: {', '.join(found)}" for name, found in obstacles.items())
    pattern_only = not allow_pattern_change and any(
        not family_obstacles(family, with_full_attention(config).to_dict()) for family in families
    )
    hint = ". allow_pattern_change=True writes the same weights with full attention in all layers" if pattern_only else ""
    raise ValueError(f"no family expresses this model exactly; what stands in the way, by family: {reasons}{hint}")


def family_configuration(family: Family, config: DeepseekR1TextConfig) -> PreTrainedConfig:
    """The family's configuration object for the model that `config` describes."""
    fields = source_fields(family, config.to_dict())
    fields |= {"architectures": [family.architecture], "dtype": config.dtype}
    return CONFIG_MAPPING[family.model_type].from_dict(fields)


def with_full_attention(config: DeepseekR1TextConfig) -> DeepseekR1TextConfig:
    """The same weights without windows, routing and nodes."""
    fields = config.to_dict()
    overrides = fields.pop("per_layer_config", None) or {}
    kept = {int(layer): {k: v for k, v in values.items() if k not in PATTERN_FIELDS} for layer, values in overrides.items()}
    fields["per_layer_config"] = {layer: values for layer, values in kept.items() if values} or None
    fields |= {"layer_types": "F", "sliding_window": None, "sparse_attention": None}
    return DeepseekR1TextConfig.from_dict(fields)
