"""Biases of sparse layers move against an uneven load of their experts, instead of or beside the balance loss.

A forward in training counts the slots that each expert got from real tokens, and the biases move once per optimizer step, as in
DeepSeek-V3 (https://arxiv.org/abs/2408.15664). `BiasUpdate` does this in any Trainer; in a loop of your own set
`gathers_statistics` of the routers and call `move_balance_biases(model)` after `optimizer.step()`. With
`router_aux_loss_coef=0` there is no auxiliary loss besides.
"""

import torch
from torch import nn

from ..moe.gates import DeepseekR1ExpertRouter
from .statistics import StatisticsUpdate, reduction


def biased_routers(model: nn.Module) -> list[DeepseekR1ExpertRouter]:
    """The routers of a model, wrapped or not, that have a balance bias."""
    routers = [module for module in model.modules() if isinstance(module, DeepseekR1ExpertRouter)]
    return [router for router in routers if router.balance_bias is not None]


@torch.no_grad()
def move_balance_biases(model: nn.Module, rate: float = 0.001) -> None:
    """Moves every balance bias by what its router has counted since the last call, added up over all ranks.

    Args:
        rate: change of each expert's bias, as a probability.

    Raises:
        ValueError: a rate that is not positive.
    """
    if rate <= 0:
        raise ValueError(f"rate={rate} must be positive")
    for router in biased_routers(model):
        router.move_balance_bias(rate, reduction())


class BiasUpdate(StatisticsUpdate):
    """Moves the balance biases of sparse layers towards an even load, or that of `domain_weights`.

    Args:
        rate: change of each expert's bias per step, as a probability.

    Raises:
        ValueError: when training begins, if no layer has a bias.
    """

    missing = "no layer has routing['bias_balancing'], so no bias could move"

    def __init__(self, rate: float = 0.001):
        self.rate = rate

    def routers(self, model: nn.Module) -> list[nn.Module]:
        return biased_routers(model)

    def move(self, model: nn.Module) -> None:
        move_balance_biases(model, self.rate)

    def forget(self, router: nn.Module) -> None:
        router.load = None
