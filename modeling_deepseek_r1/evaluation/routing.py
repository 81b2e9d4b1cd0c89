"""How well routed attention chooses: sizes of clusters, queries that find nothing, and how many of the right keys are found.

The right keys of a query are the remote ones (beyond the window, sink tokens aside) to which full attention would give the
largest weights. How many of them are among the routed ones is compared with equally many keys chosen otherwise: the most recent
ones, and blocks of consecutive keys ranked by their mean.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..attention.pattern import remote_keys
from .mean_blocks import BLOCK_TOKENS, mean_block_scores


@dataclass(frozen=True)
class RoutingStatistics:
    """One routed layer on one text; shares lie between 0 and 1, means are taken over heads and the sampled queries.

    Attributes:
        largest_cluster: share of the keys that lie in the largest cluster of a head, mean over the heads.
        empty_clusters: share of the clusters without keys.
        empty_queries: share of the queries that see no remote key.
        remote_keys: how many a query sees.
        recall: share of the `top` right keys that are among the routed ones; `recall_recent`, `recall_blocks`: among as many
            keys of the other kinds.
        mass, mass_recent, mass_blocks: share of the weight that full attention gives to all remote keys.
    """

    layer: int
    largest_cluster: float
    empty_clusters: float
    empty_queries: float
    remote_keys: float
    recall: float
    recall_recent: float
    recall_blocks: float
    mass: float
    mass_recent: float
    mass_blocks: float


@torch.no_grad()
def routing_statistics(
    model, input_ids: torch.Tensor, *, queries: int = 64, top: int = 64, seed: int = 0
) -> list[RoutingStatistics]:
    """Runs a model with routed layers over a text and looks at what each of them chooses.

    Args:
        input_ids: `[1, n]`.
        queries: sampled positions, each with all heads.
        top: right keys per query.

    Raises:
        ValueError: no routed layer, or a text too short for `top` remote keys.
    """
    layers = [layer.self_attn for layer in model.model.layers if layer.self_attn.router is not None]
    if not layers:
        raise ValueError("the model has no local_routed_attention layer, so there is no routing to look at")
    first = max(layer.pattern.window + layer.pattern.num_sink_tokens for layer in layers) + top
    length = input_ids.shape[1]
    if length <= first:
        raise ValueError(f"a text of {length} tokens has no query with {top} remote keys; give more than {first}")
    generator = torch.Generator().manual_seed(seed)
    positions = (first + torch.randperm(length - first, generator=generator)[:queries]).to(input_ids.device)
    results = []

    def look(module, args, kwargs):
        results.append(_layer_statistics(module, args[0], args[1], positions, top))

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        model.model(input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return results


def mean_statistics(layers: list[RoutingStatistics]) -> dict[str, Any]:
    """The mean of each figure over the layers."""
    rows = [asdict(layer) for layer in layers]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "layer"}


def _layer_statistics(attention, hidden_states, position_embeddings, positions, top) -> RoutingStatistics:
    query, key, _, routing = attention.project(hidden_states, position_embeddings)
    pattern, clusters = attention.pattern, attention.router.centroids.shape[1]
    length, device = key.shape[2], key.device
    query, chosen = query[:, :, positions], routing.query_clusters[:, :, positions]
    keys = torch.arange(length, device=device)
    routed = remote_keys(pattern, chosen, routing.key_clusters, positions[None], keys[None])
    remote = (keys >= pattern.num_sink_tokens) & (keys <= positions[:, None] - pattern.window)
    budget = routed.sum(-1, keepdim=True)
    blocks = mean_block_scores(query, key).repeat_interleave(BLOCK_TOKENS, -1)[..., :length]
    sets = {
        "": routed,
        "_recent": _best(keys.float().expand_as(blocks), remote, budget),
        "_blocks": _best(blocks, remote, budget),
    }
    wide = key.repeat_interleave(attention.num_key_value_groups, 1)
    logits = (query.float() @ wide.float().transpose(2, 3) * attention.scaling).masked_fill(~remote, float("-inf"))
    right, weights = _best(logits, remote, torch.full_like(budget, top)), logits.softmax(-1)
    sizes = torch.zeros(*key.shape[:2], clusters, device=device)
    sizes.scatter_add_(2, routing.key_clusters, torch.ones_like(routing.key_clusters, dtype=sizes.dtype))
    shares = {f"recall{name}": ((right & chosen).sum(-1) / top).mean().item() for name, chosen in sets.items()}
    shares |= {f"mass{name}": (weights * chosen).sum(-1).mean().item() for name, chosen in sets.items()}
    return RoutingStatistics(
        layer=attention.layer_idx,
        largest_cluster=(sizes.amax(-1) / length).mean().item(),
        empty_clusters=(sizes == 0).float().mean().item(),
        empty_queries=(budget == 0).float().mean().item(),
        remote_keys=budget.float().mean().item(),
        **shares,
    )


def _best(scores: torch.Tensor, allowed: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """`[..., K]` bool: the `count` `[..., 1]` keys with the largest scores among the allowed ones; the later key wins a tie."""
    order = scores.masked_fill(~allowed, float("-inf")).flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return (rank.flip(-1) < count) & allowed
