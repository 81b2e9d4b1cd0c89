"""Which experts suit a token: a score per expert, raised or lowered by a gate per domain.

    logits_e = s_e + log(2 a_{d(e)})        p = softmax(logits)

with expert scores s, "linear": s_e = r_e . x, or "attention": s_e = log mean_h softmax_e(q_h . k_{e,h} / sqrt(d_r)), and domain
gates a_d = sigmoid(w_d . x + b_d + m[modality of the token, d]). The factor 2 is common to all experts and cancels; with it, a
gate with zero parameters adds exactly nothing. All of it is float32, whatever the model's dtype.

Shapes: T tokens, H hidden size, E experts, D domains, N router heads, R their size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..attention.float32 import Float32Module
from .outputs import RouterOutput, slot_counts
from .select import moved_bias, moved_threshold, select_experts


class LinearScores(Float32Module):
    """`r_e . x`, `[T, E]`."""

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size, dtype=torch.float32))

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight.float())


class AttentionScores(Float32Module):
    """The log of the mean attention of N router heads over the experts' keys, `[T, E]`."""

    def __init__(self, hidden_size: int, num_experts: int, num_heads: int, head_dim: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(num_heads * head_dim, hidden_size, dtype=torch.float32))
        self.keys = nn.Parameter(torch.zeros(num_experts, num_heads, head_dim, dtype=torch.float32))

    def init_weights(self, std: float) -> None:
        # Keys of size one, because small ones would leave the queries without a gradient.
        init.normal_(self.query, std=std)
        init.normal_(self.keys)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = F.linear(hidden_states, self.query.float()).unflatten(-1, self.keys.shape[1:])
        return attention_scores(query, self.keys.float())


def attention_scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`log mean_h softmax_e(q_h . k_{e,h} / sqrt(R))`, `[T, E]`, for `query` `[T, N, R]` and `keys` `[E, N, R]`."""
    logits = torch.einsum("tnr,enr->tne", query, keys) * query.shape[-1] ** -0.5
    return logits.log_softmax(-1).logsumexp(1) - math.log(query.shape[1])


def attention_scores_reference(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What `attention_scores` computes, head by head."""
    shares = [(query[:, head] @ keys[:, head].T / math.sqrt(query.shape[-1])).softmax(-1) for head in range(query.shape[1])]
    return torch.stack(shares).mean(0).log()


class DomainGate(Float32Module):
    """`log(2 a_d)` of each token, spread over the experts of the domains, `[T, E]`.

    Args:
        sizes: number of experts of each domain; the first domain's experts come first.
        num_modalities: rows of the table m; 0 = no table.
    """

    def __init__(self, hidden_size: int, sizes: list[int], num_modalities: int):
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.zeros(len(sizes), hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(len(sizes), dtype=torch.float32))
        table = nn.Parameter(torch.zeros(num_modalities, len(sizes), dtype=torch.float32)) if num_modalities else None
        self.register_parameter("modality_bias", table)

    def init_weights(self, std: float) -> None:
        for parameter in self.parameters():
            init.zeros_(parameter)

    def forward(self, hidden_states: torch.Tensor, modalities: torch.Tensor | None = None) -> torch.Tensor:
        """For `hidden_states` `[T, H]` and the number of each token's modality `[T]`; without it, all are modality 0."""
        scores = F.linear(hidden_states, self.weight.float(), self.bias.float())
        if self.modality_bias is not None:
            table = self.modality_bias.float()
            scores = scores + (table[0] if modalities is None else F.embedding(modalities, table))
        log_gates = math.log(2.0) + F.logsigmoid(scores)
        return torch.cat([gate.expand(-1, size) for gate, size in zip(log_gates.split(1, -1), self.sizes, strict=True)], -1)


class DeepseekR1ExpertRouter(Float32Module):
    """Chooses the experts of each token of a sparse layer.

    Args:
        config: the model's configuration; what a router needs is that of the layer.
        layer_idx: number of the layer.

    Attributes:
        domains: domain -> number of experts, in the order of the experts.
        threshold: float32 buffer, or None where all slots are always active.
        balance_bias: float32 buffer `[E]` of bias balancing, or None.
        balance_target: share of the work that the balance loss wants each expert to have.
        gathers_statistics: whether training counts active experts, for `move_threshold` and `move_balance_bias`.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        layer, routing = config.per_layer_config[layer_idx], config.routing_of(layer_idx)
        self.domains = config.expert_domains(layer_idx)
        self.slots, self.normalise = layer.num_experts_per_tok, layer.norm_topk_prob
        self.minimum = routing.min_experts_per_tok if routing.min_experts_per_tok is not None else self.slots
        self.target_experts = routing.target_experts_per_tok
        self.z_loss_ratio, self.cost_ratio = routing.router_z_loss_ratio, routing.expert_cost_ratio
        weights = [
            (routing.domain_weights or {}).get(domain, 1.0) for domain, size in self.domains.items() for _ in range(size)
        ]
        self.balance_target = [weight / sum(weights) for weight in weights]
        if routing.router_scoring == "attention":
            sizes = routing.router_heads, routing.router_head_dim
            self.scores = AttentionScores(layer.hidden_size, layer.num_experts, *sizes)
        else:
            self.scores = LinearScores(layer.hidden_size, layer.num_experts)
        # With one domain its gate would cancel, whatever its parameters.
        sizes = list(self.domains.values())
        self.domain_gate = DomainGate(layer.hidden_size, sizes, routing.num_modalities) if len(sizes) > 1 else None
        self.initial_threshold = float(routing.expert_activation_threshold)
        threshold = torch.tensor(self.initial_threshold, dtype=torch.float32) if self.minimum < self.slots else None
        self.register_buffer("threshold", threshold)
        bias = torch.zeros(layer.num_experts, dtype=torch.float32) if routing.bias_balancing else None
        self.register_buffer("balance_bias", bias)
        self.statistics: torch.Tensor | None = None
        self.load: torch.Tensor | None = None
        self.gathers_statistics = False

    def init_weights(self, std: float) -> None:
        if self.threshold is not None:
            init.constant_(self.threshold, self.initial_threshold)
        if self.balance_bias is not None:
            init.zeros_(self.balance_bias)

    def forward(self, hidden_states: torch.Tensor, modalities: torch.Tensor | None = None) -> RouterOutput:
        """For `hidden_states` `[T, H]` and, where there is a table for them, the number of each token's modality `[T]`."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.float()
            logits = self.scores(hidden_states)
            if self.domain_gate is not None:
                logits = logits + self.domain_gate(hidden_states, modalities)
            limits = self.slots, self.minimum, self.threshold, self.normalise, self.balance_bias
            return RouterOutput(logits, *select_experts(logits, *limits))

    @torch.no_grad()
    def gather(self, routed: RouterOutput, real: torch.Tensor | None) -> None:
        """Counts active experts and tokens `[2]`, and with bias balancing the slots of each expert `[E]`; called once per training
        forward, never by recomputation.

        Args:
            real: `[T]` bool, false = padding; None = all are real.
        """
        active = (routed.top_k_weights != 0).sum(-1)
        active = active if real is None else active[real]
        counts = torch.stack((active.sum(), torch.tensor(active.numel(), device=active.device))).float()
        self.statistics = counts if self.statistics is None else self.statistics + counts
        if self.balance_bias is not None:
            load = slot_counts(routed, real)
            self.load = load if self.load is None else self.load + load

    @torch.no_grad()
    def move_threshold(self, rate: float, reduce=None) -> None:
        """Moves the threshold towards `target_experts` by what was counted since the last call, and forgets that.

        Args:
            reduce: adds a tensor up over all ranks, in place.
        """
        if self.statistics is None:
            return
        counts, self.statistics = self.statistics, None
        if reduce is not None:
            reduce(counts)
        if self.threshold is not None and self.target_experts is not None and counts[1] > 0:
            lowest = 0.01 / len(self.balance_target)
            self.threshold.copy_(moved_threshold(self.threshold, counts[0] / counts[1], self.target_experts, rate, lowest))

    @torch.no_grad()
    def move_balance_bias(self, rate: float, reduce=None) -> None:
        """Moves the balance bias towards `balance_target` by what was counted since the last call, and forgets that.

        Args:
            rate: by how much each expert's bias changes, as a probability.
            reduce: adds a tensor up over all ranks, in place.
        """
        if self.load is None:
            return
        load, self.load = self.load, None
        if reduce is not None:
            reduce(load)
        if load.sum() > 0:
            target = torch.tensor(self.balance_target, device=load.device)
            self.balance_bias.copy_(moved_bias(self.balance_bias, load / load.sum(), target, rate))


def gather_statistics(
    routers: Sequence[DeepseekR1ExpertRouter], routed: Sequence[RouterOutput], real: torch.Tensor | None
) -> None:
    """Counts in the routers that are asked to; `real` as in `DeepseekR1ExpertRouter.gather`."""
    for router, layer in zip(routers, routed, strict=True):
        if router.gathers_statistics:
            router.gather(layer, real)
