"""Rows of a batch in which the same slots hold the same documents."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowGroup:
    """Rows in which the same slots hold the same documents.

    Attributes:
        rows: their numbers in the batch.
        past_length: tokens of the document in progress that came before this forward.
        current_document: its number.
        runs: `(document or None for padding, number of slots)`, one after the other along the row.
    """

    rows: list[int]
    past_length: int
    current_document: int
    runs: tuple[tuple[int | None, int], ...]


def token_runs(positions: list[int], documents: list[int]) -> tuple[tuple[int | None, int], ...]:
    """The runs of one row from its tokens' positions (-1 = padding) and documents."""
    runs: list[list] = []
    for position, document in zip(positions, documents, strict=True):
        owner = document if position >= 0 else None
        if runs and runs[-1][0] == owner:
            runs[-1][1] += 1
        else:
            runs.append([owner, 1])
    return tuple((owner, length) for owner, length in runs)
