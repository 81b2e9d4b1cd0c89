"""`deepseek-r1 chat`: a conversation in the terminal."""

import argparse
import sys
from functools import partial

from .generate import add_model_arguments, generation_options, load, new_cache

HELP = "/reset starts anew, /exit or end of input ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.epilog = f"In the conversation: {HELP}."


def run(args: argparse.Namespace) -> None:
    """Reads a line, prints the answer as it comes, until the end of the input.

    Raises:
        ValueError, OSError: no such checkpoint, no chat template, impossible options.
    """
    options = generation_options(args)
    model, tokenizer = load(args)
    from transformers import TextStreamer

    from ..generation import Conversation

    system = [{"role": "system", "content": args.system}] if args.system else []
    make_cache = None
    if args.segment_length is not None:
        new_cache(args, model)  # refuses what is impossible before the first question
        make_cache = partial(new_cache, args, model)
    conversation = Conversation(model, tokenizer, options, system, make_cache)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            conversation.forget()
        elif line:
            conversation.say(line, streamer)
