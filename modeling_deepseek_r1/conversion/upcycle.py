"""Experts made of the MLPs of a dense checkpoint (sparse upcycling, https://arxiv.org/abs/2212.05055).

Either every expert is a copy of the MLP, or all experts share it and each one adds a low-rank delta that starts at zero
(https://arxiv.org/abs/2106.09685). In both cases the weights of a token sum to one, so that the result is the source's function
whatever the routers choose. Routers start small and random: experts that get the same tokens with the same weights would never
become different.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from .domains import gate_names
from .plan import REMOTE, Recipe, TensorPlan, expected_tensors, stored_dtype
from .write import TensorInfo

EXPERT_LETTERS = {"D": "dense", "E": "sparse"}
DEFAULT_EXPERT_LAYERS = "DE"
"""Every second layer, as in the paper."""


@dataclass(frozen=True)
class Made:
    """How a tensor is made: `make` of the source's tensors `sources`."""

    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]

    def __call__(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        return self.make(*(read(name) for name in self.sources))


def apply_experts(
    config: DeepseekR1TextConfig,
    *,
    expert_topology: Mapping[str, int] | Sequence[Mapping[str, int]] | None = None,
    num_experts: int | None = None,
    num_experts_per_tok: int | None = None,
    expert_rank: int | None = None,
    expert_layers: Sequence[int] | str | None = None,
    domain_texts: Mapping[str, Any] | None = None,
) -> DeepseekR1TextConfig:
    """`config` with experts in some layers, or itself where none are asked for; the arguments are `convert_checkpoint`'s.

    Raises:
        ValueError: arguments that do not fit each other or the model, or a model that has experts already.
    """
    others = {
        "num_experts_per_tok": num_experts_per_tok,
        "expert_rank": expert_rank,
        "expert_layers": expert_layers,
        "domain_texts": domain_texts or None,
    }
    given = [name for name, value in others.items() if value is not None]
    if num_experts is None and expert_topology is None:
        if given:
            raise ValueError(f"{given[0]} has no effect without experts; give num_experts or expert_topology too")
        return config
    if sparse_layers(config):
        raise ValueError(
            f"the source has experts in {len(sparse_layers(config))} of {config.num_hidden_layers} layers; experts are made of the"
            " MLPs of a dense checkpoint: convert without expert arguments, or start from the dense checkpoint"
        )
    if num_experts is not None and num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    if isinstance(expert_topology, Mapping):
        expert_topology = [expert_topology]
    if expert_topology is None and domain_texts:
        expert_topology, num_experts = [_even_topology(list(domain_texts), num_experts)], None
    kinds = _layer_kinds(DEFAULT_EXPERT_LAYERS if expert_layers is None else expert_layers, config.num_hidden_layers)
    fields = config.to_dict() | {"mlp_layer_types": kinds, "num_experts": num_experts, "norm_topk_prob": True}
    del fields["router_aux_loss_coef"]
    if num_experts_per_tok is not None:
        fields["num_experts_per_tok"] = num_experts_per_tok
    if expert_topology is not None or expert_rank is not None:
        stages = None if expert_topology is None else [dict(stage) for stage in expert_topology]
        fields["routing"] = {"expert_topology": stages, "expert_rank": expert_rank}
    _keep_own_sizes(config, kinds, fields)
    try:
        result = DeepseekR1TextConfig.from_dict(fields)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    _check_rank(result)
    _check_domains(result, domain_texts or {})
    return result


def sparse_layers(config: DeepseekR1TextConfig) -> list[int]:
    """Numbers of the layers with experts."""
    return [layer_idx for layer_idx in range(config.num_hidden_layers) if config.is_sparse(layer_idx)]


def upcycled_plan(
    plan: TensorPlan, target: DeepseekR1TextConfig, seed: int = 0, fitted_layers: Sequence[int] = ()
) -> TensorPlan:
    """The plan of a dense checkpoint with recipes in place of the MLPs of the layers in which `target` has experts.

    Args:
        plan: what `plan_tensors` says of the model without experts.
        seed: of routers and first low-rank factors.
        fitted_layers: layers whose domain gates calibration makes.
    """
    shapes = expected_tensors(target)
    made: dict[str, Recipe] = {}
    for layer_idx in sparse_layers(target):
        prefix = f"model.layers.{layer_idx}.mlp."
        own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        made |= layer_recipes(prefix, own, target.initializer_range, seed)
    tensors = {}
    for name, shape in shapes.items():
        if name not in made:
            tensors[name] = plan.tensors[name]
            continue
        mlp = plan.tensors[f"{name.partition('.mlp.')[0]}.mlp.gate_proj.weight"]
        tensors[name] = TensorInfo(shape, stored_dtype(name, mlp.dtype))
    tensors |= {name: plan.tensors[name] for name in plan.tensors if REMOTE.fullmatch(name)}
    fitted = [name for layer_idx in fitted_layers for name in gate_names(layer_idx)]
    return replace(plan, tensors=tensors, made=plan.made | made, fitted=plan.fitted + fitted)


def layer_recipes(prefix: str, shapes: Mapping[str, tuple[int, ...]], std: float, seed: int) -> dict[str, Made]:
    """Name -> how it is made, of the router and the experts of one layer. A domain gate is zero, which is the same as none.

    Args:
        prefix: what the names of the layer begin with, e.g. `"model.layers.3.mlp."`.
        shapes: rest of the name -> shape of what the layer needs, e.g. `"experts.down_proj"`.
        std: of the router.
    """
    recipes = {}
    for part, shape in shapes.items():
        name = prefix + part
        if part == "router.scores.weight":
            recipes[name] = random_tensor(name, shape, std, seed)
        elif part.startswith("router.domain_gate.") or part.endswith("_b"):
            recipes[name] = Made((), lambda shape=shape: torch.zeros(shape))
        elif part.endswith("_a"):
            recipes[name] = random_tensor(name, shape, shape[-1] ** -0.5, seed)
        elif part == "experts.gate_up_proj":
            recipes[name] = Made((f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"), _repeated(shape[0]))
        elif part == "experts.down_proj":
            recipes[name] = Made((f"{prefix}down_proj.weight",), _repeated(shape[0]))
        else:  # the shared MLP of low-rank experts
            recipes[name] = Made((prefix + part.removeprefix("experts."),), lambda tensor: tensor)
    return recipes


def _repeated(num_experts: int) -> Callable[..., torch.Tensor]:
    # A view: the copies are made when the tensor is written, and only once.
    return lambda *parts: torch.cat(parts).expand(num_experts, -1, -1)


def random_tensor(name: str, shape: tuple[int, ...], std: float, seed: int) -> Made:
    """Normal numbers that depend on the name and the seed, and not on what else is made."""

    def make() -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        return torch.randn(shape, generator=generator) * std

    return Made((), make)


def _layer_kinds(expert_layers: Sequence[int] | str, num_layers: int) -> list[str]:
    if isinstance(expert_layers, str):
        if not expert_layers or set(expert_layers) - set(EXPERT_LETTERS):
            known = ", ".join(f"{letter} = {name}" for letter, name in EXPERT_LETTERS.items())
            raise ValueError(f"expert_layers={expert_layers!r}: a pattern is one or more of the letters {known}")
        kinds = [EXPERT_LETTERS[expert_layers[layer % len(expert_layers)]] for layer in range(num_layers)]
    else:
        wrong = [layer for layer in expert_layers if layer not in range(num_layers)]
        if wrong:
            raise ValueError(f"expert_layers has {wrong[0]!r}; layers are numbered 0 ... {num_layers - 1}")
        kinds = ["sparse" if layer in expert_layers else "dense" for layer in range(num_layers)]
    if "sparse" not in kinds:
        raise ValueError(f"expert_layers={expert_layers!r} leaves all {num_layers} layers dense")
    return kinds


def _even_topology(domains: list[str], num_experts: int) -> dict[str, int]:
    if len(domains) < 2:
        raise ValueError(f"domain_texts has the domain {domains[0]!r} alone; a router needs texts of at least two")
    if num_experts % len(domains):
        raise ValueError(
            f"num_experts={num_experts} cannot be shared equally by the domains {', '.join(domains)}; give expert_topology, e.g."
            f" {dict.fromkeys(domains, max(1, num_experts // len(domains)))}"
        )
    return dict.fromkeys(domains, num_experts // len(domains))


def _keep_own_sizes(config: DeepseekR1TextConfig, kinds: list[str], fields: dict[str, Any]) -> None:
    """Experts are as wide as the MLP of their own layer."""
    overrides = {int(layer): dict(values) for layer, values in (fields.get("per_layer_config") or {}).items()}
    fields["moe_intermediate_size"] = fields["intermediate_size"]
    for layer_idx, kind in enumerate(kinds):
        width = config.per_layer_config[layer_idx].intermediate_size
        if kind == "sparse" and width != fields["intermediate_size"]:
            overrides[layer_idx]["moe_intermediate_size"] = width
    fields["per_layer_config"] = overrides or None


def _check_rank(config: DeepseekR1TextConfig) -> None:
    for layer_idx in sparse_layers(config):
        layer, rank = config.per_layer_config[layer_idx], config.routing_of(layer_idx).expert_rank
        hidden, inner = layer.hidden_size, layer.moe_intermediate_size
        largest = 3 * hidden * inner // (2 * hidden + 3 * inner)
        if rank is not None and rank > largest:
            raise ValueError(
                f"expert_rank={rank} is too large for layer {layer_idx}: from {largest + 1} on a delta has more parameters than an"
                " expert with matrices of its own; choose a smaller rank, or leave expert_rank out"
            )


def _check_domains(config: DeepseekR1TextConfig, domain_texts: Mapping[str, Any]) -> None:
    stages = [config.expert_domains(layer_idx) for layer_idx in sparse_layers(config)]
    known = sorted({domain for stage in stages if len(stage) > 1 for domain in stage})
    for domain in domain_texts:
        if domain not in known:
            raise ValueError(
                f"domain_texts has {domain!r}, which no domain gate knows; its domains are: {', '.join(known) or 'none'}"
                " (expert_topology names them)"
            )
