"""Puts the tables of results/*.json and of the presets into README.md, docs/ and the model cards, between their markers, and
draws results/overview.png from the same files.

python scripts/render_readme.py            rewrites the files
python scripts/render_readme.py --check    exit code 1 if a file is not what it would be rewritten to
"""

import argparse
import json
import re
import sys
from pathlib import Path

from readme_tables import TABLES

from modeling_deepseek_r1.configuration import LAYER_LETTERS, PRESETS
from modeling_deepseek_r1.evaluation import markdown_table, plot

PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md")), *sorted(Path("model_cards").glob("*.md"))]
MARKED = re.compile(r"(<!-- (results: (?P<name>\S+)|presets) -->\n).*?(<!-- end -->)", re.DOTALL)
COMMANDS = {
    "attention_layer": "benchmark_attention.py",
    "attention_layer_gpu": "benchmark_attention.py --device cuda --dtypes bfloat16 --lengths 16384 32768 65536 131072 "
    "--compared 16384 32768 65536 131072 --repeats 5",
    "candidates": "benchmark_candidates.py",
    "smollm2_ablation": "benchmark_ablation.py --length 96 --window 16 --stride 8 --memory 8 --every 100",
    "dynamic_k": "benchmark_dynamic_k.py",
    "expert_blocks": "benchmark_experts.py --blocks",
    "expert_cache": "benchmark_expert_cache.py",
    "expert_finetuning_cost": "benchmark_finetuning.py cost",
    "expert_finetuning_quality": "benchmark_finetuning.py quality --variants all chosen",
    "expert_layer": "benchmark_experts.py",
    "experts_training_step": "benchmark_training_step.py",
    "multimodal": "benchmark_multimodal.py",
    "progressive_sparsity": "benchmark_progressive.py",
    "smollm2_cost_bfloat16": "benchmark_model.py cost --dtype bfloat16 --models routed",
    "smollm2_cost_float32": "benchmark_model.py cost",
    "smollm2_decode_engines": "benchmark_decode_engines.py --dtypes bfloat16 --llama PYTHON",
    "smollm2_decode_engines_long": "benchmark_decode_engines.py --dtypes bfloat16 --lengths 16384 --engines eager balanced llama.cpp "
    "--repeats 1 --decode-tokens 16 --llama PYTHON --output results/smollm2_decode_engines_long.json",
    "smollm2_experts_training": "benchmark_training.py",
    "smollm2_grpo": "train_grpo.py",
    "smollm2_healing": "benchmark_healing.py",
    "smollm2_local_bfloat16": "benchmark_model.py local --dtype bfloat16",
    "smollm2_local_float32": "benchmark_model.py local",
    "smollm2_long_documents": "benchmark_long_documents.py",
    "smollm2_quantization": "benchmark_quantization.py",
    "smollm2_retrieval": "benchmark_model.py retrieval --dtype bfloat16",
    "smollm2_serving": "benchmark_serving.py",
}
"""Result -> the script that makes it, where that is not `benchmark_model.py` and the end of the name."""


def preset_rows() -> str:
    letters = ", ".join(f"`{letter}` {name}" for letter, name in LAYER_LETTERS.items())
    rows = ["| preset | pattern | window | sink tokens | clusters x keys |", "|---|---|---|---|---|"]
    for name, fields in PRESETS.items():
        sparse = fields.get("sparse_attention") or {}
        routed = f"{sparse['routed_clusters']} x {sparse['routed_tokens']}" if "routed_clusters" in sparse else ""
        cells = [fields["layer_types"], fields.get("sliding_window", ""), sparse.get("num_sink_tokens", ""), routed]
        shown = " | ".join(str(cell) for cell in cells[1:])
        rows.append(f"| `{name}`{' (new models)' if 'shape' in fields else ''} | `{cells[0]}` | {shown} |")
    return "\n".join(rows) + f"\n\nLetters: {letters}.\n"


def rendered(page: str) -> str:
    """The page with everything between its markers made anew; of a result that is missing it says so."""

    def replace(match: re.Match) -> str:
        name = match["name"]
        if name is None:
            return f"{match[1]}{preset_rows()}{match[4]}"
        file = Path("results", f"{name}.json")
        table = "Not measured yet.\n"
        if file.exists():
            table = TABLES.get(name, markdown_table)(json.loads(file.read_text()))
        command = COMMANDS.get(name, f"benchmark_model.py {name.removeprefix('smollm2_')}")
        return f"{match[1]}{table}\n`python scripts/{command}`\n{match[4]}"

    return MARKED.sub(replace, page)


def overview() -> dict:
    """Quality and cost of the models that all of these runs have measured, as one result."""
    perplexity, cost = (
        json.loads(Path("results", f"smollm2_{name}.json").read_text()) for name in ("perplexity", "cost_float32")
    )
    return {**cost, "perplexity": {label: perplexity["perplexity"][label] for label in cost["models"]}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, report what would change")
    args = parser.parse_args()
    changed = [page for page in PAGES if rendered(page.read_text()) != page.read_text()]
    for page in changed:
        if not args.check:
            page.write_text(rendered(page.read_text()))
        print(f"{page}: {'out of date, run scripts/render_readme.py' if args.check else 'rewritten'}")
    if not args.check:
        plot(overview(), "results/overview.png")
    return 1 if changed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
