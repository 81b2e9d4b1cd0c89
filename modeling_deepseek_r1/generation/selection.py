"""Candidates of one prompt: what is known about each, and which of them go on.

Nothing here knows of rows, caches or tensors: `generation/rows.py` tells a `PromptSearch` which tokens its candidates got.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Evaluator = Callable[[str, list[str]], Sequence[float]]
"""`evaluator(prompt, texts)` -> one finite number per text, larger is better. Texts may be unfinished, or empty."""


@dataclass
class Candidate:
    """One draft and what became of it.

    Attributes:
        tokens: the generated ids, the end-of-sequence token included; their number is what the candidate has cost.
        text: the decoded tokens; None without a tokenizer.
        stage_scores: score at each stage in which it took part.
        score: its last score; of a finished candidate that of the whole text, of others that of what there was.
        log_likelihood: of `tokens` under the model itself (temperature 1, nothing filtered), in nats.
        ended: `eos`, `length` or `stopped` (another stopping criterion) of a finished candidate; `dropped` at stage
            `stage` (counted from 0), `decided` (another one was good enough) or `beaten` (it could not win any more) of others;
            None while it is running.
    """

    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    stage_scores: list[float] = field(default_factory=list)
    score: float | None = None
    log_likelihood: float = 0.0
    ended: str | None = None
    stage: int | None = None

    @property
    def is_finished(self) -> bool:
        return self.ended in ("eos", "length", "stopped")

    @property
    def mean_log_likelihood(self) -> float:
        """Per token, in nats."""
        return self.log_likelihood / max(len(self.tokens), 1)

    def finish(self, how: str) -> None:
        """Marks the text as complete; its score is no longer that of the unfinished one."""
        self.ended, self.score, self.text = how, None, None


@dataclass
class PromptCandidates:
    """All candidates of a prompt, in the order in which they were drafted.

    Attributes:
        prompt: its text; None without a tokenizer.
        prompt_tokens: its length.
        candidates: finished ones and others.
        best: the finished candidate with the highest score, the first one among equals.
        decided: `margin` or `threshold` where that ended the search early, else None.
    """

    prompt: str | None
    prompt_tokens: int
    candidates: list[Candidate]
    best: Candidate | None = None
    decided: str | None = None

    @property
    def generated_tokens(self) -> int:
        return sum(len(candidate.tokens) for candidate in self.candidates)


class PromptSearch:
    """The course of one prompt's candidates through the stages of `plan`, a `HierarchicalCandidates`."""

    def __init__(self, plan: Any, prompt: str | None, prompt_tokens: int, max_new_tokens: int):
        self.plan, self.max_new_tokens = plan, max_new_tokens
        self.record = PromptCandidates(prompt, prompt_tokens, [Candidate() for _ in range(plan.num_candidates)])
        self._next_stage = 0

    @property
    def running(self) -> list[Candidate]:
        return [candidate for candidate in self.record.candidates if candidate.ended is None]

    @property
    def finished(self) -> list[Candidate]:
        return [candidate for candidate in self.record.candidates if candidate.is_finished]

    def advance(self) -> None:
        """Once all running candidates have got a token: ends those that are not to go on, and chooses the best at the end.

        Raises:
            ValueError: the evaluator did not return one finite number per text.
        """
        stages, running = self.plan.stages, self.running
        if self._next_stage < len(stages) and running and len(running[0].tokens) >= stages[self._next_stage][0]:
            self._select(stages[self._next_stage][1])
        if self.plan.threshold is not None:
            self._stop_at_threshold()
        if self.plan.drop_beaten:
            self._drop_beaten()
        if not self.running:
            self._score([candidate for candidate in self.finished if candidate.score is None])
            self.record.best = max(self.finished, key=lambda candidate: candidate.score)
            self._decode([candidate for candidate in self.record.candidates if candidate.text is None])

    def _select(self, keep: int) -> None:
        # Finished candidates cost nothing more: they are ranked and take a place, and stay in the final choice in any case.
        finished = self.finished
        self._score(self.running + [candidate for candidate in finished if candidate.score is None])
        ranked = sorted(self.running + finished, key=lambda candidate: -candidate.score)
        for candidate in ranked:
            candidate.stage_scores.append(candidate.score)
        margin = self.plan.margin
        if margin is not None and len(ranked) > 1 and ranked[0].score - ranked[1].score >= margin:
            keep, self.record.decided = 1, "margin"
        for candidate in ranked[keep:]:
            if candidate.ended is None:
                candidate.ended, candidate.stage = "dropped", self._next_stage
        self._next_stage += 1

    def _stop_at_threshold(self) -> None:
        self._score([candidate for candidate in self.finished if candidate.score is None])
        if any(candidate.score >= self.plan.threshold for candidate in self.finished) and self.running:
            self.record.decided = "threshold"
            self._end("decided", self.running)

    def _drop_beaten(self) -> None:
        # No token has a positive log-likelihood, so the mean of a text is at most today's sum over the longest possible length.
        best = max((candidate.mean_log_likelihood for candidate in self.finished), default=-math.inf)
        self._end("beaten", [c for c in self.running if c.log_likelihood / self.max_new_tokens < best])

    def _end(self, how: str, candidates: list[Candidate]) -> None:
        self._score(candidates)
        for candidate in candidates:
            candidate.ended = how

    def _decode(self, candidates: list[Candidate]) -> None:
        if self.plan.tokenizer is not None:
            for candidate in candidates:
                candidate.text = self.plan.tokenizer.decode(candidate.tokens, skip_special_tokens=True)

    def _score(self, candidates: list[Candidate]) -> None:
        if not candidates:
            return
        self._decode(candidates)
        if self.plan.evaluator is None:
            scores = [candidate.mean_log_likelihood for candidate in candidates]
        else:
            scores = [float(score) for score in self.plan.evaluator(self.record.prompt, [c.text for c in candidates])]
        if len(scores) != len(candidates) or not all(map(math.isfinite, scores)):
            raise ValueError(
                f"the evaluator returned {scores} for {len(candidates)} texts; it must return one finite number for each"
            )
        for candidate, score in zip(candidates, scores, strict=True):
            candidate.score = score
