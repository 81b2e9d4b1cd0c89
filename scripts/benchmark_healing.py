"""Heals SmolLM2-135M with sparse attention in all layers (`deepseek-r1 train --heal-from`) and measures how much of the
perplexity that the pattern costs comes back, on text that neither calibration nor training has read.

python scripts/benchmark_healing.py [routed] ["window + sinks"]      adds to results/smollm2_healing.json

What the dense model and the student before healing have is read from results/smollm2_perplexity.json
(`benchmark_model.py perplexity`), whose text and windows are used again. A step has one row, as one core trains; the
window is made smaller in training so that most of what its tokens see lies beyond it, and is the student's own when it is measured.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import torch
from benchmark_model import MODELS, converted, evaluate
from demo import packaged_checkpoint
from texts import documentation

from modeling_deepseek_r1.evaluation import FORMAT_VERSION, encode_text, environment, load_tokenizer, read_text, write_report
from modeling_deepseek_r1.training import Recipe, train_checkpoint

BEFORE = Path("results/smollm2_perplexity.json")
MODULES = ("argparse", "difflib", "doctest", "inspect", "ipaddress", "subprocess")
"""Of the standard library; calibration reads others."""
STUDENTS = ("routed", "window + sinks")


def training_texts(folder: Path, first: int, tokens: int) -> list[Path]:
    """Files of `tokens` tokens together, or of all that there are: half source code, half the built-in prose from the token
    `first` on and documentation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, files = load_tokenizer(converted("routed")), []
    code = "\n\n".join(Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8") for name in MODULES)
    prose = encode_text(tokenizer, read_text(["prose"]))[first:][: tokens // 2]
    texts = {
        "prose": prose,
        "documentation": encode_text(tokenizer, documentation(without=MODULES))[: tokens // 2 - len(prose)],
        "code": encode_text(tokenizer, code)[: tokens // 2],
    }
    for name, ids in texts.items():
        print(f"{name}: {len(ids)} tokens")
        files.append(folder / f"{name}.txt")
        files[-1].write_text(tokenizer.decode(ids), encoding="utf-8")
    return files


def heal(label: str, args: argparse.Namespace, before: dict) -> dict:
    """Trains one student and measures it; resumes a run that was interrupted."""
    folder = MODELS / "healing" / label.replace(" ", "_")
    # Behind the last window that is evaluated, with some distance.
    settings = before["settings"]
    first = settings["skip_tokens"] + settings["windows"] * max(settings["lengths"]) + 2048
    student = converted(label)
    recipe = Recipe().changed(
        {
            "model": str(student),
            "data": [str(path) for path in training_texts(folder.parent, first, args.length * args.steps)],
            "output": str(folder),
            "heal_from": str(packaged_checkpoint()),
            "heal_window": args.window,
            "length": args.length,
            "max_steps": args.steps,
            "learning_rate": args.learning_rate,
            **({"lora_rank": args.lora_rank} if args.lora_rank else {"freeze": ["model.embed_tokens.*"]}),
            "warmup": 0.05,
            "precision": "bf16",
            "log_steps": 5,
            "save_steps": 50,
        }
    )
    start, resumes = time.process_time(), any(Path(f"{folder}-run").glob("checkpoint-*"))
    report = train_checkpoint(recipe, resume=resumes, overwrite=True)
    seconds = time.process_time() - start
    result = folder.parent / f"{folder.name}.json"
    measure = ["--tasks", "perplexity", "--windows", str(settings["windows"]), "--skip-tokens", str(settings["skip_tokens"])]
    lengths = ["--lengths", *map(str, settings["lengths"])]
    evaluate(str(folder), "--labels", label, *measure, *lengths, "--output", str(result))
    after = json.loads(result.read_text())
    if after["settings"]["text_sha256"] != settings["text_sha256"]:
        raise SystemExit(f"{BEFORE} was measured on another text; run scripts/benchmark_model.py perplexity first")
    return {
        "trained": report.trained,
        "training": {
            name: getattr(recipe, name) for name in ("length", "max_steps", "learning_rate", "lora_rank", "precision")
        },
        "window": json.loads((student / "config.json").read_text())["sliding_window"],
        "window_in_training": args.window,
        "cpu_seconds": None if resumes else seconds,
        "divergence": [entry["divergence"] for entry in report.history if "divergence" in entry],
        "cells": [
            closed(*cells)
            for cells in zip(
                before["perplexity"]["dense"], before["perplexity"][label], after["perplexity"][label], strict=True
            )
        ],
    }


def closed(dense: dict, before: dict, after: dict) -> dict:
    """Perplexities at one length, and the share of the gap to the dense one that is gone."""
    values = [cell["perplexity"] for cell in (dense, before, after)]
    return {
        "length": after["context_length"],
        **dict(zip(("dense", "before", "after"), values, strict=True)),
        "closed": (values[1] - values[2]) / (values[1] - values[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("students", nargs="*", default=STUDENTS[:1], metavar="STUDENT", help=" or ".join(STUDENTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row; a step has one (default: %(default)s)")
    parser.add_argument("--window", type=int, default=256, help="in training (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="(default: %(default)s)")
    parser.add_argument("--lora-rank", type=int, default=0, help="0 = train all but the embedding (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results/smollm2_healing.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(BEFORE.read_text())
    models = json.loads(args.output.read_text())["models"] if args.output.exists() else {}
    for label in args.students:
        models[label] = heal(label, args, before)
        result = {
            "format_version": FORMAT_VERSION,
            "environment": environment(),
            "settings": before["settings"],
            "models": models,
        }
        write_report(result, args.output)
        for cell in models[label]["cells"]:
            print(label, cell)


if __name__ == "__main__":
    main()
