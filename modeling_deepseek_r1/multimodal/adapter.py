"""From an encoder's features to vectors that look like token embeddings: same width, same root mean square."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..attention.norm import DeepseekR1RMSNorm


class FeatureNorm(DeepseekR1RMSNorm):
    """RMS norm whose weights start at the root mean square of the token embeddings."""

    def init_weights(self, std: float) -> None:
        # Embeddings of a new model have this standard deviation.
        init.constant_(self.weight, std)


class ImageAdapter(nn.Module):
    """1x1 convolution over the grid of patches, or one over squares of `factor` by `factor` patches without overlap.

    Args:
        width, hidden_size: of the encoder and of the text model.
        factor: a grid that it does not divide is padded with zeros.
        eps: of the norm.
    """

    def __init__(self, width: int, hidden_size: int, factor: int, eps: float):
        super().__init__()
        self.factor = factor
        self.projection = nn.Conv2d(width, hidden_size, factor, stride=factor)
        self.norm = FeatureNorm(hidden_size, eps)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """`[I, positions, hidden]`, row by row, of `[I, D, rows, columns]`."""
        rows, columns = (-size % self.factor for size in grid.shape[-2:])
        grid = F.pad(grid.to(self.projection.weight.dtype), (0, columns, 0, rows))
        return self.norm(self.projection(grid).flatten(2).transpose(1, 2))


class AudioAdapter(nn.Module):
    """Convolution over `factor` positions of the encoder without overlap; arguments as in `ImageAdapter`."""

    def __init__(self, width: int, hidden_size: int, factor: int, eps: float):
        super().__init__()
        self.factor = factor
        self.projection = nn.Conv1d(width, hidden_size, factor, stride=factor)
        self.norm = FeatureNorm(hidden_size, eps)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """`[sum of ceil(lengths / factor), hidden]`, clip after clip, of `[A, S, D]`, of which `lengths` `[A]` are real."""
        real = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        features = (features.to(self.projection.weight.dtype) * real[..., None]).transpose(1, 2)
        output = self.norm(self.projection(F.pad(features, (0, -features.shape[-1] % self.factor))).transpose(1, 2))
        return output[F.pad(real, (0, -real.shape[1] % self.factor))[:, :: self.factor]]


class RowEncoder(nn.Module):
    """One vector per field of a row: `value * weight + bias` of a number, an embedding of a category, or that of "missing".

    Args:
        num_numeric: numeric fields.
        categories: number of categories of each categorical field.
        hidden_size, eps: of the text model and of the norm.
    """

    def __init__(self, num_numeric: int, categories: list[int], hidden_size: int, eps: float):
        super().__init__()
        offsets = [sum(categories[:field]) for field in range(len(categories))]
        self.offsets = offsets
        self.weight = nn.Parameter(torch.zeros(num_numeric, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_numeric, hidden_size))
        self.categories = nn.Embedding(sum(categories), hidden_size) if categories else None
        self.missing = nn.Embedding(num_numeric + len(categories), hidden_size)
        self.norm = FeatureNorm(hidden_size, eps)

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)
        init.normal_(self.bias, std=std)

    def forward(self, numeric: torch.Tensor, categorical: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        """`[rows, fields, hidden]` of standardised numbers `[rows, numeric]`, numbers of categories `[rows, categorical]` and a
        mask `[rows, fields]` of what is missing."""
        fields = numeric.to(self.weight.dtype)[..., None] * self.weight + self.bias
        if self.categories is not None:
            ids = categorical + torch.tensor(self.offsets, device=categorical.device)
            fields = torch.cat((fields, self.categories(ids)), 1)
        return self.norm(torch.where(missing[..., None].bool(), self.missing.weight, fields))
