"""What it saves to let tokens have fewer experts, on SmolLM2-135M; writes results/dynamic_k.json.

python scripts/benchmark_dynamic_k.py            goes on where an earlier call was interrupted; MODELS holds what is done

"trained": the upper 15 layers have 8 experts, copies of the MLP trained for some steps on code and prose; a token has 2, or, with
thresholds, 1 or 2. "cut": the MLPs of all layers cut into groups of neurons that are active together (moe/split.py), not trained;
thresholds leave out what a router, fitted to the same text, thinks small. Measured on held-out text of both kinds in turn:
perplexity, mean number of active experts, and the time of the sparse blocks in a prefill, beside the same model with all of its
experts active, in turn; and the perplexity with a number of experts that is the same for every token.
"""

import argparse
import json
import math
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from demo import packaged_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
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
from modeling_deepseek_r1.training import Recipe, fit_thresholds, last_checkpoint, train_checkpoint

MODELS = Path(".cache/benchmark")
COPIES = {"num_experts": 8, "num_experts_per_tok": 2, "expert_layers": list(range(15, 30))}
TRAINING = {
    **{"length": 256, "packing": "concatenate", "batch_size": 1, "accumulation": 1, "save_steps": 100, "epochs": 9.0},
    **{"freeze": ["model.embed_tokens.*", "*norm*", "*.self_attn.*", "*_proj.weight"], "learning_rate": 2e-4},
}


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
        router.slots = model.config.num_experts_per_tok if number is None else number


def set_all(model, thresholds: list[torch.Tensor] | None) -> None:
    """Sets the thresholds; None = all experts are active."""
    for number, router in enumerate(model.model.routers):
        router.threshold.copy_(torch.zeros(()) if thresholds is None else thresholds[number])


def trained_copies(texts: dict[str, tuple[Path, Path]], steps: int):
    """The model whose experts are copies of the MLP, after so many steps, its thresholds at zero."""
    start, folder = MODELS / "two_domains_copies", MODELS / f"two_domains_copies_{steps}_steps"
    if not start.exists():
        domain_texts = {domain: str(own) for domain, (own, _) in texts.items()}
        print(convert_checkpoint(packaged_checkpoint(), start, **COPIES, domain_texts=domain_texts).summary(), flush=True)
    if not folder.exists():
        settings = {"model": str(start), "data": [str(MODELS / "two_domains" / "train.jsonl")], "output": str(folder)}
        recipe = Recipe().changed({**TRAINING, **settings, "max_steps": steps})
        resume = last_checkpoint(folder.with_name(f"{folder.name}-run")) is not None
        print(train_checkpoint(recipe, resume=resume).summary(), flush=True)
    config = AutoConfig.from_pretrained(folder)
    config.routing = config.routing | {"min_experts_per_tok": 1}
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def measure(model, beside: dict, held_out: torch.Tensor, repeats: int, before: float) -> dict:
    """The model with its present thresholds; `beside`: label -> another model whose blocks are timed in turn."""
    layers = [number for number in range(model.config.num_hidden_layers) if model.config.is_sparse(number)]
    thresholds = [router.threshold.clone() for router in model.model.routers]
    perplexity, active = quality(model, held_out)
    samples: dict[str, list[float]] = {label: [] for label in ("thresholds", "all", *beside)}
    for _ in range(repeats):
        for label in samples:
            set_all(model, thresholds if label == "thresholds" else None)
            samples[label].append(mlp_seconds(beside.get(label, model), held_out[:1], layers))
    seconds = {label: Measurement.of(values) for label, values in samples.items()}
    set_fixed(model, max(1, round(active)))
    fixed, fixed_active = quality(model, held_out)
    set_fixed(model, None)
    set_all(model, thresholds)
    of = model.config.num_experts_per_tok
    ratios = {f"over_{label}": vars(seconds["thresholds"].over(seconds[label])) for label in seconds if label != "thresholds"}
    cell = {"active": active, "of": of, "perplexity": perplexity, "increase": perplexity / before - 1, **ratios}
    cell |= {"seconds": vars(seconds["thresholds"]), "fixed": {"active": fixed_active, "increase": fixed / before - 1}}
    print(f"{active:.2f} of {of} experts ({active / of - 1:+.0%}): perplexity {cell['increase']:+.2%}, time of the sparse blocks "
          f"{ratios['over_all']['median'] - 1:+.0%}, {fixed_active:.0f} for every token {cell['fixed']['increase']:+.2%}", flush=True)  # fmt: skip
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ["trained", "cut"]
    parser.add_argument(
        "--models", nargs="+", choices=kinds, default=kinds, help="of which the result keeps others (default: all)"
    )
    parser.add_argument("--steps", type=int, default=200, help="of training (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="that an MLP is cut into (default: %(default)s)")
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.9, 0.8, 0.65, 0.5], help="of active experts")
    parser.add_argument("--fit-windows", type=int, default=8, help="windows to fit on (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of a window (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of the times (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="results/dynamic_k.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts, folder = write_domain_texts(MODELS / "two_domains"), MODELS / "two_domains_dense"
    if not folder.exists():
        print(convert_checkpoint(packaged_checkpoint(), folder).summary(), flush=True)
    tokenizer = load_tokenizer(folder)
    fitted = mixed(tokenizer, [own for own, _ in texts.values()], args.fit_windows, args.tokens)
    held_out = mixed(tokenizer, [aside for _, aside in texts.values()], args.windows, args.tokens)
    known = json.loads(Path(args.output).read_text())["models"] if Path(args.output).exists() else {}
    result = {"format_version": FORMAT_VERSION, "environment": environment(), "settings": vars(args), "models": known}
    for name in args.models:
        dense = load_model(folder) if name == "cut" else None
        model = split_mlps(dense, fitted, args.experts) if name == "cut" else trained_copies(texts, args.steps)
        print(name, flush=True)
        before, _ = quality(model, held_out)
        found = result["models"][name] = {"perplexity": before, "cells": []}
        for share in args.shares:
            if name == "cut":
                set_active_share(model, fitted[:2], share)
            elif share * model.config.num_experts_per_tok >= 1:
                fit_thresholds(model, fitted[:2], share * model.config.num_experts_per_tok)
            else:
                continue
            cell = measure(model, {"dense": dense} if dense is not None else {}, held_out, args.repeats, before)
            found["cells"].append({"share": share, **cell})
        del model, dense
        write_report(result, args.output)


if __name__ == "__main__":
    main()
