"""Gradient clipping expert by expert: one that gets much of a batch does not set the step of all others."""

import torch
from torch import nn

from ..moe.block import DeepseekR1SparseMoeBlock
from .statistics import HistoryCallback


class ExpertClipping(HistoryCallback):
    """Cuts the gradient of an expert to `factor` times the median norm of the experts of its layer, in any Trainer.

    Only experts that have a gradient count for the median. The bound is relative: it may stand beside `max_grad_norm`, which acts
    before, and needs no unscaling in float16.

    Args:
        factor: of the median norm.

    Attributes:
        clipped: how often each layer's experts were cut, by the name of the module; saved.

    Raises:
        ValueError: a factor below 1; when training begins, a model without trained experts, DeepSpeed.
    """

    arguments = ("factor",)
    history = ("clipped",)

    def __init__(self, factor: float = 3.0):
        if factor < 1:
            raise ValueError(f"factor={factor} must be at least 1")
        self.factor = factor
        self.clipped: dict[str, list[int]] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if args.deepspeed:
            raise ValueError("ExpertClipping: DeepSpeed keeps gradients to itself")
        if not expert_parameters(model):
            raise ValueError("ExpertClipping: the model has no experts that are trained")

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.clip(model)

    @torch.no_grad()
    def clip(self, model: nn.Module) -> None:
        """Cuts the gradients of a model, wrapped or not."""
        for name, parameters in expert_parameters(model).items():
            grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if not grads:
                continue
            norms = torch.stack([grad.flatten(1).float().norm(dim=1) for grad in grads]).norm(dim=0)
            used = norms[norms > 0]
            if not len(used):
                continue
            shares = (self.factor * used.median() / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
            for grad in grads:
                grad.mul_(shares[:, None, None].to(grad.dtype))
            before = self.clipped.get(name, [0] * len(norms))
            self.clipped[name] = [old + new for old, new in zip(before, (shares < 1).tolist(), strict=True)]


def expert_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Name of a module -> its trained parameters `[experts, ...]`, for the experts of every sparse layer and trained parts of some."""
    found = {}
    for name, block in model.named_modules():
        if isinstance(block, DeepseekR1SparseMoeBlock):
            for part, module in (("experts", block.experts), ("expert_adapter", block.expert_adapter)):
                packed = [p for p in module.parameters() if p.dim() == 3 and p.requires_grad] if module is not None else []
                if packed:
                    found[f"{name}.{part}"] = packed
    return found
