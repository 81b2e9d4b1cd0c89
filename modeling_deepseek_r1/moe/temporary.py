"""Experts for one task, added to a trained model, trained alone, and taken away again without a trace.

    grown, temporary = add_temporary_experts(model, measure_usage(model, windows), 2)
    Trainer(grown, ..., callbacks=[TemporaryTraining(temporary), BiasUpdate()]).train()
    model = remove_temporary_experts(grown, temporary)        # what it was before, bit for bit

They are copies of the busiest experts (`surgery.grow_experts`). The others, their routers and everything else stand still, so that
taking them away gives the old model back; keeping them needs nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .metrics import ExpertUsage
from .surgery import PER_EXPERT, grow_experts, rebuilt

_FILE = "temporary_experts.json"


@dataclass(frozen=True)
class TemporaryExperts:
    """Which experts of a model are there for a task.

    Attributes:
        places: number of a sparse layer -> numbers of its temporary experts.
        config: the configuration of the model without them.
        balance_bias: layer -> biases of the other experts before; empty where there were none.
    """

    places: dict[int, list[int]]
    config: dict[str, Any]
    balance_bias: dict[int, list[float]]

    def save(self, folder: str | Path) -> None:
        """Writes `temporary_experts.json` beside a checkpoint of the grown model."""
        (Path(folder) / _FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "TemporaryExperts":
        """Raises FileNotFoundError where the checkpoint has none."""
        values = json.loads((Path(folder) / _FILE).read_text(encoding="utf-8"))
        numbered = {name: {int(layer): row for layer, row in values[name].items()} for name in ("places", "balance_bias")}
        return cls(config=values["config"], **numbered)


def add_temporary_experts(
    model: PreTrainedModel, usage: Mapping[int, ExpertUsage], number: int | Mapping[str, int], active: bool = True
) -> tuple[PreTrainedModel, TemporaryExperts]:
    """A model with copies of the busiest experts of every sparse layer, and which they are.

    Args:
        usage: what `surgery.measure_usage` says of text of the task. number: as in `surgery.grow_experts`; errors, too.
        active: a copy comes right before its original where both suit a token, and displaces the last one chosen; false = it is
            chosen nowhere, and the function the same, until `training.BiasUpdate` raises it.
    """
    grown, origins = grow_experts(model, usage, number)
    places, biases = {}, {}
    for (layer, groups), router, before in zip(
        origins.items(), grown.base_model.routers, model.base_model.routers, strict=True
    ):
        first: dict[int, int] = {}
        for place, (expert,) in enumerate(groups):
            first.setdefault(expert, place)
        places[layer] = [place for place, (expert,) in enumerate(groups) if first[expert] != place]
        biases[layer] = before.balance_bias.tolist() if before.balance_bias is not None else []
        if active:
            originals = [first[groups[place][0]] for place in places[layer]]
            router.balance_bias[places[layer]] = router.balance_bias[originals] + 1e-6
    return grown, TemporaryExperts(places, model.config.to_dict(), biases)


def train_temporary_only(model: PreTrainedModel, temporary: TemporaryExperts) -> list:
    """Freezes everything but the temporary experts and their rows of the routers; the hooks that do it, to be removed later.

    Packed weights are one parameter: gradients of the other rows are made zero. An optimizer with weight decay would move them
    all the same.
    """
    hooks = []
    for name, parameter in model.named_parameters():
        match = PER_EXPERT.fullmatch(name)
        parameter.requires_grad_(match is not None and int(match[1]) in temporary.places)
        if parameter.requires_grad:
            mask = torch.zeros(len(parameter), *(1,) * (parameter.dim() - 1), dtype=torch.bool, device=parameter.device)
            mask[temporary.places[int(match[1])]] = True
            hooks.append(parameter.register_hook(lambda grad, mask=mask: grad * mask))
    return hooks


@torch.no_grad()
def remove_temporary_experts(model: PreTrainedModel, temporary: TemporaryExperts) -> PreTrainedModel:
    """The model without them. With everything else left alone it is the one that they were added to, bit for bit."""
    kept = {}
    for layer, places in temporary.places.items():
        count = model.config.per_layer_config[layer].num_experts
        if places and max(places) >= count:
            raise ValueError(f"layer {layer} has {count} experts, so that {places} are not its temporary ones")
        kept[layer] = [place for place in range(count) if place not in places]

    def rest(layer_idx: int, part: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if part == "router.threshold":
            return tensor
        if part == "router.balance_bias":
            before = temporary.balance_bias[layer_idx]
            return torch.tensor(before, dtype=tensor.dtype, device=tensor.device) if before else None
        return tensor[kept[layer_idx]]

    return rebuilt(model, type(model.config).from_dict(temporary.config), PER_EXPERT, rest)
