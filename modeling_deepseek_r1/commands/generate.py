"""`deepseek-r1 generate`: continues or answers one prompt."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ._arguments import add_device_argument


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `generate` and `chat` have in common."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder or hub id")
    parser.add_argument("--system", metavar="TEXT", help="instructions before the conversation")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="tokens to generate at most (default: 256)"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 = always the likeliest token; default: as the checkpoint recommends"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens that make up P (0 ... 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the computation (default: float32)"
    )
    add_device_argument(parser)
    segment_help = "for texts longer than the model was trained for: in segments of so many tokens, half of which overlap"
    parser.add_argument("--segment-length", type=int, metavar="N", help=segment_help)
    memory_help = "hold at most so much of the experts in memory and read the others when needed, in the checkpoint's dtype"
    parser.add_argument("--expert-memory", type=float, metavar="MB", help=memory_help)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt; default: standard input")
    source.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="show the model a picture; may be repeated"
    )
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="show it a video; may be repeated")
    parser.add_argument("--audio", action="append", default=[], metavar="FILE", help="let it hear a sound; may be repeated")
    compile_help = "compile the decoding step first, which takes minutes and is worth it for thousands of tokens"
    parser.add_argument("--compile", action="store_true", help=compile_help)


def run(args: argparse.Namespace) -> None:
    """Prints the generated text as it comes.

    Raises:
        ValueError, OSError: no such checkpoint or file, an empty prompt, impossible options.
    """
    shown = [(kind, path) for kind in ("image", "video", "audio") for path in getattr(args, kind)]
    if args.compile and (args.expert_memory is not None or shown):
        raise ValueError("--compile is for texts, and for models that are in memory as a whole")
    prompt = _prompt(args)
    options = generation_options(args)
    model, tokenizer = load(args)
    from transformers import TextStreamer

    from ..tokenization import encode_prompt

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if args.segment_length is not None:
        options["past_key_values"] = new_cache(args, model)
    if shown:
        model.generate(**_joined_inputs(args, shown, prompt).to(model.device), streamer=streamer, **options)
        return
    ids = encode_prompt(tokenizer, prompt, system=args.system, raw=args.raw).to(model.device)
    if args.compile:
        from ..generation.compiled import compiled_decoding

        options |= compiled_decoding(ids.shape[1] + args.max_new_tokens, model.device)
    model.generate(ids, attention_mask=ids.new_ones(ids.shape), streamer=streamer, **options)
    if args.expert_memory is not None:
        share = model.expert_cache.statistics.hit_rate
        print(f"experts that were in memory when they were needed: {share:.1%}", file=sys.stderr)


def _joined_inputs(args: argparse.Namespace, shown: list[tuple[str, str]], prompt: str):
    """What the checkpoint's processor makes of files of these kinds and the prompt behind them."""
    from transformers import AutoConfig, AutoProcessor

    if AutoConfig.from_pretrained(args.checkpoint).model_type != "deepseek_r1":
        raise ValueError(f"{args.checkpoint} is a text model; join it with encoders first: deepseek-r1 compose")
    if args.raw:
        raise ValueError("--image, --video and --audio belong to a message; leave out --raw")
    content = [{"type": kind, "path": path} for kind, path in shown]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    messages = ([{"role": "system", "content": args.system}] if args.system else []) + messages
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)


def load(args: argparse.Namespace):
    """Model and tokenizer of `args.checkpoint`, with the random seed set; weights are packed unless they are to be compiled."""
    import torch

    from ..evaluation.loading import DTYPES, load_model, load_tokenizer
    from ..generation import pack_weights

    torch.manual_seed(args.seed)
    if args.expert_memory is not None:
        from ..moe.offload import offload_experts

        if args.device not in (None, "cpu"):
            raise ValueError(f"--expert-memory computes on the CPU; leave out --device {args.device}")
        return offload_experts(args.checkpoint, int(args.expert_memory * 1e6)), load_tokenizer(args.checkpoint)
    model = load_model(args.checkpoint, DTYPES[args.dtype], args.device)
    if not getattr(args, "compile", False):
        pack_weights(model)
    return model, load_tokenizer(args.checkpoint)


def new_cache(args: argparse.Namespace, model):
    """An empty cache for `--segment-length`; ValueError if segments of that length do not fit the model."""
    from ..generation import SegmentedCache

    return SegmentedCache(model.config, args.segment_length)


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `generate()`; what is not given is left to the checkpoint.

    Raises:
        ValueError: a value that means nothing.
    """
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} must be at least 1")
    if args.temperature is not None and args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature} must be 0 (greedy) or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p} must lie in (0, 1]")
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature == 0:
        return {**options, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    given = {name: value for name, value in sampling.items() if value is not None}
    return {**options, **given, **({"do_sample": True} if given else {})}


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt_file:
        return Path(args.prompt_file).read_text(encoding="utf-8")
    return sys.stdin.read() if args.prompt is None else args.prompt
