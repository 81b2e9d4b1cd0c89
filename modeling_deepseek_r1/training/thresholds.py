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


@torch.no_grad()
def fit_thresholds(model: nn.Module, windows: torch.Tensor, target: float) -> dict[int, float]:
    """Sets every threshold so that the tokens of a text have `target` experts on average in every sparse layer, without training.

    A layer's threshold changes what later layers get; it is set from what they get with the thresholds that were there before.

    Args:
        model: one of this library, with `min_experts_per_tok` below `num_experts_per_tok`.
        windows: `[N, n]` token ids.

    Returns:
        Number of a sparse layer, counted among these, -> its threshold.

    Raises:
        ValueError: no layer with a threshold, or a target that one cannot have.
    """
    routers = [module for module in model.modules() if isinstance(module, DeepseekR1ExpertRouter)]
    routers = [router for router in routers if router.threshold is not None]
    if not routers:
        raise ValueError("no layer has routing['min_experts_per_tok'] below num_experts_per_tok, so none has a threshold")
    found: dict[int, list[torch.Tensor]] = {number: [] for number in range(len(routers))}
    hooks = []
    for number, router in enumerate(routers):
        if not router.minimum <= target <= router.slots:
            raise ValueError(f"target={target} must lie between {router.minimum} and {router.slots} experts")

        def keep(module, args, routed, seen=found[number]):
            seen.append(routed.logits.softmax(-1).topk(module.slots, -1).values[:, module.minimum :])

        hooks.append(router.register_forward_hook(keep))
    try:
        model.base_model(windows.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for number, router in enumerate(routers):
        further = torch.cat(found[number])
        wanted = round((target - router.minimum) * len(further))
        ordered = further.flatten().sort(descending=True).values
        router.threshold.fill_(float(ordered[wanted - 1]) if wanted else 1.0)
    return {number: float(router.threshold) for number, router in enumerate(routers)}


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
