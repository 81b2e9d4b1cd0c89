"""Fewer and fewer experts per token in the course of a training."""

from .thresholds import ThresholdUpdate


class ProgressiveSparsity(ThresholdUpdate):
    """Starts with all `num_experts_per_tok` experts, goes down to the target in equal steps, and stays there.

    It takes the place of `ThresholdUpdate`: each step sets the routers' targets, which the thresholds follow. The schedule
    depends on the number of the step alone, so that a resumed run goes on where it was.

    Args:
        dense: share of the steps with all experts. falling: share in which they become fewer; the rest has the target.
        final: experts per token at the end; default: each layer's `target_experts_per_tok`.
        rate: change of a threshold's logarithm per expert too many; more than in a training with one target, which has the time.

    Raises:
        ValueError: shares that make no sense; when training begins, no layer with a target, or one that cannot be reached.
    """

    def __init__(self, dense: float = 0.2, falling: float = 0.6, final: float | None = None, rate: float = 0.2):
        super().__init__(rate)
        if dense < 0 or falling < 0 or dense + falling > 1:
            raise ValueError(f"dense={dense} and falling={falling} must be shares of the steps, together at most 1")
        self.dense, self.falling, self.final = dense, falling, final
        self._targets: list[float] = []

    def target(self, progress: float, most: float, final: float) -> float:
        """Experts per token after `progress` (0 ... 1) of the training, between `most` and `final`."""
        if progress < self.dense or not self.falling:
            return most if progress < self.dense else final
        return most + (final - most) * min(1.0, (progress - self.dense) / self.falling)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        routers = self.routers(model)
        self._targets = [router.target_experts for router in routers]
        for router in routers:
            if self.final is not None and not router.minimum <= self.final <= router.slots:
                raise ValueError(
                    f"ProgressiveSparsity: final={self.final} must lie between {router.minimum} and {router.slots}"
                )

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        for router, target in zip(self.routers(model), self._targets, strict=True):
            final = target if self.final is None else self.final
            router.target_experts = self.target(state.global_step / state.max_steps, router.slots, final)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for router, target in zip(self.routers(model), self._targets, strict=True):
            router.target_experts = target
        super().on_train_end(args, state, control, model=model, **kwargs)
