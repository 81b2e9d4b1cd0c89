"""The reference: dense masked attention in float32, a few lines that the fast implementations are tested against."""

import torch

from .kernels import MAX_SCORES
from .nodes import Nodes, dense_inputs
from .pattern import AttentionLayout, AttentionPattern, remote_keys, visible_keys
from .routed import Routing


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
    remote: torch.Tensor | None = None,
    log_gate: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the visible keys, and over remote ones under a gate.

    Args:
        query: `[B, H, Q, D]`.
        key, value: `[B, G, K, D]`, G dividing H.
        visible: `[B, Q, K]` bool.
        dropout: probability of dropping an attention weight; 0 outside of training.
        remote: `[B, H, Q, K]` bool, disjoint from `visible`.
        log_gate: `[B, H, Q, 1 or K]`, added to the remote scores.

    Returns:
        The output `[B, H, Q, D]` and the weights `[B, H, Q, K]`, in the query's dtype.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3) * scale).float()
    visible = visible[:, None]
    if remote is not None:
        scores = torch.where(remote, scores + log_gate, scores)
        visible = visible | remote
    weights = scores.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout)
    return weights @ value, weights


def key_layout(
    layout: AttentionLayout, pattern: AttentionPattern, num_keys: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of queries `[B, Q]` and keys `[B, K]` of a regular layout, in which the keys are the first tokens of the
    document followed by the last ones."""
    total = layout.past + layout.num_queries
    head = min(pattern.num_sink_tokens, num_keys) if num_keys < total else 0
    keys = torch.cat((torch.arange(head, device=device), torch.arange(total - num_keys + head, total, device=device)))
    queries = torch.arange(layout.past, total, device=device)
    return queries.expand(layout.batch_size, -1), keys.expand(layout.batch_size, -1)


def layer_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    scale: float,
    places: tuple,
    routing: Routing | Nodes | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_reference` of a layer of any type.

    Args:
        query, key, value, scale, dropout: as there.
        places: positions of queries `[B, Q]` and keys `[B, K]`, and their documents or None, as in `visible_keys`.
        routing: clusters and gate of a routed layer, or gate, memory and nodes of a global one.
    """
    visible = visible_keys(pattern, *places)
    if routing is None:
        return attention_reference(query, key, value, visible, scale, dropout)
    if isinstance(routing, Nodes):
        key, value, *rest = dense_inputs(key, value, visible, routing, pattern, places)
        return attention_reference(query, key, value, rest[0], scale, dropout, *rest[1:])
    remote = remote_keys(pattern, routing.query_clusters, routing.key_clusters, *places)
    return attention_reference(query, key, value, visible, scale, dropout, remote, routing.log_gate[..., None])


@torch.no_grad()
def sparse_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: AttentionPattern,
    scale: float,
    places: tuple,
    routing: Routing | Nodes | None = None,
) -> torch.Tensor:
    """The weights of `layer_reference` as a sparse COO tensor `[B, H, Q, K]`, made from a bounded number of rows at a time; rows of
    padding are empty."""
    queries, keys, own, others = places
    step, pieces = max(1, MAX_SCORES // key.shape[2]), []
    for start in range(0, query.shape[2], step):
        rows = slice(start, start + step)
        part = queries[:, rows], keys, None if own is None else own[:, rows], others
        chosen = routing and routing._replace(log_gate=routing.log_gate[:, :, rows])
        if isinstance(routing, Routing):
            chosen = chosen._replace(query_clusters=routing.query_clusters[:, :, rows])
        _, weights = layer_reference(query[:, :, rows], key, value, pattern, scale, part, chosen)
        pieces.append(weights.masked_fill(part[0][:, None, :, None] < 0, 0.0).to_sparse())
    return torch.cat(pieces, 2).coalesce()
