"""Times the experts of a sparse layer against a dense MLP and transformers' implementations; writes results/expert_layer.json.

python scripts/benchmark_experts.py --threads 1
"""

import argparse

import torch

from modeling_deepseek_r1.evaluation import FORMAT_VERSION, environment, write_report
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
    parser.add_argument("--output", default="results/expert_layer.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure_experts(
        args.tokens,
        dtypes=[DTYPES[name] for name in args.dtypes],
        hidden_size=args.hidden_size,
        moe_intermediate_size=args.expert_size,
        num_experts=args.experts,
        num_experts_per_tok=args.experts_per_token,
        backward_tokens=args.backward,
        implementations=args.implementations,
        repeats=args.repeats,
    )
    write_report({"format_version": FORMAT_VERSION, "environment": environment(), **result}, args.output)
    for cell in result["cells"]:
        for what in ("forward", "forward_backward"):
            if cell[what]:
                ratios = ", ".join(f"{name} {x['median']:.2f}x" for name, x in cell[f"{what}_speedups"].items())
                seconds = cell[what]["ours"]["median"]
                print(f"{cell['dtype']} {cell['tokens']} tokens, {what}: {1000 * seconds:.2f} ms; time over ours: {ratios}")


if __name__ == "__main__":
    main()
