"""Rows of tables: what their fields are, and their values as numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch


def is_missing(value) -> bool:
    """Whether a field has no value: it is absent, None or not a number."""
    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass
class RowSchema:
    """Fields of a table, numeric ones first.

    Attributes:
        numeric: name, mean and standard deviation of each numeric field.
        categorical: name and values of each categorical field.
    """

    numeric: list[list]
    categorical: list[list]

    @classmethod
    def fit(cls, rows: Sequence[Mapping[str, Any]]) -> "RowSchema":
        """The schema of some rows: fields whose values are all numbers are numeric, others categorical.

        Raises:
            ValueError: no rows, or a field without any value.
        """
        names = list(dict.fromkeys(name for row in rows for name in row))
        if not names:
            raise ValueError("there are no rows with fields to make a schema of")
        numeric, categorical = [], []
        for name in names:
            values = [row[name] for row in rows if not is_missing(row.get(name))]
            if not values:
                raise ValueError(f"field {name!r} has no value in any of the {len(rows)} rows; leave it out")
            if all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
                mean = sum(values) / len(values)
                deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
                numeric.append([name, float(mean), float(deviation) or 1.0])
            else:
                categorical.append([name, sorted(set(values), key=str)])
        return cls(numeric, categorical)

    @property
    def fields(self) -> list[str]:
        """Names of the fields, in the order of their placeholders."""
        return [name for name, *_ in [*self.numeric, *self.categorical]]

    def to_dict(self) -> dict[str, list]:
        return asdict(self)

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The model's inputs `row_numeric`, `row_categorical` and `row_missing`.

        Raises:
            ValueError: an unknown field or category, or a numeric field that is no finite number; row and field are named.
        """
        for number, row in enumerate(rows):
            unknown = [name for name in row if name not in self.fields]
            if unknown:
                raise ValueError(f"row {number} has the field {unknown[0]!r}; the schema has {self.fields}")
        missing = [[is_missing(row.get(name)) for name in self.fields] for row in rows]
        numeric = [[self._number(i, row, *field) for field in self.numeric] for i, row in enumerate(rows)]
        categorical = [[self._category(i, row, *field) for field in self.categorical] for i, row in enumerate(rows)]
        return {
            "row_numeric": torch.tensor(numeric, dtype=torch.float32).view(len(rows), len(self.numeric)),
            "row_categorical": torch.tensor(categorical, dtype=torch.long).view(len(rows), len(self.categorical)),
            "row_missing": torch.tensor(missing, dtype=torch.long),
        }

    @staticmethod
    def _number(number: int, row: Mapping[str, Any], name: str, mean: float, deviation: float) -> float:
        value = row.get(name)
        if is_missing(value):
            return 0.0
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"row {number}: field {name!r} has the value {value!r}; it must be a finite number, or None")
        return (value - mean) / deviation

    @staticmethod
    def _category(number: int, row: Mapping[str, Any], name: str, values: list) -> int:
        value = row.get(name)
        if is_missing(value):
            return 0
        if value not in values:
            raise ValueError(f"row {number}: field {name!r} has the category {value!r}; known are {values}")
        return values.index(value)
