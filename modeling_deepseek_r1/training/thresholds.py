"""Thresholds of sparse layers follow the number of experts that a token should have on average.

A forward in training counts the active experts of real tokens, and the thresholds move once per optimizer step, so that all
micro-batches of a step are routed alike. `ThresholdUpdate` does this in any Trainer; in a loop of your own set
`gathers_statistics` of the routers and call `move_thresholds(model)` after `optimizer.step()`.
"""

import torch
from torch import nn

from ..moe.gates import DeepseekR1ExpertRouter
from .statistics import StatisticsUpdate, reduction


def adaptive_routers(model: nn.Module) -> list[DeepseekR1ExpertRouter]:
    """The routers of a model, wrapped or not, that have a target."""
    routers = [module for module in model.modules() if isinstance(module, DeepseekR1ExpertRouter)]
    return [router for router in routers if router.target_experts is not None]


@torch.no_grad()
def move_thresholds(model: nn.Module, rate: float = 0.05) -> None:
    """Moves every threshold by what its router has counted since the last call, added up over all ranks.

    Args:
        rate: change of a threshold's logarithm per expert too many.

    Raises:
        ValueError: a rate that is not positive.
    """
    if rate <= 0:
        raise ValueError(f"rate={rate} must be positive")
    for router in adaptive_routers(model):
        router.move_threshold(rate, reduction())


class ThresholdUpdate(StatisticsUpdate):
    """Moves the thresholds of sparse layers towards `target_experts_per_tok`.

    Args:
        rate: change of a threshold's logarithm per expert too many.

    Raises:
        ValueError: when training begins, if no layer has a target.
    """

    missing = "no layer has routing['target_experts_per_tok'], so no threshold could move"

    def __init__(self, rate: float = 0.05):
        self.rate = rate

    def routers(self, model: nn.Module) -> list[nn.Module]:
        return adaptive_routers(model)

    def move(self, model: nn.Module) -> None:
        move_thresholds(model, self.rate)
