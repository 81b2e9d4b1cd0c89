"""Table and heat map of how models use their experts, from what `domains.measure_domains` has counted."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from .report import check_plot, figure_class

_CELL_INCHES = (0.42, 0.23)
_COLOURS = "viridis"


def expert_table(experts: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table per model, a row per sparse layer and one for all of them.

    Args:
        experts: label -> `DomainResult.to_dict` of a model with experts.
    """
    return "\n".join(_model_table(label, result) for label, result in experts.items())


def _model_table(label: str, result: Mapping[str, Any]) -> str:
    layers, mean = result["layers"], result["mean"]
    texts = list(layers[0]["shares"])
    header = [label, "entropy of use", "least used expert", *(f"{name}: to its domain" for name in texts)]
    header += [f"{name}: work by domain" for name in texts]
    lines = ["| " + " | ".join(header) + " |", "|:--|" + "--:|" * (len(header) - 1)]
    for layer in layers:
        work = [
            ", ".join(f"{domain} {share:.0%}" for domain, share in layer["utilisation"][name].items() if domain)
            for name in texts
        ]
        lines.append("| " + " | ".join([f"layer {layer['layer']}", *_figures(layer, texts), *work]) + " |")
    lines.append("| " + " | ".join(["**all**", *_figures(mean, texts), *([""] * len(texts))]) + " |")
    about = (
        "Entropy of use: 1 = all experts are used alike. Least used expert: its work over a fair share. To its domain: tokens"
    )
    return "\n".join(lines) + f"\n\n{about} whose best expert belongs to the text's domain.\n"


def _figures(row: Mapping[str, Any], texts: list[str]) -> list[str]:
    purity = [f"{row['purity'][name]:.0%}" if name in row["purity"] else "" for name in texts]
    return [f"{row['relative_entropy']:.3f}", f"{row['least_used']:.2f}", *purity]


def heat_map(experts: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draws layers x experts for every text, the share of the text's active slots as colour; the models below each other.

    The experts of a domain stand together under its name; those of the domain that a text is named after are framed.

    Args:
        experts: label -> `DomainResult.to_dict` of a model with experts; all of the same texts.
        path: its suffix is the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib writes no such format.
    """
    check_plot(path)
    texts = list(next(iter(experts.values()))["layers"][0]["shares"])
    pictures = {label: _Picture(result["layers"]) for label, result in experts.items()}
    columns = max(picture.columns for picture in pictures.values())
    heights = [len(picture.rows) for picture in pictures.values()]
    width = len(texts) * (columns * _CELL_INCHES[0] + 0.75) + 0.9
    height = sum(heights) * _CELL_INCHES[1] + len(heights) * 0.75 + 0.35
    figure = figure_class()(figsize=(width, height), layout="constrained")
    all_axes = figure.subplots(len(pictures), len(texts), squeeze=False, gridspec_kw={"height_ratios": heights})
    largest = 100 * max(
        max(layer["shares"][name]) for result in experts.values() for layer in result["layers"] for name in texts
    )
    for (label, picture), row in zip(pictures.items(), all_axes, strict=True):
        for name, axes in zip(texts, row, strict=True):
            image = picture.draw(axes, name, largest)
            axes.set_title(f"{name} text" if len(pictures) == 1 else f"{name} text, {label}", fontsize=10, fontweight="bold")
        row[0].set_ylabel("layer")
    fair = sorted({100 / sum(layer["domains"].values()) for result in experts.values() for layer in result["layers"]})
    bar = figure.colorbar(image, ax=all_axes, aspect=30, pad=0.02)
    bar.set_label("share of the text's work, %", labelpad=12)
    bar.ax.hlines(fair, *bar.ax.get_xlim(), color="white", linewidth=1.5)
    bar.ax.set_yticks(fair, [f"fair {share:.3g}" for share in fair], fontsize=8, minor=True)
    figure.supxlabel("Framed: the experts of the text's own domain", fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)


class _Picture:
    """The rows of one model: a row of names where the domains change, and one per layer."""

    def __init__(self, layers: list[dict[str, Any]]):
        self.layers = layers
        self.columns = max(sum(layer["domains"].values()) for layer in layers)
        self.rows: list[dict[str, Any] | None] = []
        self.groups: list[tuple[int, int, dict[str, int]]] = []
        for _, group in groupby(layers, key=lambda layer: tuple(layer["domains"].items())):
            group = list(group)
            self.groups.append((len(self.rows), len(group), group[0]["domains"]))
            self.rows += [None, *group]

    def draw(self, axes, name: str, largest: float):
        """The picture of one text; the image, for a colour bar."""
        empty = float("nan")
        shares = [[100 * share for share in row["shares"][name]] if row else [] for row in self.rows]
        values = [row + [empty] * (self.columns - len(row)) for row in shares]
        image = axes.imshow(values, cmap=_COLOURS, vmin=0, vmax=largest, aspect="auto")
        for first, count, domains in self.groups:
            start = 0
            for domain, size in domains.items():
                self._mark(axes, domain, start, size, first, count, own=domain == name)
                start += size
        axes.set_yticks(
            [number for number, row in enumerate(self.rows) if row], [str(row["layer"]) for row in self.rows if row], fontsize=8
        )
        axes.set_xticks(range(self.columns), [str(number) for number in range(self.columns)], fontsize=8)
        axes.set_xlabel("expert")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return image

    @staticmethod
    def _mark(axes, domain: str, start: int, size: int, first: int, count: int, own: bool) -> None:
        if start:
            axes.plot([start - 0.5] * 2, [first + 0.5, first + count + 0.5], color="white", linewidth=2.5)
        style = {"fontweight": "bold"} if own else {}
        axes.text(start + (size - 1) / 2, first + 0.1, domain, ha="center", va="center", fontsize=9, **style)
        if own:
            left, right, top, bottom = start - 0.5, start + size - 0.5, first + 0.5, first + count + 0.5
            axes.plot(
                [left, right, right, left, left],
                [top, top, bottom, bottom, top],
                color="#D55E00",
                linewidth=2.5,
                clip_on=False,
                zorder=3,
            )
