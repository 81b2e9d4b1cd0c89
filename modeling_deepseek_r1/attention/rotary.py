"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), with transformers' own code for every frequency type,
and a type of this library whose base changes with the position.

`DeepseekR1RotaryEmbedding` keeps the names (`inv_freq`, `original_inv_freq`, `rope_type`, `compute_default_rope_parameters`) by which
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


class PiecewiseLinearRotaryEmbedding(nn.Module):
    """Rotation whose phase grows with a base of its own in each segment of the positions.

    With segments that begin at s_0 = 0 < s_1 < ... and bases b_k, the phase of frequency d at position p is

        phi_d(p) = sum_k len_k(p) b_k^(-2 d / head_dim),   len_k(p) = the part of [0, p) within segment k.

    Inside a segment attention depends on distances alone, across a boundary on both positions. One segment is plain rotation.

    Args:
        config: the configuration of one layer; read are `rope_parameters["segments"]`, pairs of first position and base, and
            `head_dim`.
    """

    def __init__(self, config):
        super().__init__()
        self.segments = [(int(start), float(base)) for start, base in config.rope_parameters["segments"]]
        self.head_dim = config.head_dim

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DeepseekR1RotaryEmbedding.forward`."""
        # No buffers: a model that is loaded would have to be told how to restore them.
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float, device=x.device) / self.head_dim
        ends = [start for start, _ in self.segments[1:]] + [None]
        positions = position_ids[..., None].to(x.device)
        angles = torch.zeros((), device=x.device)
        for (start, base), end in zip(self.segments, ends, strict=True):
            within = positions.clamp(min=start, max=end) - start
            angles = angles + within.float() * (1.0 / (base**exponents))
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotary_embedding(config) -> nn.Module:
    """The rotary module for the configuration of one layer."""
    if config.rope_parameters["rope_type"] == "piecewise_linear":
        return PiecewiseLinearRotaryEmbedding(config)
    return DeepseekR1RotaryEmbedding(config)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `[B, heads, n, D]` by the angles of `[B, n, D]`; coordinate d is paired with d + D / 2, as in Llama."""
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def moved_up(rotary: nn.Module, keys: torch.Tensor, positions: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Keys `[B, G, n, D]` that `rotary` has turned for `positions` `[B or 1, n]`, turned for `positions - count` instead; `count` is
    a number or `[B, 1]`. Right for frequencies that do not change with the length; computed in float32."""
    like = torch.empty(0, device=keys.device)
    (cos, sin), (new_cos, new_sin) = rotary(like, positions), rotary(like, positions - count)
    # Some types scale cosine and sine, which the keys have already been.
    scale = cos.square() + sin.square()
    turn = (new_cos * cos + new_sin * sin) / scale, (new_sin * cos - new_cos * sin) / scale
    return rotate(keys.float(), *turn).to(keys.dtype)
