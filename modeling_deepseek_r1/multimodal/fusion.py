"""Features in the places of their placeholders.

    output = g * embedding + (1 - g) * feature        g = sigmoid(net(embedding + feature))

Features of several modalities that belong to one placeholder, such as a frame and what sounds meanwhile, share a softmax with its
embedding, whose logit is 0 and theirs -net(embedding + feature); with one feature that is the above.

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

    def forward(self, embeddings: torch.Tensor, features: torch.Tensor, *aligned: torch.Tensor) -> torch.Tensor:
        """`[N, H]` of the placeholders' embeddings `[N, H]` and the features at their places.

        Args:
            aligned: more features `[N, H]` of the same places; zeros where there is none.
        """
        if not aligned:
            gate = self._logit(embeddings + features).sigmoid()
            return gate * embeddings + (1 - gate) * features
        features = torch.stack((features, *aligned))
        absent = (features == 0).all(-1, keepdim=True)
        logits = -self._logit(embeddings + features).masked_fill(absent, torch.inf)
        shares = nn.functional.pad(logits, (0, 0, 0, 0, 1, 0)).softmax(0)
        return shares[0] * embeddings + (shares[1:] * features).sum(0)

    def _logit(self, states: torch.Tensor) -> torch.Tensor:
        return self.output(nn.functional.silu(self.hidden(states)))


def place_features(
    embeddings: torch.Tensor, features: torch.Tensor, places: torch.Tensor, fuse=None, *aligned: torch.Tensor
) -> torch.Tensor:
    """`[B, n, H]` with feature number i at place number i, counted along the rows.

    Args:
        embeddings: `[B, n, H]`.
        features: `[N, H]`.
        places: `[B, n]` bool, true N times.
        fuse: makes `[N, H]` of the embeddings at the places and the features; None = the features alone.
        aligned: more features `[N, H]` for `fuse`.
    """
    features = features.to(embeddings)
    if fuse is not None:
        features = fuse(embeddings[places], features, *(own.to(embeddings) for own in aligned))
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
