"""`deepseek-r1 evaluate CHECKPOINT [--against CHECKPOINT ...]`: quality, experts, speed and memory in one run."""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..evaluation import (
    DTYPES,
    FORMAT_VERSION,
    check_plot,
    encode_text,
    environment,
    leading_token_id,
    load_model,
    load_tokenizer,
    markdown_table,
    measure_domains,
    measure_memory,
    measure_speed,
    perplexity,
    plot,
    read_text,
    retrieval,
    text_digest,
    token_windows,
    write_report,
)
from ..evaluation.domains import expert_routers
from ..evaluation.expert_report import expert_table, heat_map
from ..evaluation.mean_blocks import use_mean_blocks
from ..evaluation.retrieval import PROMPTS
from ..evaluation.scoring import model_context_limit
from ..evaluation.text import BUILT_IN_TEXTS
from ._arguments import add_device_argument, domain_files, domain_text

TASKS = ("perplexity", "retrieval", "domains", "speed", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = " (default: %(default)s)"
    parser.add_argument("checkpoint", help="folder, .gguf file or hub id of a causal language model; ratios are taken to it")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="CHECKPOINT", help="further models to compare with the first"
    )
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="names of all models (default: their folders' names)")
    built_in = " or ".join(BUILT_IN_TEXTS)
    text_help = f"UTF-8 text files, or {built_in} from Python's own library" + default
    parser.add_argument("--text", nargs="+", default=["prose"], metavar="FILE", help=text_help)
    parser.add_argument(
        "--skip-tokens",
        type=int,
        default=0,
        metavar="N",
        help="leave out the beginning of the text, which a calibration may have read; not for retrieval" + default,
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=["perplexity", "speed", "memory"], help="what to measure" + default
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[1024, 4096], metavar="TOKENS", help="context lengths in tokens" + default
    )
    parser.add_argument(
        "--windows", type=int, default=4, metavar="N", help="windows of text per length for perplexity" + default
    )
    parser.add_argument(
        "--domains",
        nargs="+",
        type=domain_text,
        default=[(name, name) for name in ("code", "prose")],
        metavar="DOMAIN=FILE",
        help="domains: UTF-8 texts of the domains, or the built-in ones; --windows of the longest of --lengths are read of each"
        " (default: code=code prose=prose)",
    )
    parser.add_argument(
        "--heat-map", type=Path, metavar="FILE.png", help="domains: draw which experts of which layers each domain uses"
    )
    parser.add_argument(
        "--score-from", type=int, default=0, metavar="TOKEN", help="score only later tokens of a window" + default
    )
    parser.add_argument(
        "--questions", type=int, default=4, metavar="N", help="retrieval: questions per length and depth" + default
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=[0.1, 0.3, 0.5, 0.7, 0.9],
        metavar="SHARE",
        help="retrieval: where in the text the fact lies, from 0 to 1" + default,
    )
    parser.add_argument(
        "--planted",
        type=int,
        default=5,
        metavar="N",
        help="retrieval: facts in the text, of which one is asked for; 1 = nothing like it to confuse it with" + default,
    )
    parser.add_argument(
        "--mean-blocks",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="compare also with the first model under a window of 512, 32 sink tokens and the N blocks of 64 keys with the best"
        " mean (needs a model of transformers itself; not for memory)",
    )
    parser.add_argument("--prompt", choices=PROMPTS, default="completion", help="retrieval: form of the question" + default)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="speed: runs per model and length" + default)
    parser.add_argument("--decode-tokens", type=int, default=16, metavar="N", help="speed: tokens decoded per run" + default)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights" + default)
    add_device_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of planted facts and of random prompts" + default)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write every sample and the circumstances")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the table that is printed")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help='draw the result, needs "modeling-deepseek-r1[plot]"')


def run(args: argparse.Namespace) -> None:
    # Before hours of work, not after.
    _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    text = read_text(args.text)
    checkpoints = _label([args.checkpoint, *args.against], args.labels)
    models, tokenizer = _load(checkpoints, DTYPES[args.dtype], args.device)
    for blocks in args.mean_blocks:
        models[f"{blocks} mean blocks"] = _with_mean_blocks(models, blocks)
    input_ids = encode_text(tokenizer, text)[args.skip_tokens :]
    _check_models(args, models, input_ids.numel())
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "environment": environment(next(iter(models.values()))),
        "settings": {
            **{name: value for name, value in vars(args).items() if name in _SETTINGS},
            "text_sha256": text_digest(text),
            "text_tokens": input_ids.numel(),
        },
        "models": {label: _describe(checkpoints.get(label, args.checkpoint), model) for label, model in models.items()},
    }
    if "perplexity" in args.tasks:
        result["perplexity"] = _perplexities(args, models, tokenizer, input_ids)
    if "retrieval" in args.tasks:
        result["retrieval"] = _retrievals(args, models, tokenizer, text)
    if "domains" in args.tasks:
        result["domains"] = _domains(args, models, tokenizer)
    if "speed" in args.tasks:
        settings = {"lengths": args.lengths, "repeats": args.repeats, "decode_tokens": args.decode_tokens}
        result["speed"] = measure_speed(models, input_ids, **settings, on_progress=_progress("speed")).to_dict()
    if "memory" in args.tasks:
        # Each sample loads its model in a process of its own; this one's copies would only be in the way.
        models.clear()
        settings = {"lengths": args.lengths, "dtype": args.dtype, "seed": args.seed}
        result["memory"] = measure_memory(checkpoints, **settings, on_progress=_progress("memory")).to_dict()
    _publish(args, result)


_SETTINGS = [
    "checkpoint",
    "against",
    "text",
    "skip_tokens",
    "tasks",
    "lengths",
    "windows",
    "score_from",
    "questions",
    "depths",
    "planted",
    "mean_blocks",
    "domains",
    "prompt",
    "repeats",
    "decode_tokens",
    "dtype",
    "seed",
]


def _check(args: argparse.Namespace) -> None:
    for name in ("windows", "questions", "planted", "repeats", "decode_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be 1 or more")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads {args.threads} must be 1 or more")
    if any(blocks < 1 for blocks in args.mean_blocks):
        raise ValueError(f"--mean-blocks {min(args.mean_blocks)} must be 1 or more")
    if args.skip_tokens < 0:
        raise ValueError(f"--skip-tokens {args.skip_tokens} must be 0 or more")
    if min(args.lengths) < 2:
        raise ValueError(f"--lengths {min(args.lengths)} must be 2 tokens or more")
    if args.heat_map is not None and "domains" not in args.tasks:
        raise ValueError("--heat-map belongs to --tasks domains")
    for path in (args.output, args.table, args.plot, args.heat_map):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    for path in (args.plot, args.heat_map):
        if path is not None:
            check_plot(path)


def _label(checkpoints: list[str], labels: list[str] | None) -> dict[str, str]:
    if labels is None:
        names = [Path(checkpoint).expanduser().absolute().name for checkpoint in checkpoints]
        # Two folders of one name are told apart by their whole path.
        labels = [name if names.count(name) == 1 else checkpoint for name, checkpoint in zip(names, checkpoints, strict=True)]
    if len(labels) != len(checkpoints):
        raise ValueError(f"--labels has {len(labels)} names for {len(checkpoints)} models")
    if len(set(labels)) != len(labels):
        raise ValueError(f"two models are called the same, give different --labels: {' '.join(labels)}")
    return dict(zip(labels, checkpoints, strict=True))


def _load(checkpoints: dict[str, str], dtype: torch.dtype, device: str | None):
    """Models by label, and the tokenizer that all of them share."""
    models, tokenizers = {}, {}
    for number, (label, checkpoint) in enumerate(checkpoints.items(), start=1):
        _progress("loading")(number, len(checkpoints))
        tokenizers[label] = load_tokenizer(checkpoint)
        models[label] = load_model(checkpoint, dtype, device)
    (first, tokenizer), *others = tokenizers.items()
    for label, other in others:
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"{label} and {first} have different vocabularies: their perplexities per token cannot be compared"
            )
    return models, tokenizer


def _with_mean_blocks(models: dict[str, Any], blocks: int):
    """A copy of the first model with the baseline's attention."""
    first = next(iter(models.values()))
    if first.config.model_type == DeepseekR1TextConfig.model_type:
        raise ValueError("--mean-blocks needs a first model of transformers itself; give the source of the conversion")
    model = copy.deepcopy(first)
    use_mean_blocks(model, window=512, num_sink_tokens=32, blocks=blocks)
    return model


def _check_models(args: argparse.Namespace, models: dict[str, Any], text_tokens: int) -> None:
    if args.heat_map is not None and not any(expert_routers(model) for model in models.values()):
        raise ValueError("--heat-map: no model has experts to draw")
    longest = max(args.lengths)
    needed = {
        "perplexity": longest * args.windows,
        "retrieval": longest,
        "domains": 0,
        "speed": longest + args.decode_tokens,
        "memory": 0,
    }
    missing = max(needed[task] for task in args.tasks)
    if missing > text_tokens:
        raise ValueError(
            f"--text has {text_tokens} tokens, --lengths {longest} needs {missing} here: give more text, or fewer --windows"
        )
    for label, model in models.items():
        limit = model_context_limit(model)
        if limit is not None and longest > limit:
            print(f"warning: {label} was built for {limit} tokens, --lengths asks for {longest}", file=sys.stderr)


def _describe(checkpoint: str, model) -> dict[str, Any]:
    config = model.config.get_text_config()
    fields = config.to_dict()
    return {
        "checkpoint": checkpoint,
        "class": type(model).__name__,
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "attn_implementation": config._attn_implementation,
        **{name: fields.get(name) for name in ("layer_types", "sliding_window", "sparse_attention", "per_layer_config")},
    }


def _perplexities(args: argparse.Namespace, models: dict[str, Any], tokenizer, input_ids: torch.Tensor) -> dict[str, Any]:
    settings = {"num_windows": args.windows, "score_from": args.score_from, "bos_token_id": leading_token_id(tokenizer)}
    results: dict[str, list[dict[str, Any]]] = {label: [] for label in models}
    for length in args.lengths:
        for label, model in models.items():
            show = _progress(f"perplexity of {label} at {length} tokens")
            results[label].append(perplexity(model, input_ids, context_length=length, **settings, on_progress=show).to_dict())
    return results


def _retrievals(args: argparse.Namespace, models: dict[str, Any], tokenizer, text: str) -> dict[str, Any]:
    settings = {"lengths": args.lengths, "depths": args.depths, "prompt": args.prompt, "num_planted": args.planted}
    settings["seeds"] = range(args.seed, args.seed + args.questions)
    return {
        label: retrieval(model, tokenizer, text, **settings, on_progress=_progress(f"retrieval of {label}")).to_dict()
        for label, model in models.items()
    }


def _domains(args: argparse.Namespace, models: dict[str, Any], tokenizer) -> dict[str, Any]:
    settings = {"context_length": max(args.lengths), "num_windows": args.windows, "bos_token_id": leading_token_id(tokenizer)}
    texts = {}
    for domain, files in domain_files(args.domains).items():
        try:
            texts[domain] = token_windows(encode_text(tokenizer, read_text(files))[args.skip_tokens :], **settings)
        except ValueError as error:
            raise ValueError(f"--domains {domain}: {error}") from error
    return {label: measure_domains(model, texts, _progress(f"domains of {label}")).to_dict() for label, model in models.items()}


def _progress(what: str) -> Callable[[int, int], None]:
    """One line on stderr that is rewritten on a terminal, and nothing but its last state in a log file."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what}: {done}/{total}\033[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done == total:
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)

    return show


def _publish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.output is not None:
        write_report(result, args.output)
    experts = {label: measured for label, measured in result.get("domains", {}).items() if measured["layers"]}
    table = "\n".join([markdown_table(result), *([expert_table(experts)] if experts else [])])
    print(table, end="")
    if args.table is not None:
        args.table.write_text(table, encoding="utf-8")
    if args.plot is not None:
        plot(result, args.plot)
    if args.heat_map is not None:
        heat_map(experts, args.heat_map)
