"""Brings modules of a nested package into one flat folder, as the Hub's loader of custom code wants them.

That loader accepts modules that lie side by side and import each other as `from .module import Name`, each import on a line of
its own. The flattener follows the relative imports from the entry modules, gives every module that it meets a flat name and
rewrites the module part of the imports; the rest of each file stays as it is. Names that a package's `__init__` re-exports are
imported from the module that defines them, so no `__init__` travels.
"""

import ast
import re
import symtable
from collections.abc import Mapping
from pathlib import Path

# The two patterns by which transformers.dynamic_module_utils finds the files that a module needs: in any text, docstrings too.
HUB_IMPORTS = re.compile(r"^\s*import\s+\.(\S+)\s*$|^\s*from\s+\.(\S+)\s+import", re.MULTILINE)

Module = tuple[str, ...]
"""A module's place in the package: `("attention", "layer")`; `()` is the package itself."""


def flatten_modules(root: str | Path, package: str, entries: Mapping[str, str]) -> dict[str, str]:
    """Flattens modules of a package and all that they import from it.

    Args:
        root: folder of the package.
        package: its import name, whose absolute imports are refused.
        entries: dotted module inside the package -> its flat name, e.g. `{"models.text": "modeling_text"}`. Other modules are
            named by their place, e.g. `attention_layer`.

    Returns:
        File name -> source text.

    Raises:
        ValueError: what has no flat form; the message names file, line and what to write instead.
    """
    flattener = _Flattener(Path(root), package, {tuple(module.split(".")): name for module, name in entries.items()})
    files = flattener.run()
    _check_hub_imports(files)
    return files


def _check_hub_imports(files: Mapping[str, str]) -> None:
    for name, text in files.items():
        for match in HUB_IMPORTS.finditer(text):
            needed = f"{match[1] or match[2]}.py"
            if needed not in files:
                line = text.count("\n", 0, match.end()) + 1
                raise ValueError(
                    f"cannot export {name}, line {line}: the Hub's loader takes the text {match[0].strip()!r} for an import and"
                    f" would look for {needed}; word that docstring or string differently"
                )


class _Flattener:
    def __init__(self, root: Path, package: str, flat_names: dict[Module, str]):
        self.root, self.package, self.flat_names = root, package, flat_names
        self.pending = list(flat_names)
        self.trees: dict[Path, ast.Module] = {}

    def run(self) -> dict[str, str]:
        files = {}
        while self.pending:
            module = self.pending.pop(0)
            files[f"{self.flat_names[module]}.py"] = self._rewrite(module)
        return files

    def _rewrite(self, module: Module) -> str:
        path = self._file(module)
        if path is None or path.name == "__init__.py":
            raise ValueError(f"cannot export {'.'.join(module)}: {self.root} has no such file")
        self._check_packages(module)
        # ast counts columns in bytes of UTF-8.
        lines = [line.encode() for line in path.read_text(encoding="utf-8").split("\n")]
        nodes = list(ast.walk(self._tree(path)))
        for node in nodes:
            self._refuse_hidden_import(path, node)
        relative = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level > 0]
        edits = []
        for node in sorted(relative, key=lambda node: node.lineno):
            first, last = node.lineno - 1, node.end_lineno - 1
            indent, tail = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
            if indent.strip():
                raise self._error(path, node, "a relative import must begin its line, or the Hub's loader does not see it")
            old = b"\n".join([*lines[first:last], lines[last][: node.end_col_offset]])[len(indent) :].decode()
            new = self._flat_import(path, module, node, old, indent.decode())
            edits.append((first, last, indent + new.encode() + tail))
        # From the end, since an edit may change the number of lines.
        for first, last, text in reversed(edits):
            lines[first : last + 1] = text.split(b"\n")
        return b"\n".join(lines).decode()

    def _flat_import(self, path: Path, module: Module, node: ast.ImportFrom, old: str, indent: str) -> str:
        """The statement `old` with flat module names; it is laid out anew only where the names have several origins."""
        target = self._target(path, module[:-1], node)
        origins: dict[str, list[str]] = {}
        renamed = False
        for alias in node.names:
            origin, name = self._resolve(path, node, target, alias.name)
            bound = alias.asname or alias.name
            origins.setdefault(self._flat_name(origin), []).append(name if name == bound else f"{name} as {bound}")
            renamed |= name != alias.name
        if len(origins) == 1 and not renamed:
            (flat_name,) = origins
            new, count = re.subn(r"\Afrom\s*\.[.\w]*\s+import\b", f"from .{flat_name} import", old)
            if count:
                return new
        return f"\n{indent}".join(f"from .{flat_name} import {', '.join(names)}" for flat_name, names in origins.items())

    def _target(self, path: Path, package: Module, node: ast.ImportFrom) -> Module:
        """The module that a relative import names, seen from a file in `package`."""
        if node.level > len(package) + 1:
            raise self._error(path, node, f"the import leaves the package {self.package}")
        return (*package[: len(package) + 1 - node.level], *(node.module.split(".") if node.module else ()))

    def _resolve(self, path: Path, node: ast.ImportFrom, target: Module, name: str) -> tuple[Module, str]:
        """The module that defines a name, and its name there, through the re-exports of `__init__` files."""
        file, dotted = self._file(target), ".".join([self.package, *target])
        if file is None:
            raise self._error(path, node, f"there is no module {dotted}")
        if name == "*":
            raise self._error(path, node, "a star import cannot be followed; list the names")
        if file.name != "__init__.py":
            if name not in self._bound_names(file):
                raise self._error(path, node, f"module {dotted} defines no {name!r}")
            return target, name
        for source in ast.walk(self._tree(file)):
            if isinstance(source, ast.ImportFrom) and source.level > 0:
                for alias in source.names:
                    if (alias.asname or alias.name) == name:
                        return self._resolve(file, source, self._target(file, target, source), alias.name)
        if self._file((*target, name)) is not None:
            raise self._error(path, node, f"{name!r} is a module; import the names that are needed from it")
        raise self._error(path, node, f"{dotted} does not re-export {name!r}; import it from the module that defines it")

    def _refuse_hidden_import(self, path: Path, node: ast.AST) -> None:
        """What would import this package in a way that no rewriting of relative imports reaches."""
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            argument = node.args[0] if node.args else None
            if not isinstance(argument, ast.Constant) or str(argument.value).startswith("."):
                raise self._error(path, node, "a computed or relative module name cannot be followed; use an import statement")
            names = [str(argument.value)]
        else:
            return
        if any(name.split(".")[0] == self.package for name in names):
            raise self._error(
                path, node, f"{self.package} is imported by its own name; write `from .module import Name` instead"
            )

    def _check_packages(self, module: Module) -> None:
        """Refuses packages whose `__init__` does more than to re-export: that part would be lost without a word."""
        for depth in range(1, len(module)):
            path = self.root.joinpath(*module[:depth]) / "__init__.py"
            for node in self._tree(path).body if path.is_file() else ():
                docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                names = isinstance(node, ast.Assign) and [_last_name(target) for target in node.targets] == ["__all__"]
                if not (docstring or names or isinstance(node, (ast.Import, ast.ImportFrom))):
                    raise self._error(path, node, "an __init__ does not travel and may only re-export; move this into a module")

    def _flat_name(self, module: Module) -> str:
        if module not in self.flat_names:
            name = "_".join(module)
            while name in self.flat_names.values():
                name += "_"
            self.flat_names[module] = name
            self.pending.append(module)
        return self.flat_names[module]

    def _file(self, module: Module) -> Path | None:
        path = self.root.joinpath(*module)
        candidates = (path / "__init__.py", path.with_name(f"{path.name}.py"))
        return next((candidate for candidate in candidates if candidate.is_file()), None)

    def _tree(self, path: Path) -> ast.Module:
        if path not in self.trees:
            self.trees[path] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        return self.trees[path]

    def _bound_names(self, path: Path) -> set[str]:
        table = symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec")
        return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}

    def _error(self, path: Path, node: ast.AST, message: str) -> ValueError:
        return ValueError(f"cannot export {path.relative_to(self.root)}, line {node.lineno}: {message}")


def _last_name(node: ast.AST) -> str:
    return getattr(node, "attr", None) or getattr(node, "id", "")
