"""Which layers need full attention: patterns are tried on held-out text, and one is recommended for a budget.

For every layer, one pass measures how far its output would move if it were routed, or local only, beside the residual stream
that it is added to. Layers that would move most stay full; how many of them, and whether those that would hardly notice become
local, is tried out: every candidate runs over the same windows, which end in a repetition of an earlier passage, so that both
perplexity and the ability to look things up far behind are measured and not guessed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..attention.gate import DeepseekR1Router
from ..attention.pattern import AttentionPattern, remote_keys
from ..attention.ragged import document_attention
from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..configuration.presets import LAYER_LETTERS
from ..modeling_deepseek_r1 import DeepseekR1ForCausalLM
from .calibrate import Calibration, router_prefix

FULL_SHARES = (0.0, 0.125, 0.25, 0.5)
"""Shares of the layers that stay full, in the candidates."""
DEFAULT_MAX_INCREASE = 0.03
COPIED_TOKENS = 128
"""Length of the repeated passage at the end of a window."""
_LEAD_IN = 16
_SAMPLED_QUERIES = 64
_KINDS = ("local_routed_attention", "sliding_attention")


@dataclass(frozen=True)
class Candidate:
    """One pattern, measured.

    Attributes:
        layer_types: a letter per layer, as in a pattern string.
        perplexity: on held-out text.
        increase: of the perplexity, relative to full attention in all layers.
        copied: share of the tokens of a repeated passage that the model predicts (it has to find them far behind).
        cost: query-key products of all layers at the context length, relative to full attention in all layers.
    """

    layer_types: str
    perplexity: float
    increase: float
    copied: float
    cost: float


@dataclass(frozen=True)
class LayerCost:
    """Of one layer: movement of its output relative to the residual stream, and query-key products per token, by layer type."""

    moved: dict[str, float]
    products: dict[str, float]


def choose(candidates: Sequence[Candidate], max_increase: float | None, max_cost: float | None) -> Candidate:
    """The cheapest candidate within `max_increase`; with `max_cost` the best one within that.

    Raises:
        ValueError: no candidate keeps the budget; the message says which one comes closest.
    """
    allowed = [c for c in candidates if max_increase is None or c.increase <= max_increase]
    allowed = [c for c in allowed if max_cost is None or c.cost <= max_cost]
    if allowed:
        return min(allowed, key=lambda c: (c.cost, c.perplexity) if max_cost is None else (c.perplexity, c.cost))
    closest = min(candidates, key=lambda c: (c.cost, c.perplexity) if max_cost is not None else (c.perplexity, c.cost))
    raise ValueError(
        f"no pattern keeps the budget (max_increase={max_increase}, max_cost={max_cost}); the closest one, {closest.layer_types},"
        f" has {closest.increase:+.1%} perplexity at {closest.cost:.0%} of the cost"
    )


def recommend(
    model: DeepseekR1ForCausalLM,
    config: DeepseekR1TextConfig,
    routers: dict[str, torch.Tensor],
    held_out: Sequence[torch.Tensor],
    calibration: Calibration,
) -> tuple[Candidate, list[Candidate]]:
    """The pattern for a budget, and all that were tried.

    Args:
        model: with full attention in all layers.
        config: that of the model with routed attention in all layers.
        routers: what `fit_routers` has made for it.
        held_out: token ids of texts that the centroids have not seen, cut to the length of the shortest.

    Raises:
        ValueError: texts that are too short, or a budget that no pattern keeps.
    """
    length = min(len(ids) for ids in held_out)
    candidates = try_patterns(model, config, routers, torch.stack([ids[:length] for ids in held_out]))
    max_increase = calibration.max_increase
    if max_increase is None and calibration.max_cost is None:
        max_increase = DEFAULT_MAX_INCREASE
    return choose(candidates, max_increase, calibration.max_cost), candidates


def try_patterns(
    model: DeepseekR1ForCausalLM,
    config: DeepseekR1TextConfig,
    routers: dict[str, torch.Tensor],
    windows: torch.Tensor,
) -> list[Candidate]:
    """Measures full, routed and local patterns of one model.

    Args:
        model: with full attention in all layers.
        config: that of the model with routed attention in all layers.
        routers: what `fit_routers` has made for it.
        windows: `[N, L]` held-out token ids, longer than the attention window by four times `COPIED_TOKENS` at least.

    Raises:
        ValueError: windows that are too short.
    """
    window = config.sliding_window
    if windows.shape[1] < window + 4 * COPIED_TOKENS:
        raise ValueError(
            f"{windows.shape[1]} tokens held out of the shortest calibration text are too few to try a sliding window of {window};"
            f" {window + 4 * COPIED_TOKENS} are needed: give longer texts, or fewer tokens to the centroids"
        )
    switch = _Switch(model, config, routers)
    windows = _with_copies(windows)
    costs = _layer_costs(model, switch, windows[:1])
    full_cost = sum(cost.products["full_attention"] for cost in costs)
    patterns = candidate_patterns(costs)
    letters = {kind: letter for letter, kind in LAYER_LETTERS.items()}
    candidates: list[Candidate] = []
    for kinds in tqdm(patterns, unit="pattern", desc="trying patterns", disable=None):
        switch.to(kinds)
        perplexity, copied = _measure(model, windows)
        dense = candidates[0].perplexity if candidates else perplexity
        cost = sum(cost.products[kind] for cost, kind in zip(costs, kinds, strict=True)) / full_cost
        name = "".join(letters[kind] for kind in kinds)
        candidates.append(Candidate(name, perplexity, perplexity / dense - 1, copied, cost))
    switch.to(["full_attention"] * len(costs))
    return candidates


def candidate_patterns(costs: Sequence[LayerCost]) -> list[list[str]]:
    """Layer types to be tried, all full first: for each of `FULL_SHARES`, the others routed, or half of those local."""
    routed, local = _KINDS
    layers = range(len(costs))
    needs_full = sorted(layers, key=lambda i: -costs[i].moved[routed])
    patterns = [["full_attention"] * len(costs)]
    for share in FULL_SHARES:
        full = set(needs_full[: math.ceil(share * len(costs))])
        others = sorted(set(layers) - full, key=lambda i: costs[i].moved[local] - costs[i].moved[routed])
        for hardly_notice in (0, len(others) // 2) if share else (0, len(others) // 2, len(others)):
            sliding = set(others[:hardly_notice])
            kinds = ["full_attention" if i in full else local if i in sliding else routed for i in layers]
            if kinds not in patterns:
                patterns.append(kinds)
    return patterns


class _Switch:
    """Changes the attention of a model that has no cache, layer by layer."""

    def __init__(self, model: DeepseekR1ForCausalLM, config: DeepseekR1TextConfig, routers: dict[str, torch.Tensor]):
        self.attentions = [layer.self_attn for layer in model.model.layers]
        self.patterns, self.routers = [], []
        for layer_idx in range(len(self.attentions)):
            own = config.sparse_attention_of(layer_idx)
            layer = config.per_layer_config[layer_idx]
            local = AttentionPattern(layer.sliding_window, own.num_sink_tokens)
            routed = AttentionPattern(layer.sliding_window, own.num_sink_tokens, own.routed_clusters, own.routed_tokens)
            self.patterns.append(dict(zip(("full_attention", *_KINDS), (AttentionPattern(), routed, local), strict=True)))
            sizes = layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim
            router = DeepseekR1Router(layer.hidden_size, *sizes, own.num_clusters, own.routed_clusters)
            prefix = router_prefix(layer_idx)
            router.load_state_dict({name: routers[f"{prefix}.{name}"] for name in router.state_dict()})
            self.routers.append(router.requires_grad_(False))

    def to(self, kinds: Sequence[str]) -> None:
        for attention, patterns, router, kind in zip(self.attentions, self.patterns, self.routers, kinds, strict=True):
            attention.pattern = patterns[kind]
            attention.router = router if kind == _KINDS[0] else None


def _with_copies(windows: torch.Tensor) -> torch.Tensor:
    """The end of each window replaced by a repetition of a passage from its first quarter."""
    start = (windows.shape[1] - COPIED_TOKENS) // 4
    passage = windows[:, start : start + COPIED_TOKENS]
    return torch.cat((windows[:, :-COPIED_TOKENS], passage), 1)


@torch.no_grad()
def _layer_costs(model: DeepseekR1ForCausalLM, switch: _Switch, window: torch.Tensor) -> list[LayerCost]:
    costs: list[LayerCost] = []
    residual: list[torch.Tensor] = []

    def remember(module, args):
        residual[:] = [args[0]]

    def look(attention, args, kwargs, output):
        patterns, router = switch.patterns[attention.layer_idx], switch.routers[attention.layer_idx]
        attention.router = router
        query, key, value, routing = attention.project(args[0], args[1])
        attention.router = None
        size, moved = residual[0].float().square().sum(), {}
        for kind in _KINDS:
            states = document_attention(
                query, key, value, patterns[kind], attention.scaling, key.shape[2], routing if kind == _KINDS[0] else None
            )
            difference = attention.o_proj(states.transpose(1, 2).flatten(2)) - output[0]
            moved[kind] = float(difference.float().square().sum() / size)
        costs.append(LayerCost(moved, _products(query, key, routing, patterns, router.centroids.shape[1])))

    layers = list(model.model.layers)
    hooks = [layer.register_forward_pre_hook(remember) for layer in layers]
    hooks += [layer.self_attn.register_forward_hook(look, with_kwargs=True) for layer in layers]
    try:
        model.model(window, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return costs


def _products(query, key, routing, patterns, num_clusters: int) -> dict[str, float]:
    """Query-key products per token and query head, those with centroids included; remote keys are counted on a sample."""
    length, routed = key.shape[2], patterns[_KINDS[0]]
    positions = torch.linspace(0, length - 1, _SAMPLED_QUERIES, device=key.device).long()
    keys = torch.arange(length, device=key.device)
    seen = remote_keys(routed, routing.query_clusters[:, :, positions], routing.key_clusters, positions[None], keys[None])
    local = float((keys + 1).clamp(max=routed.window + routed.num_sink_tokens).float().mean())
    centroids = num_clusters * (1 + key.shape[1] / query.shape[1])
    return {
        "full_attention": (length + 1) / 2,
        "sliding_attention": local,
        "local_routed_attention": local + centroids + float(seen.sum(-1).float().mean()),
    }


@torch.no_grad()
def _measure(model: DeepseekR1ForCausalLM, windows: torch.Tensor) -> tuple[float, float]:
    """Perplexity of the windows without their copies, and the share of the copies that is predicted."""
    from ..evaluation.scoring import next_token_logits, token_nll

    losses, hits = [], []
    first = windows.shape[1] - COPIED_TOKENS
    for window in windows.split(1):
        hidden = model.model(window, use_cache=False).last_hidden_state
        losses.append(token_nll(model, hidden[:, : first - 1], window[:, 1:first]))
        copied = slice(first + _LEAD_IN - 1, -1)
        hits.append(next_token_logits(model, hidden[:, copied]).argmax(-1) == window[:, first + _LEAD_IN :])
    return math.exp(torch.cat(losses).double().mean().item()), torch.cat(hits).float().mean().item()
