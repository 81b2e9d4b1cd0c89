"""The experts of a sparse layer: one matrix each, or one shared MLP and a low-rank delta each.

Both are called as `experts(hidden_states, top_k_index, top_k_weights)`; a slot with weight 0 is inactive.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from .kernels import experts_forward, grouped_linear, sort_pairs


def in_weight_dtype(hidden_states: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
    """All in the weights' dtype, or in that of autocast, whose reach ends at products of our own."""
    device, dtype = hidden_states.device.type, weights[0].dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return [tensor.to(dtype) for tensor in (hidden_states, *weights)]


@use_experts_implementation
class DeepseekR1Experts(nn.Module):
    """Gated MLPs with packed weights. `experts_implementation="eager"`, the default, is this library's own.

    Args:
        config: the model's configuration, which knows the implementation; sizes are those of the layer.
        layer_idx: number of the layer.

    Attributes:
        gate_up_proj: `[E, 2I, H]`, the gate's rows first.
        down_proj: `[E, H, I]`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        layer = config.per_layer_config[layer_idx]
        self.num_experts = layer.num_experts
        self.hidden_dim, self.intermediate_dim = layer.hidden_size, layer.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[layer.hidden_act]

    def init_weights(self, std: float) -> None:
        init.normal_(self.gate_up_proj, std=std)
        init.normal_(self.down_proj, std=std)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """`[T, H]` for `hidden_states` `[T, H]`, `top_k_index` and `top_k_weights` `[T, K]`."""
        if hidden_states.device.type != "cpu":
            return self._grouped(hidden_states, top_k_index, top_k_weights)
        inputs = in_weight_dtype(hidden_states, self.gate_up_proj, self.down_proj)
        return experts_forward(*inputs, top_k_index, top_k_weights, self.act_fn).to(hidden_states.dtype)

    def _grouped(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        """An accelerator's grouped product over the active pairs, each handed over as a token with one expert."""
        slots = top_k_weights.detach().flatten().nonzero().flatten()
        tokens = slots // top_k_index.shape[1]
        pairs = top_k_index.flatten()[slots, None], top_k_weights.flatten()[slots, None]
        output = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states[tokens], *pairs)
        return torch.zeros_like(hidden_states).index_add_(0, tokens, output)


class DeepseekR1LowRankExperts(nn.Module):
    """Expert e is the shared MLP with `gate_up + B_e A_e` and `down + D_e C_e` in place of its matrices.

    The shared products are computed once per token, whatever the number of experts, because the weights of a token sum to
    one. With B and D at zero, the start, every expert is the shared MLP. Works in one way only: `experts_implementation` is
    about packed matrices, which these experts do not have.

    Attributes:
        gate_up_proj_a: A, `[E, r, H]`; gate_up_proj_b: B, `[E, 2I, r]`.
        down_proj_a: C, `[E, r, I]`; down_proj_b: D, `[E, H, r]`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        layer, rank = config.per_layer_config[layer_idx], config.routing_of(layer_idx).expert_rank
        hidden, inner, self.num_experts = layer.hidden_size, layer.moe_intermediate_size, layer.num_experts
        self.gate_proj = nn.Linear(hidden, inner, bias=layer.mlp_bias)
        self.up_proj = nn.Linear(hidden, inner, bias=layer.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=layer.mlp_bias)
        self.gate_up_proj_a = nn.Parameter(torch.empty(self.num_experts, rank, hidden))
        self.gate_up_proj_b = nn.Parameter(torch.zeros(self.num_experts, 2 * inner, rank))
        self.down_proj_a = nn.Parameter(torch.empty(self.num_experts, rank, inner))
        self.down_proj_b = nn.Parameter(torch.zeros(self.num_experts, hidden, rank))
        self.act_fn = ACT2FN[layer.hidden_act]

    def init_weights(self, std: float) -> None:
        # As in LoRA (https://arxiv.org/abs/2106.09685): the second factor is zero, and so is the delta. `std` is for matrices
        # that act on their own.
        for a, b in ((self.gate_up_proj_a, self.gate_up_proj_b), (self.down_proj_a, self.down_proj_b)):
            init.normal_(a, std=a.shape[-1] ** -0.5)
            init.zeros_(b)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """`[T, H]` for `hidden_states` `[T, H]`, `top_k_index` and `top_k_weights` `[T, K]`, whose rows sum to one."""
        slots, sizes = sort_pairs(top_k_index, top_k_weights, self.num_experts)
        tokens, weights = slots // top_k_index.shape[1], top_k_weights.flatten()[slots, None]
        shared = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        deltas = self._delta(hidden_states[tokens], self.gate_up_proj_a, self.gate_up_proj_b, sizes).chunk(2, -1)
        gate, up = (product[tokens] + delta for product, delta in zip(shared, deltas, strict=True))
        products = (self.act_fn(gate) * up * weights).to(shared[0].dtype)
        output = self.down_proj(torch.zeros_like(shared[0]).index_add(0, tokens, products))
        return output.index_add(0, tokens, self._delta(products, self.down_proj_a, self.down_proj_b, sizes).to(output.dtype))

    @staticmethod
    def _delta(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        rows, a, b = in_weight_dtype(rows, a, b)
        return grouped_linear(grouped_linear(rows, a, sizes), b, sizes)


def low_rank_experts_reference(
    experts: DeepseekR1LowRankExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What the low-rank experts compute, with every expert's matrices made in full."""
    gate, up = experts.gate_proj, experts.up_proj
    outputs = torch.zeros_like(hidden_states)
    for expert in range(experts.num_experts):
        weight = (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)
        gate_delta, up_delta = (experts.gate_up_proj_b[expert] @ experts.gate_up_proj_a[expert]).chunk(2)
        down_delta = experts.down_proj_b[expert] @ experts.down_proj_a[expert]
        product = experts.act_fn(F.linear(hidden_states, gate.weight + gate_delta, gate.bias))
        product = product * F.linear(hidden_states, up.weight + up_delta, up.bias)
        outputs = outputs + weight * F.linear(product, experts.down_proj.weight + down_delta, experts.down_proj.bias)
    return outputs
