"""Cross-attention from text states to the features of other modalities, in chosen layers (https://arxiv.org/abs/2204.14198).

    output = x + tanh(gate) * sum_m c_m o_m

o_m is what modality m contributes to the attention of x over all visible features, c_m the confidence in it (`conflict.py`). The
features are first mapped into the space of word embeddings. Only the outer gate starts at zero: a converted text model is
unchanged, and gradients reach everything after one step.

Shapes: B rows, h heads, q tokens, M features, D head size, K modalities.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..attention.norm import DeepseekR1RMSNorm
from .alignment import BridgeMemory
from .conflict import ConflictResolver

BLOCK = 1024
"""Tokens whose products with the features exist at a time where contributions are told apart."""


def bridge_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    modality: torch.Tensor,
    kinds: Sequence[int],
) -> torch.Tensor:
    """What each modality contributes to the attention over all visible features and one further slot of logit and value zero,
    which a token attends to that sees nothing: `[K, B, h, q, D]`, whose sum over K is plain attention.

    Args:
        query: `[B, h, q, D]`.
        key, value: `[B, h, M, D]`.
        visible: `[B, q, M]` bool.
        modality: `[B, M]`.
        kinds: the K modalities; `()` = all together, K = 1.
    """
    if not kinds:
        mask = F.pad(visible, (1, 0), value=True)[:, None]
        return F.scaled_dot_product_attention(query, F.pad(key, (0, 0, 1, 0)), F.pad(value, (0, 0, 1, 0)), mask)[None]
    parts = []
    for rows, seen in zip(query.split(BLOCK, 2), visible.split(BLOCK, 1), strict=True):
        logits = (rows @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~seen[:, None], -torch.inf)
        weights = F.pad(logits, (1, 0)).softmax(-1, dtype=torch.float32)[..., 1:].to(value)
        parts.append(torch.stack([weights * (modality == kind).to(value)[:, None, None] @ value for kind in kinds]))
    return torch.cat(parts, 3)


def bridge_attention_reference(query, key, value, visible, modality, kinds) -> torch.Tensor:
    """What `bridge_attention` computes, token by token."""
    output = query.new_zeros(max(len(kinds), 1), *query.shape)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            for token in range(query.shape[2]):
                logits = key[row, head] @ query[row, head, token] / query.shape[-1] ** 0.5
                weights = logits.exp() * visible[row, token]
                weights = weights / (1 + weights.sum())
                for number, kind in enumerate(kinds or [None]):
                    own = weights if kind is None else weights * (modality[row] == kind)
                    output[number, row, head, token] = own @ value[row, head]
    return output


class DeepseekR1Bridge(nn.Module):
    """The bridge of one decoder layer.

    Args:
        config: of the text model.
        settings: `Bridge` of the configuration.
        layer_idx: number of the layer.
    """

    def __init__(self, config, settings, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = settings.num_heads or config.num_attention_heads
        self.head_dim = config.head_dim
        self.aligned = settings.temporal_alignment
        width = self.num_heads * self.head_dim
        self.norm = DeepseekR1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.memory_norm = DeepseekR1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))
        self.resolver = ConflictResolver(width, settings.conflict_hidden_size) if settings.conflict_hidden_size else None

    def init_weights(self, std: float) -> None:
        init.zeros_(self.gate)

    def forward(self, hidden_states: torch.Tensor, memory: BridgeMemory) -> torch.Tensor:
        """`[B, q, H]`, the states with what they take from the features."""
        query = self._heads(self.q_proj(self.norm(hidden_states)))
        key, value = self._project(memory)
        kinds = () if self.resolver is None else memory.present
        visible = memory.visible(query.shape[2], self.aligned)
        parts = bridge_attention(query, key, value, visible, memory.modality, kinds).transpose(2, 3).flatten(3)
        together = parts.sum(0)
        if self.resolver is not None:
            together = (self.resolver(parts, together.expand_as(parts)) * parts).sum(0)
        return hidden_states + self.gate.tanh() * self.o_proj(together)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _project(self, memory: BridgeMemory) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, h, M, D]`, in generation once for all steps."""
        if self.layer_idx in memory.projected:
            return memory.projected[self.layer_idx]
        states = self.memory_norm(memory.states)
        result = self._heads(self.k_proj(states)), self._heads(self.v_proj(states))
        if not torch.is_grad_enabled():
            memory.projected[self.layer_idx] = result
        return result
