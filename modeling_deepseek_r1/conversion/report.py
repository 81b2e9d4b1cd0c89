"""What a conversion did, or would do: sizes, attention pattern, and everything that was not simply carried over."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import torch

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig


@dataclass(frozen=True)
class LayerAttention:
    """What the attention of one layer keeps.

    Attributes:
        window: tokens that a query sees, itself included; None: all of them.
        num_sink_tokens: first tokens of the document that stay visible besides the window.
        bytes_per_token: keys and values of one token in this layer's cache.
        routed_keys: keys that a query of a routed layer sees beyond the window at most; 0: the layer is not routed.
        global_stride: distance of the nodes of a local_global layer; 0: it has none.
        num_memory_tokens: its memory tokens, which are part of the weights.
    """

    window: int | None
    num_sink_tokens: int
    bytes_per_token: int
    routed_keys: int = 0
    global_stride: int = 0
    num_memory_tokens: int = 0

    @property
    def name(self) -> str:
        if self.window is None:
            return "full_attention"
        sinks = f" + {self.num_sink_tokens} sink tokens" if self.num_sink_tokens else ""
        if self.routed_keys:
            return f"local_routed_attention ({self.window} tokens{sinks} + at most {self.routed_keys} routed)"
        if self.global_stride:
            memory = f" + {self.num_memory_tokens} memory tokens" if self.num_memory_tokens else ""
            return f"local_global_attention ({self.window} tokens{sinks} + 1 of every {self.global_stride} tokens{memory})"
        return f"sliding_attention ({self.window} tokens{sinks})"


@dataclass(frozen=True)
class CacheSize:
    """Size of the key/value cache of one sequence.

    Attributes:
        growth_bytes: added by every 1,000 tokens once the sequence is longer than the windows.
        fixed_bytes: kept by the layers with a window, however long the sequence is.
    """

    growth_bytes: int
    fixed_bytes: int


@dataclass
class ConversionReport:
    """The result of `convert_checkpoint` and `to_dense`.

    Attributes:
        source: what was converted, as it was given.
        source_family: `model_type` of the source.
        destination: folder of the result.
        target_family: `model_type` of the result.
        parameters: number of weights, tied ones counted once.
        disk_bytes: size of the weights on disk.
        load_bytes: peak memory for loading the result in its own dtype: all weights and the largest tensor once more.
        dtype: dtype that the result's configuration asks for.
        pattern: attention of the layers, e.g. `"15 x full_attention, 15 x sliding_attention (512 tokens + 32 sink tokens)"`.
        cache_before: key/value cache with the source's attention pattern.
        cache_after: key/value cache with the result's attention pattern.
        exact: whether the result computes the same function as the source (as dequantised, if it was quantised).
        tensors_matched: tensors written.
        tensors_cast: tensors whose dtype was changed.
        tensors_skipped: tensors of the source that the result does not need, with the reason.
        tokenizer: the tokenizer's files, or an empty list where the source has no tokenizer.
        dry_run: whether nothing was written.
        warnings: what deserves a look.
        calibration: texts, number of tokens and seed that centroids were fitted with, and the patterns that were tried;
            `domains`: the same of domain gates, with their routing purity by layer.
        experts: layers with experts, e.g. `"15 layers x 8 experts (rank 16), +8.2% parameters"`; None = there are none.
    """

    source: str
    source_family: str
    destination: str
    target_family: str
    parameters: int
    disk_bytes: int
    load_bytes: int
    dtype: str
    pattern: str
    cache_before: CacheSize
    cache_after: CacheSize
    exact: bool
    tensors_matched: int
    tensors_cast: int
    tensors_skipped: list[str] = field(default_factory=list)
    tokenizer: list[str] = field(default_factory=list)
    dry_run: bool = False
    warnings: list[str] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    experts: str | None = None

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Aligned lines for a terminal."""
        rows = [
            ("source", f"{self.source} ({self.source_family})"),
            ("result", f"{self.destination} ({self.target_family}){', not written: dry run' if self.dry_run else ''}"),
            ("same function", "yes" if self.exact else "no"),
            ("layers", self.pattern),
            *([("experts", self.experts)] if self.experts else []),
            ("parameters", f"{self.parameters:,}"),
            ("dtype", self.dtype),
            ("size on disk", readable_bytes(self.disk_bytes)),
            ("memory to load", readable_bytes(self.load_bytes)),
            ("cache, source", _cache_line(self.cache_before)),
            ("cache, result", _cache_line(self.cache_after)),
            ("tensors", f"{self.tensors_matched} matched, {self.tensors_cast} cast, {len(self.tensors_skipped)} skipped"),
            ("tokenizer", ", ".join(self.tokenizer) or "none in the source"),
        ]
        calibration = self.calibration or {}
        if "texts" in calibration:
            rows.append(("centroids", f"fitted to {calibration['tokens']:,} tokens of {', '.join(calibration['texts'])}"))
            rows += [("pattern tried", _candidate_line(candidate)) for candidate in calibration["patterns"]]
        if "domains" in calibration:
            rows.append(("domain gates", _domains_line(calibration["domains"])))
        rows += [("skipped", line) for line in self.tensors_skipped] + [("warning", line) for line in self.warnings]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def layer_attention(config: DeepseekR1TextConfig, dtype: torch.dtype) -> list[LayerAttention]:
    """What each layer's attention keeps, with a cache in `dtype`."""
    layers = []
    for layer_idx, kind in enumerate(config.layer_types):
        layer = config.per_layer_config[layer_idx]
        size = 2 * layer.num_key_value_heads * layer.head_dim * dtype.itemsize
        if kind == "full_attention":
            layers.append(LayerAttention(None, 0, size))
        else:
            sparse = config.sparse_attention_of(layer_idx)
            routed = sparse.routed_clusters * sparse.routed_tokens if kind == "local_routed_attention" else 0
            nodes = (sparse.global_stride, sparse.num_memory_tokens) if kind == "local_global_attention" else ()
            sinks = sparse.num_sink_tokens if sparse else 0
            layers.append(LayerAttention(layer.sliding_window, sinks, size, routed, *nodes))
    return layers


def cache_size(layers: Iterable[LayerAttention]) -> CacheSize:
    growth, fixed = 0, 0
    for layer in layers:
        if layer.window is None or layer.routed_keys:
            growth += 1000 * layer.bytes_per_token
        else:
            growth += 1000 * layer.bytes_per_token // layer.global_stride if layer.global_stride else 0
            fixed += (layer.window - 1 + layer.num_sink_tokens) * layer.bytes_per_token
    return CacheSize(growth, fixed)


def describe_pattern(layers: Iterable[LayerAttention]) -> str:
    """`"15 x full_attention, 15 x sliding_attention (512 tokens + 32 sink tokens)"`."""
    return ", ".join(f"{count} x {name}" for name, count in Counter(layer.name for layer in layers).items())


def describe_experts(config: DeepseekR1TextConfig) -> str | None:
    """`"15 layers x 8 experts (code 4, text 4; rank 16)"`, or None without experts."""
    names = []
    for layer_idx in range(config.num_hidden_layers):
        if config.is_sparse(layer_idx):
            domains, rank = config.expert_domains(layer_idx), config.routing_of(layer_idx).expert_rank
            details = [", ".join(f"{domain} {count}" for domain, count in domains.items())] if len(domains) > 1 else []
            details += [f"rank {rank}"] if rank is not None else []
            details += ["and a shared one"] if config.per_layer_config[layer_idx].shared_expert_intermediate_size else []
            names.append(f"{sum(domains.values())} experts" + (f" ({'; '.join(details)})" if details else ""))
    counts = Counter(names).items()
    return ", ".join(f"{count} layer{'s' if count > 1 else ''} x {name}" for name, count in counts) or None


def readable_bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def name_list(names: Iterable[str], limit: int = 40) -> str:
    """Names for an error message, layer numbers of otherwise equal names gathered: `model.layers.{0,1,2}.input_layernorm.weight`."""

    def pieces(name: str) -> tuple[str, int | None, str]:
        head, layers, tail = name.partition("layers.")
        number, dot, rest = tail.partition(".")
        return (head + layers, int(number), dot + rest) if layers and number.isdigit() else (name, None, "")

    keyed = sorted((pieces(name) for name in names), key=lambda piece: (piece[0], piece[2], piece[1] or 0))
    lines = []
    for (head, tail), group in groupby(keyed, key=lambda piece: (piece[0], piece[2])):
        numbers = [str(number) for _, number, _ in group if number is not None]
        lines.append(f"{head}{'{' if len(numbers) > 1 else ''}{','.join(numbers)}{'}' if len(numbers) > 1 else ''}{tail}")
    more = f", and {len(lines) - limit} more" if len(lines) > limit else ""
    return ", ".join(lines[:limit]) + more


def _candidate_line(tried: dict[str, Any]) -> str:
    return (
        f"{tried['layer_types']}: perplexity {tried['perplexity']:.2f} ({tried['increase']:+.1%}), repeated passage"
        f" {tried['copied']:.0%}, query-key products {tried['cost']:.0%}"
    )


def _domains_line(domains: dict[str, Any]) -> str:
    texts = "; ".join(f"{domain}: {', '.join(names)}" for domain, names in domains["texts"].items())
    shares = domains["purity"].values()
    if not shares:
        return texts
    mean = sum(shares) / len(shares)
    return f"{texts}; {mean:.0%} of held-out tokens go to their domain ({min(shares):.0%} ... {max(shares):.0%} by layer)"


def _cache_line(cache: CacheSize) -> str:
    return f"{readable_bytes(cache.growth_bytes)} per 1,000 tokens + {readable_bytes(cache.fixed_bytes)} fixed"
