"""Dynamic batching: a thread that owns the model and lets requests join and leave a running batch.

Between two steps of the batch, waiting requests are read and get rows of their own, in the order of their arrival; a request that
ends or is cancelled frees its rows before the next step. The engine knows tokens only; texts are made of them elsewhere.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..generation.rows import CandidateRows, Wave, prepare
from ..generation.selection import Candidate

logger = logging.getLogger(__name__)

READ_AT_ONCE = 512
"""Once so many prompt tokens have been read, the running rows get a token before the next prompt is read."""


class QueueFullError(RuntimeError):
    """As many requests are waiting as may wait."""


class StoppedError(RuntimeError):
    """The engine takes no requests any more."""


@dataclass(frozen=True)
class Token:
    """One more token of a choice.

    Attributes:
        choice: number of the text among those of its prompt.
        id: of the token.
        log_likelihood: under the model itself (temperature 1, nothing filtered), in nats.
        top: the likeliest tokens and their log-likelihoods, as many as were asked for.
    """

    choice: int
    id: int
    log_likelihood: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class End:
    """A choice is complete: `reason` is `eos`, `length` or `cancelled`."""

    choice: int
    reason: str


@dataclass(frozen=True)
class Failure:
    """The whole job has come to nothing."""

    error: Exception


@dataclass
class Job:
    """A prompt to be continued.

    Attributes:
        ids: of the prompt.
        options: arguments for `generate()`; `max_new_tokens` is needed.
        tell: gets every `Token`, `End` and `Failure`, in the engine's thread; it must not wait.
        choices: texts that grow from the prompt.
        top: likeliest tokens to be told with each.
        seed: of the sampling; None: none.
        inputs: what other modalities give to `generate()` for this prompt, encoders' inputs above all; gone once it is read.
        cancelled: set by `cancel()`.
    """

    ids: list[int]
    options: dict[str, Any]
    tell: Callable[[Token | End | Failure], None]
    choices: int = 1
    top: int = 0
    seed: int | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    cancelled: bool = False
    ended: set[int] = field(default_factory=set)

    @property
    def width(self) -> int:
        """Keys that a row may need."""
        return len(self.ids) + self.options["max_new_tokens"]

    def cancel(self, choice: int | None = None) -> None:
        """Frees the rows of the job, or of one choice, before the next step. From any thread."""
        if choice is None:
            self.cancelled = True
        else:
            self.ended.add(choice)


@dataclass
class JobWave(Wave):
    """The rows of a job, which are told of as they grow."""

    job: Job | None = None

    def __post_init__(self):
        self.all = list(self.candidates)
        self.top: list[list[tuple[int, float]]] = []

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        try:
            tokens = super().choose(logits)
        except Exception as error:  # probabilities that are none, for instance: the other rows go on
            self.tell(Failure(error))
            self.job.cancelled = True
            for candidate in self.candidates:
                candidate.ended = candidate.ended or "cancelled"
            return self.ids.new_zeros(len(logits))
        if self.job.top:
            values, ids = logits.log_softmax(-1).topk(self.job.top)
            pairs = zip(ids.tolist(), values.tolist(), strict=True)
            self.top = [list(zip(*pair, strict=True)) for pair in pairs]
        return tokens

    def take(self, tokens: torch.Tensor, log_likelihoods: list[float]) -> None:
        running = [number for number, candidate in enumerate(self.candidates) if candidate.ended is None]
        grown = {id(self.candidates[number]): number for number in running}
        super().take(tokens, log_likelihoods)
        for choice, candidate in enumerate(self.all):
            if (number := grown.get(id(candidate))) is None:
                continue
            top = self.top[number] if self.job.top else []
            self.tell(Token(choice, candidate.tokens[-1], log_likelihoods[number], top))
            if candidate.ended is not None:
                self.tell(End(choice, candidate.ended))

    def drop_cancelled(self) -> None:
        """Ends what nobody waits for any more, so that the next step does not compute it."""
        for choice, candidate in enumerate(self.all):
            if candidate.ended is None and (self.job.cancelled or choice in self.job.ended):
                candidate.ended = "cancelled"
                self.tell(End(choice, "cancelled"))

    def tell(self, event: Token | End | Failure) -> None:
        tell(self.job, event)


def tell(job: Job, event: Token | End | Failure) -> None:
    """A listener that fails costs its job and nobody else's."""
    try:
        job.tell(event)
    except Exception:
        job.cancelled = True
        logger.debug("nobody listens any more", exc_info=True)


class Engine:
    """Runs jobs on a model, several at a time.

    Args:
        model: a causal language model of this library (other caches do not say where a row's keys are).
        rows: texts that grow at the same time.
        queue: jobs that may wait for rows.
        context: tokens of a prompt and its answer together; default: the model's `max_position_embeddings`.
        cache_tokens: rows times the longest of them, at most; default: no limit. A row takes as much memory as the longest one.

    Attributes:
        steps: forwards of one token per row; `row_steps`: rows in all of them together.
        prompt_tokens, generated_tokens: so far.

    Raises:
        ValueError: limits that allow nothing, or a model of another library.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int = 16,
        queue: int = 64,
        context: int | None = None,
        cache_tokens: int | None = None,
    ):
        self.context = context or model.config.get_text_config().max_position_embeddings
        for name, value in (("rows", rows), ("queue", queue), ("context", self.context), ("cache_tokens", cache_tokens or 1)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.model, self.rows, self.queue, self.cache_tokens = model, rows, queue, cache_tokens
        self.prompt_tokens = self.generated_tokens = self.steps = self.row_steps = 0
        self._busy = CandidateRows(model, joins=True)
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        # A placeholder that is generated would have to have a feature.
        never = {*(model.generation_config.suppress_tokens or ()), *getattr(model.config, "placeholders", {}).values()}
        self._never = {"suppress_tokens": sorted(never)} if never else {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._try_out()

    @torch.no_grad()
    def _try_out(self) -> None:
        """Reads one token: a model that cannot be served says so now."""
        prepared = prepare(self.model, torch.zeros(1, 1, dtype=torch.long, device=self.model.device), {"max_new_tokens": 1})
        CandidateRows(self.model, joins=True).read(Wave(*prepared, [Candidate()]))

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def active_rows(self) -> int:
        return self._busy.count

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> "Engine":
        self._thread.start()
        return self

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after the step in progress; whatever is not complete fails with a `StoppedError`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def check(self, job: Job) -> None:
        """ValueError where a job could never run."""
        if job.choices > self.rows:
            raise ValueError(f"n={job.choices} texts are more than the {self.rows} that grow at the same time here")
        if job.width > self.context:
            raise ValueError(
                f"the prompt has {len(job.ids)} tokens and {job.options['max_new_tokens']} are to be generated, which exceeds the"
                f" {self.context} tokens of the context"
            )
        if self.cache_tokens and job.choices * job.width > self.cache_tokens:
            raise ValueError(
                f"{job.choices} x {job.width} tokens of prompt and answer exceed the {self.cache_tokens} tokens kept at a time"
            )

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of the jobs or none.

        Raises:
            ValueError: see `check`.
            QueueFullError, StoppedError: not now, and not any more.
        """
        for job in jobs:
            self.check(job)
        with self._wake:
            if not self.is_running:
                raise StoppedError("the server is stopping")
            if len(self._waiting) + len(jobs) > self.queue:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting, of at most {self.queue}; try again later")
            self._waiting.extend(jobs)
            self._wake.notify()

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._busy.waves or self._stopping)
                if self._stopping:
                    break
            try:
                self._drop_cancelled()
                for job in self._admissible():
                    self._admit(job)
                if self._busy.waves:
                    self._step()
            except Exception as error:  # one request's bad luck must not end the service
                logger.exception("a step of the batch failed; its requests are lost")
                self._fail(error)
        self._fail(StoppedError("the server has stopped"), waiting=True)

    def _drop_cancelled(self) -> None:
        for wave in self._busy.waves:
            wave.drop_cancelled()
        with self._wake:
            gone = [job for job in self._waiting if job.cancelled]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            for choice in range(job.choices):
                tell(job, End(choice, "cancelled"))

    def _admissible(self):
        """Takes jobs from the queue as long as there is room, one by one."""
        read = 0
        while read < READ_AT_ONCE:
            with self._wake:
                if not self._waiting or not self._has_room(self._waiting[0]):
                    return
                job = self._waiting.popleft()
            yield job
            read += len(job.ids)

    def _has_room(self, job: Job) -> bool:
        running = sum(candidate.ended is None for wave in self._busy.waves for candidate in wave.candidates)
        if running + job.choices > self.rows:
            return False
        widest = max(itertools.chain((job.width,), (wave.job.width for wave in self._busy.waves)))
        return not self.cache_tokens or (running + job.choices) * widest <= self.cache_tokens

    def _admit(self, job: Job) -> None:
        ids = torch.tensor([job.ids], device=self.model.device)
        try:
            inputs = {name: tensor.to(self.model.device) for name, tensor in job.inputs.items()}
            job.inputs.clear()  # not only here: whoever waits for the answer holds them too
            prepared = prepare(self.model, ids, {**job.options, **self._never, **inputs})
            wave = JobWave(*prepared, [Candidate() for _ in range(job.choices)], self._generator(job), job)
            prefill = self._busy.read(wave)
        except Exception as error:
            logger.exception("a prompt of %d tokens could not be read", len(job.ids))
            tell(job, Failure(error))
            return
        self.prompt_tokens += len(job.ids)
        try:
            self._busy.join(wave, prefill)
        except Exception as error:
            tell(job, Failure(error))
            raise

    def _generator(self, job: Job) -> torch.Generator | None:
        return None if job.seed is None else torch.Generator(self.model.device).manual_seed(job.seed)

    def _step(self) -> None:
        before = self._busy.row_steps
        self.generated_tokens += sum(c.ended is None for wave in self._busy.waves for c in wave.candidates)
        self._busy.step()
        self.steps += 1
        self.row_steps += self._busy.row_steps - before

    def _fail(self, error: Exception, waiting: bool = False) -> None:
        """Tells all running jobs (and those that wait), and begins with an empty batch."""
        with self._wake:
            jobs = [wave.job for wave in self._busy.waves] + (list(self._waiting) if waiting else [])
            self._busy = CandidateRows(self.model, joins=True)
            if waiting:
                self._waiting.clear()
        for job in jobs:
            tell(job, Failure(error))
