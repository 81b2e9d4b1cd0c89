"""Auxiliary losses of the routers, from what they really chose, over real tokens only.

Per sparse layer, with f_e the share of the active slots that went to expert e (counted, over all ranks, without gradient), P_e
the mean probability of e, and t the target distribution:

    balance = sum_e f_e P_e / t_e        z = mean (log sum_e exp(logits_e))^2        cost = mean number of active experts
    aux = mean over layers of  balance + z_ratio z + cost_ratio cost

The balance loss is that of the Switch Transformer (https://arxiv.org/abs/2101.03961) for any target and any number of active
experts; with f = P = t it is 1. The count in `cost` has no derivative; its gradient is that of the probability of the active
experts beyond the minimum, so that it makes them less probable.

Shapes: T tokens, E experts, K slots.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .gates import DeepseekR1ExpertRouter
from .outputs import DeepseekR1ModelOutputWithPast, RouterOutput, slot_counts


class RouterLosses(NamedTuple):
    """Fields of a model's output. `aux_loss` is what training adds; its parts are means over the layers, before their ratios."""

    aux_loss: torch.Tensor
    balance_loss: torch.Tensor
    router_z_loss: torch.Tensor
    expert_cost: torch.Tensor


def router_losses(
    routers: Sequence[DeepseekR1ExpertRouter],
    routed: Sequence[RouterOutput],
    real: torch.Tensor | None = None,
    reduce: Callable[[torch.Tensor], object] | None = None,
    device: torch.device | None = None,
) -> RouterLosses:
    """The losses of all sparse layers; zeros for a model without one.

    Args:
        routers, routed: of the same layers.
        real: `[T]` bool, false = padding; None = all tokens are real.
        reduce: adds a tensor up over all ranks, in place.
        device: where the result is wanted.
    """
    if not routed:
        return RouterLosses(*torch.zeros(4, device=device).unbind())
    counts = [slot_counts(layer, real) for layer in routed]
    if reduce is not None:
        # One exchange for all layers.
        together = torch.cat([count.to(counts[0].device) for count in counts])
        reduce(together)
        counts = together.split([len(count) for count in counts])
    rows = []
    for router, layer, count in zip(routers, routed, counts, strict=True):
        mask = torch.ones_like(layer.logits[:, 0]) if real is None else real.to(layer.logits)
        parts = layer_losses(layer, count.to(layer.logits.device), mask, router.balance_target, router.minimum)
        aux = parts[0] + router.z_loss_ratio * parts[1] + router.cost_ratio * parts[2]
        rows.append(torch.stack((aux, *parts)).to(device or layer.logits.device))
    return RouterLosses(*torch.stack(rows).mean(0).unbind())


def output_losses(
    routers: Sequence[DeepseekR1ExpertRouter],
    outputs: DeepseekR1ModelOutputWithPast,
    attention_mask: torch.Tensor | None,
    training: bool,
) -> dict[str, torch.Tensor]:
    """`router_losses` of a forward by the name of their fields; counts are added up over the ranks of a distributed training."""
    batch_size, length = outputs.last_hidden_state.shape[:2]
    # In evaluation ranks may run alone and must not wait for each other.
    distributed = training and torch.distributed.is_available() and torch.distributed.is_initialized()
    reduce = torch.distributed.all_reduce if distributed else None
    real = real_tokens(attention_mask, batch_size * length)
    return router_losses(routers, outputs.routed, real, reduce, outputs.last_hidden_state.device)._asdict()


def layer_losses(
    routed: RouterOutput, counts: torch.Tensor, mask: torch.Tensor, target: Sequence[float], minimum: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Balance, z and cost of one layer.

    Args:
        counts: `[E]` active slots of each expert.
        mask: `[T]` float, 1 = a real token.
        target: t, for each expert.
        minimum: experts that are always active.
    """
    tokens = mask.sum().clamp(min=1.0)
    probabilities = routed.logits.softmax(-1)
    shares = counts / counts.sum().clamp(min=1.0)
    mean = (probabilities * mask[:, None]).sum(0) / tokens
    balance = (shares * mean / torch.tensor(target, device=mean.device)).sum()
    z = (routed.logits.logsumexp(-1).square() * mask).sum() / tokens
    active = routed.top_k_weights != 0
    further = probabilities.gather(-1, routed.top_k_index)[:, minimum:] * active[:, minimum:]
    pull = (further.sum(-1) * mask).sum() / tokens
    cost = (active.sum(-1) * mask).sum() / tokens + (pull - pull.detach())
    return balance, z, cost


def router_losses_reference(
    routers: Sequence[DeepseekR1ExpertRouter], routed: Sequence[RouterOutput], real: torch.Tensor | None = None
) -> list[float]:
    """aux, balance, z and cost on one rank, token by token."""
    rows = []
    for router, layer in zip(routers, (RouterOutput(*(field.detach() for field in layer)) for layer in routed), strict=True):
        chosen = [token for token in range(len(layer.logits)) if real is None or real[token]]
        slots = [
            int(expert)
            for token in chosen
            for expert, weight in zip(layer.top_k_index[token], layer.top_k_weights[token], strict=True)
            if weight > 0
        ]
        probabilities = torch.stack([layer.logits[token].softmax(-1) for token in chosen]).mean(0).tolist()
        shares = [slots.count(expert) / len(slots) for expert in range(len(probabilities))]
        balance = sum(f * p / t for f, p, t in zip(shares, probabilities, router.balance_target, strict=True))
        z = sum(float(layer.logits[token].logsumexp(-1)) ** 2 for token in chosen) / len(chosen)
        cost = len(slots) / len(chosen)
        rows.append((balance + router.z_loss_ratio * z + router.cost_ratio * cost, balance, z, cost))
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def real_tokens(attention_mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
    """`[T]` bool, false = padding, for the last tokens of a 2-D mask `[batch, cached + n]`; None = all are real."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, attention_mask.shape[1] - num_tokens // attention_mask.shape[0] :].flatten().bool()


def share_of_batch(
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor | float:
    """The share that this micro-batch has in the predicted tokens of the optimizer step, so that a sum over the micro-batches
    weighs their auxiliary losses as it weighs their tokens; 1 where the number of all tokens is not given."""
    if num_items_in_batch is None:
        return 1.0
    predicted = labels[..., 1:] if shift_labels is None else shift_labels
    return (predicted != ignore_index).sum() / num_items_in_batch
