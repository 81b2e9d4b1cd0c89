"""Experts that stay in their file: those in use are held in memory up to a budget, the others are read when a router chooses them.

What a router will choose one layer further on is guessed by letting that layer's router look at what this one sees, because the
residual stream changes little from layer to layer (https://arxiv.org/abs/2312.17238); the guess is read by a thread while this
layer computes. Who has to leave is decided by use, the recent more than the old (LRFU, https://doi.org/10.1109/TC.2001.970573).

Experts are read with `pread` into buffers that are used again, rather than copied from a memory map: pages of a map that have
been touched belong to the process until the system wants them back, so that there would be no budget.
"""

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .block import DeepseekR1SparseMoeBlock
from .experts import DeepseekR1Experts, in_weight_dtype
from .gates import DeepseekR1ExpertRouter
from .kernels import experts_forward

HALF_LIFE = 64
"""Forwards after which a use of an expert counts half."""
MATRICES = ("gate_up_proj", "down_proj")

_LINE = 64

Key = tuple[int, int]
"""Number of the layer, number of the expert."""


@dataclass
class CacheStatistics:
    """Counts since the last `reset_statistics`; a forward asks once for each expert that one of its tokens uses.

    Attributes:
        hits: experts that were in memory when they were asked for; prefetched: of these, read in advance since their last use.
        misses: experts that had to be waited for.
        reads: experts read, in advance or not; bytes_read: their size.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    reads: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of hits; 1 before anything was asked for."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0

    def to_dict(self) -> dict[str, float]:
        """All fields and the rate, for JSON."""
        return {**asdict(self), "hit_rate": self.hit_rate}


@dataclass
class _Resident:
    """One expert in memory; `ready` is false while it is being read."""

    matrices: tuple[torch.Tensor, ...]
    buffers: tuple[torch.Tensor, ...]
    ready: bool = False
    in_advance: bool = False


class ExpertCache:
    """The experts of all layers that are in memory.

    Args:
        files: number of a layer -> where its packed matrices are.
        budget_bytes: how much the experts in memory may take together.

    Attributes:
        expert_bytes: size of one expert, by layer. total_bytes: of all experts.
        resident_bytes: of those in memory.
        statistics: what has been asked for.

    Raises:
        ValueError: a budget that does not hold two experts.
    """

    def __init__(self, files: Mapping[int, "tuple[PackedMatrix, ...]"], budget_bytes: int):
        self.files, self.budget_bytes = dict(files), int(budget_bytes)
        self.expert_bytes = {layer: sum(matrix.expert_bytes for matrix in packed) for layer, packed in self.files.items()}
        self.total_bytes = sum(packed[0].shape[0] * self.expert_bytes[layer] for layer, packed in self.files.items())
        largest = max(self.expert_bytes.values())
        if self.budget_bytes < 2 * largest:
            raise ValueError(
                f"budget_bytes={budget_bytes} does not hold two experts of {largest:,} bytes; all of them have {self.total_bytes:,}"
            )
        self.resident_bytes, self.statistics = 0, CacheStatistics()
        self._resident: dict[Key, _Resident] = {}
        self._worth: dict[Key, float] = {}
        self._steps = dict.fromkeys(self.files, 0)
        self._order = sorted(self.files)
        self._in_use: set[Key] = set()
        self._guessed: set[Key] = set()
        self._changed = threading.Condition()
        self._reader = ThreadPoolExecutor(1, "expert-prefetch")

    def reset_statistics(self) -> None:
        """Counts from zero again; what is in memory stays."""
        self.statistics = CacheStatistics()

    def begin(self, layer: int, experts: Iterable[int]) -> None:
        """Notes that a forward of a layer is about to use some experts."""
        with self._changed:
            self._in_use = {(layer, expert) for expert in experts}
            self._steps[layer] += 1
            for key in self._in_use:
                entry = self._resident.get(key)
                hit = entry is not None and entry.ready
                self.statistics.hits += hit
                self.statistics.misses += not hit
                if hit and entry.in_advance:
                    self.statistics.prefetched += 1
                    entry.in_advance = False
                self._use(key)

    def _use(self, key: Key) -> None:
        # log2 of the sum of all uses, each halved every HALF_LIFE steps, as it would be at step 0: it stays true without updates.
        now = self._steps[key[0]] / HALF_LIFE
        before = self._worth.get(key, -math.inf)
        self._worth[key] = now + math.log2(1.0 + 2.0 ** (before - now))

    def get(self, layer: int, expert: int) -> tuple[torch.Tensor, ...]:
        """The matrices of an expert, read now if they are not in memory; valid until the next call."""
        key = layer, expert
        with self._changed:
            while True:
                entry = self._resident.get(key)
                if entry is not None and entry.ready:
                    return entry.matrices
                if entry is None and (entry := self._reserve(key, spared=frozenset())) is not None:
                    break
                self._changed.wait()
        self._read(key, entry)
        return entry.matrices

    def prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Reads experts of the next layer in the background, as far as they are not in memory."""
        with self._changed:
            self._guessed = {(layer, expert) for expert in experts}
            missing = [key for key in self._guessed if key not in self._resident]
        if missing:
            self._reader.submit(self._read_in_advance, missing)

    def next_layer(self, layer: int) -> int:
        """The layer that is computed after this one, in the next forward after the last."""
        return self._order[(self._order.index(layer) + 1) % len(self._order)]

    def _read_in_advance(self, keys: list[Key]) -> None:
        for key in keys:
            with self._changed:
                # Another layer's guess means that this one comes too late.
                if key in self._resident or key not in self._guessed or key in self._in_use:
                    continue
                entry = self._reserve(key, self._in_use | self._guessed)
                if entry is None:
                    return
                entry.in_advance = True
            self._read(key, entry)

    def _reserve(self, key: Key, spared: Set[Key]) -> _Resident | None:
        """A place for an expert, taken from those of least worth; None where all others are being read or spared."""
        size, buffers = self.expert_bytes[key[0]], None
        while self.resident_bytes + size > self.budget_bytes:
            candidates = [other for other, entry in self._resident.items() if entry.ready and other not in spared]
            if not candidates:
                return None
            # What is about to be used leaves last, little used as it may have been.
            leaving = min(candidates, key=lambda k: (k in self._in_use, k in self._guessed, self._worth.get(k, -math.inf)))
            buffers = self._resident.pop(leaving).buffers
            self.resident_bytes -= self.expert_bytes[leaving[0]]
        packed = self.files[key[0]]
        if buffers is None or [len(buffer) for buffer in buffers] != [matrix.buffer_bytes for matrix in packed]:
            buffers = tuple(torch.empty(matrix.buffer_bytes, dtype=torch.uint8) for matrix in packed)
        matrices = tuple(matrix.placed(key[1], buffer) for matrix, buffer in zip(packed, buffers, strict=True))
        entry = self._resident[key] = _Resident(matrices, buffers)
        self.resident_bytes += size
        return entry

    def _read(self, key: Key, entry: _Resident) -> None:
        try:
            for matrix, buffer in zip(self.files[key[0]], entry.matrices, strict=True):
                matrix.read(key[1], buffer)
        except BaseException:
            with self._changed:
                del self._resident[key]
                self.resident_bytes -= self.expert_bytes[key[0]]
                self._changed.notify_all()
            raise
        with self._changed:
            entry.ready = True
            self.statistics.reads += 1
            self.statistics.bytes_read += self.expert_bytes[key[0]]
            self._changed.notify_all()


class PackedMatrix:
    """A tensor `[E, ...]` in a safetensors file, of which one expert's part is read at a time."""

    def __init__(self, file: "_File", name: str, shape: tuple[int, ...], dtype: torch.dtype, offset: int):
        self.file, self.name, self.shape, self.dtype, self.offset = file, name, shape, dtype, offset
        self.expert_bytes = math.prod(shape[1:]) * dtype.itemsize
        self.buffer_bytes = self.expert_bytes + _LINE

    def placed(self, expert: int, buffer: torch.Tensor) -> torch.Tensor:
        """Where an expert's part is read to in a buffer of `buffer_bytes`: as far from a multiple of 64 bytes as it is in the file,
        and so in a model whose weights are mapped to it. Products may depend on that in their last bit."""
        shift = (self.offset + expert * self.expert_bytes - buffer.data_ptr()) % _LINE
        shift -= shift % self.dtype.itemsize
        return buffer[shift : shift + self.expert_bytes].view(self.dtype).view(self.shape[1:])

    def read(self, expert: int, into: torch.Tensor) -> None:
        """Reads the part of an expert into a tensor of its shape.

        Raises:
            OSError: the file ends before it, or cannot be read.
        """
        target = memoryview(into.flatten().view(torch.uint8).numpy()).cast("B")
        start, done = self.offset + expert * self.expert_bytes, 0
        while done < len(target):
            count = os.preadv(self.file.descriptor, [target[done:]], start + done)
            if not count:
                raise OSError(f"{self.file.path} ends before {self.name}: it has changed since the model was loaded")
            done += count


class _File:
    """An open file, closed with the last matrix that is read from it."""

    def __init__(self, path: Path):
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)

    def __del__(self):
        os.close(self.descriptor)


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def packed_matrices(folder: Path) -> Iterator[tuple[str, PackedMatrix]]:
    """Name and place of every floating-point tensor in a folder's safetensors files (https://github.com/huggingface/safetensors)."""
    for path in sorted(folder.glob("*.safetensors")):
        file = _File(path)
        length = int.from_bytes(os.pread(file.descriptor, 8, 0), "little")
        header = json.loads(os.pread(file.descriptor, length, 8))
        for name, about in header.items():
            if name != "__metadata__" and about["dtype"] in _DTYPES:
                offset = 8 + length + about["data_offsets"][0]
                yield name, PackedMatrix(file, name, tuple(about["shape"]), _DTYPES[about["dtype"]], offset)


class _Part:
    """One of the matrices of a layer's experts, in the place of a packed tensor `[E, ...]`."""

    requires_grad = False

    def __init__(self, cache: ExpertCache, layer: int, number: int):
        self.cache, self.layer, self.number = cache, layer, number
        self.shape = cache.files[layer][number].shape

    def __getitem__(self, expert: int) -> torch.Tensor:
        return self.cache.get(self.layer, expert)[self.number]


class CachedExperts(nn.Module):
    """`DeepseekR1Experts` without parameters: its matrices come from an `ExpertCache`, its products are the same.

    Args:
        following: the router of the next layer with experts, whose choice is guessed; None = nothing is read in advance.
    """

    def __init__(self, experts: DeepseekR1Experts, cache: ExpertCache, layer: int, following: DeepseekR1ExpertRouter | None):
        super().__init__()
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        self.cache, self.layer = cache, layer
        self.parts = tuple(_Part(cache, layer, number) for number in range(len(MATRICES)))
        self.dtype = cache.files[layer][0].dtype
        self._following = (following,)  # in a tuple: not a module of this one
        self.register_state_dict_pre_hook(_refuse_to_save)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """`[T, H]` for `hidden_states` `[T, H]`, `top_k_index` and `top_k_weights` `[T, K]`.

        Raises:
            RuntimeError: gradients are wanted, or the model is no longer on the CPU.
        """
        if hidden_states.device.type != "cpu" or (torch.is_grad_enabled() and hidden_states.requires_grad):
            raise RuntimeError(
                "experts that are read from their file are for inference on a CPU; to train, load the model whole"
            )
        self.cache.begin(self.layer, top_k_index[top_k_weights != 0].unique().tolist())
        if self._following[0] is not None and len(hidden_states) == 1:
            guess = self._following[0](hidden_states)
            self.cache.prefetch(self.cache.next_layer(self.layer), guess.top_k_index[guess.top_k_weights != 0].tolist())
        states = in_weight_dtype(hidden_states, torch.empty(0, dtype=self.dtype))[0].to(self.dtype)
        return experts_forward(states, *self.parts, top_k_index, top_k_weights, self.act_fn).to(hidden_states.dtype)


def _refuse_to_save(module: CachedExperts, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError("the experts of this model are not in memory, so it cannot be saved; its checkpoint has them all")


def attach_expert_cache(model: nn.Module, checkpoint: str | Path, budget_bytes: int, prefetch: bool = True) -> ExpertCache:
    """Takes the experts out of a loaded model and reads them from its checkpoint instead; the model computes the same, bit for bit.

    `from_pretrained` has not read the experts yet when they are in the checkpoint's dtype: a model that does not fit can be loaded.

    Args:
        model: of this library, on the CPU, loaded in the dtype of its checkpoint.
        checkpoint: the folder that it was loaded from.
        budget_bytes: memory for experts, all layers together.
        prefetch: read in advance what the next layer is likely to use, while one token at a time is decoded.

    Returns:
        The cache, whose `statistics` say how well it does.

    Raises:
        ValueError: no packed experts, experts that are being trained, a checkpoint that is not the model's, or too small a budget.
        OSError: no such folder.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder {checkpoint}")
    blocks = {
        number: layer.mlp
        for number, layer in enumerate(getattr(model.base_model, "layers", ()))
        if isinstance(getattr(layer, "mlp", None), DeepseekR1SparseMoeBlock)
        and isinstance(layer.mlp.experts, DeepseekR1Experts)
    }
    if not blocks:
        raise ValueError("the model has no experts with matrices of their own (low-rank experts share one MLP and are small)")
    found = dict(packed_matrices(folder))
    files = {number: _matrices_of(model, number, block, found, folder) for number, block in blocks.items()}
    cache = ExpertCache(files, budget_bytes)
    for number, block in blocks.items():
        following = blocks[cache.next_layer(number)].router if prefetch and len(blocks) > 1 else None
        block.experts = CachedExperts(block.experts, cache, number, following)
    return cache


def _matrices_of(model, number: int, block, found: Mapping[str, PackedMatrix], folder: Path) -> tuple[PackedMatrix, ...]:
    if block.expert_adapter is not None:
        raise ValueError(f"layer {number} has trained parts of experts; merge them and save the model first")
    matrices = []
    for part in MATRICES:
        own, ending = getattr(block.experts, part), f"layers.{number}.mlp.experts.{part}"
        name = next((name for name in (f"model.{ending}", ending) if name in found), None)
        if name is None or found[name].shape != tuple(own.shape):
            what = "no such tensor" if name is None else f"its shape there is {list(found[name].shape)}"
            raise ValueError(f"{folder} is not the checkpoint of this model: {ending} {list(own.shape)}, {what}")
        if found[name].dtype != own.dtype or own.device.type != "cpu":
            raise ValueError(
                f"{ending} is {own.dtype} on {own.device} in the model and {found[name].dtype} in {folder}; load it with"
                ' dtype="auto" on the CPU, or write a checkpoint in the dtype that you want'
            )
        matrices.append(found[name])
    return tuple(matrices)


def offload_experts(checkpoint: str | Path, budget_bytes: int, prefetch: bool = True, **kwargs):
    """`AutoModelForCausalLM.from_pretrained(checkpoint, **kwargs)` with its experts behind a cache, which is `model.expert_cache`.

    Args:
        checkpoint: a folder. budget_bytes, prefetch: as in `attach_expert_cache`, errors too.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, **{"dtype": "auto"} | kwargs).eval()
    model.expert_cache = attach_expert_cache(model, checkpoint, budget_bytes, prefetch)
    return model
