"""One JSON file per evaluation, and the table and the figure made from it.

A result is a dictionary: `format_version`, `environment`, `settings`, `models` (label -> what it is; the first is the baseline)
and, for each task that ran, `perplexity` (label -> list), `retrieval` and `domains` (label -> dict), `speed` and `memory`, each
made by the `to_dict` of that task's result.
"""

import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

FORMAT_VERSION = 1
_MIB = 2**20


def environment(model=None, device: str | torch.device = "cpu") -> dict[str, Any]:
    """What a number depends on besides the model: software, processor, threads, time and command.

    Args:
        model: where given, its device and dtype are recorded too.
        device: where there is no model.
    """
    device = torch.device(device) if model is None else model.device
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name(),
        "cpu_count": os.cpu_count(),
        "device": str(device),
        "dtype": None if model is None else str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
    }


def _processor_name() -> str:
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_report(result: dict[str, Any], path: str | Path) -> None:
    """Writes `result` as JSON, under a temporary name first: an interruption leaves the old file or the new one.

    Infinite and undefined numbers, which JSON lacks, become the strings `"inf"`, `"-inf"` and `"nan"`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(result), indent=1, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes the file private; a result is an ordinary file.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_report(path: str | Path) -> dict[str, Any]:
    """Reads what `write_report` wrote.

    Raises:
        OSError: no such file.
        ValueError: not JSON, or of another format version.
    """
    result = json.loads(Path(path).read_text(encoding="utf-8"))
    version = result.get("format_version") if isinstance(result, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version!r}, this version of the library reads {FORMAT_VERSION}")
    return result


def _by_label(cells: Iterable[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["label"] == label]


def _spread(measurement: dict[str, Any], scale: float, digits: int) -> str:
    low, middle, high = (float(measurement[key]) * scale for key in ("minimum", "median", "maximum"))
    return (
        f"{middle:.{digits}f}"
        if len(measurement["samples"]) == 1
        else f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
    )


def _rows(result: dict[str, Any]) -> list[tuple[str, int, list[str], list[float]]]:
    """`(what, length, a text per model, a number per model)`; the numbers make the ratios to the first model."""
    labels = list(result["models"])
    rows = []

    def add(what: str, cells: dict[str, list[dict]], show: Callable[[dict], str], number: Callable[[dict], float]):
        for same_length in zip(*(cells[label] for label in labels), strict=True):
            length = same_length[0].get("length", same_length[0].get("context_length"))
            rows.append((what, length, [show(cell) for cell in same_length], [float(number(cell)) for cell in same_length]))

    if "perplexity" in result:
        add("Perplexity", result["perplexity"], lambda c: f"{float(c['perplexity']):.2f}", lambda c: c["perplexity"])
    for name in next(iter(result.get("domains", {}).values()), {"perplexity": ()})["perplexity"]:
        cells = {
            label: [{"length": found["context_length"], "value": found["perplexity"][name]}]
            for label, found in result["domains"].items()
        }
        add(f"Perplexity of {name}", cells, lambda c: f"{float(c['value']):.2f}", lambda c: c["value"])
    if "retrieval" in result:
        cells = {label: result["retrieval"][label]["by_length"] for label in labels}
        add("Retrieval, % (95 % interval)", cells, _accuracy, lambda c: c["accuracy"])
    if "speed" in result:
        cells = {label: _by_label(result["speed"]["cells"], label) for label in labels}
        add("Prefill, s", cells, lambda c: _spread(c["prefill_seconds"], 1, 2), lambda c: c["prefill_ratio"]["median"])
        add(
            "Decode, ms/token",
            cells,
            lambda c: _spread(c["decode_seconds_per_token"], 1e3, 1),
            lambda c: c["decode_ratio"]["median"],
        )
        add("Cache, MiB", cells, lambda c: f"{c['cache_bytes'] / _MIB:.1f}", lambda c: c["cache_bytes"])
    if "memory" in result:
        cells = {label: _by_label(result["memory"]["cells"], label) for label in labels}
        add(
            "Peak memory beyond weights, MiB",
            cells,
            lambda c: _spread(c["peak_bytes"], 1 / _MIB, 0),
            lambda c: c["ratio"]["median"],
        )
    return rows


def _accuracy(cell: dict[str, Any]) -> str:
    low, high = cell["accuracy_interval"]
    return f"{100 * cell['accuracy']:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def markdown_table(result: dict[str, Any]) -> str:
    """A Markdown table with a row per model and a column per quantity and context length; where there are further models, a
    number is followed by its ratio to that of the first one. Below it, one line on how it was measured.

    Times are medians with minimum and maximum; their ratios are medians over pairs of runs taken in turn.
    """
    labels, columns = list(result["models"]), _rows(result)
    header = ["", *(f"{what}, {length:,} tokens" for what, length, *_ in columns)]
    lines = ["| " + " | ".join(header) + " |", "|:--|" + "--:|" * len(columns)]
    for row, label in enumerate(labels):
        cells = [
            texts[row] + (f" · {numbers[row] / numbers[0]:.2f}x" if row and numbers[0] else "")
            for _, _, texts, numbers in columns
        ]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines) + "\n\n" + _measured_on(result) + "\n"


def _measured_on(result: dict[str, Any]) -> str:
    about = result["environment"]
    parts = [
        f"{about['processor']} ({about['device']}), threads: {about['threads']}",
        str(about["dtype"]),
        f"torch {about['torch']}, transformers {about['transformers']}, Python {about['python']}",
        about["date"][:10],
    ]
    if "retrieval" in result:
        first = next(iter(result["retrieval"].values()))
        parts.append(
            f"retrieval by chance: {100 * first['chance']:.0f} %, knowing all planted values: {100 * first['chance_seen']:.0f} %"
        )
    return "Measured on " + "; ".join(parts) + "."


# Okabe and Ito's palette: told apart with any common kind of colour blindness, and in print.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_LAYOUTS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}
_PANEL_INCHES = (4.6, 3.3)


class _Panel:
    """Grouped bars: one group per context length, one bar per model. `bars[label]` is a list of `(length, low, value, high)`."""

    def __init__(self, title: str, unit: str, bars: dict[str, list[tuple[int, float, float, float]]], digits: int, chance=None):
        self.title, self.unit, self.bars, self.digits, self.chance = title, unit, bars, digits, chance

    def draw(self, axes) -> None:
        lengths = [length for length, *_ in next(iter(self.bars.values()))]
        width = 0.8 / len(self.bars)
        for order, (label, cells) in enumerate(self.bars.items()):
            places = [group + (order - (len(self.bars) - 1) / 2) * width for group in range(len(lengths))]
            values = [value for _, _, value, _ in cells]
            errors = [[v - low for _, low, v, _ in cells], [high - v for _, _, v, high in cells]]
            drawn = axes.bar(places, values, width * 0.94, label=label, color=_COLOURS[order % len(_COLOURS)])
            if any(map(any, errors)):
                axes.errorbar(places, values, errors, fmt="none", ecolor="#333333", elinewidth=1, capsize=2.5)
            tops = [high for *_, high in cells]
            for bar, top, value in zip(drawn, tops, values, strict=True):
                centre = bar.get_x() + bar.get_width() / 2
                text = f"{value:.{self.digits}f}"
                axes.annotate(text, (centre, top), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=9)
        if self.chance is not None:
            axes.axhline(self.chance, color="#333333", linewidth=1, linestyle="--")
            place = (1.0, self.chance)
            axes.annotate("chance", place, (0, 2), axes.get_yaxis_transform(), "offset points", ha="right", fontsize=8)
        axes.set_title(self.title, fontsize=11, loc="left", fontweight="bold")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_xlabel("context length (tokens)")
        axes.set_ylabel(self.unit)
        axes.margins(y=0.12)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def _span(measurement: dict[str, Any], scale: float) -> tuple[float, float, float]:
    return tuple(float(measurement[key]) * scale for key in ("minimum", "median", "maximum"))


def _quality_panels(result: dict[str, Any]) -> list[_Panel]:
    panels = []
    if "perplexity" in result:
        bars = {
            label: [(cell["context_length"], *[float(cell["perplexity"])] * 3) for cell in result["perplexity"][label]]
            for label in result["models"]
        }
        panels.append(_Panel("Perplexity (lower is better)", "perplexity", bars, 2))
    if "retrieval" in result:
        bars = {
            label: [
                (
                    cell["length"],
                    *(100 * share for share in (cell["accuracy_interval"][0], cell["accuracy"], cell["accuracy_interval"][1])),
                )
                for cell in result["retrieval"][label]["by_length"]
            ]
            for label in result["models"]
        }
        # Of a model that knows which values occurred, the harder of the two.
        chance = 100 * next(iter(result["retrieval"].values()))["chance_seen"]
        panels.append(_Panel("Planted facts found (higher is better)", "% of questions, 95 % interval", bars, 0, chance))
    return panels


def _cost_panels(result: dict[str, Any]) -> list[_Panel]:
    panels = []
    if "speed" in result:
        cells = {label: _by_label(result["speed"]["cells"], label) for label in result["models"]}
        bars = {label: [(c["length"], *_span(c["prefill_seconds"], 1)) for c in cells[label]] for label in cells}
        panels.append(_Panel("Prefill time (lower is better)", "seconds, median and range", bars, 2))
    if "memory" in result:
        cells = {label: _by_label(result["memory"]["cells"], label) for label in result["models"]}
        bars = {label: [(c["length"], *_span(c["peak_bytes"], 1 / _MIB)) for c in cells[label]] for label in cells}
        panels.append(_Panel("Memory beyond weights (lower is better)", "peak of the prefill, MiB", bars, 0))
    elif "speed" in result:
        bars = {label: [(c["length"], *[c["cache_bytes"] / _MIB] * 3) for c in cells[label]] for label in cells}
        panels.append(_Panel("Key/value cache (lower is better)", "MiB", bars, 0))
    return panels


def check_plot(path: str | Path) -> None:
    """Whether `plot` could write `path`: so that nobody learns it after the measurements.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib writes no such format.
    """
    formats = figure_class()().canvas.get_supported_filetypes()
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in formats:
        raise ValueError(f"cannot draw {path}: the suffix must be one of {', '.join(sorted(formats))}")


def figure_class():
    """matplotlib's `Figure`, which draws without a display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "modeling-deepseek-r1[plot]"') from error
    return Figure


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Draws quality (left) and cost (right) by context length, the models side by side; the suffix of `path` is the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the result has nothing to draw, or matplotlib writes no such format.
    """
    check_plot(path)
    quality, cost = _quality_panels(result), _cost_panels(result)
    panels = [*quality, *cost]
    if len(panels) == 4:
        panels = [quality[0], cost[0], quality[1], cost[1]]
    if not panels:
        raise ValueError("the result holds no measurement to draw")
    rows, columns = _LAYOUTS[len(panels)]
    figure = figure_class()(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, wspace=0.03, hspace=0.04)
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, axes in zip(panels, all_axes, strict=True):
        panel.draw(axes)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=11)
    about = result["environment"]
    caption = (
        f"{about['processor']}, threads: {about['threads']}, {about['dtype']}, torch {about['torch']}, {about['date'][:10]}"
    )
    figure.supxlabel(caption, fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)
