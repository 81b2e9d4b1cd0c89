import importlib
import sys
import textwrap

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_deepseek_r1.conversion.flatten import flatten_modules

PACKAGE = {
    "__init__.py": "from .model import Model\n",
    "settings/__init__.py": "'''Settings.'''\nfrom .names import NAMES as LABELS\nfrom .values import Values\n__all__ = ['LABELS']\n",
    "settings/names.py": "NAMES = ('a', 'b')\n",
    "settings/values.py": '''\
        """Größe: columns are counted in bytes."""
        from .names import NAMES

        class Values:
            ü = "ß"; names = NAMES
        ''',
    "parts/__init__.py": "from .deep import Layer\n",
    "parts/deep/__init__.py": "from .layer import Layer\n",
    "parts/deep/layer.py": '''\
        import math
        from typing import TYPE_CHECKING

        from ...settings import (  # two origins
            LABELS,
            Values,
        )

        if TYPE_CHECKING:
            from ...model import Model

        try:
            import no_such_package
        except ImportError:
            no_such_package = None


        class Layer:
            """A layer.

            >>> from pack.parts import Layer
            """

            def describe(self, model: "Model") -> str:
                from .helper import (
                    describe as tell,  # kept
                )
                return tell(LABELS, Values.names, math.pi)
        ''',
    "parts/deep/helper.py": "def describe(*values):\n    return repr(values)\n",
    "model.py": '''\
        """The model."""

        from .parts import Layer  # through two re-exports
        from .settings.values import Values as V


        class Model:
            def run(self):
                return Layer().describe(self), V.ü
        ''',
    "unused.py": "raise RuntimeError('not part of the model')\n",
}
ENTRIES = {"settings.values": "configuration_pack", "model": "modeling_pack"}


def write_package(root, files):
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
    return root


@pytest.fixture
def pack(tmp_path):
    return write_package(tmp_path / "pack", PACKAGE)


def test_only_what_is_needed_with_flat_names(pack):
    files = flatten_modules(pack, "pack", ENTRIES)
    assert list(files) == [
        "configuration_pack.py",
        "modeling_pack.py",
        "settings_names.py",
        "parts_deep_layer.py",
        "parts_deep_helper.py",
    ]


def test_only_module_names_of_imports_change(pack):
    files = flatten_modules(pack, "pack", ENTRIES)
    assert files["settings_names.py"] == PACKAGE["settings/names.py"]
    assert files["modeling_pack.py"] == textwrap.dedent(PACKAGE["model.py"]).replace(
        "from .parts import Layer  #", "from .parts_deep_layer import Layer  #"
    ).replace("from .settings.values import", "from .configuration_pack import")
    assert files["configuration_pack.py"] == textwrap.dedent(PACKAGE["settings/values.py"]).replace(
        "from .names import", "from .settings_names import"
    )
    layer = textwrap.dedent(PACKAGE["parts/deep/layer.py"])
    start, end = layer.index("from ...settings"), layer.index("\n\nif TYPE")
    assert files["parts_deep_layer.py"] == (
        layer[:start]
        + "from .settings_names import NAMES as LABELS\nfrom .configuration_pack import Values"
        + layer[end:]
        .replace("from ...model import", "from .modeling_pack import")
        .replace("from .helper import (", "from .parts_deep_helper import (")
    )


def test_the_flat_folder_runs_and_the_loader_finds_every_file(pack, tmp_path, monkeypatch):
    files = flatten_modules(pack, "pack", ENTRIES)
    folder = write_package(tmp_path / "flat_pack", {"__init__.py": "", **files})
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "pack").rename(tmp_path / "original")  # the flat copy must not lean on it
    model = importlib.import_module("flat_pack.modeling_pack").Model()
    assert model.run() == ("(('a', 'b'), ('a', 'b'), 3.141592653589793)", "ß")
    assert not any(name == "pack" or name.startswith("pack.") for name in sys.modules)

    needed = get_relative_import_files(folder / "modeling_pack.py")
    assert {path.rsplit("/", 1)[1] for path in needed} == set(files)


def test_names_that_would_collide_are_kept_apart(tmp_path):
    root = write_package(
        tmp_path / "pack",
        {
            "__init__.py": "",
            "model.py": "from .a.b_c import X\nfrom .a_b.c import Y\n",
            "a/__init__.py": "",
            "a/b_c.py": "X = 1\n",
            "a_b/__init__.py": "",
            "a_b/c.py": "Y = 2\n",
        },
    )
    files = flatten_modules(root, "pack", {"model": "model"})
    assert files == {
        "model.py": "from .a_b_c import X\nfrom .a_b_c_ import Y\n",
        "a_b_c.py": "X = 1\n",
        "a_b_c_.py": "Y = 2\n",
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from .parts.deep.layer import *", r"model.py, line 2: a star import cannot be followed"),
        ("from . import parts", r"model.py, line 2: 'parts' is a module"),
        ("from .parts import deep", r"model.py, line 2: 'deep' is a module"),
        ("from pack.parts import Layer", r"model.py, line 2: pack is imported by its own name"),
        ("def f():\n    import pack.parts", r"model.py, line 3: pack is imported by its own name"),
        ("import importlib\nimportlib.import_module('.parts', __package__)", r"line 3: a computed or relative module name"),
        ("import importlib\nimportlib.import_module(__name__ + '.x')", r"line 3: a computed or relative module name"),
        ("__import__('pack.parts')", r"line 2: pack is imported by its own name"),
        ("from .nowhere import X", r"line 2: there is no module pack.nowhere"),
        ("from .settings.names import MISSING", r"line 2: module pack.settings.names defines no 'MISSING'"),
        ("from .settings import MISSING", r"line 2: pack.settings does not re-export 'MISSING'"),
        ("from ..outside import X", r"line 2: the import leaves the package pack"),
        ("if True: from .parts import Layer", r"line 2: a relative import must begin its line"),
        ("'''\nfrom .parts import Layer\n'''", r"line 3: the Hub's loader takes the text 'from .parts import' for an import"),
        ("'''\nimport .parts\n'''", r"line 3: the Hub's loader takes the text 'import .parts' for an import"),
    ],
)
def test_what_cannot_be_flattened_is_refused(pack, source, message):
    (pack / "model.py").write_text(f"VALUE = 1\n{source}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        flatten_modules(pack, "pack", ENTRIES)


def test_an_import_of_another_package_by_constant_name_is_left_alone(pack):
    source = "import importlib\nnumpy = importlib.import_module('numpy')\n"
    (pack / "model.py").write_text(source, encoding="utf-8")
    assert flatten_modules(pack, "pack", ENTRIES)["modeling_pack.py"] == source


def test_an_init_that_does_work_is_refused(pack):
    (pack / "parts/deep/__init__.py").write_text("from .layer import Layer\n\nregister(Layer)\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"parts/deep/__init__.py, line 3: an __init__ does not travel"):
        flatten_modules(pack, "pack", ENTRIES)


def test_a_missing_entry_is_refused(pack):
    with pytest.raises(ValueError, match="cannot export models.text"):
        flatten_modules(pack, "pack", {"models.text": "modeling_text"})
