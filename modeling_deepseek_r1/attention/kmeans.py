"""Spherical k-means over keys, and which clusters a key belongs to and a query looks into.

Centroids are unit vectors per key/value head. A key belongs to the centroid with the largest dot product, a query looks into
the `count` largest (ties to the lower number), by vectors of its own head if there are any; both enter before rotation, so that a
key's cluster does not depend on where it stands. (Routing Transformer, https://arxiv.org/abs/2003.05997, but with a rule that
depends on the key alone: what a token sees never depends on later ones.)

Shapes: B batch, H query heads, G key/value heads, C clusters, D head size.
"""

import torch
import torch.nn.functional as F

ASSIGNED_AT_ONCE = 512, 2**15
"""Keys or queries per head whose products with the centroids are held at once, on a CPU and on other devices."""

SEED_KEYS = 4096
"""Keys per head among which the first centroids are chosen."""


def assign_keys(keys: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Cluster of each key: `[B, G, K]` int64 for keys `[B, G, K, D]` and centroids `[G, C, D]`; computed in float32."""
    wide = centroids.float().transpose(1, 2)
    return torch.cat([(part.float() @ wide).argmax(-1) for part in keys.split(_at_once(keys), 2)], 2)


def choose_clusters(queries: torch.Tensor, centroids: torch.Tensor, count: int) -> torch.Tensor:
    """The clusters that each query looks into, best first: `[B, H, Q, count]` int64 for queries `[B, H, Q, D]` and centroids
    `[G, C, D]` or `[H, C, D]`."""
    groups = centroids.shape[0]
    wide = centroids.float().transpose(1, 2)[:, None]
    parts = queries.unflatten(1, (groups, -1)).split(_at_once(queries), 3)
    return torch.cat([_largest(part.float() @ wide, count) for part in parts], 3).flatten(1, 2)


def _at_once(states: torch.Tensor) -> int:
    return ASSIGNED_AT_ONCE[int(states.device.type != "cpu")]


def _largest(products: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers of the `count` largest products along the last dimension, the largest first; ties to the lower number."""
    values, best = products.topk(min(count + 1, products.shape[-1]), -1)
    if not torch.compiler.is_compiling() and not bool((values[..., 1:] == values[..., :-1]).any()):
        return best[..., :count]
    return products.argsort(dim=-1, descending=True, stable=True)[..., :count]


def fit_centroids(keys: torch.Tensor, num_clusters: int, *, iterations: int = 12, seed: int = 0) -> torch.Tensor:
    """Spherical k-means.

    Args:
        keys: `[G, N, D]`, of any length; directions count.
        num_clusters: C.
        iterations: of assignment and mean.
        seed: of the first centroids, which are keys drawn one after the other, rather from where no centroid is near
            (k-means++, Arthur and Vassilvitskii 2007).

    Returns:
        `[G, C, D]` float32 unit vectors. A cluster that loses all its keys starts anew at the key that fits its own worst.

    Raises:
        ValueError: fewer keys than clusters.
    """
    if keys.shape[1] < num_clusters:
        raise ValueError(
            f"{keys.shape[1]} keys cannot make {num_clusters} clusters; give a longer text or ask for fewer clusters"
        )
    keys = F.normalize(keys.float(), dim=-1)
    centroids = _first_centroids(keys, num_clusters, torch.Generator().manual_seed(seed))
    for _ in range(iterations):
        sums, counts, fit = cluster_sums(keys, centroids)
        moved = F.normalize(sums, dim=-1)
        for group, cluster in (counts == 0).nonzero().tolist():
            worst = fit[group].argmin()
            moved[group, cluster] = keys[group, worst]
            fit[group, worst] = float("inf")
        centroids = moved
    return centroids


def _first_centroids(keys: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    sample = keys[:, torch.randperm(keys.shape[1], generator=generator)[: max(SEED_KEYS, num_clusters)].to(keys.device)]
    groups = torch.arange(keys.shape[0], device=keys.device)
    chosen = [sample[:, 0]]
    nearest = torch.full(sample.shape[:2], -1.0, device=keys.device)
    for _ in range(num_clusters - 1):
        nearest = torch.maximum(nearest, (sample @ chosen[-1].unsqueeze(-1)).squeeze(-1))
        # The tiny constant lets a choice be made where all keys are the same.
        distance = (1.0 - nearest).clamp(min=0.0) + 1e-12
        chosen.append(sample[groups, torch.multinomial(distance.cpu(), 1, generator=generator).squeeze(1).to(keys.device)])
    return torch.stack(chosen, 1)


def cluster_sums(keys: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of the unit keys `[G, N, D]` by cluster.

    Returns:
        Sums `[G, C, D]`, numbers of keys `[G, C]`, and each key's cosine with its centroid `[G, N]`.
    """
    sums, counts, fits = torch.zeros_like(centroids), centroids.new_zeros(centroids.shape[:2]), []
    for part in keys.split(_at_once(keys), 1):
        fit, cluster = (part @ centroids.transpose(1, 2)).max(-1)
        sums.scatter_add_(1, cluster[..., None].expand_as(part), part)
        counts.scatter_add_(1, cluster, torch.ones_like(fit))
        fits.append(fit)
    return sums, counts, torch.cat(fits, 1)
