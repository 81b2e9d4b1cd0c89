"""One prefill in a process of its own: the memory that it takes beyond the weights.

`python -m modeling_deepseek_r1.evaluation.memory_probe CHECKPOINT LENGTH` prints one line of JSON; `memory.measure_memory` runs
it once per sample.
"""

import argparse
import ctypes
import gc
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .loading import DTYPES, load_model
from .scoring import hidden_states, next_token_logits

_WARM_UP_TOKENS = 32
_SAMPLING_SECONDS = 0.001
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no field {field}")


class PeakMemory:
    """Context manager: `extra_bytes`, the highest resident memory inside the block minus that at its start.

    `method` is the first of these that works here: `"VmHWM"` (Linux's own high-water mark, exact), `"sampling"` (resident
    memory read every millisecond, may miss a short peak), `"ru_maxrss"` (elsewhere: highest of the whole life of the process,
    a lower bound of the difference).
    """

    def __enter__(self):
        gc.collect()
        _return_freed_memory()
        self.method = self._choose_method()
        if self.method == "sampling":
            self._stop = threading.Event()
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._highest = self._start = _status_bytes("VmRSS")
            self._sampler.start()
        else:
            self._start = _status_bytes("VmRSS") if self.method == "VmHWM" else _highest_of_process()
        return self

    def __exit__(self, *exception):
        if self.method == "sampling":
            self._stop.set()
            self._sampler.join()
            highest = self._highest
        else:
            highest = _status_bytes("VmHWM") if self.method == "VmHWM" else _highest_of_process()
        self.extra_bytes = highest - self._start

    @staticmethod
    def _choose_method() -> str:
        if not _STATUS.exists():
            return "ru_maxrss"
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            return "sampling"
        return "VmHWM"

    def _sample(self):
        while not self._stop.is_set():
            self._highest = max(self._highest, _status_bytes("VmRSS"))
            time.sleep(_SAMPLING_SECONDS)


class AcceleratorMemory:
    """`PeakMemory` of an accelerator, as torch's allocator counts it."""

    method = "allocator"

    def __enter__(self):
        self._start = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        return self

    def __exit__(self, *exception):
        self.extra_bytes = torch.accelerator.max_memory_allocated() - self._start


def peak_memory(device: torch.device) -> PeakMemory | AcceleratorMemory:
    """The one for a device."""
    return PeakMemory() if device.type == "cpu" else AcceleratorMemory()


def _highest_of_process() -> int:
    import resource  # absent on Windows

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def _return_freed_memory() -> None:
    """Hands freed heap back to the system: memory that the allocator still keeps would hide a part of the peak."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@torch.no_grad()
def probe(checkpoint: str, length: int, *, dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    """Measures one prefill with cache in this process, which should have done nothing else: `peak_bytes` and `method`.

    The prompt is random token ids under `seed`.
    """
    model = load_model(checkpoint, DTYPES[dtype], "cpu")
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.get_input_embeddings().num_embeddings
    input_ids = torch.randint(vocab_size, (1, length), generator=generator)
    hidden_states(model, input_ids[:, :_WARM_UP_TOKENS], use_cache=True)
    with PeakMemory() as peak:
        hidden, cache = hidden_states(model, input_ids, use_cache=True)
        next_token_logits(model, hidden[:, -1])
        del hidden, cache
    return {"peak_bytes": peak.extra_bytes, "method": peak.method}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="memory_probe", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder, .gguf file or hub id")
    parser.add_argument("length", type=int, help="tokens of the prefill")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompt (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(json.dumps(probe(args.checkpoint, args.length, dtype=args.dtype, seed=args.seed)))


if __name__ == "__main__":
    main()
