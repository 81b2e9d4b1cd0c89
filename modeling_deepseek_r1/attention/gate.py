"""The gate of a routed layer's remote keys, and its centroids."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .kmeans import assign_keys, choose_clusters
from .routed import Routing


class DeepseekR1Router(nn.Module):
    """Which clusters queries and keys belong to, and how much the remote keys count.

    The gate of query head h at hidden state x is g = 2 sigmoid(w_h . x + b_h): zero parameters mean g = 1, so that a converted
    model treats remote keys like near ones; a new model starts with Xavier-uniform weights. Centroids are a buffer, fitted by
    k-means and moved by statistics, never by gradients. All of it is float32, whatever the model's dtype.

    Args:
        hidden_size: width of x.
        num_heads, num_key_value_heads, head_dim: of the attention.
        num_clusters, routed_clusters: centroids per key/value head, and how many of them a query looks into.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int, num_clusters: int, routed_clusters: int
    ):
        super().__init__()
        self.routed_clusters = routed_clusters
        self.weight = nn.Parameter(torch.zeros(num_heads, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_heads, dtype=torch.float32))
        self.register_buffer("centroids", torch.zeros(num_key_value_heads, num_clusters, head_dim, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Routing:
        """Routing for the layer's input `[B, n, hidden]`, and queries `[B, H, n, D]` and keys `[B, G, n, D]` before rotation."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            scores = F.linear(hidden_states.float(), self.weight.float(), self.bias.float())
            log_gate = math.log(2.0) + F.logsigmoid(scores).transpose(1, 2)
            with torch.no_grad():
                clusters = choose_clusters(query, self.centroids, self.routed_clusters), assign_keys(key, self.centroids)
        return Routing(*clusters, log_gate)
