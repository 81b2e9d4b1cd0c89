"""A multimodal checkpoint of a text checkpoint and encoders: weights, processor and generation settings in one folder."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..modeling_deepseek_r1 import DeepseekR1ForCausalLM
from ..modeling_multimodal import DeepseekR1ForConditionalGeneration
from ..tokenization.processing_deepseek_r1 import DeepseekR1Processor
from ..tokenization.rows import RowSchema
from ..tokenization.tokenization_deepseek_r1 import response_template
from .convert import convert_checkpoint
from .write import atomic_folder, check_destination, clean_leftovers

IMAGE_SIZE = 224
"""Pixels, for an encoder that takes any size and says nothing."""


@dataclass(frozen=True)
class CompositionReport:
    """What `compose_checkpoint` wrote.

    Attributes:
        destination: the folder.
        parameters: part -> number of its parameters.
        placeholders: modality -> token id.
        notes: what was done about the remains of an earlier, interrupted run.
    """

    destination: Path
    parameters: dict[str, int]
    placeholders: dict[str, int]
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """The report as text."""
        lines = [f"{self.destination}: {sum(self.parameters.values()) / 1e6:.1f} M parameters"]
        lines += [f"  {name:<16} {number / 1e6:8.2f} M" for name, number in self.parameters.items() if number]
        lines += [f"  placeholder of {modality}: token {token}" for modality, token in self.placeholders.items()]
        return "\n".join([*lines, *self.notes])


def compose_checkpoint(
    text: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    vision: str | os.PathLike | None = None,
    audio: str | os.PathLike | None = None,
    row_schema: RowSchema | None = None,
    image_size: int | None = None,
    max_tiles: int = 1,
    max_frames: int | None = None,
    use_audio_in_video: bool = False,
    vision_downsampling: int = 1,
    audio_downsampling: int = 4,
    fusion: Mapping[str, Any] | None = {},  # noqa: B006 (never changed; None means that there is no gate)
    bridge: Mapping[str, Any] | Sequence[int] | None = None,
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
) -> CompositionReport:
    """Makes a multimodal checkpoint. Text alone gives the text checkpoint's logits.

    Args:
        text: checkpoint of this library, or one that `convert_checkpoint` takes (a folder, hub id or GGUF file), which is converted
            exactly.
        destination: folder to be made; it appears only when it is complete.
        vision: folder or hub id of a DINOv2, SigLIP or CLIP checkpoint; its own image processor is kept where it has one.
        audio: folder or hub id of a Whisper checkpoint.
        row_schema: fields of table rows (`RowSchema.fit`).
        image_size: images are resized to squares of so many pixels; default: as the image processor says, or 224.
        max_tiles, max_frames, use_audio_in_video: as in [`DeepseekR1Processor`].
        vision_downsampling, audio_downsampling, fusion, bridge: as in [`DeepseekR1Config`]; bridge may be the list of its layers.
        dtype: of the written weights; default: as the text checkpoint's.
        overwrite: replace a checkpoint that is at `destination`.

    Raises:
        ValueError: no other modality than text, or parts that are not supported or do not fit together.
        OSError: a missing part, an existing or unwritable destination, a full disk.
    """
    destination = Path(destination).resolve()
    check_destination(destination, overwrite)
    present = {"image": vision, "video": vision, "audio": audio, "structured": row_schema}
    modalities = [modality for modality, part in present.items() if part is not None]
    if not modalities:
        raise ValueError("give at least one of vision, audio and row_schema; a text checkpoint alone is not changed")
    with tempfile.TemporaryDirectory() as scratch:
        source = _converted(text, Path(scratch) / "text")
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        model = DeepseekR1ForCausalLM.from_pretrained(source, dtype=dtype)
    if getattr(tokenizer, "response_template", None) is None:
        tokenizer.response_template = response_template(tokenizer.chat_template)
    placeholders = DeepseekR1Processor.add_placeholders(tokenizer, modalities)
    schema = row_schema.to_dict() if row_schema is not None else None
    structured = schema and {"num_numeric": len(schema["numeric"]), "categories": [len(c[1]) for c in schema["categorical"]]}
    if use_audio_in_video and (vision is None or audio is None or fusion is None):
        raise ValueError("use_audio_in_video needs vision, audio and fusion")
    if bridge is not None and not isinstance(bridge, Mapping):
        bridge = {"layers": list(bridge)}
    model = DeepseekR1ForConditionalGeneration.from_text_vision_audio_pretrained(
        model,
        placeholders=placeholders,
        vision=None if vision is None else str(vision),
        audio=None if audio is None else str(audio),
        structured_config=structured,
        vision_downsampling=vision_downsampling,
        audio_downsampling=audio_downsampling,
        fusion=None if fusion is None else dict(fusion),
        bridge=None if bridge is None else dict(bridge),
    )
    processor = DeepseekR1Processor(
        tokenizer,
        None if vision is None else image_processor(str(vision), model.config.vision_config, image_size),
        None if audio is None else AutoFeatureExtractor.from_pretrained(str(audio)),
        schema,
        patch_size=getattr(model.config.vision_config, "patch_size", 14),
        vision_downsampling=vision_downsampling,
        audio_downsampling=audio_downsampling,
        max_tiles=max_tiles,
        max_frames=max_frames,
        use_audio_in_video=use_audio_in_video,
    )
    notes = clean_leftovers(destination)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with atomic_folder(destination, size) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    return CompositionReport(destination, parts, placeholders, tuple(notes))


def _converted(text: str | os.PathLike, folder: Path) -> str:
    """The checkpoint itself, or a conversion of it in `folder`."""
    if not str(text).endswith(".gguf"):
        try:
            own = AutoConfig.from_pretrained(text).model_type == DeepseekR1TextConfig.model_type
        except (OSError, ValueError):
            # What is wrong with it the converter says.
            own = False
        if own:
            return str(text)
    convert_checkpoint(text, folder)
    return str(folder)


def image_processor(vision: str, config, image_size: int | None):
    """The image processor of a vision checkpoint, or one that only resizes and normalises as for ImageNet.

    Raises:
        ValueError: a size that the encoder's patches do not divide, or that it was not made for.
    """
    side = image_size or IMAGE_SIZE // config.patch_size * config.patch_size
    if side % config.patch_size or (config.model_type != "dinov2" and image_size not in (None, config.image_size)):
        valid = f"a multiple of {config.patch_size}" if config.model_type == "dinov2" else f"{config.image_size}"
        raise ValueError(f"image_size={image_size} does not fit the vision encoder; it must be {valid}")
    try:
        own = AutoImageProcessor.from_pretrained(vision)
    except (OSError, ValueError):
        own = None
    if own is not None and image_size is None:
        return own
    if own is None:
        from transformers import BitImageProcessorPil  # needs the extra "vision"

        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        side = config.image_size if config.model_type != "dinov2" else side
        return BitImageProcessorPil(size=_square(side), do_center_crop=False, image_mean=mean, image_std=std)
    own.size, own.do_center_crop = _square(side), False
    return own


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}
