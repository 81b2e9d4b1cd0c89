"""Training some experts of a model, by low-rank deltas or as they are; everything else is frozen.

    selection = choose_experts(model, {"text": 6, "code": 2}, batches)
    report = attach_experts(model, selection, rank=16)        # then any Trainer
    merge_experts(model)
    detach_experts(model)                                     # the plain model again, which saves and loads as ever

Without a rank the chosen experts themselves are trained. What is trained are ordinary parameters of the model
(`...mlp.expert_adapter...`), which checkpoints of a Trainer hold besides the frozen ones.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..moe.adapters import ExpertAdapter, ExpertLora, make_adapter
from .select_experts import ExpertSelection, sparse_blocks, weighted_target
from .trainable import TrainableReport, make_report

WEIGHTS_FILE, SETTINGS_FILE = "expert_adapter.safetensors", "expert_adapter.json"
FORMAT_VERSION = 1
PEFT_WEIGHTS_FILE, PEFT_SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"


def adapters_of(model: nn.Module) -> dict[int, ExpertAdapter]:
    """Number of the layer -> its adapter, where it has one."""
    blocks = sparse_blocks(model)
    return {layer: block.expert_adapter for layer, block in blocks.items() if block.expert_adapter is not None}


def attach_experts(
    model: nn.Module,
    selection: ExpertSelection,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    train_routers: bool = False,
) -> TrainableReport:
    """Makes the chosen experts trainable and freezes the rest, except a new classification head.

    The balance loss of the layers follows the numbers of `selection.expert_config` until the adapters are detached
    (`select_experts.weighted_target`).

    Args:
        rank: of low-rank deltas; None: the experts themselves, or the factors of experts that are low-rank.
        alpha: the deltas are scaled by `alpha / rank`; default: `2 * rank`.
        train_routers: train the routers and domain gates as well.

    Raises:
        ValueError: adapters are there already, or impossible experts, ranks, kinds.
    """
    _attach(model, selection.chosen, rank, alpha)
    blocks = sparse_blocks(model)
    for block in blocks.values():
        router, adapter = block.router, block.expert_adapter
        router.requires_grad_(train_routers)
        # A layer without an adapter has none of the named domains.
        if adapter is not None:
            adapter.target_before = router.balance_target
            router.balance_target = weighted_target(router.domains, router.balance_target, selection.expert_config)
    matched = {f"experts of {name}": count for name, count in selection.counts.items()}
    return make_report(model, matched | ({"routers": len(blocks)} if train_routers else {}))


def _attach(model: nn.Module, chosen: Mapping[int, Sequence[int]], rank: int | None, alpha: float | None) -> None:
    if adapters_of(model):
        raise ValueError("the model has expert adapters already; merge or detach them first")
    blocks = sparse_blocks(model)
    missing = sorted(set(chosen) - set(blocks))
    if missing or not chosen:
        raise ValueError(f"layers {missing or 'none'} cannot have expert adapters; layers with experts: {list(blocks)}")
    adapters = {layer: make_adapter(blocks[layer].experts, experts, rank, alpha) for layer, experts in chosen.items()}
    model.requires_grad_(False)
    for layer, adapter in adapters.items():
        blocks[layer].expert_adapter = adapter
    head = getattr(model, "score", None)
    if head is not None:
        head.requires_grad_(True)


def merge_experts(model: nn.Module) -> None:
    """Puts what was trained in the place of the experts; the adapters stay, out of use, and `unmerge_experts` can undo it.

    Raises:
        ValueError: the model has no expert adapter.
    """
    for layer, adapter in _required(model).items():
        adapter.merge(sparse_blocks(model)[layer].experts)


def unmerge_experts(model: nn.Module) -> None:
    """Undoes `merge_experts`, bit for bit; ValueError as there."""
    for layer, adapter in _required(model).items():
        adapter.unmerge(sparse_blocks(model)[layer].experts)


def detach_experts(model: nn.Module) -> None:
    """Takes the adapters off: what was merged stays, and so do trained routers; what was not merged is gone. Everything is
    trainable again; ValueError as in `merge_experts`."""
    blocks = sparse_blocks(model)
    for layer, adapter in _required(model).items():
        blocks[layer].expert_adapter = None
        if adapter.target_before is not None:
            blocks[layer].router.balance_target = adapter.target_before
    model.requires_grad_(True)


def _required(model: nn.Module) -> dict[int, ExpertAdapter]:
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError("the model has no expert adapter; attach_experts or load_experts gives it some")
    return adapters


def save_experts(model: nn.Module, folder: str | Path) -> None:
    """Writes the adapters and what else is trained, for `load_experts`; ValueError as in `merge_experts`."""
    adapters, folder = _required(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(adapters.values()))
    settings = {
        "format_version": FORMAT_VERSION,
        "rank": getattr(first, "rank", None),
        "alpha": getattr(first, "alpha", None),
        "chosen": {str(layer): adapter.chosen.tolist() for layer, adapter in adapters.items()},
    }
    trained = {name: parameter.detach().contiguous() for name, parameter in (_own(model) | _others(model)).items()}
    save_file(trained, folder / WEIGHTS_FILE)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by layer and name."""
    adapters = adapters_of(model).items()
    return {f"{layer}.{name}": parameter for layer, adapter in adapters for name, parameter in adapter.named_parameters()}


def _others(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained besides: routers, a classification head."""
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad and ".expert_adapter." not in name}


def load_experts(model: nn.Module, folder: str | Path) -> TrainableReport:
    """Attaches what `save_experts` has written, to go on training or to merge. The balance loss is left as it is.

    Raises:
        OSError: no such files.
        ValueError: another format, or a model whose experts have other layers, numbers or sizes.
    """
    settings = json.loads(Path(folder, SETTINGS_FILE).read_text(encoding="utf-8"))
    if settings.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{folder} has format version {settings.get('format_version')}; {FORMAT_VERSION} is known")
    chosen = {int(layer): experts for layer, experts in settings["chosen"].items()}
    return _load(model, folder, chosen, settings["rank"], settings["alpha"], load_file(Path(folder, WEIGHTS_FILE)))


def _load(
    model: nn.Module,
    folder: str | Path,
    chosen: Mapping[int, Sequence[int]],
    rank: int | None,
    alpha: float | None,
    tensors: dict[str, torch.Tensor],
) -> TrainableReport:
    _attach(model, chosen, rank, alpha)
    named, own = dict(model.named_parameters()), _own(model)
    own |= {name: named[name].requires_grad_(True) for name in tensors if name in named}
    shapes = [{name: tensor.shape for name, tensor in side.items()} for side in (own, tensors)]
    if shapes[0] != shapes[1]:
        detach_experts(model)
        name = min(name for name in {**own, **tensors} if shapes[0].get(name) != shapes[1].get(name))
        sizes = [list(side[name]) if name in side else "missing" for side in shapes]
        raise ValueError(f"{folder} does not fit this model: {name} is {sizes[1]} there and {sizes[0]} here")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return make_report(model, {"experts": sum(map(len, chosen.values()))})


def export_peft(model: nn.Module, folder: str | Path) -> dict[str, int]:
    """Writes the low-rank deltas as a PEFT adapter with `target_parameters`, for tools that know no chosen experts: the factors
    of all experts, zero where an expert was not chosen.

    Returns:
        Bytes of the chosen experts' factors and of what was written.

    Raises:
        ValueError: experts that were trained without a rank, other things that are trained, or no adapter.
    """
    adapters, folder = _required(model), Path(folder)
    first = next(iter(adapters.values()))
    if not isinstance(first, ExpertLora):
        raise ValueError("PEFT's layout holds low-rank deltas, and these experts were trained as they are: merge them instead")
    if _others(model):
        raise ValueError(f"PEFT's layout of experts has no place for {next(iter(_others(model)))}, which is trained as well")
    tensors, targets = {}, []
    for layer, adapter in adapters.items():
        experts = sparse_blocks(model)[layer].experts
        for name in adapter.replaced:
            target, key = _peft_names(layer, name)
            targets.append(target)
            a, b = (getattr(adapter, f"{name}_{factor}").detach() for factor in "ab")
            whole_a, whole_b = (x.new_zeros(experts.num_experts, *x.shape[1:]).index_copy(0, adapter.chosen, x) for x in (a, b))
            tensors[f"{key}.lora_A.weight"] = whole_a.flatten(0, 1).contiguous()
            tensors[f"{key}.lora_B.weight"] = whole_b.permute(1, 2, 0).flatten(1).contiguous()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [],
        "target_parameters": targets,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / PEFT_WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / PEFT_SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    own = sum(parameter.nbytes for adapter in adapters.values() for parameter in adapter.parameters())
    return {"chosen": own, "written": sum(tensor.nbytes for tensor in tensors.values())}


def _peft_names(layer: int, name: str) -> tuple[str, str]:
    """A parameter in `target_parameters`, and its key: PEFT wraps the experts once for each, the first one innermost."""
    module = f"model.layers.{layer}.mlp.experts"
    return f"{module}.{name}", f"base_model.model.{module}" + (".base_layer" if name == "gate_up_proj" else "")


def import_peft(model: nn.Module, folder: str | Path) -> TrainableReport:
    """Attaches a PEFT adapter of experts, keeping the factors of those whose delta is not zero.

    Raises:
        OSError: no such files.
        ValueError: an adapter of another kind, or of other modules, or one whose deltas are all zero.
    """
    settings = json.loads(Path(folder, PEFT_SETTINGS_FILE).read_text(encoding="utf-8"))
    tensors = load_file(Path(folder, PEFT_WEIGHTS_FILE))
    rank, blocks = settings.get("r"), sparse_blocks(model)
    changed = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if settings.get(name)]
    if settings.get("peft_type") != "LORA" or changed:
        raise ValueError(f"{folder}: only plain LoRA can be read, not {settings.get('peft_type')} with {changed or 'that'}")
    chosen, factors = {}, {}
    for layer, block in blocks.items():
        pairs = {}
        for name in ExpertLora.replaced:
            a, b = (tensors.pop(f"{_peft_names(layer, name)[1]}.lora_{factor}.weight", None) for factor in "AB")
            if a is not None and b is not None:
                count = block.experts.num_experts
                pairs[name] = a.unflatten(0, (count, rank)), b.unflatten(1, (rank, count)).permute(2, 0, 1)
        if len(pairs) == len(ExpertLora.replaced):
            used = torch.stack([b.flatten(1).any(1) for _, b in pairs.values()]).any(0)
            if used.any():
                chosen[layer] = used.nonzero().flatten().tolist()
                factors |= {f"{layer}.{name}_{x}": y[used] for name, ab in pairs.items() for x, y in zip("ab", ab, strict=True)}
    if tensors or not chosen:
        raise ValueError(
            f"{folder}: {next(iter(tensors), 'every delta is zero, which')} is no low-rank delta of this model's packed experts"
        )
    return _load(model, folder, chosen, rank, settings.get("lora_alpha"), factors)


def training_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that training takes besides the weights: gradients, and the two states of AdamW."""
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return {"gradients": gradients, "optimizer": 2 * gradients}
