"""One document of twice the trained length, read by SmolLM2-135M in every way that this library has for it: perplexity and time.

python scripts/benchmark_long_documents.py [VARIANT ...]    writes results/smollm2_long_documents.json

Variants that the file has are not measured again unless they are named, so that an interrupted run goes on. The segments of the
piecewise rotation are chosen on another text. Times are CPU seconds of one thread, which work beside it does not change much.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from benchmark_model import HELD_OUT, converted
from demo import packaged_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.evaluation import FORMAT_VERSION, encode_text, environment, load_tokenizer, read_text, write_report
from modeling_deepseek_r1.evaluation.scoring import hidden_states, token_nll
from modeling_deepseek_r1.generation import SegmentedCache

TRAINED, BASE, BLOCK = 8192, 100000.0, 512
OUTPUT = Path("results/smollm2_long_documents.json")
DENSE = Path(".cache/benchmark/dense")
CANDIDATES = [[[0, BASE], [start, base]] for start in (TRAINED // 2, TRAINED) for base in (3e5, 1e6)]
"""Segments of positions that are tried."""

VARIANTS = {
    "yarn": {"rope": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": TRAINED}},
    "segments": {"overlap": 4096, "reset_positions": True},
    "dynamic": {"rope": {"rope_type": "dynamic", "factor": 1.0}},
    "plain": {},
    "segments, positions go on": {"overlap": 4096, "reset_positions": False},
    "piecewise": {"rope": {"rope_type": "piecewise_linear"}},
    "dynamic, factor 2": {"rope": {"rope_type": "dynamic", "factor": 2.0}},
    "segments, overlap 6,144": {"overlap": 6144, "reset_positions": True},
    "balanced": {"pattern": "balanced"},
    "balanced, segments": {"pattern": "balanced", "overlap": 4096, "reset_positions": True},
}
"""Label -> rotation, or what is carried over from segment to segment; all but `pattern` are the dense model."""
SCALED = ("yarn", "dynamic", "dynamic, factor 2")


def load(pattern: str | None, rope: dict | None):
    """The dense model, or the converted one of `benchmark_model.py`, with another rotation."""
    if pattern is None and not DENSE.exists():
        print(convert_checkpoint(packaged_checkpoint(), DENSE).summary(), flush=True)
    folder = DENSE if pattern is None else converted(pattern)
    fields = AutoConfig.from_pretrained(folder).to_dict()
    if rope is not None:
        fields["rope_parameters"] = rope if "segments" in rope else {**rope, "rope_theta": BASE}
        # yarn wants to know the length to reach; dynamic scaling begins beyond the trained one.
        fields["max_position_embeddings"] = TRAINED * 2 if rope["rope_type"] == "yarn" else TRAINED
    model = AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.for_model(**fields), dtype=torch.float32)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def read(model, ids: torch.Tensor, cache) -> tuple[torch.Tensor, dict[str, float]]:
    """Losses `[tokens - 1]`, and what reading took (the head not included)."""
    clock, cpu = time.perf_counter(), time.process_time()
    hidden, _ = hidden_states(model, ids[None], cache, use_cache=True)
    taken = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - clock}
    return token_nll(model, hidden[:, :-1], ids[None, 1:])[0], taken


def perplexity(losses: torch.Tensor) -> float:
    return math.exp(losses.double().mean())


def choose_segments(result: dict, text: str, tokens: int, save) -> list:
    """The candidate with the lowest perplexity beyond the trained length, on another text."""
    tried = result.setdefault("search", {"text": text, "tokens": tokens, "candidates": []})["candidates"]
    ids = encode_text(load_tokenizer(DENSE), read_text([text]))[:tokens]
    for segments in CANDIDATES[len(tried) :]:
        losses, _ = read(load(None, {"rope_type": "piecewise_linear", "segments": segments}), ids, DynamicCache())
        tried.append({"segments": segments, "perplexity": perplexity(losses[TRAINED - 1 :])})
        print(tried[-1], flush=True)
        save()
    return min(tried, key=lambda cell: cell["perplexity"])["segments"]


def measure(label: str, ids: torch.Tensor, segments: list | None) -> dict:
    variant = VARIANTS[label]
    rope = {**variant["rope"], "segments": segments} if label == "piecewise" else variant.get("rope")
    model, cache = load(variant.get("pattern"), rope), DynamicCache()
    if "overlap" in variant:
        cache = SegmentedCache(model.config, TRAINED, variant["overlap"], reset_positions=variant["reset_positions"])
    losses, taken = read(model, ids, cache)
    beyond = losses[TRAINED - 1 :]
    blocks = [block.mean().item() for block in beyond.split(BLOCK)]
    found = {**taken, "perplexity": perplexity(losses), "beyond": perplexity(beyond), "last": perplexity(losses[-4096:])}
    print(f"{label}: {', '.join(f'{name} {value:.3f}' for name, value in found.items())}", flush=True)
    return {**found, "block_losses_beyond": blocks, "rope_parameters": rope}


def table(result: dict) -> str:
    """Rows: ways to read a document of twice the trained length; columns: perplexity, and time beside plain reading."""
    cells, settings = result["variants"], result["settings"]
    scaled = min((label for label in SCALED if label in cells), key=lambda x: cells[x]["beyond"])
    lines = [f"| | perplexity | beyond token {settings['trained']:,} | beside `{scaled}` there | last 4,096 | time |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for label, cell in cells.items():
        pairs = zip(cell["block_losses_beyond"], cells[scaled]["block_losses_beyond"], strict=True)
        differences = [one - other for one, other in pairs]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        beside = f"{cell['beyond'] / cells[scaled]['beyond'] - 1:+.1%} ± {error:.1%}" if label != scaled else ""
        beside = beside if not label.startswith("balanced") else ""
        time = f"{cell['cpu_seconds']:.0f} s · {cell['cpu_seconds'] / cells[scaled]['cpu_seconds']:.2f}x"
        lines.append(f"| {label} | {cell['perplexity']:.2f} | {cell['beyond']:.2f} | {beside} | {cell['last']:.2f} | {time} |")
    segments = cells.get("piecewise", {}).get("rope_parameters", {}).get("segments")
    return "\n".join(lines) + (
        f"\n\nOne document of {settings['tokens']:,} tokens, read at once; the error is that of blocks of {settings['block']} tokens of"
        f" it. Time: CPU seconds of one thread. Yarn: factor 2. Segments of 8,192 tokens, of which 4,096 overlap, positions reset.{f' Piecewise: {segments}, chosen on another text.' if segments else ''}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)} (default: those that are missing)"
    )
    parser.add_argument("--tokens", type=int, default=2 * TRAINED, help="of the document (default: %(default)s)")
    parser.add_argument("--search-tokens", type=int, default=TRAINED * 3 // 2, help="of the other text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"unknown variants {sorted(unknown)}; choose of {list(VARIANTS)}")
    torch.set_num_threads(args.threads)
    result = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"variants": {}}
    settings = {"text": "prose", "skip_tokens": HELD_OUT, "tokens": args.tokens, "trained": TRAINED, "block": BLOCK}
    result |= {"format_version": FORMAT_VERSION, "environment": environment(), "settings": settings}

    def save() -> None:
        write_report(result, OUTPUT)

    for label in args.variants or [label for label in VARIANTS if label not in result["variants"]]:
        segments = None
        if label == "piecewise":
            segments = choose_segments(result, "code", args.search_tokens, save)
        load(None, None)
        ids = encode_text(load_tokenizer(DENSE), read_text(["prose"]))[HELD_OUT:][: args.tokens]
        result["variants"][label] = measure(label, ids, segments)
        save()


if __name__ == "__main__":
    main()
