"""What modules do once per optimizer step, besides the centroids (`centroids.py`).

A module that changes by statistics instead of gradients (a threshold, a balance bias) has a method `step_statistics(reduce)`:
it moves by what it has gathered in the forwards since the last call and forgets that; `reduce` adds a tensor up over all ranks,
in place, and is None in a single process.
"""

import torch
from torch import nn
from transformers import TrainerCallback


@torch.no_grad()
def step_statistics(model: nn.Module) -> int:
    """Calls `step_statistics` of all modules that have it; returns how many those are."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    reduce = torch.distributed.all_reduce if distributed else None
    stepping = [module for module in model.modules() if hasattr(module, "step_statistics")]
    for module in stepping:
        module.step_statistics(reduce)
    return len(stepping)


class StatisticsStep(TrainerCallback):
    """`step_statistics` after every optimizer step, in any Trainer."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        step_statistics(model)
