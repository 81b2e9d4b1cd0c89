"""Writes a checkpoint that loads with `trust_remote_code=True` where this package is not installed.

Weights, tokenizer and generation settings are copied; the Python files that the model needs are flattened into the same folder,
and config.json says in `auto_map` where transformers finds its classes in them.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils.hub import convert_file_size_to_int

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..configuration.configuration_multimodal import DeepseekR1Config
from ..registration import AUTO_CLASSES, MULTIMODAL_AUTO_CLASSES
from ..tokenization.processing_deepseek_r1 import DeepseekR1Processor
from .flatten import flatten_modules
from .write import atomic_folder, check_destination, clean_leftovers

PACKAGE = __name__.split(".")[0]


@dataclass(frozen=True)
class Travelling:
    """The code of a model type.

    Attributes:
        entries: dotted module inside the package -> its name beside the weights.
        auto_map: Auto class -> where transformers finds our class, as written to config.json.
    """

    entries: dict[str, str]
    auto_map: dict[str, str]

    @classmethod
    def of(cls, config: type, classes: Mapping[type, type], modules: tuple[str, ...]) -> "Travelling":
        found = {AutoConfig: config, **classes}
        places = {auto.__name__: f"{own.__module__.rsplit('.', 1)[-1]}.{own.__name__}" for auto, own in found.items()}
        return cls({module: module.rsplit(".", 1)[-1] for module in modules}, places)


CODE = {
    DeepseekR1TextConfig.model_type: Travelling.of(
        DeepseekR1TextConfig, AUTO_CLASSES, ("configuration.configuration_deepseek_r1", "modeling_deepseek_r1")
    ),
    DeepseekR1Config.model_type: Travelling.of(
        DeepseekR1Config,
        {**MULTIMODAL_AUTO_CLASSES, AutoProcessor: DeepseekR1Processor},
        (
            "configuration.configuration_deepseek_r1",
            "configuration.configuration_multimodal",
            "modeling_deepseek_r1",
            "modeling_multimodal",
            "tokenization.processing_deepseek_r1",
        ),
    ),
}
"""Model type -> what travels with a checkpoint of it."""

QUANTIZER = {"quantization.quantizer": "quantization_quantizer"}
QUANTIZED_CLASSES = "quantized_classes"
"""What travels with a quantized checkpoint besides."""

PROCESSOR_CONFIG = "processor_config.json"

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# What a loader or a reader needs. A training folder also holds optimizer states and logs, which are not part of a model.
COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".md"}
COPIED_NAMES = {"LICENSE", "NOTICE"}
COPIED_FOLDERS = {"additional_chat_templates"}
NOT_COPIED = {"config.json", WEIGHTS_INDEX, "trainer_state.json"}


@dataclass(frozen=True)
class ExportReport:
    """What `export_checkpoint` wrote.

    Attributes:
        destination: the folder.
        files: names of the files in it, sorted.
        bytes: their total size.
        auto_map: the entry of the same name in config.json.
        left_out: files of the source that are not part of the export, sorted.
        notes: what was done about the remains of an earlier, interrupted run.
    """

    destination: Path
    files: tuple[str, ...]
    bytes: int
    auto_map: dict[str, str]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


def export_checkpoint(
    source: str | Path, destination: str | Path, *, overwrite: bool = False, max_shard_size: int | str = "5GB"
) -> ExportReport:
    """Copies a checkpoint of this library and puts the code that it needs beside the weights.

    Args:
        source: folder with config.json (model_type "deepseek_r1_text" or "deepseek_r1") and safetensors weights.
        destination: folder to write; it appears complete or not at all.
        overwrite: whether a destination that has files in it is replaced.
        max_shard_size: largest size of one file of weights, in bytes or as text such as "5GB". Weights whose files all fit are
            copied byte for byte; otherwise they are split anew.

    Raises:
        FileNotFoundError: no such folder, config.json or file of weights.
        FileExistsError: the destination has files in it and `overwrite` is off, or it is no checkpoint that could be replaced.
        OSError: the destination cannot be written, or the disk is too small.
        ValueError: not a checkpoint of this library, a destination inside the source or around it, or code that cannot be
            flattened.
    """
    source, destination = Path(source), Path(destination).resolve()
    config = _read_config(source)
    weights = _weight_files(source)
    _refuse_overlap(source, destination)
    check_destination(destination, overwrite)
    limit = convert_file_size_to_int(max_shard_size)
    travelling = CODE[config["model_type"]]
    auto_map, quantized = travelling.auto_map, bool(config.get("quantization_config"))
    code = flatten_modules(Path(__file__).parents[1], PACKAGE, travelling.entries | (QUANTIZER if quantized else {}))
    if quantized:
        code[f"{QUANTIZED_CLASSES}.py"], auto_map = quantized_classes(auto_map)
    accompanying = accompanying_files(source)

    notes = clean_leftovers(destination)
    with atomic_folder(destination, sum((source / name).stat().st_size for name in [*weights, *accompanying])) as folder:
        if any((source / name).stat().st_size > limit for name in weights):
            save_torch_state_dict(_read_tensors(source, weights), folder, max_shard_size=limit)
            copied = accompanying
        else:
            copied = [*accompanying, *weights, *([] if weights == [WEIGHTS] else [WEIGHTS_INDEX])]
        for name in copied:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        for name, text in code.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "config.json").write_text(_with_auto_map(config, auto_map), encoding="utf-8")
        own = {auto: place for auto, place in auto_map.items() if auto == AutoProcessor.__name__}
        if own and (source / PROCESSOR_CONFIG).is_file():
            processor = json.loads((source / PROCESSOR_CONFIG).read_text(encoding="utf-8"))
            (folder / PROCESSOR_CONFIG).write_text(_with_auto_map(processor, own), encoding="utf-8")
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    known = {*sizes, *weights, *COPIED_FOLDERS}
    left_out = sorted(path.name for path in source.iterdir() if path.name not in known)
    return ExportReport(destination, tuple(sorted(sizes)), sum(sizes.values()), dict(auto_map), tuple(left_out), tuple(notes))


def quantized_classes(auto_map: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """A file whose import makes transformers know the quantization method, and the `auto_map` of the classes in it.

    They are subclasses of the model classes: by the file that defines a class, `save_pretrained` finds what it has to write.
    """
    models = {auto: place.split(".") for auto, place in auto_map.items() if auto.startswith(AutoModel.__name__)}
    classes = sorted({(name, module) for module, name in models.values()})
    lines = ['"""The classes of a quantized checkpoint; this import makes transformers know how it is stored."""\n']
    lines += [f"from .{module} import {name} as Plain{name}" for name, module in classes]
    lines += [f"from .{flat} import register" for flat in QUANTIZER.values()]
    lines += ["\nregister()", *(f"\n\nclass {name}(Plain{name}):\n    pass" for name, _ in classes)]
    return "\n".join(lines) + "\n", {**auto_map, **{auto: f"{QUANTIZED_CLASSES}.{name}" for auto, (_, name) in models.items()}}


def _with_auto_map(fields: dict, auto_map: dict[str, str]) -> str:
    return json.dumps({**fields, "auto_map": auto_map}, indent=2) + "\n"


def _read_config(source: Path) -> dict:
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{source} is not a checkpoint: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in CODE:
        raise ValueError(
            f"{path} has model_type={model_type!r}; only checkpoints of this library ({' or '.join(map(repr, CODE))}) can be exported,"
            " convert it first"
        )
    return config


def _weight_files(source: Path) -> list[str]:
    """Names of the files of weights, all of them present and readable."""
    index, shards = source / WEIGHTS_INDEX, {WEIGHTS: None}
    if index.is_file() and not (source / WEIGHTS).is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error
        shards = {shard: {key for key in weight_map if weight_map[key] == shard} for shard in sorted(set(weight_map.values()))}
    for name, keys in shards.items():
        if Path(name).name != name:
            raise ValueError(f"{index} names a file outside of its folder: {name!r}")
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source} lacks weights: there is no {name}; save the model there again")
        try:
            with safe_open(source / name, framework="pt") as file:
                absent = sorted((keys or set()) - set(file.keys()))
        except SafetensorError as error:
            raise ValueError(
                f"{source / name} is no complete safetensors file ({error}); save the model there again"
            ) from error
        if absent:
            raise ValueError(f"{source / name} lacks {len(absent)} tensors that {WEIGHTS_INDEX} promises, e.g. {absent[0]}")
    return list(shards)


def _read_tensors(source: Path, weights: list[str]) -> dict:
    tensors = {}
    for name in weights:
        with safe_open(source / name, framework="pt") as file:
            tensors.update((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118 (safe_open is no mapping)
    return tensors


def accompanying_files(source: Path) -> list[str]:
    candidates = [*source.iterdir(), *(path for name in COPIED_FOLDERS for path in (source / name).glob("*"))]
    return sorted(
        path.relative_to(source).as_posix()
        for path in candidates
        if path.is_file() and (path.suffix in COPIED_SUFFIXES or path.name in COPIED_NAMES) and path.name not in NOT_COPIED
    )


def _refuse_overlap(source: Path, destination: Path) -> None:
    folder = source.resolve()
    if folder.is_relative_to(destination) or destination.is_relative_to(folder):
        raise ValueError(
            f"destination {destination} and source {source} contain one another; choose a folder beside the source"
        )
