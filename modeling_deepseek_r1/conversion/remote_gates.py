"""Gates of routed layers, fitted so that the remote keys that a query finds also stand for those that it does not.

Full attention's output o lies between the mean of the local values o_L, that of the remote values which the layer finds, o_R, and
that of the others, which are missing. A layer that adds o_L and o_R in proportion to their weights therefore leans towards the
local ones. Remote keys that are found are the better guess for those that are not, and a gate above 1 says so: for each query head
a bias b, chosen such that what the layer adds to the hidden states, W_h behind head h, is closest to what full attention adds,

    min_b  sum over queries of | sum_h W_h ((1 - s_h) o_L,h + s_h o_R,h - o_h) |^2,     s_h = sigmoid(l_R,h - l_L,h + log g(b_h))

with the log-sum-exps l_L and l_R of the logits of the two parts and g(b) = 2 sigmoid(b). Gauss-Newton steps from b = 0, which is the
solution where nothing is missing.

Shapes: H query heads, G key/value heads, D head size, P queries, n keys.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..attention.kmeans import choose_clusters
from ..attention.pattern import AttentionPattern
from .recorded import Recorder, attention_blocks

EVERY = 4
"""Of the recorded queries, one of so many is used."""
STEPS, DAMPING, LIMIT = 12, 0.01, 4.0


class Errors(NamedTuple):
    """What a layer adds, minus what full attention adds, for shares s of the remote part: `|D s + e|^2` for each query.

    Attributes:
        gram: `[P, H, H]`, D^T D.
        cross: `[P, H]`, D^T e.
        odds: `[P, H]`, l_R - l_L; 0 where a head finds no remote keys, as are its entries in D.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    odds: torch.Tensor


@torch.no_grad()
def remote_errors(
    recorded: Recorder,
    centroids: torch.Tensor,
    query_centroids: torch.Tensor,
    pattern: AttentionPattern,
    rotary: bool,
    projection: torch.Tensor,
) -> Errors:
    """The quadratic forms of some recorded queries.

    Args:
        recorded: of a layer.
        centroids, query_centroids: `[G, C, D]` and `[H, C, D]`.
        pattern: of the routed layer.
        rotary: whether the layer rotates queries and keys.
        projection: `[hidden, H D]`, weight of the output projection.
    """
    heads = projection.float().unflatten(1, (len(query_centroids), -1)).permute(1, 2, 0)
    count = len(query_centroids)
    parts = [(torch.zeros(0, count, count), torch.zeros(0, count), torch.zeros(0, count))]
    for block in attention_blocks(recorded, centroids, pattern, rotary, slice(None, None, EVERY)):
        query = recorded.queries[block.window][:, block.queries]
        chosen = choose_clusters(query[None], query_centroids, pattern.routed_clusters)[0]
        chosen = chosen.unflatten(0, (len(centroids), -1))
        remote = block.reached[:, None] & (block.clusters[:, None, None, :, None] == chosen[..., None, :]).any(-1)
        places, tokens = recorded.positions[block.queries][:, None], torch.arange(block.logits.shape[-1])
        local = (tokens > places - pattern.window) | (tokens < pattern.num_sink_tokens)
        values = recorded.values[block.window][:, None, : len(tokens)].float()
        full, near, far = (_attend(block.logits, mask, values) for mask in (torch.ones_like(local), local, remote))
        finds = far[1].isfinite()
        spread = torch.einsum("hpd,hdk->phk", (far[0] - near[0]) * finds[..., None], heads)
        error = torch.einsum("hpd,hdk->pk", near[0] - full[0], heads)
        odds = torch.where(finds, far[1] - near[1], 0.0)
        parts.append((spread @ spread.transpose(1, 2), (spread @ error[..., None]).squeeze(-1), odds.T))
    return Errors(*map(torch.cat, zip(*parts, strict=True)))


def _attend(logits: torch.Tensor, mask: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean value `[H, P, D]` under a mask and log-sum-exp `[H, P]` of the logits `[G, H / G, P, n]`; 0 and -inf without keys."""
    logits = logits.masked_fill(~mask, float("-inf"))
    return (logits.softmax(-1).nan_to_num() @ values).flatten(0, 1), logits.logsumexp(-1).flatten(0, 1)


def fit_gate_bias(errors: Errors) -> torch.Tensor:
    """`[H]` float32, see above; zero where there is nothing to fit."""
    gram, cross, odds = (part.double() for part in errors)
    bias = torch.zeros(odds.shape[1], dtype=torch.float64)
    for _ in range(STEPS):
        share = torch.sigmoid(odds + math.log(2.0) + F.logsigmoid(bias))
        slope = share * (1 - share) * torch.sigmoid(-bias)
        gradient = (slope * (torch.einsum("phk,pk->ph", gram, share) + cross)).sum(0)
        hessian = torch.einsum("ph,phk,pk->hk", slope, gram, slope)
        scale = hessian.diagonal().mean()
        if not scale > 0:
            break
        # Damped, so that heads that hardly find anything stay where they are.
        bias = bias - torch.linalg.solve(hessian + DAMPING * scale * torch.eye(len(bias), dtype=torch.float64), gradient)
        bias = bias.clamp(-LIMIT, LIMIT)
    return bias.float()
