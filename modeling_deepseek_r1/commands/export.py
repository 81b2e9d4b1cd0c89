"""`deepseek-r1 export CHECKPOINT DESTINATION`: a checkpoint with its code beside the weights, or as a GGUF file."""

import argparse

from ..conversion.export import export_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder with a checkpoint of this library")
    parser.add_argument("destination", help="folder to write, or FILE.gguf for llama.cpp")
    parser.add_argument("--overwrite", action="store_true", help="replace a destination that has files in it")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest size of one file of weights (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="GGUF: of the matrices (default: as they are stored)"
    )
    pattern_help = "GGUF: write layers that do not see all tokens with full attention, which is another function"
    parser.add_argument("--allow-pattern-change", action="store_true", help=pattern_help)
    split_help = "GGUF: llama.cpp's name of the rule that splits text into words (default: recognised)"
    parser.add_argument("--split", metavar="NAME", help=split_help)


def run(args: argparse.Namespace) -> None:
    if args.destination.endswith(".gguf"):
        return _write_gguf(args)
    if args.dtype or args.split or args.allow_pattern_change:
        raise ValueError("--dtype, --split and --allow-pattern-change belong to a destination FILE.gguf")
    report = export_checkpoint(args.checkpoint, args.destination, overwrite=args.overwrite, max_shard_size=args.max_shard_size)
    for note in report.notes:
        print(note)
    print(f"{report.destination}: {len(report.files)} files, {report.bytes / 1e6:.1f} MB")
    if report.left_out:
        print(f"left out, not part of a model: {', '.join(report.left_out)}")
    multimodal = "AutoProcessor" in report.auto_map
    names = "AutoModelForImageTextToText and AutoProcessor" if multimodal else "AutoModelForCausalLM and AutoTokenizer"
    print(f"load it anywhere with from_pretrained(folder, trust_remote_code=True) of {names}")


def _write_gguf(args: argparse.Namespace) -> None:
    from ..conversion.gguf_target import to_gguf

    options = {"dtype": args.dtype, "allow_pattern_change": args.allow_pattern_change, "split": args.split}
    report = to_gguf(args.checkpoint, args.destination, overwrite=args.overwrite, **options)
    for warning in report.warnings:
        print(f"warning: {warning}")
    print(f"{report.path}: {report.tensors} tensors of {report.architecture}, {report.dtype}, {report.bytes / 1e6:.1f} MB")
