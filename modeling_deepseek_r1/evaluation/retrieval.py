"""Planted facts ("needles"): does a model find one sentence in a long text?

Several facts of one form ("The secret number of the baker is 48213.") are planted in real text, and one of them is asked for
at the end. A model that merely remembers which numbers occurred does not pass: the values of the other planted facts are
among the wrong answers. (Needle tests with distractors: https://arxiv.org/abs/2404.06654.)
"""

import copy
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .scoring import check_output_head, hidden_states, next_token_logits, token_nll
from .text import encode_text, leading_token_id

PROMPTS = ("completion", "chat")
_OWNERS = (
    "baker",
    "blacksmith",
    "carpenter",
    "clockmaker",
    "doctor",
    "farmer",
    "fisherman",
    "gardener",
    "librarian",
    "magician",
    "miller",
    "musician",
    "painter",
    "pilot",
    "poet",
    "sailor",
    "tailor",
    "teacher",
    "watchman",
    "weaver",
)
_FACT = "\nThe secret number of the {owner} is {value}.\n"
_ANSWER_START = "The secret number of the {owner} is"
_CHAT_QUESTION = "\n\nWhat is the secret number of the {owner}?"
_SNAP_TOKENS = 64


@dataclass(frozen=True)
class RetrievalItem:
    """One question. `input_ids` `[1, length]` ends where the answer begins; `candidates[answer]` is right.

    The first `num_planted` facts of `planted` are those in the text, asked one included; other candidates occur nowhere.
    """

    input_ids: torch.Tensor
    candidates: list[str]
    answer: int
    planted: list[str]
    length: int
    depth: float
    seed: int


@dataclass(frozen=True)
class RetrievalCell:
    """Outcomes at one length and depth. `best_candidates[i]` is what item `i` ranked first, `generated[i]` what it wrote."""

    length: int
    depth: float
    seeds: list[int]
    answers: list[str]
    best_candidates: list[str]
    generated: list[str]
    correct: list[bool]
    exact: list[bool]
    accuracy: float
    exact_match: float


@dataclass(frozen=True)
class RetrievalResult:
    """`accuracy`: the true value has the highest likelihood. `exact_match`: it is what greedy decoding writes.

    Intervals are 95 % Wilson intervals. `chance` is the accuracy of guessing among all candidates, `chance_seen` that of a
    model that knows which values occurred but not whose they are.
    """

    accuracy: float
    accuracy_interval: list[float]
    exact_match: float
    exact_match_interval: list[float]
    items: int
    chance: float
    chance_seen: float
    prompt: str
    by_length: list[dict[str, Any]]
    cells: list[RetrievalCell]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> list[float]:
    """Wilson score interval of a proportion (95 % by default); unlike the normal one it is sensible at 0 % and 100 %."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} of trials={trials} is no proportion")
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return [max(0.0, centre - half), min(1.0, centre + half)]


class Haystack:
    """A long text as token ids `[tokens]`, with the places where a line begins, so that facts do not cut words in two."""

    def __init__(self, tokenizer, text: str):
        self.ids = encode_text(tokenizer, text)
        distinct = self.ids.unique().tolist()
        breaks = torch.tensor([i for i in distinct if "\n" in tokenizer.decode([i])], dtype=torch.long)
        self.after_break = torch.isin(self.ids, breaks).roll(1)

    def window(self, length: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """`length` tokens from a random place: ids, and the offsets at which a line begins."""
        if length > self.ids.numel():
            raise ValueError(f"the text has {self.ids.numel()} tokens, {length} are needed to hide the facts in")
        start = rng.randrange(self.ids.numel() - length + 1)
        part = slice(start, start + length)
        return self.ids[part].tolist(), self.after_break[part].nonzero().flatten().tolist()


def build_item(
    tokenizer,
    haystack: Haystack,
    *,
    length: int,
    depth: float,
    seed: int,
    num_planted: int = 5,
    num_candidates: int = 10,
    prompt: str = "completion",
) -> RetrievalItem:
    """One question over exactly `length` tokens of prompt.

    Args:
        length: tokens of the prompt: text, facts and question.
        depth: where the asked fact lies, 0 at the start and 1 right before the question; the others lie at random places.
        seed: the same arguments and seed give the same item.
        num_planted: facts in the text, the asked one included.
        num_candidates: values that are ranked: the planted ones and others that do not occur.
        prompt: `"completion"` repeats the beginning of the fact sentence; `"chat"` asks through the tokenizer's chat template.

    Raises:
        ValueError: arguments outside of their range, a text or a `length` that is too short.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must lie between 0 (start of the text) and 1 (its end)")
    if not 1 <= num_planted <= num_candidates or num_planted > len(_OWNERS) or num_candidates < 2:
        raise ValueError(
            f"num_planted={num_planted} must lie between 1 and num_candidates={num_candidates} (2 or more), at most {len(_OWNERS)}"
        )
    # A string seeds through SHA-512: the same on every machine, and unrelated for neighbouring seeds.
    rng = random.Random(f"{seed}/{length}/{depth}")
    owners = rng.sample(_OWNERS, num_planted)
    values = [str(value) for value in rng.sample(range(10000, 100000), num_candidates)]
    facts = [_encode(tokenizer, _FACT.format(owner=o, value=v)) for o, v in zip(owners, values[:num_planted], strict=True)]
    before, after = _frame(tokenizer, owners[0], prompt)
    filler_length = length - len(before) - len(after) - sum(map(len, facts))
    if filler_length < 1:
        raise ValueError(
            f"length={length} tokens is too short for {num_planted} facts and the question, add {1 - filler_length}"
        )
    filler, line_starts = haystack.window(filler_length, rng)
    depths = [depth] + [rng.random() for _ in facts[1:]]
    body = _plant(filler, line_starts, facts, depths)
    candidates = rng.sample(values, num_candidates)
    return RetrievalItem(
        input_ids=torch.tensor([before + body + after]),
        candidates=candidates,
        answer=candidates.index(values[0]),
        planted=values[:num_planted],
        length=length,
        depth=depth,
        seed=seed,
    )


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _frame(tokenizer, owner: str, prompt: str) -> tuple[list[int], list[int]]:
    """Token ids before and after the text with the facts."""
    answer_start = _ANSWER_START.format(owner=owner)
    if prompt == "completion":
        bos = leading_token_id(tokenizer)
        return ([] if bos is None else [bos]), _encode(tokenizer, "\n" + answer_start)
    if prompt != "chat":
        raise ValueError(f"prompt={prompt!r} is unknown, choose one of {', '.join(PROMPTS)}")
    if tokenizer.chat_template is None:
        raise ValueError('prompt="chat" needs a tokenizer with a chat template; use prompt="completion"')
    mark = "<<<TEXT>>>"
    message = {"role": "user", "content": mark + _CHAT_QUESTION.format(owner=owner)}
    rendered = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    before, after = rendered.split(mark)
    return _encode(tokenizer, before), _encode(tokenizer, after + answer_start)


def _plant(filler: list[int], line_starts: list[int], facts: list[list[int]], depths: list[float]) -> list[int]:
    """Inserts each fact at its depth, or at a line start at most `_SNAP_TOKENS` before."""
    places = []
    for order, depth in enumerate(depths):
        wanted = round(depth * len(filler))
        near = [start for start in line_starts if wanted - _SNAP_TOKENS <= start <= wanted]
        places.append((near[-1] if near and wanted < len(filler) else wanted, order))
    body, done = [], 0
    for place, order in sorted(places):
        body += filler[done:place] + facts[order]
        done = place
    return body + filler[done:]


@torch.no_grad()
def score_item(model, tokenizer, item: RetrievalItem, *, candidate_batch_size: int = 5) -> tuple[list[float], str]:
    """Log-likelihood (nats) of every candidate, and the text that greedy decoding writes; one prefill for all of them.

    Args:
        candidate_batch_size: candidates that share a forward; each needs its own copy of the cache.
    """
    hidden, cache = hidden_states(model, item.input_ids.to(model.device), use_cache=True)
    last_hidden = hidden[:, -1:]
    answers = [_encode(tokenizer, " " + value) for value in item.candidates]
    scores = []
    for start in range(0, len(answers), candidate_batch_size):
        scores += _candidate_scores(model, last_hidden, copy.deepcopy(cache), answers[start : start + candidate_batch_size])
    # One token more than the longest value, to see whether the number ends there.
    written = _greedy(model, last_hidden, cache, max_new_tokens=max(map(len, answers)) + 1)
    return scores, tokenizer.decode(written, skip_special_tokens=True)


def _candidate_scores(model, last_hidden: torch.Tensor, cache, answers: Sequence[Sequence[int]]) -> list[float]:
    """`last_hidden` `[1, 1, hidden_size]`: state of the last prompt token. Uses `cache` up."""
    longest = max(map(len, answers))
    # Padding on the right needs no mask in a causal model: no scored token sees it.
    targets = torch.tensor([list(ids) + [0] * (longest - len(ids)) for ids in answers], device=last_hidden.device)
    hidden = last_hidden.expand(len(answers), -1, -1)
    if longest > 1:
        cache.batch_repeat_interleave(len(answers))
        continued, _ = hidden_states(model, targets[:, :-1], past_key_values=cache, use_cache=True)
        hidden = torch.cat([hidden, continued], dim=1)
    losses = token_nll(model, hidden, targets)
    return [-row[: len(ids)].sum().item() for row, ids in zip(losses, answers, strict=True)]


def _greedy(model, hidden: torch.Tensor, cache, max_new_tokens: int) -> list[int]:
    """Continues from `hidden` `[1, 1, hidden_size]`; uses `cache` up."""
    tokens = []
    for _ in range(max_new_tokens):
        token = next_token_logits(model, hidden[:, -1]).argmax(-1, keepdim=True)
        tokens.append(token.item())
        if len(tokens) < max_new_tokens:
            hidden, cache = hidden_states(model, token, past_key_values=cache, use_cache=True)
    return tokens


def is_exact_match(generated: str, value: str) -> bool:
    """The answer begins with exactly this number (`"48213."` yes, `"482137"` no)."""
    return re.match(rf"\s*{re.escape(value)}(?!\d)", generated) is not None


def retrieval(
    model,
    tokenizer,
    text: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    seeds: Iterable[int] = range(4),
    prompt: str = "completion",
    num_planted: int = 5,
    num_candidates: int = 10,
    candidate_batch_size: int = 5,
    on_progress=None,
) -> RetrievalResult:
    """Asks for planted facts over a grid of lengths, depths and seeds.

    Args:
        model: any transformers causal language model, in evaluation mode; `tokenizer`: its tokenizer.
        text: real text to hide the facts in, at least as long as the longest of `lengths`.
        lengths: tokens of the prompt. `depths`, `prompt`, `num_planted`, `num_candidates`: see `build_item`.
        seeds: one item per length, depth and seed.
        candidate_batch_size: see `score_item`.
        on_progress: called as `on_progress(done, total)` with numbers of items.

    Raises:
        ValueError: an empty grid, or what `build_item` refuses.
    """
    seeds = list(seeds)
    if not (lengths and depths and seeds):
        raise ValueError(f"lengths={list(lengths)}, depths={list(depths)} and seeds={seeds} must not be empty")
    haystack = Haystack(tokenizer, text)
    check_output_head(model, haystack.ids)
    cells, done = [], 0
    settings = {"num_planted": num_planted, "num_candidates": num_candidates, "prompt": prompt}
    for length in lengths:
        for depth in depths:
            outcomes = []
            for seed in seeds:
                item = build_item(tokenizer, haystack, length=length, depth=depth, seed=seed, **settings)
                outcomes.append((item, *score_item(model, tokenizer, item, candidate_batch_size=candidate_batch_size)))
                done += 1
                if on_progress is not None:
                    on_progress(done, len(lengths) * len(depths) * len(seeds))
            cells.append(_cell(length, depth, outcomes))
    return _result(cells, settings)


def _cell(length: int, depth: float, outcomes: list[tuple[RetrievalItem, list[float], str]]) -> RetrievalCell:
    answers = [item.candidates[item.answer] for item, _, _ in outcomes]
    best = [item.candidates[max(range(len(scores)), key=scores.__getitem__)] for item, scores, _ in outcomes]
    generated = [text for _, _, text in outcomes]
    correct = [chosen == answer for chosen, answer in zip(best, answers, strict=True)]
    exact = [is_exact_match(text, answer) for text, answer in zip(generated, answers, strict=True)]
    return RetrievalCell(
        length=length,
        depth=depth,
        seeds=[item.seed for item, _, _ in outcomes],
        answers=answers,
        best_candidates=best,
        generated=generated,
        correct=correct,
        exact=exact,
        accuracy=sum(correct) / len(correct),
        exact_match=sum(exact) / len(exact),
    )


def _shares(cells: list[RetrievalCell]) -> dict[str, Any]:
    correct = [flag for cell in cells for flag in cell.correct]
    exact = [flag for cell in cells for flag in cell.exact]
    return {
        "accuracy": sum(correct) / len(correct),
        "accuracy_interval": wilson_interval(sum(correct), len(correct)),
        "exact_match": sum(exact) / len(exact),
        "exact_match_interval": wilson_interval(sum(exact), len(exact)),
        "items": len(correct),
    }


def _result(cells: list[RetrievalCell], settings: dict[str, Any]) -> RetrievalResult:
    lengths = dict.fromkeys(cell.length for cell in cells)
    return RetrievalResult(
        **_shares(cells),
        chance=1 / settings["num_candidates"],
        chance_seen=1 / settings["num_planted"],
        prompt=settings["prompt"],
        by_length=[{"length": n, **_shares([cell for cell in cells if cell.length == n])} for n in lengths],
        cells=cells,
    )
