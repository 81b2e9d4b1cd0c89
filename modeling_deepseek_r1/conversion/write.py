"""Writing a checkpoint folder so that at every moment either the old state or the complete new one is there.

Everything goes to a temporary folder beside the destination, which is renamed at the end. Weights are streamed: the header of a
safetensors file needs shapes and dtypes only, so no more than one tensor is in memory.
"""

import errno
import json
import os
import re
import shutil
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .report import readable_bytes

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def plan_shards(tensors: Mapping[str, TensorInfo], max_shard_size: int) -> list[list[str]]:
    """Splits tensors, in their order, into files of at most `max_shard_size` bytes (or one tensor, if that is larger)."""
    shards, used = [[]], 0
    for name, info in tensors.items():
        if shards[-1] and used + info.nbytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += info.nbytes
    return shards


def write_weights(
    folder: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor], max_shard_size: int
) -> None:
    """Writes `model.safetensors`, or shards and their index, reading one tensor at a time.

    Args:
        folder: existing folder.
        tensors: what to write.
        read: gives the tensor of a name, with the announced shape and dtype.
        max_shard_size: bytes.
    """
    shards = plan_shards(tensors, max_shard_size)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / file, {name: tensors[name] for name in names}, read)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_size": sum(info.nbytes for info in tensors.values())}
        index = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")


def _write_safetensors(path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> None:
    # Widest dtype first keeps every tensor aligned to its element size, as the format's own writer does.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        info = tensors[name]
        span = [offset, offset + info.nbytes]
        header[name] = {"dtype": SAFETENSORS_DTYPES[info.dtype], "shape": list(info.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            tensor = read(name).contiguous()
            if TensorInfo(tuple(tensor.shape), tensor.dtype) != tensors[name]:
                raise ValueError(f"{name} was announced as {tensors[name]} but is {tuple(tensor.shape)}, {tensor.dtype}")
            file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())


def check_destination(destination: Path, overwrite: bool, source: Path | None = None) -> None:
    """Refuses a destination whose replacement was not asked for, or would destroy something else.

    Raises:
        ValueError: the destination contains the source.
        FileExistsError: it is a file, or a non-empty folder and `overwrite` is off, or that folder is no checkpoint.
    """
    if source is not None and destination in source.resolve().parents:
        raise ValueError(f"the destination {destination} contains the source {source}; choose another folder")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise FileExistsError(f"the destination {destination} is a file; give the name of a folder to be made")
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"the destination {destination} is not empty; choose another folder, or overwrite=True to replace it"
        )
    if not (destination / "config.json").is_file():
        raise FileExistsError(f"the destination {destination} holds no config.json, so it is no checkpoint and is not replaced")


@contextmanager
def atomic_folder(destination: Path, planned_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `destination` that becomes it when the block ends, and disappears if the block fails.

    Args:
        destination: resolved path; what is there is replaced (see `check_destination`) and kept until the new folder is complete.
        planned_bytes: what will be written, checked against the free space first.

    Raises:
        OSError: the parent folder cannot be written, or the disk is too small.
    """
    temporary = _make_temporary(destination)
    try:
        free = shutil.disk_usage(temporary).free
        if free < planned_bytes:
            raise OSError(
                errno.ENOSPC,
                f"{readable_bytes(planned_bytes)} are to be written to {destination.parent}, which has {readable_bytes(free)} free",
            )
        yield temporary
        _replace(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def clean_leftovers(destination: Path) -> list[str]:
    """Removes what killed conversions to `destination` left on this machine; returns a line for what was found.

    A folder that was being replaced when the process died is put back. Folders of other machines (the file system may be
    shared) and of processes that still run are left alone.
    """
    notes = []
    if not destination.parent.is_dir():
        return notes
    for path in destination.parent.glob(f".{glob_escape(destination.name)}.*"):
        match = re.fullmatch(r"\.(converting|replaced)-(.+)-(\d+)", path.name[len(destination.name) + 1 :])
        if not match or not path.is_dir():
            continue
        if match[2] != _host() or _runs(int(match[3])):
            notes.append(f"{path} belongs to another conversion; remove it if that one no longer runs")
        elif match[1] == "replaced" and not destination.exists():
            os.rename(path, destination)
            notes.append(f"restored {destination}, which an interrupted conversion was about to replace")
        else:
            shutil.rmtree(path)
            notes.append(f"removed {path}, left by an interrupted conversion")
    return notes


def glob_escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _make_temporary(destination: Path) -> Path:
    temporary = _sibling(destination, "converting")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise OSError(f"cannot write to {destination.parent}: {error.strerror or error}") from error
    return temporary


def _replace(temporary: Path, destination: Path) -> None:
    if not destination.exists():
        os.rename(temporary, destination)
        return
    old = _sibling(destination, "replaced")
    os.rename(destination, old)
    try:
        os.rename(temporary, destination)
    except BaseException:
        os.rename(old, destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sibling(destination: Path, purpose: str) -> Path:
    return destination.parent / f".{destination.name}.{purpose}-{_host()}-{os.getpid()}"


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname()) or "host"


def _runs(pid: int) -> bool:
    if pid == os.getpid():
        return False
    if os.name == "nt":
        return True  # signal 0 is not a harmless question there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
