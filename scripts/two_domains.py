"""Text of two domains that every Python installation carries: modules of its library, and the language reference of `help()`.

What is held out is other modules and the end of the reference. Paragraphs that the reference repeats are kept once, so that
nothing which has been trained on is met again.
"""

import importlib.util
from pathlib import Path

CODE = ("argparse", "inspect", "tarfile", "doctest", "difflib", "pickle", "ipaddress", "mailbox", "optparse")
HELD_OUT_CODE = ("subprocess", "shutil", "statistics")
HELD_OUT_SHARE = 0.2
"""Of the reference."""


def write_domain_texts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Domain -> file to train on and file held out; both domains have equally many characters to train on."""
    prose = _reference()
    end = prose.rindex("\n\n", 0, int(len(prose) * (1 - HELD_OUT_SHARE)))
    texts = {"code": (_modules(CODE)[:end], _modules(HELD_OUT_CODE)), "prose": (prose[:end], prose[end:].lstrip())}
    files = {}
    for domain, parts in texts.items():
        files[domain] = folder / "train" / f"{domain}.txt", folder / "held_out" / f"{domain}.txt"
        for file, text in zip(files[domain], parts, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return files


def _reference() -> str:
    from pydoc_data.topics import topics

    paragraphs = [part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n")]
    return "\n\n".join(dict.fromkeys(part for part in paragraphs if part.strip()))


def _modules(names: tuple[str, ...]) -> str:
    return "\n\n".join(Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8") for name in names)
