"""Time of the experts of one sparse layer against a dense MLP of equal active work and against transformers' implementations.

All variants of a cell run in turn in one process, on the same parameters and the same choice of experts, and are compared with
each other before anything is timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ..configuration import DeepseekR1TextConfig
from ..moe.experts import DeepseekR1Experts
from ..moe.mlp import DeepseekR1MLP
from ..moe.select import select_experts
from .attention_speed import in_turn
from .speed import Measurement

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""What transformers can run on any device."""
CALL_TOKENS = 128
"""A sample of the forward pass takes at least so many tokens, in as many calls as that needs."""


@dataclass(frozen=True)
class ExpertCell:
    """One number of tokens and dtype. Seconds per call and variant: `ours`, `dense` and the implementations of transformers.

    Speedups are the time of the other variant over ours. `largest_error`: largest difference to ours, output and gradients,
    over the largest value. Variants that would copy more than `max_copied_bytes` of weights are left out.
    """

    tokens: int
    dtype: str
    forward: dict[str, Measurement]
    forward_backward: dict[str, Measurement]
    forward_speedups: dict[str, Measurement]
    forward_backward_speedups: dict[str, Measurement]
    largest_error: dict[str, float]


def measure_experts(
    tokens: Sequence[int],
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    hidden_size: int = 1024,
    moe_intermediate_size: int = 768,
    num_experts: int = 32,
    num_experts_per_tok: int = 2,
    backward_tokens: Sequence[int] = (),
    implementations: Sequence[str] = IMPLEMENTATIONS,
    max_copied_bytes: int = 2**31,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measures the experts for `tokens`; at those of `backward_tokens` also forward and backward together.

    Args:
        tokens: numbers of tokens.
        hidden_size, moe_intermediate_size, num_experts, num_experts_per_tok: of the layer. The dense MLP is as wide as a
            token's experts together.
        implementations: names that transformers' experts interface knows.
        max_copied_bytes: `batched_mm` copies the weights of every pair; it is left out where that is more than this.
        repeats: samples of each variant, taken in turn.

    Returns:
        `{"hidden_size", ..., "cells": [...]}`.

    Raises:
        ValueError: an implementation that transformers does not know.
    """
    unknown = [name for name in implementations if name != "eager" and name not in ALL_EXPERTS_FUNCTIONS]
    if unknown:
        raise ValueError(f"implementation {unknown[0]!r} is not known; choose among eager, {', '.join(ALL_EXPERTS_FUNCTIONS)}")
    config = DeepseekR1TextConfig(
        hidden_size=hidden_size,
        intermediate_size=moe_intermediate_size * num_experts_per_tok,
        num_hidden_layers=1,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        moe_intermediate_size=moe_intermediate_size,
        chunk_size_feed_forward=0,
    )
    cells = []
    for dtype in dtypes:
        layer = _Layer(config, dtype)
        for count in tokens:
            copied = count * num_experts_per_tok * 3 * hidden_size * moe_intermediate_size * dtype.itemsize
            names = [name for name in implementations if name != "batched_mm" or copied <= max_copied_bytes]
            cells.append(asdict(_cell(layer, count, names, count in backward_tokens, repeats)))
    return {
        "hidden_size": hidden_size,
        "moe_intermediate_size": moe_intermediate_size,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "cells": cells,
    }


class _Layer:
    """Our experts, those of transformers on the same parameters, and a dense MLP."""

    def __init__(self, config: DeepseekR1TextConfig, dtype: torch.dtype):
        torch.manual_seed(0)
        self.config, self.dtype = config, dtype
        config._experts_implementation = "eager"
        self.ours, self.theirs = DeepseekR1Experts(config, 0), Qwen3MoeExperts(config)
        self.ours.init_weights(config.initializer_range)
        self.ours.to(dtype)
        self.theirs.gate_up_proj, self.theirs.down_proj = self.ours.gate_up_proj, self.ours.down_proj
        self.dense = DeepseekR1MLP(config).to(dtype)

    def variants(self, names: Sequence[str]) -> dict[str, tuple[Callable, list[nn.Parameter]]]:
        """Name -> function of hidden states, weights and indices, and the parameters that it uses."""

        def through(module, name):
            def run(hidden_states, weights, index):
                self.config._experts_implementation = name
                return module(hidden_states, index, weights)

            return run, list(self.ours.parameters())

        runs = {"ours": through(self.ours, "eager")}
        runs["dense"] = (lambda hidden_states, weights, index: self.dense(hidden_states)), list(self.dense.parameters())
        return runs | {name: through(self.theirs, name) for name in names}


def _inputs(layer: _Layer, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Hidden states, weights and indices; several sets of few tokens, so that one token does not always find its experts in
    the processor's cache."""
    generator, config = torch.Generator().manual_seed(tokens), layer.config
    sets = []
    for _ in range(max(1, CALL_TOKENS // tokens)):
        hidden_states = torch.randn(tokens, config.hidden_size, generator=generator).to(layer.dtype)
        logits = torch.randn(tokens, config.num_experts, generator=generator)
        choice = select_experts(logits, config.num_experts_per_tok, config.num_experts_per_tok, None, True)
        sets.append((hidden_states, *choice))
    return sets


def _cell(layer: _Layer, tokens: int, names: Sequence[str], backward: bool, repeats: int) -> ExpertCell:
    sets = _inputs(layer, tokens)
    variants = layer.variants(names)
    with torch.no_grad():
        outcomes = {name: [run(*sets[0])] for name, (run, _) in variants.items()}
        forward = in_turn({name: every_set(run, sets) for name, (run, _) in variants.items()}, repeats)
    both = {}
    if backward:
        steps = {name: _step(*variant, *sets[0]) for name, variant in variants.items()}
        outcomes = {name: [*outcomes[name], *step()] for name, step in steps.items()}
        both = in_turn(steps, repeats)
    forward = {name: per_call(taken, len(sets)) for name, taken in forward.items()}
    errors = {name: relative_error(outcomes[name], outcomes["ours"]) for name in names}
    return ExpertCell(
        tokens, str(layer.dtype).removeprefix("torch."), forward, both, _speedups(forward), _speedups(both), errors
    )  # fmt: skip


def every_set(run: Callable, sets: Sequence[tuple[torch.Tensor, ...]]) -> Callable:
    """A function that runs on all sets of inputs."""

    def call():
        for inputs in sets:
            run(*inputs)

    return call


def per_call(taken: Measurement, calls: int) -> Measurement:
    """The time of one of so many calls."""
    return Measurement.of([sample / calls for sample in taken.samples])


def _step(run: Callable, parameters: list[nn.Parameter], hidden_states, weights, index) -> Callable:
    """Forward and backward; the gradients of the parameters and of the hidden states."""
    tracked = hidden_states.clone().requires_grad_()
    traced = weights.clone().requires_grad_()
    direction = torch.ones_like(hidden_states)
    return lambda: torch.autograd.grad(run(tracked, traced, index), [*parameters, tracked], direction)


def relative_error(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest difference over the largest expected value, of the worst pair."""
    pairs = zip(actual, expected, strict=True)
    return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)


def _speedups(times: dict[str, Measurement]) -> dict[str, Measurement]:
    return {name: taken.over(times["ours"]) for name, taken in times.items() if name != "ours"}
