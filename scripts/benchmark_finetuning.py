"""Measures fine-tuning of chosen experts beside PEFT's adapters on all of them; writes results/expert_finetuning.json.

Cost: one optimizer step, in turn in one process, of a mixture of experts with random weights, and of SmolLM2-135M whose MLPs
were made experts. Quality: SmolLM2 learns Python code; held-out code shows what it has learned, English what it has forgotten.

python scripts/benchmark_finetuning.py --threads 1
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from demo import packaged_checkpoint
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
LEARNING_RATES = {"all": 1e-3, "chosen": 1e-3, "chosen_full": 1e-4}
"""Variant -> learning rate: `all` experts by PEFT, `chosen` ones at the same rank, and these themselves."""
HELD_OUT = 40000
"""Tokens of the code that are trained on at most; what follows is held out, as is all of the English."""


def upcycled() -> Path:
    """SmolLM2 with eight copies of every fourth MLP, four of them for code; made when it is not there yet."""
    if not MODEL.exists():
        MODEL.parent.mkdir(parents=True, exist_ok=True)
        experts = {"expert_topology": {"text": 4, "code": 4}, "expert_layers": "DDDE"}
        texts = {"text": "prose", "code": "code"}
        print(convert_checkpoint(packaged_checkpoint(), MODEL, domain_texts=texts, **experts).summary())
    return MODEL


def prepared(variant: str, model: nn.Module, expert_config: dict[str, int], batches, rank: int) -> nn.Module:
    """The model with what the variant trains."""
    torch.manual_seed(0)
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
    for variant, rate in LEARNING_RATES.items():
        model = prepared(variant, load(), expert_config, [{"input_ids": ids}], args.rank)
        steps[variant], sizes[variant] = make_step(model, lambda: ids, rate)
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


def quality(variant: str, expert_config: dict[str, int], texts: dict[str, torch.Tensor], args) -> dict:
    """Perplexity on held-out code and on English, before the training and after it."""
    model = load_model(upcycled())
    rows = texts["code"][: min(HELD_OUT, len(texts["code"]) // 2)].unfold(0, args.length, args.length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).repeat(1 + args.steps * args.batch_size)
    turns = iter(order.split(args.batch_size))
    sample = [{"input_ids": rows[part]} for part in order[: len(rows)].split(args.batch_size)][:32]
    tests = {"code": texts["code"][HELD_OUT:], "english": texts["english"]}

    def measure() -> dict[str, float]:
        windows = {"context_length": 1024, "num_windows": args.windows}
        return {name: perplexity(model.eval(), ids, **windows).perplexity for name, ids in tests.items()}

    before = measure()
    trained = prepared(variant, model, expert_config, sample, args.rank)
    step, _ = make_step(trained, lambda: rows[next(turns)], LEARNING_RATES[variant])
    for _ in range(args.steps):
        step()
    model = trained
    return {"before": before, "after": measure()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16, help="of the low-rank deltas (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of the runs that show quality (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="of 1,024 tokens, to measure perplexity (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each variant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="results/expert_finetuning.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(upcycled())
    texts = {name: encode_text(tokenizer, read_text([kind])) for name, kind in {"code": "code", "english": "prose"}.items()}
    # Domain gates were fitted to the beginning of both texts.
    texts["english"] = texts["english"][HELD_OUT:]
    shape = args.batch_size, args.length

    def random_model() -> nn.Module:
        torch.manual_seed(0)
        return DeepseekR1ForCausalLM(DeepseekR1TextConfig(**RANDOM))

    random_ids = torch.randint(RANDOM["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    configs = {"random": {"text": 6, "code": 2}, "smollm2": {"code": 2}}
    code = texts["code"][: args.batch_size * args.length].view(shape)
    costs = {"random": cost(random_model, configs["random"], random_ids, args)}
    costs["smollm2"] = cost(lambda: load_model(upcycled()), configs["smollm2"], code, args)
    for name, variants in costs.items():
        for variant, cell in variants.items():
            print(
                f"{name} {variant}: {cell['seconds']['median']:.2f} s, {cell['seconds_ratio']['median']:.2f}x; {cell['bytes_ratio']:.2f}x"
            )
    runs = {}
    for variant in LEARNING_RATES if args.steps else ():
        runs[variant] = quality(variant, configs["smollm2"], texts, args)
        print(f"{variant}: {runs[variant]}")
    settings = {name: value for name, value in vars(args).items() if name != "output"} | {"expert_config": configs}
    result = {"format_version": FORMAT_VERSION, "environment": environment(), "settings": settings, "cost": costs}
    write_report({**result, "learning_rates": LEARNING_RATES, "quality": runs}, args.output)


if __name__ == "__main__":
    main()
