"""Texts with images, videos, sound and table rows as the multimodal model's inputs.

In a text each of them is one placeholder token; the processor repeats it for every feature that the model will make of the input.
"""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor, BatchFeature
from transformers.processing_utils import ProcessorMixin

from .audio import read_audio, sound_spans, spectra
from .images import flat, read_image, read_video, tiles
from .media import sound_of_video
from .rows import RowSchema

PLACEHOLDER_TOKENS = {"image": "<|image|>", "video": "<|video|>", "audio": "<|audio|>", "structured": "<|row|>"}
"""Modality -> text of its placeholder, in the order of the numbers of modalities from 1 on."""

BLOCKS = {"image": "image", "image_url": "image", "video": "video", "audio": "audio", "row": "structured"}
"""Type of a block in a message's content -> modality."""

NO_TIME = -1.0


class DeepseekR1Processor(ProcessorMixin):
    r"""
    Tokenizer, image processor, audio feature extractor and table schema in one; what is None does not exist.

    Args:
        tokenizer: of the text model, with the placeholders of the modalities (`add_placeholders`).
        image_processor (*optional*): of the vision encoder, or its dictionary.
        feature_extractor (*optional*): a Whisper feature extractor, or its dictionary.
        row_schema (*optional*): a [`RowSchema`], or its dictionary.
        patch_size (`int`): side of the vision encoder's patches, in pixels.
        vision_downsampling, audio_downsampling (`int`): as in [`DeepseekR1Config`].
        max_tiles (`int`): an image larger than the encoder's input is also given in up to so many parts; 1 = never.
        max_frames (`int`, *optional*): a longer video is read at so many equally spaced frames.
        use_audio_in_video (`bool`): a frame is read together with what sounds up to it from the frame before, the last one with
            all that is left; the sound is that of the file, or "audio" of a mapping (as `audio` of `__call__`).
        chat_template (*optional*): default: the tokenizer's.

    Example:

    ```python
    processor = AutoProcessor.from_pretrained(folder)
    message = {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is this?"}]}
    inputs = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
    ```"""

    def __init__(
        self,
        tokenizer=None,
        image_processor=None,
        feature_extractor=None,
        row_schema=None,
        patch_size=14,
        vision_downsampling=1,
        audio_downsampling=4,
        max_tiles=1,
        max_frames=None,
        use_audio_in_video=False,
        chat_template=None,
    ):
        self.tokenizer = tokenizer
        self.image_processor = _restored(AutoImageProcessor, image_processor)
        self.feature_extractor = _restored(AutoFeatureExtractor, feature_extractor)
        self.row_schema = row_schema.to_dict() if isinstance(row_schema, RowSchema) else row_schema
        self.patch_size, self.vision_downsampling, self.audio_downsampling = patch_size, vision_downsampling, audio_downsampling
        self.max_tiles, self.max_frames, self.use_audio_in_video = max_tiles, max_frames, use_audio_in_video
        self.chat_template = chat_template or tokenizer.chat_template

    @classmethod
    def get_attributes(cls) -> list[str]:
        # The others may be None, which transformers' own loading and saving of parts does not know; they are dictionaries there.
        return ["tokenizer"]

    @staticmethod
    def add_placeholders(tokenizer, modalities: Sequence[str]) -> dict[str, int]:
        """Adds the placeholders of modalities to a tokenizer that lacks them; modality -> token id."""
        tokens = {modality: PLACEHOLDER_TOKENS[modality] for modality in modalities}
        tokenizer.add_tokens([token for token in tokens.values() if token not in tokenizer.get_vocab()], special_tokens=True)
        return {modality: tokenizer.convert_tokens_to_ids(token) for modality, token in tokens.items()}

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "mm_token_type_ids", "mm_token_times"]
        names += ["pixel_values", "pixel_values_videos"] if self.image_processor is not None else []
        names += ["input_features", "input_features_mask"] if self.feature_extractor is not None else []
        sound = ["video_sound_features", "video_sound_features_mask", "video_sound_spans"]
        names += sound if self.use_audio_in_video else []
        return names + (["row_numeric", "row_categorical", "row_missing"] if self.row_schema is not None else [])

    def __call__(
        self, images=None, text=None, videos=None, audio=None, rows=None, sampling_rate=None, return_tensors="pt", **kwargs
    ) -> BatchFeature:
        """Inputs of the model.

        Args:
            images: PIL images, arrays `[height, width, 3]`, paths or URLs; one, a list, or a list for each text.
            text: a text or a list of them, with one placeholder for each input.
            videos: mappings with "frames" and "timestamps" (seconds), or paths.
            audio: samples at `sampling_rate` Hz, mappings with "array" and "sampling_rate", or paths of WAV files.
            rows: mappings field -> value; None, NaN or absent = missing.
            kwargs: of the tokenizer; padding is on by default where tensors are returned.

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids`, the encoders' inputs, and with videos or sound `mm_token_times`.

        Raises:
            ValueError: inputs that cannot be read, that the model does not have, or that do not match the placeholders.
        """
        if text is None:
            raise ValueError("there is no text; each image, video, clip or row needs its placeholder in one")
        texts = [text] if isinstance(text, str) else list(text)
        given = {"image": images, "video": videos, "audio": audio, "structured": rows}
        given = {modality: _listed(items) for modality, items in given.items() if items is not None}
        self._check_counts(texts, given)
        data, times = self.encode_inputs(given, sampling_rate)
        texts = self._expand(texts, {modality: [len(item) for item in items] for modality, items in times.items()})
        kwargs.setdefault("padding", return_tensors is not None and len(texts) > 1)
        encoded = self.tokenizer(texts, **kwargs)
        encoded.update(self.token_kinds(encoded["input_ids"], times))
        return BatchFeature({**encoded, **data}, tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        tokenize=False,
        return_dict=False,
        return_tensors="pt",
        processor_kwargs=None,
        sampling_rate=None,
        **kwargs,
    ):
        """Renders a conversation, or a list of them, whose messages may contain blocks such as {"type": "image", "image": ...}.

        The keys of a block are "image", "video" (with "timestamps"), "audio" (with "sampling_rate") and "row"; "path" and "url"
        work too. Any template that takes text works: blocks become placeholders before it sees them.

        Args:
            tokenize: return inputs instead of text.
            return_dict: all inputs instead of `input_ids` alone.
            processor_kwargs: of `__call__`.
            kwargs: of the tokenizer's `apply_chat_template`: tools, add_generation_prompt, continue_final_message, ...
        """
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask is not available where placeholders are repeated")
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = conversation if batched else [conversation]
        inputs = {modality: [] for modality in PLACEHOLDER_TOKENS}
        plain = [[self.plain_message(message, inputs) for message in messages] for messages in conversations]
        template = chat_template or self.chat_template
        prompts = self.tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False, **kwargs)
        if not tokenize:
            return prompts if batched else prompts[0]
        names = {"image": "images", "video": "videos", "audio": "audio", "structured": "rows"}
        given = {names[modality]: items for modality, items in inputs.items() if items}
        bos = self.tokenizer.bos_token
        settings = {"add_special_tokens": not (bos and prompts[0].startswith(bos)), "return_tensors": return_tensors}
        settings |= {"sampling_rate": sampling_rate, **(processor_kwargs or {})}
        result = self(text=prompts, **given, **settings)
        return result if return_dict else result["input_ids"]

    def plain_message(self, message: Mapping[str, Any], inputs: dict[str, list]) -> dict[str, Any]:
        """The message with text alone as its content; what else it had is added to `inputs`."""
        content = message.get("content")
        if not isinstance(content, list):
            return dict(message)
        text = ""
        for block in content:
            if block.get("type") == "text":
                text += block["text"]
                continue
            modality = BLOCKS.get(block.get("type"))
            if modality is None:
                raise ValueError(f"a message has a block of type {block.get('type')!r}; known are {['text', *BLOCKS]}")
            keys = [key for key in (block["type"], "path", "url", "base64") if block.get(key) is not None]
            if not keys:
                raise ValueError(
                    f"a block of type {block['type']!r} has no {block['type']!r}, 'path' or 'url': {sorted(block)}"
                )
            item = block[keys[0]]
            if modality == "image" and isinstance(item, Mapping):
                item = item["url"]
            elif modality == "video" and not isinstance(item, (Mapping, tuple, str, Path)):
                item = {"frames": item, **{name: block[name] for name in ("timestamps", "audio") if name in block}}
            elif modality == "audio" and "sampling_rate" in block and not isinstance(item, (str, Path, Mapping)):
                item = {"array": item, "sampling_rate": block["sampling_rate"]}
            inputs[modality].append(item)
            text += PLACEHOLDER_TOKENS[modality]
        return {**message, "content": text}

    def _check_counts(self, texts: list[str], given: Mapping[str, list]) -> None:
        parts = {"image": self.image_processor, "video": self.image_processor, "audio": self.feature_extractor}
        for modality, token in PLACEHOLDER_TOKENS.items():
            found, items = [text.count(token) for text in texts], given.get(modality, [])
            if items and parts.get(modality, self.row_schema) is None:
                raise ValueError(
                    f"{len(items)} inputs of modality {modality!r} were given, but this processor has no part for them"
                )
            number = len(list(flat(items)))
            if sum(found) != number:
                raise ValueError(
                    f"the text has {sum(found)} placeholders {token} but {number} inputs of modality {modality!r} were given; each"
                    " needs one"
                )
            nested = items and all(isinstance(item, list) for item in items) and len(items) == len(texts)
            for row, count in enumerate(found) if nested else ():
                if count != len(items[row]):
                    raise ValueError(
                        f"text {row} has {count} placeholders {token} but {len(items[row])} inputs of modality {modality!r}"
                    )

    def encode_inputs(
        self, given: Mapping[str, list], sampling_rate: int | None = None
    ) -> tuple[dict[str, Any], dict[str, list]]:
        """Inputs of the encoders, and for each input a list with the time of each of its features."""
        data, times = {}, {}
        if "image" in given:
            pictures = [read_image(image, f"image {i}") for i, image in enumerate(flat(given["image"]))]
            parts = [tiles(picture, self._input_size(), self.max_tiles) for picture in pictures]
            data["pixel_values"], count = self._pixels([part for own in parts for part in own])
            times["image"] = [[NO_TIME] * (count * len(own)) for own in parts]
        if "video" in given:
            clips = [read_video(video, f"video {i}", self.max_frames) for i, video in enumerate(flat(given["video"]))]
            data["pixel_values_videos"], count = self._pixels([frame for clip in clips for frame in clip.frames])
            times["video"] = [[time for time in clip.timestamps for _ in range(count)] for clip in clips]
            if self.use_audio_in_video:
                data |= self._video_sound(list(flat(given["video"])), times["video"], sampling_rate)
        if "audio" in given:
            rate = self.feature_extractor.sampling_rate
            clips = [read_audio(clip, f"audio {i}", rate, sampling_rate) for i, clip in enumerate(flat(given["audio"]))]
            inputs, times["audio"] = spectra(clips, self.feature_extractor, self.audio_downsampling)
            data |= inputs
        if "structured" in given:
            rows, schema = list(flat(given["structured"])), RowSchema(**self.row_schema)
            data |= schema.encode(rows)
            times["structured"] = [[NO_TIME] * len(schema.fields) for _ in rows]
        return data, times

    def _video_sound(self, videos: list, times: list[list[float]], sampling_rate: int | None) -> dict[str, torch.Tensor]:
        """Spectra of the videos' sound, and which of its features belong to each feature of the frames."""
        if self.feature_extractor is None:
            raise ValueError("use_audio_in_video needs a feature extractor of sound, which this processor lacks")
        rate, spans = self.feature_extractor.sampling_rate, []
        sounds = [sound_of_video(video) for video in videos]
        clips = [
            read_audio(sound, f"sound of video {i}", rate, sampling_rate) for i, sound in enumerate(sounds) if sound is not None
        ]
        if not clips:
            return {}
        inputs, ends = spectra(clips, self.feature_extractor, self.audio_downsampling)
        first, waiting = 0, iter(ends)
        for own, sound in zip(times, sounds, strict=True):
            heard = next(waiting) if sound is not None else []
            spans += [[first + begin, first + end] for begin, end in sound_spans(own, heard)]
            first += len(heard)
        inputs = {f"video_sound_{name.removeprefix('input_')}": value for name, value in inputs.items()}
        return inputs | {"video_sound_spans": torch.tensor(spans)}

    def _input_size(self) -> int:
        """Pixels along the longer side of what the vision encoder sees."""
        own = self.image_processor
        size = own.crop_size if getattr(own, "do_center_crop", False) else own.size
        return max(value for value in dict(size).values() if value)

    def _pixels(self, pictures: list) -> tuple[torch.Tensor, int]:
        """`[pictures, 3, height, width]`, and how many features each gives."""
        pixels = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        height, width = (-(-(side // self.patch_size) // self.vision_downsampling) for side in pixels.shape[-2:])
        return pixels, height * width

    def _expand(self, texts: list[str], sizes: Mapping[str, list[int]]) -> list[str]:
        """The texts with every placeholder repeated as often as its input has features."""
        tokens = {PLACEHOLDER_TOKENS[modality]: iter(counts) for modality, counts in sizes.items()}
        if not tokens:
            return texts
        pattern = re.compile("|".join(re.escape(token) for token in tokens))
        return [pattern.sub(lambda match: match[0] * next(tokens[match[0]]), text) for text in texts]

    def token_kinds(self, ids: list[list[int]], times: Mapping[str, list[list[float]]]) -> dict[str, list[list]]:
        """Modality and, where something has a time, time of each token."""
        kinds = [[0] * len(row) for row in ids]
        moments = [[NO_TIME] * len(row) for row in ids]
        for number, (modality, text) in enumerate(PLACEHOLDER_TOKENS.items(), 1):
            if modality not in times:
                continue
            token = self.tokenizer.convert_tokens_to_ids(text)
            own = [time for item in times[modality] for time in item]
            found = [(row, column) for row, values in enumerate(ids) for column, value in enumerate(values) if value == token]
            if len(found) != len(own):
                raise ValueError(
                    f"the tokens have {len(found)} placeholders of modality {modality!r}, but its inputs give {len(own)} features; was"
                    " the text truncated?"
                )
            for (row, column), time in zip(found, own, strict=True):
                kinds[row][column], moments[row][column] = number, time
        timed = any(time >= 0 for row in moments for time in row)
        return {"mm_token_type_ids": kinds} | ({"mm_token_times": moments} if timed else {})


def _listed(items) -> list:
    return list(items) if isinstance(items, (list, tuple)) and not hasattr(items, "_fields") else [items]


def _restored(auto, part):
    """An image processor or feature extractor of its dictionary."""
    if not isinstance(part, Mapping):
        return part
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "preprocessor_config.json").write_text(json.dumps(dict(part)), encoding="utf-8")
        return auto.from_pretrained(folder)


__all__ = ["PLACEHOLDER_TOKENS", "DeepseekR1Processor"]
