"""What quantization has changed, matrix by matrix and layer by layer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..conversion.report import readable_bytes

REPORT_FILE = "quantization_report.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class MatrixRecord:
    """One weight, or the weights of all experts of a layer.

    Attributes:
        name: in the model. bytes_before, bytes_after: its size, scales included.
        error: norm of the error of its outputs on the calibration text, relative to theirs; of experts the mean.
        on_text: whether `error` is that; else it is the relative error of the weights.
        unseen_experts: experts that no token of the text went to; they are rounded to nearest.
    """

    name: str
    bytes_before: int
    bytes_after: int
    error: float
    on_text: bool = False
    unseen_experts: int = 0


@dataclass(frozen=True)
class LayerRecord:
    """A decoder layer after all layers before it have been quantized.

    Attributes:
        name: in the model. bytes_before, bytes_after: of its quantized weights.
        output_error: distance of its output from that of the whole model before, relative to the latter.
        router_agreement: share of tokens with the same experts as before; None without experts.
    """

    name: str
    bytes_before: int
    bytes_after: int
    output_error: float
    router_agreement: float | None

    @classmethod
    def of(cls, name: str, matrices: Sequence[MatrixRecord], error: float, agreement: float | None) -> "LayerRecord":
        """Adds up the sizes of a layer's matrices."""
        return cls(name, sum(m.bytes_before for m in matrices), sum(m.bytes_after for m in matrices), error, agreement)


@dataclass(frozen=True)
class QuantizationReport:
    """The result of `quantize_checkpoint`.

    Attributes:
        destination: the folder. config: what was asked for, as in config.json.
        tokens: of the calibration text.
        bytes_before, bytes_after: of all weights, and of the files that were written.
        share_of_bfloat16: `bytes_after` over two bytes for every weight of the source.
        matrices, layers: see `MatrixRecord` and `LayerRecord`; layers are compared on a text only.
        notes: what was done about the remains of an earlier, interrupted run.
    """

    destination: str
    config: dict[str, Any]
    tokens: int
    bytes_before: int
    bytes_after: int
    share_of_bfloat16: float
    matrices: list[MatrixRecord]
    layers: list[LayerRecord]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def summary(self) -> str:
        """A table with a line per layer, or per matrix where there was no text, and the sizes."""
        rows = [("", "before", "after", "error", "same experts")]
        inside = tuple(f"{layer.name}." for layer in self.layers)
        for one in self.matrices:
            if not inside or not one.name.startswith(inside):
                rows.append(
                    (one.name, readable_bytes(one.bytes_before), readable_bytes(one.bytes_after), f"{one.error:.2%}", "")
                )
        for layer in self.layers:
            same = "" if layer.router_agreement is None else f"{layer.router_agreement:.1%}"
            sizes = readable_bytes(layer.bytes_before), readable_bytes(layer.bytes_after)
            rows.append((layer.name, *sizes, f"{layer.output_error:.2%}", same))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]  # fmt: skip
        unseen = sum(one.unseen_experts for one in self.matrices if one.name.endswith("gate_up_proj"))
        notes = [f"{unseen} experts got no token of the text and were rounded to nearest"] if unseen else []
        sizes = f"{readable_bytes(self.bytes_before)} -> {readable_bytes(self.bytes_after)}"
        return "\n".join(
            [*self.notes, *lines, *notes, f"{self.destination}: {sizes}, {self.share_of_bfloat16:.3f} of bfloat16"]
        )
