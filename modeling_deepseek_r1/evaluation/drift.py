"""How far one model's next-token distributions are from another's on the same text."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .scoring import POSITIONS_PER_CHUNK, check_output_head, hidden_states, next_token_logits
from .text import token_windows

DECADES = range(-6, 2)
"""Bins of the histogram end at these powers of ten."""

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Bin:
    """Tokens whose divergence is below so many nats, and not in an earlier bin."""

    below: float
    tokens: int


@dataclass(frozen=True)
class WorstToken:
    """A place where the two differ most: the token before it, and which one each model finds likeliest."""

    window: int
    position: int
    kl: float
    reference_token: int
    candidate_token: int


@dataclass(frozen=True)
class DriftResult:
    """KL(reference || candidate) in nats per token, over all positions of `num_windows` windows.

    Attributes:
        mean_kl: over `tokens`; NaN where a model gives no numbers.
        standard_error: of the mean, from the windows' means; NaN of a single window.
        quantiles: share of the tokens -> divergence below which they lie.
        same_token: share of the positions at which both find the same token likeliest.
        window_kl: mean of each window.
        worst: the places with the largest divergence, largest first.
    """

    mean_kl: float
    standard_error: float
    quantiles: dict[str, float]
    same_token: float
    tokens: int
    context_length: int
    num_windows: int
    window_kl: list[float]
    histogram: list[Bin]
    worst: list[WorstToken]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def kl_drift(
    reference,
    candidate,
    input_ids: torch.Tensor,
    *,
    context_length: int,
    num_windows: int,
    worst: int = 10,
    bos_token_id: int | None = None,
    positions_per_chunk: int = POSITIONS_PER_CHUNK,
    on_progress=None,
) -> DriftResult:
    """Reads the same windows of text with both models.

    Args:
        reference, candidate: causal language models of one vocabulary, in evaluation mode.
        input_ids: `[tokens]` of one long text.
        context_length, num_windows, bos_token_id: as in `perplexity`.
        worst: places to be told of.
        positions_per_chunk: positions whose logits exist at the same time.
        on_progress: called as `on_progress(done, total)` with numbers of windows.

    Raises:
        ValueError: the text is too short, vocabularies of other sizes, or a model does not fit `check_output_head`.
    """
    if worst < 0:
        raise ValueError(f"worst={worst} must be 0 or more")
    windows = token_windows(input_ids, context_length=context_length, num_windows=num_windows, bos_token_id=bos_token_id)
    sizes = []
    for model in (reference, candidate):
        check_output_head(model, windows[0])
        sizes.append(model.get_output_embeddings().weight.shape[0])
    if sizes[0] != sizes[1]:
        raise ValueError(f"the reference has a vocabulary of {sizes[0]} tokens and the candidate one of {sizes[1]}")
    divergence, choices = torch.empty(windows.shape), torch.empty(2, *windows.shape, dtype=torch.long)
    for number, window in enumerate(windows):
        states = [hidden_states(model, window[None].to(model.device))[0][0] for model in (reference, candidate)]
        for start in range(0, context_length, positions_per_chunk):
            part = slice(start, start + positions_per_chunk)
            logits = [next_token_logits(m, s[part]).cpu() for m, s in zip((reference, candidate), states, strict=True)]
            ours, theirs = (x.log_softmax(-1) for x in logits)
            divergence[number, part] = (ours.exp() * (ours - theirs)).sum(-1).clamp(min=0)  # NaN stays NaN
            choices[:, number, part] = torch.stack([x.argmax(-1) for x in logits])
        if on_progress is not None:
            on_progress(number + 1, num_windows)
    return _summarise(divergence.double(), choices, worst)


def _summarise(divergence: torch.Tensor, choices: torch.Tensor, worst: int) -> DriftResult:
    """`divergence`: `[windows, tokens]`; `choices`: `[2, windows, tokens]` likeliest tokens."""
    flat, length = divergence.flatten(), divergence.shape[1]
    edges = [10.0**decade for decade in DECADES] + [math.inf]
    below = [int((flat < edge).sum()) for edge in edges]
    order = flat.nan_to_num(math.inf).argsort(descending=True)[:worst].tolist()
    means = divergence.mean(1)
    return DriftResult(
        mean_kl=flat.mean().item(),
        standard_error=means.std().item() / len(means) ** 0.5 if len(means) > 1 else math.nan,
        quantiles={str(q): flat.quantile(q).item() for q in QUANTILES},
        same_token=(choices[0] == choices[1]).double().mean().item(),
        tokens=flat.numel(),
        context_length=length,
        num_windows=len(means),
        window_kl=means.tolist(),
        histogram=[Bin(edge, count - before) for edge, count, before in zip(edges, below, [0, *below], strict=False)],
        worst=[
            WorstToken(place // length, place % length, flat[place].item(), *choices.flatten(1)[:, place].tolist())
            for place in order
        ],
    )
