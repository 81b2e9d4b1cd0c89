"""Which tensors a checkpoint has to have, and how those of a source become them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from .report import name_list
from .source import Source
from .write import TensorInfo

Recipe = Callable[[Callable[[str], torch.Tensor]], torch.Tensor]
"""Makes a tensor that the source does not have, given what reads those that it has."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HARMLESS = re.compile(r".*rotary_emb\.inv_freq")
REMOTE = re.compile(r"model\.layers\.\d+\.self_attn\.(router|global_tokens)\.\w+")
"""What routed and local_global layers add to a model."""


@dataclass(frozen=True)
class TensorPlan:
    """What will be written, and what of the source is left out.

    Attributes:
        tensors: name -> shape and dtype in the result.
        skipped: name -> why the result does not need it.
        cast: names whose dtype changes.
        lossless: whether every such change keeps all values.
        fitted: names that calibration makes.
        made: name -> how a tensor is made that is neither carried over nor fitted.
    """

    tensors: dict[str, TensorInfo]
    skipped: dict[str, str]
    cast: list[str]
    lossless: bool
    fitted: list[str]
    made: dict[str, Recipe] = field(default_factory=dict)


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight in a model of `dtype`: routers, and what local_global layers add, stay float32."""
    return torch.float32 if ".router." in name or ".global_tokens." in name else dtype


def expected_tensors(config: DeepseekR1TextConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that a causal language model with `config` stores, in its order.

    What remote keys add is left out (`calibrate.router_tensors`, `global_tokens.global_tensors`).
    """
    shapes = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer_idx in range(config.num_hidden_layers):
        layer = config.per_layer_config[layer_idx]
        hidden = layer.hidden_size
        queries, keys = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        tensors = _linears(
            {
                "self_attn.q_proj": (queries, hidden, layer.attention_bias),
                "self_attn.k_proj": (keys, hidden, layer.attention_bias),
                "self_attn.v_proj": (keys, hidden, layer.attention_bias),
                "self_attn.o_proj": (hidden, queries, layer.attention_out_bias),
            }
        )
        if config.is_sparse(layer_idx):
            tensors |= _router_tensors(config, layer_idx) | _expert_tensors(config, layer_idx)
            if layer.shared_expert_intermediate_size is not None:
                tensors |= _mlp_tensors("mlp.shared_expert", hidden, layer.shared_expert_intermediate_size, layer.mlp_bias)
                tensors["mlp.shared_expert_gate.weight"] = (1, hidden)
        else:
            tensors |= _mlp_tensors("mlp", hidden, layer.intermediate_size, layer.mlp_bias)
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if layer.qk_norm is not None:
            sizes = (layer.head_dim, layer.head_dim) if layer.qk_norm == "head" else (queries, keys)
            norms |= {"self_attn.q_norm": sizes[0], "self_attn.k_norm": sizes[1]}
        tensors |= {f"{name}.weight": (size,) for name, size in norms.items()}
        shapes |= {f"model.layers.{layer_idx}.{name}": shape for name, shape in tensors.items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def _linears(sizes: Mapping[str, tuple[int, int, bool]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns, bias) in sizes.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def _mlp_tensors(prefix: str, hidden: int, inner: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return _linears(
        {
            f"{prefix}.gate_proj": (inner, hidden, bias),
            f"{prefix}.up_proj": (inner, hidden, bias),
            f"{prefix}.down_proj": (hidden, inner, bias),
        }
    )


def _router_tensors(config: DeepseekR1TextConfig, layer_idx: int) -> dict[str, tuple[int, ...]]:
    layer, routing = config.per_layer_config[layer_idx], config.routing_of(layer_idx)
    experts, hidden, domains = layer.num_experts, layer.hidden_size, len(config.expert_domains(layer_idx))
    prefix = "mlp.router"
    if routing.router_scoring == "attention":
        heads, size = routing.router_heads, routing.router_head_dim
        shapes = {f"{prefix}.scores.query": (heads * size, hidden), f"{prefix}.scores.keys": (experts, heads, size)}
    else:
        shapes = {f"{prefix}.scores.weight": (experts, hidden)}
    if domains > 1:
        shapes |= {f"{prefix}.domain_gate.weight": (domains, hidden), f"{prefix}.domain_gate.bias": (domains,)}
        if routing.num_modalities:
            shapes[f"{prefix}.domain_gate.modality_bias"] = (routing.num_modalities, domains)
    if routing.bias_balancing:
        shapes[f"{prefix}.balance_bias"] = (experts,)
    minimum = routing.min_experts_per_tok
    if minimum is not None and minimum < layer.num_experts_per_tok:
        shapes[f"{prefix}.threshold"] = ()
    return shapes


def _expert_tensors(config: DeepseekR1TextConfig, layer_idx: int) -> dict[str, tuple[int, ...]]:
    layer, rank = config.per_layer_config[layer_idx], config.routing_of(layer_idx).expert_rank
    experts, hidden, inner = layer.num_experts, layer.hidden_size, layer.moe_intermediate_size
    prefix = "mlp.experts"
    if rank is None:
        return {f"{prefix}.gate_up_proj": (experts, 2 * inner, hidden), f"{prefix}.down_proj": (experts, hidden, inner)}
    return _mlp_tensors(prefix, hidden, inner, layer.mlp_bias) | {
        f"{prefix}.gate_up_proj_a": (experts, rank, hidden),
        f"{prefix}.gate_up_proj_b": (experts, 2 * inner, rank),
        f"{prefix}.down_proj_a": (experts, rank, inner),
        f"{prefix}.down_proj_b": (experts, hidden, rank),
    }


def plan_tensors(
    origin: Source,
    target: DeepseekR1TextConfig,
    dtype: torch.dtype | None,
    routers: Mapping[str, tuple[int, ...]] | None = None,
    refit: bool = False,
) -> TensorPlan:
    """Compares the source's tensors with what the result needs.

    Args:
        routers: name -> shape of what routed layers add; those of the source are kept where they fit, unless `refit`.

    Raises:
        ValueError: tensors that are missing, unknown, or of another shape; all of them in one message.
    """
    expected, found = expected_tensors(target), origin.tensors
    skipped = {name: "recomputed from the configuration" for name in found if HARMLESS.fullmatch(name)}
    if target.tie_word_embeddings and found.get(HEAD) and found[HEAD].shape == expected[EMBEDDING]:
        skipped[HEAD] = "tied to the embeddings"
    routers = routers or {}
    kept = not refit and all(name in found and found[name].shape == shape for name, shape in routers.items())
    expected |= routers if kept else {}
    skipped |= {name: "of another routing" for name in found if REMOTE.fullmatch(name) and name not in expected}
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected and name not in skipped]
    shapes = {
        name: (found[name].shape, shape) for name, shape in expected.items() if name in found and found[name].shape != shape
    }
    problems = [f"missing: {name_list(missing)}"] if missing else []
    problems += [f"not part of the model: {name_list(surplus)}"] if surplus else []
    problems += [f"{name} has shape {list(actual)} instead of {list(shape)}" for name, (actual, shape) in shapes.items()]
    if problems:
        heads = [name for name in origin.config.get("architectures") or [] if not name.endswith("ForCausalLM")]
        hint = f" (it is a {heads[0]}; only causal language models convert)" if heads else ""
        raise ValueError(f"the tensors of {origin.path} do not fit its configuration{hint}: " + "; ".join(problems))
    tensors = {name: TensorInfo(shape, stored_dtype(name, dtype or found[name].dtype)) for name, shape in expected.items()}
    cast = [name for name in tensors if tensors[name].dtype != found[name].dtype]
    lossless = all(torch.promote_types(found[name].dtype, tensors[name].dtype) == tensors[name].dtype for name in cast)
    fitted = [] if kept else list(routers)
    tensors |= {name: TensorInfo(routers[name], torch.float32) for name in fitted}
    return TensorPlan(tensors, skipped, cast, lossless, fitted)
