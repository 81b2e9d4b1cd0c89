"""How many experts a token gets, and with which weights.

The `minimum` best experts are always active; further ones, up to K, where their probability is at least the threshold. Weights
are the probabilities, made to sum to one where asked. An inactive slot holds index 0 and weight 0.

A bias per expert changes the order alone: the best experts are then those with the largest probability + bias. Moved against
the experts' load, it balances them without a loss (https://arxiv.org/abs/2408.15664).

Shapes: T tokens, E experts, K slots.
"""

import torch


def select_experts(
    logits: torch.Tensor,
    slots: int,
    minimum: int,
    threshold: torch.Tensor | None,
    normalise: bool,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the experts of each token.

    Args:
        logits: `[T, E]` float32.
        slots: K; minimum: experts that are always active, 1 ... K.
        threshold: probability from which on a further expert is active; None = all K are.
        normalise: whether the weights of a token sum to one.
        bias: `[E]`, added to the probabilities for the order.

    Returns:
        `[T, K]` weights and `[T, K]` indices, the best expert first.
    """
    weights = logits.softmax(-1)
    if bias is None:
        weights, index = weights.topk(slots, -1)
    else:
        index = (weights.detach() + bias).topk(slots, -1).indices
        weights = weights.gather(-1, index)
    if threshold is not None:
        inactive = weights < threshold
        inactive[:, :minimum] = False
        weights, index = weights.masked_fill(inactive, 0.0), index.masked_fill(inactive, 0)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, index


def select_experts_reference(
    logits: torch.Tensor,
    slots: int,
    minimum: int,
    threshold: float | None,
    normalise: bool,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `select_experts` computes, token by token."""
    all_weights, all_index = [], []
    for probabilities in logits.exp() / logits.exp().sum(-1, keepdim=True):
        order = -probabilities.detach() - (bias if bias is not None else 0.0)
        best = sorted(range(len(probabilities)), key=order.tolist().__getitem__)[:slots]
        active = [n < minimum or threshold is None or float(probabilities[e].detach()) >= threshold for n, e in enumerate(best)]
        total = sum(probabilities[e] for e, is_active in zip(best, active, strict=True) if is_active) if normalise else 1.0
        zero = probabilities.new_zeros(())
        all_weights.append(torch.stack([probabilities[e] / total if a else zero for e, a in zip(best, active, strict=True)]))
        all_index.append([e if a else 0 for e, a in zip(best, active, strict=True)])
    return torch.stack(all_weights), torch.tensor(all_index)


def moved_threshold(threshold: torch.Tensor, active: torch.Tensor, target: float, rate: float, lowest: float) -> torch.Tensor:
    """The threshold after a step in which a token had `active` experts on average: up when these were too many.

    The step is one of the logarithm, since probabilities that matter differ by orders of magnitude.

    Args:
        rate: change of the logarithm per expert too many.
        lowest: what a threshold of zero starts from, and where a falling one ends.
    """
    return (threshold.clamp(min=lowest) * torch.exp(rate * (active - target))).clamp(lowest, 1.0)


def moved_bias(bias: torch.Tensor, load: torch.Tensor, target: torch.Tensor, rate: float) -> torch.Tensor:
    """The biases `[E]` after a step in which the experts had the shares `load` `[E]` of the slots, and should have had `target`:
    up by `rate` for each one with too little, down for each one with too much, as in DeepSeek-V3."""
    return bias + rate * torch.sign(target - load)
