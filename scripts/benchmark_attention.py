"""Times a local attention layer against `scaled_dot_product_attention` and writes results/attention_layer.json.

python scripts/benchmark_attention.py --threads 1
"""

import argparse

import torch

from modeling_deepseek_r1.attention.pattern import AttentionPattern
from modeling_deepseek_r1.evaluation import FORMAT_VERSION, environment, write_report
from modeling_deepseek_r1.evaluation.attention_speed import measure_attention
from modeling_deepseek_r1.evaluation.loading import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384, 32768, 65536], help="tokens")
    parser.add_argument(
        "--compared", nargs="+", type=int, default=[16384], help="lengths with full attention, backward and mask"
    )
    parser.add_argument("--window", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--sinks", type=int, default=0, help="sink tokens (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=2, help="samples of each variant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="results/attention_layer.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure_attention(
        args.lengths,
        AttentionPattern(args.window, args.sinks),
        dtypes=[DTYPES[name] for name in args.dtypes],
        compared_lengths=args.compared,
        masked_lengths=args.compared,
        backward_lengths=args.compared,
        repeats=args.repeats,
    )
    write_report({"format_version": FORMAT_VERSION, "environment": environment(), **result}, args.output)
    for cell in result["cells"]:
        forward, both = cell["forward_speedups"], cell["forward_backward_speedups"]
        shown = {f"forward, {name}": x["median"] for name, x in forward.items()}
        shown |= {f"forward + backward, {name}": x["median"] for name, x in both.items()}
        ratios = ", ".join(f"{name}: {value:.1f}x" for name, value in shown.items())
        seconds = cell["forward"]["local"]["median"]
        print(f"{cell['dtype']} {cell['length']}: {seconds:.3f} s, memory {cell['memory_over_output']:.2f} x output; {ratios}")
    print("time exponents:", result["exponents"])


if __name__ == "__main__":
    main()
