"""The sparse MLP of a decoder layer: a router and experts, and an expert that all tokens share where there is one."""

import torch
from torch import nn

from .experts import DeepseekR1Experts, DeepseekR1LowRankExperts
from .gates import DeepseekR1ExpertRouter
from .mlp import DeepseekR1MLP


class DeepseekR1SparseMoeBlock(nn.Module):
    """Mixture of experts in place of the MLP (https://arxiv.org/abs/1701.06538).

    With a shared expert (https://arxiv.org/abs/2401.06066), under a gate as in Qwen2-MoE:
    `output = experts(x) + sigmoid(shared_expert_gate(x)) * shared_expert(x)`.

    Args:
        config: the model's configuration; sizes are those of the layer.
        layer_idx: number of the layer.

    Attributes:
        expert_adapter: trained parts of some experts (`adapters.py`), or None.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        low_rank = config.routing_of(layer_idx).expert_rank is not None
        self.router = DeepseekR1ExpertRouter(config, layer_idx)
        self.experts = (DeepseekR1LowRankExperts if low_rank else DeepseekR1Experts)(config, layer_idx)
        layer = config.per_layer_config[layer_idx]
        self.shared_expert = self.shared_expert_gate = None
        if layer.shared_expert_intermediate_size is not None:
            self.shared_expert = DeepseekR1MLP(layer, layer.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(layer.hidden_size, 1, bias=False)
        self.register_module("expert_adapter", None)

    def forward(self, hidden_states: torch.Tensor, modalities: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """The output `[batch, n, H]` and the fields of `RouterOutput`, flat, so that checkpointing keeps their gradients.

        Args:
            hidden_states: `[batch, n, H]`.
            modalities: `[batch, n]` number of each token's modality.
        """
        rows = hidden_states.flatten(0, -2)
        routed = self.router(rows, modalities.flatten() if modalities is not None else None)
        if self.expert_adapter is None:
            output = self.experts(rows, routed.top_k_index, routed.top_k_weights)
        else:
            output = self.expert_adapter(self.experts, rows, routed.top_k_index, routed.top_k_weights)
        if self.shared_expert is not None:
            output = output + self.shared_expert_gate(rows).sigmoid() * self.shared_expert(rows)
        return output.view(hidden_states.shape), *routed
