"""Trains SmolLM2-135M dense and with experts on the same tokens of code and prose; writes results/smollm2_experts_training.json.

python scripts/benchmark_training.py            goes on where an earlier call was interrupted; MODELS holds what is done
python scripts/benchmark_training.py --models "experts and MLPs"       adds to a result of equal settings

All start from the same function and see the same batches. Trained are, "dense": the MLPs of the upper half of the layers; "dense,
adapters": low-rank adapters on all MLPs; "experts": a low-rank delta per expert and the routers, in the upper half, as many
weights as the adapters have, of which a token uses a quarter; "experts and MLPs": by the very recipe of "dense", the MLPs that
experts share as well. Each learning rate is the best of those tried in runs of 60 steps: 1e-4, 2e-4, 3e-4 for dense MLPs; 2e-4,
5e-4 for adapters (there in the upper half alone); 1e-3, 2e-3, 4e-3 for experts.
"""

import argparse
import json
from pathlib import Path

import torch
from demo import packaged_checkpoint
from two_domains import write_domain_texts

from modeling_deepseek_r1.conversion import convert_checkpoint
from modeling_deepseek_r1.evaluation import (
    FORMAT_VERSION,
    encode_text,
    environment,
    load_model,
    load_tokenizer,
    measure_domains,
    read_text,
    token_windows,
    write_report,
)
from modeling_deepseek_r1.training import Recipe, last_checkpoint, train_checkpoint

MODELS = Path(".cache/benchmark")
FROZEN = ["model.embed_tokens.*", "*norm*", "*.self_attn.*"]
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "expert_rank": 16, "expert_layers": list(range(15, 30))}
COMMON = {"length": 256, "packing": "concatenate", "batch_size": 1, "accumulation": 1, "precision": "bf16", "save_steps": 25}
MLPS = {"freeze": [*FROZEN, "model.layers.?.*", "model.layers.1[0-4].*"], "learning_rate": 2e-4}
RUNS = {
    "dense": MLPS,
    "dense, adapters": {"lora_rank": 59, "lora_targets": ["mlp"], "learning_rate": 5e-4},
    "experts": {"freeze": [*FROZEN, "*.mlp.*_proj.weight"], "learning_rate": 2e-3},
    "experts and MLPs": MLPS,
}
"""Label -> settings of `training.Recipe` besides `COMMON`."""


def converted(label: str, texts: dict[str, tuple[Path, Path]]) -> Path:
    """SmolLM2 as it is, or with experts whose domain gates have read some of the training texts."""
    kind = label.split(",")[0].split()[0]
    folder = MODELS / f"two_domains_{kind}"
    if not folder.exists():
        domain_texts = {domain: str(own) for domain, (own, _) in texts.items()}
        given = {**EXPERTS, "domain_texts": domain_texts} if kind == "experts" else {}
        print(convert_checkpoint(packaged_checkpoint(), folder, **given).summary(), flush=True)
    return folder


def trained(label: str, start: Path, data: Path, steps: int) -> Path:
    """The checkpoint after `steps` steps, trained or trained on where it is not there yet."""
    folder = MODELS / f"two_domains_{label.replace(',', '').replace(' ', '_')}_{steps}_steps"
    if not folder.exists():
        settings = {"model": str(start), "data": [str(data)], "output": str(folder), "max_steps": steps, "epochs": 9.0}
        recipe = Recipe().changed({**COMMON, **RUNS[label], **settings})
        resume = last_checkpoint(folder.with_name(f"{folder.name}-run")) is not None
        print(train_checkpoint(recipe, resume=resume).summary(), flush=True)
    return folder


def measured(checkpoint: Path, texts: dict[str, tuple[Path, Path]], windows: int) -> dict:
    """`measure_domains` of what is held out; kept beside the checkpoint."""
    file = checkpoint / f"held_out_{windows}.json"
    if not file.exists():
        tokenizer, size = load_tokenizer(checkpoint), {"context_length": COMMON["length"], "num_windows": windows}
        held_out = {
            name: token_windows(encode_text(tokenizer, read_text([aside])), **size) for name, (_, aside) in texts.items()
        }
        write_report(measure_domains(load_model(checkpoint), held_out).to_dict(), file)
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=list(RUNS), default=list(RUNS), help="(default: all)")
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of each domain (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", default="results/smollm2_experts_training.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts = write_domain_texts(MODELS / "two_domains")
    settings, output = {"steps": args.steps, "windows": args.windows, **EXPERTS, **COMMON}, Path(args.output)
    earlier = json.loads(output.read_text()) if output.exists() else {}
    models = earlier["models"] if earlier.get("settings") == settings else {}
    for label in args.models:
        start = converted(label, texts)
        end = trained(label, start, MODELS / "two_domains" / "train.jsonl", args.steps)
        log = json.loads((end / "training.json").read_text())
        models[label] = {
            "trainable": int(log["trained"].split()[1].replace(",", "")),
            "learning_rate": RUNS[label]["learning_rate"],
            "before": measured(start, texts, args.windows),
            "after": measured(end, texts, args.windows),
            "log": [line for line in log["history"] if "loss" in line],
        }
    report = {"format_version": FORMAT_VERSION, "environment": environment(), "settings": settings, "models": models}
    write_report(report, output)


if __name__ == "__main__":
    main()
