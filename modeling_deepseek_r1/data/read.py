"""Records from files, folders and `datasets`, one at a time: nothing is read before it is needed.

A text file is one record `{"text": ...}`; a line of .jsonl, a row of .csv or .parquet is one with its own columns. Which columns
mean what is decided in `encode.py`.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class Record(NamedTuple):
    """Columns of one record, and where it comes from, for messages about it."""

    fields: dict[str, Any]
    where: str


class Records:
    """Records of one or several sources, in order; may be gone through again.

    Attributes:
        names: the sources, as they were given.
        notes: a line for everything that was left out.
    """

    def __init__(self, parts: list[Callable[[], Iterator[Record]]], names: list[str], notes: list[str]):
        self.parts, self.names, self.notes = parts, names, notes

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(part() for part in self.parts)

    def first(self) -> Record:
        """The first record.

        Raises:
            ValueError: there is none.
        """
        for record in self:
            return record
        raise ValueError(f"{', '.join(self.names)}: the data is empty, there is not one record in it")


def open_data(
    sources: Any, *, split: str = "train", subset: str | None = None, streaming: bool = False, text_column: str = "text"
) -> Records:
    """Opens training data.

    Args:
        sources: one or several of: a file (.txt, .md, .py, .jsonl, .csv, .parquet), a folder (all such files below it, sorted by
            path; hidden ones are left out), a folder written by `datasets.save_to_disk`, the hub id of a dataset, a
            `datasets` Dataset or IterableDataset, or any list of dictionaries.
        split, subset: of a dataset from the hub or from `save_to_disk`.
        streaming: read a dataset of the hub while training instead of downloading it first. Files are always read so.
        text_column: the column that is read as `text`.

    Raises:
        OSError: a file, folder or dataset that is not there.
        ValueError: a file of another kind, or a folder without any that can be read.
        ImportError: `datasets` is needed and missing.
    """
    if isinstance(sources, (str, Path)) or not isinstance(sources, (list, tuple)) or (sources and isinstance(sources[0], dict)):
        sources = [sources]
    if not sources:
        raise ValueError("no data is given; name files, folders or a dataset")
    parts, names, notes = [], [], []
    for source in sources:
        if not isinstance(source, (str, Path)):
            names.append(type(source).__name__)
            parts.append(lambda rows=source, name=names[-1]: _numbered(rows, name))
            continue
        names.append(str(source))
        files = [path := Path(source).expanduser()]
        if path.is_dir() and not _is_saved_dataset(path):
            files, left_out = _files_below(path)
            notes += left_out
        if all(file.is_file() for file in files):
            parts += [lambda file=file: _read_file(file) for file in _known(files)]
        else:
            parts.append(_open_dataset(str(source), path, split, subset, streaming))
    if text_column != "text":
        parts = [lambda part=part: _renamed(part(), text_column) for part in parts]
    return Records(parts, names, notes)


def import_datasets() -> ModuleType:
    """The optional package `datasets`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError('reading this data needs the package datasets: pip install "modeling-deepseek-r1[train]"') from error
    return datasets


def _numbered(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Record]:
    for number, row in enumerate(rows):
        yield Record(row, f"{name} record {number}")


def _renamed(records: Iterator[Record], text_column: str) -> Iterator[Record]:
    for record in records:
        if text_column not in record.fields:
            columns = ", ".join(map(str, record.fields))
            raise ValueError(f"{record.where}: there is no column {text_column!r}; the columns are {columns}")
        yield Record({**record.fields, "text": record.fields[text_column]}, record.where)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def _open_dataset(name: str, path: Path, split: str, subset: str | None, streaming: bool) -> Callable[[], Iterator[Record]]:
    if not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2 or path.suffix in READERS):
        raise FileNotFoundError(f"no data file or folder {name}")
    datasets = import_datasets()
    if path.is_dir():
        data = datasets.load_from_disk(str(path))
        if isinstance(data, dict) and split not in data:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(data)}")
        data = data[split] if isinstance(data, dict) else data
    else:
        data = datasets.load_dataset(name, subset, split=split, streaming=streaming)
    return lambda: _numbered(data, name)


def _files_below(folder: Path) -> tuple[list[Path], list[str]]:
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    inside = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    known = [path for path in inside if path.suffix.lower() in READERS]
    if not known:
        raise ValueError(f"{folder} holds no file that can be read; known are {', '.join(READERS)}")
    others = Counter(path.suffix or path.name for path in inside if path.suffix.lower() not in READERS)
    return known, [f"{folder}: left out {count} x {suffix}" for suffix, count in sorted(others.items())]


def _known(files: list[Path]) -> list[Path]:
    for path in files:
        if path.suffix.lower() not in READERS:
            raise ValueError(
                f"{path}: files of kind {path.suffix or path.name!r} cannot be read; known are {', '.join(READERS)}"
            )
        if path.suffix.lower() == ".parquet":
            import_datasets()
    return files


def _read_file(path: Path) -> Iterator[Record]:
    return READERS[path.suffix.lower()](path)


def _decoded(path: Path, content: bytes, start: int) -> str:
    """`content`, which begins at byte `start` of the file, as text."""
    try:
        return content.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        wrong = content[error.start]
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{wrong:02x} at position {start + error.start}; convert the file to UTF-8"
        ) from error


def _read_text(path: Path) -> Iterator[Record]:
    yield Record({"text": _decoded(path, path.read_bytes(), 0)}, str(path))


def _lines(path: Path) -> Iterator[str]:
    position = 0
    with open(path, "rb") as file:
        for line in file:
            yield _decoded(path, line, position)
            position += len(line)


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: each line must be an object with named columns, not {type(fields).__name__}")
        yield Record(fields, where)


def _read_csv(path: Path) -> Iterator[Record]:
    rows = csv.reader(_lines(path), strict=True)
    try:
        names = next(rows, None)
        for row in rows:
            if not row:
                continue
            where = f"{path} line {rows.line_num}"
            if len(row) != len(names):
                raise ValueError(f"{where} has {len(row)} columns, the first line names {len(names)}")
            yield Record(dict(zip(names, row, strict=True)), where)
    except csv.Error as error:
        raise ValueError(f"{path} line {rows.line_num} is not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                yield Record(fields, f"{path} record {number}")
                number += 1
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    **dict.fromkeys((".txt", ".md", ".py"), _read_text),
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""Suffix -> reader."""
