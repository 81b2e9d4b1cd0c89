"""Opening what is to be converted: its configuration and its tensors, which are read one at a time.

A source is a folder with safetensors files, the id of a hub repository with such files, or a GGUF file (`gguf_source`).
Pickle files are never read: loading one runs whatever code is in it.
"""

import json
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from .write import SAFETENSORS_DTYPES, TensorInfo

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
GENERATION_FILE = "generation_config.json"


class Source(Protocol):
    """What a conversion needs to know of its source.

    Attributes:
        path: folder or file on this machine.
        config: its configuration, as in config.json.
        tensors: name -> shape and dtype, in the target's names.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor; its memory is free again when the tensor is."""
        ...


def open_source(
    source: str | os.PathLike, *, gguf_file: str | None = None, revision: str | None = None, token: str | bool | None = None
) -> Source:
    """Opens a checkpoint without reading its weights.

    Args:
        source: folder, GGUF file, or hub id (from the local cache alone if `HF_HUB_OFFLINE=1`).
        gguf_file: name of the GGUF file inside `source`.
        revision: branch, tag or commit of a hub repository.
        token: access token of the hub.

    Raises:
        FileNotFoundError: there is nothing of that name, or a file is missing.
        ValueError: the checkpoint is a pickle, is quantised, or is damaged; the message names the file.
        ImportError: a GGUF file is given and the package `gguf` is not installed.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix in PICKLES:
            raise _pickle_error(path, [path.name])
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is neither a folder nor a .gguf file; give the folder that holds config.json")
        return _open_gguf(path)
    if not path.is_dir():
        path = _download(str(source), gguf_file, revision, token)
    if gguf_file is None and not any(path.glob("*.safetensors*")):
        gguf_file = _only_gguf(path)
    return _open_gguf(path / gguf_file) if gguf_file else _open_folder(path)


class FolderSource:
    """A folder with config.json and one or several safetensors files."""

    def __init__(self, path: Path):
        self.path = path
        self.config = _read_config(path)
        quantization = self.config.get("quantization_config") or self.config.get("compression_config")
        if quantization:
            method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else quantization
            raise ValueError(
                f"{path} is quantised ({method}); its weights cannot be converted exactly. Convert the original checkpoint, or"
                " load this one with dequantisation, save it with save_pretrained, and convert the result"
            )
        self._files = self._locate()

    def _locate(self) -> dict[str, Path]:
        single, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if single.is_file():
            return dict.fromkeys(_safetensors_header(single), single)
        if index.is_file():
            return self._locate_sharded(index)
        files = sorted(self.path.glob("*.safetensors"))
        if len(files) != 1:
            found = (
                f"{len(files)} safetensors files without model.safetensors.index.json"
                if files
                else "no model.safetensors (only safetensors and GGUF files are read)"
            )
            raise FileNotFoundError(f"{self.path} holds {found}")
        return dict.fromkeys(_safetensors_header(files[0]), files[0])

    def _locate_sharded(self, index: Path) -> dict[str, Path]:
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        stored = {}
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise ValueError(f"{index} names {file!r}, which is not a file of its folder")
            if not (self.path / file).is_file():
                raise FileNotFoundError(f"{self.path / file} is missing; {index.name} names it")
            stored[file] = _safetensors_header(self.path / file)
        absent = [f"{name} ({file})" for name, file in weight_map.items() if name not in stored[file]]
        if absent:
            raise ValueError(f"{index} names tensors that are not in their files: {', '.join(absent[:20])}")
        return {name: self.path / file for name, file in weight_map.items()}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return self._stored_tensors()

    def _stored_tensors(self) -> dict[str, TensorInfo]:
        headers = {path: _safetensors_header(path) for path in set(self._files.values())}
        infos, foreign = {}, []
        for name, path in self._files.items():
            shape, dtype = headers[path][name]
            if dtype in DTYPES:
                infos[name] = TensorInfo(shape, DTYPES[dtype])
            else:
                foreign.append(f"{name} ({dtype})")
        if foreign:
            raise ValueError(
                f"{self.path} holds tensors of an integer, boolean or 8-bit type, as quantised checkpoints do: {', '.join(foreign[:8])}."
                " Convert the original checkpoint instead"
            )
        return infos

    def read(self, name: str) -> torch.Tensor:
        # Opened anew for every tensor: a mapping that stays open would keep every page ever read in memory.
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def _safetensors_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); fetch it again") from error


def _read_config(path: Path) -> dict[str, Any]:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES and file.name != "training_args.bin")
    if pickles and not any(path.glob("*.safetensors*")):
        raise _pickle_error(path, pickles)
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"{path} holds a PEFT adapter; merge it into its base model (merge_and_unload) and convert the result"
            )
        raise FileNotFoundError(
            f"{path} holds no config.json, so it is no checkpoint folder; for a GGUF repository give gguf_file"
        )
    return _read_json(path / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _pickle_error(path: Path, files: list[str]) -> ValueError:
    return ValueError(
        f"{path} holds its weights as a pickle ({', '.join(files[:4])}), which is not read because loading a pickle runs the code in"
        " it. If you trust it, re-save it once with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), which"
        " writes safetensors, and convert new_folder"
    )


def _only_gguf(path: Path) -> str | None:
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"{path} holds several GGUF files; choose one with gguf_file: {', '.join(files)}")
    return files[0] if files else None


def _open_folder(path: Path) -> Source:
    from .mixtures import open_mixture  # a kind of FolderSource

    origin = FolderSource(path)
    return open_mixture(origin) or origin


def _open_gguf(path: Path) -> Source:
    from .gguf_source import GGUFSource  # needs the optional package gguf

    return GGUFSource(path)


def _download(repository: str, gguf_file: str | None, revision: str | None, token: str | bool | None) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or repository.startswith((".", "/")):
        raise FileNotFoundError(f"{repository} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    weights = [gguf_file] if gguf_file else ["*.safetensors"]
    files = ["*.json", "*.jinja", *TOKENIZER_FILES, *LEGAL_FILES]
    try:
        return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=weights + files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{repository!r} is no folder here, and the hub (or its local cache) does not give a repository of that name: {reason}"
        ) from error
