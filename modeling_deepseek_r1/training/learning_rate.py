"""A learning rate that falls when the loss has stopped to."""

from torch.optim.lr_scheduler import LambdaLR

from .statistics import HistoryCallback


class AdaptiveLearningRate(HistoryCallback):
    """Lowers the learning rate when the rate at which the loss decreases drowns in the loss's own noise.

    A line is fitted to the last `window` logged losses. While it falls by more than `significance` standard errors, steps of this
    size make progress. Where it does not, noise has the upper hand, which smaller steps average out: the whole schedule is
    multiplied by `factor`, and the next decision waits for a new window. The schedule itself goes on as it would.

    Args:
        window: logged losses, so `window * logging_steps` optimizer steps.
        factor: of the learning rate. lowest: share of the schedule below which it does not fall.
        significance: standard errors.

    Attributes:
        losses: those logged since the last change.
        scale: the present share of the schedule.

    Raises:
        ValueError: numbers that make no sense; when training begins, a scheduler that is no multiple of a base learning rate.
    """

    arguments = ("window", "factor", "lowest", "significance")
    history = ("losses", "scale")

    def __init__(self, window: int = 20, factor: float = 0.5, lowest: float = 0.01, significance: float = 2.0):
        if window < 3 or not 0 < factor < 1 or not 0 < lowest <= 1 or significance < 0:
            raise ValueError(
                f"window={window} must be at least 3, factor={factor} in (0, 1), lowest={lowest} in (0, 1],"
                f" significance={significance} 0 or more"
            )
        self.window, self.factor, self.lowest, self.significance = window, factor, lowest, significance
        self.losses: list[float] = []
        self.scale = 1.0

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if not isinstance(_unwrapped(lr_scheduler), LambdaLR):
            kind = type(_unwrapped(lr_scheduler)).__name__
            raise ValueError(f"AdaptiveLearningRate: {kind} is no multiple of a base learning rate; choose another schedule")

    def on_log(self, args, state, control, logs=None, optimizer=None, lr_scheduler=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        self.losses = [*self.losses, logs["loss"]][-self.window :]
        if len(self.losses) < self.window or self.scale <= self.lowest:
            return
        slope, error = fitted_slope(self.losses)
        if -slope <= self.significance * error:
            factor = max(self.factor, self.lowest / self.scale)
            self.scale, self.losses = self.scale * factor, []
            # Both are part of a Trainer's checkpoint.
            scheduler = _unwrapped(lr_scheduler)
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor


def _unwrapped(lr_scheduler):
    """The scheduler itself; accelerate wraps it."""
    return getattr(lr_scheduler, "scheduler", lr_scheduler)


def fitted_slope(values: list[float]) -> tuple[float, float]:
    """Slope of the least-squares line through equally spaced values, and its standard error."""
    count = len(values)
    center, mean = (count - 1) / 2, sum(values) / count
    spread = sum((number - center) ** 2 for number in range(count))
    slope = sum((number - center) * (value - mean) for number, value in enumerate(values)) / spread
    residual = sum((value - mean - slope * (number - center)) ** 2 for number, value in enumerate(values))
    return slope, (residual / (count - 2) / spread) ** 0.5
