"""Time and cache memory of several models, measured in turn in one process.

Absolute times depend on the machine and on what else it does; ratios of models that take turns (A B A B ...) much less. Every
sample is kept.
"""

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .scoring import hidden_states, next_token_logits

_WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class Measurement:
    """Repeated samples of one quantity, in the order in which they were taken."""

    median: float
    minimum: float
    maximum: float
    samples: list[float]

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Measurement":
        return cls(statistics.median(samples), min(samples), max(samples), list(samples))

    def over(self, other: "Measurement") -> "Measurement":
        """Ratios to `other`, sample by sample: each pair was taken one right after the other. NaN where `other` is zero."""
        return Measurement.of([a / b if b else math.nan for a, b in zip(self.samples, other.samples, strict=True)])


@dataclass(frozen=True)
class SpeedCell:
    """One model at one context length. Times in seconds, cache in bytes; ratios are to the first model (below 1: less time).

    `cache_bytes` is what the cache holds after the prefill and the decoded tokens.
    """

    label: str
    length: int
    prefill_seconds: Measurement
    decode_seconds_per_token: Measurement
    prefill_ratio: Measurement
    decode_ratio: Measurement
    cache_bytes: int


@dataclass(frozen=True)
class SpeedResult:
    """`decode_error` per model: the largest difference (nats) between the log-probabilities of the last decoded position and
    those of one forward over the same tokens, at the shortest length. What is timed is what computes the right answer."""

    baseline: str
    repeats: int
    decode_tokens: int
    decode_error: dict[str, float]
    cells: list[SpeedCell]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cache_bytes(cache) -> int:
    """Bytes of all tensors that the layers of a transformers cache hold.

    Memory is counted by storage, once each: a slice of a larger tensor keeps the whole of it alive, and two layers may share one.

    Raises:
        ValueError: the cache has no `layers`.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(f"{type(cache).__name__} has no layers, its size is unknown")
    storages = {}
    for layer in layers:
        for tensor in _tensors(vars(layer)):
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def now() -> float:
    """Seconds, when all that was asked of an accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@torch.no_grad()
def _run_once(model, input_ids: torch.Tensor, length: int) -> tuple[float, float, torch.Tensor, Any]:
    """Prefill of `length` tokens, then one forward per remaining token of `input_ids` `[1, tokens]`.

    Returns:
        Seconds of the prefill, seconds per decoded token, the last logits `[vocab]`, the cache.
    """
    start = now()
    hidden, cache = hidden_states(model, input_ids[:, :length], use_cache=True)
    logits = next_token_logits(model, hidden[:, -1])
    prefilled = now()
    for position in range(length, input_ids.shape[1]):
        hidden, cache = hidden_states(model, input_ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits = next_token_logits(model, hidden[:, -1])
    end = now()
    return prefilled - start, (end - prefilled) / (input_ids.shape[1] - length), logits[0], cache


@torch.no_grad()
def _decode_error(model, input_ids: torch.Tensor, length: int) -> float:
    decoded = _run_once(model, input_ids, length)[2]
    hidden, _ = hidden_states(model, input_ids)
    at_once = next_token_logits(model, hidden[:, -1])[0]
    return (decoded.log_softmax(-1) - at_once.log_softmax(-1)).abs().max().item()


def measure_speed(
    models: Mapping[str, Any],
    input_ids: torch.Tensor,
    *,
    lengths: Sequence[int],
    repeats: int = 5,
    decode_tokens: int = 16,
    on_progress=None,
) -> SpeedResult:
    """Times prefill (with cache, logits of the last position) and decoding, batch size 1, models taking turns.

    Args:
        models: label -> causal language model; ratios are taken to the first.
        input_ids: token ids of real text, `[tokens]`; decoding is fed the text itself, so that all models do the same work.
        lengths: tokens of the prefill.
        repeats: samples per model and length.
        decode_tokens: tokens decoded after each prefill; their mean time is one sample.
        on_progress: called as `on_progress(done, total)` with numbers of runs.

    Raises:
        ValueError: nothing to measure, or a text shorter than the longest prefill and its decoded tokens.
    """
    if not models or not lengths or repeats < 1 or decode_tokens < 1 or min(lengths) < 1:
        raise ValueError(
            f"nothing to measure: models={list(models)}, lengths={list(lengths)}, repeats={repeats}, decode_tokens={decode_tokens}"
        )
    needed = max(lengths) + decode_tokens
    if input_ids.numel() < needed:
        raise ValueError(
            f"a prefill of {max(lengths)} and {decode_tokens} tokens need {needed}, the text has {input_ids.numel()}"
        )
    baseline = next(iter(models))
    errors = {}
    for label, model in models.items():
        _run_once(model, _slice(model, input_ids, min(_WARM_UP_TOKENS, needed)), min(_WARM_UP_TOKENS, needed) - 1)
        errors[label] = _decode_error(model, _slice(model, input_ids, min(lengths) + decode_tokens), min(lengths))
    cells = []
    for number, length in enumerate(lengths):
        samples: dict[str, list[tuple[float, float]]] = {label: [] for label in models}
        held = {}
        for repeat in range(repeats):
            for order, (label, model) in enumerate(models.items()):
                ids = _slice(model, input_ids, length + decode_tokens)
                prefill, decode, _, cache = _run_once(model, ids, length)
                samples[label].append((prefill, decode))
                held[label] = cache_bytes(cache)
                del cache
                if on_progress is not None:
                    done = (number * repeats + repeat) * len(models) + order + 1
                    on_progress(done, len(lengths) * repeats * len(models))
        cells += _cells(samples, held, length, baseline)
    return SpeedResult(baseline, repeats, decode_tokens, errors, cells)


def _slice(model, input_ids: torch.Tensor, length: int) -> torch.Tensor:
    return input_ids[:length].unsqueeze(0).to(model.device)


def _cells(samples: dict[str, list[tuple[float, float]]], held: dict[str, int], length: int, baseline: str) -> list[SpeedCell]:
    prefill = {label: Measurement.of([pair[0] for pair in pairs]) for label, pairs in samples.items()}
    decode = {label: Measurement.of([pair[1] for pair in pairs]) for label, pairs in samples.items()}
    return [
        SpeedCell(
            label=label,
            length=length,
            prefill_seconds=prefill[label],
            decode_seconds_per_token=decode[label],
            prefill_ratio=prefill[label].over(prefill[baseline]),
            decode_ratio=decode[label].over(decode[baseline]),
            cache_bytes=held[label],
        )
        for label in samples
    ]
