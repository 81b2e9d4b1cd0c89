"""Query centroids: the clusters that a query looks into, fitted to where its attention goes.

A cluster's mean key direction says little about how much of a query's attention falls on the cluster: logits are products with
rotated keys, and one key that fits outweighs many. While a model is converted, its full attention is there to be asked. For
sampled queries of every routed layer, the weights of the remote keys that they may see are added up by cluster, and for each query
head vectors p are found, beginning with the centroids, such that softmax(q . p_c / sqrt(D)) over the clusters c is close to these
shares. (Learning an index from the attention that it is to find: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556.)

Shapes: H query heads, G key/value heads, C clusters, D head size, n tokens of a window, P sampled queries of a window.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ..attention.kmeans import assign_keys
from ..attention.pattern import AttentionPattern
from ..attention.rotary import rotate

SAMPLED_QUERIES = 4096
"""Queries of a layer, from all windows together."""
BLOCK = 128
"""Queries whose attention is held at once."""
STEPS, BATCH, LEARNING_RATE = 150, 512, 0.02


class Recorder(nn.Module):
    """In the place of a router while the model reads: keeps keys and some queries before rotation.

    Args:
        positions: `[P]` of the queries that are kept.

    Attributes:
        queries, keys: `[H, P, D]` and `[G, n, D]` bfloat16 of each window.
        position_embeddings: of a window's tokens, the same for all.
    """

    def __init__(self, positions: torch.Tensor):
        super().__init__()
        self.positions = positions
        self.queries: list[torch.Tensor] = []
        self.keys: list[torch.Tensor] = []
        self.position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
        self.queries.append(query[0, :, self.positions].to(torch.bfloat16))
        self.keys.append(key[0].to(torch.bfloat16))


def sampled_positions(pattern: AttentionPattern, length: int, windows: int, seed: int) -> torch.Tensor:
    """`[P]` positions of a window's tokens that have remote keys, in order; empty where none has."""
    first = min(pattern.window + pattern.num_sink_tokens, length)
    count = min(length - first, max(1, SAMPLED_QUERIES // windows))
    chosen = torch.randperm(length - first, generator=torch.Generator().manual_seed(seed))[:count]
    return (first + chosen).sort().values


@torch.no_grad()
def remote_shares(
    recorded: Recorder, centroids: torch.Tensor, pattern: AttentionPattern, rotary: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What full attention gives to the keys of each cluster that a query could see, if it looked into that cluster.

    Args:
        recorded: of a layer.
        centroids: `[G, C, D]`.
        pattern: of the routed layer.
        rotary: whether the layer rotates queries and keys.

    Returns:
        Queries before rotation `[H, N, D]` and shares `[H, N, C]` of all their attention, float32.
    """
    queries, shares, positions = [], [], recorded.positions
    cos, sin = recorded.position_embeddings or (None, None)
    for query, key in zip(recorded.queries, recorded.keys, strict=True):
        query, key = query.float()[None], key.float()[None]
        queries.append(query[0])
        clusters = assign_keys(key, centroids)
        members = nn.functional.one_hot(clusters, centroids.shape[1]).float()
        members[:, :, : pattern.num_sink_tokens] = 0
        counts = members.cumsum(2)
        ranks = counts.gather(3, clusters[..., None]).squeeze(3)
        if rotary:
            query, key = rotate(query, cos[:, positions], sin[:, positions]), rotate(key, cos, sin)
        query = query.unflatten(1, (key.shape[1], -1)) * key.shape[-1] ** -0.5
        for own, places in zip(query.split(BLOCK, 3), positions.split(BLOCK), strict=True):
            length = int(places[-1]) + 1
            tokens, edges = torch.arange(length, device=key.device), places[:, None]
            logits = own @ key[:, :, None, :length].transpose(-1, -2)
            weights = logits.masked_fill_(tokens > edges, float("-inf")).softmax(-1)
            # Of a cluster, a query reaches the most recent keys behind its window.
            behind = counts[:, :, (places - pattern.window).clamp(min=0)].gather(
                3, clusters[:, :, None, :length].expand(-1, -1, len(places), -1)
            )
            reached = (tokens <= edges - pattern.window) & (ranks[:, :, None, :length] > behind - pattern.routed_tokens)
            weights *= reached[:, :, None]
            shares.append((weights @ members[:, :, None, :length])[0].flatten(0, 1))
    return torch.cat(queries, 1), torch.cat(shares, 1)


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


def record(model, layers: dict[int, torch.Tensor], windows: Sequence[torch.Tensor]) -> dict[int, Recorder]:
    """Keys and some queries of some layers of a model, while it reads windows.

    Args:
        model: with full attention in these layers.
        layers: number -> positions of the queries.
        windows: `[n]` token ids each.
    """
    recorders, hooks = {}, []
    for layer_idx, positions in layers.items():
        attention = model.model.layers[layer_idx].self_attn
        recorder = recorders[layer_idx] = attention.router = Recorder(positions)

        def look(module, args, recorder=recorder):
            recorder.position_embeddings = args[1]

        hooks.append(attention.register_forward_pre_hook(look))
    try:
        with torch.no_grad():
            for window in windows:
                model.model(window.unsqueeze(0), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for layer_idx in layers:
            model.model.layers[layer_idx].self_attn.router = None
    return recorders
