"""Time and memory of one local attention layer against `scaled_dot_product_attention`, full and with a window mask.

All variants of a cell run in turn in one process, on the same tensors, and are compared with each other (masked against
blockwise) before anything is timed.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..attention.pattern import AttentionPattern, visible_keys
from ..attention.ragged import document_attention
from .memory_probe import PeakMemory
from .speed import Measurement


@dataclass(frozen=True)
class AttentionCell:
    """One length and dtype. Seconds per variant; `speedups`: time of the other variant over that of the local layer.

    `memory_over_output`: memory of the local forward beyond its inputs and its output, as a multiple of the output.
    """

    length: int
    dtype: str
    forward: dict[str, Measurement]
    forward_backward: dict[str, Measurement]
    forward_speedups: dict[str, Measurement]
    forward_backward_speedups: dict[str, Measurement]
    memory_over_output: float
    largest_error: float | None


def measure_attention(
    lengths: Sequence[int],
    pattern: AttentionPattern,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    heads: int = 8,
    head_dim: int = 64,
    compared_lengths: Sequence[int] = (),
    masked_lengths: Sequence[int] = (),
    backward_lengths: Sequence[int] = (),
    repeats: int = 3,
) -> dict[str, Any]:
    """Measures the local layer at `lengths`; where asked also full causal attention and the window as a dense mask.

    Args:
        lengths: tokens.
        pattern: window and sink tokens of the local layer.
        compared_lengths, masked_lengths, backward_lengths: where to measure more. Compared: also full causal `sdpa`; masked:
            also `sdpa` with a dense window mask; backward: also forward + backward.
        dtypes: of queries, keys and values.
        heads, head_dim: of queries; as many key/value heads.
        repeats: samples of each variant, taken in turn.

    Returns:
        `{"pattern", "heads", "head_dim", "cells": [...], "exponents": {dtype: ...}}`; an exponent is the slope of the local
        layer's time over the length between the shortest and the longest, both logarithmic.
    """
    cells = []
    for dtype in dtypes:
        for length in lengths:
            variants = {"local": pattern}
            if length in compared_lengths:
                variants["full"] = None
            if length in masked_lengths:
                variants["masked"] = pattern
            cells.append(_cell(length, dtype, heads, head_dim, pattern, variants, length in backward_lengths, repeats))
    exponents = {}
    for dtype in dtypes:
        own = [cell for cell in cells if cell.dtype == _name(dtype)]
        times = [math.log(cell.forward["local"].median) for cell in own]
        if len(own) > 1:
            exponents[_name(dtype)] = (times[-1] - times[0]) / math.log(own[-1].length / own[0].length)
    return {
        "pattern": asdict(pattern),
        "heads": heads,
        "head_dim": head_dim,
        "exponents": exponents,
        "cells": [asdict(cell) for cell in cells],
    }


def _cell(length, dtype, heads, head_dim, pattern, variants, backward, repeats) -> AttentionCell:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, length, head_dim, generator=generator).to(dtype) for _ in range(3)]
    mask = None
    if "masked" in variants:
        positions = torch.arange(length)[None]
        mask = visible_keys(pattern, positions, positions)[:, None]
    runs: dict[str, Callable] = {
        "local": lambda q, k, v: document_attention(q, k, v, pattern, head_dim**-0.5, length),
        "full": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "masked": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }
    runs = {name: runs[name] for name in variants}
    with torch.no_grad():
        error = (runs["masked"](*tensors) - runs["local"](*tensors)).abs().max().item() if mask is not None else None
        with PeakMemory() as peak:
            output = runs["local"](*tensors)
        extra = (peak.extra_bytes - output.nbytes) / output.nbytes
        forward = in_turn({name: lambda run=run: run(*tensors) for name, run in runs.items()}, repeats)
    both = {}
    if backward:
        tracked = [x.clone().requires_grad_() for x in tensors]
        grad = torch.randn_like(tensors[0])
        both = in_turn(
            {name: lambda run=run: torch.autograd.grad(run(*tracked), tracked, grad) for name, run in runs.items()}, repeats
        )
    return AttentionCell(
        length, _name(dtype), forward, both, _speedups(forward), _speedups(both), max(0.0, extra), error
    )  # fmt: skip


def in_turn(runs: dict[str, Callable], repeats: int) -> dict[str, Measurement]:
    """Seconds of each function, which take turns; all have run once before."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {name: Measurement.of(taken) for name, taken in samples.items()}


def _speedups(times: dict[str, Measurement]) -> dict[str, Measurement]:
    return {name: taken.over(times["local"]) for name, taken in times.items() if name != "local"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
