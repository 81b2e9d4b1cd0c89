"""The attention layer: projections, rotation, cache, and the choice of implementation.

- `eager`: the dense reference, which also returns the attention weights.
- `sdpa`: blockwise; no tensor grows with n x n.
- any other registered name, or a paged cache, means that a serving engine computes attention and owns the keys (continuous
  batching, vLLM): it is called through transformers' interface, for patterns that such engines know.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import PatternLayer
from .gate import DeepseekR1GlobalTokens, DeepseekR1Router
from .nodes import Nodes, dense_inputs
from .nodes_cache import GlobalLayer
from .norm import DeepseekR1RMSNorm
from .pattern import AttentionLayout, AttentionPattern, remote_keys
from .ragged import document_attention, ragged_attention
from .reference import attention_reference, key_layout, visible_to_layout
from .rotary import rotate
from .routed import Routing, routed_step
from .routed_cache import RoutedLayer

OWN_IMPLEMENTATIONS = ("eager", "sdpa")
MAX_STEPS = 16
"""Up to this many new tokens, a routed layer looks them up one by one in the lists of its cache."""


def layer_pattern(config, layer_idx: int) -> AttentionPattern:
    """The pattern of one layer from the model's configuration."""
    if config.layer_types[layer_idx] == "full_attention":
        return AttentionPattern()
    sparse = config.sparse_attention_of(layer_idx)
    limits = (sparse.num_sink_tokens,) if sparse is not None else ()
    if config.layer_types[layer_idx] == "local_routed_attention":
        limits = (sparse.num_sink_tokens, sparse.routed_clusters, sparse.routed_tokens)
    elif config.layer_types[layer_idx] == "local_global_attention":
        limits = (sparse.num_sink_tokens, 0, 0, sparse.global_stride)
    return AttentionPattern(config.per_layer_config[layer_idx].sliding_window, *limits)


def cache_layer(config, layer_idx: int, record_past: bool = False) -> PatternLayer:
    """What a cache needs for one layer."""
    pattern = layer_pattern(config, layer_idx)
    if pattern.routed_clusters:
        return RoutedLayer(pattern, config.sparse_attention_of(layer_idx).num_clusters, record_past)
    return (GlobalLayer if pattern.global_stride else PatternLayer)(pattern, record_past)


class DeepseekR1Attention(nn.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) over the keys of the layer's pattern.

    Args:
        config: the model's configuration; all sizes are those of `config.per_layer_config[layer_idx]`.
        layer_idx: number of the layer.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.config, self.layer_idx = config, layer_idx
        self.pattern = layer_pattern(config, layer_idx)
        self.layer_type = config.layer_types[layer_idx]
        self.head_dim = layer.head_dim
        self.num_key_value_groups = layer.num_attention_heads // layer.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = layer.attention_dropout
        self.uses_rotary = bool(config.no_rope_layers[layer_idx])
        self.is_causal = True
        hidden, bias = layer.hidden_size, layer.attention_bias
        self.q_proj = nn.Linear(hidden, layer.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, layer.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, layer.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(layer.num_attention_heads * self.head_dim, hidden, bias=layer.attention_out_bias)
        self.qk_norm, self.clip_qkv = layer.qk_norm, layer.clip_qkv
        sizes = [self.head_dim] * 2 if self.qk_norm == "head" else [self.q_proj.out_features, self.k_proj.out_features]
        self.q_norm = DeepseekR1RMSNorm(sizes[0], layer.rms_norm_eps) if self.qk_norm is not None else None
        self.k_norm = DeepseekR1RMSNorm(sizes[1], layer.rms_norm_eps) if self.qk_norm is not None else None
        self.router = self.global_tokens = None
        sparse = config.sparse_attention_of(layer_idx)
        sizes = hidden, layer.num_attention_heads, layer.num_key_value_heads, self.head_dim
        if self.pattern.routed_clusters:
            self.router = DeepseekR1Router(*sizes, sparse.num_clusters, sparse.routed_clusters)
        elif self.pattern.global_stride:
            self.global_tokens = DeepseekR1GlobalTokens(*sizes, sparse.num_memory_tokens)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        layout: AttentionLayout | None,
        past_key_values=None,
        attention_mask=None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns `[B, n, hidden]` and, from the reference only, the weights `[B, heads, n, keys]`; those of a global layer begin
        with its memory tokens and, with a cache, its nodes.

        `layout` is None where an engine computes the attention; `attention_mask` is then whatever that engine passes.
        """
        query, key, value, routing = self.project(hidden_states, position_embeddings)
        if layout is None:
            self._check_engine()
            # Looked up and called right here: vLLM reads this method's source to find the layers that it serves.
            interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            mask = attention_mask[self.layer_type] if isinstance(attention_mask, dict) else attention_mask
            options = {"dropout": 0.0, "sliding_window": self.pattern.window, **kwargs}
            output, weights = interface(self, query, key, value, mask, scaling=self.scaling, **options)
        else:
            output, weights = self._own_attention(query, key, value, layout, past_key_values, routing)
            output = output.transpose(1, 2)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Routing | Nodes | None]:
        """Rotated queries `[B, H, n, D]` and keys `[B, G, n, D]`, values, and what a routed or global layer knows besides."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.view(shape), key.view(shape), value.view(shape)
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        if self.clip_qkv is not None:
            query, key, value = (states.clamp(-self.clip_qkv, self.clip_qkv) for states in (query, key, value))
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        routing = self.router(hidden_states, query, key) if self.router is not None else None
        if self.global_tokens is not None:
            routing = self.global_tokens(hidden_states)
        if self.uses_rotary:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        # Under autocast norms and rotation give float32, and the kernels want queries, keys and values of one dtype.
        return query.to(value.dtype), key.to(value.dtype), value, routing

    def _own_attention(self, query, key, value, layout, past_key_values, routing: Routing | Nodes | None):
        positions, documents, held = layout.positions, layout.documents, None
        if past_key_values is not None:
            new = {"clusters": routing.key_clusters} if self.router is not None else {}
            key, value = past_key_values.update(key, value, self.layer_idx, layout=layout, **new)
            held = past_key_values.layers[self.layer_idx]
            positions, documents = held.key_positions, held.key_documents
            if routing is not None:
                routing = routing.cached(held)
        dropout = self.attention_dropout if self.training else 0.0
        if self.config._attn_implementation == "eager" or dropout:
            # The fused kernels have no dropout; the reference does, at the price of its n x n weights.
            return self._reference(query, key, value, layout, positions, documents, routing, dropout)
        if not layout.is_regular:
            return ragged_attention(query, key, value, self.pattern, self.scaling, layout, positions, documents, routing), None
        seq_len = layout.past + layout.num_queries
        if self.router is not None and layout.past and layout.num_queries <= MAX_STEPS and not torch.is_grad_enabled():
            return self._routed_steps(query, key, value, held, routing, layout.past), None
        return document_attention(query, key, value, self.pattern, self.scaling, seq_len, routing), None

    def _routed_steps(self, query, key, value, held, routing: Routing, past: int) -> torch.Tensor:
        outputs = []
        for step in range(query.shape[2]):
            one, stop = slice(step, step + 1), past + step + 1
            remote = held.recent(routing.query_clusters[:, :, step], stop - 1)
            states = query[:, :, one], key[:, :, :stop], value[:, :, :stop]
            outputs.append(routed_step(*states, *remote, routing.log_gate[:, :, one], self.pattern, self.scaling))
        return torch.cat(outputs, 2)

    def _reference(self, query, key, value, layout, positions, documents, routing: Routing | Nodes | None, dropout: float):
        visible = visible_to_layout(layout, self.pattern, key.shape[2], positions, documents, query.device)
        if routing is None:
            return attention_reference(query, key, value, visible, self.scaling, dropout)
        places = (layout.positions, positions, layout.documents, documents)
        if layout.is_regular:
            places = key_layout(layout, self.pattern, key.shape[2], query.device)
        if isinstance(routing, Nodes):
            key, value, *rest = dense_inputs(key, value, visible, routing, self.pattern, places)
            return attention_reference(query, key, value, rest[0], self.scaling, dropout, *rest[1:])
        remote = remote_keys(self.pattern, routing.query_clusters, routing.key_clusters, *places)
        return attention_reference(query, key, value, visible, self.scaling, dropout, remote, routing.log_gate[..., None])

    def _check_engine(self) -> None:
        own = self.router is not None or self.global_tokens is not None
        if self.pattern.num_sink_tokens or own:
            what = f"is {self.layer_type}" if own else f"has {self.pattern.num_sink_tokens} sink tokens"
            raise ValueError(
                f"layer {self.layer_idx} {what}, which attention implementation"
                f" {self.config._attn_implementation!r} does not know; it serves full_attention and plain sliding_attention layers"
            )
