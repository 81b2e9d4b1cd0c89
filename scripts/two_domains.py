"""Real text of two domains that every Python installation carries: modules of its library, and the reference that `help()` prints.

Held out are other modules, and the part of the reference that comes last after shuffling; paragraphs that the reference repeats
are kept once.
"""

import importlib.util
import json
import random
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

CODE = ("argparse", "inspect", "tarfile", "doctest", "difflib", "pickle", "ipaddress", "mailbox", "optparse")
HELD_OUT_CODE = ("subprocess", "shutil", "statistics", "configparser")
HELD_OUT_SHARE = 0.2
SECTION, RECORD = 2000, 450
"""Characters: texts are shuffled by sections; a row of 256 tokens holds two records, one of each domain."""


def write_domain_texts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Domain -> text that belongs to the training, text held out. Beside them `train.jsonl`: records of both domains in turn."""
    reference = _sections(_reference())
    kept = int(len(reference) * (1 - HELD_OUT_SHARE))
    code = _sections(_modules(CODE))[:kept]
    parts = {"code": (code, _sections(_modules(HELD_OUT_CODE))), "prose": (reference[:kept], reference[kept:])}
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for domain, texts in parts.items():
        files[domain] = folder / f"{domain}.txt", folder / f"{domain}-held-out.txt"
        for file, sections in zip(files[domain], texts, strict=True):
            file.write_text("\n\n".join(sections), encoding="utf-8")
    records = zip(*(_records(sections) for sections, _ in parts.values()), strict=False)
    lines = (json.dumps({"text": record}) + "\n" for record in chain.from_iterable(records))
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return files


def _reference() -> str:
    from pydoc_data.topics import topics

    paragraphs = [part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n")]
    return "\n\n".join(dict.fromkeys(part for part in paragraphs if part.strip()))


def _modules(names: tuple[str, ...]) -> str:
    return "\n\n".join(Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8") for name in names)


def _sections(text: str) -> list[str]:
    sections = list(_cut(text, "\n\n", SECTION))
    random.Random(0).shuffle(sections)
    return sections


def _records(sections: list[str]) -> Iterator[str]:
    return chain.from_iterable(_cut(section, "\n", RECORD) for section in sections)


def _cut(text: str, separator: str, size: int) -> Iterator[str]:
    """Pieces of about `size` characters, cut at separators."""
    piece = ""
    for part in text.split(separator):
        if piece and len(piece) + len(part) > size:
            yield piece
            piece = ""
        piece = f"{piece}{separator}{part}" if piece else part
    yield piece
