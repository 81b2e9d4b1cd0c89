"""Times the experts of a sparse layer against a dense MLP and transformers' implementations; writes results/expert_layer.json.

python scripts/benchmark_experts.py --threads 1
python scripts/benchmark_experts.py --blocks --threads 1

With --blocks: whole blocks, routers included, of ours, Mixtral, Qwen3-MoE and DeepSeek-V3; writes results/expert_blocks.json.
"""

import argparse

import torch

from modeling_deepseek_r1.evaluation import FORMAT_VERSION, environment, write_report
from modeling_deepseek_r1.evaluation.block_speed import measure_blocks
from modeling_deepseek_r1.evaluation.expert_speed import IMPLEMENTATIONS, measure_experts
from modeling_deepseek_r1.evaluation.loading import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 512, 2048])
    parser.add_argument("--backward", nargs="*", type=int, default=[64, 512, 2048], help="numbers of tokens with backward")
    parser.add_argument("--hidden-size", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--expert-size", type=int, default=768, help="width of one expert (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--experts-per-token", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS), help="of transformers")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["float32"])
    parser.add_argument("--repeats", type=int, default=5, help="samples of each variant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--blocks", action="store_true", help="whole blocks of several families, in float32")
    parser.add_argument("--output", help="default: results/expert_layer.json or results/expert_blocks.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = {
        "hidden_size": args.hidden_size,
        "moe_intermediate_size": args.expert_size,
        "num_experts": args.experts,
        "num_experts_per_tok": args.experts_per_token,
    }
    settings = {"backward_tokens": args.backward, "implementations": args.implementations, "repeats": args.repeats, **sizes}
    if args.blocks:
        result = {**sizes, "cells": measure_blocks(args.tokens, **settings)}
    else:
        result = measure_experts(args.tokens, dtypes=[DTYPES[name] for name in args.dtypes], **settings)
    output = args.output or f"results/expert_{'blocks' if args.blocks else 'layer'}.json"
    write_report({"format_version": FORMAT_VERSION, "environment": environment(), **result}, output)
    if args.blocks:
        return
    for cell in result["cells"]:
        for what in ("forward", "forward_backward"):
            if cell[what]:
                ratios = ", ".join(f"{name} {x['median']:.2f}x" for name, x in cell[f"{what}_speedups"].items())
                seconds = cell[what]["ours"]["median"]
                print(f"{cell['dtype']} {cell['tokens']} tokens, {what}: {1000 * seconds:.2f} ms; time over ours: {ratios}")


if __name__ == "__main__":
    main()
