"""`deepseek-r1 train`: command line of `training.train_checkpoint`; its arguments are the settings of `training.Recipe`."""

import argparse
import json
import sys
from contextlib import redirect_stdout

GROUPS = {
    "data": ("task", "labels"),
    "training": ("epochs", "seed"),
    "what is trained, and how": ("dtype", "train_scales"),
    "healing": ("heal_from", "heal_window"),
    "log and checkpoints": ("log_steps", "arguments"),
}
"""Title of a group in `--help` -> its first and last setting."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..training.recipe import setting_fields

    settings = {name: (hint, default, metadata) for name, hint, default, metadata in setting_fields()}
    parser.add_argument("model", nargs="?", metavar="MODEL", help=settings["model"][2]["help"])
    parser.add_argument("data", nargs="*", metavar="DATA", default=None, help=settings["data"][2]["help"])
    parser.add_argument("--output", metavar="DIR", help=settings["output"][2]["help"])
    parser.add_argument("--recipe", metavar="FILE.yaml", help="settings from a file; those of the command line win over it")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was interrupted (folder DIR-run)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is at DIR, and an earlier run")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    names = list(settings)
    for title, (first, last) in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names[names.index(first) : names.index(last) + 1]:
            _add(group, name, *settings[name])


def _add(group, name: str, hint, default, metadata) -> None:
    from ..training.recipe import plain_type

    kind, choices = plain_type(hint)
    shown = " ".join(default) if isinstance(default, list) else default
    text = metadata["help"].replace("%", "%%") + ("" if shown in (None, "", {}, False) else f" (default: {shown})")
    options = {"metavar": metadata["metavar"]} if "metavar" in metadata else {}
    option = "--" + name.replace("_", "-")
    if kind is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif kind is dict:
        group.add_argument(option, nargs="+", type=_pairs if metadata.get("comma") else _pair, help=text, **options)
    elif kind is list:
        group.add_argument(option, nargs="+", help=text, **options)
    else:
        options = {"choices": choices} if choices else options
        group.add_argument(option, type=kind, help=text, **options)


def _pair(text: str) -> tuple[str, object]:
    """`name=value` with the value as YAML reads it."""
    import yaml

    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    return name, yaml.safe_load(value)


def _pairs(text: str) -> dict[str, object]:
    """`name=value,name=value`."""
    return dict(_pair(part) for part in text.split(",") if part)


def run(args: argparse.Namespace) -> None:
    """Trains, and prints the report on stdout.

    Raises:
        ValueError, OSError, ImportError: as `train_checkpoint`.
    """
    from ..training.recipe import Recipe, setting_fields
    from ..training.run import train_checkpoint

    recipe = Recipe.from_file(args.recipe) if args.recipe else Recipe()
    given = {name: getattr(args, name) for name, *_ in setting_fields() if getattr(args, name) not in (None, [])}
    if "lora_targets" in given:
        given["lora_targets"] = [part for target in given["lora_targets"] for part in target.split(",") if part]
    if "expert_config" in given:
        given["expert_config"] = {name: value for part in given["expert_config"] for name, value in part.items()}
    for name in {"arguments", "quantization_aware"} & given.keys():
        given[name] = {**getattr(recipe, name), **dict(given[name])}
    # transformers writes its log to stdout, which is the report's alone if a program reads it.
    with redirect_stdout(sys.stderr if args.json else sys.stdout):
        report = train_checkpoint(recipe.changed(given, "command line"), resume=args.resume, overwrite=args.overwrite)
    sys.stdout.flush()
    print(json.dumps({**vars(report), "history": None}, indent=2) if args.json else report.summary())
