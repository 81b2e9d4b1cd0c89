"""Trained parts of some experts of a sparse layer, whose experts themselves stay frozen.

A block with such a module leaves all its pairs of token and expert to it. Those of the other experts go through the frozen
experts as before, at no other cost; those of the chosen ones through products of their own. Only what is trained has
gradients and optimizer states, because only that is a parameter here: a mask over the packed weights would save neither.

Shapes: T tokens, K slots, S pairs of chosen experts, E experts, C chosen ones, H hidden size, I width of an expert, r rank.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .experts import DeepseekR1Experts, DeepseekR1LowRankExperts, in_weight_dtype
from .kernels import adapted_linear, experts_forward, sort_pairs


class ExpertAdapter(nn.Module):
    """What all kinds have in common.

    Args:
        experts: of the block; they are read, never kept.
        chosen: numbers of experts, in any order.

    Attributes:
        chosen: `[C]` buffer, ascending. It is saved, so that a resumed run trains what it has trained.
        originals: weights `[C, ...]` by name while merged, else None.
        target_before: the router's balance target before training changed it, or None.

    Raises:
        ValueError: no expert, or one twice or that does not exist.
    """

    replaced: tuple[str, ...] = ("gate_up_proj", "down_proj")
    """Parameters of the experts that merging changes."""

    def __init__(self, experts: nn.Module, chosen: Sequence[int]):
        super().__init__()
        numbers = sorted(chosen)
        if not numbers or len(set(numbers)) < len(numbers) or not 0 <= numbers[0] <= numbers[-1] < experts.num_experts:
            raise ValueError(f"chosen experts {list(chosen)} must be different numbers of 0 ... {experts.num_experts - 1}")
        self.register_buffer("chosen", torch.tensor(numbers, device=next(experts.parameters()).device))
        self.originals: dict[str, torch.Tensor] | None = None
        self.target_before: list[float] | None = None

    def forward(
        self, experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`[T, H]` for `hidden_states` `[T, H]`, `top_k_index` and `top_k_weights` `[T, K]`."""
        if self.originals is not None:
            return experts(hidden_states, top_k_index, top_k_weights)
        return self._adapted(experts, hidden_states, top_k_index, top_k_weights)

    def _adapted(self, experts, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        raise NotImplementedError

    def weights(self, experts: nn.Module) -> dict[str, torch.Tensor]:
        """What the chosen experts' parameters would be, `[C, ...]` by name."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, experts: nn.Module) -> None:
        """Puts the trained weights in the experts' place; what was there is kept."""
        if self.originals is None:
            new = self.weights(experts)
            self.originals = {name: getattr(experts, name)[self.chosen] for name in self.replaced}
            for name, value in new.items():
                getattr(experts, name).index_copy_(0, self.chosen, value)

    @torch.no_grad()
    def unmerge(self, experts: nn.Module) -> None:
        """Puts back what `merge` has replaced, bit for bit."""
        if self.originals is not None:
            for name, value in self.originals.items():
                getattr(experts, name).index_copy_(0, self.chosen, value.to(self.chosen.device))
            self.originals = None

    def _split(self, num_experts: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Numbers among the chosen experts, their weights, and the weights of the others, each `[T, K]`."""
        place = torch.full((num_experts,), -1, device=top_k_index.device)
        own = place.index_copy(0, self.chosen, torch.arange(len(self.chosen), device=place.device))[top_k_index]
        is_own = own >= 0
        return own.clamp(min=0), top_k_weights.masked_fill(~is_own, 0.0), top_k_weights.masked_fill(is_own, 0.0)


class ExpertLora(ExpertAdapter):
    """Low-rank deltas (https://arxiv.org/abs/2106.09685) of packed experts, `weight_e + alpha / r * b_c a_c`.

    Args:
        rank: r. alpha: the deltas' scale times the rank.

    Attributes:
        gate_up_proj_a: `[C, r, H]`; gate_up_proj_b: `[C, 2I, r]`, zero at the start.
        down_proj_a: `[C, r, I]`; down_proj_b: `[C, H, r]`, zero at the start. All are float32, whatever the experts are.

    Raises:
        ValueError: also a rank below 1, or experts that are low-rank themselves.
    """

    def __init__(self, experts: nn.Module, chosen: Sequence[int], rank: int, alpha: float):
        super().__init__(experts, chosen)
        if not isinstance(experts, DeepseekR1Experts):
            raise ValueError("these experts are low-rank deltas themselves: train those as they are, without a rank")
        if rank < 1:
            raise ValueError(f"the rank of the adapters, {rank}, must be at least 1")
        self.rank, self.alpha = rank, float(alpha)
        for name in self.replaced:
            like = getattr(experts, name)
            out_size, in_size = like.shape[1:]
            a = torch.randn(len(self.chosen), rank, in_size, device=like.device) * in_size**-0.5
            self.register_parameter(f"{name}_a", nn.Parameter(a))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(len(chosen), out_size, rank, device=like.device)))

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`[C, r, in]`, and `[C, out, r]` with the scale, of `gate_up_proj` or `down_proj`."""
        return getattr(self, f"{name}_a"), getattr(self, f"{name}_b") * (self.alpha / self.rank)

    def weights(self, experts: nn.Module) -> dict[str, torch.Tensor]:
        new = {}
        for name in self.replaced:
            (a, b), old = self.factors(name), getattr(experts, name)[self.chosen]
            new[name] = (old.float() + b @ a).to(old.dtype)
        return new

    def _adapted(self, experts, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        own, own_weights, other_weights = self._split(experts.num_experts, top_k_index, top_k_weights)
        output = experts(hidden_states, top_k_index, other_weights)
        slots, sizes = sort_pairs(own, own_weights, len(self.chosen))
        tokens, numbers = slots // own.shape[1], self.chosen.tolist()
        states, gate_up, down, *factors = in_weight_dtype(
            hidden_states, experts.gate_up_proj, experts.down_proj, *self.factors("gate_up_proj"), *self.factors("down_proj")
        )
        gate, up = adapted_linear(states[tokens], gate_up, *factors[:2], numbers, sizes).chunk(2, -1)
        product = (experts.act_fn(gate) * up * own_weights.flatten()[slots, None]).to(states.dtype)
        return output.index_add(0, tokens, adapted_linear(product, down, *factors[2:], numbers, sizes).to(output.dtype))


class ChosenExperts(ExpertAdapter):
    """The chosen ones of packed experts as parameters of their own: `gate_up_proj` `[C, 2I, H]`, `down_proj` `[C, H, I]`."""

    def __init__(self, experts: nn.Module, chosen: Sequence[int]):
        super().__init__(experts, chosen)
        for name in self.replaced:
            self.register_parameter(name, nn.Parameter(getattr(experts, name).detach()[self.chosen]))

    def weights(self, experts: nn.Module) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self.replaced}

    def _adapted(self, experts, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        own, own_weights, other_weights = self._split(experts.num_experts, top_k_index, top_k_weights)
        output = experts(hidden_states, top_k_index, other_weights)
        inputs = in_weight_dtype(hidden_states, self.gate_up_proj, self.down_proj)
        return output + experts_forward(*inputs, own, own_weights, experts.act_fn).to(output.dtype)


class ChosenLowRankExperts(ChosenExperts):
    """The factors of the chosen ones of low-rank experts, as parameters of their own; the MLP that all share is frozen."""

    replaced = ("gate_up_proj_a", "gate_up_proj_b", "down_proj_a", "down_proj_b")

    def _adapted(self, experts, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        # A copy of all factors, which are few: the shared MLP wants all experts of a token at once.
        whole = {name: getattr(experts, name).index_copy(0, self.chosen, own) for name, own in self.weights(experts).items()}
        return torch.func.functional_call(experts, whole, (hidden_states, top_k_index, top_k_weights))


def make_adapter(
    experts: nn.Module, chosen: Sequence[int], rank: int | None = None, alpha: float | None = None
) -> ExpertAdapter:
    """The adapter that suits the experts: `ExpertLora` with a rank (alpha: default twice the rank), else the experts themselves.

    Raises:
        ValueError: as `ExpertAdapter` and `ExpertLora`, or experts of a kind that has no adapter.
    """
    if rank is None and alpha is not None:
        raise ValueError(f"alpha={alpha} scales low-rank deltas; give their rank too")
    if not isinstance(experts, (DeepseekR1Experts, DeepseekR1LowRankExperts)) or next(experts.parameters(), None) is None:
        raise ValueError(f"{type(experts).__name__} cannot be trained expert by expert")
    if rank is not None:
        return ExpertLora(experts, chosen, rank, 2 * rank if alpha is None else alpha)
    is_low_rank = isinstance(experts, DeepseekR1LowRankExperts)
    return (ChosenLowRankExperts if is_low_rank else ChosenExperts)(experts, chosen)
