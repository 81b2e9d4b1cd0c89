"""What local_global layers add to a checkpoint: gates that let nodes count like near keys, and a memory that hardly counts.

A converted model has normalised its attention without the memory, so that whatever weight the memory starts with is taken from
the other keys, also where its values are zero: slots with a logit of zero each outweigh many heads' keys. So all slots of a
layer together start with the weight of one key with the logit `START_LOGIT`. Keys and values are small and random, because equal
slots would stay equal in training; the keys must be small for any size of the queries.
"""

import math
from dataclasses import replace

import torch

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from .plan import Recipe, TensorPlan
from .source import Source
from .upcycle import Made, random_tensor
from .write import TensorInfo

START_LOGIT = -6.0
"""On real weights the perplexity moves by far less than a percent from here on down, and gradients shrink with the weight."""


def global_tensors(config: DeepseekR1TextConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the float32 tensors that local_global layers add to a model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer_idx, kind in enumerate(config.layer_types):
        if kind != "local_global_attention":
            continue
        layer, memory = config.per_layer_config[layer_idx], config.sparse_attention_of(layer_idx).num_memory_tokens
        own: dict[str, tuple[int, ...]] = {
            "weight": (layer.num_attention_heads, layer.hidden_size),
            "bias": (layer.num_attention_heads,),
        }
        if memory:
            slots = (layer.num_key_value_heads, memory, layer.head_dim)
            own |= {"memory_key": slots, "memory_value": slots, "memory_bias": (layer.num_attention_heads,)}
        shapes |= {f"model.layers.{layer_idx}.self_attn.global_tokens.{name}": shape for name, shape in own.items()}
    return shapes


def with_global_tokens(plan: TensorPlan, origin: Source, target: DeepseekR1TextConfig, seed: int) -> TensorPlan:
    """A plan with the tensors of local_global layers: those of the source where they fit, new ones otherwise."""
    shapes = global_tensors(target)

    def fits(name: str) -> bool:
        prefix, memory, _ = name.partition("memory_")
        # A bias that was learned for other slots says nothing about new ones.
        needed = {name, f"{prefix}memory_key"} if memory else {name}
        return all(part in origin.tensors and origin.tensors[part].shape == shapes[part] for part in needed)

    kept = [name for name in shapes if fits(name)]
    made = {
        name: _recipe(name, shape, shapes, target.initializer_range, seed) for name, shape in shapes.items() if name not in kept
    }
    return replace(
        plan,
        tensors=plan.tensors | {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()},
        skipped={name: reason for name, reason in plan.skipped.items() if name not in kept},
        made=plan.made | made,
    )


def _recipe(name: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]], std: float, seed: int) -> Recipe:
    if name.endswith(("memory_key", "memory_value")):
        return random_tensor(name, shape, std, seed)
    if name.endswith("memory_bias"):
        slots = shapes[name.removesuffix("bias") + "key"][1]
        return Made((), lambda: torch.full(shape, START_LOGIT - math.log(slots)))
    return Made((), lambda: torch.zeros(shape))
