"""Images and videos as the image processor of a vision encoder wants them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers.image_utils import load_image

from .media import decode_video


class Video(NamedTuple):
    """Frames of a video and the second at which each is shown."""

    frames: list
    timestamps: list[float]


def read_image(image, what: str):
    """A PIL image in RGB of one, of an array `[height, width, 3]`, a path, a URL or base64 text.

    Raises:
        ValueError: it cannot be read; the message begins with `what`.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need Pillow: pip install 'modeling-deepseek-r1[vision]'") from error
    try:
        if isinstance(image, (np.ndarray, torch.Tensor)):
            image = Image.fromarray(checked_pixels(np.asarray(image)))
        return load_image(image if isinstance(image, Image.Image) else str(image))
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        source = image if isinstance(image, str) and len(image) < 200 else type(image).__name__
        raise ValueError(f"{what} ({source}) cannot be read: {error}") from error


def checked_pixels(pixels: np.ndarray) -> np.ndarray:
    """The array; ValueError unless it is an image of bytes."""
    if pixels.ndim not in (2, 3) or pixels.size == 0 or (pixels.ndim == 3 and pixels.shape[-1] != 3):
        raise ValueError(f"an array of shape {list(pixels.shape)}; it must be [height, width] or [height, width, 3]")
    if pixels.dtype != np.uint8:
        raise ValueError(f"an array of {pixels.dtype}; pixels must be uint8, 0 ... 255")
    return pixels


def tiles(image, size: int, most: int) -> list:
    """The image, and where it is larger than `size` pixels also the parts of a grid of at most `most` over it, row by row.

    The grid is the one that keeps most of the resolution, and of these the one with the squarest parts.
    """
    width, height = image.size
    rows, columns = (min(most, -(-side // size)) for side in (height, width))
    grids = [(r, c) for r in range(1, rows + 1) for c in range(1, columns + 1) if 1 < r * c <= most]
    if not grids:
        return [image]
    r, c = max(grids, key=lambda grid: (grid[0] * grid[1], -abs(np.log(height * grid[1] / (width * grid[0])))))
    edges = [[round(side * part / parts) for part in range(parts + 1)] for side, parts in ((height, r), (width, c))]
    boxes = [(edges[1][j], edges[0][i], edges[1][j + 1], edges[0][i + 1]) for i in range(r) for j in range(c)]
    return [image, *(image.crop(box) for box in boxes)]


def read_video(video, what: str, max_frames: int | None) -> Video:
    """Frames as PIL images, and their times; of more than `max_frames` equally spaced ones.

    Args:
        video: a [`Video`], a mapping with "frames" and "timestamps", or the path of a file.

    Raises:
        ValueError: no frames, or not one time for each, none below the one before; the message begins with `what`.
        ImportError: a path, and PyAV is not installed.
    """
    if isinstance(video, (str, Path)):
        try:
            video = Video(*decode_video(video, max_frames))
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
    if isinstance(video, Mapping):
        video = Video(video.get("frames", []), video.get("timestamps"))
    if not isinstance(video, Video):
        raise ValueError(
            f"{what} is a {type(video).__name__} without timestamps; give a file's path, or {{'frames': [...], 'timestamps': [...]}}"
            " with the second at which each frame is shown"
        )
    frames, times = list(video.frames), video.timestamps
    if not frames:
        raise ValueError(f"{what} has no frames")
    if times is None or len(times) != len(frames):
        raise ValueError(
            f"{what} has {len(frames)} frames and {0 if times is None else len(times)} timestamps; give one for each"
        )
    times = [float(time) for time in times]
    if not all(0 <= time < float("inf") for time in times) or times != sorted(times):
        raise ValueError(f"{what} has the timestamps {times}; they must be seconds from 0 on that do not fall")
    if max_frames is not None and len(frames) > max_frames:
        chosen = np.linspace(0, len(frames) - 1, max_frames).round().astype(int)
        frames, times = [frames[i] for i in chosen], [times[i] for i in chosen]
    return Video([read_image(frame, f"frame {i} of {what}") for i, frame in enumerate(frames)], times)


def flat(items: Sequence | None) -> Iterator:
    """What is in a list or in the lists in it."""
    for item in items or ():
        if isinstance(item, list):
            yield from item
        else:
            yield item
