"""Frames and sound out of files of any usual format, through PyAV (FFmpeg's libraries)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def opened(path: str | Path, kind: str) -> Iterator:
    """The file's container, which has a stream of `kind` ("video" or "audio").

    Raises:
        ValueError: no such file, not one that can be decoded, or no such stream in it.
        ImportError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"reading {kind} from {path} needs PyAV: pip install 'modeling-deepseek-r1[media]'") from error
    # Without this check FFmpeg would also take addresses of the network.
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with av.open(str(path)) as container:
            if not getattr(container.streams, kind):
                raise ValueError(f"{path} has no {kind} stream")
            yield container
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error


def decode_video(path: str | Path, max_frames: int | None) -> tuple[list, list[float]]:
    """Frames as PIL images and their times in seconds from the first one; of more than `max_frames` equally spaced ones.

    The file is decoded twice, so that only the frames that are wanted are in memory.
    """
    with opened(path, "video") as container:
        times = [frame.time for frame in container.decode(video=0)]
    count = len(times) if max_frames is None else min(max_frames, len(times))
    chosen = set(np.linspace(0, len(times) - 1, count).round().astype(int).tolist())
    with opened(path, "video") as container:
        frames = [frame.to_image() for number, frame in enumerate(container.decode(video=0)) if number in chosen]
    return frames, [times[number] - times[0] for number in sorted(chosen)]


def decode_audio(path: str | Path) -> tuple[np.ndarray, int]:
    """Mono samples `[n]` float32 and the sampling rate; channels are averaged."""
    with opened(path, "audio") as container:
        from av import AudioResampler

        rate = container.streams.audio[0].rate
        resampler = AudioResampler(format="fltp", layout=container.streams.audio[0].layout.name, rate=rate)
        parts = [part.to_ndarray() for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    if not parts:
        raise ValueError(f"{path} has no sound in it")
    return np.concatenate(parts, 1).mean(0, dtype=np.float32), rate


def sound_of_video(video):
    """What `read_audio` reads of a video: "audio" of a mapping, or the sound of a file; None where there is none."""
    if isinstance(video, Mapping):
        return video.get("audio")
    if not isinstance(video, (str, Path)):
        return None
    with opened(video, "video") as container:
        silent = not container.streams.audio
    return None if silent else dict(zip(("array", "sampling_rate"), decode_audio(video), strict=True))
