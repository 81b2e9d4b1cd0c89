"""Sound as log-mel spectra of its own length."""

import itertools
import math
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F

from .media import decode_audio

ZEROS = 6
"""Zero crossings of the resampling filter on either side."""


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Sound at another sampling rate, by a windowed sinc that cuts at 99 % of the lower Nyquist frequency
    (https://ccrma.stanford.edu/~jos/resample/).

    Args:
        samples: `[n]` float32.
        rate, target: in Hz.
    """
    common = math.gcd(rate, target)
    old, new = rate // common, target // common
    if old == new:
        return samples
    cutoff = 0.99 * min(old, new)
    width = math.ceil(ZEROS * old / cutoff)
    offsets = (
        torch.arange(-width, width + old, dtype=torch.float64) / old - torch.arange(new, dtype=torch.float64)[:, None] / new
    )
    time = (offsets * cutoff).clamp(-ZEROS, ZEROS)
    kernel = torch.special.sinc(time) * torch.cos(time * math.pi / ZEROS / 2).square() * cutoff / old
    padded = F.pad(torch.from_numpy(samples)[None, None], (width, width + old))
    output = F.conv1d(padded, kernel.float()[:, None], stride=old)[0].T.flatten()
    return output[: math.ceil(new * len(samples) / old)].numpy()


def read_sound(path: str | Path | BinaryIO) -> tuple[np.ndarray, int]:
    """Mono samples in [-1, 1] and the sampling rate of a PCM WAV file, open or not, or of another file by PyAV; channels are
    averaged.

    Raises:
        ValueError: it is missing or cannot be decoded.
        ImportError: not PCM WAV, and PyAV is not installed.
    """
    try:
        with wave.open(str(path) if isinstance(path, (str, Path)) else path, "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        if not isinstance(path, (str, Path)):
            raise ValueError(f"this is no PCM WAV file: {error}") from error
        return decode_audio(path)
    if width == 3:
        whole = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = np.pad(whole, ((0, 0), (1, 0))).reshape(-1).view("<i4") / 2.0**31
    elif width == 1:
        samples = (np.frombuffer(data, np.uint8) - 128.0) / 128.0
    else:
        samples = np.frombuffer(data, f"<i{width}") / 2.0 ** (8 * width - 1)
    return samples.reshape(-1, channels).mean(1).astype(np.float32), rate


def read_audio(audio, what: str, target: int, sampling_rate: int | None) -> np.ndarray:
    """`[n]` float32 samples at `target` Hz.

    Args:
        audio: samples `[n]`; a mapping with "array" and "sampling_rate"; or the path of a sound file.
        sampling_rate: of samples that come without one, in Hz.

    Raises:
        ValueError: nothing in it, values that are not finite, more than one channel, or no sampling rate; the message begins with
            `what`.
    """
    if isinstance(audio, (str, Path)):
        try:
            audio, sampling_rate = read_sound(audio)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
    elif isinstance(audio, Mapping):
        audio, sampling_rate = audio["array"], audio.get("sampling_rate", sampling_rate)
    samples = np.asarray(audio, dtype=np.float32)
    if samples.ndim != 1:
        raise ValueError(f"{what} has the shape {list(samples.shape)}; give one channel, [samples]")
    if len(samples) == 0:
        raise ValueError(f"{what} is empty")
    if not np.isfinite(samples).all():
        first = int((~np.isfinite(samples)).argmax())
        raise ValueError(f"{what} has {samples[first]} at sample {first}; samples must be finite")
    if not sampling_rate or sampling_rate < 1:
        raise ValueError(
            f"{what} has no sampling rate; give sampling_rate in Hz, or a mapping with 'array' and 'sampling_rate'"
        )
    return resample(samples, int(sampling_rate), target)


def spectra(clips: list[np.ndarray], extractor, downsampling: int) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """The audio encoder's inputs, and the second at which each feature of each clip ends.

    A clip longer than the encoder reads is cut into pieces. None is longer than it has to be; the batch is padded to its longest.

    Args:
        clips: samples at the extractor's rate.
        extractor: a Whisper feature extractor.
        downsampling: encoder positions, two frames each, that become one feature.
    """
    hop, longest, rate = extractor.hop_length, extractor.n_samples, extractor.sampling_rate
    pieces, times = [], []
    for clip in clips:
        own = []
        for start in range(0, len(clip), longest):
            piece = clip[start : start + longest]
            # Less than a window of the transform says nothing by itself.
            piece = np.pad(piece, (0, max(0, extractor.n_fft - len(piece))))
            frames = extractor(piece, sampling_rate=rate, padding="do_not_pad", return_tensors="pt").input_features[0]
            pieces.append(frames)
            step = 2 * downsampling * hop
            ends = (
                min(start + step * (i + 1), start + longest, len(clip))
                for i in range(-(-frames.shape[-1] // (2 * downsampling)))
            )
            own += [end / rate for end in ends]
        times.append(own)
    length = max(piece.shape[-1] for piece in pieces)
    mask = torch.stack([torch.arange(length) < piece.shape[-1] for piece in pieces]).long()
    features = torch.stack([F.pad(piece, (0, length - piece.shape[-1])) for piece in pieces])
    return {"input_features": features, "input_features_mask": mask}, times


def sound_spans(times: list[float], ends: list[float]) -> list[tuple[int, int]]:
    """For each frame the features of a sound, first and one after the last, that end up to it and after the frame before; the last
    frame has all that is left.

    Args:
        times: of the frames, in seconds; several features of a frame have the same.
        ends: of the features of the sound, in seconds.
    """
    moments = sorted(set(times))
    edges = [0, *np.searchsorted(ends, moments, side="right").tolist()]
    edges[-1] = len(ends)
    spans = dict(zip(moments, itertools.pairwise(edges), strict=True))
    return [spans[time] for time in times]
