"""The tables of README.md, docs/ and the model cards, one function for each kind of result in results/*.json."""

import statistics
from collections.abc import Iterable

from benchmark_candidates import table as candidates_table
from benchmark_decode_engines import table as engines_table
from benchmark_finetuning import cost_table, quality_table
from benchmark_long_documents import table as long_documents
from benchmark_quantization import table as quantization_table


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
        seconds = [f"{forward[name]:.3g} s" if name in forward else "" for name in variants]
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
        f" {pattern['routed_tokens']} keys each, random keys; {result['environment']['processor']}, {result['environment']['threads']}"
        f" thread(s). Time grows with the length to the power of, {exponents}.",
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
    cells = {}
    for tried in result["patterns"]:
        name = f"`{tried['layer_types']}`" + (" (chosen)" if tried["layer_types"] == result["chosen"] else "")
        cells[name] = [
            f"{tried['perplexity']:.2f}",
            f"{tried['increase']:+.1%}",
            f"{tried['copied']:.0%}",
            f"{tried['cost']:.0%}",
        ]
    columns = ["perplexity", "rises by", "repeated passage predicted", "query-key products"]
    return "\n".join(_grid("layers", columns, cells)) + "\n"


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


def healing_table(result: dict) -> str:
    """Rows: students and lengths; columns: perplexity of the dense model and of the student before and after healing."""
    cells, notes = {}, []
    for label, model in result["models"].items():
        for cell in model["cells"]:
            figures = [f"{cell[name]:.2f}" for name in ("dense", "before", "after")]
            cells[f"{label}, {cell['length']:,} tokens"] = [*figures, f"{cell['closed']:.0%}"]
        training, rank = model["training"], model["training"]["lora_rank"]
        notes.append(
            f"\n{label}: {training['max_steps']} steps of one row of {training['length']} tokens, window {model['window_in_training']}"
            f" in training and {model['window']} when measured, {f'rank {rank}' if rank else 'all weights but the embedding'}, learning"
            f" rate {training['learning_rate']:g}; the text is source code, documentation, and a later part of the evaluated book."
        )
    return "\n".join([*_grid("student", ["dense", "before", "after", "of the gap closed"], cells), *notes]) + "\n"


def grpo_table(result: dict) -> str:
    """Rows: steps; columns: mean rewards of what was sampled."""
    settings, log = result["settings"], result["log"]
    rows = {"held out, before": [result["before"]["format"], result["before"]["answer"]]}
    for start in range(0, len(log), 4):
        part = log[start : start + 4]
        means = [statistics.mean(line[f"rewards/{name}_reward/mean"] for line in part) for name in ("format", "answer")]
        rows[f"steps {start + 1}-{start + len(part)}"] = means
    rows["held out, after"] = [result["after"]["format"], result["after"]["answer"]]
    cells = {name: [f"{mean:.2f}" for mean in means] for name, means in rows.items()}
    return "\n".join(_grid("", ["reward for the format", "for the answer"], cells)) + (
        f"\n\n{settings['task']}, {settings['questions']} x {settings['generations']} answers of at most"
        f" {settings['completion_length']} tokens a step, {settings['examples']} examples before each question, adapters of rank"
        f" {settings['rank']}, learning rate {settings['learning_rate']:g}; {settings['held_out']} questions held out.\n"
    )


def serving_table(result: dict) -> str:
    """Rows: ways to ask; columns: throughput and how long an answer takes."""
    settings = result["settings"]
    cells = {
        name: [f"{way['tokens_per_second']:.1f}", f"{way['latency_median']:.1f} s"] for name, way in result["ways"].items()
    }
    return "\n".join(_grid("requests", ["tokens per second", "an answer takes"], cells)) + (
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


def block_table(result: dict) -> str:
    """Rows: blocks of the families in each implementation; columns: how many times as long as ours they take."""
    cells = [(cell, what) for cell in result["cells"] for what in ("forward", "forward_backward") if cell[what]]
    names = list(dict.fromkeys(name for cell, what in cells for name in cell[f"{what}_speedups"]))
    titles = [f"{cell['tokens']:,}{', with backward' if what == 'forward_backward' else ''}" for cell, what in cells]
    ratios = {name: [cell[f"{what}_speedups"].get(name) for cell, what in cells] for name in names}
    rows = {name: [f"{ratio['median']:.2f}x" if ratio else "" for ratio in own] for name, own in ratios.items()}
    return "\n".join(_grid("", titles, rows)) + (
        "\n\nTime of a whole sparse block, router included, over that of ours, by number of tokens: above 1, ours is faster."
        " DeepSeek-V3's has a shared expert and stands beside a block of ours that has one.\n"
    )


def progressive_table(result: dict) -> str:
    """Held-out loss and mean number of active experts of both runs, at each measured step."""
    steps = [str(point["step"]) for point in result["runs"]["fixed"]]
    cells = {name: [f"{p['loss']:.3f} ({p['active']:.1f})" for p in points] for name, points in result["runs"].items()}
    return "\n".join(_grid("step", steps, cells)) + "\n\nHeld-out loss, and in brackets the mean number of active experts.\n"


def _grid(title: str, columns: Iterable[str], rows: dict[str, Iterable[str]]) -> list[str]:
    """Lines of a table: title of the first column, those of the others, and the cells behind each row's name."""
    columns = list(columns)
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|:--|" + "--:|" * len(columns)]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]


def multimodal_table(result: dict) -> str:
    """Rows: held-out tasks; columns: exact answers and word errors with the own input, another one, and none. Below: controls."""
    shown, found = {"own": "", "of another": ", another's", "none": ", none"}, result["results"]
    titles = ["questions", *(f"{what}{kind}" for what in ("exact", "word errors") for kind in shown.values())]
    cells = {
        name: [f"{own['own']['questions']:,}"]
        + [f"{own[kind][what]:.0%}" for what in ("exact", "word_error_rate") for kind in shown]
        for name, own in found.items()
    }
    settings, training = result["settings"], result["training"]
    about = (
        f"{settings['trained_weights'] / 1e6:.1f}M weights trained for {settings['steps']:,} steps of {settings['batch_size']} questions"
        f" or words, {training['seconds'] / 60:.0f} minutes on {settings['threads']} thread(s), measurements included. Another's: the"
        " picture or clip of another question."
    )
    kinds = {"before": "before training", "after": "after", "of another": "after, another's"}
    agreement = {name: [f"{own[kind]:.3f}" for kind in kinds] for name, own in result["consistency"].items()}
    parts = {"as trained": {name: own["own"] for name, own in found.items()}}
    parts |= {f"{part} off": own for part, own in result["switched_off"].items()}
    switched = {name: [f"{own[name]['exact']:.0%}" for own in parts.values()] for name in found}
    lines = [*_grid("", titles, cells), "", about, ""]
    lines += [*_grid("consistency with question and answer", kinds.values(), agreement), ""]
    lines += [*_grid("exact", parts, switched), ""]
    lines += ["Off: in the trained model, 500 questions; features without gates, closed bridges, routing blind to modality."]
    if "controls" in result:
        step = next(iter(result["controls"].values()))["training"]["examined"][-1]["step"]
        runs = {"all parts": training, **{f"without {part}": run["training"] for part, run in result["controls"].items()}}
        rows = [next(row for row in run["examined"] if row["step"] == step) for run in runs.values()]
        tasks = {task: [f"{row[task]:.0%}" for row in rows] for task in rows[0] if task != "step"}
        lines += ["", *_grid(f"after {step} steps", runs, tasks)]
    return "\n".join(lines) + "\n"


def cache_table(result: dict) -> str:
    """Rows: budgets; columns: hit rate and speed, for each kind of text, with and without reading in advance."""
    kinds = list(result["texts"])
    header = [f"{kind}: {what}" for kind in kinds for what in ("hit rate", "speed", "speed, nothing in advance")]
    rows, cells = {}, {(kind, c["share"], c["prefetch"]): c for kind in kinds for c in result["texts"][kind]}
    for share in sorted({share for _, share, _ in cells}):
        row = rows[f"{share:.1%}".replace(".0%", "%")] = []
        for kind in kinds:
            cell, without = cells[kind, share, True], cells[kind, share, False]
            row += [f"{cell['hit_rate']:.0%}", *(f"{c['speed']['median']:.2f}x" for c in (cell, without))]
    return (
        "\n".join(_grid("experts in memory", header, rows))
        + "\n\nSpeed of decoding beside the same model with all experts in memory; the text is the same.\n"
    )


def dynamic_table(result: dict) -> str:
    """Rows: shares of active experts; columns: what that does to perplexity and time."""
    columns, cells = ["perplexity", "the same number for every token", "time of the sparse layers"], {}
    for name, found in result["models"].items():
        for cell in found["cells"]:
            fixed = f"{cell['fixed']['active']:.0f}: {cell['fixed']['increase']:+.1%}"
            figures = [f"{cell['increase']:+.1%}", fixed, f"{cell['over_all']['median']:.2f}x"]
            cells[f"{name}, {cell['active']:.2f} of {cell['of']}"] = figures
    return (
        "\n".join(_grid("experts per token", columns, cells))
        + "\n\nAll beside the same model with all of these experts active for every token.\n"
    )


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
    found = {"SmolLM2": ("", models["dense"]["before"])}
    found |= {label: (f"{model['trainable'] / 1e6:.1f}M", model["after"]) for label, model in models.items()}
    cells = {label: [size, *(f"{own['losses'][name]:.3f}" for name in domains)] for label, (size, own) in found.items()}
    lines = _grid("", ["trained weights", *(f"held-out loss, {name}" for name in domains)], cells)
    pairs = [(one, other) for one in models for other in models if one.startswith("experts") and other.startswith("dense")]
    differences = [
        f"{one} and {other}: "
        + ", ".join("{} {:+.3f} ± {:.3f}".format(name, *_difference(models, name, one, other)) for name in domains)
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


def ablation_table(result: dict) -> str:
    """Rows: the dense model and the students; columns: held-out loss, and by how much it is below that of the first student."""
    first, last, settings = result["measurements"][0], result["measurements"][-1], result["settings"]
    texts = list(first["losses"]["dense"])
    header = [*(f"{name}, {when}" for name in texts for when in ("before", "after")), *(f"{name}, gained" for name in texts)]
    lines = ["| | trained weights | " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) + 1)]
    base, *_ = result["trained"]
    for label in first["losses"]:
        values = [statistics.mean(found["losses"][label][name]) for name in texts for found in (first, last)]
        cells = [f"{value:.3f}" for value in values]
        for name in texts if label not in ("dense", base) else ():
            gains = [a - b for a, b in zip(*(last["losses"][one][name] for one in (base, label)), strict=True)]
            cells.append(f"{statistics.mean(gains):.3f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.3f}")
        cells += [""] * (len(header) - len(cells))
        trained = f"{result['trained'][label] / 1e6:.2f}M" if label in result["trained"] else ""
        lines.append("| " + " | ".join([label, trained, *cells]) + " |")
    return "\n".join(lines) + (
        f"\n\nLoss in nats per token after {last['step']} of {settings['steps']} steps of one row of {settings['length']} tokens; window"
        f" {settings['window']}, {settings['sinks']} sink tokens, 1 of {settings['stride']} tokens a node, {settings['memory']} memory"
        f" tokens, rank {settings['rank']}, learning rate {settings['learning_rate']}. Gained: beside {base}, with the standard error over"
        f" {settings['windows']} windows.\n"
    )


TABLES = {
    "smollm2_quantization": quantization_table,
    "smollm2_ablation": ablation_table,
    **dict.fromkeys(("smollm2_decode_engines", "smollm2_decode_engines_long"), engines_table),
    "smollm2_long_documents": long_documents,
    "dynamic_k": dynamic_table,
    "multimodal": multimodal_table,
    "progressive_sparsity": progressive_table,
    "expert_blocks": block_table,
    "expert_cache": cache_table,
    "expert_finetuning_cost": cost_table,
    "expert_finetuning_quality": quality_table,
    **dict.fromkeys(("attention_layer", "attention_layer_gpu"), attention_table),
    "candidates": candidates_table,
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
