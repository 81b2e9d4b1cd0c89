"""Which experts a fine-tuning should train: those to which the routers send the user's own data (expert-specialised fine-tuning,
https://arxiv.org/abs/2407.01906, whose average gate score this is).

`{"text": 6, "code": 2}` asks, in every sparse layer, for the 6 most relevant experts of the domain text and the 2 most relevant
ones of code, or all where there are fewer. A name also means the domains whose names it begins: `text` is `text`,
`text_syntactic`, `text_semantic`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..modeling_deepseek_r1 import DeepseekR1DecoderLayer
from ..moe.block import DeepseekR1SparseMoeBlock
from .statistics import evaluated

RELEVANCE_TOKENS = 65536
"""So many tokens are enough: a mean probability of 0.1 is then known to about a hundredth of itself."""


def sparse_blocks(model: nn.Module) -> dict[int, DeepseekR1SparseMoeBlock]:
    """Number of the layer -> its sparse block, of a model that may be wrapped."""
    layers = [module for module in model.modules() if isinstance(module, DeepseekR1DecoderLayer)]
    return {layer.self_attn.layer_idx: layer.mlp for layer in layers if isinstance(layer.mlp, DeepseekR1SparseMoeBlock)}


@dataclass(frozen=True)
class ExpertSelection:
    """Which experts are trained.

    Attributes:
        expert_config: domain -> number of experts per layer, as asked for.
        chosen: layer -> numbers of the experts, ascending; layers without any are left out.
        scores: layer -> mean probability of each of its experts.
        domains: layer -> domain -> number of experts, in the order of the experts.
        tokens: how many were read.
    """

    expert_config: dict[str, int]
    chosen: dict[int, list[int]]
    scores: dict[int, list[float]]
    domains: dict[int, dict[str, int]]
    tokens: int

    @property
    def counts(self) -> dict[str, int]:
        """Domain as asked for -> chosen experts of all layers."""
        counts = dict.fromkeys(self.expert_config, 0)
        for layer, experts in self.chosen.items():
            for name in counts:
                counts[name] += len(set(experts) & set(_members(self.domains[layer], name)))
        return counts

    def table(self) -> str:
        """Markdown: the chosen experts of each layer and domain with their scores, and what all of its experts would have."""
        lines = [
            f"Experts by their mean probability over {self.tokens:,} tokens:",
            "",
            "| layer | domain | trained | of | share of the domain's probability | experts (scores) |",
            "|--:|---|--:|--:|--:|---|",
        ]
        for layer, experts in self.chosen.items():
            scores = self.scores[layer]
            for name in self.expert_config:
                members = _members(self.domains[layer], name)
                own = sorted(set(experts) & set(members), key=lambda expert: -scores[expert])
                if own:
                    share = sum(scores[expert] for expert in own) / max(sum(scores[expert] for expert in members), 1e-12)
                    listed = ", ".join(f"{expert} ({scores[expert]:.3f})" for expert in own)
                    lines.append(f"| {layer} | {name} | {len(own)} | {len(members)} | {share:.0%} | {listed} |")
        return "\n".join(lines)


@torch.no_grad()
def measure_relevance(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], max_tokens: int = RELEVANCE_TOKENS
) -> tuple[dict[int, torch.Tensor], int]:
    """The mean probability that the routers give to each expert.

    Args:
        model: of this library, in any mode; it is run as in evaluation.
        batches: arguments of its forward, as a collator makes them; labels are not used.
        max_tokens: no further batch is read from so many real tokens on.

    Returns:
        layer -> `[E]` float64, and the number of tokens.

    Raises:
        ValueError: a model without experts, or no token.
    """
    blocks, sums, tokens = sparse_blocks(model), {}, 0
    if not blocks:
        raise ValueError("the model has no layer with experts; give it some with `deepseek-r1 convert --experts`")
    logits: dict[int, torch.Tensor] = {}
    hooks = [
        block.router.register_forward_hook(lambda _, __, routed, layer=layer: logits.__setitem__(layer, routed.logits))
        for layer, block in blocks.items()
    ]
    try:
        for inputs, mask in evaluated(model, batches, max_tokens):
            model(**inputs, use_cache=False)
            for layer, scores in logits.items():
                mean = scores.softmax(-1)[mask.flatten().to(scores.device)].double().sum(0).cpu()
                sums[layer] = sums[layer] + mean if layer in sums else mean
            tokens += int(mask.sum())
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ValueError("there is no token to measure the experts' relevance on")
    return {layer: sums[layer] / tokens for layer in blocks}, tokens


def choose_experts(
    model: nn.Module,
    expert_config: Mapping[str, int],
    batches: Iterable[Mapping[str, Any]],
    max_tokens: int = RELEVANCE_TOKENS,
) -> ExpertSelection:
    """The most relevant experts of each domain and layer; of equal ones, those with the lower numbers.

    Args:
        expert_config: domain -> number of experts per layer.
        model, batches, max_tokens: as in `measure_relevance`.

    Raises:
        ValueError: also no domain, a number below 1, a domain that no layer has, or two names for one domain.
    """
    domains = {layer: dict(block.router.domains) for layer, block in sparse_blocks(model).items()}
    if domains:
        _check(expert_config, domains)
    relevance, tokens = measure_relevance(model, batches, max_tokens)
    scores = {layer: mean.tolist() for layer, mean in relevance.items()}
    chosen = {}
    for layer, own in domains.items():
        best = []
        for name, number in expert_config.items():
            best += sorted(_members(own, name), key=lambda expert: (-scores[layer][expert], expert))[:number]
        if best:
            chosen[layer] = sorted(best)
    return ExpertSelection(dict(expert_config), chosen, scores, domains, tokens)


def _check(expert_config: Mapping[str, int], domains: Mapping[int, Mapping[str, int]]) -> None:
    present = sorted({domain for own in domains.values() for domain in own})
    if not expert_config:
        raise ValueError(f"expert_config is empty; name domains and numbers of experts; there are {', '.join(present)}")
    for name, number in expert_config.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"expert_config: {name}={number!r} must be a whole number of experts, at least 1")
        if not any(_is(domain, name) for domain in present):
            raise ValueError(f"expert_config: no layer has the domain {name!r}; there are {', '.join(present)}")
    for domain in present:
        names = [name for name in expert_config if _is(domain, name)]
        if len(names) > 1:
            raise ValueError(f"expert_config: {' and '.join(names)} both mean the domain {domain!r}; leave one out")


def weighted_target(domains: Mapping[str, int], target: list[float], expert_config: Mapping[str, int]) -> list[float]:
    """What the balance loss should want of each expert of a layer: the named domains share what they had together by their
    numbers in `expert_config`, the experts of one equally; the others keep theirs."""
    members = {name: _members(domains, name) for name in expert_config}
    members = {name: experts for name, experts in members.items() if experts}
    together = sum(target[expert] for experts in members.values() for expert in experts)
    weight = sum(expert_config[name] for name in members)
    target = list(target)
    for name, experts in members.items():
        for expert in experts:
            target[expert] = together * expert_config[name] / weight / len(experts)
    return target


def _is(domain: str, name: str) -> bool:
    return domain == name or domain.startswith(f"{name}_")


def _members(domains: Mapping[str, int], name: str) -> list[int]:
    """Numbers of the experts of all domains that a name means."""
    experts, start = [], 0
    for domain, size in domains.items():
        experts += range(start, start + size) if _is(domain, name) else ()
        start += size
    return experts
