"""The gate of remote keys, with what else a routed or global layer learns: centroids, or memory tokens."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .float32 import Float32Module
from .kmeans import assign_keys, choose_clusters, cluster_sums
from .nodes import Memory, Nodes
from .routed import Routing


class RemoteGate(Float32Module):
    """How much the remote keys of a layer count.

    The gate of query head h at hidden state x is g = 2 sigmoid(w_h . x + b_h): zero parameters mean g = 1, remote keys count like
    near ones. In a converted model the weights are zero, and so are the biases of global layers; those of routed ones are fitted.
    A new model starts with Xavier-uniform weights. All of it, and what the subclasses add, is float32, whatever the model's dtype.

    Args:
        hidden_size: width of x.
        num_heads: query heads.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_heads, dtype=torch.float32))

    def init_weights(self, std: float) -> None:
        """That of a new model; `std` is the one of its projections."""
        init.xavier_uniform_(self.weight)
        init.zeros_(self.bias)

    def log_gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, H, n]` for the layer's input `[B, n, hidden]`."""
        scores = F.linear(hidden_states.float(), self.weight.float(), self.bias.float())
        return math.log(2.0) + F.logsigmoid(scores).transpose(1, 2)


class DeepseekR1GlobalTokens(RemoteGate):
    """The gate of nodes and memory tokens, and the latter.

    `memory_key` and `memory_value` are `[key/value heads, tokens, head size]`; `memory_bias` `[query heads]` is added to the
    logits of the memory, so that a converted model can start with a memory that hardly counts and yet has gradients.

    Args:
        hidden_size, num_heads: as in `RemoteGate`.
        num_key_value_heads, head_dim: of the attention.
        num_memory_tokens: 0 = no memory.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int, num_memory_tokens: int):
        super().__init__(hidden_size, num_heads)
        self.has_memory = num_memory_tokens > 0
        if self.has_memory:
            shape = num_key_value_heads, num_memory_tokens, head_dim
            self.memory_key = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
            self.memory_value = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
            self.memory_bias = nn.Parameter(torch.zeros(num_heads, dtype=torch.float32))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.has_memory:
            # Keys of size one, because small ones would leave the queries without a gradient; values like those of a token.
            init.normal_(self.memory_key)
            init.normal_(self.memory_value, std=std * self.weight.shape[1] ** 0.5)
            init.zeros_(self.memory_bias)

    def forward(self, hidden_states: torch.Tensor) -> Nodes:
        """Gate and memory for the layer's input `[B, n, hidden]`."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            memory = Memory(self.memory_key, self.memory_value, self.memory_bias.float()) if self.has_memory else None
            return Nodes(self.log_gate(hidden_states), memory)


class DeepseekR1Router(RemoteGate):
    """Which clusters queries and keys belong to, and how much the remote keys count.

    Centroids `[G, C, D]` are a buffer, fitted by k-means and moved by statistics, never by gradients. A query looks into the
    clusters whose query centroids `[H, C, D]` have the largest product with it. They are the centroids themselves in a new model;
    a converted one has them fitted to its source's attention. They move along with the centroids.

    Args:
        hidden_size, num_heads: as in `RemoteGate`.
        num_key_value_heads, head_dim: of the attention.
        num_clusters, routed_clusters: centroids per key/value head, and how many of them a query looks into.

    Attributes:
        gathers_statistics: whether a training forward adds its keys to `statistics`, for `move_centroids`.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int, num_clusters: int, routed_clusters: int
    ):
        super().__init__(hidden_size, num_heads)
        self.routed_clusters = routed_clusters
        self.register_buffer("centroids", torch.zeros(num_key_value_heads, num_clusters, head_dim, dtype=torch.float32))
        self.register_buffer("query_centroids", torch.zeros(num_heads, num_clusters, head_dim, dtype=torch.float32))
        self.statistics: tuple[torch.Tensor, torch.Tensor] | None = None
        self.gathers_statistics = False

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.normal_(self.centroids)
        init.copy_(self.centroids, F.normalize(self.centroids, dim=-1))
        init.copy_(self.query_centroids, self._of_queries(self.centroids))

    def _of_queries(self, centroids: torch.Tensor) -> torch.Tensor:
        return centroids.repeat_interleave(len(self.query_centroids) // len(centroids), 0)

    def forward(self, hidden_states: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Routing:
        """Routing for the layer's input `[B, n, hidden]`, and queries `[B, H, n, D]` and keys `[B, G, n, D]` before rotation."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            log_gate = self.log_gate(hidden_states)
            with torch.no_grad():
                clusters = choose_clusters(query, self.query_centroids, self.routed_clusters), assign_keys(key, self.centroids)
                # Activation checkpointing runs the layer again inside the backward pass; those keys have been counted.
                if self.gathers_statistics and self.training and torch._C._current_graph_task_id() == -1:
                    self._gather(key)
        return Routing(*clusters, log_gate)

    def _gather(self, key: torch.Tensor) -> None:
        keys = F.normalize(key.detach().float().transpose(0, 1).flatten(1, 2), dim=-1)
        sums, counts, _ = cluster_sums(keys, self.centroids)
        if self.statistics is not None:
            sums, counts = sums + self.statistics[0], counts + self.statistics[1]
        self.statistics = sums, counts

    def move_centroids(self, decay: float, reduce=None) -> None:
        """Moves the centroids towards the mean direction of the keys gathered since the last call, and forgets those.

        Args:
            decay: share of the old centroid; clusters without keys stay where they are.
            reduce: adds a tensor up over all ranks, in place.
        """
        if self.statistics is None:
            return
        sums, counts = self.statistics
        self.statistics = None
        for tensor in (sums, counts) if reduce is not None else ():
            reduce(tensor)
        moved = F.normalize(decay * self.centroids + (1 - decay) * F.normalize(sums, dim=-1), dim=-1)
        moved = torch.where(counts[..., None] > 0, moved, self.centroids)
        self.query_centroids += self._of_queries(moved - self.centroids)
        self.centroids.copy_(moved)
