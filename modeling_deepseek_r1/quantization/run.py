"""From a checkpoint to a quantized one."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..conversion.export import accompanying_files
from ..conversion.write import atomic_folder, check_destination, clean_leftovers
from ..evaluation.loading import load_tokenizer, usable_device
from ..evaluation.text import encode_text, leading_token_id, read_text, token_windows
from ..registration import AUTO_CLASSES, MULTIMODAL_AUTO_CLASSES
from .calibrate import calibrated, quantized_module
from .quantizer import DeepseekR1QuantizationConfig, finish, round_to_nearest, weights_of
from .report import REPORT_FILE, LayerRecord, MatrixRecord, QuantizationReport
from .targets import Target, targets

WINDOWS, LENGTH = 16, 512
"""Of a calibration text: 8,192 tokens."""

_OWN = {cls.__name__: cls for cls in (*AUTO_CLASSES.values(), *MULTIMODAL_AUTO_CLASSES.values())}


def quantize_model(
    model: PreTrainedModel,
    config: DeepseekR1QuantizationConfig,
    windows: torch.Tensor | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[MatrixRecord], list[LayerRecord]]:
    """Quantizes a model in place; `save_pretrained` and `from_pretrained` then do what they should.

    Rounding to nearest takes any transformers model; a text can be read by decoders of this library.

    Args:
        windows: `[windows, n]` token ids of a text to calibrate on, and to measure errors on.
        on_progress: called with (layers done, layers).

    Raises:
        ValueError: a method that needs a text, weights that are not finite or already quantized, groups that do not divide a
            layer's inputs, or nothing to quantize.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model is quantized already; quantize the checkpoint that it was made of")
    if config.method != "rtn" and windows is None:
        raise ValueError(f"method {config.method!r} needs a text to calibrate on")
    for target in targets(model, config):
        for name, weight in weights_of(target.module).items():
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(
                    f"{target.name}{name and '.'}{name} has weights that are not finite; the checkpoint is damaged"
                )
    was_training = model.training
    model.eval()
    with torch.no_grad():
        if windows is None:
            matrices, layers = _rounded(model, config), []
        else:
            matrices, layers = calibrated(model, config, windows, on_progress)
            finish(model, config)
    model.train(was_training)
    return matrices, layers


def _rounded(model: PreTrainedModel, config: DeepseekR1QuantizationConfig) -> list[MatrixRecord]:
    records = {}

    def make(target: Target) -> nn.Module:
        new, records[target.name] = quantized_module(target, {}, "rtn")
        return new

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    names = {module: name for name, module in model.named_modules()}
    round_to_nearest(model, config, make)
    if is_tied:
        records.pop(names[head], None)
    return [record for own in records.values() for record in own]


def quantize_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    config: DeepseekR1QuantizationConfig,
    *,
    texts: Sequence[str] = (),
    num_windows: int = WINDOWS,
    length: int = LENGTH,
    overwrite: bool = False,
    device: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> QuantizationReport:
    """Writes a quantized copy of a checkpoint of this library, and `quantization_report.json` in it.

    Args:
        source: folder or hub id. destination: folder to be made; it appears only when it is complete.
        texts: UTF-8 files, or names of built-in texts, of the kind that the model is for.
        num_windows, length: how many windows of how many tokens are read of them, evenly spread over all of the text.
        overwrite: replace a checkpoint that is at `destination`.
        device: to compute on, as in `load_model`.
        on_progress: called with (layers done, layers).

    Raises:
        ValueError: as `quantize_model`; another family's checkpoint, or a text that is too short.
        OSError: a missing source or text, an existing or unwritable destination, a full disk.
    """
    destination = Path(destination).expanduser().resolve()
    folder = Path(source).expanduser()
    check_destination(destination, overwrite, folder)
    if config.method != "rtn" and not texts:
        raise ValueError(f"method {config.method!r} needs a text to calibrate on (--text)")
    model = _load(folder if folder.is_dir() else str(source)).to(usable_device(device))
    windows = None
    if texts:
        tokenizer = load_tokenizer(source)
        ids = encode_text(tokenizer, read_text(texts))
        windows = spread_windows(ids, length, num_windows, leading_token_id(tokenizer))
    numel, before = sum(p.numel() for p in model.parameters()), sum(p.numel() * p.element_size() for p in model.parameters())
    notes = clean_leftovers(destination)
    matrices, layers = quantize_model(model, config, windows, on_progress)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with atomic_folder(destination, size) as written:
        for name in accompanying_files(folder) if folder.is_dir() else ():
            (written / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, written / name)
        model.save_pretrained(written)
        if not folder.is_dir():
            load_tokenizer(source).save_pretrained(written)
        after = sum(path.stat().st_size for path in written.glob("*.safetensors"))
        report = QuantizationReport(
            *(str(destination), config.to_dict(), 0 if windows is None else windows.numel()),
            *(before, after, after / (2 * numel), matrices, layers, notes),
        )
        (written / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return report


def spread_windows(ids: torch.Tensor, length: int, num_windows: int, bos_token_id: int | None = None) -> torch.Tensor:
    """`[num_windows, length]` of a text `[tokens]`, evenly spread over it; arguments and errors as those of `token_windows`."""
    there = ids.numel() // (length - (bos_token_id is not None)) if length > 1 else 0
    limits = {"context_length": length, "bos_token_id": bos_token_id}
    windows = token_windows(ids, num_windows=max(there, num_windows) if num_windows > 0 else num_windows, **limits)
    return windows[torch.linspace(0, len(windows) - 1, num_windows).round().long()]


def _load(source: str | Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source)
    kind = _OWN.get((config.architectures or [""])[0])
    if kind is None:
        raise ValueError(f"{source} is a {config.model_type} checkpoint; convert it first: deepseek-r1 convert {source} FOLDER")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source} is quantized already; quantize the checkpoint that it was made of")
    return kind.from_pretrained(source).requires_grad_(False)
