"""The attention layer: projections, rotation, cache, and the choice of implementation.

- `eager`: the dense reference, which also returns the attention weights.
- `sdpa`: blockwise; no tensor grows with n x n.
- `flash_attention_2`: the same with FlashAttention's kernels for what needs no mask.
- `flex_attention`: torch's, compiled for the layer's pattern; gradients on a GPU only.
- any other registered name, or a paged cache, means that a serving engine computes attention and owns the keys (continuous
  batching, vLLM): it is called through transformers' interface, for patterns that such engines know.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import PatternLayer
from .flash import flash_kernel
from .flex import flex_pattern_attention
from .gate import DeepseekR1GlobalTokens, DeepseekR1Router
from .nodes import Nodes
from .nodes_cache import GlobalLayer
from .norm import DeepseekR1RMSNorm
from .pattern import AttentionLayout, AttentionPattern
from .ragged import MASKED_QUERIES, document_attention, ragged_attention
from .reference import key_layout, layer_reference, sparse_weights
from .rotary import rotate
from .routed import Routing, routed_step
from .routed_cache import RoutedLayer
from .static_cache import StaticPatternLayer
from .static_step import StaticLayout, static_attention

OWN_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")
MAX_STEPS = 16
"""Up to this many new tokens, a routed layer looks them up one by one in the lists of its cache."""


def layer_pattern(config, layer_idx: int) -> AttentionPattern:
    """The pattern of one layer from the model's configuration."""
    causal = not config.use_bidirectional_attention
    if config.layer_types[layer_idx] == "full_attention":
        return AttentionPattern(causal=causal)
    sparse = config.sparse_attention_of(layer_idx)
    limits = (sparse.num_sink_tokens,) if sparse is not None else ()
    if config.layer_types[layer_idx] == "local_routed_attention":
        limits = (sparse.num_sink_tokens, sparse.routed_clusters, sparse.routed_tokens)
    elif config.layer_types[layer_idx] == "local_global_attention":
        limits = (sparse.num_sink_tokens, 0, 0, sparse.global_stride)
    return AttentionPattern(config.per_layer_config[layer_idx].sliding_window, *limits, causal=causal)


def cache_layer(
    config, layer_idx: int, record_past: bool = False, max_cache_len: int | None = None
) -> PatternLayer | StaticPatternLayer:
    """What a cache needs for one layer; with `max_cache_len` for a static cache of so many tokens."""
    pattern, sparse = layer_pattern(config, layer_idx), config.sparse_attention_of(layer_idx)
    if pattern.routed_clusters:
        layer = RoutedLayer(pattern, sparse.num_clusters, record_past)
    else:
        layer = (GlobalLayer if pattern.global_stride else PatternLayer)(pattern, record_past)
    if max_cache_len is None:
        return layer
    memory = sparse.num_memory_tokens if pattern.global_stride else 0
    # The library's own experts are computed one after the other, as many as there are.
    compileable = not (config.is_sparse(layer_idx) and config._experts_implementation == "eager")
    return StaticPatternLayer(layer, max_cache_len, memory, compileable and config._attn_implementation != "eager")


def cacheable(config, past) -> bool:
    """Whether a model can use a cache: not a bidirectional one, for which `past`, a cache or the name of what needs one, is a
    ValueError."""
    if config.use_bidirectional_attention and past is not None:
        what = past if isinstance(past, str) else "past_key_values"
        raise ValueError(
            f"{what} cannot go with use_bidirectional_attention=True: a token that comes later would change all earlier ones."
            " Such a model classifies or embeds whole texts; set the field to False to generate"
        )
    return not config.use_bidirectional_attention


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
        self.is_causal = self.pattern.causal
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
        """Returns `[B, n, hidden]` and the weights `[B, heads, n, keys]`: from the reference always, from other implementations
        with `output_attentions` as a sparse tensor. Those of a global layer begin with its memory tokens and, with a cache, its
        nodes.

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
            wanted = kwargs.get("output_attentions") or self.config.output_attentions
            output, weights = self._own_attention(query, key, value, layout, past_key_values, routing, wanted)
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

    def _own_attention(self, query, key, value, layout, past_key_values, routing: Routing | Nodes | None, wanted):
        if isinstance(layout, StaticLayout):
            return self._static_step(query, key, value, layout, past_key_values, routing), None
        positions, documents, held = layout.positions, layout.documents, None
        if past_key_values is not None:
            new = {"clusters": routing.key_clusters} if self.router is not None else {}
            key, value = past_key_values.update(key, value, self.layer_idx, layout=layout, **new)
            held = past_key_values.layers[self.layer_idx].open_layer
            positions, documents = held.key_positions, held.key_documents
            if routing is not None:
                routing = routing.cached(held)
        states, dropout = (query, key, value), self.attention_dropout if self.training else 0.0
        name, weights = self.config._attn_implementation, None
        dense = name == "eager" or dropout or torch.compiler.is_exporting()
        few = layout.num_queries <= MASKED_QUERIES and key.shape[2] > layout.num_queries
        if dense or wanted or (name == "flex_attention" and not few):
            places = layout.positions, positions, layout.documents, documents
            if layout.is_regular:
                places = *key_layout(layout, self.pattern, key.shape[2], query.device), None, None
            rest = *states, self.pattern, self.scaling, places, routing
            if dense:
                # Plans are made for one length, and the fused kernels have no dropout; the reference has, at the price of its n x n
                # weights, and can be exported for any length.
                return layer_reference(*rest, dropout)
            weights = sparse_weights(*rest) if wanted else None
            if name == "flex_attention" and not few:
                return flex_pattern_attention(*rest), weights
        kernel = flash_kernel() if name == "flash_attention_2" else None
        if not layout.is_regular:
            rest = layout, positions, documents, routing, kernel
            return ragged_attention(*states, self.pattern, self.scaling, *rest), weights
        seq_len = layout.past + layout.num_queries
        if self.router is not None and layout.past and layout.num_queries <= MAX_STEPS and not torch.is_grad_enabled():
            return self._routed_steps(*states, held, routing, layout.past), weights
        return document_attention(*states, self.pattern, self.scaling, seq_len, routing, kernel), weights

    def _static_step(self, query, key, value, layout: StaticLayout, past_key_values, routing) -> torch.Tensor:
        new = {"clusters": routing.key_clusters} if self.router is not None else {}
        if self.global_tokens is not None:
            new["memory"] = routing.memory
        key, value = past_key_values.update(key, value, self.layer_idx, layout=layout, **new)
        return static_attention(query, key, value, past_key_values.layers[self.layer_idx], layout, routing, self.scaling)

    def _routed_steps(self, query, key, value, held, routing: Routing, past: int) -> torch.Tensor:
        outputs = []
        for step in range(query.shape[2]):
            one, stop = slice(step, step + 1), past + step + 1
            remote = held.recent(routing.query_clusters[:, :, step], stop - 1)
            states = query[:, :, one], key[:, :, :stop], value[:, :, :stop]
            outputs.append(routed_step(*states, *remote, routing.log_gate[:, :, one], self.pattern, self.scaling))
        return torch.cat(outputs, 2)

    def _check_engine(self) -> None:
        own = self.router is not None or self.global_tokens is not None
        if self.pattern.num_sink_tokens or own or not self.pattern.causal:
            what = f"is {self.layer_type}" if own else f"has {self.pattern.num_sink_tokens} sink tokens"
            what = what if self.pattern.causal else "is bidirectional"
            raise ValueError(
                f"layer {self.layer_idx} {what}, which attention implementation"
                f" {self.config._attn_implementation!r} does not know; it serves full_attention and plain sliding_attention layers"
            )
