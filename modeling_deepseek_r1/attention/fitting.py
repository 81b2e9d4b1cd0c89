"""What a conversion fits of a routed layer, so that it does what full attention did: maps of queries, and the gates' biases.

A query's largest products with the centroids are not where most of its attention goes: rotation turns the products with single
keys, and large clusters and long keys weigh more. With m_c the weight that full attention gives to the remote keys of cluster c,
and cluster scores s = (q + q A) . c, the map A of each head minimises

    sum over queries, clusters of  - m_c log softmax_c(s)

which is convex in A. (The indexer of DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, learns from attention weights likewise,
key by key.) A = 0 leaves queries as they are.

What a query does not find is missing on the remote side alone. The gate g of each head is the one with which outputs come nearest
to those of full attention, the least sum of squares.

Shapes: H query heads, G key/value heads, C clusters, D head size, S sampled queries, n keys.
"""

import torch

from .kmeans import cluster_scores

STEPS = 100
"""Of Adam, while the learning rate falls to 0."""
QUERIES_PER_STEP = 512
LEARNING_RATE = 0.07
GATES = (1.0, 1.1, 0.9, 1.2, 0.8, 1.3, 0.7, 1.4, 0.6, 1.5, 0.5, 1.6, 1.7, 1.8, 1.9)
"""Gates that are tried; of equal ones the first is taken."""


@torch.no_grad()
def cluster_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    key_clusters: torch.Tensor,
    positions: torch.Tensor,
    num_clusters: int,
    window: int,
    num_sink_tokens: int,
    scaling: float,
) -> torch.Tensor:
    """The weight that full causal attention gives to the remote keys of each cluster: `[H, S, C]` float32.

    Args:
        query: `[H, S, D]`, rotated.
        key: `[G, n, D]`, rotated; all from position 0 on.
        key_clusters: `[G, n]`.
        positions: `[S]`, of the queries.
        window, num_sink_tokens: remote keys lie at num_sink_tokens <= j <= i - window.
    """
    places = torch.arange(key.shape[1], device=key.device)
    hidden = places > positions[:, None]
    near = (places < num_sink_tokens) | (places > positions[:, None] - window)
    masses = []
    # One key/value head at a time: all weights together could fill the memory.
    for queries, keys, clusters in zip(query.float().chunk(len(key)), key.float(), key_clusters, strict=True):
        weights = (queries @ keys.T * scaling).masked_fill_(hidden, float("-inf")).softmax(-1).masked_fill_(near, 0.0)
        mass = weights.new_zeros(*weights.shape[:2], num_clusters)
        masses.append(mass.scatter_add_(2, clusters.expand_as(weights), weights))
    return torch.cat(masses)


@torch.enable_grad()
def fit_query_map(queries: torch.Tensor, mass: torch.Tensor, centroids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The map `[H, D, D]` float32 for one layer.

    Args:
        queries: `[H, S, D]`, before rotation.
        mass: `[H, S, C]`, from `cluster_mass`.
        centroids: `[G, C, D]`.
        seed: of the order in which queries are read.
    """
    heads, count, size = queries.shape
    # Only the order of the scores counts in the end; their scale, one for each head, is fitted and then dropped.
    query_map = torch.zeros(heads, size, size, device=queries.device, requires_grad=True)
    log_scale = torch.full((heads, 1, 1), -0.5, device=queries.device).mul(torch.tensor(size).log()).requires_grad_()
    optimizer = torch.optim.Adam([query_map, log_scale], lr=LEARNING_RATE)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(queries.device)
    for step in range(STEPS if bool(mass.any()) else 0):
        some = order.roll(-step * QUERIES_PER_STEP)[:QUERIES_PER_STEP]
        scores = log_scale.exp() * cluster_scores(queries[None, :, some], centroids, query_map)[0]
        loss = -(mass[:, some] * scores.log_softmax(-1)).sum() / mass[:, some].sum().clamp(min=1e-12)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return query_map.detach()


@torch.no_grad()
def gate_errors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    local: torch.Tensor,
    remote: torch.Tensor,
    positions: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """How far outputs with each of `GATES` are from those of full causal attention: `[gates, H]` sums of squares.

    Args:
        query: `[H, S, D]`, rotated. positions: `[S]`.
        key, value: `[G, n, D]`; keys rotated, all from position 0 on.
        local, remote: `[S, n]` and `[H, S, n]` bool, the keys that a query sees near and far.
    """
    hidden = torch.arange(key.shape[1], device=key.device) > positions[:, None]
    errors = []
    heads = query.shape[0] // len(key)
    for group, (queries, keys, values) in enumerate(
        zip(query.float().chunk(len(key)), key.float(), value.float(), strict=True)
    ):
        weights = (queries @ keys.T * scaling).masked_fill_(hidden, float("-inf")).softmax(-1)
        parts = [weights * local, weights * remote[group * heads : (group + 1) * heads]]
        sums, outputs = [part.sum(-1, keepdim=True) for part in parts], [part @ values for part in parts]
        full = weights @ values
        found = [(outputs[0] + gate * outputs[1]) / (sums[0] + gate * sums[1]) for gate in GATES]
        errors.append(torch.stack([(output - full).square().sum((1, 2)) for output in found]))
    return torch.cat(errors, 1)


def gate_bias(errors: torch.Tensor) -> torch.Tensor:
    """`[H]`: the bias b with 2 sigmoid(b) = g for the best gate by `gate_errors`."""
    return torch.logit(torch.tensor(GATES)[errors.argmin(0).cpu()] / 2)
