"""A model on texts of several domains: its loss on each, and what its experts do with them."""

import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..moe.gates import DeepseekR1ExpertRouter
from ..moe.metrics import ExpertUsage
from .scoring import check_output_head, hidden_states, token_nll


@dataclass(frozen=True)
class ExpertLayer:
    """One sparse layer; where texts are taken together, all count alike.

    Attributes:
        layer: its number.
        domains: domain -> number of experts, in the order of the experts.
        shares: text -> share of the active slots that each expert got, in the order of the experts.
        utilisation: text -> domain -> the same, added up over the domain's experts.
        purity: text -> share of its tokens whose best expert belongs to the domain of that name; texts that no domain of the
            layer is named after are left out.
        relative_entropy: of the experts' shares over all texts: 1 = all are used alike, 0 = one does everything.
        least_used: share of the least used expert over all texts, as a part of 1 / number of experts.
    """

    layer: int
    domains: dict[str, int]
    shares: dict[str, list[float]]
    utilisation: dict[str, dict[str, float]]
    purity: dict[str, float]
    relative_entropy: float
    least_used: float


@dataclass(frozen=True)
class DomainResult:
    """One model.

    Attributes:
        losses: text -> mean negative log-likelihood of a token, in nats; all but the first token of a window count.
        window_losses: text -> the same of each window, to compare models window by window.
        context_length: tokens of a window.
        layers: of the sparse layers; empty for a model without experts.
    """

    losses: dict[str, float]
    window_losses: dict[str, list[float]]
    context_length: int
    layers: list[ExpertLayer]

    def to_dict(self) -> dict[str, Any]:
        """All fields for JSON, `perplexity` of each text, and `mean`: over the layers, but for the least used expert of all."""
        perplexity = {name: math.exp(loss) for name, loss in self.losses.items()}
        return {**asdict(self), "perplexity": perplexity, "mean": _mean(self.layers) if self.layers else None}


def _mean(layers: list[ExpertLayer]) -> dict[str, Any]:
    purity = {name: [layer.purity[name] for layer in layers if name in layer.purity] for name in layers[0].shares}
    return {
        "relative_entropy": sum(layer.relative_entropy for layer in layers) / len(layers),
        "least_used": min(layer.least_used for layer in layers),
        "purity": {name: sum(values) / len(values) for name, values in purity.items() if values},
    }


@torch.no_grad()
def measure_domains(
    model, texts: Mapping[str, torch.Tensor], on_progress: Callable[[int, int], None] | None = None
) -> DomainResult:
    """Reads texts with any causal language model, and counts the choices of its experts if it is one of this library.

    Args:
        texts: name of a text, e.g. that of a domain -> token ids `[windows, tokens]`, each window read by itself.
        on_progress: called with the number of windows read and of all.

    Raises:
        ValueError: no text, windows of one token or of different lengths, or a model whose likelihoods cannot be had in chunks.
    """
    lengths = {windows.shape[1] for windows in texts.values()}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(f"texts must be windows of one length, at least 2 tokens; theirs are {sorted(lengths)}")
    check_output_head(model, next(iter(texts.values()))[0])
    routers = expert_routers(model)
    losses, usage, done = {}, {}, 0
    total = sum(len(windows) for windows in texts.values())
    for name, windows in texts.items():
        usage[name] = [ExpertUsage(router.domains) for router in routers.values()]
        losses[name] = []
        with _counting(list(routers.values()), usage[name]):
            for window in windows.to(model.device).split(1):
                hidden, _ = hidden_states(model, window)
                losses[name].append(float(token_nll(model, hidden[:, :-1], window[:, 1:]).mean()))
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
    layers = [_layer(number, {name: rows[row] for name, rows in usage.items()}) for row, number in enumerate(routers)]
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    return DomainResult(means, losses, lengths.pop(), layers)


def expert_routers(model) -> dict[int, DeepseekR1ExpertRouter]:
    """Number of the layer -> its router of experts; empty for a model that has none."""
    layers = getattr(model.base_model, "layers", ())
    found = {number: getattr(getattr(layer, "mlp", None), "router", None) for number, layer in enumerate(layers)}
    return {number: router for number, router in found.items() if isinstance(router, DeepseekR1ExpertRouter)}


@contextmanager
def _counting(routers: list[DeepseekR1ExpertRouter], usage: list[ExpertUsage]):
    hooks = [
        router.register_forward_hook(lambda module, args, routed, counts=counts: counts.add(routed))
        for router, counts in zip(routers, usage, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layer(number: int, usage: Mapping[str, ExpertUsage]) -> ExpertLayer:
    shares = {name: counts.slots / counts.slots.sum() for name, counts in usage.items()}
    together, domains = ExpertUsage(next(iter(usage.values())).domains), next(iter(usage.values())).domains
    together.slots = sum(shares.values())
    return ExpertLayer(
        layer=number,
        domains=domains,
        shares={name: share.tolist() for name, share in shares.items()},
        utilisation={name: counts.expert_utilization_rate for name, counts in usage.items()},
        purity={name: counts.token_share[name] for name, counts in usage.items() if name in domains},
        relative_entropy=together.relative_entropy,
        least_used=float(together.slots.min() / together.slots.mean()),
    )
