"""Experts as other families store them: one tensor per expert and projection, or packed as here, under their own names.

    this library                   model.layers.N.mlp.experts.gate_up_proj [E, 2I, H]     ...experts.down_proj [E, H, I]
    Qwen2-MoE, Qwen3-MoE, OLMoE    model.layers.N.mlp.experts.0.gate_proj.weight [I, H], ...up_proj..., ...down_proj... [H, I]
    Mixtral                        model.layers.N.block_sparse_moe.experts.0.w1.weight [I, H], ...w3..., ...w2... [H, I]

Routers are `mlp.router.scores.weight` here and `gate.weight` in the block there. transformers keeps experts packed in memory, as
this library does, and writes them one by one unless told otherwise (`save_original_format=False`).
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch

from .families import FAMILIES, Family, Mixture
from .plan import Recipe, TensorPlan
from .report import name_list
from .source import FolderSource
from .write import TensorInfo

ROUTER, THEIR_ROUTER = ".mlp.router.scores.weight", ".mlp.gate.weight"
GATE_UP, DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


def open_mixture(folder: FolderSource) -> "MixtureSource | None":
    """The folder as a source of packed experts, or None if its family has no experts."""
    family = FAMILIES.get(folder.config.get("model_type"))
    return MixtureSource(folder, family.mixture) if family is not None and family.mixture is not None else None


class MixtureSource(FolderSource):
    """A folder of a family with experts, under this library's names; a packed tensor is put together when it is read.

    Raises:
        ValueError: an expert that lacks a tensor, or whose tensor has another shape or dtype than those of the others.
    """

    def __init__(self, folder: FolderSource, mixture: Mixture):
        self.path, self.config, self._files = folder.path, folder.config, folder._files
        self._stored = folder.tensors
        self._places = _places(self._stored, mixture, str(self.path))

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, place in self._places.items():
            first = self._stored[place if isinstance(place, str) else place[0][0]]
            if not isinstance(place, str):
                first = TensorInfo((len(place), len(place[0]) * first.shape[0], first.shape[1]), first.dtype)
            infos[name] = first
        return infos

    def read(self, name: str) -> torch.Tensor:
        place = self._places[name]
        if isinstance(place, str):
            return super().read(place)
        info = self.tensors[name]
        packed = torch.empty(info.shape, dtype=info.dtype)
        for expert, parts in zip(packed, place, strict=True):
            for rows, part in zip(expert.chunk(len(parts)), parts, strict=True):
                rows.copy_(super().read(part))
        return packed


def _places(stored: dict[str, TensorInfo], mixture: Mixture, where: str) -> dict[str, str | list[list[str]]]:
    """Name here -> name in the files; of a packed tensor, the names of the parts of every expert."""
    pattern = re.compile(rf"(.*)\.{mixture.block}\.experts\.(\d+)\.({'|'.join(mixture.projections)})\.weight")
    gate, up, down = mixture.projections
    places: dict[str, str | list[list[str]]] = {}
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in stored:
        match = pattern.fullmatch(name)
        if match:
            numbers[match[1]].add(int(match[2]))
        else:
            places[name.replace(f".{mixture.block}.", ".mlp.").replace(THEIR_ROUTER, ROUTER)] = name
    count, problems, missing = 1 + max((max(found) for found in numbers.values()), default=0), [], []
    for layer in numbers:
        for packed, projections in ((GATE_UP, (gate, up)), (DOWN, (down,))):
            experts = [
                [f"{layer}.{mixture.block}.experts.{number}.{projection}.weight" for projection in projections]
                for number in range(count)
            ]
            names = [name for parts in experts for name in parts]
            missing += [name for name in names if name not in stored]
            present = [name for name in names if name in stored]
            problems += [
                f"{name} is {list(stored[name].shape)}, {stored[name].dtype}, unlike {present[0]}"
                for name in present
                if stored[name] != stored[present[0]] or len(stored[name].shape) != 2
            ]
            places[layer + packed] = experts
    if missing:
        problems.insert(0, f"missing: {name_list(missing)}")
    if problems:
        raise ValueError(f"the experts of {where} do not fit together: {'; '.join(problems)}")
    return places


def family_plan(plan: TensorPlan, family: Family) -> TensorPlan:
    """A plan of this library's tensors as one of the same tensors in the family's layout, with one tensor per expert."""
    if family.mixture is None:
        return plan
    tensors: dict[str, TensorInfo] = {}
    made: dict[str, Recipe] = {}
    for name, info in plan.tensors.items():
        for theirs, shape, recipe in _family_tensors(name, info.shape, family.mixture):
            tensors[theirs] = TensorInfo(shape, info.dtype)
            made |= {theirs: recipe} if theirs != name else {}
    return replace(plan, tensors=tensors, made=made)


def _family_tensors(name: str, shape: tuple[int, ...], mixture: Mixture) -> Iterator[tuple[str, tuple[int, ...], Recipe]]:
    """Name, shape and recipe of what the family has in place of one tensor."""
    theirs = name.replace(ROUTER, THEIR_ROUTER).replace(".mlp.", f".{mixture.block}.")
    if not name.endswith((GATE_UP, DOWN)):
        yield theirs, shape, lambda read: read(name)
        return
    projections = mixture.projections[:2] if name.endswith(GATE_UP) else mixture.projections[2:]
    rows = shape[1] // len(projections)
    for number in range(shape[0]):
        for piece, projection in enumerate(projections):
            part = f"{theirs.rpartition('.')[0]}.{number}.{projection}.weight"
            yield part, (rows, shape[2]), _rows(name, number, slice(piece * rows, (piece + 1) * rows))


def _rows(name: str, number: int, rows: slice) -> Recipe:
    # Reading maps the file: no more than these rows comes into memory.
    return lambda read: read(name)[number, rows]
