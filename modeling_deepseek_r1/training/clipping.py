"""Gradient clipping that knows from the history of norms what is unusual (ZClip, https://arxiv.org/abs/2504.02507).

Moving means of the norm and of its variance tell by how many standard deviations z a norm lies above the mean. Beyond the
threshold it is cut to `mean + threshold^2 / z` deviations: the more unusual, the smaller. Norms that drift, as they do over a
training, are left alone, unlike with a fixed bound; unlike with a percentile of the history (AutoClip,
https://arxiv.org/abs/2007.14469), steps that are not unusual are not cut, and the state is two numbers.
"""

import math

from torch import nn

from .statistics import HistoryCallback, gradients, total_norm


class AdaptiveClipping(HistoryCallback):
    """Cuts spikes of the gradient, in any Trainer with `max_grad_norm=0`; a bound given there would cut first.

    Gradients that are not finite are dropped, and with them the optimizer step.

    Args:
        threshold: standard deviations above the mean norm from which on a norm is cut.
        decay: share of the old means that a step keeps.
        warmup: steps from which the first means are taken. They are cut at three times the median of those before them.

    Attributes:
        mean, variance: of the norms, cut ones as they were cut; None in the warm-up.
        clipped, dropped: steps that were.

    Raises:
        ValueError: numbers that make no sense; when training begins, a Trainer that clips itself, DeepSpeed.
    """

    arguments = ("threshold", "decay", "warmup")
    history = ("mean", "variance", "first_norms", "clipped", "dropped")

    def __init__(self, threshold: float = 2.5, decay: float = 0.97, warmup: int = 25):
        if threshold <= 0 or not 0 < decay < 1 or warmup < 2:
            raise ValueError(f"threshold={threshold} must be positive, decay={decay} in (0, 1), warmup={warmup} at least 2")
        self.threshold, self.decay, self.warmup = threshold, decay, warmup
        self.mean: float | None = None
        self.variance: float | None = None
        self.first_norms: list[float] = []
        self.clipped = self.dropped = 0

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if args.max_grad_norm > 0:
            raise ValueError(f"AdaptiveClipping: the Trainer clips already, at max_grad_norm={args.max_grad_norm}; set it to 0")
        if args.deepspeed:
            raise ValueError("AdaptiveClipping: DeepSpeed keeps gradients to itself; use its own gradient_clipping")

    def on_pre_optimizer_step(self, args, state, control, model: nn.Module = None, **kwargs):
        found = gradients(model)
        if not found:
            return
        norm = total_norm(found)
        if not math.isfinite(norm):
            self.dropped += 1
            for parameter in model.parameters():
                parameter.grad = None
            return
        kept = self.bound(norm)
        if kept < norm:
            self.clipped += 1
            for gradient in found:
                gradient.mul_(kept / norm)
        self._remember(kept)

    def bound(self, norm: float) -> float:
        """What a gradient of this norm is cut to; the norm itself where it is not unusual."""
        if self.mean is None:
            known = sorted(self.first_norms)
            return min(norm, 3 * known[len(known) // 2]) if len(known) >= 3 else norm
        deviation = math.sqrt(self.variance)
        if norm - self.mean <= self.threshold * deviation:
            return norm
        # With z = (norm - mean) / deviation this is mean + threshold^2 / z * deviation, also for a deviation of zero.
        return self.mean + self.threshold**2 * self.variance / (norm - self.mean)

    def _remember(self, norm: float) -> None:
        if self.mean is not None:
            self.mean = self.decay * self.mean + (1 - self.decay) * norm
            self.variance = self.decay * self.variance + (1 - self.decay) * (norm - self.mean) ** 2
            return
        self.first_norms.append(norm)
        if len(self.first_norms) == self.warmup:
            self.mean = sum(self.first_norms) / self.warmup
            self.variance = sum((one - self.mean) ** 2 for one in self.first_norms) / self.warmup
            self.first_norms = []
