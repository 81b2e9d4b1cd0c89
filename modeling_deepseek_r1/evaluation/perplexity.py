"""Perplexity of a causal language model on long text, in total and by position inside the window."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .scoring import POSITIONS_PER_CHUNK, check_output_head, hidden_states, token_nll
from .text import token_windows

_FIRST_BUCKET = 128


@dataclass(frozen=True)
class PositionBucket:
    """Mean loss of the tokens at positions `start <= t < end` of their window: a model whose attention is cut loses there
    where the tokens it needs lie further back than it can see."""

    start: int
    end: int
    tokens: int
    mean_nll: float


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity over `tokens` scored tokens in windows of `context_length`; `mean_nll` in nats per token.

    `window_nll` holds the mean of each window, from which the spread over the text can be seen: windows, not tokens, are
    nearly independent samples.
    """

    perplexity: float
    mean_nll: float
    tokens: int
    context_length: int
    num_windows: int
    score_from: int
    window_nll: list[float]
    by_position: list[PositionBucket]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def perplexity(
    model,
    input_ids: torch.Tensor,
    *,
    context_length: int,
    num_windows: int,
    batch_size: int = 1,
    score_from: int = 0,
    bos_token_id: int | None = None,
    positions_per_chunk: int = POSITIONS_PER_CHUNK,
    on_progress=None,
) -> PerplexityResult:
    """Negative log-likelihood of real text in non-overlapping windows.

    Args:
        model: any transformers causal language model, in evaluation mode.
        input_ids: token ids of one long text, `[tokens]`.
        context_length: tokens per window.
        num_windows: windows, taken from the start of the text one after the other.
        batch_size: windows per forward.
        score_from: tokens at positions `t > score_from` of their window count. The first token of a window is never scored,
            since nothing predicts it; a larger value asks how well the model uses a long context.
        bos_token_id: put in front of each window, see `text.leading_token_id`.
        positions_per_chunk: positions whose logits exist at the same time.
        on_progress: called as `on_progress(done, total)` with numbers of windows.

    Raises:
        ValueError: the text is too short, `score_from` leaves nothing to score, or the model does not fit `check_output_head`.
    """
    if not 0 <= score_from < context_length - 1:
        raise ValueError(f"score_from={score_from} must be at least 0 and below context_length - 1 = {context_length - 1}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    windows = token_windows(input_ids, context_length=context_length, num_windows=num_windows, bos_token_id=bos_token_id)
    check_output_head(model, windows[0])
    losses = []
    for start in range(0, num_windows, batch_size):
        batch = windows[start : start + batch_size].to(model.device)
        hidden, _ = hidden_states(model, batch)
        losses.append(token_nll(model, hidden[:, score_from:-1], batch[:, score_from + 1 :], positions_per_chunk).cpu())
        if on_progress is not None:
            on_progress(min(start + batch_size, num_windows), num_windows)
    return _summarise(torch.cat(losses).double(), context_length, score_from)


def _summarise(losses: torch.Tensor, context_length: int, score_from: int) -> PerplexityResult:
    """`losses`: `[windows, scored positions]` float64, the first column being position `score_from + 1`."""
    first = score_from + 1
    buckets = []
    for start, end in _bucket_edges(context_length):
        part = losses[:, max(start - first, 0) : max(end - first, 0)]
        if part.numel():
            buckets.append(PositionBucket(max(start, first), end, part.numel(), part.mean().item()))
    mean = losses.mean().item()
    return PerplexityResult(
        # exp overflows for losses of a broken model; infinity says the same without an exception
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        mean_nll=mean,
        tokens=losses.numel(),
        context_length=context_length,
        num_windows=losses.shape[0],
        score_from=score_from,
        window_nll=losses.mean(dim=1).tolist(),
        by_position=buckets,
    )


def _bucket_edges(context_length: int) -> list[tuple[int, int]]:
    """`[0, 128), [128, 256), [256, 512), ...`: doubling, as the share of the text that a fixed window sees halves."""
    edges = [0]
    width = _FIRST_BUCKET
    while width < context_length:
        edges.append(width)
        width *= 2
    edges.append(context_length)
    return list(zip(edges[:-1], edges[1:], strict=True))
