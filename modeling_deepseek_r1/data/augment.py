"""Augmentation of training data: numbers that vary a little, other words in the same place, windows over series, noise in the
embeddings where it hurts most. All of it is for training data; what is evaluated on stays as it is."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch.utils.data import Dataset

from .read import Record


class Augmented(Dataset):
    """A dataset whose records are changed when they are read, in another way in every epoch, and always the same under a seed.

    Args:
        dataset: with a length.
        change: makes a record of a record and a random generator.
        seed: of the changes.
    """

    def __init__(self, dataset: Sequence, change: Callable[[Any, random.Random], Any], seed: int = 0):
        self.dataset, self.change, self.seed, self.epoch = dataset, change, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by data loaders that know the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        return self.change(self.dataset[number], random.Random(f"{self.seed}-{self.epoch}-{number}"))


def jitter_numbers(row: Mapping[str, Any], generator: random.Random, share: float = 0.05) -> dict[str, Any]:
    """A row of a table with every number multiplied by something between `1 - share` and `1 + share`; the rest stays."""
    return {
        name: value * generator.uniform(1 - share, 1 + share)
        if isinstance(value, Real) and not isinstance(value, bool)
        else value
        for name, value in row.items()
    }


def jitter_rows(record: Record, generator: random.Random, share: float = 0.05) -> Record:
    """A conversation with `jitter_numbers` of its table rows, those of the column `rows` and those in blocks."""

    def message(given: Any) -> Any:
        if not isinstance(given, Mapping) or not isinstance(given.get("content"), list):
            return given
        return {**given, "content": [block(one) for one in given["content"]]}

    def block(given: Mapping[str, Any]) -> Mapping[str, Any]:
        row = given.get("row")
        return {**given, "row": jitter_numbers(row, generator, share)} if isinstance(row, Mapping) else given

    fields = dict(record.fields)
    if fields.get("rows"):
        fields["rows"] = [jitter_numbers(row, generator, share) for row in fields["rows"]]
    for column in ("messages", "prompt", "completion"):
        if isinstance(fields.get(column), list):
            fields[column] = [message(one) for one in fields[column]]
    return record._replace(fields=fields)


class WordReplacement:
    """Other words in the place of some, as a masked language model would fill them in (https://arxiv.org/abs/1812.06705).

    Args:
        model, tokenizer: of a masked language model.
        share: of the tokens that are masked.
        top_k: each is drawn from the so many likeliest.
    """

    def __init__(self, model, tokenizer, share: float = 0.15, top_k: int = 10):
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token; words are replaced by a masked language model")
        self.model, self.tokenizer, self.share, self.top_k = model, tokenizer, share, top_k

    @torch.no_grad()
    def __call__(self, text: str, generator: random.Random) -> str:
        """The text with other words; the same one if nothing in it can be masked."""
        ids = self.tokenizer(text, return_tensors="pt", truncation=True)["input_ids"].to(self.model.device)
        special = set(self.tokenizer.all_special_ids)
        places = [place for place, token in enumerate(ids[0].tolist()) if token not in special]
        chosen = [place for place in places if generator.random() < self.share]
        if not chosen:
            return text
        original = ids[0, chosen].clone()
        ids[0, chosen] = self.tokenizer.mask_token_id
        scores = self.model(input_ids=ids).logits[0, chosen]
        scores[:, sorted(special)] = -torch.inf
        # A word that stays would be no other word.
        scores[torch.arange(len(chosen)), original] = -torch.inf
        best = scores.topk(min(self.top_k, scores.shape[-1]), -1)
        weights = best.values.float().softmax(-1).tolist()
        for place, candidates, own in zip(chosen, best.indices.tolist(), weights, strict=True):
            ids[0, place] = generator.choices(candidates, own)[0]
        return self.tokenizer.decode(ids[0], skip_special_tokens=True)


def series_windows(series: Sequence, length: int, step: int) -> Iterator[Sequence]:
    """Windows over a time series, `step` apart; what does not fill one at the end is left out.

    Raises:
        ValueError: a length or step below 1.
    """
    if length < 1 or step < 1:
        raise ValueError(f"length={length} and step={step} must be at least 1")
    return (series[start : start + length] for start in range(0, len(series) - length + 1, step))


def adversarial_loss(model, loss: Callable[[], torch.Tensor], epsilon: float) -> torch.Tensor:
    """The loss at embeddings moved by `epsilon` in the direction that raises it most (https://arxiv.org/abs/1605.07725).

    It takes two forward and backward passes. `DeepseekR1Trainer` adds it to the loss with `adversarial_noise`.

    Args:
        model: whose token embeddings are moved.
        loss: computes the loss with the model; called twice.
        epsilon: length of the change of each row, relative to that of the row's embeddings.
    """
    seen: list[torch.Tensor] = []
    with _embeddings(model, lambda embeddings: seen.append(embeddings.detach().requires_grad_()) or seen[0]):
        (gradient,) = torch.autograd.grad(loss(), seen[0])
    length = (
        seen[0].flatten(1).norm(dim=1) * epsilon / gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    )
    noise = (gradient * length[:, None, None]).detach()
    with _embeddings(model, lambda embeddings: embeddings + noise):
        return loss()


@contextmanager
def _embeddings(model, change: Callable[[torch.Tensor], torch.Tensor]):
    """Within it, `change` is applied to the token embeddings."""
    hook = model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: change(output))
    try:
        yield
    finally:
        hook.remove()
