"""Measures prefill and decoding of SmolLM2-135M, one row, beside llama.cpp; writes results/smollm2_decode_engines.json.

python scripts/benchmark_decode_engines.py --threads 1 --llama LLAMA_ENVIRONMENT/bin/python
python scripts/benchmark_decode_engines.py --threads 1 --lengths 16384 --engines balanced llama.cpp --llama ...

Engines take turns, sample by sample. llama.cpp runs in a process of an interpreter that has llama-cpp-python (0.3.36 was measured),
on the same weights, written as GGUF in the dtype of the comparison. Times are seconds of the processor, so that other programs on
the machine count as little as possible. What is decoded is the text itself, so that all engines do the same work.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

DEFAULT = ("eager", "packed", "compiled", "llama.cpp")
ENGINES = {way: ("dense", way) for way in DEFAULT[:3]} | {"balanced": ("balanced", "packed")}
ENGINES |= {f"{label} compiled": (label, "compiled") for label in ("balanced", "window + sinks")}
"""Name -> checkpoint of `benchmark_model.py`, and how it decodes: as it is loaded, with packed weights, or compiled."""


def llama_worker(gguf: str, threads: int, context: int) -> None:
    """Answers lines `[prompt ids, ids to decode]` with `[seconds, seconds per token, likeliest next token]`."""
    import numpy
    from llama_cpp import Llama

    model = Llama(gguf, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    for line in sys.stdin:
        prompt, decoded = json.loads(line)
        model.reset()
        start = time.process_time()
        model.eval(prompt)
        prefilled = time.process_time()
        for token in decoded:
            model.eval([token])
        end = time.process_time()
        logits = numpy.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
        print(json.dumps([prefilled - start, (end - prefilled) / len(decoded), int(logits.argmax())]), flush=True)


class LlamaCpp:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, gguf: Path, threads: int, context: int):
        command = [python, __file__, "--worker", str(gguf), "--threads", str(threads), "--lengths", str(context)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def sample(self, ids, length: int) -> tuple[float, float, int]:
        values = ids.tolist()
        print(json.dumps([values[:length], values[length:]]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("llama.cpp has ended without an answer")
        return tuple(json.loads(answer))


class Ours:
    """A converted checkpoint, with a dynamic cache or a compiled step on a static one."""

    def __init__(self, model, compiled: bool, context: int):
        import torch

        from modeling_deepseek_r1.generation import compiled_decoding

        self.model, self.step, self.context = model, model.__call__, None
        if compiled:
            options = compiled_decoding(context)
            self.context = options["max_cache_len"]
            self.step = torch.compile(model.__call__, **options["compile_config"].to_dict())

    def sample(self, ids, length: int) -> tuple[float, float, int]:
        import torch
        from transformers import DynamicCache, StaticCache

        cache = DynamicCache()
        if self.context:
            cache = StaticCache(config=self.model.config, max_cache_len=self.context)
        with torch.no_grad():
            start = time.process_time()
            self.model(ids[None, :length], past_key_values=cache, logits_to_keep=1)
            prefilled = time.process_time()
            for token in ids[length:].split(1):
                logits = self.step(token[None], past_key_values=cache).logits
            end = time.process_time()
        return prefilled - start, (end - prefilled) / (len(ids) - length), int(logits[0, -1].argmax())


def write_gguf(source: Path, target: Path, dtype: str) -> None:
    """The same model with its tensors dequantised to `dtype`; vectors stay float32, as llama.cpp wants them."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    kind = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        own = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_engines(names, dtype: str, context: int, args) -> dict:
    """Name -> engine; those that take the weights of a checkpoint as they are share the model."""
    from benchmark_model import MODELS, converted
    from demo import packaged_checkpoint

    from modeling_deepseek_r1.conversion import convert_checkpoint
    from modeling_deepseek_r1.evaluation.loading import DTYPES, load_model
    from modeling_deepseek_r1.generation import pack_weights

    models, engines = {}, {}
    for name in names:
        if name == "llama.cpp":
            target = MODELS / f"dense_{dtype}.gguf"
            if not target.exists():
                MODELS.mkdir(parents=True, exist_ok=True)
                write_gguf(packaged_checkpoint(), target, dtype)
            engines[name] = LlamaCpp(args.llama, target, args.threads, context)
            continue
        label, way = ENGINES[name]
        packed = way == "packed"
        if (label, packed) not in models:
            folder = MODELS / "dense" if label == "dense" else converted(label)
            if not folder.exists():
                convert_checkpoint(packaged_checkpoint(), folder)
            models[label, packed] = load_model(folder, DTYPES[dtype])
            if packed:
                pack_weights(models[label, packed])
        engines[name] = Ours(models[label, packed], way == "compiled", context)
    return engines


def measure(engines: dict, ids, length: int, repeats: int) -> dict:
    """Samples of all engines in turn, after one of each that is not counted."""
    from modeling_deepseek_r1.evaluation import Measurement

    samples = {name: [] for name in engines}
    for number in range(repeats + 1):
        for name, engine in engines.items():
            sample = engine.sample(ids, length)
            print(length, name, "warm-up" if not number else "", *(f"{x:.4f}" for x in sample[:2]), sample[2], flush=True)
            samples[name] += [sample] if number else []
    columns = {name: list(zip(*values, strict=True)) for name, values in samples.items()}
    parts = {name: [Measurement.of(column) for column in own[:2]] for name, own in columns.items()}
    return {
        name: {
            "prefill_seconds": vars(prefill),
            "decode_seconds_per_token": vars(decode),
            "next_token": columns[name][2][0],
            "speed_over": {
                other: {"prefill": vars(theirs[0].over(prefill)), "decode": vars(theirs[1].over(decode))}
                for other, theirs in parts.items()
                if other != name
            },
        }
        for name, (prefill, decode) in parts.items()
    }


def table(result: dict) -> str:
    """What each engine reaches, in Markdown; the last column beside llama.cpp or else the first engine."""
    lines = [
        "| dtype | prompt | engine | prefill | decoding | prefill ratio | decoding ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in result["cells"]:
        engines, length = cell["engines"], cell["length"]
        base = "llama.cpp" if "llama.cpp" in engines else next(iter(engines))
        for name, one in engines.items():
            prefill, decode = (one[key]["median"] for key in ("prefill_seconds", "decode_seconds_per_token"))
            times = one["speed_over"].get(base)
            ratios = [f"{times[key]['median']:.2f}x" if times else "1" for key in ("prefill", "decode")]
            row = [
                cell["dtype"],
                f"{length:,}",
                name,
                f"{length / prefill:.0f} tokens/s",
                f"{1 / decode:.1f} tokens/s",
                *ratios,
            ]
            lines.append("| " + " | ".join(row) + " |")
    about = (
        f"Seconds of the processor, {result['environment']['threads']} thread; ratios (more is faster) to llama.cpp where it is"
    )
    return "\n".join([*lines, "", f"{about} there, else to the first engine."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", help="interpreter that has llama-cpp-python; without it that engine is left out")
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES, "llama.cpp"], default=DEFAULT)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024], help="tokens of the prompt")
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/smollm2_decode_engines.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        llama_worker(args.worker, args.threads, args.lengths[0])
        return
    run(args)


def run(args: argparse.Namespace) -> None:
    import torch
    from benchmark_model import HELD_OUT
    from demo import packaged_checkpoint

    from modeling_deepseek_r1.evaluation import (
        FORMAT_VERSION,
        encode_text,
        environment,
        load_tokenizer,
        read_text,
        write_report,
    )

    torch.set_num_threads(args.threads)
    names = [name for name in args.engines if name != "llama.cpp" or args.llama]
    ids = torch.as_tensor(encode_text(load_tokenizer(packaged_checkpoint()), read_text(["prose"])))[HELD_OUT:]
    result = {"format_version": FORMAT_VERSION, "environment": environment(), "clock": "processor time", "cells": []}
    # Where the other interpreter lies concerns nobody.
    result["environment"]["command"] = [part if part != args.llama else "PYTHON" for part in sys.argv]
    result |= {"repeats": args.repeats, "decode_tokens": args.decode_tokens}
    for dtype in args.dtypes:
        context = max(args.lengths) + args.decode_tokens
        engines = make_engines(names, dtype, context, args)
        for length in args.lengths:
            measured = measure(engines, ids[: length + args.decode_tokens], length, args.repeats)
            result["cells"].append({"dtype": dtype, "length": length, "engines": measured})
            write_report(result, args.output)
        del engines


if __name__ == "__main__":
    main()
