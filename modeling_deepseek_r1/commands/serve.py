"""`deepseek-r1 serve`: a checkpoint behind OpenAI's HTTP API."""

import argparse
import os
import sys
from pathlib import Path

from ._arguments import add_device_argument

KEY = "DEEPSEEK_R1_API_KEY"
TEXT_BODY, MEDIA_BODY = 2 * 2**20, 16 * 2**20
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder or hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 ... 65535; 0 = any free one (default: %(default)s)")
    parser.add_argument("--name", help="what clients call the model (default: the checkpoint's name)")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help=f"key that clients must send; default: the variable {KEY}, else no key"
    )
    parser.add_argument(
        "--rows", type=int, default=16, metavar="N", help="texts that grow at the same time (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", type=int, default=64, metavar="N", help="prompts that may wait for a row (default: %(default)s)"
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer (default: the checkpoint's)")
    parser.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="rows times the longest of them, at most; bounds memory (default: no limit)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="of an answer whose request does not say (default: %(default)s)",
    )
    parser.add_argument(
        "--max-body",
        type=int,
        metavar="BYTES",
        help=f"of a request (default: {TEXT_BODY}; {MEDIA_BODY} where the model sees or hears)",
    )
    parser.add_argument(
        "--max-media", type=int, default=16, metavar="N", help="images and clips of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=2**24, metavar="N", help="of all images of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=300, metavar="N", help="of all clips of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--canary", metavar="CHECKPOINT", help="a candidate that answers a share of the requests; its name: --name and -canary"
    )
    parser.add_argument(
        "--canary-share",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="0 ... 1, the same users each time; 0 = only who asks for it by name (default: %(default)s)",
    )
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="of a request (default: %(default)s)")
    parser.add_argument(
        "--grace", type=float, default=30, metavar="SECONDS", help="for running requests on SIGTERM (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the computation (default: float32)"
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        ValueError, OSError: no such checkpoint or key file, limits that allow nothing.
        ImportError: the extra `serve` is not installed.
    """
    for name in ("max_tokens", "max_body", "max_media", "max_pixels", "max_seconds", "timeout", "grace"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name):g} must be more than 0")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port {args.port} must lie in 0 ... 65535")
    if not 0 <= args.canary_share <= 1:
        raise ValueError(f"--canary-share {args.canary_share:g} must lie in 0 ... 1")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads} must be at least 1")
    key = api_key(args.api_key_file)
    if args.host not in LOOPBACK and key is None:
        print(f"deepseek-r1 serve: warning: {args.host} is open to others and there is no API key", file=sys.stderr)

    import torch
    import transformers

    from ..serving import Canary, MediaLimits, Settings, create_app, serve

    transformers.logging.set_verbosity_error()  # its advice is for a caller of generate(), and would come with every request
    if args.threads:
        torch.set_num_threads(args.threads)
    media = MediaLimits(args.max_media, args.max_pixels, args.max_seconds)
    stable = _version(args, args.checkpoint, args.name or Path(args.checkpoint).name, media)
    canary = None
    if args.canary is not None:
        canary = Canary(_version(args, args.canary, f"{stable.name}-canary", media), args.canary_share)
    settings = Settings(
        api_key=key,
        max_tokens=args.max_tokens,
        max_body=args.max_body or (MEDIA_BODY if stable.modalities else TEXT_BODY),
        timeout=args.timeout,
    )
    serve(create_app(stable, settings, canary), host=args.host, port=args.port, grace=args.grace)


def _version(args: argparse.Namespace, checkpoint: str, name: str, media):
    """A checkpoint as one that answers."""
    from transformers import AutoProcessor

    from ..evaluation.loading import DTYPES, load_model, load_tokenizer
    from ..generation import pack_weights
    from ..serving import Engine, Version

    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, DTYPES[args.dtype], args.device)
    pack_weights(model)
    processor = AutoProcessor.from_pretrained(checkpoint) if model.config.model_type == "deepseek_r1" else None
    engine = Engine(model, rows=args.rows, queue=args.queue, context=args.context, cache_tokens=args.cache_tokens)
    return Version(name, engine, tokenizer, processor, media)


def api_key(file: str | None) -> str | None:
    """The key of a file or of the environment. ValueError where the file is empty."""
    if file is None:
        return os.environ.get(KEY) or None
    key = Path(file).read_text(encoding="utf-8").strip()
    if not key:
        raise ValueError(f"{file} is empty; it must hold the API key")
    return key
