"""Peak memory of a prefill beyond the weights, each sample measured in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .loading import DTYPES
from .speed import Measurement


@dataclass(frozen=True)
class MemoryCell:
    """Bytes of one model at one context length. `peak_bytes`: highest resident memory during the prefill beyond the weights;
    `ratio` is to the first model (below 1: less memory). `method`: how the peak was read, see `memory_probe.PeakMemory`."""

    label: str
    length: int
    peak_bytes: Measurement
    ratio: Measurement
    method: str


@dataclass(frozen=True)
class MemoryResult:
    baseline: str
    repeats: int
    cells: list[MemoryCell]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _probe_in_fresh_process(checkpoint: str | Path, length: int, dtype: str, threads: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{__package__}.memory_probe", str(checkpoint), str(length)]
    command += ["--dtype", dtype, "--threads", str(threads), "--seed", str(seed)]
    # The child imports the same package as this process, installed or not.
    package_root = str(Path(__file__).absolute().parents[2])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search_path})
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise OSError(f"measuring the memory of {checkpoint} at {length} tokens failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_memory(
    checkpoints: Mapping[str, str | Path],
    *,
    lengths: Sequence[int],
    dtype: str = "float32",
    threads: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    on_progress=None,
) -> MemoryResult:
    """Peak memory of a prefill (batch size 1, cache included) beyond the weights, in bytes; CPU only.

    Each sample is a fresh process that loads the weights, runs a short warm-up forward and then the prefill.

    Args:
        checkpoints: label -> what `load_model` accepts; ratios are taken to the first.
        lengths: tokens of the prefill.
        dtype: a name of `DTYPES`. `threads`: of torch, by default as many as here.
        repeats: processes per model and length, models taking turns.
        on_progress: called as `on_progress(done, total)` with numbers of processes.

    Raises:
        ValueError: nothing to measure, or an unknown dtype.
        OSError: a process failed; its last line is in the message.
    """
    if not checkpoints or not lengths or repeats < 1 or min(lengths) < 1:
        raise ValueError(f"nothing to measure: checkpoints={list(checkpoints)}, lengths={list(lengths)}, repeats={repeats}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown, choose one of {', '.join(DTYPES)}")
    threads = threads or torch.get_num_threads()
    baseline = next(iter(checkpoints))
    cells, done = [], 0
    for length in lengths:
        samples: dict[str, list[dict[str, Any]]] = {label: [] for label in checkpoints}
        for _ in range(repeats):
            for label, checkpoint in checkpoints.items():
                samples[label].append(_probe_in_fresh_process(checkpoint, length, dtype, threads, seed))
                done += 1
                if on_progress is not None:
                    on_progress(done, len(lengths) * repeats * len(checkpoints))
        peaks = {label: Measurement.of([sample["peak_bytes"] for sample in taken]) for label, taken in samples.items()}
        cells += [
            MemoryCell(label, length, peaks[label], peaks[label].over(peaks[baseline]), samples[label][0]["method"])
            for label in checkpoints
        ]
    return MemoryResult(baseline, repeats, cells)
