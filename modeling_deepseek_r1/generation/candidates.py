"""Hierarchical candidates: many short drafts of an answer, of which the best are finished, each from its own cache.

Drafting N answers and keeping the best one costs N answers. Here an evaluator looks at the drafts after a few tokens, and only
the best go on: sequential halving (Karnin et al., 2013, https://proceedings.mlr.press/v28/karnin13.html) of best-of-N. Where
one row of a batch costs almost as much time as eight, as on most hardware, dropping candidates saves time only if other prompts
take their rows; `generate_candidates` does that.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.generation import GenerationMode
from transformers.utils import ModelOutput

from ..tokenization.prompts import encode_prompt
from .rows import CandidateRows, Wave, pad_token, prepare
from .selection import Evaluator, PromptCandidates, PromptSearch


@dataclass
class CandidateOutput(ModelOutput):
    """What came of the candidates.

    Attributes:
        sequences: `[prompts, n]` each prompt with its best candidate, padded on the right; None from `generate_candidates`.
        prompts: a `PromptCandidates` per prompt: every candidate with its text, scores, tokens and end.
        totals: `prompt_tokens` read, `generated_tokens` of all candidates, `steps` (forwards of one token per row),
            `row_steps` (rows in all of them together).
    """

    sequences: torch.LongTensor | None = None
    prompts: list[PromptCandidates] | None = None
    totals: dict[str, int] | None = None


@dataclass
class SearchWave(Wave):
    """Candidates of prompts that are searched for their best ones; `searches`: one per prompt."""

    searches: list[PromptSearch] = field(default_factory=list)

    def advance(self) -> None:
        for search in self.searches:
            if search.record.best is None:
                search.advance()


@dataclass(frozen=True)
class HierarchicalCandidates:
    """How candidates are drafted and chosen; as it is, a `custom_generate` for `model.generate()`.

        best_of = HierarchicalCandidates(8, stages=[(32, 2)])
        model.generate(**inputs, custom_generate=best_of, do_sample=True, max_new_tokens=200)

    returns the best candidate of each prompt `[prompts, n]`; with `return_dict_in_generate=True` a `CandidateOutput` with all of
    them. Sampling, end and length are those of the generation config; logits processors and stopping criteria apply. One prompt
    or a left-padded batch; all candidates of all prompts are drafted at once. One candidate is plain `generate()`, with the same
    random numbers. Works with any causal language model of transformers. transformers hands neither `streamer` nor `tokenizer`
    to a callable `custom_generate`: nothing is streamed.

    Args:
        num_candidates: drafts per prompt.
        stages: `(tokens, keep)` pairs: once the drafts have so many tokens, the best `keep` go on. Finished ones count among
            them and can win in any case. Without stages all are finished; one candidate has none.
        evaluator: `evaluator(prompt, texts)` -> scores (`generation/evaluators.py`); None: the mean log-likelihood per
            token under the model itself, which costs nothing.
        tokenizer: decodes candidates; an evaluator needs it.
        margin: at a stage, only the best goes on if it leads by so much.
        threshold: a finished candidate with such a score ends the search.
        drop_beaten: without an evaluator, drops candidates whose mean log-likelihood cannot reach that of a finished one any
            more; the winner stays the same.

    Raises:
        ValueError: numbers that do not fit together, or an evaluator without a tokenizer.
    """

    num_candidates: int = 8
    stages: Sequence[tuple[int, int]] = ((32, 2),)
    evaluator: Evaluator | None = None
    tokenizer: Any = None
    margin: float | None = None
    threshold: float | None = None
    drop_beaten: bool = False

    def __post_init__(self):
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates={self.num_candidates} must be at least 1")
        if self.num_candidates == 1:
            object.__setattr__(self, "stages", ())
        tokens, kept = 0, self.num_candidates
        for stage in self.stages:
            if len(stage) != 2 or stage[0] <= tokens or not 1 <= stage[1] < kept:
                raise ValueError(
                    f"stages={list(self.stages)}: each must be (tokens, keep) with more tokens than the one before and a smaller"
                    f" number to keep, below num_candidates={self.num_candidates} and at least 1"
                )
            tokens, kept = stage
        if self.evaluator is not None and self.tokenizer is None:
            raise ValueError("an evaluator reads texts: pass the model's tokenizer as well")
        if self.evaluator is not None and self.drop_beaten:
            raise ValueError("drop_beaten needs the model's own likelihood; with an evaluator, set a threshold instead")
        if self.margin is not None and self.margin < 0:
            raise ValueError(f"margin={self.margin} must be 0 or more")

    def __call__(
        self,
        model,
        input_ids,
        logits_processor=None,
        stopping_criteria=None,
        generation_config=None,
        prompt_texts: Sequence[str] | None = None,
        **model_kwargs,
    ) -> torch.LongTensor | CandidateOutput:
        """Called by `generate()`, which also takes `prompt_texts`: what the evaluator gets instead of the decoded prompts.

        Raises:
            ValueError: beams, several return sequences, greedy drafts, no cache or a filled one, embeddings instead of ids,
                stages beyond `max_new_tokens`.
        """
        if prompt_texts is not None and len(prompt_texts) != len(input_ids):
            raise ValueError(f"{len(prompt_texts)} prompt_texts are given for {len(input_ids)} prompts")
        prepared = (input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        wave = self._wave(*prepared, texts=prompt_texts)
        rows = CandidateRows(model)
        rows.add(wave)
        while rows.waves:
            rows.step()
        output = _output([search.record for search in wave.searches], rows)
        output.sequences = _sequences(input_ids, output.prompts, pad_token(generation_config))
        return output if generation_config.return_dict_in_generate else output.sequences

    def _wave(self, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, texts=None) -> SearchWave:
        self._check(generation_config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.sum(1).tolist()
        if texts is None and self.tokenizer is not None:
            real = input_ids if mask is None else [ids[kept.bool()] for ids, kept in zip(input_ids, mask, strict=True)]
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in real]
        texts = [None] * len(input_ids) if texts is None else texts
        new = stopping_criteria.max_length - input_ids.shape[1]
        if self.stages and self.stages[-1][0] >= new:
            raise ValueError(f"stages={list(self.stages)}: all must lie before the last of max_new_tokens={new} tokens")
        searches = [PromptSearch(self, text, int(length), new) for text, length in zip(texts, lengths, strict=True)]
        candidates = [candidate for search in searches for candidate in search.record.candidates]
        prepared = (input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        return SearchWave(*prepared, candidates, searches=searches)

    def _check(self, config, model_kwargs) -> None:
        mode, cache = config.get_generation_mode(), model_kwargs.get("past_key_values")
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"candidates are sampled, not made by {mode.value}; leave num_beams and the like at their defaults"
            )
        if self.num_candidates > 1 and not config.do_sample:
            raise ValueError(f"{self.num_candidates} greedy drafts would all be the same; pass do_sample=True")
        if config.num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences={config.num_return_sequences}: with return_dict_in_generate=True every candidate comes back"
            )
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name):
                raise ValueError(f"{name} is not kept for candidates; leave it out")
        if not model_kwargs.get("use_cache") or cache is None:
            raise ValueError("candidates go on from their caches; leave use_cache=True")
        if cache.get_seq_length():
            raise ValueError(
                f"past_key_values holds {cache.get_seq_length()} tokens already; candidates start from the whole prompt"
            )
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("candidates start from input_ids, not from inputs_embeds")


@torch.no_grad()
def generate_candidates(
    model,
    tokenizer,
    prompts: Iterable[str],
    plan: HierarchicalCandidates,
    *,
    rows: int | None = None,
    system: str | None = None,
    raw: bool = False,
    **options,
) -> CandidateOutput:
    """Candidates for many prompts in a batch of a fixed number of rows, which are filled again as soon as they are free.

    Rows become free when candidates are dropped or finish; the next prompt is drafted as soon as its candidates have room.
    Under a seed the result is always the same; another number of rows draws other random numbers.

    Args:
        model: a causal language model of this library (other caches do not say where a row's keys are).
        tokenizer: the checkpoint's.
        prompts: read one by one.
        plan: candidates, stages, evaluator. Its own tokenizer, where given, is the one that decodes.
        rows: candidates that grow at the same time, at least `plan.num_candidates` (default: twice as many, so that some
            prompts are drafted while others are finished).
        system, raw: as in `encode_prompt`.
        options: arguments of `generate()`: `max_new_tokens`, `do_sample`, `temperature`, `generation_config` ...

    Raises:
        ValueError: too few rows, a text instead of a list of texts, an empty prompt, a model of another library, and whatever `HierarchicalCandidates` refuses.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is a single text; pass a list of texts")
    plan = plan if plan.tokenizer is not None else replace(plan, tokenizer=tokenizer)
    capacity = 2 * plan.num_candidates if rows is None else rows
    if capacity < plan.num_candidates:
        raise ValueError(f"rows={rows} are too few for num_candidates={plan.num_candidates} drafts of a prompt")
    for name in ("streamer", "custom_generate"):
        if options.get(name) is not None:
            raise ValueError(f"{name} means nothing where many candidates grow at the same time; leave it out")
    waiting, busy, records = iter(prompts), CandidateRows(model, joins=True), []
    exhausted = False
    while busy.waves or not exhausted:
        while not exhausted and busy.count + plan.num_candidates <= capacity:
            if (prompt := next(waiting, None)) is None:
                exhausted = True
                break
            ids = encode_prompt(tokenizer, prompt, system=system, raw=raw).to(model.device)
            wave = plan._wave(*prepare(model, ids, options), texts=[prompt])
            records.append(wave.searches[0].record)
            busy.add(wave)
        if busy.waves:
            busy.step()
    return _output(records, busy)


def _output(records: list[PromptCandidates], rows: CandidateRows) -> CandidateOutput:
    totals = {
        "prompt_tokens": sum(record.prompt_tokens for record in records),
        "generated_tokens": sum(record.generated_tokens for record in records),
        "steps": rows.steps,
        "row_steps": rows.row_steps,
    }
    return CandidateOutput(prompts=records, totals=totals)


def _sequences(input_ids: torch.Tensor, records: list[PromptCandidates], pad: int) -> torch.Tensor:
    longest = max(len(record.best.tokens) for record in records)
    rows = [record.best.tokens + [pad] * (longest - len(record.best.tokens)) for record in records]
    return torch.cat((input_ids, input_ids.new_tensor(rows)), 1)
