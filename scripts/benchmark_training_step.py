"""Times a training step of models with experts beside dense ones of equal active work, and measures what activation checkpointing
saves; writes results/experts_training_step.json.

python scripts/benchmark_training_step.py --threads 1

low-rank: SmolLM2-135M with 8 experts of rank 16, 2 per token, in the upper half; deltas and routers are trained. Beside it the
dense model with an adapter of rank 32 on the same MLPs.
copies: a smaller model with random weights and 8 experts of which 2 are active, beside one whose MLPs are as wide as two experts;
everything is trained.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict

import torch
from benchmark_finetuning import make_step
from benchmark_training import EXPERTS, MODELS
from demo import packaged_checkpoint
from torch import nn

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1TextConfig
from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.evaluation import FORMAT_VERSION, environment, load_model, write_report
from modeling_deepseek_r1.evaluation.attention_speed import in_turn
from modeling_deepseek_r1.evaluation.memory_probe import PeakMemory
from modeling_deepseek_r1.training import add_adapters

SMALL = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "tie_word_embeddings": True}
WIDTH = 768
"""Of an expert of the small model."""
ACTIVE = EXPERTS["num_experts_per_tok"]


def smollm2(kind: str) -> nn.Module:
    folder = MODELS / f"step_{kind}"
    if not folder.exists():
        print(convert_checkpoint(packaged_checkpoint(), folder, **(EXPERTS if kind == "experts" else {})).summary())
    model = load_model(folder)
    if kind == "experts":
        for name, weight in model.named_parameters():
            weight.requires_grad_("_proj_a" in name or "_proj_b" in name or ".mlp.router." in name)
        return model
    model = add_adapters(model, rank=ACTIVE * EXPERTS["expert_rank"], targets=["mlp"])[0]
    for name, weight in model.named_parameters():
        layer = name.split("layers.")[-1].split(".")[0]
        weight.requires_grad_("lora_" in name and int(layer) in EXPERTS["expert_layers"])
    return model


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    mlp = {"intermediate_size": ACTIVE * WIDTH}
    if kind == "experts":
        mlp |= {"moe_intermediate_size": WIDTH, "num_experts_per_tok": ACTIVE, "routing": {"expert_topology": [{"any": 8}]}}
    return DeepseekR1ForCausalLM(DeepseekR1TextConfig(**SMALL, **mlp))


PAIRS = {"low-rank": smollm2, "copies": small}


def pair(load: Callable[[str], nn.Module], ids: torch.Tensor, repeats: int) -> dict:
    """Seconds of a step of both models, taken in turn."""
    models = {kind: load(kind).train() for kind in ("dense", "experts")}
    steps = {kind: make_step(model, lambda: ids, 1e-4)[0] for kind, model in models.items()}
    taken = in_turn(steps, repeats)
    trained = {kind: sum(p.numel() for p in model.parameters() if p.requires_grad) for kind, model in models.items()}
    return {
        "seconds": {kind: asdict(time) for kind, time in taken.items()},
        "trained": trained,
        "ratio": asdict(taken["experts"].over(taken["dense"])),
    }


def checkpointing(load: Callable[[str], nn.Module], ids: torch.Tensor) -> dict[str, int]:
    """Peak bytes of forward and backward beyond weights, gradients and optimizer, without and with checkpointing."""
    peaks = {}
    for name in ("kept", "recomputed"):
        model = load("experts").train()
        if name == "recomputed":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for part in (ids[:, :32], ids):
            # A short pass makes the gradients; they stay allocated, as an optimizer would keep them.
            model.zero_grad(set_to_none=False)
            with PeakMemory() as peak:
                model(input_ids=part, labels=part, use_cache=False).loss.backward()
        peaks[name] = peak.extra_bytes
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each model (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="results/experts_training_step.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = torch.randint(8192, (args.batch_size, args.length), generator=torch.Generator().manual_seed(0))
    result = {}
    for name, load in PAIRS.items():
        result[name] = pair(load, ids, args.repeats) | {"peak_bytes": checkpointing(load, ids)}
        peaks = result[name]["peak_bytes"]
        saved = 1 - peaks["recomputed"] / peaks["kept"]
        print(f"{name}: a step takes {result[name]['ratio']['median']:.2f}x the dense one; checkpointing saves {saved:.0%}")
    settings = {name: getattr(args, name) for name in ("length", "batch_size", "repeats")}
    report = {"format_version": FORMAT_VERSION, "environment": environment(), "settings": settings, "models": result}
    write_report(report, args.output)


if __name__ == "__main__":
    main()
