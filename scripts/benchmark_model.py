"""Measures SmolLM2-135M, dense and with several attention patterns, in one run each, and writes results/smollm2_*.json.

python scripts/benchmark_model.py quality          perplexity and retrieval at 1K and 4K tokens
python scripts/benchmark_model.py cost             time, decoding, cache and peak memory at 1K and 16K, float32
python scripts/benchmark_model.py cost --dtype bfloat16
"""

import argparse
from pathlib import Path

from demo import packaged_checkpoint

from modeling_deepseek_r1.cli import main as command
from modeling_deepseek_r1.conversion import convert_checkpoint

VARIANTS = {
    "window 512": {"layer_types": "S", "sliding_window": 512},
    "window 512 + 32 sinks": {"layer_types": "S", "sliding_window": 512, "num_sink_tokens": 32},
    "balanced (half full)": {"preset": "balanced"},
    "routed": {"layer_types": "R", "sliding_window": 512, "num_sink_tokens": 32},
    "half routed, half full": {"layer_types": "RF", "sliding_window": 512, "num_sink_tokens": 32},
}
MODELS = Path(".cache/benchmark")


def converted(label: str) -> Path:
    """The checkpoint of a variant, converted when it is not there yet."""
    folder = MODELS / label.replace(" ", "_")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert_checkpoint(packaged_checkpoint(), folder, **VARIANTS[label])
    return folder


def evaluate(labels: list[str], output: Path, *arguments: str) -> None:
    """One `deepseek-r1 evaluate` of transformers' Llama class ("dense") beside the variants."""
    code = command(
        [
            *("evaluate", str(packaged_checkpoint()), "--against", *(str(converted(label)) for label in labels)),
            *("--labels", "dense", *labels),
            *("--output", f"{output}.json", *arguments),
        ]
    )
    if code:
        raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["perplexity", "retrieval", "cost"])
    parser.add_argument("--dtype", default="float32", help="of the cost run (default: %(default)s)")
    parser.add_argument("--lengths", nargs="+", help="context lengths in tokens")
    parser.add_argument("--folder", type=Path, default=Path("results"))
    args, more = parser.parse_known_args()
    if args.what == "perplexity":
        lengths = args.lengths or ["1024", "4096"]
        tasks = ["--tasks", "perplexity", "--windows", "2"]
        evaluate(list(VARIANTS), args.folder / "smollm2_perplexity", *tasks, "--lengths", *lengths, *more)
    elif args.what == "retrieval":
        lengths = args.lengths or ["1024"]
        tasks = ["--tasks", "retrieval", "--questions", "4", "--depths", "0.1", "0.5", "0.9"]
        evaluate(list(VARIANTS), args.folder / "smollm2_retrieval", *tasks, "--lengths", *lengths, *more)
    else:
        lengths = args.lengths or ["1024", "16384"]
        tasks = ["--tasks", "speed", "memory", "--repeats", "1", "--dtype", args.dtype]
        labels = ["window 512 + 32 sinks", "balanced (half full)"]
        evaluate(labels, args.folder / f"smollm2_cost_{args.dtype}", *tasks, "--lengths", *lengths, *more)


if __name__ == "__main__":
    main()
