"""Turns a checkpoint of a supported family into one of this library.

No model is built: a conversion is a mapping of the configuration and a stream of tensors, whose names and shapes are checked
against everything that the resulting model will have before the first byte is written.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils.hub import convert_file_size_to_int

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..modeling_deepseek_r1 import DeepseekR1ForCausalLM
from .calibrate import Calibration, as_calibration, fit_routers, load_plain, router_tensors, text_windows
from .domains import Texts, domains_entry, domains_without_text, fit_domain_gates, fitted_layers, read_domains
from .families import TARGET_MODEL_TYPE
from .global_tokens import with_global_tokens
from .plan import EMBEDDING, HEAD, TensorPlan, expected_tensors, plan_tensors, stored_dtype
from .recommend import Candidate, recommend
from .report import ConversionReport, cache_size, describe_experts, describe_pattern, layer_attention
from .source import GENERATION_FILE, LEGAL_FILES, TOKENIZER_FILES, FolderSource, Source, open_source
from .target import AUTO, apply_pattern, plain_target, read_source_config
from .tokenizer_files import (
    copy_tokenizer,
    find_files,
    folder_vocabulary,
    gguf_tokenizer,
    gguf_vocabulary,
    write_generation_config,
)
from .upcycle import apply_experts, sparse_layers, upcycled_plan
from .write import atomic_folder, check_destination, clean_leftovers, write_weights

CALIBRATION_FILE = "calibration.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    preset: str | None = None,
    layer_types: list[str] | str | None = None,
    sliding_window: int | None = None,
    num_sink_tokens: int | None = None,
    num_clusters: int | None = None,
    global_stride: int | None = None,
    num_memory_tokens: int | None = None,
    context_length: int | None = None,
    calibration: str | os.PathLike | Sequence[str | os.PathLike] | Calibration | None = None,
    expert_topology: Mapping[str, int] | Sequence[Mapping[str, int]] | None = None,
    num_experts: int | None = None,
    num_experts_per_tok: int | None = None,
    expert_rank: int | None = None,
    expert_layers: Sequence[int] | str | None = None,
    domain_texts: Mapping[str, Texts] | None = None,
    gguf_file: str | None = None,
    dtype: str | torch.dtype | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    token: str | bool | None = None,
) -> ConversionReport:
    """Converts a Llama, Mistral, Qwen2, Qwen3, SmolLM3, Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE checkpoint, or changes the attention
    pattern of a converted one.

    Without a pattern argument the source's own pattern is kept and the result is the same function. `preset`, `layer_types`,
    `sliding_window` and `num_sink_tokens` ask for a sparse pattern; explicit arguments win over the preset. `num_experts` or
    `expert_topology` make a mixture of experts of a dense checkpoint, which changes the function in no way.

    Args:
        source: folder with safetensors files, hub id, or GGUF file.
        destination: folder to be made; it appears only when it is complete.
        preset: a name from `configuration.presets.PRESETS`.
        layer_types: one layer type per layer, or a pattern string such as `"SSSF"` that repeats over the layers; or `"auto"`:
            patterns of full, routed and local layers are tried on held-out text and one is chosen for the budget of
            `calibration` (default: the cheapest whose perplexity rises by at most 3 %).
        sliding_window: tokens that a sliding layer sees, the current one included.
        num_sink_tokens: first tokens of a document that sliding layers see besides.
        num_clusters: centroids per key/value head of routed layers; default: one for every 128 tokens of `context_length`.
        global_stride: local_global layers see the last of every so many tokens beyond the window; default: 64.
        num_memory_tokens: learned keys and values of a local_global layer, for training to fill; default: none.
        context_length: tokens that the result is meant to read; default: what the source was made for, at most 8,192.
        calibration: text to which the centroids of routed layers are fitted, in one pass of the source model over it (which
            takes the memory of that model): path or paths of UTF-8 files, or a [`Calibration`]; default: prose and code of
            Python's standard library. A routed source keeps its centroids unless this or `num_clusters` is given.
        expert_topology: domain -> number of experts, or a list of such stages (`ExpertRouting`); default: with `domain_texts`
            equally many for each of its domains, otherwise one domain.
        num_experts: experts of a sparse layer, each at first a copy of its MLP. Routers start random, by the seed of
            `calibration`.
        num_experts_per_tok: experts that a token gets; default: 2.
        expert_rank: r = the experts of a layer share its MLP and differ by a delta of rank r each, at first zero. A model grows
            by a tenth instead of several times.
        expert_layers: numbers of the layers that get experts, or letters that repeat over the layers, D = dense, E = experts;
            default: `"DE"`, every second layer.
        domain_texts: domain -> name of a built-in text or path or paths of UTF-8 files. In one pass over them the domain gates
            are fitted, so that tokens of a domain go to its experts.
        gguf_file: name of the GGUF file inside `source`.
        dtype: dtype of the written weights, e.g. `"bfloat16"`; default: as stored (float32 for a quantised GGUF file).
        dry_run: check and report, reading no weights and writing nothing.
        overwrite: replace a checkpoint that is at `destination`.
        max_shard_size: bytes per weights file, or a string such as `"5GB"`.
        revision: branch, tag or commit of a hub repository.
        token: access token of the hub.

    Returns:
        A [`ConversionReport`].

    Raises:
        ValueError: an unsupported or damaged source, tensors that do not fit its configuration, impossible arguments.
        OSError: a missing source, an existing or unwritable destination, a full disk.
        ImportError: a GGUF file without the package `gguf`.
    """
    origin = open_source(source, gguf_file=gguf_file, revision=revision, token=token)
    source_config = read_source_config(origin)
    plain = plain_target(source_config, weights_dtype(origin, source_config, dtype))
    dense = apply_pattern(
        plain,
        preset=preset,
        layer_types=layer_types,
        sliding_window=sliding_window,
        num_sink_tokens=num_sink_tokens,
        num_clusters=num_clusters,
        global_stride=global_stride,
        num_memory_tokens=num_memory_tokens,
        context_length=context_length,
    )
    experts = {
        "expert_topology": expert_topology,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "expert_rank": expert_rank,
        "expert_layers": expert_layers,
        "domain_texts": domain_texts,
    }
    target = apply_experts(dense, **experts)
    refit, calibration = calibration is not None or layer_types == AUTO, as_calibration(calibration)

    def plan_attention(dense: DeepseekR1TextConfig) -> TensorPlan:
        plan = plan_tensors(origin, dense, as_dtype(dtype), router_tensors(dense), refit=refit)
        return with_global_tokens(plan, origin, dense, calibration.seed)

    plan = plan_attention(dense)
    tokens, routers, tried = calibration.tokens_for(dense), None, []
    if layer_types == AUTO and not dry_run:
        check_destination(Path(destination).expanduser().resolve(), overwrite, origin.path)
        dense, routers, tried = _find_pattern(origin, dense, calibration)
        target = apply_experts(dense, **experts)
        plan = plan_attention(dense)
    fits_centroids = bool(plan.fitted)
    if target is not dense:
        plan = upcycled_plan(plan, target, calibration.seed, fitted_layers(target, list(domain_texts or {})))
    report = build_report(origin, plain, target, plan, (source, destination), source_config.model_type)
    report.warnings += _notes(origin, target, layer_types == AUTO and dry_run, domain_texts)
    if fits_centroids or tried:
        report.calibration = _calibration_entry(calibration, tokens, tried)
    if domain_texts:
        report.calibration = (report.calibration or {}) | {"domains": domains_entry(domain_texts)}

    def fit() -> dict[str, torch.Tensor]:
        fitted, model = routers or {}, None
        if fits_centroids and not fitted:
            model, fitted, _ = _fit(origin, dense, calibration)
        if domain_texts:
            texts = read_domains(source_tokenizer(origin), domain_texts)
            model = model or _load_plain(origin, dense)
            gates, purity = fit_domain_gates(model, target, texts, lambda name: plan.made[name](origin.read))
            report.calibration["domains"] = domains_entry(domain_texts, purity)
            fitted = fitted | gates
        return fitted

    write_checkpoint(
        origin, source_config, target, plan, report, dry_run, overwrite, max_shard_size, fit if plan.fitted else None
    )
    return report


def _calibration_entry(calibration: Calibration, tokens: int, tried: list[Candidate]) -> dict[str, Any]:
    return {
        "texts": [Path(text).name for text in calibration.texts],
        "tokens": tokens,
        "seed": calibration.seed,
        "patterns": [asdict(candidate) for candidate in tried],
    }


def _notes(
    origin: Source, target: DeepseekR1TextConfig, pattern_is_open: bool, domain_texts: Mapping[str, Texts] | None
) -> list[str]:
    """Warnings of a report: what a reader of the arguments would not expect."""
    notes = []
    if getattr(origin, "quantized", None):
        notes.append(f"the source is quantised ({', '.join(origin.quantized)}); its dequantised weights are written")
    if pattern_is_open:
        notes.append("layer_types='auto': the sizes are those with every layer routed; the pattern is found while converting")
    closed = domains_without_text(target, list(domain_texts or {}))
    if closed:
        notes.append(f"no text for {', '.join(closed)}: these experts start closed to what the other domains' texts look like")
    return notes


def _fit(
    origin: Source, target: DeepseekR1TextConfig, calibration: Calibration
) -> tuple[DeepseekR1ForCausalLM, dict[str, torch.Tensor], list[torch.Tensor]]:
    """The plain model, the router tensors fitted on it, and the text that was not read for them."""
    tokens, longest = calibration.tokens_for(target), target.max_position_embeddings
    windows, held_out = text_windows(source_tokenizer(origin), calibration, tokens, longest)
    model = _load_plain(origin, target)
    return model, fit_routers(model, target, windows, calibration.seed), held_out


def _load_plain(origin: Source, config: DeepseekR1TextConfig) -> DeepseekR1ForCausalLM:
    return load_plain(config, list(expected_tensors(config)), origin.read)


def _find_pattern(
    origin: Source, target: DeepseekR1TextConfig, calibration: Calibration
) -> tuple[DeepseekR1TextConfig, dict[str, torch.Tensor], list[Candidate]]:
    """`target`, in which all layers are routed, with the pattern that keeps the budget; its router tensors; what was tried."""
    model, routers, held_out = _fit(origin, target, calibration)
    chosen, tried = recommend(model, target, routers, held_out, calibration)
    target = DeepseekR1TextConfig.from_dict(target.to_dict() | {"layer_types": chosen.layer_types})
    return target, {name: routers[name] for name in router_tensors(target)}, tried


def source_tokenizer(origin: Source):
    """The tokenizer of a source.

    Raises:
        ValueError: it has none, which calibration cannot do without.
    """
    if not isinstance(origin, FolderSource):
        return gguf_tokenizer(origin.path, origin.metadata)
    if not find_files(origin.path, TOKENIZER_FILES):
        raise ValueError(f"{origin.path} has no tokenizer, so no text can be read to fit centroids or domain gates to")
    return AutoTokenizer.from_pretrained(origin.path)


def build_report(
    origin: Source,
    before: DeepseekR1TextConfig,
    after: DeepseekR1TextConfig,
    plan: TensorPlan,
    paths: tuple[str | os.PathLike, str | os.PathLike],
    source_family: str,
    target_family: str = TARGET_MODEL_TYPE,
) -> ConversionReport:
    """The report of a planned conversion from the attention pattern of `before` to that of `after`."""
    dtype = after.dtype
    layers_before, layers_after = layer_attention(before, dtype), layer_attention(after, dtype)
    sizes = [info.numel for info in plan.tensors.values()]
    loaded = [info.numel * stored_dtype(name, dtype).itemsize for name, info in plan.tensors.items()]
    experts = describe_experts(after)
    if experts and not sparse_layers(before):
        parameters = [sum(torch.Size(shape).numel() for shape in expected_tensors(c).values()) for c in (before, after)]
        experts += f", {parameters[1] / parameters[0] - 1:+.1%} parameters"
    tokenizer = ["from the GGUF file"]
    if isinstance(origin, FolderSource):
        tokenizer = [str(file) for file in find_files(origin.path, TOKENIZER_FILES)]
    warnings = [] if tokenizer else ["the source has no tokenizer files; add them before using the result with text"]
    if not plan.lossless:
        warnings.append(f"casting to {str(dtype).removeprefix('torch.')} rounds the weights")
    return ConversionReport(
        source=str(paths[0]),
        source_family=source_family,
        destination=str(paths[1]),
        target_family=target_family,
        parameters=sum(sizes),
        disk_bytes=sum(info.nbytes for info in plan.tensors.values()),
        load_bytes=sum(loaded) + max(loaded),
        dtype=str(dtype).removeprefix("torch."),
        pattern=describe_pattern(layers_after),
        cache_before=cache_size(layers_before),
        cache_after=cache_size(layers_after),
        exact=layers_before == layers_after and plan.lossless,
        tensors_matched=len(plan.tensors),
        tensors_cast=len(plan.cast),
        tensors_skipped=[f"{name}: {reason}" for name, reason in plan.skipped.items()],
        tokenizer=tokenizer,
        warnings=warnings,
        experts=experts,
    )


def write_checkpoint(
    origin: Source,
    source_config: PreTrainedConfig,
    config: PreTrainedConfig,
    plan: TensorPlan,
    report: ConversionReport,
    dry_run: bool,
    overwrite: bool,
    max_shard_size: int | str,
    fit: Callable[[], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Writes a planned checkpoint and completes `report`; with `dry_run` only the latter. `fit` makes `plan.fitted`."""
    destination, shard_bytes = Path(report.destination).expanduser().resolve(), convert_file_size_to_int(max_shard_size)
    if shard_bytes < 1:
        raise ValueError(f"max_shard_size={max_shard_size!r} must be at least one byte")
    report.dry_run = dry_run
    if dry_run:
        try:
            check_destination(destination, overwrite, origin.path)
        except (ValueError, OSError) as error:
            report.warnings.append(str(error))
        return
    report.warnings += clean_leftovers(destination)
    check_destination(destination, overwrite, origin.path)
    if HEAD in plan.skipped and not torch.equal(origin.read(HEAD), origin.read(EMBEDDING)):
        raise ValueError(
            f"{origin.path} says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}; set tie_word_embeddings to false in its"
            " config.json to keep both, or remove the former"
        )
    with atomic_folder(destination, report.disk_bytes) as folder:
        fitted = fit() if fit is not None else {}
        _stream_weights(origin, plan, fitted, folder, report, shard_bytes)
        config.save_pretrained(folder)
        if report.calibration:
            (folder / CALIBRATION_FILE).write_text(json.dumps(report.calibration, indent=2) + "\n", encoding="utf-8")
        _carry_files(origin, source_config, config.vocab_size, folder, report)


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype, dtype)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    return dtype


def weights_dtype(origin: Source, config: PreTrainedConfig, dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype that the result's configuration names: the asked one, the source's, or that of most weights."""
    stored: Counter[torch.dtype] = Counter()
    for info in origin.tensors.values():
        stored[info.dtype] += info.numel
    declared = getattr(config, "dtype", None)
    return as_dtype(dtype) or (
        declared if isinstance(declared, torch.dtype) else max(stored, key=stored.get, default=torch.float32)
    )


def _stream_weights(
    origin: Source,
    plan: TensorPlan,
    fitted: Mapping[str, torch.Tensor],
    folder: Path,
    report: ConversionReport,
    shard_bytes: int,
) -> None:
    with tqdm(total=report.disk_bytes, unit="B", unit_scale=True, desc="converting", disable=None) as progress:

        def read(name: str) -> torch.Tensor:
            if name in fitted:
                tensor = fitted[name]
            else:
                made = plan.made[name](origin.read) if name in plan.made else origin.read(name)
                tensor = made.to(plan.tensors[name].dtype)
            if tensor.numel() and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
                report.warnings.append(f"{name} holds values that are not finite")
            progress.update(tensor.nbytes)
            return tensor

        write_weights(folder, plan.tensors, read, shard_bytes)


def _carry_files(
    origin: Source, source_config: PreTrainedConfig, vocab_size: int, folder: Path, report: ConversionReport
) -> None:
    home = origin.path if isinstance(origin, FolderSource) else origin.path.parent
    for file in find_files(home, LEGAL_FILES):
        shutil.copyfile(home / file, folder / file)
    if isinstance(origin, FolderSource):
        copy_tokenizer(home, folder, source_config.model_type)
        if (home / GENERATION_FILE).is_file():
            shutil.copyfile(home / GENERATION_FILE, folder / GENERATION_FILE)
            return
        vocabulary = folder_vocabulary(home)
    else:
        vocabulary = gguf_vocabulary(origin.metadata)
        try:
            gguf_tokenizer(origin.path, origin.metadata).save_pretrained(folder)
        except (ValueError, KeyError, TypeError, IndexError, NotImplementedError, OSError, ImportError) as error:
            report.warnings.append(f"no tokenizer could be made from {origin.path.name}: {error}")
        report.tokenizer = [str(file) for file in find_files(folder, TOKENIZER_FILES)]
    write_generation_config(source_config, vocabulary, vocab_size, folder)
