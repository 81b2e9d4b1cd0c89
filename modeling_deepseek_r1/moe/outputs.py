"""What a router says, and model outputs that carry it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


class RouterOutput(NamedTuple):
    """The choice of one sparse layer for T tokens, E experts and K slots.

    Attributes:
        logits: `[T, E]` float32; their softmax is the probability of each expert.
        top_k_weights: `[T, K]` float32; 0 = the slot is inactive.
        top_k_index: `[T, K]`; 0 in an inactive slot.
    """

    logits: torch.Tensor
    top_k_weights: torch.Tensor
    top_k_index: torch.Tensor


def slot_counts(routed: RouterOutput, real: torch.Tensor | None) -> torch.Tensor:
    """`[E]` float32: how many active slots of real tokens each expert has."""
    active = (routed.top_k_weights.detach() != 0).float()
    if real is not None:
        active = active * real.to(active)[:, None]
    counts = torch.zeros(routed.logits.shape[-1], device=active.device)
    return counts.scatter_add_(0, routed.top_k_index.flatten(), active.flatten())


@dataclass
class DeepseekR1ModelOutputWithPast(MoeModelOutputWithPast):
    """Adds what the routers chose, one `RouterOutput` per sparse layer, in training or where `router_logits` are asked for."""

    routed: tuple[RouterOutput, ...] | None = None


@dataclass
class DeepseekR1CausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """Adds the parts of `aux_loss`, before their ratios and before scaling, for logging."""

    balance_loss: torch.Tensor | None = None
    router_z_loss: torch.Tensor | None = None
    expert_cost: torch.Tensor | None = None
