"""The dense MLP."""

import torch
from torch import nn
from transformers.activations import ACT2FN

ACCELERATOR_CHUNKS = 32
"""Chunks that an accelerator takes at once: it is idle with few tokens."""


def tokens_at_once(chunk_size: int, device: torch.device) -> int:
    """Tokens of a chunk on a device."""
    return chunk_size if device.type == "cpu" else chunk_size * ACCELERATOR_CHUNKS


class DeepseekR1MLP(nn.Module):
    """Gated MLP: `down(act(gate(x)) * up(x))`. `config` is the configuration of one layer; `inner` is another width than its.

    Attributes:
        task_gate: scales the product, `task_gate(product, x)`, where one is attached (`training/task_gate.py`); else None.
    """

    def __init__(self, config, inner: int | None = None):
        super().__init__()
        inner = config.intermediate_size if inner is None else inner
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.chunk_size = config.chunk_size_feed_forward
        self.register_module("task_gate", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunk = tokens_at_once(self.chunk_size, x.device)
        if torch.is_grad_enabled() or not 0 < chunk < x.shape[-2]:
            return self._product(x)
        output = torch.empty_like(x)
        for start in range(0, x.shape[-2], chunk):
            output[..., start : start + chunk, :] = self._product(x[..., start : start + chunk, :])
        return output

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        # Not in `forward`: vLLM would rewrite that method's source around fused weights, and not the one for chunks.
        gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
        product = gate * up if torch.is_grad_enabled() else gate.mul_(up)
        return self.down_proj(self._gated(product, x))

    def _gated(self, product: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return product if self.task_gate is None else self.task_gate(product, x)
