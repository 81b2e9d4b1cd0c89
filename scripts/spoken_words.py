"""Recorded English speech out of Debian packages: words, sentences, and letters by another speaker.

The packages asterisk-core-sounds-en(-wav) (CC-BY-SA-3.0, one speaker, telephone quality, with a transcript) and klettres-data
(GPL-2, spoken alphabets) are fetched with apt-get and unpacked without being installed.
"""

import gzip
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modeling_deepseek_r1.tokenization.audio import read_sound, resample

PACKAGES = ("asterisk-core-sounds-en", "asterisk-core-sounds-en-wav", "klettres-data")
RATE = 16000
SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
WORD = re.compile(r"digits/\d+|letters/[a-z]|phonetic/[a-z]_p")


class Recording(NamedTuple):
    """Samples `[n]` at `RATE` Hz and what is said, in small letters without punctuation."""

    samples: np.ndarray
    text: str


def fetch(folder: Path) -> Path:
    """Unpacks the packages into a folder, once."""
    if not folder.exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise SystemExit(
                f"the recordings come as Debian packages ({', '.join(PACKAGES)}), which apt-get and dpkg-deb fetch"
            )
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=partial, check=True, capture_output=True)
        for package in partial.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, partial], check=True)
            package.unlink()
        partial.rename(folder)
    return folder


def plain(text: str) -> str:
    """The words alone."""
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


def recordings(folder: Path, longest: float = 5.0) -> tuple[list[Recording], list[Recording]]:
    """Words (digits, letters, phonetic alphabet: 79 to 80 of them, each once) and sentences of 3 and more words.

    Args:
        folder: as `fetch` made it.
        longest: sentence, in seconds.
    """
    transcript = folder / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    words, sentences = [], []
    for line in gzip.decompress(transcript.read_bytes()).decode().splitlines():
        name, _, text = line.partition(": ")
        file = folder / SOUNDS / f"{name}.wav"
        # Texts in brackets describe sounds; those with digits say them in words.
        if not text or re.search(r"[\[\]\d]", text) or not file.exists():
            continue
        samples, rate = read_sound(file)
        own = Recording(resample(samples, rate, RATE), plain(text))
        if WORD.fullmatch(name):
            words.append(own)
        elif len(own.text.split()) >= 3 and len(own.samples) <= longest * RATE:
            sentences.append(own)
    return words, sentences


def other_speaker(folder: Path) -> list[Recording]:
    """The alphabet by a British speaker."""
    letters = []
    for file in sorted((folder / "usr/share/klettres/en_GB/alpha").glob("*.ogg")):
        samples, rate = read_sound(file)
        letters.append(Recording(resample(samples, rate, RATE), file.stem.lower()))
    return letters


def rendition(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The recording as if spoken again: other speed and pitch, loudness, tone, noise and margins.

    Args:
        samples: `[n]` at `RATE` Hz.
        generator: of the random numbers.
    """
    speed = generator.uniform(0.85, 1.18)
    output = resample(samples, round(RATE * speed / 80) * 80, RATE)
    # A first-order filter makes the tone darker or brighter.
    output = output - generator.uniform(-0.5, 0.5) * np.concatenate(([0.0], output[:-1]))
    margins = [np.zeros(int(generator.uniform(0, 0.15) * RATE)) for _ in range(2)]
    output = np.concatenate((margins[0], output, margins[1]))
    noise = generator.normal(size=len(output)) * output.std() * 10 ** (-generator.uniform(12, 40) / 20)
    return ((output + noise) * 10 ** (generator.uniform(-8, 4) / 20)).clip(-1, 1).astype(np.float32)
