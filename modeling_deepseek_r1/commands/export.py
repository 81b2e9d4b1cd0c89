"""`deepseek-r1 export CHECKPOINT DESTINATION`: a checkpoint with its code beside the weights."""

import argparse

from ..conversion.export import export_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder with a checkpoint of this library")
    parser.add_argument("destination", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a destination that has files in it")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest size of one file of weights (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    report = export_checkpoint(args.checkpoint, args.destination, overwrite=args.overwrite, max_shard_size=args.max_shard_size)
    for note in report.notes:
        print(note)
    print(f"{report.destination}: {len(report.files)} files, {report.bytes / 1e6:.1f} MB")
    if report.left_out:
        print(f"left out, not part of a model: {', '.join(report.left_out)}")
    multimodal = "AutoProcessor" in report.auto_map
    names = "AutoModelForImageTextToText and AutoProcessor" if multimodal else "AutoModelForCausalLM and AutoTokenizer"
    print(f"load it anywhere with from_pretrained(folder, trust_remote_code=True) of {names}")
