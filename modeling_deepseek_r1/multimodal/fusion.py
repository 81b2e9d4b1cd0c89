"""Features in the places of their placeholders.

    output = g * embedding + (1 - g) * feature        g = sigmoid(net(embedding + feature))

Shapes: B rows, n tokens, N features of one modality, H hidden size.
"""

import math

import torch
from torch import nn
from transformers import initialization as init


class ConstantGate(nn.Linear):
    """One logit, which starts the same for every input.

    Args:
        width: of the input.
        initial_value: the gate after its sigmoid, at the start.
    """

    def __init__(self, width: int, initial_value: float):
        super().__init__(width, 1)
        self.initial_logit = math.log(initial_value / (1 - initial_value))

    def init_weights(self, std: float) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, self.initial_logit)


class GatedFusion(nn.Module):
    """The gate g of each placeholder.

    Args:
        hidden_size: H.
        width: of the network.
        initial_token_share: g at the start.
    """

    def __init__(self, hidden_size: int, width: int, initial_token_share: float):
        super().__init__()
        self.hidden = nn.Linear(hidden_size, width)
        self.output = ConstantGate(width, initial_token_share)

    def forward(self, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`[N, H]` of the placeholders' embeddings `[N, H]` and the features at their places."""
        gate = self.output(nn.functional.silu(self.hidden(embeddings + features))).sigmoid()
        return gate * embeddings + (1 - gate) * features


def place_features(embeddings: torch.Tensor, features: torch.Tensor, places: torch.Tensor, fuse=None) -> torch.Tensor:
    """`[B, n, H]` with feature number i at place number i, counted along the rows.

    Args:
        embeddings: `[B, n, H]`.
        features: `[N, H]`.
        places: `[B, n]` bool, true N times.
        fuse: makes `[N, H]` of the embeddings at the places and the features; None = the features alone.
    """
    features = features.to(embeddings)
    if fuse is not None:
        features = fuse(embeddings[places], features)
    return embeddings.masked_scatter(places[..., None], features.to(embeddings))


def place_features_reference(embeddings: torch.Tensor, features: torch.Tensor, places: torch.Tensor, fuse=None) -> torch.Tensor:
    """What `place_features` computes, place by place."""
    rows, number = [list(row) for row in embeddings], 0
    for row in range(len(rows)):
        for token in range(len(rows[row])):
            if places[row, token]:
                feature = features[number]
                rows[row][token] = feature if fuse is None else fuse(rows[row][token], feature)
                number += 1
    return torch.stack([torch.stack(row) for row in rows])
