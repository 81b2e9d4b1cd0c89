"""Puts the tables of results/*.json and of the preset table into README.md and the model cards, between their markers, and
draws results/overview.png from the same files.

python scripts/render_readme.py            rewrites the files
python scripts/render_readme.py --check    exit code 1 if a file is not what it would be rewritten to
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from benchmark_decode_engines import table as engines_table

from modeling_deepseek_r1.configuration import LAYER_LETTERS, PRESETS
from modeling_deepseek_r1.evaluation import markdown_table, plot

PAGES = [Path("README.md"), *sorted(Path("model_cards").glob("*.md"))]
MARKED = re.compile(r"(<!-- (results: (?P<name>\S+)|presets) -->\n).*?(<!-- end -->)", re.DOTALL)
COMMANDS = {
    "attention_layer": "benchmark_attention.py",
    "dynamic_k": "benchmark_dynamic_k.py",
    "expert_cache": "benchmark_expert_cache.py",
    "expert_finetuning_cost": "benchmark_finetuning.py cost",
    "expert_finetuning_quality": "benchmark_finetuning.py quality",
    "expert_layer": "benchmark_experts.py",
    "experts_training_step": "benchmark_training_step.py",
    "smollm2_cost_bfloat16": "benchmark_model.py cost --dtype bfloat16 --models routed",
    "smollm2_cost_float32": "benchmark_model.py cost",
    "smollm2_decode_engines": "benchmark_decode_engines.py --dtypes bfloat16 --llama PYTHON",
    "smollm2_experts_training": "benchmark_training.py",
    "smollm2_grpo": "train_grpo.py",
    "smollm2_healing": "benchmark_healing.py",
    "smollm2_local_bfloat16": "benchmark_model.py local --dtype bfloat16",
    "smollm2_local_float32": "benchmark_model.py local",
    "smollm2_retrieval": "benchmark_model.py retrieval --dtype bfloat16",
    "smollm2_serving": "benchmark_serving.py",
}
"""Result -> the script that makes it, where that is not `benchmark_model.py` and the end of the name."""


def attention_table(result: dict) -> str:
    """Rows: dtype and length; columns: what the sparse layers take, and how many times longer the others take."""
    variants = ["local", "routed", "blocks", "full"]
    ratios = [("full", "local"), ("full", "routed"), ("masked", "local")]
    if any("global" in cell["forward"] for cell in result["cells"]):
        variants.insert(1, "global")
        ratios.insert(1, ("full", "global"))
    shown = {"blocks": "mean blocks", "masked": "window mask"}
    header = ["dtype", "tokens", *(shown.get(name, name) for name in variants)]
    header += [f"{shown.get(a, a)} / {b}" for a, b in ratios] + ["full / routed, with backward"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for cell in result["cells"]:
        forward = {name: taken["median"] for name, taken in cell["forward"].items()}
        both = {name: taken["median"] for name, taken in cell["forward_backward"].items()}
        seconds = [f"{forward[name]:.2f} s" if name in forward else "" for name in variants]
        pairs = [*((forward, *pair) for pair in ratios), (both, "full", "routed")]
        times = [f"{taken[a] / taken[b]:.1f}x" if a in taken and b in taken else "" for taken, a, b in pairs]
        lines.append("| " + " | ".join([cell["dtype"], f"{cell['length']:,}", *seconds, *times]) + " |")
    exponents = "; ".join(
        f"{kind}: " + ", ".join(f"{value:.2f} ({name})" for name, value in slopes.items())
        for kind, slopes in result["exponents"].items()
    )
    pattern, heads = result["pattern"], result["heads"]
    stride = pattern.get("global_stride")
    nodes = f" 1 of every {stride} tokens and {result['num_memory_tokens']} memory tokens in global layers," if stride else ""
    lines += [
        "",
        f"{heads['query']} query and {heads['key_value']} key/value heads of {heads['size']}, window {pattern['window']},"
        f" {pattern['num_sink_tokens']} sink tokens,{nodes} {pattern['routed_clusters']} of {result['num_clusters']} clusters with at most"
        f" {pattern['routed_tokens']} keys each, random keys, {result['environment']['threads']} thread(s). Time grows with the"
        f" length to the power of, {exponents}.",
    ]
    return "\n".join(lines) + "\n"


def routing_table(result: dict) -> str:
    """Rows: models; columns: means over the routed layers."""
    columns = {
        "remote keys per query": lambda x: f"{x['remote_keys']:.0f}",
        "of the 64 best remote keys": lambda x: f"{x['recall']:.0%}",
        "by most recent keys": lambda x: f"{x['recall_recent']:.0%}",
        "by mean blocks": lambda x: f"{x['recall_blocks']:.0%}",
        "of the remote weight": lambda x: f"{x['mass']:.0%}",
        "recent": lambda x: f"{x['mass_recent']:.0%}",
        "blocks": lambda x: f"{x['mass_blocks']:.0%}",
        "queries without remote keys": lambda x: f"{x['empty_queries']:.1%}",
        "keys in the largest cluster": lambda x: f"{x['largest_cluster']:.1%}",
    }
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for label, model in result["models"].items():
        lines.append(f"| {label} | " + " | ".join(show(model["mean"]) for show in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def pattern_table(result: dict) -> str:
    """Rows: patterns that a calibration has tried."""
    lines = ["| layers | perplexity | rises by | repeated passage predicted | query-key products |", "|---|---|---|---|---|"]
    for tried in result["patterns"]:
        name = f"`{tried['layer_types']}`" + (" (chosen)" if tried["layer_types"] == result["chosen"] else "")
        figures = [f"{tried['perplexity']:.2f}", f"{tried['increase']:+.1%}", f"{tried['copied']:.0%}", f"{tried['cost']:.0%}"]
        lines.append("| " + " | ".join([name, *figures]) + " |")
    return "\n".join(lines) + "\n"


def generation_table(result: dict, tokens: int = 1024) -> str:
    """Rows: models; the time of a prompt and of `tokens` generated after it, from the measured time per token."""
    lines = [f"| | prefill | decoding, per token | prompt + {tokens:,} tokens | less time |", "|---|---|---|---|---|"]
    totals = []
    for cell in result["speed"]["cells"]:
        prefill, decode = cell["prefill_seconds"]["median"], cell["decode_seconds_per_token"]["median"]
        totals.append(prefill + tokens * decode)
        saved = f"{1 - totals[-1] / totals[0]:.0%}" if len(totals) > 1 else ""
        lines.append(f"| {cell['label']} | {prefill:.1f} s | {decode * 1e3:.0f} ms | {totals[-1]:.0f} s | {saved} |")
    (length,) = {cell["length"] for cell in result["speed"]["cells"]}
    about = f"A prompt of {length:,} tokens; decoding timed over {result['settings']['decode_tokens']} tokens."
    return "\n".join(lines) + f"\n\n{about}\n"


TRAINED = {
    "before": "nothing",
    "all": "deltas of all experts (PEFT)",
    "chosen": "deltas of chosen experts",
    "chosen_full": "chosen experts, fully",
}


def finetuning_cost_table(result: dict) -> str:
    """Rows: models and what is trained of them."""
    lines = ["| model | trained | time of a step | | gradients + optimizer | |", "|---|---|--:|--:|--:|--:|"]
    for model, variants in result["models"].items():
        for name, cell in variants.items():
            size = (cell["gradients"] + cell["optimizer"]) / 2**20
            ratios = [f"{ratio:.2f}x" for ratio in (cell["seconds_ratio"]["median"], cell["bytes_ratio"])]
            figures = [f"{cell['seconds']['median']:.2f} s", ratios[0], f"{size:.1f} MiB", ratios[1]]
            lines.append("| " + " | ".join([model, TRAINED[name], *figures]) + " |")
    settings = result["settings"]
    return "\n".join(lines) + f"\n\nRank {settings['rank']}, steps of {settings['batch_size'] * settings['length']} tokens.\n"


def finetuning_quality_table(result: dict) -> str:
    """Rows: what was trained; columns: perplexity."""
    lines = ["| trained | held-out code | English |", "|---|--:|--:|"]
    for name, found in result["perplexity"].items():
        lines.append(f"| {TRAINED[name]} | {found['code']:.2f} | {found['english']:.2f} |")
    settings = result["settings"]
    return "\n".join(lines) + f"\n\nPerplexity after {settings['steps']} steps on code at rank {settings['rank']}.\n"


def healing_table(result: dict) -> str:
    """Rows: students and lengths; columns: perplexity of the dense model and of the student before and after healing."""
    lines = ["| student | tokens | dense | before | after | of the gap closed |", "|---|---|---|---|---|---|"]
    for label, model in result["models"].items():
        for cell in model["cells"]:
            figures = [f"{cell[name]:.2f}" for name in ("dense", "before", "after")]
            lines.append("| " + " | ".join([label, f"{cell['length']:,}", *figures, f"{cell['closed']:.0%}"]) + " |")
    lines.append("")
    for label, model in result["models"].items():
        training = model["training"]
        lines.append(
            f"{label}: {training['max_steps']} steps of one row of {training['length']} tokens, window {model['window_in_training']}"
            f" in training and {model['window']} when measured, rank {training['lora_rank']}, learning rate"
            f" {training['learning_rate']:g}; half of the text is source code, half a later part of the evaluated book."
        )
    return "\n".join(lines) + "\n"


def grpo_table(result: dict) -> str:
    """Rows: steps; columns: mean rewards of what was sampled."""
    settings, log = result["settings"], result["log"]
    rows = [("held out, before", result["before"]["format"], result["before"]["answer"])]
    for start in range(0, len(log), 4):
        part = log[start : start + 4]
        means = [statistics.mean(line[f"rewards/{name}_reward/mean"] for line in part) for name in ("format", "answer")]
        rows.append((f"steps {start + 1}-{start + len(part)}", *means))
    rows.append(("held out, after", result["after"]["format"], result["after"]["answer"]))
    lines = ["| | reward for the format | for the answer |", "|---|--:|--:|"]
    lines += [f"| {name} | {form:.2f} | {answer:.2f} |" for name, form, answer in rows]
    return "\n".join(lines) + (
        f"\n\n{settings['task']}, {settings['questions']} x {settings['generations']} answers of at most"
        f" {settings['completion_length']} tokens a step, {settings['examples']} examples before each question, adapters of rank"
        f" {settings['rank']}, learning rate {settings['learning_rate']:g}; {settings['held_out']} questions held out.\n"
    )


def serving_table(result: dict) -> str:
    """Rows: ways to ask; columns: throughput and how long an answer takes."""
    settings = result["settings"]
    lines = ["| requests | tokens per second | an answer takes |", "|---|--:|--:|"]
    for name, way in result["ways"].items():
        lines.append(f"| {name} | {way['tokens_per_second']:.1f} | {way['latency_median']:.1f} s |")
    return "\n".join(lines) + (
        f"\n\n{settings['clients']} questions, {settings['tokens']} tokens each, {settings['dtype']}, {settings['threads']} thread(s):"
        f" {result['speedup']['median']:.1f}x the tokens per second; {result['same_texts']:.0%} of the texts are the same.\n"
    )


def expert_table(result: dict) -> str:
    """Rows: dtype and number of tokens; columns: the time of our experts, and how many times as long the others take."""
    names = list(dict.fromkeys(name for cell in result["cells"] for name in cell["forward_speedups"]))
    others = ["dense MLP" if name == "dense" else f"`{name}`" for name in names]
    header = ["dtype", "tokens", "ours", *others, "ours, with backward", *others]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    for cell in result["cells"]:
        row = [cell["dtype"], f"{cell['tokens']:,}"]
        for what in ("forward", "forward_backward"):
            taken, ratios = cell[what], cell[f"{what}_speedups"]
            row.append(f"{1e3 * taken['ours']['median']:.2f} ms" if taken else "")
            row += [f"{ratios[name]['median']:.2f}x" if name in ratios else "" for name in names]
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        f"{result['num_experts']} experts of width {result['moe_intermediate_size']}, {result['num_experts_per_tok']} per token, hidden"
        f" size {result['hidden_size']}, {result['environment']['threads']} thread(s). The dense MLP is as wide as a token's experts"
        " together; in code: transformers' implementations. Their time over ours: above 1, ours is faster.",
    ]
    return "\n".join(lines) + "\n"


def cache_table(result: dict) -> str:
    """Rows: budgets; columns: hit rate and speed, for each kind of text, with and without reading in advance."""
    kinds = list(result["texts"])
    header = [
        "experts in memory",
        *(f"{kind}: {what}" for kind in kinds for what in ("hit rate", "speed", "speed, nothing in advance")),
    ]
    lines = ["| " + " | ".join(header) + " |", "|--:|" + "--:|" * (len(header) - 1)]
    cells = {(kind, c["share"], c["prefetch"]): c for kind in kinds for c in result["texts"][kind]}
    for share in sorted({share for _, share, _ in cells}):
        row = [f"{share:.1%}".replace(".0%", "%")]
        for kind in kinds:
            cell, without = cells[kind, share, True], cells[kind, share, False]
            row += [f"{cell['hit_rate']:.0%}", *(f"{c['speed']['median']:.2f}x" for c in (cell, without))]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n\nSpeed of decoding beside the same model with all experts in memory; the text is the same.\n"


def dynamic_table(result: dict) -> str:
    """Rows: shares of active experts; columns: what that does to perplexity and time."""
    lines = [
        "| | experts per token | perplexity | the same number for every token | time of the sparse layers |",
        "|:--|--:|--:|--:|--:|",
    ]
    for name, found in result["models"].items():
        for cell in found["cells"]:
            fixed = f"{cell['fixed']['active']:.0f}: {cell['fixed']['increase']:+.1%}"
            ratio = f"{cell['over_all']['median']:.2f}x"
            lines.append(f"| {name} | {cell['active']:.2f} of {cell['of']} | {cell['increase']:+.1%} | {fixed} | {ratio} |")
    return "\n".join(lines) + "\n\nAll beside the same model with all of these experts active for every token.\n"


def step_table(result: dict) -> str:
    """Rows: models with experts; columns: a step beside that of the dense model, and peak memory with checkpointing."""
    lines = ["| | dense | experts | | activations | with checkpointing |", "|---|--:|--:|--:|--:|--:|"]
    for name, found in result["models"].items():
        seconds = [f"{found['seconds'][kind]['median']:.2f} s" for kind in ("dense", "experts")]
        kept, recomputed = (found["peak_bytes"][kind] / 2**20 for kind in ("kept", "recomputed"))
        memory = f"{kept:.0f} MiB | {recomputed:.0f} MiB · {recomputed / kept:.2f}x"
        lines.append(f"| {name} | {' | '.join(seconds)} | {found['ratio']['median']:.2f}x | {memory} |")
    settings = result["settings"]
    return "\n".join(lines) + (
        f"\n\nA step of {settings['batch_size']} x {settings['length']} tokens. Low-rank: SmolLM2, beside adapters of the rank that is"
        " active per token. Copies: a small model, beside MLPs as wide as the active experts together. Activations: peak memory of"
        " forward and backward beyond weights and gradients.\n"
    )


def training_table(result: dict) -> str:
    """Rows: before, and both models after the training; columns: held-out loss by domain. Below: what the routers do."""
    models, settings = result["models"], result["settings"]
    domains = list(models["dense"]["before"]["losses"])
    lines = ["| | trained weights | " + " | ".join(f"held-out loss, {name}" for name in domains) + " |"]
    lines.append("|---|" + "--:|" * (len(domains) + 1))
    rows = [("SmolLM2", "", models["dense"]["before"])]
    rows += [(label, f"{models[label]['trainable'] / 1e6:.1f}M", models[label]["after"]) for label in models]
    for label, weights, found in rows:
        lines.append(f"| {label} | {weights} | " + " | ".join(f"{found['losses'][name]:.3f}" for name in domains) + " |")
    pairs = [(one, other) for one in models for other in models if one.startswith("experts") and other.startswith("dense")]
    differences = [
        f"{one} and {other}: "
        + ", ".join(
            f"{name} {mean:+.3f} ± {error:.3f}" for name in domains for mean, error in [_difference(models, name, one, other)]
        )
        for one, other in pairs
    ]
    routing = [
        f"{label}: entropy of use {mean['relative_entropy']:.3f}, least used {mean['least_used']:.2f}, purity "
        + ", ".join(f"{name} {mean['purity'][name]:.0%}" for name in domains)
        for label, mean in [("before", models["experts"]["before"]["mean"])]
        + [(label, found["after"]["mean"]) for label, found in models.items() if found["after"]["mean"]]
    ]
    lines += [
        "",
        f"{settings['steps']} steps of {settings['batch_size'] * settings['accumulation']} x {settings['length']} tokens;"
        f" {settings['num_experts']} experts of rank {settings['expert_rank']}, {settings['num_experts_per_tok']} per token, in"
        f" {len(settings['expert_layers'])} of 30 layers. Differences of the loss, with their standard error over"
        f" {settings['windows']} held-out windows; below 0, experts are better:",
        "",
        *(f"- {line}" for line in differences),
        "",
        "Entropy of use over the experts of a layer (1 = all alike), the least used expert of all layers (1 = a fair share), and how"
        " many held-out tokens have their best expert in their domain:",
        "",
        *(f"- {line}" for line in routing),
    ]
    return "\n".join(lines) + "\n"


def _difference(models: dict, name: str, first: str, second: str) -> tuple[float, float]:
    """Mean and standard error of what the first model's loss is above the second one's, window by window."""
    pairs = zip(*(models[label]["after"]["window_losses"][name] for label in (first, second)), strict=True)
    differences = [one - other for one, other in pairs]
    return statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5


TABLES = {
    "dynamic_k": dynamic_table,
    "expert_cache": cache_table,
    "expert_finetuning_cost": finetuning_cost_table,
    "expert_finetuning_quality": finetuning_quality_table,
    "attention_layer": attention_table,
    "smollm2_decode_engines": engines_table,
    "smollm2_grpo": grpo_table,
    "smollm2_healing": healing_table,
    "smollm2_serving": serving_table,
    "expert_layer": expert_table,
    "experts_training_step": step_table,
    "smollm2_experts_training": training_table,
    "smollm2_generation": generation_table,
    "smollm2_routing": routing_table,
    "smollm2_patterns": pattern_table,
}


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
    """The page with everything between its markers made anew.

    Raises:
        FileNotFoundError: a table whose result is missing.
    """

    def replace(match: re.Match) -> str:
        name = match["name"]
        if name is None:
            return f"{match[1]}{preset_rows()}{match[4]}"
        result = json.loads(Path("results", f"{name}.json").read_text())
        table = TABLES.get(name, markdown_table)(result)
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
