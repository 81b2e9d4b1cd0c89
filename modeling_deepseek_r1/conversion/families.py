"""The model families that convert, as tables: what each one's configuration means for `DeepseekR1TextConfig`, and back.

Every family here names its tensors alike (`model.layers.N.self_attn.q_proj.weight`, ...), apart from those of experts
(`mixtures.py`), so a family is described by its configuration. A structural field of the target is either `fixed` by the family's
code, whatever its configuration says (Qwen2 always has query, key and value biases), or `read` from an attribute of its
configuration.
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

EXPERT_FIELDS = ("num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")
"""Likewise, in families with experts. The auxiliary loss itself counts shares of slots, theirs slots per token, which is
`num_experts_per_tok` times as much."""

NO_BIASES = {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}
ATTENTION_BIASES = {"attention_bias": "attention_bias", "attention_out_bias": "attention_bias"}
READ_BIASES = {**ATTENTION_BIASES, "mlp_bias": "mlp_bias"}
PLAIN_ATTENTION = {"no_rope_layers": None, "qk_norm": None, "clip_qkv": None}
NO_SHARED_EXPERT = {"shared_expert_intermediate_size": None}
EXPERTS = {name: name for name in ("num_experts", "moe_intermediate_size", "norm_topk_prob")}


@dataclass(frozen=True)
class Mixture:
    """The experts of a family.

    Attributes:
        block: name of a sparse MLP among the layer's tensors.
        projections: names of an expert's gate, up and down projection.
        some_dense: whether `decoder_sparse_step` and `mlp_only_layers` of its configuration make layers dense.
    """

    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    some_dense: bool = False


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
        mixture: its experts, or None for a dense family.
    """

    model_type: str
    architecture: str
    fixed: dict[str, Any]
    read: dict[str, str]
    window: Literal["none", "uniform", "per_layer"]
    has_head_dim: bool = True
    permuted_in_gguf: bool = False
    mixture: Mixture | None = None


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            fixed=PLAIN_ATTENTION,
            read=READ_BIASES,
            window="none",
            permuted_in_gguf=True,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            fixed={**NO_BIASES, **PLAIN_ATTENTION},
            read={},
            window="uniform",
            permuted_in_gguf=True,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            fixed={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, **PLAIN_ATTENTION},
            read={},
            window="per_layer",
            has_head_dim=False,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            fixed={"mlp_bias": False, **PLAIN_ATTENTION, "qk_norm": "head"},
            read=ATTENTION_BIASES,
            window="per_layer",
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            fixed={"qk_norm": None, "clip_qkv": None},
            read={**READ_BIASES, "no_rope_layers": "no_rope_layers"},
            window="per_layer",
            has_head_dim=False,
            permuted_in_gguf=True,
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            fixed={**NO_BIASES, **PLAIN_ATTENTION, **NO_SHARED_EXPERT, "norm_topk_prob": True},
            read={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
            window="uniform",
            has_head_dim=False,
            mixture=Mixture("block_sparse_moe", ("w1", "w3", "w2")),
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            fixed={"attention_out_bias": False, "mlp_bias": False, **PLAIN_ATTENTION},
            read={
                **EXPERTS,
                "attention_bias": "qkv_bias",
                "shared_expert_intermediate_size": "shared_expert_intermediate_size",
            },
            window="per_layer",
            has_head_dim=False,
            mixture=Mixture(some_dense=True),
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            fixed={"mlp_bias": False, **PLAIN_ATTENTION, **NO_SHARED_EXPERT, "qk_norm": "head"},
            read={**EXPERTS, **ATTENTION_BIASES},
            window="uniform",
            has_head_dim=False,
            mixture=Mixture(some_dense=True),
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            fixed={"mlp_bias": False, **NO_SHARED_EXPERT, "no_rope_layers": None, "qk_norm": "projection"},
            read={**EXPERTS, **ATTENTION_BIASES, "moe_intermediate_size": "intermediate_size", "clip_qkv": "clip_qkv"},
            window="none",
            has_head_dim=False,
            mixture=Mixture(),
        ),
    )
}
"""Supported families by model type; `to_dense` tries them in this order after the one a checkpoint came from."""

LATENT_ATTENTION = ("deepseek_v2", "deepseek_v3")


def target_fields(family: Family, config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of `DeepseekR1TextConfig` that make it the same function as a model of `family` with `config`.

    Raises:
        ValueError: a variant of the family that this library does not compute.
    """
    _check_variant(family, config)
    layers = config.num_hidden_layers
    fields = {name: copy.deepcopy(getattr(config, name)) for name in SHARED_FIELDS}
    fields |= family.fixed | {name: getattr(config, attribute) for name, attribute in family.read.items()}
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if fields["no_rope_layers"] is not None:
        fields["no_rope_layers"] = list(fields["no_rope_layers"])[:layers]
    if fields["pad_token_id"] is not None and fields["pad_token_id"] < 0:
        fields["pad_token_id"] = None
    fields |= _expert_fields(family, config)
    # Without windows Qwen2-MoE says 0.
    window = (getattr(config, "sliding_window", None) or None) if family.window != "none" else None
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


def _check_variant(family: Family, config: PreTrainedConfig) -> None:
    if getattr(config, "router_jitter_noise", 0.0):
        raise ValueError(
            f"router_jitter_noise={config.router_jitter_noise} of a {family.model_type} checkpoint is not supported: it acts in"
            " training alone; set it to 0.0 in config.json to convert without it"
        )
    if family.mixture is not None and family.mixture.some_dense and config.decoder_sparse_step < 1:
        raise ValueError(
            f"decoder_sparse_step={config.decoder_sparse_step} of a {family.model_type} checkpoint must be at least 1 (every layer)"
        )


def _expert_fields(family: Family, config: PreTrainedConfig) -> dict[str, Any]:
    """What the target says of experts; nothing for a dense model."""
    if family.mixture is None:
        return {}
    sparse = [True] * config.num_hidden_layers
    if family.mixture.some_dense:
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        sparse = [config.num_experts > 0 and n not in dense and (n + 1) % step == 0 for n in range(len(sparse))]
    if not any(sparse):
        return {"num_experts": None, "moe_intermediate_size": None, "shared_expert_intermediate_size": None}
    fields = {name: getattr(config, name) for name in EXPERT_FIELDS}
    return fields | {"mlp_layer_types": ["sparse" if is_sparse else "dense" for is_sparse in sparse]}


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
    if fields["use_bidirectional_attention"]:
        obstacles.append("use_bidirectional_attention (True)")
    for kind in OWN_LAYER_TYPES:
        if count := fields["layer_types"].count(kind):
            obstacles.append(f"layer_types ({count} of {len(sliding)} are {kind})")
    if any(sliding) and (fields.get("sparse_attention") or {}).get("num_sink_tokens"):
        obstacles.append(f"sparse_attention (num_sink_tokens={fields['sparse_attention']['num_sink_tokens']})")
    if any(sliding) and (family.window == "none" or (family.window == "uniform" and not all(sliding))):
        obstacles.append(f"layer_types ({sum(sliding)} of {len(sliding)} layers have a sliding window)")
    obstacles += _expert_obstacles(family, fields)
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
    if family.model_type == "qwen2_moe" and fields["shared_expert_intermediate_size"] is None:
        obstacles.append("shared_expert_intermediate_size (None)")
    if family.model_type == "olmoe" and fields["head_dim"] * fields["num_attention_heads"] != fields["hidden_size"]:
        obstacles.append(f"head_dim ({fields['head_dim']}, not hidden_size / num_attention_heads)")
    return obstacles


def _expert_obstacles(family: Family, fields: dict[str, Any]) -> list[str]:
    kinds, routing = fields["mlp_layer_types"] or [], fields["routing"] or {}
    sparse, layers = kinds.count("sparse"), fields["num_hidden_layers"]
    where = f"mlp_layer_types (experts in {sparse} of {layers} layers)"
    if family.mixture is None or not sparse:
        return [where] if (family.mixture is None) == (sparse > 0) else []
    obstacles = [where] if sparse < layers and not family.mixture.some_dense else []
    given = {name: routing.get(name) for name in ("expert_rank", "bias_balancing")}
    given["router_scoring"] = routing.get("router_scoring") if routing.get("router_scoring") != "linear" else None
    least = routing.get("min_experts_per_tok")
    given["min_experts_per_tok"] = least if least != fields["num_experts_per_tok"] else None
    domains = {domain for stage in routing.get("expert_topology") or () if len(stage) > 1 for domain in stage}
    given["expert_topology"] = f"domains {', '.join(sorted(domains))}" if domains else None
    return obstacles + [f"routing ({name}={value})" for name, value in given.items() if value]


def source_fields(family: Family, fields: dict[str, Any]) -> dict[str, Any]:
    """The configuration fields of a `family` model that equals a target configuration (as `to_dict()`)."""
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
        if family.model_type not in ("smollm3", "qwen2_moe"):
            dense["max_window_layers"] = sliding.index(True) if any(sliding) else len(sliding)
    if family.model_type == "qwen3_moe":
        dense["use_sliding_window"] = any(sliding)
    if family.mixture is not None:
        dense |= {name: fields[name] for name in EXPERT_FIELDS}
    if family.mixture is not None and family.mixture.some_dense:
        dense["mlp_only_layers"] = [layer for layer, kind in enumerate(fields["mlp_layer_types"]) if kind == "dense"]
    return dense
