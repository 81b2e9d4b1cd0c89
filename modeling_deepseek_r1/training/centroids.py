"""Centroids of routed layers follow the keys while these are trained (the moving average of Routing Transformer,
https://arxiv.org/abs/2003.05997).

Statistics gather in the forward passes and the centroids move once per optimizer step, so that all micro-batches of a step are
routed alike. `CentroidUpdate` does this in any Trainer; in a loop of your own call `move_centroids(model)` after
`optimizer.step()`.
"""

import torch
from torch import nn

from ..attention.gate import DeepseekR1Router
from .statistics import StatisticsUpdate, reduction


def routers(model: nn.Module) -> list[DeepseekR1Router]:
    """The routers of a model, wrapped or not."""
    return [module for module in model.modules() if isinstance(module, DeepseekR1Router)]


@torch.no_grad()
def move_centroids(model: nn.Module, decay: float = 0.99) -> None:
    """Moves every router's centroids by what it has gathered since the last call, added up over all ranks.

    Raises:
        ValueError: a decay outside of [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} must lie in [0, 1]")
    for router in routers(model):
        router.move_centroids(decay, reduction())


class CentroidUpdate(StatisticsUpdate):
    """Keeps the centroids of routed layers where the keys are.

    Args:
        decay: share of the old centroid that a step keeps.

    Raises:
        ValueError: when training begins, if the model has no routed layer.
    """

    missing = "the model has no local_routed_attention layer whose centroids could move"

    def __init__(self, decay: float = 0.99):
        self.decay = decay

    def routers(self, model: nn.Module) -> list[nn.Module]:
        return routers(model)

    def move(self, model: nn.Module) -> None:
        move_centroids(model, self.decay)
