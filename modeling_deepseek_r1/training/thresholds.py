"""Thresholds of sparse layers follow the number of experts that a token should have on average.

A forward in training counts the active experts of real tokens, and the thresholds move once per optimizer step, so that all
micro-batches of a step are routed alike. `ThresholdUpdate` does this in any Trainer; in a loop of your own set
`gathers_statistics` of the routers and call `move_thresholds(model)` after `optimizer.step()`.
"""

import torch
from torch import nn
from transformers import TrainerCallback

from ..moe.gates import DeepseekR1ExpertRouter


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
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for router in adaptive_routers(model):
        router.move_threshold(rate, torch.distributed.all_reduce if distributed else None)


class ThresholdUpdate(TrainerCallback):
    """Moves the thresholds of sparse layers towards `target_experts_per_tok`.

    Args:
        rate: change of a threshold's logarithm per expert too many.

    Raises:
        ValueError: when training begins, if no layer has a target.
    """

    def __init__(self, rate: float = 0.05):
        self.rate = rate

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not adaptive_routers(model):
            raise ValueError("ThresholdUpdate: no layer has routing['target_experts_per_tok'], so no threshold could move")
        for router in adaptive_routers(model):
            router.gathers_statistics = True

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        move_thresholds(model, self.rate)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for router in adaptive_routers(model):
            router.gathers_statistics, router.statistics = False, None
