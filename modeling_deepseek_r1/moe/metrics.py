"""How a model uses its experts, counted over any number of forwards.

Shapes: T tokens, E experts, K slots, M modalities.
"""

import math
from collections.abc import Mapping

import torch

from .outputs import RouterOutput


class ExpertUsage:
    """Counts of one sparse layer.

    Args:
        domains: domain -> number of experts, in the order of the experts.

    Attributes:
        slots: `[E]` float64, active slots of real tokens that each expert got.
        first_choices: `[E]` float64, tokens whose best expert it was.
    """

    def __init__(self, domains: Mapping[str, int]):
        self.domains = dict(domains)
        num_experts = sum(self.domains.values())
        self.slots = torch.zeros(num_experts, dtype=torch.float64)
        self.first_choices = torch.zeros(num_experts, dtype=torch.float64)
        self._by_modality: dict[int, tuple[int, int]] = {}

    @torch.no_grad()
    def add(self, routed: RouterOutput, real: torch.Tensor | None = None, modalities: torch.Tensor | None = None) -> None:
        """Counts the tokens of one forward.

        Args:
            real: `[T]` bool, false = padding; None = all are real.
            modalities: `[T]` number of each token's modality; None = all are 0.
        """
        index, weights = routed.top_k_index.cpu(), routed.top_k_weights.cpu()
        kept = torch.ones(len(index), dtype=torch.bool) if real is None else real.flatten().cpu().bool()
        index, active = index[kept], weights[kept] != 0
        self.slots += torch.bincount(index[active], minlength=len(self.slots))
        self.first_choices += torch.bincount(index[:, 0], minlength=len(self.slots))
        numbers = torch.zeros(len(index), dtype=torch.long) if modalities is None else modalities.flatten().cpu()[kept]
        for modality in numbers.unique().tolist():
            chosen = active[numbers == modality]
            tokens, slots = self._by_modality.get(modality, (0, 0))
            self._by_modality[modality] = tokens + len(chosen), slots + int(chosen.sum())

    @property
    def expert_utilization_rate(self) -> dict[str, float]:
        """Domain -> share of the active slots that its experts got."""
        return self._by_domain(self.slots)

    @property
    def token_share(self) -> dict[str, float]:
        """Domain -> share of the tokens whose best expert belongs to it."""
        return self._by_domain(self.first_choices)

    @property
    def relative_entropy(self) -> float:
        """Entropy of the experts' shares over that of equal shares: 1 = all are used alike, 0 = one does everything."""
        shares = self.slots / self.slots.sum()
        if len(shares) == 1:
            return 1.0
        return float(torch.special.entr(shares).sum()) / math.log(len(shares))

    @property
    def mean_active_experts(self) -> dict[int, float]:
        """Modality -> mean number of active experts of its tokens."""
        return {modality: slots / tokens for modality, (tokens, slots) in sorted(self._by_modality.items())}

    @property
    def unused_experts(self) -> list[int]:
        """Experts that no token has used."""
        return (self.slots == 0).nonzero().flatten().tolist()

    def to_dict(self) -> dict[str, object]:
        """All of the above, for JSON."""
        return {
            "expert_utilization_rate": self.expert_utilization_rate,
            "token_share": self.token_share,
            "relative_entropy": self.relative_entropy,
            "mean_active_experts": self.mean_active_experts,
            "unused_experts": self.unused_experts,
        }

    def _by_domain(self, counts: torch.Tensor) -> dict[str, float]:
        parts = (counts / counts.sum()).split(list(self.domains.values()))
        return {domain: float(part.sum()) for domain, part in zip(self.domains, parts, strict=True)}
