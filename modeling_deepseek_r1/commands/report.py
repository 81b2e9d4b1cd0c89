"""`deepseek-r1 report CHECKPOINT --text FILE --output page.html`: what a model does with a text, token by token."""

import argparse
from pathlib import Path

import torch

from ..evaluation import DTYPES, load_model, load_tokenizer, read_text
from ..evaluation.text import BUILT_IN_TEXTS
from ..inspection import inspect_text, render_page
from ..inspection.collect import DEFAULT_TOKENS
from ._arguments import add_device_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = " (default: %(default)s)"
    parser.add_argument("checkpoint", help="folder or hub id of a checkpoint of this library")
    built_in = " or ".join(BUILT_IN_TEXTS)
    text_help = f"UTF-8 text files, or {built_in} from Python's own library" + default
    parser.add_argument("--text", nargs="+", default=["prose"], metavar="FILE", help=text_help)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.html", help="the page to write")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, metavar="N", help="tokens of the text to read" + default)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights" + default)
    add_device_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")


def run(args: argparse.Namespace) -> None:
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads} must be 1 or more")
    if args.tokens < 2:
        raise ValueError(f"--tokens {args.tokens} must be 2 or more")
    if not args.output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {args.output.parent} to write {args.output.name} into")
    if args.threads:
        torch.set_num_threads(args.threads)
    text = read_text(args.text)
    tokenizer = load_tokenizer(args.checkpoint)
    model = load_model(args.checkpoint, DTYPES[args.dtype], args.device)
    inspection = inspect_text(model, tokenizer, text, tokens=args.tokens, name=Path(args.checkpoint).name)
    page = render_page(inspection)
    args.output.write_text(page, encoding="utf-8")
    print(f"{args.output}: {len(inspection.ids)} of {inspection.text_tokens} tokens, {len(page.encode()) / 1e6:.1f} MB")
