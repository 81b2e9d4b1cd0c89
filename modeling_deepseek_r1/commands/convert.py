"""`deepseek-r1 convert`: command line of `conversion.convert_checkpoint` and `conversion.to_dense`."""

import argparse
import json

from ..configuration.presets import LAYER_LETTERS, PRESETS
from ._arguments import domain_files, domain_text

PATTERN_ARGUMENTS = (
    "preset",
    "layer_types",
    "sliding_window",
    "num_sink_tokens",
    "num_clusters",
    "global_stride",
    "num_memory_tokens",
    "context_length",
    "gguf_file",
)
EXPERT_ARGUMENTS = {
    "experts": "num_experts",
    "expert_topology": "expert_topology",
    "experts_per_token": "num_experts_per_tok",
    "expert_rank": "expert_rank",
    "expert_layers": "expert_layers",
    "domains": "domain_texts",
}
"""Option -> argument of `convert_checkpoint`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    letters = ", ".join(f"{letter} = {name}" for letter, name in LAYER_LETTERS.items())
    presets = sorted(name for name, fields in PRESETS.items() if "shape" not in fields)
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, hub id or .gguf file")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to be made; it appears only when it is complete")
    pattern = parser.add_argument_group("attention pattern (default: the source's own, which computes the same function)")
    pattern.add_argument("--preset", choices=presets, help="named pattern; the arguments below win over it")
    pattern.add_argument(
        "--layer-types",
        metavar="PATTERN",
        help=f"letters that repeat over the layers, e.g. SSSF; {letters}; or auto: try and choose",
    )
    pattern.add_argument(
        "--sliding-window", type=int, metavar="N", help="tokens that a sliding layer sees, the current one included"
    )
    pattern.add_argument(
        "--num-sink-tokens", type=int, metavar="N", help="first tokens of a document that sliding layers see besides"
    )
    pattern.add_argument(
        "--num-clusters",
        type=int,
        metavar="N",
        help="centroids per key/value head of routed layers (default: one per 128 tokens)",
    )
    pattern.add_argument(
        "--global-stride",
        type=int,
        metavar="N",
        help="local_global layers see the last of every N tokens beyond the window (default: 64)",
    )
    pattern.add_argument(
        "--num-memory-tokens",
        type=int,
        metavar="N",
        help="learned keys and values of local_global layers, for training to fill (default: 0)",
    )
    pattern.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="tokens that routed layers are meant for (default: the source's, at most 8192)",
    )
    calibration = parser.add_argument_group("calibration of routed layers")
    calibration.add_argument(
        "--calibration",
        nargs="+",
        metavar="FILE",
        help="UTF-8 texts to fit the centroids of routed layers to (default: prose and code of Python's own library)",
    )
    calibration.add_argument(
        "--max-increase", type=float, metavar="X", help="with auto: how much the perplexity may rise (default: 0.03)"
    )
    calibration.add_argument(
        "--max-cost", type=float, metavar="X", help="with auto: share of full attention's products that it may cost, e.g. 0.4"
    )
    _add_expert_arguments(parser)
    parser.add_argument("--gguf-file", metavar="F", help="name of the GGUF file inside SOURCE")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the written weights (default: as stored; float32 for a quantised GGUF file)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and report; read no weights, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is at DESTINATION")
    parser.add_argument(
        "--to-dense",
        action="store_true",
        help="the way back: write a converted checkpoint in the layout of the family it came from",
    )
    parser.add_argument(
        "--allow-pattern-change",
        action="store_true",
        help="with --to-dense: drop a pattern that no family has (same weights, another function)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_expert_arguments(parser: argparse.ArgumentParser) -> None:
    experts = parser.add_argument_group("experts made of the MLPs of a dense source (the same function at first)")
    experts.add_argument("--experts", type=int, metavar="N", help="experts of a layer, copies of its MLP unless --expert-rank")
    experts.add_argument(
        "--expert-topology",
        nargs="+",
        type=_stage,
        metavar="DOMAIN=N,...",
        help="experts of each domain, e.g. text=6,code=2; several such groups are stages from the first layers to the last",
    )
    experts.add_argument("--experts-per-token", type=int, metavar="N", help="experts that a token gets (default: 2)")
    experts.add_argument(
        "--expert-rank", type=int, metavar="R", help="share each layer's MLP and give every expert a delta of this rank"
    )
    experts.add_argument(
        "--expert-layers",
        type=_layers,
        metavar="PATTERN",
        help="letters that repeat over the layers, D = dense, E = experts, or numbers such as 3,7,11 (default: DE)",
    )
    experts.add_argument(
        "--domains",
        nargs="+",
        type=domain_text,
        metavar="DOMAIN=FILE",
        help="UTF-8 texts (or prose, code: the built-in ones) by which the router tells domains apart; a domain may have several."
        " Without --expert-topology, all domains get equally many experts",
    )


def _stage(value: str) -> dict[str, int]:
    counts = {}
    for part in value.split(","):
        domain, equals, count = part.partition("=")
        if not (domain and equals and count.isdecimal()) or domain in counts:
            raise argparse.ArgumentTypeError(f"{value!r} is not DOMAIN=N,DOMAIN=N,... with every domain once")
        counts[domain] = int(count)
    return counts


def _layers(value: str) -> str | list[int]:
    numbers = value.split(",")
    return [int(number) for number in numbers] if all(number.isdecimal() for number in numbers) else value


def _expert_arguments(args: argparse.Namespace) -> dict[str, object]:
    """What is given, by option."""
    given = {name: getattr(args, name) for name in EXPERT_ARGUMENTS if getattr(args, name) is not None}
    if args.domains:
        given["domains"] = domain_files(args.domains)
    return given


def run(args: argparse.Namespace) -> None:
    """Converts, and prints the report on stdout.

    Raises:
        ValueError, OSError, ImportError: as `convert_checkpoint` and `to_dense`; arguments that exclude each other.
    """
    from ..conversion import Calibration, convert_checkpoint, to_dense

    budget = {"max_increase": args.max_increase, "max_cost": args.max_cost}
    budget = {name: value for name, value in budget.items() if value is not None}
    if budget and args.layer_types != "auto":
        raise ValueError(f"--{next(iter(budget)).replace('_', '-')} belongs to --layer-types auto")
    common = {"dtype": args.dtype, "dry_run": args.dry_run, "overwrite": args.overwrite}
    given = {name: getattr(args, name) for name in PATTERN_ARGUMENTS if getattr(args, name) is not None}
    if args.calibration or budget:
        texts = {"texts": tuple(args.calibration)} if args.calibration else {}
        given["calibration"] = Calibration(**texts, **budget)
    experts = _expert_arguments(args)
    if args.to_dense:
        if given or experts:
            names = ", ".join("--" + name.replace("_", "-") for name in [*given, *experts])
            raise ValueError(f"{names}: not with --to-dense, which keeps the checkpoint's pattern or drops it")
        report = to_dense(args.source, args.destination, allow_pattern_change=args.allow_pattern_change, **common)
    elif args.allow_pattern_change:
        raise ValueError("--allow-pattern-change belongs to --to-dense")
    else:
        given |= {EXPERT_ARGUMENTS[name]: value for name, value in experts.items()}
        report = convert_checkpoint(args.source, args.destination, **given, **common)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report.summary())
