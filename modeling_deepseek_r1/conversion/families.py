"""The model families that convert, as tables: what each one's configuration means for `DeepseekR1TextConfig`, and back.

Every family here names its tensors alike (`model.layers.N.self_attn.q_proj.weight`, ...), so a family is described by its
configuration alone. A structural field of the target is either `fixed` by the family's code, whatever its configuration says
(Qwen2 always has query, key and value biases), or `read` from an attribute of its configuration.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..configuration.sparse import OWN_LAYER_TYPES

TARGET_MODEL_TYPE = DeepseekR1TextConfig.model_type
TARGET_ARCHITECTURE = "DeepseekR1ForCausalLM"

SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)
"""Fields with the same name and meaning in every family and in the target."""

NO_BIASES = {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}
READ_BIASES = {"attention_bias": "attention_bias", "attention_out_bias": "attention_bias", "mlp_bias": "mlp_bias"}
ALWAYS_ROTARY = {"no_rope_layers": None}


@dataclass(frozen=True)
class Family:
    """One source family.

    Attributes:
        model_type: `model_type` of its configuration.
        architecture: class name of its causal language model.
        fixed: target field -> the value that the family's code imposes (`no_rope_layers` None: rotary embedding everywhere).
        read: target field -> attribute of the family's configuration.
        window: which layers can have a sliding window: none, all or none of them, or each one by itself (`layer_types`).
        has_head_dim: whether `head_dim` is a field of its configuration (elsewhere it is an extra attribute that the
            modeling code honours, written only where it differs from `hidden_size / num_attention_heads`).
        permuted_in_gguf: whether GGUF files store its query and key rows in the interleaved order.
    """

    model_type: str
    architecture: str
    fixed: dict[str, Any]
    read: dict[str, str]
    window: Literal["none", "uniform", "per_layer"]
    has_head_dim: bool = True
    permuted_in_gguf: bool = False


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            fixed={"qk_norm": None, **ALWAYS_ROTARY},
            read=READ_BIASES,
            window="none",
            permuted_in_gguf=True,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            fixed={**NO_BIASES, "qk_norm": None, **ALWAYS_ROTARY},
            read={},
            window="uniform",
            permuted_in_gguf=True,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            fixed={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "qk_norm": None, **ALWAYS_ROTARY},
            read={},
            window="per_layer",
            has_head_dim=False,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            fixed={"mlp_bias": False, "qk_norm": "head", **ALWAYS_ROTARY},
            read={"attention_bias": "attention_bias", "attention_out_bias": "attention_bias"},
            window="per_layer",
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            fixed={"qk_norm": None},
            read={**READ_BIASES, "no_rope_layers": "no_rope_layers"},
            window="per_layer",
            has_head_dim=False,
            permuted_in_gguf=True,
        ),
    )
}
"""Supported families by model type; `to_dense` tries them in this order after the one a checkpoint came from."""

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
LATENT_ATTENTION = ("deepseek_v2", "deepseek_v3")


def target_fields(family: Family, config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of `DeepseekR1TextConfig` that make it the same function as a model of `family` with `config`."""
    layers = config.num_hidden_layers
    fields = {name: copy.deepcopy(getattr(config, name)) for name in SHARED_FIELDS}
    fields |= family.fixed | {name: getattr(config, attribute) for name, attribute in family.read.items()}
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if fields["no_rope_layers"] is not None:
        fields["no_rope_layers"] = list(fields["no_rope_layers"])[:layers]
    if fields["pad_token_id"] is not None and fields["pad_token_id"] < 0:
        fields["pad_token_id"] = None
    window = getattr(config, "sliding_window", None) if family.window != "none" else None
    fields["sliding_window"] = window
    if family.window == "per_layer":
        fields["layer_types"] = list(config.layer_types)
    else:
        fields["layer_types"] = ["full_attention" if window is None else "sliding_attention"] * layers
    fields["rope_parameters"].pop("type", None)
    if fields["rope_parameters"].get("rope_type") == "default":
        # The families' own default rotary code rotates the whole head, whatever this says.
        fields["rope_parameters"].pop("partial_rotary_factor", None)
    return fields


def family_obstacles(family: Family, fields: dict[str, Any]) -> list[str]:
    """Why `family` cannot hold a target configuration (as `to_dict()`) exactly; an empty list if it can."""
    obstacles = []
    sliding = [kind == "sliding_attention" for kind in fields["layer_types"]]
    overrides = fields.get("per_layer_config") or {}
    differing = sorted({name for layer in overrides.values() for name in layer})
    if differing:
        obstacles.append(f"per_layer_config ({', '.join(differing)} differ between layers)")
    if (fields.get("rope_parameters") or {}).get("rope_type") == "piecewise_linear":
        obstacles.append("rope_parameters (rope_type='piecewise_linear')")
    for kind in OWN_LAYER_TYPES:
        if count := fields["layer_types"].count(kind):
            obstacles.append(f"layer_types ({count} of {len(sliding)} are {kind})")
    if any(sliding) and (fields.get("sparse_attention") or {}).get("num_sink_tokens"):
        obstacles.append(f"sparse_attention (num_sink_tokens={fields['sparse_attention']['num_sink_tokens']})")
    if any(sliding) and (family.window == "none" or (family.window == "uniform" and not all(sliding))):
        obstacles.append(f"layer_types ({sum(sliding)} of {len(sliding)} layers have a sliding window)")
    for name, value in family.fixed.items():
        actual = fields[name]
        if name == "no_rope_layers":
            actual = None if all(actual) else [layer for layer, rotary in enumerate(actual) if not rotary]
        if actual != value:
            obstacles.append(f"{name} ({actual!r})")
    for attribute in set(family.read.values()):
        names = [name for name, source in family.read.items() if source == attribute]
        if any(fields[name] != fields[names[0]] for name in names):
            obstacles.append(" and ".join(f"{name} ({fields[name]!r})" for name in names))
    if family.model_type == "llama" and fields["hidden_size"] % fields["num_attention_heads"]:
        obstacles.append(f"hidden_size ({fields['hidden_size']}, not a multiple of {fields['num_attention_heads']} heads)")
    return obstacles


def source_fields(family: Family, fields: dict[str, Any]) -> dict[str, Any]:
    """The configuration fields of a dense `family` model that equals a target configuration (as `to_dict()`)."""
    dense = {name: copy.deepcopy(fields[name]) for name in SHARED_FIELDS}
    dense |= {attribute: copy.deepcopy(fields[name]) for name, attribute in family.read.items()}
    if family.has_head_dim or fields["head_dim"] * fields["num_attention_heads"] != fields["hidden_size"]:
        dense["head_dim"] = fields["head_dim"]
    sliding = [kind == "sliding_attention" for kind in fields["layer_types"]]
    if family.window != "none":
        dense["sliding_window"] = fields["sliding_window"] if any(sliding) else None
    if family.window == "per_layer":
        dense["layer_types"] = list(fields["layer_types"])
        dense["use_sliding_window"] = any(sliding)
        if family.model_type != "smollm3":
            dense["max_window_layers"] = sliding.index(True) if any(sliding) else len(sliding)
    return dense
