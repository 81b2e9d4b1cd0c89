"""Time and memory of one sparse attention layer against `scaled_dot_product_attention`, full and with a window mask.

All variants of a cell run in turn in one process, on the same tensors, and the masked and the blockwise window are compared
with each other before anything is timed. Queries and keys are random: clusters come out more even than those of a real model,
whose whole time `deepseek-r1 evaluate` measures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..attention.kmeans import assign_keys, choose_clusters
from ..attention.nodes import Memory, Nodes
from ..attention.pattern import AttentionPattern, visible_keys
from ..attention.ragged import document_attention
from ..attention.routed import Routing
from .mean_blocks import BLOCK_TOKENS, block_routing
from .memory_probe import peak_memory
from .speed import Measurement, now

SPARSE = ("local", "global", "routed")
"""Variants whose cost does not grow with the square of the length."""


@dataclass(frozen=True)
class AttentionCell:
    """One length and dtype. Seconds per variant, of those that were measured there:

    `local` (window and sink tokens), `global` (these, nodes and memory tokens), `routed` (the first and clusters, assignment
    included), `blocks` (the first and as many keys in blocks chosen by their mean), `full` (causal), `masked` (the window as a
    dense mask).

    `memory_over_output`: memory of a forward beyond its inputs and its output, as a multiple of the output.
    """

    length: int
    dtype: str
    forward: dict[str, Measurement]
    forward_backward: dict[str, Measurement]
    memory_over_output: dict[str, float]
    largest_error: float | None


@dataclass(frozen=True)
class Heads:
    """Shape of the layer: query heads, key/value heads, numbers per head."""

    query: int = 9
    key_value: int = 3
    size: int = 64


def measure_attention(
    lengths: Sequence[int],
    pattern: AttentionPattern,
    *,
    num_clusters: int | None = None,
    num_memory_tokens: int = 0,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    heads: Heads = Heads(),  # noqa: B008 (frozen)
    compared_lengths: Sequence[int] = (),
    masked_lengths: Sequence[int] = (),
    backward_lengths: Sequence[int] = (),
    repeats: int = 3,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Measures the sparse layers at `lengths`; where asked also full causal attention and the window as a dense mask.

    Args:
        lengths: tokens.
        pattern: of the routed and of the global layer; of the local one, its window and sink tokens. Without a `global_stride`
            there is no global layer.
        num_clusters: centroids per key/value head; None: no routed layer.
        num_memory_tokens: of the global layer.
        compared_lengths, masked_lengths, backward_lengths: where to measure more. Compared: also full causal `sdpa`, and with
            `num_clusters` mean blocks; masked: also `sdpa` with a dense window mask; backward: also forward + backward.
        dtypes: of queries, keys and values.
        repeats: samples of each variant, taken in turn.
        device: on another one than the CPU a run of each that does not count comes first.

    Returns:
        `{"pattern", "num_clusters", "num_memory_tokens", "heads", "cells": [...], "exponents": {dtype: {variant: ...}}}`; an exponent is the slope of
        the time over the length between the shortest and the longest, both logarithmic.
    """
    cells = []
    for dtype in dtypes:
        for length in lengths:
            names = ["local", *(["global"] if pattern.global_stride else []), *(["routed"] if num_clusters else [])]
            names += ["full", *(["blocks"] if num_clusters else [])] if length in compared_lengths else []
            names += ["masked"] if length in masked_lengths else []
            with torch.device(device):
                runs = _variants(names, pattern, num_clusters, num_memory_tokens, heads, length)
            cells.append(_cell(length, dtype, heads, runs, length in backward_lengths, repeats, torch.device(device)))
    return {
        "pattern": asdict(pattern),
        "num_clusters": num_clusters,
        "num_memory_tokens": num_memory_tokens,
        "heads": asdict(heads),
        "exponents": {_name(dtype): _exponents([cell for cell in cells if cell.dtype == _name(dtype)]) for dtype in dtypes},
        "cells": [asdict(cell) for cell in cells],
    }


def _exponents(cells: list[AttentionCell]) -> dict[str, float]:
    first, last = cells[0], cells[-1]
    if first.length == last.length:
        return {}
    return {
        name: math.log(last.forward[name].median / first.forward[name].median) / math.log(last.length / first.length)
        for name in SPARSE
        if name in first.forward
    }


def _variants(names, pattern, num_clusters, num_memory_tokens, heads: Heads, length) -> dict[str, Callable]:
    scale, local = heads.size**-0.5, pattern.local
    generator, gate = torch.Generator(torch.get_default_device()).manual_seed(1), torch.zeros(1, heads.query, length)
    runs: dict[str, Callable] = {
        "local": lambda q, k, v: document_attention(q, k, v, local, scale, length),
        "full": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    }
    if "masked" in names:
        positions = torch.arange(length)[None]
        mask = visible_keys(local, positions, positions)[:, None]
        runs["masked"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    if "global" in names:
        slots = [torch.randn(heads.key_value, num_memory_tokens, heads.size, generator=generator) for _ in range(2)]
        nodes = Nodes(gate, Memory(*slots, torch.zeros(heads.query)) if num_memory_tokens else None)
        runs["global"] = lambda q, k, v: document_attention(q, k, v, pattern, scale, length, nodes)
    if num_clusters:
        centroids = F.normalize(torch.randn(heads.key_value, num_clusters, heads.size, generator=generator), dim=-1)
        budget = pattern.routed_clusters * pattern.routed_tokens
        blocks = replace(pattern, routed_clusters=max(1, budget // BLOCK_TOKENS), routed_tokens=BLOCK_TOKENS)

        def routed(q, k, v):
            with torch.no_grad():
                clusters = choose_clusters(q, centroids, pattern.routed_clusters), assign_keys(k, centroids)
            return document_attention(q, k, v, pattern, scale, length, Routing(*clusters, gate))

        def by_blocks(q, k, v):
            with torch.no_grad():
                routing = block_routing(q, k, blocks)
            return document_attention(q, k, v, blocks, scale, length, routing)

        runs |= {"routed": routed, "blocks": by_blocks}
    return {name: runs[name] for name in names}


def _cell(length, dtype, heads: Heads, runs: dict[str, Callable], backward: bool, repeats: int, device) -> AttentionCell:
    generator, warm_up = torch.Generator().manual_seed(0), device.type != "cpu"
    counts = heads.query, heads.key_value, heads.key_value
    tensors = [torch.randn(1, count, length, heads.size, generator=generator).to(device, dtype) for count in counts]
    error, extra = None, {}
    with torch.no_grad():
        if "masked" in runs:
            error = (runs["masked"](*tensors) - runs["local"](*tensors)).abs().max().item()
        for name in set(runs) & set(SPARSE):
            with peak_memory(device) as peak:
                output = runs[name](*tensors)
            extra[name] = max(0.0, (peak.extra_bytes - output.nbytes) / output.nbytes)
            del output
        forward = in_turn({name: lambda run=run: run(*tensors) for name, run in runs.items()}, repeats, warm_up)
    both = {}
    if backward:
        tracked = [x.clone().requires_grad_() for x in tensors]
        grad = torch.randn_like(tensors[0])
        both = in_turn(
            {name: lambda run=run: torch.autograd.grad(run(*tracked), tracked, grad) for name, run in runs.items()},
            repeats,
            warm_up,
        )
    return AttentionCell(length, _name(dtype), forward, both, extra, error)


def in_turn(runs: dict[str, Callable], repeats: int, warm_up: bool = True) -> dict[str, Measurement]:
    """Seconds of each function, which take turns, after one run of each that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values() if warm_up else ():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = now()
            run()
            samples[name].append(now() - start)
    return {name: Measurement.of(taken) for name, taken in samples.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
