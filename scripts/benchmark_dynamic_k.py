"""What tokens may leave out of SmolLM2-135M's MLPs, cut into experts; writes results/dynamic_k.json.

python scripts/benchmark_dynamic_k.py

The MLPs are cut into groups of neurons that are active together (moe/split.py), fitted to code and prose. Measured on held-out text
of both in turn: perplexity, mean number of active experts, and the time of the sparse layers, with thresholds for several shares
of active experts, and, beside each, with the same number of experts for every token. Time is that of the sparse blocks in a
prefill, beside the same model with all experts active, in turn; `dense_seconds` is that of the MLPs that they were.
"""

import argparse
import math
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from demo import packaged_checkpoint
from two_domains import write_domain_texts

from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.evaluation import (
    FORMAT_VERSION,
    encode_text,
    environment,
    load_model,
    load_tokenizer,
    read_text,
    token_windows,
    write_report,
)
from modeling_deepseek_r1.evaluation.scoring import hidden_states, token_nll
from modeling_deepseek_r1.evaluation.speed import Measurement
from modeling_deepseek_r1.moe.split import set_active_share, split_mlps

MODELS = Path(".cache/benchmark")


def mixed(tokenizer, texts: list[Path], windows: int, tokens: int) -> torch.Tensor:
    """`[windows, tokens]`, the texts in turn."""
    size = {"context_length": tokens, "num_windows": windows // len(texts)}
    parts = [token_windows(encode_text(tokenizer, read_text([text])), **size) for text in texts]
    return torch.stack(parts, 1).flatten(0, 1)


@contextmanager
def timed(modules):
    """A list to which every forward of a module adds its seconds."""
    seconds, started = [], []
    hooks = [m.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())) for m in modules]
    hooks += [m.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - started.pop())) for m in modules]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def mlp_seconds(model, window: torch.Tensor, layers: list[int]) -> float:
    with torch.no_grad(), timed([model.model.layers[number].mlp for number in layers]) as seconds:
        model.model(window, use_cache=False)
    return sum(seconds)


@torch.no_grad()
def quality(model, windows: torch.Tensor) -> tuple[float, float | None]:
    """Perplexity, and the mean number of active experts."""
    active = []
    hooks = [r.register_forward_hook(lambda m, a, out: active.append((out.top_k_weights != 0).sum(-1).float().mean())) for r in model.model.routers]  # fmt: skip
    losses = []
    for window in windows.split(1):
        hidden, _ = hidden_states(model, window)
        losses.append(float(token_nll(model, hidden[:, :-1], window[:, 1:]).mean()))
    for hook in hooks:
        hook.remove()
    return math.exp(sum(losses) / len(losses)), float(torch.stack(active).mean()) if active else None


def set_fixed(model, number: int | None) -> None:
    """Lets every token have so many experts, or, with None, as many as the thresholds say."""
    for router in model.model.routers:
        router.minimum = 1 if number is None else number
        router.slots = router.scores.weight.shape[0] if number is None else number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=16, help="of each layer (default: %(default)s)")
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.9, 0.8, 0.65, 0.5], help="of active experts")
    parser.add_argument("--fit-windows", type=int, default=16, help="windows to fit on (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of a window (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of the times (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="results/dynamic_k.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts, folder = write_domain_texts(MODELS / "two_domains"), MODELS / "two_domains_dense"
    if not folder.exists():
        print(convert_checkpoint(packaged_checkpoint(), folder).summary(), flush=True)
    dense, tokenizer = load_model(folder), load_tokenizer(folder)
    fitted = mixed(tokenizer, [own for own, _ in texts.values()], args.fit_windows, args.tokens)
    held_out = mixed(tokenizer, [aside for _, aside in texts.values()], args.windows, args.tokens)
    split, layers = split_mlps(dense, fitted, args.experts), list(range(dense.config.num_hidden_layers))
    print("cut", flush=True)
    before, _ = quality(dense, held_out)
    cells = []
    for share in args.shares:
        by_layer = set_active_share(split, fitted[:2], share)
        thresholds = [router.threshold.clone() for router in split.model.routers]
        perplexity, active = quality(split, held_out)
        samples: dict[str, list[float]] = {"thresholds": [], "all": [], "dense": []}
        for _ in range(args.repeats):
            for name, model in (("thresholds", split), ("all", split), ("dense", dense)):
                for router, threshold in zip(split.model.routers, thresholds, strict=True):
                    router.threshold.copy_(threshold if name == "thresholds" else torch.zeros(()))
                samples[name].append(mlp_seconds(model, held_out[:1], layers))
        seconds = {name: Measurement.of(values) for name, values in samples.items()}
        set_fixed(split, max(1, round(active)))
        fixed, fixed_active = quality(split, held_out)
        set_fixed(split, None)
        cells.append({
            "share": share, "by_layer": by_layer, "active": active, "perplexity": perplexity, "increase": perplexity / before - 1,
            "seconds": vars(seconds["thresholds"]), "time_ratio": vars(seconds["thresholds"].over(seconds["all"])),
            "dense_ratio": vars(seconds["thresholds"].over(seconds["dense"])),
            "fixed": {"active": fixed_active, "perplexity": fixed, "increase": fixed / before - 1},
        })  # fmt: skip
        print(f"{active:.2f} of {args.experts} experts ({active / args.experts - 1:+.0%}): perplexity {perplexity / before - 1:+.2%}, "
              f"MoE time {cells[-1]['time_ratio']['median'] - 1:+.0%} ({cells[-1]['dense_ratio']['median']:.2f}x dense), "
              f"as many for every token {fixed / before - 1:+.2%}", flush=True)  # fmt: skip
    result = {"format_version": FORMAT_VERSION, "environment": environment(split), "settings": vars(args)}
    write_report({**result, "dense_perplexity": before, "cells": cells}, args.output)


if __name__ == "__main__":
    main()
