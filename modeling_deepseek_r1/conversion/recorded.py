"""Full attention of some layers of a model while it reads a text, recorded for sampled queries; routed layers are fitted to it.

Shapes: H query heads, G key/value heads, C clusters, D head size, n tokens of a window, P sampled queries of a window.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..attention.kmeans import assign_keys
from ..attention.pattern import AttentionPattern
from ..attention.rotary import rotate

SAMPLED_QUERIES = 4096
"""Queries of a layer, from all windows together."""
KEPT = torch.bfloat16
BLOCK = 128
"""Queries whose attention is held at once."""


class Recorder(nn.Module):
    """In the place of a router while the model reads: keeps keys, values and some queries, before rotation.

    Args:
        positions: `[P]` of the queries that are kept.

    Attributes:
        queries, keys, values: `[H, P, D]`, `[G, n, D]` and `[G, n, D]` of each window, rounded.
        position_embeddings: of a window's tokens, the same for all.
    """

    def __init__(self, positions: torch.Tensor):
        super().__init__()
        self.positions = positions
        self.queries: list[torch.Tensor] = []
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
        self.queries.append(query[0, :, self.positions].to(KEPT))
        self.keys.append(key[0].to(KEPT))


def sampled_positions(pattern: AttentionPattern, length: int, windows: int, seed: int) -> torch.Tensor:
    """`[P]` positions of a window's tokens that have remote keys, in order; empty where none has."""
    first = min(pattern.window + pattern.num_sink_tokens, length)
    count = min(length - first, max(1, SAMPLED_QUERIES // windows))
    chosen = torch.randperm(length - first, generator=torch.Generator().manual_seed(seed))[:count]
    return (first + chosen).sort().values


class Block(NamedTuple):
    """Full attention of a few recorded queries.

    Attributes:
        window: number of the window.
        queries: `[P]` numbers of the recorded ones.
        logits: `[G, H / G, P, n]` of the keys up to the last of these queries; later ones are -inf.
        clusters: `[G, n]` of the keys.
        reached: `[G, P, n]` bool, keys that a query sees if it looks into their cluster.
    """

    window: int
    queries: torch.Tensor
    logits: torch.Tensor
    clusters: torch.Tensor
    reached: torch.Tensor


def attention_blocks(
    recorded: Recorder, centroids: torch.Tensor, pattern: AttentionPattern, rotary: bool, queries: slice = slice(None)
) -> Iterator[Block]:
    """Goes through the recorded queries, or some of each window.

    Args:
        recorded: of a layer.
        centroids: `[G, C, D]`.
        pattern: of the routed layer.
        rotary: whether the layer rotates queries and keys.
    """
    chosen = torch.arange(len(recorded.positions))[queries]
    cos, sin = recorded.position_embeddings or (None, None)
    for window, (query, key) in enumerate(zip(recorded.queries, recorded.keys, strict=True)):
        query, key = query.float()[None], key.float()[None]
        clusters = assign_keys(key, centroids)
        members = nn.functional.one_hot(clusters[0], centroids.shape[1]).int()
        members[:, : pattern.num_sink_tokens] = 0
        counts = members.cumsum(1, dtype=torch.int32)
        ranks = counts.gather(2, clusters[0, :, :, None]).squeeze(2)
        if rotary:
            places = recorded.positions
            query, key = rotate(query, cos[:, places], sin[:, places]), rotate(key, cos, sin)
        query = query[0].unflatten(0, (key.shape[1], -1)) * key.shape[-1] ** -0.5
        for some in chosen.split(BLOCK) if len(chosen) else ():
            places = recorded.positions[some]
            length = int(places[-1]) + 1
            tokens, edges = torch.arange(length, device=key.device), places[:, None]
            logits = query[:, :, some] @ key[0, :, None, :length].transpose(-1, -2)
            logits.masked_fill_(tokens > edges, float("-inf"))
            own = clusters[0, :, :length]
            # Of a cluster, a query reaches the most recent keys behind its window.
            behind = counts[:, (places - pattern.window).clamp(min=0)].gather(2, own[:, None].expand(-1, len(places), -1))
            reached = (tokens <= edges - pattern.window) & (tokens >= pattern.num_sink_tokens)
            reached = reached & (ranks[:, None, :length] > behind - pattern.routed_tokens)
            yield Block(window, some, logits, own, reached)


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

        def keep(module, args, output, recorder=recorder, attention=attention):
            values = output[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            limit = attention.clip_qkv or float("inf")
            recorder.values.append(values.clamp(-limit, limit).to(KEPT))

        hooks += [attention.register_forward_pre_hook(look), attention.v_proj.register_forward_hook(keep)]
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
