"""Tables of result files for the README, beside those in `render_readme.py`."""

import statistics


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
