"""Images and sound inside of requests. They come from anyone: nothing is fetched, no file of this machine is opened, and nothing
is unpacked before its size is known."""

import base64
import binascii
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..tokenization.audio import read_sound
from .protocol import ApiError, ImagePart, SoundPart, TextPart

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
SAMPLING_RATES = (8_000, 192_000)
MAX_FILTER = 2**21
"""Products in the table of a resampling filter; rates without a common divisor would need gigabytes."""


@dataclass(frozen=True)
class MediaLimits:
    """What one request may bring along; its bytes are limited as a whole (`Settings.max_body`).

    Attributes:
        items: images and clips.
        pixels: of all images together.
        seconds: of all clips together.
    """

    items: int = 16
    pixels: int = 2**24
    seconds: float = 300.0


@dataclass
class MediaReader:
    """Reads the parts of one request.

    Args:
        modalities: that the model has.
        sampling_rate: of the audio encoder, in Hz.
        limits: see `MediaLimits`.
    """

    modalities: Sequence[str]
    sampling_rate: int
    limits: MediaLimits
    items: int = field(default=0, init=False)
    pixels: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def block(self, part: TextPart | ImagePart | SoundPart, place: str) -> dict[str, Any]:
        """The part as a block that the processor reads.

        Raises:
            ApiError: 400, beginning with `place`, where it cannot be read, is too much, or nothing that the model takes.
        """
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        modality = "image" if isinstance(part, ImagePart) else "audio"
        if modality not in self.modalities:
            known = ", ".join(["text", *self.modalities])
            raise ApiError(400, f"{place}: the model reads no {modality} input; it reads {known}", "unsupported_media", place)
        try:
            self.items += 1
            if self.items > self.limits.items:
                raise ValueError(f"more than {self.limits.items} images and clips in one request")
            read = self._image(part.image_url.url) if modality == "image" else self._sound(part.input_audio.data)
        except ValueError as error:
            raise ApiError(400, f"{place}: {error}", "invalid_media", place) from error
        return {"type": modality, modality: read}

    def _image(self, url: str):
        from PIL import Image

        head, comma, payload = url.partition(",")
        if not head.lower().startswith("data:"):
            raise ValueError("only data: URLs are read (data:image/png;base64,...); this server fetches nothing")
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError("the data: URL is not of the form data:image/png;base64,...")
        data = decoded(payload)
        try:
            # The header alone; formats whose readers run other programs are not among these.
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{error}; a request may have {self.limits.pixels} pixels in all its images") from error
        except Exception as error:
            raise ValueError(f"this is no {', '.join(IMAGE_FORMATS)} image") from error
        self.pixels += image.width * image.height
        if self.pixels > self.limits.pixels:
            raise ValueError(
                f"{image.width} x {image.height} pixels; a request may have {self.limits.pixels} in all its images"
            )
        try:
            image.load()
        except Exception as error:  # each decoder has errors of its own
            raise ValueError(f"the image is damaged: {error}") from error
        return image

    def _sound(self, text: str) -> dict[str, Any]:
        try:
            samples, rate = read_sound(io.BytesIO(decoded(text)))
        except ValueError as error:
            raise ValueError(f"the sound cannot be read: {error}") from error
        common = math.gcd(rate, self.sampling_rate)
        low, high = SAMPLING_RATES
        if not low <= rate <= high or rate // common * (self.sampling_rate // common) > MAX_FILTER:
            raise ValueError(f"a sampling rate of {rate} Hz is not read; use a usual one, such as {self.sampling_rate} Hz")
        self.seconds += len(samples) / rate
        if self.seconds > self.limits.seconds:
            raise ValueError(f"{self.seconds:.1f} seconds of sound; a request may have {self.limits.seconds:g}")
        return {"array": samples, "sampling_rate": rate}


def decoded(text: str) -> bytes:
    """ValueError where the text is not base64 or says nothing."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data is not base64: {error}") from error
    if not data:
        raise ValueError("the data is empty")
    return data
