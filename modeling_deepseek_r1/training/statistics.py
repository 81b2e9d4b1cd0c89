"""What callbacks have in common that move buffers by statistics, and those that keep a history of their own; and how texts are
read to measure something."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


def reduction():
    """What adds a tensor up over all ranks, in place; None for one process."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.all_reduce if distributed else None


def evaluated(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], max_tokens: float = float("inf")
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Yields the arguments of a forward without labels, and `[batch, n]` bool, false = padding, of batches as a collator makes them,
    until `max_tokens` real tokens have been yielded. Meanwhile the model is in evaluation mode."""
    was_training, device, tokens = model.training, next(model.parameters()).device, 0
    model.eval()
    try:
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
            inputs.pop("labels", None)
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            yield inputs, mask
            tokens += int(mask.sum())
            if tokens >= max_tokens:
                break
    finally:
        model.train(was_training)


class StatisticsUpdate(TrainerCallback):
    """Lets routers gather statistics in the forward passes, and moves their buffers once per optimizer step."""

    missing = ""
    """What to say where there is no router whose buffers could move."""

    def routers(self, model: nn.Module) -> list[nn.Module]:
        raise NotImplementedError

    def move(self, model: nn.Module) -> None:
        raise NotImplementedError

    def forget(self, router: nn.Module) -> None:
        """Drops what a router has gathered."""
        router.statistics = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.routers(model):
            raise ValueError(f"{type(self).__name__}: {self.missing}")
        for router in self.routers(model):
            router.gathers_statistics = True

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.move(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for router in self.routers(model):
            router.gathers_statistics = False
            self.forget(router)


class HistoryCallback(TrainerCallback, ExportableState):
    """A callback with a history that a run takes up again when it resumes, in any Trainer and without being asked.

    Trainers save the state of such callbacks, but restore it only with `restore_callback_states_from_checkpoint`.
    """

    arguments: tuple[str, ...] = ()
    """Attributes that `__init__` takes."""
    history: tuple[str, ...] = ()
    """Attributes that training changes; JSON must be able to hold them."""

    def state(self) -> dict[str, Any]:
        return {
            "args": {name: getattr(self, name) for name in self.arguments},
            "attributes": {name: getattr(self, name) for name in self.history},
        }

    def on_train_begin(self, args, state, control, **kwargs):
        name = type(self).__name__
        # A checkpoint that was made without the callback knows nothing of it, and the Trainer wants an entry.
        saved = state.stateful_callbacks.setdefault(name, self.state())
        if isinstance(saved, list):
            raise ValueError(f"{name}: the Trainer has {len(saved)} of these callbacks; one is enough")
        for attribute, value in saved["attributes"].items():
            setattr(self, attribute, value)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Of all parameters that have one."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def total_norm(tensors: list[torch.Tensor]) -> float:
    """Their Euclidean norm, over all shards."""
    norm = nn.utils.get_total_norm(tensors)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
