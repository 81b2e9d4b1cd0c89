"""Times one local, one global and one routed attention layer against `scaled_dot_product_attention`; writes results/attention_layer.json.

python scripts/benchmark_attention.py
"""

import argparse

import torch

from modeling_deepseek_r1.attention.pattern import AttentionPattern
from modeling_deepseek_r1.evaluation import FORMAT_VERSION, environment, write_report
from modeling_deepseek_r1.evaluation.attention_speed import measure_attention
from modeling_deepseek_r1.evaluation.loading import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [8192, 16384, 32768, 65536, 131072]
    default = " (default: %(default)s)"
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths, help="tokens" + default)
    parser.add_argument(
        "--compared",
        nargs="+",
        type=int,
        default=[16384, 32768],
        help="lengths with full attention, blocks and backward" + default,
    )
    parser.add_argument("--masked", nargs="+", type=int, default=[16384], help="lengths with a dense window mask" + default)
    parser.add_argument("--window", type=int, default=512, help="tokens" + default)
    parser.add_argument("--sinks", type=int, default=32, help="sink tokens" + default)
    parser.add_argument("--clusters", type=int, default=256, help="centroids per key/value head, 0 = no routed layer" + default)
    parser.add_argument("--routed-clusters", type=int, default=2, help="clusters that a query looks into" + default)
    parser.add_argument("--routed-tokens", type=int, default=256, help="keys that it sees in each at most" + default)
    parser.add_argument("--stride", type=int, default=64, help="distance of a global layer's nodes, 0 = none" + default)
    parser.add_argument("--memory", type=int, default=128, help="memory tokens of a global layer" + default)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=1, help="samples of each variant" + default)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads" + default)
    parser.add_argument("--device", default="cpu", help="such as cuda" + default)
    parser.add_argument("--output", default="results/attention_layer.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure_attention(
        args.lengths,
        AttentionPattern(args.window, args.sinks, args.routed_clusters, args.routed_tokens, args.stride),
        num_clusters=args.clusters or None,
        num_memory_tokens=args.memory,
        dtypes=[DTYPES[name] for name in args.dtypes],
        compared_lengths=args.compared,
        masked_lengths=args.masked,
        backward_lengths=args.compared,
        repeats=args.repeats,
        device=args.device,
    )
    write_report({"format_version": FORMAT_VERSION, "environment": environment(device=args.device), **result}, args.output)
    for cell in result["cells"]:
        for what in ("forward", "forward_backward"):
            times = ", ".join(f"{name} {taken['median']:.2f} s" for name, taken in cell[what].items())
            print(f"{cell['dtype']} {cell['length']} {what}: {times}")
    print("time exponents:", result["exponents"])


if __name__ == "__main__":
    main()
