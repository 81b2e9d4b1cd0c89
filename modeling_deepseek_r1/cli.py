"""The console command `deepseek-r1`: one subcommand per module of `modeling_deepseek_r1.commands`.

A command module has `add_arguments(parser)` and `run(args)`, and is imported only when its subcommand is chosen: `--help` stays
fast, and a command whose optional dependency is missing does not break the others.
"""

import argparse
import importlib
import os
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

PROG = "deepseek-r1"

COMMANDS = {
    "convert": "turn an existing checkpoint into one of this library",
    "compose": "join a text checkpoint with encoders of images and sound",
    "train": "train a checkpoint on texts, conversations or labelled texts",
    "generate": "continue a prompt",
    "chat": "talk to a model in the terminal",
    "serve": "answer requests over HTTP, in the form of OpenAI's API",
    "evaluate": "measure quality, speed and memory of a checkpoint",
    "drift": "compare a new version with the one that is served, token by token, and raise an alarm",
    "report": "show what a model does with a text, token by token, as one HTML page",
    "quantize": "write a checkpoint whose weights have 8 or 4 bits",
    "export": "write a checkpoint that loads without this package installed (trust_remote_code)",
}
"""Subcommand -> its line in `deepseek-r1 --help`."""

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell reports for any program whose reader has gone


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: arguments without the program's name; default: those of the process.

    Returns:
        The exit code: 0, 1 when the work failed (one line on stderr says why), 130 when it was interrupted, 141 when the reader
        of its output has gone.

    Raises:
        SystemExit: `--help` and `--version` (code 0) and arguments that argparse rejects (code 2).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((argument for argument in argv if not argument.startswith("-")), None)
    try:
        command = importlib.import_module(f"{__package__}.commands.{name}") if name in COMMANDS else None
        args = _parser(name, command).parse_args(argv)
        command.run(args)
        # A short output reaches a closed pipe only here; at exit nobody could catch it any more.
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (Exception, KeyboardInterrupt) as error:
        if not _is_expected(error):
            raise
        if "--traceback" in argv:
            traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
        message = "interrupted" if interrupted else f"error: {_one_line(error)}"
        print(f"{PROG} {name}: {message}", file=sys.stderr)
        return EXIT_INTERRUPTED if interrupted else EXIT_FAILED
    return 0


def _parser(chosen: str | None, command: ModuleType | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="Long-context language models with hybrid attention.")
    parser.add_argument("--version", action="version", version=f"{PROG} {_version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            command.add_arguments(subparser)
            subparser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _version() -> str:
    try:
        return version("modeling-deepseek-r1")
    except PackageNotFoundError:
        return "(not installed)"


def _is_expected(error: BaseException) -> bool:
    """Whether the user can act on the message alone; anything else is a bug and shows its traceback."""
    if isinstance(error, (ValueError, OSError, ImportError, RuntimeError, KeyboardInterrupt)):
        return True
    from huggingface_hub.errors import StrictDataclassError

    return isinstance(error, StrictDataclassError)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
