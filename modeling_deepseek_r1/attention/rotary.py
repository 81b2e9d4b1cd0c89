"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), with transformers' own code for every frequency type.

The module keeps the names (`inv_freq`, `original_inv_freq`, `rope_type`, `compute_default_rope_parameters`) by which
transformers restores the non-persistent buffers after `from_pretrained`.
"""

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


class DeepseekR1RotaryEmbedding(nn.Module):
    """Cosines and sines for positions.

    Args:
        config: the configuration of one layer (`config.per_layer_config[i]`); read are `rope_parameters`, `head_dim` and
            `max_position_embeddings`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `base^(-2 d / head_dim)`, `[head_dim / 2]`, and the scaling of cosine and sine (none)."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine `[B, n, head_dim]` in the dtype of `x` for `position_ids` `[B, n]`; computed in float32."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `[B, heads, n, D]` by the angles of `[B, n, D]`; coordinate d is paired with d + D / 2, as in Llama."""
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
