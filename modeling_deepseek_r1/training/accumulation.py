"""Gradient accumulation by the gradient noise scale (https://arxiv.org/abs/1812.06162): larger batches once they help.

With G the true gradient and S the trace of the covariance of a micro-batch's, `B = S / |G|^2` micro-batches are the batch beyond
which a larger one saves few steps and below which a smaller one costs no data. The squared norm of the gradient of b micro-batches
is `|G|^2 + S / b` on average; taken for b = 1 and for a whole step of the Trainer, two such norms give both unknowns.
"""

import torch
from torch import nn

from .statistics import HistoryCallback, gradients, reduction, total_norm


class AdaptiveAccumulation(HistoryCallback):
    """Merges steps of a Trainer into one optimizer step, as many as the gradient's noise asks for.

    The Trainer's `gradient_accumulation_steps` are the least; 16 of them and `highest=128` give 16 ... 128. Its loop cannot change
    that number while it runs, so the callback holds gradients back: the optimizer finds none, and does nothing, until enough of
    them have come together. `global_step` and the learning rate's schedule thus go on counting data. Checkpoints wait until nothing
    is held. Micro-batches should have about equally many labels. It goes before `AdaptiveClipping` in the list of callbacks.

    Args:
        highest: micro-batches of an optimizer step at most, per rank.
        decay: share of the old estimates that a step keeps.

    Attributes:
        noise, signal: moving means of S, in micro-batches, and |G|^2.
        merged_steps: steps of the Trainer per optimizer step at present.

    Raises:
        ValueError: numbers that make no sense; when training begins, a Trainer that clips gradients or does not accumulate, fp16,
            DeepSpeed, FSDP.
    """

    arguments = ("highest", "decay")
    history = ("noise", "signal", "merged_steps")

    def __init__(self, highest: int = 128, decay: float = 0.95):
        if highest < 2 or not 0 <= decay < 1:
            raise ValueError(f"highest={highest} must be at least 2 and decay={decay} in [0, 1)")
        self.highest, self.decay = highest, decay
        self.noise = self.signal = 0.0
        self.merged_steps = 1
        self._held: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._count = self._substeps = 0
        self._small: float | None = None
        self._save_later = False

    @property
    def noise_scale(self) -> float:
        """B, in micro-batches; infinite where noise is all that can be seen, 0 before the first step."""
        if self.signal <= 0:
            return float("inf") if self.noise > 0 else 0.0
        return max(self.noise, 0.0) / self.signal

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        steps = args.gradient_accumulation_steps
        if steps < 2 or self.highest < steps:
            raise ValueError(
                f"AdaptiveAccumulation: gradient_accumulation_steps={steps}, the least, must lie in 2 ... {self.highest}"
            )
        if args.max_grad_norm > 0:
            raise ValueError("AdaptiveAccumulation: clipping hides the norms; set max_grad_norm=0 and add AdaptiveClipping")
        if args.fp16 or args.deepspeed or args.fsdp:
            raise ValueError("AdaptiveAccumulation: gradients are scaled or sharded with fp16, DeepSpeed and FSDP")

    def on_substep_end(self, args, state, control, model: nn.Module = None, **kwargs):
        if self._substeps == 0:
            self._small = (total_norm(gradients(model)) * args.gradient_accumulation_steps) ** 2
        self._substeps += 1

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module = None, **kwargs):
        # The last step of a pass over the data may have fewer micro-batches.
        if self._substeps + 1 == args.gradient_accumulation_steps:
            self._estimate(self._small, total_norm(gradients(model)) ** 2, args)
        self._substeps = 0
        for parameter, gradient in self._held:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._held, self._count = [], self._count + 1
        if self._count < self.merged_steps and state.global_step + 1 < state.max_steps:
            self._held = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
            for parameter, _ in self._held:
                parameter.grad = None
            return
        for gradient in gradients(model):
            gradient.div_(self._count)
        self._count, self.merged_steps = 0, self.wanted_steps(args.gradient_accumulation_steps)

    def wanted_steps(self, accumulation: int) -> int:
        """Steps of the Trainer, of `accumulation` micro-batches each, that come nearest to the noise scale."""
        most = self.highest // accumulation
        return most if self.noise_scale > self.highest else max(1, min(most, round(self.noise_scale / accumulation)))

    def on_step_end(self, args, state, control, **kwargs):
        if self._count and control.should_save:
            control.should_save, self._save_later = False, True
        elif self._save_later and not self._count:
            control.should_save, self._save_later = True, False

    def _estimate(self, small: float, large: float, args) -> None:
        """Moves the means by the squared norms of one micro-batch's gradient and of the whole step's."""
        reduce, ranks = reduction(), 1
        if reduce is not None:
            ranks = torch.distributed.get_world_size()
            norm = torch.tensor(small, device=args.device)
            reduce(norm)
            small = float(norm) / ranks
        batches = args.gradient_accumulation_steps * ranks
        signal, noise = (batches * large - small) / (batches - 1), (small - large) / (1 - 1 / batches)
        # Both begin at zero alike, which their ratio does not see.
        self.signal = self.decay * self.signal + (1 - self.decay) * signal
        self.noise = self.decay * self.noise + (1 - self.decay) * noise
