"""`deepseek-r1 drift REFERENCE CANDIDATE --alarm NATS`: has a new version moved too far from the one that is served?"""

import argparse
from pathlib import Path

import torch

from ..evaluation import (
    DTYPES,
    FORMAT_VERSION,
    encode_text,
    environment,
    kl_drift,
    leading_token_id,
    read_text,
    text_digest,
    write_report,
)
from ..evaluation.text import BUILT_IN_TEXTS
from ._arguments import add_device_argument
from .evaluate import _load, _progress

CONTEXT = 12
"""Tokens shown before a place."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = " (default: %(default)s)"
    parser.add_argument("reference", metavar="REFERENCE", help="the checkpoint to compare with: folder, .gguf file or hub id")
    parser.add_argument("candidate", metavar="CANDIDATE", help="the checkpoint that is to take its place")
    built_in = " or ".join(BUILT_IN_TEXTS)
    text_help = f"UTF-8 text files such as users send, or {built_in} from Python's own library" + default
    parser.add_argument("--text", nargs="+", default=["prose"], metavar="FILE", help=text_help)
    parser.add_argument("--length", type=int, default=1024, metavar="TOKENS", help="tokens per window of text" + default)
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="windows of text" + default)
    parser.add_argument(
        "--alarm", type=float, metavar="NATS", help="fail (exit code 1) where the mean divergence per token is above it"
    )
    parser.add_argument("--worst", type=int, default=5, metavar="N", help="places to show, the furthest apart first" + default)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights" + default)
    add_device_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the result, with a histogram")


def run(args: argparse.Namespace) -> None:
    """Prints how far they are apart.

    Raises:
        ValueError: the alarm, after everything has been printed and written; or arguments that do not fit together.
        OSError: no such checkpoint or file.
    """
    _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    text = read_text(args.text)
    models, tokenizer = _load({"reference": args.reference, "candidate": args.candidate}, DTYPES[args.dtype], args.device)
    ids = encode_text(tokenizer, text)
    bos = leading_token_id(tokenizer)
    settings = {"context_length": args.length, "num_windows": args.windows, "worst": args.worst, "bos_token_id": bos}
    drift = kl_drift(models["reference"], models["candidate"], ids, **settings, on_progress=_progress("drift"))
    print(
        f"KL(reference || candidate): {drift.mean_kl:.4g} +- {drift.standard_error:.1g} nats per token over {drift.tokens} tokens;"
        f" median {drift.quantiles['0.5']:.2g}, 99 % below {drift.quantiles['0.99']:.2g}; the same likeliest token at"
        f" {drift.same_token:.2%}"
    )
    stride = args.length - (bos is not None)
    for place in drift.worst:
        end = place.window * stride + place.position + (bos is None)
        before, ours, theirs = (
            repr(tokenizer.decode(tokens))
            for tokens in (ids[max(0, end - CONTEXT) : end], [place.reference_token], [place.candidate_token])
        )
        print(f"  {place.kl:.3g} nats after {before}: {ours} -> {theirs}")
    if args.output is not None:
        read = {"text_sha256": text_digest(text), "reference": args.reference, "candidate": args.candidate, "alarm": args.alarm}
        report = {"format_version": FORMAT_VERSION, "environment": environment(models["reference"]), "settings": read}
        write_report({**report, "drift": drift.to_dict()}, args.output)
    if args.alarm is not None and not drift.mean_kl <= args.alarm:
        raise ValueError(f"alarm: {drift.mean_kl:.4g} nats per token are above {args.alarm:g}; do not serve {args.candidate}")


def _check(args: argparse.Namespace) -> None:
    for name, least in (("windows", 1), ("length", 2), ("worst", 0), ("threads", 1), ("alarm", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name} {value} must be {least} or more")
    if args.output is not None and not args.output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {args.output.parent} to write {args.output.name} into")
