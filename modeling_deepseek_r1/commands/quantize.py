"""`deepseek-r1 quantize CHECKPOINT DESTINATION`: command line of `quantization.quantize_checkpoint`."""

import argparse
import json
import sys

from ..evaluation.text import BUILT_IN_TEXTS
from ..quantization import DeepseekR1QuantizationConfig
from ..quantization.formats import BITS
from ..quantization.quantizer import METHODS
from ..quantization.run import LENGTH, WINDOWS, quantize_checkpoint
from ._arguments import add_device_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = " (default: %(default)s)"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or hub id of a checkpoint of this library")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to be made; it appears only when it is complete")
    parser.add_argument("--bits", choices=tuple(BITS), default="8", help="of linear layers and experts" + default)
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="rtn",
        help="round to nearest; or, reading --text: compensate errors (gptq), scale inputs (awq)" + default,
    )
    built_in = " or ".join(BUILT_IN_TEXTS)
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"UTF-8 texts to calibrate on, or {built_in} from Python's own library",
    )
    parser.add_argument("--windows", type=int, default=WINDOWS, metavar="N", help="windows of the text to read" + default)
    parser.add_argument("--length", type=int, default=LENGTH, metavar="TOKENS", help="tokens of a window" + default)
    parser.add_argument("--group-size", type=int, metavar="N", help="with 4 bits: inputs that share a scale (default: 32)")
    parser.add_argument(
        "--embedding",
        choices=(*BITS, "none"),
        help="bits of embedding and head (default: those of the layers; none: they stay)",
    )
    parser.add_argument("--keep", nargs="+", default=[], metavar="MODULE", help="modules that stay as they are, by their names")
    add_device_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is at DESTINATION")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> None:
    """Quantizes, and prints the report on stdout.

    Raises:
        ValueError, OSError: as `quantize_checkpoint`.
    """
    bits = BITS[args.bits]
    embedding = {None: bits, "none": None}.get(args.embedding, BITS.get(args.embedding))
    config = DeepseekR1QuantizationConfig(bits, args.method, args.group_size, embedding, args.keep)
    report = quantize_checkpoint(
        args.checkpoint,
        args.destination,
        config,
        texts=args.text,
        num_windows=args.windows,
        length=args.length,
        overwrite=args.overwrite,
        device=args.device,
        on_progress=_progress,
    )
    print(json.dumps(report.to_dict(), indent=2) if args.json else report.summary())


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rlayer {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
