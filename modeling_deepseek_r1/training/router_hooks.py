"""What changes a router's choice in training alone: a capacity of the experts, and sampling of experts.

Both are callbacks for any Trainer, and hooks on the routers while it trains: the model's forward knows nothing of them, and what is
saved is the model without them. In a loop of your own call `attach(model)` and `detach()`.
"""

import math

import torch
from torch import nn

from ..moe.experts import DeepseekR1LowRankExperts
from ..moe.gates import DeepseekR1ExpertRouter
from ..moe.losses import real_tokens
from ..moe.outputs import RouterOutput
from ..moe.select import select_experts
from .statistics import HistoryCallback


class RouterHook(HistoryCallback):
    """Lets `changed` work on what every router says in training."""

    def __init__(self):
        self._hooks: list = []
        self._mask: torch.Tensor | None = None

    def changed(self, router: DeepseekR1ExpertRouter, routed: RouterOutput, real: torch.Tensor | None) -> RouterOutput:
        """The choice that is made instead; `real` `[T]` bool, false = padding, None = all are real."""
        raise NotImplementedError

    def attach(self, model: nn.Module) -> None:
        """Puts hooks on the routers of a model, wrapped or not.

        Raises:
            ValueError: there is no router, or it is attached already.
        """
        routers = [module for module in model.modules() if isinstance(module, DeepseekR1ExpertRouter)]
        if not routers or self._hooks:
            what = "is attached already" if self._hooks else "the model has no layer with experts"
            raise ValueError(f"{type(self).__name__}: {what}")
        self._hooks = [router.register_forward_hook(self._on_router) for router in routers]
        decoder = next(module for module in model.modules() if hasattr(module, "routers") and hasattr(module, "embed_tokens"))
        self._hooks.append(decoder.register_forward_pre_hook(self._on_model, with_kwargs=True))

    def detach(self) -> None:
        """Takes the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._mask = [], None

    def _on_model(self, module: nn.Module, args, kwargs) -> None:
        self._mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

    def _on_router(self, router: DeepseekR1ExpertRouter, args, routed: RouterOutput) -> RouterOutput | None:
        if not router.training:
            return None
        return self.changed(router, routed, real_tokens(self._mask, len(routed.logits)))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.attach(model)

    def on_train_end(self, args, state, control, **kwargs):
        self.detach()


class ExpertCapacity(RouterHook):
    """An expert takes at most `factor` times an even share of a micro-batch's slots; the others are dropped.

    Of an overloaded expert the pairs with the smallest weights go first (batch prioritised routing,
    https://arxiv.org/abs/2106.05974). A token's other experts share its weight where weights are normalised; a token that has lost
    all passes the layer by its residual connection alone. Padding neither counts nor is dropped.

    Args:
        factor: 1 = no expert gets more than an even share.

    Attributes:
        slots, dropped: active slots of real tokens so far, and how many of them were dropped; saved. Each line of the log gets the
            share since the last one as `dropped_share`. Recomputation by gradient checkpointing counts twice, in both.

    Raises:
        ValueError: a factor that is not positive; at the start, low-rank experts, whose shared MLP no token can do without.
    """

    arguments = ("factor",)
    history = ("slots", "dropped", "logged")

    def __init__(self, factor: float = 1.25):
        super().__init__()
        if factor <= 0:
            raise ValueError(f"factor={factor} must be positive")
        self.factor = factor
        self.slots = self.dropped = 0
        self.logged = [0, 0]

    def attach(self, model: nn.Module) -> None:
        if any(isinstance(module, DeepseekR1LowRankExperts) for module in model.modules()):
            raise ValueError("ExpertCapacity: low-rank experts share one MLP, which no token can do without")
        super().attach(model)

    @property
    def dropped_share(self) -> float:
        """Of all slots so far."""
        return self.dropped / self.slots if self.slots else 0.0

    def changed(self, router: DeepseekR1ExpertRouter, routed: RouterOutput, real: torch.Tensor | None) -> RouterOutput:
        weights = routed.top_k_weights
        active = weights.detach() != 0
        counted = active if real is None else active & real[:, None]
        capacity = math.ceil(self.factor * int(counted.sum()) / routed.logits.shape[-1])
        kept = active & (~counted | (_ranks(routed, counted) < capacity))
        self.slots += int(counted.sum())
        self.dropped += int(active.sum() - kept.sum())
        weights = torch.where(kept, weights, 0.0)
        if router.normalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return RouterOutput(routed.logits, weights, torch.where(kept, routed.top_k_index, 0))

    def on_log(self, args, state, control, logs=None, **kwargs):
        slots, dropped = self.slots - self.logged[0], self.dropped - self.logged[1]
        self.logged = [self.slots, self.dropped]
        if slots and logs is not None:
            logs["dropped_share"] = state.log_history[-1]["dropped_share"] = dropped / slots


def _ranks(routed: RouterOutput, counted: torch.Tensor) -> torch.Tensor:
    """`[T, K]`: how many counted slots of the same expert have a larger weight, or the same one earlier."""
    index, weights = routed.top_k_index.flatten(), routed.top_k_weights.detach().flatten()
    # Slots that do not count follow those of all experts.
    experts = torch.where(counted.flatten(), index, routed.logits.shape[-1])
    by_weight = weights.argsort(descending=True, stable=True)
    order = by_weight[experts[by_weight].argsort(stable=True)]
    starts = torch.bincount(experts, minlength=routed.logits.shape[-1] + 1).cumsum(0).roll(1)
    starts[0] = 0
    places = torch.arange(len(order), device=order.device) - starts[experts[order]]
    return torch.empty_like(places).scatter_(0, order, places).view_as(counted)


class ExpertSampling(RouterHook):
    """Draws the experts of a token instead of taking the best, so that experts that are rarely best learn too.

    They are drawn without replacement by the probabilities `softmax(logits / temperature)` (Gumbel top-k,
    https://arxiv.org/abs/1903.06059); weights and thresholds are those of the probabilities themselves. The temperature falls to
    zero, where the best are taken, over the first `share` of the steps; a loop of its own sets `temperature`.

    Args:
        start: temperature of the first step. share: of the steps of the training, in (0, 1].

    Raises:
        ValueError: numbers that make no sense.
    """

    arguments = ("start", "share")
    history = ("temperature",)

    def __init__(self, start: float = 1.0, share: float = 0.5):
        super().__init__()
        if start <= 0 or not 0 < share <= 1:
            raise ValueError(f"start={start} must be positive and share={share} in (0, 1]")
        self.start, self.share, self.temperature = start, share, start

    def on_step_begin(self, args, state, control, **kwargs):
        self.temperature = self.start * max(0.0, 1 - state.global_step / (self.share * state.max_steps))

    def changed(self, router: DeepseekR1ExpertRouter, routed: RouterOutput, real: torch.Tensor | None) -> RouterOutput:
        if not self.temperature:
            return routed
        logits = routed.logits.detach()
        noise = -torch.empty_like(logits).exponential_().log()
        # As a bias it changes the order alone: probability + bias is then the order of the noisy logits.
        bias = (logits / self.temperature + noise).softmax(-1) - logits.softmax(-1)
        if router.balance_bias is not None:
            bias = bias + router.balance_bias
        limits = router.slots, router.minimum, router.threshold, router.normalise
        return RouterOutput(routed.logits, *select_experts(routed.logits, *limits, bias))
