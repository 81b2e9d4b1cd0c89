"""Domain gates from example texts: tokens of code go to the experts of code from the first step on.

The model without experts reads a text of each domain, and the gate a_d = sigmoid(w_d . x + b_d) of every sparse layer is fitted to
what the layer's MLP gets: one logistic regression per domain, "is this token from a text of the domain?". The experts of a
domain without a text start closed to all that was read. What is held out of the texts tells how well that works.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..modeling_deepseek_r1 import DeepseekR1ForCausalLM
from ..moe.gates import DeepseekR1ExpertRouter
from .calibrate import SHORT_WINDOW_TOKENS

DOMAIN_TOKENS = 10240
"""Tokens that are read of each domain, the held-out ones included."""
MIN_DOMAIN_TOKENS = 64
HELD_OUT_SHARE = 0.2
PENALTY = 0.01
"""Of squared parameters, for inputs of variance one: of a few thousand tokens not everything is true, and gates of domains that are
told apart easily must not close for good. On SmolLM2-135M a tenth or five times as much gives a lower purity on held-out text."""

Texts = str | PathLike | Sequence[str | PathLike]


@dataclass(frozen=True)
class DomainTokens:
    """Token ids `[tokens]` of one domain: pieces to fit gates to, and pieces that follow them, to measure with."""

    fitted: list[torch.Tensor]
    held_out: list[torch.Tensor]


def text_names(texts: Texts) -> list[str]:
    return [str(texts)] if isinstance(texts, str | PathLike) else [str(text) for text in texts]


def domains_entry(domain_texts: Mapping[str, Texts], purity: Mapping[int, float] | None = None) -> dict[str, Any]:
    """What `calibration.json` says about the domain gates: names of the texts, and routing purity by layer."""
    texts = {domain: [Path(name).name for name in text_names(names)] for domain, names in domain_texts.items()}
    return {"texts": texts, "purity": {str(layer_idx): share for layer_idx, share in (purity or {}).items()}}


def read_domains(tokenizer, domain_texts: Mapping[str, Texts]) -> dict[str, DomainTokens]:
    """Of each domain, equally much from the beginning of each of its texts.

    Raises:
        ValueError: the texts of a domain are too short.
        OSError: one cannot be read.
    """
    return {domain: _read_domain(tokenizer, domain, text_names(texts)) for domain, texts in domain_texts.items()}


def _read_domain(tokenizer, domain: str, names: list[str]) -> DomainTokens:
    from ..evaluation.text import encode_text, read_text

    fitted, held_out = [], []
    limit = DOMAIN_TOKENS // max(1, len(names))
    for name in names:
        # As in `text_windows`: encoding a whole book for its first pages would be a waste.
        ids = encode_text(tokenizer, read_text([name])[: limit * 12])[:limit]
        kept = len(ids) - int(len(ids) * HELD_OUT_SHARE)
        fitted += [piece for piece in ids[:kept].split(SHORT_WINDOW_TOKENS) if len(piece)]
        held_out += [piece for piece in ids[kept:].split(SHORT_WINDOW_TOKENS) if len(piece)]
    total = sum(len(piece) for piece in fitted + held_out)
    if total < MIN_DOMAIN_TOKENS:
        raise ValueError(
            f"the texts of domain {domain!r} ({', '.join(names) or 'none'}) have {total} tokens; at least {MIN_DOMAIN_TOKENS} are"
            " needed"
        )
    return DomainTokens(fitted, held_out)


def gate_names(layer_idx: int) -> tuple[str, str]:
    prefix = f"model.layers.{layer_idx}.mlp.router.domain_gate"
    return f"{prefix}.weight", f"{prefix}.bias"


def fitted_layers(config: DeepseekR1TextConfig, domains: Sequence[str]) -> list[int]:
    """Numbers of the layers that have a gate for at least one of the domains."""
    sparse = [layer_idx for layer_idx in range(config.num_hidden_layers) if config.is_sparse(layer_idx)]
    own = {layer_idx: config.expert_domains(layer_idx) for layer_idx in sparse}
    return [layer_idx for layer_idx in sparse if len(own[layer_idx]) > 1 and set(own[layer_idx]) & set(domains)]


def domains_without_text(config: DeepseekR1TextConfig, domains: Sequence[str]) -> list[str]:
    """Those that share a layer with a domain that has one."""
    layers = fitted_layers(config, domains)
    return sorted({domain for layer_idx in layers for domain in config.expert_domains(layer_idx)} - set(domains))


def fit_domain_gates(
    model: DeepseekR1ForCausalLM,
    config: DeepseekR1TextConfig,
    texts: Mapping[str, DomainTokens],
    made: Callable[[str], torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    """The gates' tensors, and the routing purity of each layer on held-out text.

    Args:
        model: the one without experts.
        config: that of the model with experts.
        texts: what `read_domains` gives.
        made: gives the tensor with which a router starts, by its name.

    Returns:
        name -> tensor, and layer -> share of the held-out tokens whose best expert belongs to their domain.
    """
    layers = fitted_layers(config, list(texts))
    fitted = {domain: collect_inputs(model, layers, tokens.fitted) for domain, tokens in texts.items()}
    held_out = {domain: collect_inputs(model, layers, tokens.held_out) for domain, tokens in texts.items()}
    tensors, purity = {}, {}
    for layer_idx in tqdm(layers, unit="layer", desc="fitting domain gates", disable=None):
        domains = list(config.expert_domains(layer_idx))
        weight, bias = fit_gate([fitted[domain].pop(layer_idx).float() if domain in texts else None for domain in domains])
        tensors |= dict(zip(gate_names(layer_idx), (weight, bias), strict=True))
        router = DeepseekR1ExpertRouter(config, layer_idx).requires_grad_(False)
        router.scores.weight.copy_(made(f"model.layers.{layer_idx}.mlp.router.scores.weight"))
        router.domain_gate.weight.copy_(weight)
        router.domain_gate.bias.copy_(bias)
        own = {domain: held_out[domain].pop(layer_idx).float() for domain in domains if domain in texts}
        purity[layer_idx] = routing_purity(router, own)
    return tensors, purity


@torch.no_grad()
def collect_inputs(
    model: DeepseekR1ForCausalLM, layers: Sequence[int], pieces: Sequence[torch.Tensor]
) -> dict[int, torch.Tensor]:
    """What the MLPs of some layers get while the model reads: layer -> `[tokens, H]` in bfloat16."""
    collected: dict[int, list[torch.Tensor]] = {layer_idx: [] for layer_idx in layers}
    hooks = []
    for layer_idx in layers:

        def keep(module, args, layer_idx=layer_idx):
            collected[layer_idx].append(args[0].flatten(0, -2).to(torch.bfloat16))

        hooks.append(model.model.layers[layer_idx].mlp.register_forward_pre_hook(keep))
    try:
        for piece in tqdm(pieces, unit="piece", desc="reading a domain", disable=None):
            model.model(piece.unsqueeze(0), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer_idx: torch.cat(parts) for layer_idx, parts in collected.items()}


def fit_gate(inputs: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """`[D, H]` and `[D]` of the logistic regressions "this domain or another", L2-regularised, for standardised inputs.

    Args:
        inputs: of each domain `[tokens, H]` float32, or None where it has no text; all domains count alike.
    """
    given = [rows for rows in inputs if rows is not None]
    rows = torch.cat(given)
    sizes = torch.tensor([len(part) for part in given])
    share = (1.0 / (len(given) * sizes)).repeat_interleave(sizes)
    numbers = torch.tensor([number for number, part in enumerate(inputs) if part is not None]).repeat_interleave(sizes)
    labels = F.one_hot(numbers, len(inputs)).float()
    center, scale = rows.mean(0), rows.std(0)
    scale = scale.clamp(min=1e-3 * float(scale.max()) + torch.finfo(torch.float32).tiny)
    rows = (rows - center) / scale
    parameters = torch.zeros(len(inputs), rows.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = F.linear(rows, parameters[:, :-1], parameters[:, -1])
        errors = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(-1)
        value = (share * errors).sum() + 0.5 * PENALTY * parameters.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    weight = parameters.detach()[:, :-1] / scale
    return weight, parameters.detach()[:, -1] - weight @ center


def routing_purity(router: DeepseekR1ExpertRouter, inputs: Mapping[str, torch.Tensor]) -> float:
    """Share of the tokens whose best expert belongs to their domain, all domains of `inputs` (domain -> `[tokens, H]`) counting alike."""
    sizes = torch.tensor(list(router.domains.values()))
    domain_of_expert = torch.arange(len(sizes)).repeat_interleave(sizes)
    shares = []
    for number, domain in enumerate(router.domains):
        if domain in inputs:
            best = router(inputs[domain]).top_k_index[:, 0]
            shares.append(float((domain_of_expert[best] == number).float().mean()))
    return sum(shares) / len(shares)
