"""One forward over a text, and what every layer chose in it: experts, attention sets, sizes and costs."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..attention.pattern import AttentionPattern, remote_keys, visible_keys, visible_nodes
from ..attention.routed import Routing
from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..conversion.report import cache_size, layer_attention
from ..evaluation.domains import expert_routers
from ..evaluation.scoring import hidden_states, token_nll
from ..moe.metrics import ExpertUsage
from ..moe.outputs import RouterOutput

DEFAULT_TOKENS = 512
_QUERIES_AT_ONCE = 64
_DIGITS = 4

PARTS = (
    ("experts", (".mlp.experts.",)),
    ("shared experts", (".mlp.shared_expert",)),
    ("routers and domain gates", (".mlp.router.",)),
    ("routing of attention, memory tokens", (".self_attn.router.", ".self_attn.global_tokens.")),
    ("attention", (".self_attn.",)),
    ("dense MLPs", (".mlp.",)),
    ("embeddings and output head", ("embed_tokens", "lm_head")),
    ("norms", ("norm",)),
)
"""Name of a part of the model -> what the names of its parameters have in them; the first that fits counts."""


@dataclass(frozen=True)
class ExpertChoice:
    """What the router of one sparse layer chose.

    Attributes:
        layer: its number.
        domains: (domain, number of experts) in the order of the experts.
        shared: whether there is an expert besides that all tokens share.
        index, weights: of each token its active experts, the best one first, and their weights.
        shares: of the active slots that each expert got.
        mean_active: mean number of active experts of a token.
    """

    layer: int
    domains: list[tuple[str, int]]
    shared: bool
    index: list[list[int]]
    weights: list[list[float]]
    shares: list[float]
    mean_active: float


@dataclass(frozen=True)
class AttentionSets:
    """What decides which keys a query of one layer sees; `attention/pattern.py` is the definition.

    Attributes:
        layer: its number. kind: its `layer_types`.
        heads: query heads. groups: key/value heads.
        window: None = all earlier tokens.
        sinks, stride, routed_tokens: of the `AttentionPattern`; 0 = none.
        memory: memory tokens, which every query sees.
        key_clusters: `[groups][n]`, of a routed layer; else empty.
        query_clusters: `[heads][n][chosen]`, of a routed layer; else empty.
        mean_keys: keys that a query sees, mean over queries and heads, memory tokens included.
    """

    layer: int
    kind: str
    heads: int
    groups: int
    window: int | None
    sinks: int
    stride: int
    routed_tokens: int
    memory: int
    key_clusters: list[list[int]]
    query_clusters: list[list[list[int]]]
    mean_keys: float


@dataclass(frozen=True)
class Inspection:
    """One model on one text.

    Attributes:
        checkpoint: what the model is called.
        pieces: the text of each token; empty where a character ends in a later token.
        ids: `[n]` token ids.
        losses: negative log-likelihood of each token in nats; None for the first, and where it is not finite.
        text_tokens: tokens of the whole text, of which the first n were read.
        experts: of the sparse layers. attention: of all layers.
        sizes: (part, parameters, bytes).
        costs: (what, figure, what it means).
    """

    checkpoint: str
    pieces: list[str]
    ids: list[int]
    losses: list[float | None]
    text_tokens: int
    experts: list[ExpertChoice]
    attention: list[AttentionSets]
    sizes: list[tuple[str, int, int]]
    costs: list[tuple[str, str, str]]

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


@torch.no_grad()
def inspect_text(model, tokenizer, text: str, *, tokens: int = DEFAULT_TOKENS, name: str = "") -> Inspection:
    """Reads the beginning of a text and records what the layers choose.

    Args:
        model: a causal language model of this library.
        tokenizer: its tokenizer.
        tokens: how many tokens to read at most.
        name: what the page calls the model.

    Raises:
        ValueError: a model of another library or a bidirectional one, fewer than 2 tokens asked for, or fewer in the text.
    """
    if model.config.model_type != DeepseekR1TextConfig.model_type:
        raise ValueError(
            f"the report shows models of this library, this one is {model.config.model_type!r}; `deepseek-r1 convert` makes one"
            " of it"
        )
    if model.config.use_bidirectional_attention:
        raise ValueError("the report shows what predicts the next token; this model has use_bidirectional_attention=True")
    if tokens < 2:
        raise ValueError(f"tokens={tokens} must be at least 2")
    ids, pieces = split_text(tokenizer, text)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; at least 2 are needed")
    ids, pieces, total = ids[:tokens], pieces[:tokens], len(ids)
    input_ids = torch.tensor([ids], device=model.device)
    with _recording(model) as (routed, clusters):
        start = time.perf_counter()
        hidden, _ = hidden_states(model, input_ids)
        losses = token_nll(model, hidden[:, :-1], input_ids[:, 1:])[0]
        seconds = time.perf_counter() - start
    experts = [_expert_choice(model, number, chosen) for number, chosen in sorted(routed.items())]
    attention = [_attention_sets(model, number, len(ids), clusters.get(number)) for number in range(len(model.model.layers))]
    sizes = part_sizes(model)
    return Inspection(
        checkpoint=name,
        pieces=pieces,
        ids=ids,
        losses=[None, *(round(loss, _DIGITS) if math.isfinite(loss) else None for loss in losses.tolist())],
        text_tokens=total,
        experts=experts,
        attention=attention,
        sizes=sizes,
        costs=_costs(model, sizes, experts, attention, len(ids), seconds),
    )


def split_text(tokenizer, text: str) -> tuple[list[int], list[str]]:
    """Token ids without special tokens and the text of each; joined, the texts are the whole text."""
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids, [tokenizer.decode([number]) for number in ids]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pieces, done = [], 0
    for _, stop in encoded["offset_mapping"]:
        # The tokens of one character all have the whole of it as their place.
        pieces.append(text[done : max(done, stop)])
        done = max(done, stop)
    if pieces:
        pieces[-1] += text[done:]
    return encoded["input_ids"], pieces


@contextmanager
def _recording(model) -> Iterator[tuple[dict[int, RouterOutput], dict[int, Routing]]]:
    """What the routers of the layers say in the next forward, by number of the layer."""
    routed: dict[int, RouterOutput] = {}
    clusters: dict[int, Routing] = {}

    def keep(store: dict, number: int):
        return lambda module, args, output: store.__setitem__(number, output)

    hooks = [router.register_forward_hook(keep(routed, number)) for number, router in expert_routers(model).items()]
    for number, layer in enumerate(model.model.layers):
        if layer.self_attn.router is not None:
            hooks.append(layer.self_attn.router.register_forward_hook(keep(clusters, number)))
    try:
        yield routed, clusters
    finally:
        for hook in hooks:
            hook.remove()


def _expert_choice(model, number: int, routed: RouterOutput) -> ExpertChoice:
    block = model.model.layers[number].mlp
    usage = ExpertUsage(block.router.domains)
    usage.add(routed)
    index, weights = [], []
    for row, values in zip(routed.top_k_index.tolist(), routed.top_k_weights.tolist(), strict=True):
        active = [slot for slot, weight in enumerate(values) if weight]
        index.append([row[slot] for slot in active])
        weights.append([round(values[slot], _DIGITS) for slot in active])
    return ExpertChoice(
        layer=number,
        domains=list(block.router.domains.items()),
        shared=block.shared_expert is not None,
        index=index,
        weights=weights,
        shares=[round(share, _DIGITS) for share in (usage.slots / usage.slots.sum()).tolist()],
        mean_active=usage.mean_active_experts[0],
    )


def _attention_sets(model, number: int, length: int, routing: Routing | None) -> AttentionSets:
    attention = model.model.layers[number].self_attn
    pattern, groups = attention.pattern, attention.num_key_value_groups
    heads = attention.q_proj.out_features // attention.head_dim
    memory = model.config.sparse_attention_of(number).num_memory_tokens if pattern.global_stride else 0
    return AttentionSets(
        layer=number,
        kind=attention.layer_type,
        heads=heads,
        groups=heads // groups,
        window=pattern.window,
        sinks=pattern.num_sink_tokens,
        stride=pattern.global_stride,
        routed_tokens=pattern.routed_tokens if routing is not None else 0,
        memory=memory,
        key_clusters=routing.key_clusters[0].tolist() if routing is not None else [],
        query_clusters=routing.query_clusters[0].tolist() if routing is not None else [],
        mean_keys=round(_mean_keys(pattern, length, routing) + memory, 1),
    )


def _mean_keys(pattern: AttentionPattern, length: int, routing: Routing | None) -> float:
    keys, seen = torch.arange(length)[None], 0.0
    for queries in torch.arange(length)[None].split(_QUERIES_AT_ONCE, 1):
        places = queries, keys
        seen += float(visible_keys(pattern, *places).sum())
        if pattern.global_stride:
            seen += float(visible_nodes(pattern, *places).sum())
        if routing is not None:
            chosen = routing.query_clusters[:, :, queries[0]].cpu()
            remote = remote_keys(pattern, chosen, routing.key_clusters.cpu(), *places)
            seen += float(remote.sum()) / chosen.shape[1]
    return seen / length


def part_sizes(model) -> list[tuple[str, int, int]]:
    """(part, parameters, bytes) of the parts that the model has; tied weights count once."""
    counts: dict[str, list[int]] = {part: [0, 0] for part, _ in PARTS}
    for name, parameter in model.named_parameters():
        part = next(part for part, marks in PARTS if any(mark in name for mark in marks))
        counts[part][0] += parameter.numel()
        counts[part][1] += parameter.nbytes
    return [(part, *count) for part, count in counts.items() if count[0]]


def _costs(model, sizes, experts: list[ExpertChoice], attention: list[AttentionSets], length: int, seconds: float):
    total, per_part = sum(count for _, count, _ in sizes), {part: count for part, count, _ in sizes}
    costs = []
    if experts:
        passed = total - per_part["experts"]
        for choice in experts:
            module = model.model.layers[choice.layer].mlp.experts
            packed = [parameter for parameter in module.parameters() if parameter.shape[0] == module.num_experts]
            own = sum(parameter.numel() for parameter in packed if parameter.dim() == 3)
            whole = sum(parameter.numel() for parameter in module.parameters())
            passed += whole - own + own * choice.mean_active / module.num_experts
        active = sum(choice.mean_active for choice in experts) / len(experts)
        of = " / ".join(str(count) for count in sorted({len(choice.shares) for choice in experts}))
        costs.append(("experts per token", f"{active:.2f} of {of}", "mean over tokens and layers with experts"))
        costs.append(("parameters per token", f"{passed:,.0f}", f"{passed / total:.0%} of all: not those of inactive experts"))
    seen = sum(layer.mean_keys * layer.heads for layer in attention)
    full = sum((length + 1) / 2 * layer.heads for layer in attention)
    costs.append(
        ("keys per query", f"{seen / sum(layer.heads for layer in attention):,.1f}", f"{seen / full:.0%} of full attention")
    )
    cache = cache_size(layer_attention(model.config, model.dtype))
    costs.append(("cache per 1,000 tokens", f"{cache.growth_bytes / 1e6:,.2f} MB", "grows with the text"))
    costs.append(("cache of fixed size", f"{cache.fixed_bytes / 1e6:,.2f} MB", "of the layers with a window, at any length"))
    rate = f"{length / seconds:,.0f} tokens/s on {model.device}, one reading of {length:,} tokens, nothing warmed up"
    return [*costs, ("time", f"{seconds:.2f} s", rate)]
