"""Measures hierarchical candidates against finishing all of them, on SmolLM2-135M; writes results/candidates.json.

python scripts/benchmark_candidates.py --threads 1

Four ways take turns over blocks of questions: one answer; N answers all finished; N drafts of which K are finished, the others dropped in stages; the same in
no more rows than one question needs, so that freed rows stay empty. Scores are compared question by question.
"""

import argparse
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from demo import packaged_checkpoint

from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.evaluation import (
    FORMAT_VERSION,
    Measurement,
    environment,
    load_model,
    load_tokenizer,
    write_report,
)
from modeling_deepseek_r1.generation import EmbeddingEvaluator, HierarchicalCandidates, generate_candidates

MODEL = Path(".cache/benchmark/dense")
SUBJECTS = """
why the sky is blue; how a rainbow forms; what photosynthesis does; why leaves change colour in autumn; how vaccines work; what a
black hole is; why the sea is salty; how bees make honey; what inflation means in an economy; how a bicycle stays upright; what
causes the seasons; how a refrigerator cools; why we dream; how volcanoes erupt; what a computer virus is; how aeroplanes fly; why
ice floats; how the heart pumps blood; what democracy means; how paper is made; why the moon has phases; how a compass works; what
recycling is good for; how soap cleans; why cats purr; how a telescope works; what a healthy breakfast is; how to prepare for a job
interview; what makes a good friend; how to learn a language; why sleep matters; how to save water at home; what the Roman Empire
was; how printing changed Europe; who Marie Curie was; what happened in the French Revolution; why the Titanic sank; how the
pyramids were built; what the Silk Road was; how bread rises; what yeast is; how chocolate is made; why onions make us cry; how to
boil an egg; what a prime number is; how to find the area of a circle; what probability means; how fractions are added; what a
variable is in programming; how a search engine works; what an operating system does; how encryption protects messages; why
deserts are dry; how rivers form valleys; what an earthquake is; how glaciers move; what coral reefs are; how birds migrate; why
spiders spin webs; how whales breathe; what makes music pleasant; how a piano makes sound; what a novel is; how films are made
"""
QUESTIONS = [f"Explain in a few sentences {' '.join(subject.split())}." for subject in SUBJECTS.split(";")]


def dense_checkpoint() -> Path:
    """SmolLM2 under this library's class, converted when it is not there yet."""
    if not MODEL.exists():
        MODEL.parent.mkdir(parents=True, exist_ok=True)
        convert_checkpoint(packaged_checkpoint(), MODEL)
    return MODEL


def paired(scores: list[float], baseline: list[float], samples: int = 2000) -> dict:
    """Difference of two lists of scores of the same questions: its mean, a 95 % bootstrap interval, how often it is >= 0."""
    differences, draw = [a - b for a, b in zip(scores, baseline, strict=True)], random.Random(0)
    means = sorted(statistics.fmean(draw.choices(differences, k=len(differences))) for _ in range(samples))
    return {
        "mean": statistics.fmean(differences),
        "interval": [means[int(0.025 * samples)], means[int(0.975 * samples)]],
        "at_least_equal": sum(difference >= 0 for difference in differences) / len(differences),
    }


def measure(
    ways: dict[str, tuple[HierarchicalCandidates, int]], model, tokenizer, questions, block: int, options: dict
) -> dict:
    """Every way answers a block of questions, in turn, before the next block."""
    found = {name: {"seconds": [], "records": [], "steps": 0, "row_steps": 0} for name in ways}
    for number, start in enumerate(range(0, len(questions), block)):
        for name, (plan, rows) in ways.items():
            torch.manual_seed(number)
            began = time.perf_counter()
            output = generate_candidates(model, tokenizer, questions[start : start + block], plan, rows=rows, **options)
            found[name]["seconds"].append(time.perf_counter() - began)
            found[name]["records"] += output.prompts
            for what in ("steps", "row_steps"):
                found[name][what] += output.totals[what]
            print(f"block {number + 1}: {name}: {found[name]['seconds'][-1]:.1f} s", flush=True)
    return found


def summary(found: dict, ways: dict, baseline: str) -> dict:
    """Tokens, seconds and scores of every way, and what they are beside those of `baseline`."""
    seconds = {name: Measurement.of(taken["seconds"]) for name, taken in found.items()}
    scores = {name: [record.best.score for record in taken["records"]] for name, taken in found.items()}
    tokens = {name: [record.generated_tokens for record in taken["records"]] for name, taken in found.items()}
    return {
        name: {
            "rows": ways[name][1],
            "stages": [list(stage) for stage in ways[name][0].stages],
            "num_candidates": ways[name][0].num_candidates,
            "seconds": asdict(seconds[name]),
            "seconds_ratio": asdict(seconds[name].over(seconds[baseline])),
            "total_seconds_ratio": sum(seconds[name].samples) / sum(seconds[baseline].samples),
            "generated_tokens": tokens[name],
            "generated_tokens_ratio": sum(tokens[name]) / sum(tokens[baseline]),
            "steps": taken["steps"],
            "row_steps": taken["row_steps"],
            "score": statistics.fmean(scores[name]),
            "scores": scores[name],
            "score_difference": paired(scores[name], scores[baseline]),
        }
        for name, taken in found.items()
    }


def table(result: dict) -> str:
    """Rows: ways; columns: tokens and time beside finishing all, and the score."""
    lines = ["| | rows | tokens | time | score | less than finishing all |", "|---|---|---|---|---|---|"]
    for name, way in result["ways"].items():
        low, high = way["score_difference"]["interval"]
        shares = f"{way['generated_tokens_ratio']:.0%} | {way['total_seconds_ratio']:.0%}"
        difference = f"{-way['score_difference']['mean']:.3f} ({-high:.3f} ... {-low:.3f})"
        lines.append(f"| {name} | {way['rows']} | {shares} | {way['score']:.3f} | {difference} |")
    return "\n".join(lines) + "\n"


def stage(text: str) -> tuple[int, int]:
    """`20:3` -> (20, 3)."""
    tokens, keep = text.split(":")
    return int(tokens), int(keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="of this library (default: SmolLM2-135M-Instruct, converted)")
    parser.add_argument("--prompts", type=int, default=50, help=f"questions, at most {len(QUESTIONS)} (default: %(default)s)")
    parser.add_argument("--block", type=int, default=10, help="questions per turn (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=8, help="N (default: %(default)s)")
    stages = {"metavar": "TOKENS:KEEP", "help": "at so many tokens so many go on, the last time K (default: 24:2)"}
    parser.add_argument("--stages", nargs="+", type=stage, default=[(24, 2)], **stages)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="(default: %(default)s)")
    parser.add_argument("--embedding", metavar="FOLDER", help="score by similarity to the question; default: own likelihood")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="results/candidates.json")
    args = parser.parse_args()
    if not 1 <= args.prompts <= len(QUESTIONS) or args.block < 1:
        parser.error(f"--prompts {args.prompts} must lie in 1 ... {len(QUESTIONS)}, --block {args.block} be 1 or more")
    torch.set_num_threads(args.threads)
    checkpoint = args.checkpoint or dense_checkpoint()
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    count = args.candidates
    common = {"tokenizer": tokenizer}
    if args.embedding:
        common["evaluator"] = EmbeddingEvaluator.from_pretrained(args.embedding)
    staged, keep = HierarchicalCandidates(count, args.stages, **common), args.stages[-1][1]
    finish_all = f"all {count} finished"
    ways = {
        "one answer": (HierarchicalCandidates(1, **common), 2 * count),
        finish_all: (HierarchicalCandidates(count, (), **common), 2 * count),
        f"{keep} of {count} finished": (staged, 2 * count),
        f"{keep} of {count}, rows left empty": (staged, count),
    }
    options = {"do_sample": True, "temperature": args.temperature, "top_p": 0.95, "max_new_tokens": args.max_new_tokens}
    found = measure(ways, model, tokenizer, QUESTIONS[: args.prompts], args.block, options)
    settings = {**options, "stages": args.stages, "block": args.block, "prompts": args.prompts}
    settings["evaluator"] = "embedding" if args.embedding else "mean log-likelihood"
    result = {"format_version": FORMAT_VERSION, "environment": environment(model), "settings": settings}
    result["ways"] = summary(found, ways, finish_all)
    write_report(result, args.output)
    print(table(result))


if __name__ == "__main__":
    main()
