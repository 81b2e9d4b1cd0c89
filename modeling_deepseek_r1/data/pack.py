"""Packing: documents of any length become rows of one length, without padding in between and without seeing each other.

A document longer than a row is cut into pieces, each of which stands alone; no token is lost. `"best_fit"` puts every piece
into the fullest row that still has room for it, the longest first (https://arxiv.org/abs/2404.10830): few documents are cut.
`"concatenate"` fills row after row in the order of the documents: all rows but the last one are full.

A row has `input_ids`, `labels` and `position_ids`, which restart at 0 where a piece begins; `PackedCollator` makes the sequence
numbers (`seq_idx`) of them by which the model keeps the pieces apart.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from .documents import Documents
from .encode import IGNORED

STRATEGIES = ("best_fit", "concatenate")

Piece = tuple[int, int, int]
"""Number of the document, first token, token after the last."""


def pack_pieces(lengths: Iterable[int], row_length: int, strategy: str = "best_fit") -> list[list[Piece]]:
    """The pieces of every row.

    Args:
        lengths: tokens of each document.
        row_length: tokens of a row at most.
        strategy: one of `STRATEGIES`.

    Raises:
        ValueError: an unknown strategy, or rows of fewer than two tokens.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"packing {strategy!r} is unknown, choose one of {', '.join(STRATEGIES)}")
    if row_length < 2:
        raise ValueError(f"rows of {row_length} tokens have nothing to predict; give at least 2")
    if strategy == "concatenate":
        return _concatenate(lengths, row_length)
    pieces = [
        (number, start, min(start + row_length, length))
        for number, length in enumerate(lengths)
        for start in range(0, length, row_length)
    ]
    return _best_fit(pieces, row_length)


def _concatenate(lengths: Iterable[int], row_length: int) -> list[list[Piece]]:
    rows, room = [], 0
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            if not room:
                rows.append([])
                room = row_length
            stop = min(length, start + room)
            rows[-1].append((number, start, stop))
            room -= stop - start
            start = stop
    return rows


def _best_fit(pieces: list[Piece], row_length: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    rows_with: dict[int, list[int]] = {}  # free tokens -> numbers of the rows that have so many
    free_sizes: list[int] = []  # the keys, sorted
    for piece in sorted(pieces, key=lambda piece: piece[1] - piece[2]):
        size = piece[2] - piece[1]
        place = bisect_left(free_sizes, size)
        if place == len(free_sizes):
            free, row = row_length, len(rows)
            rows.append([])
        else:
            free = free_sizes[place]
            row = rows_with[free].pop()
            if not rows_with[free]:
                del rows_with[free], free_sizes[place]
        rows[row].append(piece)
        if free > size:
            if free - size not in rows_with:
                insort(free_sizes, free - size)
            rows_with.setdefault(free - size, []).append(row)
    return rows


def make_row(documents: Any, pieces: list[Piece]) -> dict[str, list[int]]:
    """One row: `input_ids`, `labels`, `position_ids`, of equal length.

    Args:
        documents: number -> `input_ids` and `labels` of a document.
        pieces: what the row is made of.
    """
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for number, start, stop in pieces:
        document = documents[number]
        row["input_ids"] += document["input_ids"][start:stop]
        # The token before it belongs to another document.
        row["labels"] += [IGNORED, *document["labels"][start + 1 : stop]]
        row["position_ids"] += range(stop - start)
    return row


class PackedDocuments(Dataset):
    """Rows packed from documents in memory.

    Args:
        documents: what to pack.
        row_length, strategy: as in `pack_pieces`.
    """

    def __init__(self, documents: Documents, row_length: int, strategy: str = "best_fit"):
        self.documents = documents
        self.rows = pack_pieces(documents.lengths, row_length, strategy)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        return make_row(self.documents, self.rows[number])


class PackedStream(IterableDataset):
    """Rows packed from a stream of documents, as many documents at a time as the buffer holds.

    Args:
        source: gives `input_ids` and `labels`; with `state_dict`, if this stream's own is to be used.
        row_length, strategy: as in `pack_pieces`.
        buffer: documents that are packed together. A row that they leave incomplete is packed again with the next ones.
    """

    def __init__(self, source: Any, row_length: int, strategy: str = "best_fit", buffer: int = 1000):
        pack_pieces([], row_length, strategy)
        if buffer < 1:
            raise ValueError(f"buffer={buffer} must be at least 1 document")
        self.source, self.row_length, self.strategy, self.buffer = source, row_length, strategy, buffer
        self._carried: list[dict[str, list[int]]] = []
        self._skip = 0
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The place after the row that was given last: where its buffer begins in the source, and the row's number there."""
        return self._state or {"source": self.source.state_dict(), "carried": self._carried, "given": self._skip}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration begins at that place."""
        self.source.load_state_dict(state["source"])
        self._carried, self._skip, self._state = state["carried"], state["given"], state

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        carried, skip = self._carried, self._skip
        self._carried, self._skip = [], 0
        documents = iter(self.source)
        ended = False
        while not ended:
            begin = {"source": self._source_state(), "carried": carried}
            fresh = list(islice(documents, self.buffer))
            ended = len(fresh) < self.buffer
            held = [*carried, *fresh]
            rows = pack_pieces([len(document["input_ids"]) for document in held], self.row_length, self.strategy)
            carried = [] if ended or not rows else self._take_out(rows, held)
            for number, pieces in enumerate(rows[skip:], start=skip + 1):
                self._state = {**begin, "given": number}
                yield make_row(held, pieces)
            skip = 0
        self._state = None

    def _source_state(self) -> dict[str, Any] | None:
        return self.source.state_dict() if hasattr(self.source, "state_dict") else None

    def _take_out(self, rows: list[list[Piece]], held: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
        """Removes the emptiest row, and gives its pieces back as documents."""
        sizes = [sum(stop - start for _, start, stop in pieces) for pieces in rows]
        emptiest = max(range(len(rows)), key=lambda row: (self.row_length - sizes[row], row))
        if sizes[emptiest] == self.row_length:
            return []
        return [
            {name: held[number][name][start:stop] for name in ("input_ids", "labels")}
            for number, start, stop in rows.pop(emptiest)
        ]
