"""Other numbers of experts in a trained model: more of them, or fewer, chosen by how much they are used.

- `grow_experts` copies the busiest ones. A copy gets the router row of its original and a balance bias so low that it is chosen
  nowhere: the model is the same function until bias balancing (`training/balance.py`) raises it and takes load off the original.
- `split_experts` makes two of every expert, with half of its width each, and lets a token have twice as many: the same function
  at the same cost, in finer pieces (fine-grained experts, https://arxiv.org/abs/2401.06066).
- `prune_experts` drops the least used ones.
- `merge_experts` adds each of those to the one whose router row is most like its own, by their shares of the load
  (https://arxiv.org/abs/2310.01334). It is meant for experts of one origin, such as copies of one MLP: a mean of unrelated
  weights is none of them.

Each gives a new model, which is saved, loaded and trained like any other, and for each sparse layer the experts of the old model
that every new one is made of. Domains stay what they are; more than 64 experts a layer are not advised.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from .gates import LinearScores
from .metrics import ExpertUsage

PER_EXPERT = re.compile(
    r"(?:.*\.)?layers\.(\d+)\.mlp\.(router\.(?:scores\.weight|scores\.keys|balance_bias|threshold)|experts\.\w+)"
)
"""Tensors with a row per expert, and the threshold, which depends on their number."""

Origins = dict[int, list[list[int]]]
"""Number of a sparse layer -> for each of its new experts, the old ones that it is made of."""


@torch.no_grad()
def measure_usage(model: PreTrainedModel, windows: torch.Tensor) -> dict[int, ExpertUsage]:
    """How a model uses its experts on a text: number of a sparse layer -> its counts.

    Args:
        windows: `[windows, n]` token ids, each window read by itself.
    """
    layers = sparse_layers(model)
    usage = {number: ExpertUsage(model.config.expert_domains(number)) for number in layers}
    for window in windows.to(model.device).split(1):
        routed = model.base_model(window, use_cache=False, output_router_logits=True).routed
        for counts, layer in zip(usage.values(), routed, strict=True):
            counts.add(layer)
    return usage


def sparse_layers(model: PreTrainedModel) -> list[int]:
    """Numbers of the layers with experts.

    Raises:
        ValueError: there are none.
    """
    layers = [number for number in range(model.config.num_hidden_layers) if model.config.is_sparse(number)]
    if not layers:
        raise ValueError("the model has no layer with experts")
    return layers


def grow_experts(
    model: PreTrainedModel, usage: Mapping[int, ExpertUsage], number: int | Mapping[str, int]
) -> tuple[PreTrainedModel, Origins]:
    """A model with copies of the busiest experts of every sparse layer; the same function.

    Args:
        usage: what `measure_usage` says of a text of the kind that the model is for.
        number: experts to add to each layer; with several domains to each domain, e.g. `{"code": 2}`.

    Raises:
        ValueError: a number that is impossible, or a router in which one more expert changes what the others get.
    """
    for layer_idx in sparse_layers(model):
        layer, routing = model.config.per_layer_config[layer_idx], model.config.routing_of(layer_idx)
        minimum = routing.min_experts_per_tok
        fields = {
            "norm_topk_prob": (layer.norm_topk_prob, layer.norm_topk_prob),
            "routing['router_scoring']": (routing.router_scoring, routing.router_scoring == "linear"),
            "routing['min_experts_per_tok']": (minimum, minimum in (None, layer.num_experts_per_tok)),
        }
        for name, (value, is_fine) in fields.items():
            if not is_fine:
                raise ValueError(
                    f"layer {layer_idx}: with {name}={value!r} another expert changes what the present ones get; grow_experts needs"
                    " normalised weights, linear scores and a fixed number of active experts. split_experts works with any weights"
                )

    def chosen(order: list[int], count: int, layer_idx: int) -> list[list[int]]:
        if count > len(order):
            raise ValueError(f"layer {layer_idx}: {count} experts cannot be copies of {len(order)}; grow in several steps")
        return [[expert] for expert in sorted(order)] + [[expert] for expert in order[:count]]

    origins = _choose(model, usage, number, chosen)
    grown = rebuilt(model, _resized(model, number, 1, bias_balancing=True), PER_EXPERT, _means(origins))
    with torch.no_grad():
        for router, groups in zip(grown.base_model.routers, origins.values(), strict=True):
            first = {group[0]: place for place, group in reversed(list(enumerate(groups)))}
            copies = [place for place, group in enumerate(groups) if first[group[0]] != place]
            # A copy is at most half of what it shares with its original, and no other expert is less than nothing.
            router.balance_bias[copies] = float(router.balance_bias.min()) - 0.501
    return grown, origins


def split_experts(model: PreTrainedModel) -> tuple[PreTrainedModel, Origins]:
    """A model with two experts of half the width in place of every one, of which a token gets twice as many; the same function.

    Raises:
        ValueError: experts of odd width, or low-rank ones, which share one MLP.
    """
    for layer_idx in sparse_layers(model):
        width, rank = (
            model.config.per_layer_config[layer_idx].moe_intermediate_size,
            model.config.routing_of(layer_idx).expert_rank,
        )
        if rank is not None or width % 2:
            what = f"moe_intermediate_size={width} is odd" if rank is None else "low-rank experts share one MLP"
            raise ValueError(f"layer {layer_idx}: {what}, so its experts cannot be split into halves")

    def double(fields: dict[str, Any], routing: dict[str, Any] | None) -> None:
        if fields.get("moe_intermediate_size"):
            fields["moe_intermediate_size"] //= 2
        for holder, name in (
            (fields, "num_experts_per_tok"),
            (routing, "min_experts_per_tok"),
            (routing, "target_experts_per_tok"),
        ):
            if holder and holder.get(name):
                holder[name] *= 2
        if routing and "expert_activation_threshold" in routing:
            routing["expert_activation_threshold"] /= 2

    def halves(layer_idx: int, part: str, tensor: torch.Tensor) -> torch.Tensor:
        if part == "experts.gate_up_proj":
            return tensor.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        if part == "experts.down_proj":
            # Each half has half of the weight.
            return 2 * tensor.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
        if part == "router.threshold":
            return tensor / 2
        doubled = tensor.repeat_interleave(2, 0)
        return doubled / 2 if part == "router.balance_bias" else doubled

    config = _with_counts(model.config, lambda domain, count: 2 * count, double)
    origins = {n: [[e // 2] for e in range(2 * model.config.per_layer_config[n].num_experts)] for n in sparse_layers(model)}
    return rebuilt(model, config, PER_EXPERT, halves), origins


def prune_experts(
    model: PreTrainedModel, usage: Mapping[int, ExpertUsage], number: int | Mapping[str, int]
) -> tuple[PreTrainedModel, Origins]:
    """A model without the least used experts of every sparse layer; the arguments are those of `grow_experts`.

    Raises:
        ValueError: fewer experts would be left than one per domain, or than a token gets.
    """

    def chosen(order: list[int], count: int, layer_idx: int) -> list[list[int]]:
        return [[expert] for expert in sorted(_kept(order, count, layer_idx))]

    origins = _choose(model, usage, number, chosen)
    return rebuilt(model, _resized(model, number, -1), PER_EXPERT, _means(origins)), origins


def merge_experts(
    model: PreTrainedModel, usage: Mapping[int, ExpertUsage], number: int | Mapping[str, int]
) -> tuple[PreTrainedModel, Origins]:
    """A model in which the least used experts of every sparse layer have become part of others; as `prune_experts`.

    Raises:
        ValueError: as there, or low-rank experts, whose factors have no mean.
    """

    def chosen(order: list[int], count: int, layer_idx: int) -> list[list[int]]:
        scores = model.base_model.layers[layer_idx].mlp.router.scores
        rows = scores.weight if isinstance(scores, LinearScores) else scores.keys.flatten(1)
        rows = F.normalize(rows.detach(), dim=-1)
        kept = sorted(_kept(order, count, layer_idx))
        groups = {expert: [expert] for expert in kept}
        for expert in order[len(kept) :]:
            groups[kept[int((rows[kept] @ rows[expert]).argmax())]].append(expert)
        return list(groups.values())

    for layer_idx in sparse_layers(model):
        if model.config.routing_of(layer_idx).expert_rank is not None:
            raise ValueError(f"layer {layer_idx}: low-rank experts cannot be merged, since their factors have no mean")
    origins = _choose(model, usage, number, chosen)
    return rebuilt(model, _resized(model, number, -1), PER_EXPERT, _means(origins, usage)), origins


def _kept(order: list[int], count: int, layer_idx: int) -> list[int]:
    if count >= len(order):
        raise ValueError(f"layer {layer_idx}: {count} of {len(order)} experts cannot be removed; at least one must stay")
    return order[: len(order) - count]


def _choose(
    model: PreTrainedModel,
    usage: Mapping[int, ExpertUsage],
    number: int | Mapping[str, int],
    chosen: Callable[[list[int], int, int], list[list[int]]],
) -> Origins:
    """For every layer, domain by domain: `chosen` of its experts, the busiest first, and of the number asked for."""
    domains = {layer_idx: model.config.expert_domains(layer_idx) for layer_idx in sparse_layers(model)}
    known = {domain for sizes in domains.values() for domain in sizes}
    asked = number if isinstance(number, Mapping) else dict.fromkeys(known, number)
    several = any(len(sizes) > 1 for sizes in domains.values()) and not isinstance(number, Mapping)
    if several or set(asked) - known or min(asked.values(), default=0) < 0 or not any(asked.values()):
        raise ValueError(f"number={number!r} must be a positive number of experts for some of the domains {sorted(known)}")
    origins: Origins = {}
    for layer_idx, sizes in domains.items():
        slots, start, origins[layer_idx] = usage[layer_idx].slots.tolist(), 0, []
        for domain, size in sizes.items():
            order = sorted(range(start, start + size), key=lambda expert: -slots[expert])
            origins[layer_idx] += chosen(order, asked.get(domain, 0), layer_idx)
            start += size
        left, active = len(origins[layer_idx]), model.config.per_layer_config[layer_idx].num_experts_per_tok
        if left < active:
            raise ValueError(f"layer {layer_idx}: {left} experts would be left, but a token gets num_experts_per_tok={active}")
    return origins


def _means(
    origins: Origins, usage: Mapping[int, ExpertUsage] | None = None
) -> Callable[[int, str, torch.Tensor], torch.Tensor]:
    """Every new expert as the mean of its old ones, by their use."""

    def mean(layer_idx: int, part: str, tensor: torch.Tensor) -> torch.Tensor:
        if part == "router.threshold":
            return tensor
        rows = []
        for group in origins[layer_idx]:
            if len(group) == 1:
                rows.append(tensor[group[0]])
                continue
            shares = usage[layer_idx].slots[group].float().clamp(min=1e-9)
            shares = (shares / shares.sum()).to(tensor.device)
            rows.append(torch.einsum("e,e...->...", shares, tensor[group].float()).to(tensor.dtype))
        return torch.stack(rows)

    return mean


def _resized(model: PreTrainedModel, number: int | Mapping[str, int], sign: int, **routing: Any):
    def resize(domain: str, count: int) -> int:
        return count + sign * (number.get(domain, 0) if isinstance(number, Mapping) else number)

    def update(fields: dict[str, Any], own: dict[str, Any] | None) -> None:
        if own is not None:
            own.update(routing)

    return _with_counts(model.config, resize, update)


def _with_counts(
    config, resize: Callable[[str, int], int], edit: Callable[[dict[str, Any], dict[str, Any] | None], None]
) -> Any:
    """The configuration with other numbers of experts, and `edit` applied to the common fields and to those of each layer."""
    fields = config.to_dict()
    fields["routing"] = fields["routing"] or {"expert_topology": None}
    overrides = {int(layer): dict(values) for layer, values in (fields.pop("per_layer_config", None) or {}).items()}
    common = fields["routing"]["expert_topology"]
    for holder in (*overrides.values(), fields):
        routing = dict(holder["routing"]) if holder.get("routing") is not None else None
        topology = common if routing is None else routing["expert_topology"]
        if routing is not None and topology is not None:
            routing["expert_topology"] = [{d: resize(d, count) for d, count in stage.items()} for stage in topology]
        if topology is not None:
            holder.pop("num_experts", None)
        elif holder.get("num_experts"):
            holder["num_experts"] = resize("all", holder["num_experts"])
        edit(holder, routing)
        if routing is not None:
            holder["routing"] = routing
    fields["per_layer_config"] = {layer: values for layer, values in overrides.items() if values} or None
    try:
        return type(config).from_dict(fields)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def rebuilt(
    model: PreTrainedModel,
    config,
    pattern: re.Pattern,
    convert: Callable[[int, str, torch.Tensor], torch.Tensor | None],
) -> PreTrainedModel:
    """A model with `config`, of this one's tensors. Those whose names match `pattern`, which has groups for the layer and the rest
    of the name, are made by `convert(layer, rest, tensor)`; None = the new model has its own, or none."""
    implementations = model.config._attn_implementation, model.config._experts_implementation
    new = type(model)._from_config(
        config, dtype=model.dtype, attn_implementation=implementations[0], experts_implementation=implementations[1]
    )
    state = new.state_dict()
    for name, tensor in model.state_dict().items():
        match = pattern.fullmatch(name)
        made = convert(int(match[1]), match[2], tensor) if match else tensor
        state |= {name: made} if made is not None else {}
    new.load_state_dict(state)
    if model.can_generate():
        new.generation_config = model.generation_config
    return new.to(model.device).train(model.training)
