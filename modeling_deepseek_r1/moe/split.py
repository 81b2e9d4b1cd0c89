"""The MLPs of a dense model cut into experts, so that a token can leave out the parts that do little for it.

The neurons of a gated MLP are dealt into equal groups that tend to be active together (MoEfication,
https://arxiv.org/abs/2110.01786); added up, the groups are the MLP. A router, fitted to the same text, says how large the output
of each group will be, and the threshold of its layer leaves out what is small. The weights of such experts must be one while
probabilities say which are active: the router's logits are so small (`SHARPNESS`) that all probabilities are nearly 1 / E, and E
is part of `down_proj`.

Shapes: T tokens, H hidden size, I width of the MLP, E experts, G = I / E.
"""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .block import DeepseekR1SparseMoeBlock
from .mlp import DeepseekR1MLP

SHARPNESS = 1e-3
"""Logit per factor of e in the predicted size of an expert's output; weights are wrong by about so much."""
SHARES = 10
"""Parts of its slots, 0, 1 / 10, ..., that a layer may leave out."""
_ROUNDS = 8
_RIDGE = 1e-3


@torch.no_grad()
def split_mlps(
    model: PreTrainedModel, windows: torch.Tensor, num_experts: int, layers: Sequence[int] | None = None
) -> PreTrainedModel:
    """A model with experts in place of its MLPs, all of them active: the same function up to `SHARPNESS`.

    `set_active_share` then lets tokens leave some out; saved, loaded and trained, it is a model like any other.

    Args:
        model: a causal language model of this library.
        windows: `[N, n]` token ids of the text that neurons are grouped by and routers fitted to; some thousand tokens.
        num_experts: groups of neurons in each layer.
        layers: numbers of the layers; default: all.

    Raises:
        ValueError: layers that have experts or biases or cannot be divided, or fewer tokens than the hidden size.
    """
    config = model.config
    layers = list(range(config.num_hidden_layers)) if layers is None else sorted(set(layers))
    _check(config, windows, num_experts, layers)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def look(number: int, mlp: DeepseekR1MLP, args) -> None:
        rows = args[0].flatten(0, -2)
        neurons = mlp.act_fn(mlp.gate_proj(rows)) * mlp.up_proj(rows)
        groups = group_neurons(neurons.float() * mlp.down_proj.weight.float().norm(dim=0), num_experts)
        parts = [F.linear(neurons[:, group], mlp.down_proj.weight[:, group]) for group in groups]
        sizes = torch.stack([part.float().norm(dim=-1).clamp(min=1e-9).log() for part in parts], 1)
        found[number] = groups, SHARPNESS * _fitted(rows.float(), sizes)

    hooks = [model.base_model.layers[number].mlp.register_forward_pre_hook(partial(look, number)) for number in layers]
    with _removed(hooks):
        model.base_model(windows.to(model.device), use_cache=False)
    return _with_experts(model, found, num_experts)


def _check(config, windows: torch.Tensor, num_experts: int, layers: Sequence[int]) -> None:
    for number in layers:
        if number not in range(config.num_hidden_layers):
            raise ValueError(f"layer {number} does not exist; layers are numbered 0 ... {config.num_hidden_layers - 1}")
        layer = config.per_layer_config[number]
        if config.is_sparse(number):
            raise ValueError(f"layer {number} has experts already; surgery.split_experts divides those")
        if layer.mlp_bias or num_experts < 2 or layer.intermediate_size % num_experts:
            what = "it has biases" if layer.mlp_bias else f"its width {layer.intermediate_size} must be divisible by 2 or more"
            raise ValueError(f"layer {number}: the MLP cannot be cut into {num_experts} experts, {what}")
    routing = getattr(config, "routing", None)
    if any(config.is_sparse(number) for number in range(config.num_hidden_layers)) or routing:
        raise ValueError("the model has experts in other layers, whose settings would have to be the same")
    if windows.numel() < config.hidden_size:
        raise ValueError(f"{windows.numel()} tokens are too few to fit routers of {config.hidden_size} numbers to each expert")


def group_neurons(activity: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Balanced k-means: `[E, I / E]` numbers of neurons whose activity `[T, I]` goes together, each group in ascending order."""
    columns = activity.abs().T
    columns = F.normalize(columns - columns.mean(1, keepdim=True), dim=-1)
    size, generator = len(columns) // num_experts, torch.Generator().manual_seed(0)
    centres = columns[torch.randperm(len(columns), generator=generator)[:num_experts].to(columns.device)]
    for _ in range(_ROUNDS):
        groups = _dealt((columns @ centres.T).cpu(), size)
        centres = F.normalize(columns[groups].mean(1), dim=-1)
    return groups


def _dealt(likeness: torch.Tensor, size: int) -> torch.Tensor:
    """Every neuron to the expert that it is most like, among those with room; the clearest cases choose first."""
    best = likeness.topk(2, -1).values
    groups: list[list[int]] = [[] for _ in range(likeness.shape[1])]
    preferred = likeness.argsort(-1, descending=True).tolist()
    for neuron in (best[:, 1] - best[:, 0]).argsort().tolist():
        next(groups[expert] for expert in preferred[neuron] if len(groups[expert]) < size).append(neuron)
    return torch.tensor([sorted(group) for group in groups])


def _fitted(rows: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Ridge regression `[E, H]` of `sizes` `[T, E]`, less their mean over the experts, on `rows` `[T, H]`."""
    wanted = sizes - sizes.mean(1, keepdim=True)
    products = rows.T @ rows
    products.diagonal().add_(_RIDGE * products.diagonal().mean())
    return torch.linalg.solve(products, rows.T @ wanted).T


def _with_experts(model, found: Mapping[int, tuple[torch.Tensor, torch.Tensor]], num_experts: int) -> PreTrainedModel:
    old = model.config
    kinds = ["sparse" if number in found else "dense" for number in range(old.num_hidden_layers)]
    fields = old.to_dict() | {"mlp_layer_types": kinds, "num_experts": num_experts, "num_experts_per_tok": num_experts}
    fields |= {"norm_topk_prob": False, "routing": {"expert_topology": None, "min_experts_per_tok": 1}}
    fields |= {"moe_intermediate_size": fields["intermediate_size"] // num_experts, "router_aux_loss_coef": 0.0}
    overrides = {int(number): dict(values) for number, values in (fields.get("per_layer_config") or {}).items()}
    for number in found:
        if "intermediate_size" in overrides.get(number, {}):
            overrides[number]["moe_intermediate_size"] = overrides[number]["intermediate_size"] // num_experts
    config = type(old).from_dict(fields | {"per_layer_config": overrides or None})
    new = type(model)._from_config(config, dtype=model.dtype, attn_implementation=old._attn_implementation)
    state, source = new.state_dict(), model.state_dict()
    state |= {name: tensor for name, tensor in source.items() if name in state}
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    for number, (groups, router) in found.items():
        name = f"{prefix}layers.{number}.mlp."
        gate, up, down = (source[f"{name}{part}_proj.weight"] for part in ("gate", "up", "down"))
        state[f"{name}experts.gate_up_proj"] = torch.cat((gate[groups], up[groups]), 1)
        state[f"{name}experts.down_proj"] = num_experts * down[:, groups].transpose(0, 1)
        state[f"{name}router.scores.weight"] = router
    new.load_state_dict(state)
    if model.can_generate():
        new.generation_config = model.generation_config
    return new.to(model.device).train(model.training)


@torch.no_grad()
def set_active_share(model: PreTrainedModel, windows: torch.Tensor, share: float) -> dict[int, float]:
    """Sets the thresholds of a model from `split_mlps` so that a text's tokens have a mean share of the experts active.

    Each layer is asked how much of the squared size of its hidden states it would lose with 1 / 10, 2 / 10, ... of its slots; the
    slots that cost least are then left out, wherever they are. All tokens count alike: in some models a few have hidden states
    a thousand times as large as the others.

    Args:
        windows: `[N, n]` token ids.
        share: of the experts of all layers, in (0, 1].

    Returns:
        Number of a layer -> share of its experts that is active.

    Raises:
        ValueError: a share outside of (0, 1], or a router that has no threshold.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie in (0, 1]")
    blocks = {
        n: layer.mlp for n, layer in enumerate(model.base_model.layers) if isinstance(layer.mlp, DeepseekR1SparseMoeBlock)
    }
    if not blocks or any(block.router.threshold is None for block in blocks.values()):
        raise ValueError("set_active_share needs layers whose number of active experts varies (min_experts_per_tok)")
    for block in blocks.values():
        block.router.threshold.zero_()
    options: dict[int, list[tuple[float, torch.Tensor, float]]] = {}
    sizes: dict[int, torch.Tensor] = {}

    def look(number: int, block: DeepseekR1SparseMoeBlock, args, output) -> None:
        options[number] = _options(block, args[0].flatten(0, -2), output[2].flatten(0, -2), output[3].flatten(0, -2))

    def measure(number: int, layer, args, output) -> None:
        sizes[number] = output[0].flatten(0, -2).float().square().sum(-1)

    hooks = [block.register_forward_hook(partial(look, number)) for number, block in blocks.items()]
    hooks += [model.base_model.layers[number].register_forward_hook(partial(measure, number)) for number in blocks]
    with _removed(hooks):
        model.base_model(windows.to(model.device), use_cache=False)
    chosen = dict.fromkeys(blocks, 0)
    while sum(options[number][step][0] for number, step in chosen.items()) / len(blocks) > share:
        steps = {number: options[number][step : step + 2] for number, step in chosen.items() if step + 1 < len(options[number])}
        if not steps:
            break
        prices = {
            number: float(((after[1] - before[1]) / sizes[number]).mean()) / max(before[0] - after[0], 1e-9)
            for number, (before, after) in steps.items()
        }
        chosen[min(prices, key=prices.get)] += 1
    for number, step in chosen.items():
        blocks[number].router.threshold.fill_(options[number][step][2])
    return {number: options[number][step][0] for number, step in chosen.items()}


def _options(block, rows: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> list[tuple[float, torch.Tensor, float]]:
    """(active share, squared size of what each token leaves out, threshold), from all active to few."""
    ordered, found = weights.flatten().sort().values, []
    for step in range(SHARES):
        threshold = float(ordered[len(ordered) * step // SHARES]) if step else 0.0
        out = weights < threshold
        out[:, 0] = False
        lost = block.experts(rows, index.masked_fill(~out, 0), weights.masked_fill(~out, 0.0))
        found.append((1 - float(out.float().mean()), lost.float().square().sum(-1), threshold))
    return found


@contextmanager
def _removed(hooks):
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
