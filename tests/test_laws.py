"""The laws that keep the rooms of the house apart, each as a function that is also shown a source it must refuse."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "modeling_deepseek_r1"
PACKAGE_FOLDER = REPOSITORY / PACKAGE

# A room may import from its own storey and the ones below; `__init__` is the public interface, `import modeling_deepseek_r1`.
STOREYS = (
    {"configuration"},
    {"tokenization", "attention", "moe", "multimodal"},
    {"modeling_deepseek_r1", "modeling_multimodal"},
    {"registration"},
    {"conversion", "data", "generation", "training", "quantization", "serving", "evaluation", "inspection"},
    {"__init__"},
    {"commands", "extras"},
    {"cli"},
    {"scripts"},
)
STOREY = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}
TRAVELLING = {room for rooms in STOREYS[:3] for room in rooms}
OPTIONAL = {
    "accelerate",
    "datasets",
    "flash_attn",
    "gguf",
    "matplotlib",
    "peft",
    "prometheus_client",
    "pydantic",
    "starlette",
    "trl",
    "uvicorn",
}

MAX_LINES = 400
MACHINE_PATH = re.compile(r"(?<![\w.:/~}])/(?:home|root|work|tmp|Users|opt|mnt|srv)/\w|[A-Z]:\\+Users\b")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


def python_files() -> dict[str, str]:
    """Path from the repository's root -> source, of the package, the scripts and the tests."""
    paths = [path for folder in (PACKAGE_FOLDER, REPOSITORY / "scripts", REPOSITORY / "tests") for path in walk(folder)]
    return {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in paths if path.suffix == ".py"}


def package_files() -> dict[str, str]:
    return {path: source for path, source in python_files().items() if path.startswith((f"{PACKAGE}/", "scripts/"))}


def text_files() -> dict[str, str]:
    names = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "constraints.txt", "Makefile", ".ci/run")
    paths = [REPOSITORY / name for name in names if (REPOSITORY / name).is_file()]
    paths += [path for folder in ("docs", "model_cards") for path in walk(REPOSITORY / folder) if path.suffix == ".md"]
    return python_files() | {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def walk(folder: Path) -> Iterator[Path]:
    """All files, through the links that bring configuration/ and tokenization/ into the package."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and path.name != "__pycache__":
            yield from walk(path)
        elif path.is_file():
            yield path


def room_of(path: str) -> str:
    """The room of a file: a folder or module of the package, `__init__` for the package itself, or `scripts`."""
    parts = path.removesuffix(".py").split("/")
    return parts[0] if parts[0] != PACKAGE else parts[1]


def imported_modules(path: str, source: str) -> Iterator[tuple[ast.AST, tuple[str, ...]]]:
    """Every import statement with the dotted module that it names, relative ones resolved from the place of the file."""
    folder = tuple(path.split("/")[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            if module == (PACKAGE,):  # `from .. import attention`: each name may be a room
                for alias in node.names:
                    yield node, (PACKAGE, alias.name) if alias.name in STOREY else module
            else:
                yield node, module


def imported_rooms(path: str, source: str) -> Iterator[tuple[ast.AST, str]]:
    for node, module in imported_modules(path, source):
        if module[0] == PACKAGE:
            yield node, module[1] if len(module) > 1 else "__init__"


def one_way_violations(path: str, source: str) -> list[str]:
    room = room_of(path)
    if room not in STOREY:
        return [f"{path}: room {room!r} has no storey; add it to STOREYS"]
    return [
        f"{path}:{node.lineno}: {room} may not import {target}"
        for node, target in imported_rooms(path, source)
        if STOREY.get(target, len(STOREYS)) > STOREY[room]
    ]


def room_cycle(files: dict[str, str]) -> list[str]:
    """Rooms that import each other in a circle, or nothing. Needed because a storey's rooms may import each other."""
    needs: dict[str, set[str]] = {}
    for path, source in files.items():
        needs.setdefault(room_of(path), set()).update(room for _, room in imported_rooms(path, source))
    needs = {room: rooms - {room, "__init__"} for room, rooms in needs.items()}
    while free := [room for room in needs if not needs[room] & set(needs)]:
        for room in free:
            del needs[room]
    return sorted(needs)


def torch_in_configuration(path: str, source: str) -> list[str]:
    if room_of(path) != "configuration":
        return []
    return [f"{path}:{node.lineno}: imports torch" for node, module in imported_modules(path, source) if module[0] == "torch"]


def bare_room_imports(path: str, source: str) -> list[str]:
    return [
        f"{path}:{node.lineno}: import {module[0]} as {PACKAGE}.{module[0]}; a bare import makes a second class of the same name"
        for node, module in imported_modules(path, source)
        if module[0] in ("configuration", "tokenization")
    ]


def travelling_import_violations(path: str, source: str, is_module=lambda path: False) -> list[str]:
    """Imports that the exporter cannot flatten, in a file that travels with a checkpoint.

    Args:
        is_module: tells whether a path without suffix, from the repository's root, is a module or package.
    """
    if room_of(path) not in TRAVELLING or path.endswith("/__init__.py"):
        return []
    folder, wrong = path.split("/")[:-1], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = "/".join(folder[: len(folder) + 1 - node.level])
            target = f"{base}/{node.module.replace('.', '/')}" if node.module else base
            for alias in node.names:
                if node.module is None or alias.name == "*" or is_module(f"{target}/{alias.name}"):
                    wrong.append((node, f"imports {alias.name!r}, which is not a name in a module"))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if PACKAGE in {name.split(".")[0] for name in names}:
                wrong.append((node, "imports its own package by name"))
    return [f"{path}:{node.lineno}: {what}" for node, what in wrong]


def is_module(path: str) -> bool:
    return (REPOSITORY / f"{path}.py").is_file() or (REPOSITORY / path / "__init__.py").is_file()


def imports_at_import_time(source: str) -> list[ast.Import | ast.ImportFrom]:
    """The import statements that run when the module is imported: not in functions, not under TYPE_CHECKING."""
    found, statements = [], list(ast.parse(source).body)
    while statements:
        node = statements.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            statements += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            statements += [child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.ExceptHandler))]
    return found


def reached_modules(files: dict[str, str]) -> set[str]:
    """Files of the package that `import modeling_deepseek_r1` runs."""
    pending, reached = [f"{PACKAGE}/__init__.py"], set()
    while pending:
        path = pending.pop()
        if path in reached or path not in files:
            continue
        reached.add(path)
        folder = path.split("/")[:-1]
        for node in imports_at_import_time(files[path]):
            if isinstance(node, ast.Import):
                targets = [alias.name.split(".") for alias in node.names]
            else:
                base = folder[: len(folder) + 1 - node.level] if node.level else []
                module = [*base, *(node.module.split(".") if node.module else [])]
                targets = [module, *([*module, alias.name] for alias in node.names)]
            for target in targets:
                pending += ["/".join(target[:depth]) + "/__init__.py" for depth in range(1, len(target) + 1)]
                pending.append("/".join(target) + ".py")
    return reached


def optional_imports(files: dict[str, str]) -> list[str]:
    violations = []
    for path in sorted(reached_modules(files)):
        for node in imports_at_import_time(files[path]):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            level = getattr(node, "level", 0)
            violations += [f"{path}:{node.lineno}: imports {n}" for n in names if not level and n.split(".")[0] in OPTIONAL]
    return violations


def too_long(path: str, source: str) -> list[str]:
    lines = source.count("\n")
    return [f"{path}: {lines} lines, at most {MAX_LINES}"] if lines > MAX_LINES else []


def machine_paths(path: str, source: str) -> list[str]:
    return [f"{path}: path of one machine: {match[0]!r}" for match in MACHINE_PATH.finditer(source)]


def unfinished(path: str, source: str) -> list[str]:
    return [f"{path}: {match[0]}" for match in UNFINISHED.finditer(source)]


def folders_without_init(files: dict[str, str]) -> list[str]:
    """Folders that setuptools would leave out of a wheel without a word."""
    folders = {path.rsplit("/", 1)[0] for path in files if path.startswith(f"{PACKAGE}/")}
    return sorted(folder for folder in folders if f"{folder}/__init__.py" not in files)


@pytest.mark.parametrize(
    ("law", "files"),
    [
        (one_way_violations, package_files),
        (torch_in_configuration, package_files),
        (bare_room_imports, python_files),
        (lambda path, source: travelling_import_violations(path, source, is_module), package_files),
        (too_long, python_files),
        (machine_paths, text_files),
        (unfinished, text_files),
    ],
    ids=[
        "one way",
        "configuration without torch",
        "no bare rooms",
        "travelling files",
        "length",
        "machine paths",
        "unfinished",
    ],
)
def test_law(law, files):
    sources = files()
    assert f"{PACKAGE}/configuration/configuration_deepseek_r1.py" in sources
    assert [violation for path, source in sources.items() for violation in law(path, source)] == []


@pytest.mark.parametrize("law", [room_cycle, optional_imports, folders_without_init])
def test_law_of_the_whole_package(law):
    assert law(package_files()) == []


@pytest.mark.parametrize(
    ("law", "path", "source"),
    [
        (one_way_violations, f"{PACKAGE}/attention/layer.py", "from ..modeling_deepseek_r1 import DeepseekR1TextModel"),
        (one_way_violations, f"{PACKAGE}/attention/layer.py", "def late():\n    from ..conversion.write import write"),
        (one_way_violations, f"{PACKAGE}/generation/stream.py", "from .. import DeepseekR1ForCausalLM"),
        (one_way_violations, f"{PACKAGE}/evaluation/scoring.py", "from .. import commands"),
        (one_way_violations, f"{PACKAGE}/evaluation/scoring.py", f"import {PACKAGE}.cli"),
        (one_way_violations, f"{PACKAGE}/configuration/presets.py", f"from {PACKAGE}.attention.pattern import Pattern"),
        (one_way_violations, f"{PACKAGE}/attic/old.py", ""),
        (one_way_violations, f"{PACKAGE}/registration.py", "from .attic import old"),
        (torch_in_configuration, f"{PACKAGE}/configuration/presets.py", "def f():\n    import torch.nn as nn"),
        (bare_room_imports, "tests/test_x.py", "from configuration.presets import PRESETS"),
        (bare_room_imports, f"{PACKAGE}/attention/layer.py", "import tokenization"),
        (travelling_import_violations, f"{PACKAGE}/attention/layer.py", "from . import local"),
        (travelling_import_violations, f"{PACKAGE}/attention/layer.py", "from ..configuration.presets import *"),
        (
            travelling_import_violations,
            f"{PACKAGE}/modeling_deepseek_r1.py",
            f"from {PACKAGE}.attention.layer import Attention",
        ),
        (travelling_import_violations, f"{PACKAGE}/modeling_deepseek_r1.py", f"import {PACKAGE}.attention"),
        (too_long, "tests/test_x.py", "x = 1\n" * (MAX_LINES + 1)),
        (machine_paths, "docs/x.md", f"see `/{'home'}/someone/models`"),
        (machine_paths, "tests/test_x.py", f"folder = '/{'tmp'}/models'"),
        (unfinished, "README.md", f"<!-- {'TO' + 'DO'}: write -->"),
        (unfinished, f"{PACKAGE}/cli.py", f"# {'FIX' + 'ME'} later"),
    ],
)
def test_a_violation_is_seen(law, path, source):
    assert len(law(path, source)) == 1


def test_a_module_imported_as_a_name_is_seen():
    violations = travelling_import_violations(
        f"{PACKAGE}/modeling_deepseek_r1.py", "from .attention import layer", lambda path: path == f"{PACKAGE}/attention/layer"
    )
    assert violations == [f"{PACKAGE}/modeling_deepseek_r1.py:1: imports 'layer', which is not a name in a module"]


def test_what_the_laws_allow():
    source = f"import torch\nfrom ..configuration.presets import PRESETS\nURL = 'https://host/{'home'}/x'\n"
    path = f"{PACKAGE}/attention/layer.py"
    for law in (one_way_violations, bare_room_imports, travelling_import_violations, machine_paths):
        assert law(path, source) == []


def test_a_circle_of_rooms_is_seen():
    files = {
        f"{PACKAGE}/attention/layer.py": "from ..moe.block import Block",
        f"{PACKAGE}/moe/block.py": "from ..attention.layer import Attention",
        f"{PACKAGE}/moe/gates.py": "from .block import Block",
        f"{PACKAGE}/modeling_deepseek_r1.py": "from .moe.block import Block",
    }
    assert room_cycle(files) == ["attention", "modeling_deepseek_r1", "moe"]
    files[f"{PACKAGE}/moe/block.py"] = ""
    assert room_cycle(files) == []


def test_a_folder_without_init_is_seen():
    assert folders_without_init({f"{PACKAGE}/__init__.py": "", f"{PACKAGE}/moe/block.py": ""}) == [f"{PACKAGE}/moe"]


@pytest.mark.parametrize("statement", ["import gguf", "try:\n    from gguf import GGUFReader\nexcept ImportError:\n    pass"])
def test_an_optional_import_is_seen_where_it_is_reached(statement):
    files = {
        f"{PACKAGE}/__init__.py": "from .registration import register",
        f"{PACKAGE}/registration.py": "from .conversion import source",
        f"{PACKAGE}/conversion/__init__.py": "",
        f"{PACKAGE}/conversion/source.py": statement,
        f"{PACKAGE}/conversion/other.py": statement,
    }
    (violation,) = optional_imports(files)
    assert violation.startswith(f"{PACKAGE}/conversion/source.py:")
    files[f"{PACKAGE}/conversion/source.py"] = "def read():\n    import gguf"
    assert optional_imports(files) == []


IMPORT_AND_TELL = f"""
import builtins, sys
real, asked = builtins.__import__, set()

def watching(name, globals=None, *rest, **named):
    if (globals or {{}}).get("__name__", "").split(".")[0] == {PACKAGE!r}:
        asked.add(name.split(".")[0])
    return real(name, globals, *rest, **named)

import torch, transformers
before = set(sys.modules)
builtins.__import__ = watching
%s
print(sorted(asked & {OPTIONAL!r}), sorted({{name.split(".")[0] for name in set(sys.modules) - before}} & {OPTIONAL - {"accelerate"}!r}))
"""


def test_importing_the_package_leaves_optional_dependencies_alone():
    """Also where one is not installed: what our modules ask for is watched, not only what they get. transformers' own model
    classes load accelerate where it is installed."""
    code = IMPORT_AND_TELL % f"import {PACKAGE}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout == "[] []\n"


def test_an_optional_dependency_that_is_imported_would_be_told(tmp_path):
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("try:\n    import trl\nexcept ImportError:\n    pass\nimport gguf\n", encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + IMPORT_AND_TELL % f"import {PACKAGE}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.startswith("['gguf', 'trl'] ['gguf'")
