"""Which modules of a model are quantized, and what takes their place."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..moe.experts import DeepseekR1Experts, DeepseekR1LowRankExperts
from .formats import Format
from .modules import QuantizedEmbedding, QuantizedExperts, QuantizedHead, QuantizedLinear, QuantizedLowRankExperts

UNTOUCHED = re.compile(
    r"(^|\.)(router|global_tokens|shared_expert_gate|bridge|fusion|\w*adapter|adapters|task_gate|expert_adapter)(\.|$)"
)
"""Parts that are small and decide much: routers, gates, centroids, and what joins modalities."""
ADAPTER = re.compile(r"\.(lora_\w+|base_layer|expert_adapter)$")

REPLACEMENTS = {
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
    DeepseekR1Experts: QuantizedExperts,
    DeepseekR1LowRankExperts: QuantizedLowRankExperts,
}


@dataclass(frozen=True)
class Target:
    """A module to be quantized.

    Attributes:
        name: in the model. module: one of `REPLACEMENTS`, exactly.
        format: how it will be stored. input_scale: whether with a scale per input.
    """

    name: str
    module: nn.Module
    format: Format
    input_scale: bool = False

    def empty(self) -> nn.Module:
        """What takes its place, with nothing in it yet."""
        return REPLACEMENTS[type(self.module)](self.module, self.format, self.input_scale)


def targets(model: PreTrainedModel, config) -> list[Target]:
    """What a configuration quantizes in a model: linear layers and experts inside the blocks, and the embedding with the head.

    Convolutions, norms, positions, heads of classifiers and `UNTOUCHED` stay as they are.

    Args:
        config: a `DeepseekR1QuantizationConfig`.

    Raises:
        ValueError: nothing is there to be quantized, groups that do not divide a layer's inputs, a module to be kept that does
            not exist, or adapters that have not been merged.
    """
    names = [name for name, _ in model.named_modules()]
    adapter = next((name for name in names if ADAPTER.search(name)), None)
    if adapter is not None:
        raise ValueError(f"{adapter} belongs to an adapter; merge it first, or quantize the model before it gets adapters")
    unknown = sorted(set(config.modules_to_not_convert) - set(names))
    if unknown:
        raise ValueError(f"modules_to_not_convert: the model has no module {unknown[0]!r}")
    found = [*_embeddings(model, config), *_inside_blocks(model, config)]
    kept = tuple(f"{name}." for name in config.modules_to_not_convert)
    found = [target for target in found if not f"{target.name}.".startswith(kept)] if kept else found
    if not found:
        raise ValueError(f"{type(model).__name__} has nothing that could be quantized")
    for target in found:
        for part in _shapes(target.module):
            try:
                target.format.buffers(part)
            except ValueError as error:
                raise ValueError(f"{target.name}: {error}") from error
    return found


def _shapes(module: nn.Module) -> Iterator[tuple[int, ...]]:
    if isinstance(module, DeepseekR1LowRankExperts):
        for name in QuantizedLowRankExperts.FACTORS:
            shape = tuple(getattr(module, name).shape)
            yield (shape[0], shape[2], shape[1]) if name in QuantizedLowRankExperts.TRANSPOSED else shape
    elif isinstance(module, DeepseekR1Experts):
        yield from (tuple(module.gate_up_proj.shape), tuple(module.down_proj.shape))
    else:
        yield tuple(module.weight.shape)


def _embeddings(model: PreTrainedModel, config) -> list[Target]:
    format = config.embedding_format
    if format is None:
        return []
    modules = {id(module): module for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    kinds = (nn.Linear, nn.Embedding)
    return [Target(name, m, format) for name, m in model.named_modules() if id(m) in modules and type(m) in kinds]


def _inside_blocks(model: PreTrainedModel, config) -> list[Target]:
    found = []
    for name, module in model.named_modules():
        is_block_part = re.search(r"(^|\.)(layers?|blocks?|h)\.\d+\.", name) is not None
        if not is_block_part or UNTOUCHED.search(name):
            continue
        if type(module) in (nn.Linear, DeepseekR1Experts, DeepseekR1LowRankExperts):
            found.append(Target(name, module, config.format, config.input_scales))
    return found


def replace(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Puts a module in the place of another."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def replace_all(model: PreTrainedModel, config) -> None:
    """Empty quantized modules in the place of all targets of a model on the meta device."""
    with torch.device("meta"):
        for target in targets(model, config):
            # A replacement of low-rank experts takes over the layers that are there at that moment.
            replaced = model.get_submodule(target.name)
            replace(model, target.name, Target(target.name, replaced, target.format, target.input_scale).empty())
    tie_head(model)


def tie_head(model: PreTrainedModel) -> None:
    """A tied head gets nothing of its own: it reads the embedding, and transformers has nothing left to tie."""
    tied = dict(model.all_tied_weights_keys)
    for head, embedding in model.all_tied_weights_keys.items():
        name, module = head.rpartition(".")[0], model.get_submodule(embedding.rpartition(".")[0])
        if isinstance(module, QuantizedEmbedding):
            replace(model, name, QuantizedHead(module))
            del tied[head]
    model.all_tied_weights_keys = model._tied_weights_keys = tied
