"""Query centroids: the clusters that a query looks into, fitted to where its attention goes.

A cluster's mean key direction says little about how much of a query's attention falls on the cluster: logits are products with
rotated keys, and one key that fits outweighs many. While a model is converted, its full attention is there to be asked. For
sampled queries of every routed layer, the weights of the remote keys that they may see are added up by cluster, and for each query
head vectors p are found, beginning with the centroids, such that softmax(q . p_c / sqrt(D)) over the clusters c is close to these
shares. (Learning an index from the attention that it is to find: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556.)

Shapes: H query heads, G key/value heads, C clusters, D head size.
"""

import torch
from torch import nn

from ..attention.pattern import AttentionPattern
from .recorded import Recorder, attention_blocks

STEPS, BATCH, LEARNING_RATE = 150, 512, 0.02


@torch.no_grad()
def remote_shares(
    recorded: Recorder, centroids: torch.Tensor, pattern: AttentionPattern, rotary: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What full attention gives to the keys of each cluster that a query could see, if it looked into that cluster.

    Arguments are those of `attention_blocks`.

    Returns:
        Queries before rotation `[H, N, D]` and shares `[H, N, C]` of all their attention, float32.
    """
    shares = [torch.zeros(len(recorded.queries[0]), 0, centroids.shape[1])]
    for block in attention_blocks(recorded, centroids, pattern, rotary):
        weights = block.logits.softmax(-1) * block.reached[:, None]
        members = nn.functional.one_hot(block.clusters, centroids.shape[1]).float()
        shares.append((weights @ members[:, None]).flatten(0, 1))
    return torch.cat([query.float() for query in recorded.queries], 1), torch.cat(shares, 1)


@torch.enable_grad()
def fit_query_centroids(queries: torch.Tensor, shares: torch.Tensor, centroids: torch.Tensor, seed: int) -> torch.Tensor:
    """`[H, C, D]` float32.

    Args:
        queries: `[H, N, D]` before rotation.
        shares: `[H, N, C]` of their attention, by cluster; what is not remote is missing.
        centroids: `[G, C, D]`, from which the search begins, and which stay where there are no shares.
        seed: of the batches.
    """
    start = centroids.float().repeat_interleave(queries.shape[0] // centroids.shape[0], 0)
    total = shares.sum() / max(1, shares.shape[1])
    if not total > 0:
        return start
    generator, scale = torch.Generator().manual_seed(seed), queries.shape[-1] ** -0.5
    # The optimizer's steps are of the size of what a logit's factor changes by.
    points = nn.Parameter(start * scale)
    optimizer = torch.optim.Adam([points], LEARNING_RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS)
        some = torch.randint(queries.shape[1], (BATCH,), generator=generator)
        predicted = (queries[:, some] @ points.transpose(1, 2)).log_softmax(-1)
        loss = -(shares[:, some] * predicted).sum() / (total * BATCH)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return points.detach() / scale
