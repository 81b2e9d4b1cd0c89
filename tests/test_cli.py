import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError

import modeling_deepseek_r1
from modeling_deepseek_r1 import cli

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture
def fake_command(monkeypatch):
    """Puts a command module in the place of `convert`; its `run` does what the test sets."""
    module = ModuleType("modeling_deepseek_r1.commands.convert")
    module.calls = []

    def add_arguments(parser):
        parser.add_argument("source")
        parser.add_argument("--layers", type=int, default=2)

    module.add_arguments = add_arguments
    module.run = module.calls.append
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def raiser(error):
    def run(args):
        raise error

    return run


def run_python(code, *arguments, **kwargs):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module_and_a_script(name):
    assert importlib.util.find_spec(f"modeling_deepseek_r1.commands.{name}") is not None
    script = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    assert f'raise SystemExit(main(["{name}", *sys.argv[1:]]))' in script


def test_every_command_module_is_in_the_table():
    folder = Path(cli.__file__).parent / "commands"
    assert {path.stem for path in folder.glob("[!_]*.py")} == set(cli.COMMANDS)


def test_help_lists_every_command_and_imports_none():
    code = (
        "import sys, modeling_deepseek_r1.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: print('code', end.code)\n"
        "print([name for name in sys.modules if name.startswith('modeling_deepseek_r1.commands')])"
    )
    output = run_python(code).stdout
    for name, summary in cli.COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(summary[:20])}", output, re.MULTILINE)
    assert output.splitlines()[-2:] == ["code 0", "[]"]


def test_only_the_chosen_command_is_imported(fake_command, monkeypatch):
    for name in cli.COMMANDS:
        if name != "convert":
            monkeypatch.setitem(sys.modules, f"modeling_deepseek_r1.commands.{name}", None)  # importing it raises
    assert cli.main(["convert", "folder", "--layers", "3"]) == 0
    assert (fake_command.calls[0].source, fake_command.calls[0].layers) == ("folder", 3)


def test_arguments_default_to_those_of_the_process(fake_command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deepseek-r1", "convert", "folder"])
    assert cli.main() == 0
    assert fake_command.calls[0].source == "folder"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("layers=0: must be\n  at least 1"), "layers=0: must be at least 1"),
        (FileNotFoundError("folder has no config.json"), "folder has no config.json"),
        (
            ImportError("needs gguf: pip install modeling-deepseek-r1[gguf]"),
            "needs gguf: pip install modeling-deepseek-r1[gguf]",
        ),
        (RuntimeError("out of memory"), "out of memory"),
        (RuntimeError(), "RuntimeError"),
        (
            StrictDataclassClassValidationError("validate_heads", ValueError("heads=3")),
            "Class validation error for validator 'validate_heads': ValueError: heads=3",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failure_is_one_line_on_stderr(fake_command, capsys, error, message):
    fake_command.run = raiser(error)
    assert cli.main(["convert", "folder"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"deepseek-r1 convert: error: {message}\n"


def test_traceback_on_request(fake_command, capsys):
    fake_command.run = raiser(ValueError("bad\nlayers"))
    assert cli.main(["convert", "folder", "--traceback"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "deepseek-r1 convert: error: bad layers"


def test_a_command_that_cannot_be_imported_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "modeling_deepseek_r1.commands.convert", None)
    assert cli.main(["convert", "folder"]) == 1
    assert re.fullmatch(r"deepseek-r1 convert: error: [^\n]*convert[^\n]*\n", capsys.readouterr().err)


def test_a_bug_keeps_its_traceback(fake_command):
    fake_command.run = raiser(KeyError("layers"))
    with pytest.raises(KeyError):
        cli.main(["convert", "folder"])


def test_interrupt(fake_command, capsys):
    fake_command.run = raiser(KeyboardInterrupt())
    assert cli.main(["convert", "folder"]) == 130
    assert capsys.readouterr().err == "deepseek-r1 convert: interrupted\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["translate"], "invalid choice: 'translate'"),
        (["convert"], "the following arguments are required: source"),
        (["convert", "folder", "--layers", "two"], "invalid int value: 'two'"),
        (["convert", "folder", "--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_arguments_end_with_code_2(fake_command, capsys, argv, message):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert fake_command.calls == []


def test_the_version_is_the_same_everywhere(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r'^version = "(.+)"$', project, re.MULTILINE).group(1)
    assert capsys.readouterr().out == f"deepseek-r1 {declared}\n"
    assert modeling_deepseek_r1.__version__ == declared


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at exit", "while it runs"])
def test_a_closed_pipe_ends_quietly(lines):
    code = (
        "import sys, types\n"
        "import modeling_deepseek_r1.cli as cli\n"
        "command = types.ModuleType('convert')\n"
        "command.add_arguments = lambda parser: None\n"
        f"command.run = lambda args: [print('line') for _ in range({lines})]\n"
        "sys.modules['modeling_deepseek_r1.commands.convert'] = command\n"
        "sys.exit(cli.main(['convert']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as broken:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=broken, stderr=subprocess.PIPE, text=True, timeout=120, env=environment
        )
    assert (result.returncode, result.stderr) == (141, "")


def test_a_script_reaches_the_same_command():
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / "export.py"), "--help"], capture_output=True, text=True, timeout=120, cwd=SCRIPTS.parent
    )
    assert result.returncode == 0
    assert result.stdout.startswith("usage: deepseek-r1 export ")
