"""The reference: dense masked attention in float32, a few lines that the fast implementations are tested against."""

import torch

from .pattern import AttentionLayout, AttentionPattern, visible_keys


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


def visible_to_layout(
    layout: AttentionLayout,
    pattern: AttentionPattern,
    num_keys: int,
    key_positions: torch.Tensor | None,
    key_documents: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """`[B, Q, K]` bool for the keys that a layer holds: those of the cache followed by the new ones."""
    if layout.is_regular:
        return visible_keys(pattern, *key_layout(layout, pattern, num_keys, device))
    return visible_keys(pattern, layout.positions, key_positions, layout.documents, key_documents)
