"""Measures SmolLM2-135M, dense and with several attention patterns, in one run each, and writes results/smollm2_*.json.

python scripts/benchmark_model.py perplexity       4K and 8K tokens of text that no calibration has read
python scripts/benchmark_model.py windows          what windows, sink tokens and full layers are each worth, at 4K tokens
python scripts/benchmark_model.py retrieval        a planted fact in 4K and 8K tokens
python scripts/benchmark_model.py cost             prefill of 32K tokens, decoding after it; float32, or --dtype bfloat16
python scripts/benchmark_model.py local            the same and peak memory at 16K tokens, models without routed layers
python scripts/benchmark_model.py memory           peak memory of a prefill of 16K tokens
python scripts/benchmark_model.py generation       128 tokens after a prompt of 10,240
python scripts/benchmark_model.py decode           decoding after 1K and after 64K tokens, the routed model
python scripts/benchmark_model.py routing          what routed layers choose, beside most recent keys and mean blocks
python scripts/benchmark_model.py patterns         what `layer_types="auto"` has tried
"""

import argparse
import json
from pathlib import Path

import torch
from demo import packaged_checkpoint
from transformers import AutoConfig

from modeling_deepseek_r1.cli import main as command
from modeling_deepseek_r1.configuration import LAYER_LETTERS
from modeling_deepseek_r1.conversion import Calibration, convert_checkpoint
from modeling_deepseek_r1.evaluation import (
    FORMAT_VERSION,
    encode_text,
    environment,
    load_model,
    load_tokenizer,
    read_text,
    write_report,
)
from modeling_deepseek_r1.evaluation.routing import mean_statistics, routing_statistics

LOCAL = {"sliding_window": 512, "num_sink_tokens": 32}
VARIANTS = {
    "window": {"layer_types": "S", "sliding_window": 512, "num_sink_tokens": 0},
    "window + sinks": {"layer_types": "S", **LOCAL},
    "routed": {"layer_types": "R", **LOCAL},
    "balanced": {"preset": "balanced"},
    "high_accuracy": {"preset": "high_accuracy"},
    "half local": {"layer_types": "SF", **LOCAL},
    "auto": {"layer_types": "auto", "calibration": Calibration(tokens=8192, tried_tokens=2048)},
}
"""Label -> arguments of `convert_checkpoint`; centroids are fitted to its default texts."""

MODELS = Path(".cache/benchmark")
HELD_OUT = 20000
"""Calibration reads no further than this many tokens of each text."""

TASKS = {
    "perplexity": (
        ("window + sinks", "routed", "balanced", "high_accuracy"),
        *(["4096", "8192"], "--tasks", "perplexity", "--windows", "2", "--mean-blocks", "4", "8"),
    ),
    "windows": (("window", "window + sinks", "half local"), ["4096"], "--tasks", "perplexity", "--windows", "2"),
    "retrieval": (
        ("window + sinks", "balanced", "high_accuracy"),
        *(["4096", "8192"], "--tasks", "retrieval", "--planted", "1", "--questions", "3", "--depths", "0.1", "0.4", "0.7"),
    ),
    "cost": (("window + sinks", "routed", "balanced"), ["1024", "32768"], "--tasks", "speed", "--repeats", "1"),
    "local": (("window + sinks", "half local"), ["1024", "16384"], "--tasks", "speed", "memory", "--repeats", "1"),
    "memory": (("window + sinks", "routed", "balanced"), ["16384"], "--tasks", "memory"),
    "generation": (("routed", "balanced"), ["10240"], "--tasks", "speed", "--repeats", "1", "--decode-tokens", "128"),
}
"""Measurement -> variants, context lengths, and further arguments of `deepseek-r1 evaluate`."""


def converted(label: str) -> Path:
    """The checkpoint of a variant, converted when it is not there yet."""
    folder = MODELS / label.replace(" ", "_")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(convert_checkpoint(packaged_checkpoint(), folder, **VARIANTS[label]).summary())
    return folder


def evaluate(*arguments: str) -> None:
    """One `deepseek-r1 evaluate`."""
    code = command(["evaluate", *arguments])
    if code:
        raise SystemExit(code)


def routing(folder: Path) -> None:
    """Statistics of every routed layer at 8,192 tokens."""
    result = {"format_version": FORMAT_VERSION, "environment": environment(), "tokens": 8192, "models": {}}
    for label in ("routed", "balanced"):
        model, tokenizer = load_model(converted(label)), load_tokenizer(converted(label))
        ids = encode_text(tokenizer, read_text(["prose"]))[HELD_OUT:][:8192]
        rows = routing_statistics(model, torch.as_tensor(ids)[None], queries=64, top=64)
        result["models"][label] = {"mean": mean_statistics(rows), "layers": [vars(row) for row in rows]}
        print(label, result["models"][label]["mean"])
    write_report(result, folder / "smollm2_routing.json")


def patterns(folder: Path) -> None:
    """The patterns that the calibration of the variant "auto" has tried."""
    tried = json.loads((converted("auto") / "calibration.json").read_text())
    letters = {kind: letter for letter, kind in LAYER_LETTERS.items()}
    chosen = "".join(letters[kind] for kind in AutoConfig.from_pretrained(converted("auto")).layer_types)
    write_report(
        {"format_version": FORMAT_VERSION, "environment": environment(), "chosen": chosen, **tried},
        folder / "smollm2_patterns.json",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*TASKS, "decode", "routing", "patterns"])
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument(
        "--models", nargs="+", choices=list(VARIANTS), help="beside the dense one (default: those of the published tables)"
    )
    parser.add_argument("--lengths", nargs="+", help="context lengths in tokens")
    parser.add_argument("--folder", type=Path, default=Path("results"))
    args, more = parser.parse_known_args()
    name = f"smollm2_{args.what}_{args.dtype}" if args.what in ("cost", "local") else f"smollm2_{args.what}"
    common = ["--dtype", args.dtype, "--skip-tokens", str(HELD_OUT), "--output", str(args.folder / f"{name}.json"), *more]
    if args.what in ("routing", "patterns"):
        {"routing": routing, "patterns": patterns}[args.what](args.folder)
    elif args.what == "decode":
        labels, tasks = ["routed"], ["--tasks", "speed", "--repeats", "1", "--decode-tokens", "64"]
        folders = [str(converted(label)) for label in labels]
        lengths = args.lengths or ["1024", "65536"]
        evaluate(*folders, "--labels", *labels, *tasks, "--lengths", *lengths, *common)
    else:
        labels, lengths, *tasks = TASKS[args.what]
        labels = args.models or labels
        folders = [str(converted(label)) for label in labels]
        models = [str(packaged_checkpoint()), "--against", *folders, "--labels", "dense", *labels]
        evaluate(*models, *tasks, "--lengths", *(args.lengths or lengths), *common)


if __name__ == "__main__":
    main()
