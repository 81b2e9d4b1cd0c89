"""Tokenised documents: all in memory, or one after the other as they are needed."""

import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .encode import Example
from .read import Record


class Documents(Dataset):
    """Documents in memory, four bytes a token (eight with labels of their own).

    Args:
        examples: `input_ids` and, in all of them or in none, `labels` of the same length.

    Raises:
        ValueError: labels that do not fit.
    """

    def __init__(self, examples: Iterable[Example]):
        self.columns: dict[str, array] = {"input_ids": array("i")}
        self.ends = array("q", [0])
        for example in examples:
            if len(self) == 0 and "labels" in example:
                self.columns["labels"] = array("i")
            length = len(example["input_ids"])
            if set(example) != set(self.columns) or any(len(example[name]) != length for name in self.columns):
                raise ValueError(
                    f"document {len(self)} has { ({name: len(values) for name, values in example.items()}) } entries; all"
                    f" documents need {' and '.join(self.columns)}, of one length"
                )
            for name, column in self.columns.items():
                column.extend(example[name])
            self.ends.append(self.ends[-1] + length)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        """`input_ids` and `labels` of one document."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        start, stop = self.ends[number], self.ends[number + 1]
        document = {name: column[start:stop].tolist() for name, column in self.columns.items()}
        return {"labels": list(document["input_ids"]), **document}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [stop - start for start, stop in zip(self.ends[:-1], self.ends[1:], strict=True)]

    @property
    def num_tokens(self) -> int:
        return self.ends[-1]

    def split(self, share: float, seed: int) -> tuple["Documents", "Documents"]:
        """The documents without, and those of a random share of them; at least one on either side.

        Raises:
            ValueError: a share outside of (0, 1), or fewer than two documents.
        """
        if not 0 < share < 1 or len(self) < 2:
            raise ValueError(
                f"a share of {share} of {len(self)} documents cannot be set aside; give a separate file to evaluate on"
            )
        aside = set(random.Random(seed).sample(range(len(self)), min(len(self) - 1, max(1, round(share * len(self))))))
        kept = [number for number in range(len(self)) if number not in aside]
        return self._subset(kept), self._subset(sorted(aside))

    def _subset(self, numbers: list[int]) -> "Documents":
        return Documents({name: self[number][name] for name in self.columns} for number in numbers)


class DocumentStream(IterableDataset):
    """Documents read and tokenised while training.

    What comes is settled by the arguments alone, so a resumed Trainer finds its place by going over what it has seen. In a loop
    of your own, `state_dict` and `load_state_dict` do so without tokenising anything twice. Several workers share the records.

    Args:
        records: may be gone through again, in the same order; `(fields, where)` each.
        encode: record -> examples (`encode.py`).
        shuffle_buffer: records among which the next one is chosen at random; 0 keeps the order.
        seed: of that choice, which differs in each pass.
        repeat: begin again when the records are used up, without end.
    """

    def __init__(
        self,
        records: Iterable[Record],
        encode: Callable[[Record], list[Example]],
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        repeat: bool = False,
    ):
        self.records, self.encode = records, encode
        self.shuffle_buffer, self.seed, self.repeat = shuffle_buffer, seed, repeat
        self._start = self._state = {"passes": 0, "records": 0, "given": 0}

    def state_dict(self) -> dict[str, Any]:
        """The place after the document that was given last."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration begins at that place."""
        self._start = self._state = dict(state)

    def __iter__(self) -> Iterator[Example]:
        start, self._start = self._start, {"passes": 0, "records": 0, "given": 0}
        self._state = start
        return self._documents(**start)

    def _documents(self, passes: int, records: int, given: int) -> Iterator[Example]:
        seen = records
        while True:
            found = seen > 0 or given > 0
            for number, record in enumerate(self._in_order(passes)):
                if number < seen:
                    continue
                for place, example in enumerate(self.encode(record)[given:], start=given + 1):
                    found = True
                    self._state = {"passes": passes, "records": number, "given": place}
                    yield {"labels": list(example["input_ids"]), **example}
                given = 0
            if not found:
                raise ValueError("the stream, or a worker's share of it, holds no document that could be learned")
            passes, seen = passes + 1, 0
            self._state = {"passes": passes, "records": 0, "given": 0}
            if not self.repeat:
                return

    def _in_order(self, passes: int) -> Iterator[Record]:
        worker = get_worker_info()
        mine = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        choice = random.Random(f"{self.seed} {passes}")
        buffer: list[Record] = []
        for number, record in enumerate(self.records):
            if number % mine[1] != mine[0]:
                continue
            buffer.append(record)
            if len(buffer) > self.shuffle_buffer:
                yield buffer.pop(choice.randrange(len(buffer)))
        choice.shuffle(buffer)
        yield from buffer


def learned_tokens(rows: Iterable[dict[str, Any]]) -> int:
    """Tokens that are predicted, in rows of `input_ids` and `labels`: the first one has nothing before it."""
    return sum(int((torch.as_tensor(row["labels"])[1:] != -100).sum()) for row in rows)
