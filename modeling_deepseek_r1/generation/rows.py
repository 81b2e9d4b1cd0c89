"""Rows of a batch in which texts grow side by side, leave, and make room for those of other prompts.

All rows share one cache. Where no row joins later, a row that has finished stays until others are dropped, as in plain
`generate()`. Rows of different prompts are joined by their keys' positions: in this library's cache layers a key's slot decides
nothing, so shorter rows get empty slots (position -1) in front. For that, a prompt whose rows are to be joined is read with one
padding token before it, which makes the layers write positions down. What bridges read of other modalities has rows likewise.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from ..attention.cache import PatternLayer
from ..multimodal.alignment import BridgeMemory, join_memories
from .selection import Candidate


@dataclass
class Wave:
    """Prompts that one `generate()` has prepared, and what grows from them, all of the same length.

    Attributes:
        ids: `[rows, n]` prompts (left-padded) and what was generated.
        logits_processor, stopping_criteria, config: as transformers prepared them.
        model_kwargs: for the prefill.
        candidates: of each row, equally many for every prompt.
        generator: of the sampling; None: torch's own.
    """

    ids: torch.Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]
    candidates: list[Candidate]
    generator: torch.Generator | None = None

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of every row, `[rows]`, by its logits `[rows, V]`."""
        scores = self.logits_processor(self.ids, logits)
        if not self.config.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), num_samples=1, generator=self.generator).squeeze(1)

    def take(self, tokens: torch.Tensor, log_likelihoods: list[float]) -> None:
        """Adds a token `[rows]` to every row."""
        self.ids = torch.cat((self.ids, tokens[:, None]), 1)
        stopped = self.stopping_criteria(self.ids, None).tolist()
        ends = self.config.eos_token_id
        ends = ends if isinstance(ends, list | tuple) else [ends]
        for candidate, token, gain, stop in zip(self.candidates, tokens.tolist(), log_likelihoods, stopped, strict=True):
            if candidate.ended is not None:
                continue
            candidate.tokens.append(token)
            candidate.log_likelihood += gain
            if stop:
                full = self.ids.shape[1] >= (self.stopping_criteria.max_length or float("inf"))
                candidate.finish("eos" if token in ends else "length" if full else "stopped")
        self.advance()

    def advance(self) -> None:
        """Called when every row has got a token."""


class Prefill(NamedTuple):
    """What reading the prompts of a wave has left, one row per candidate."""

    cache: Cache
    logits: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    memory: BridgeMemory | None


class CandidateRows:
    """The rows of one or more waves and the model that continues them.

    Args:
        model: a causal language model of transformers; this library's, if rows are to be joined.
        joins: rows leave as soon as they have finished, and others may join them.

    Attributes:
        steps: forwards of one token per row so far; `row_steps`: rows in all of them together.
    """

    def __init__(self, model: Any, joins: bool = False):
        self.model, self.joins = model, joins
        self.waves: list[Wave] = []
        self.cache: Cache | None = None
        self.logits = self.positions = self.mask = self.memory = None
        self.steps = self.row_steps = 0

    @property
    def count(self) -> int:
        return sum(len(wave.candidates) for wave in self.waves)

    def add(self, wave: Wave) -> None:
        """Reads the prompts `[prompts, n]` of a wave and repeats each for its candidates.

        Raises:
            ValueError: rows are to be joined and the model's cache has layers of another library.
        """
        self.join(wave, self.read(wave))

    def read(self, wave: Wave) -> Prefill:
        """The first half of `add`, which leaves the rows alone; errors as there."""
        ids, kwargs, prompts = wave.ids, dict(wave.model_kwargs), len(wave.ids)
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if positions is None:
            positions = (torch.ones_like(ids) if mask is None else mask).cumsum(-1).sub(1).clamp(min=0)
        positions = positions.expand(prompts, -1)
        if self.joins:
            mask = F.pad(torch.ones_like(ids) if mask is None else mask, (1, 0), value=0)
            ids, kwargs["attention_mask"], kwargs["position_ids"] = F.pad(ids, (1, 0)), mask, F.pad(positions, (1, 0))
            if (types := kwargs.get("mm_token_type_ids")) is not None:
                kwargs["mm_token_type_ids"] = F.pad(types, (1, 0))
        if (memory := kwargs.get("bridge_memory")) is not None and self.joins:
            kwargs["bridge_memory"] = memory = replace(memory, seen=F.pad(memory.seen, (1, 0)))
        outputs = self.model._prefill(ids, wave.config, kwargs)
        cache, repeats = outputs.past_key_values, len(wave.candidates) // prompts
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        if self.joins:
            check_joinable(cache)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32).repeat_interleave(repeats, 0)
        mask = mask.repeat_interleave(repeats, 0) if mask is not None and not self.joins else None
        memory = memory.after_prompt().repeat(repeats) if memory is not None else None
        return Prefill(cache, logits, positions[:, -1:].repeat_interleave(repeats, 0), mask, memory)

    def join(self, wave: Wave, prefill: Prefill) -> None:
        """The second half of `add`."""
        logits, positions = prefill.logits, prefill.positions
        wave.ids = wave.ids.repeat_interleave(len(wave.candidates) // len(wave.ids), 0)
        if self.waves:
            join_caches(self.cache, prefill.cache)
            self.memory = join_memories(self.memory, len(self.logits), prefill.memory, len(logits))
            logits, positions = torch.cat((self.logits, logits)), torch.cat((self.positions, positions))
        else:
            self.cache, self.mask, self.memory = prefill.cache, prefill.mask, prefill.memory
        self.logits, self.positions = logits, positions
        self.waves.append(wave)

    def step(self) -> None:
        """One token for every row; rows whose candidates are not to go on leave; the model reads the others' tokens."""
        log_likelihoods = self.logits.log_softmax(-1)
        parts = self.logits.split([len(wave.candidates) for wave in self.waves])
        tokens = torch.cat([wave.choose(part) for wave, part in zip(self.waves, parts, strict=True)])
        running = torch.tensor([c.ended is None for wave in self.waves for c in wave.candidates], device=tokens.device)
        tokens = torch.where(running, tokens, pad_token(self.waves[0].config))
        gains = log_likelihoods.gather(1, tokens[:, None])[:, 0].tolist()
        start = 0
        for wave in self.waves:
            stop = start + len(wave.candidates)
            wave.take(tokens[start:stop], gains[start:stop])
            start = stop
        self._release()
        if self.waves:
            self._forward()

    def _release(self) -> None:
        """Frees rows: of complete prompts all, and of others too as soon as one of them is dropped or others could join."""
        candidates = [candidate for wave in self.waves for candidate in wave.candidates]
        complete = not any(candidate.ended is None for candidate in candidates)
        if not complete and not self.joins and not any(c.ended is not None and not c.is_finished for c in candidates):
            return
        kept = [row for row, candidate in enumerate(candidates) if candidate.ended is None]
        if len(kept) == len(candidates):
            return
        for wave in self.waves:
            rows = [row for row, candidate in enumerate(wave.candidates) if candidate.ended is None]
            wave.ids, wave.candidates = wave.ids[rows], [wave.candidates[row] for row in rows]
        self.waves = [wave for wave in self.waves if wave.candidates]
        if not kept:
            self.cache = self.mask = self.memory = None
            return
        index = torch.tensor(kept, device=self.positions.device)
        self.cache.batch_select_indices(index)
        self.positions = self.positions[index]
        self.mask = self.mask[index] if self.mask is not None else None
        self.memory = self.memory.select(index).after_prompt() if self.memory is not None else None
        if self.joins:
            trim_cache(self.cache)

    def _forward(self) -> None:
        tokens = torch.cat([wave.ids[:, -1:] for wave in self.waves])
        self.positions = self.positions + 1
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=1)
        features = {} if self.memory is None else {"bridge_memory": self.memory}
        outputs = self.model(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **features,
        )
        self.cache = outputs.past_key_values
        self.logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        self.steps += 1
        self.row_steps += len(tokens)


def prepare(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> tuple:
    """What `generate(ids, **options)` makes of its arguments before it generates: the first five fields of a `Wave`. Inputs of
    other modalities are encoded by it."""

    def hand_over(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **model_kwargs):
        return input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs

    return model.generate(ids, attention_mask=torch.ones_like(ids), **options, custom_generate=hand_over)


def pad_token(config: GenerationConfig) -> int:
    """What rows that have finished are filled with."""
    token = config._pad_token_tensor
    return 0 if token is None else int(token)


def check_joinable(cache: Cache) -> None:
    """ValueError where a layer does not say at which positions its keys are."""
    for layer in cache.layers:
        if not isinstance(layer, PatternLayer) or layer.positions is None:
            raise ValueError(
                f"the model's cache has a {type(layer).__name__}, in which rows of different prompts cannot be joined; convert the"
                " checkpoint with convert_checkpoint, or pass HierarchicalCandidates to generate() as custom_generate"
            )


def join_caches(cache: Cache, other: Cache) -> None:
    """Appends the rows of `other` to those of `cache`. Both hold `PatternLayer`s that know their keys' positions."""
    for layer, added in zip(cache.layers, other.layers, strict=True):
        width = max(layer.keys.shape[2], added.keys.shape[2])
        for name in ("keys", "values", "clusters"):
            if getattr(layer, name, None) is not None:
                parts = [F.pad(x, (0, 0, width - x.shape[2], 0)) for x in (getattr(layer, name), getattr(added, name))]
                setattr(layer, name, torch.cat(parts))
        parts = [F.pad(x, (width - x.shape[1], 0), value=-1) for x in (layer.positions, added.positions)]
        layer.positions = torch.cat(parts)
        layer.next_positions = torch.cat((layer.next_positions, added.next_positions))
        layer.seen = max(layer.seen, added.seen)


def trim_cache(cache: Cache) -> None:
    """Drops the slots in front that are empty in all rows, so that the cache is as long as its longest row."""
    for layer in cache.layers:
        used = (layer.positions >= 0).any(0)
        first = int(used.long().argmax())
        if first:
            for name in ("keys", "values", "clusters"):
                if getattr(layer, name, None) is not None:
                    setattr(layer, name, getattr(layer, name)[:, :, first:])
            layer.positions = layer.positions[:, first:]
        layer.seen = int(layer.next_positions.max())
