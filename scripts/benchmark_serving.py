"""Measures many clients at once against one after the other, on SmolLM2-135M behind the server; writes results/smollm2_serving.json.

python scripts/benchmark_serving.py --threads 1

A server process answers the same questions twice per round: from one client that asks one question after the other, and from as
many clients as there are questions. Texts must be the same, as far as rounding lets greedy choices be the same.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import httpx2
from benchmark_candidates import QUESTIONS, dense_checkpoint

from modeling_deepseek_r1.evaluation import FORMAT_VERSION, Measurement, environment, write_report


@contextlib.contextmanager
def server(checkpoint, threads: int, clients: int, dtype: str) -> Iterator[str]:
    """Address of a server process that ends with the context."""
    command = [sys.executable, "-m", "modeling_deepseek_r1.cli", "serve", str(checkpoint), "--port", "0"]
    command += ["--rows", str(clients), "--threads", str(threads), "--dtype", dtype]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    try:
        for line in process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            raise RuntimeError("the server has not started")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def ask(client: httpx2.Client, question: str, tokens: int) -> tuple[str, int, float]:
    """Text, number of tokens and seconds of a greedy answer of just so many tokens."""
    began = time.perf_counter()
    request = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    answer = client.post("/v1/chat/completions", json={**request, "max_tokens": tokens, "min_tokens": tokens})
    answer.raise_for_status()
    body = answer.json()
    return body["choices"][0]["message"]["content"], body["usage"]["completion_tokens"], time.perf_counter() - began


def measure(url: str, questions: list[str], tokens: int, rounds: int) -> dict:
    """Seconds of both ways in turn, the seconds of each request, and how far texts agree."""
    found = {name: {"seconds": [], "latencies": [], "texts": [], "tokens": 0} for name in ("one at a time", "at once")}
    with httpx2.Client(base_url=url, timeout=600) as client, ThreadPoolExecutor(len(questions)) as pool:
        ask(client, questions[0], 4)
        for number in range(rounds):
            for name, mapping in (("one at a time", map), ("at once", pool.map)):
                began = time.perf_counter()
                answers = list(mapping(lambda question: ask(client, question, tokens), questions))
                taken = found[name]
                taken["seconds"].append(time.perf_counter() - began)
                taken["texts"] = [text for text, _, _ in answers]
                taken["tokens"] = sum(count for _, count, _ in answers)
                taken["latencies"] += [seconds for _, _, seconds in answers]
                print(f"round {number + 1}: {name}: {taken['seconds'][-1]:.1f} s, {taken['tokens']} tokens", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="of this library (default: SmolLM2-135M-Instruct, converted)")
    parser.add_argument("--clients", type=int, default=16, help=f"2 ... {len(QUESTIONS)} (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the server (default: %(default)s)")
    parser.add_argument("--output", default="results/smollm2_serving.json")
    args = parser.parse_args()
    if not 2 <= args.clients <= len(QUESTIONS) or args.tokens < 1 or args.rounds < 1:
        parser.error(f"--clients {args.clients} must lie in 2 ... {len(QUESTIONS)}, --tokens and --rounds be 1 or more")
    checkpoint = args.checkpoint or dense_checkpoint()
    with server(checkpoint, args.threads, args.clients, args.dtype) as url:
        found = measure(url, QUESTIONS[: args.clients], args.tokens, args.rounds)
    alone, together = (found[name] for name in ("one at a time", "at once"))
    same = [a == b for a, b in zip(alone["texts"], together["texts"], strict=True)]
    if min(len(text) for text in together["texts"]) == 0 or together["tokens"] != alone["tokens"]:
        raise RuntimeError("answers are missing")
    seconds = {name: Measurement.of(taken["seconds"]) for name, taken in found.items()}
    result = {"format_version": FORMAT_VERSION, "environment": environment()}
    result["settings"] = {name: getattr(args, name) for name in ("clients", "tokens", "rounds", "dtype", "threads")}
    result["ways"] = {
        name: {
            "seconds": asdict(seconds[name]),
            "tokens_per_second": taken["tokens"] / seconds[name].median,
            "latency_median": statistics.median(taken["latencies"]),
        }
        for name, taken in found.items()
    }
    result["speedup"] = asdict(seconds["one at a time"].over(seconds["at once"]))
    result["same_texts"] = sum(same) / len(same)
    write_report(result, args.output)
    print(f"{result['speedup']['median']:.1f}x the tokens per second; {sum(same)} of {len(same)} texts the same")


if __name__ == "__main__":
    main()
