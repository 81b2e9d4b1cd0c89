"""A whole training run: from a recipe to a checkpoint folder that loads with `from_pretrained`.

Checkpoints to resume from lie in the run folder beside the output (`<output>-run`), the output itself appears when it is
complete. One process, or several under `accelerate launch` with plain data parallelism.
"""

import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    PreTrainedConfig,
    set_seed,
)

from ..conversion.convert import source_tokenizer
from ..conversion.source import open_source
from ..conversion.write import atomic_folder, check_destination, clean_leftovers
from ..evaluation.loading import DTYPES, load_tokenizer
from ..quantization.scales import fold_scales, stored_matrices, train_scales
from .arguments import DeepseekR1TrainingArguments
from .card import model_card
from .clipping import AdaptiveClipping
from .distillation import DistillationConfig, DistillationTrainer, load_teacher
from .expert_lora import adapters_of, attach_experts, detach_experts, merge_experts, training_bytes
from .prepare import TrainingData, prepare_data
from .recipe import Recipe
from .select_experts import choose_experts
from .trainable import TrainableReport, add_adapters, freeze
from .trainer import DeepseekR1Trainer, last_checkpoint

MODEL_TYPE, MULTIMODAL_TYPE = "deepseek_r1_text", "deepseek_r1"
RECIPE_FILE = "recipe.json"
REPORT_FILE = "training.json"
EXPERTS_FILE = "experts.json"
FORMAT_VERSION = 1


@dataclass
class TrainingReport:
    """The result of `train_checkpoint`.

    Attributes:
        output: folder of the checkpoint.
        task: what was learned.
        documents, tokens: size of the training data; None for a stream.
        trained: what was trained, in words.
        steps: optimizer steps, with those before a resumption.
        metrics: of the training and the evaluation, as the Trainer gives them.
        history: the Trainer's log.
        notes: what was left out, cut, or found from an earlier run.
    """

    output: str
    task: str
    documents: int | None
    tokens: int | None
    trained: str
    steps: int
    metrics: dict[str, float]
    history: list[dict[str, Any]] = field(repr=False)
    notes: list[str]

    def summary(self) -> str:
        """Some lines for a reader."""
        lines = [*self.notes, self.trained]
        if self.documents is not None and self.tokens is None:
            lines.append(f"data: {self.documents:,} conversations ({self.task})")
        if self.tokens is not None:
            lines.append(f"data: {self.documents:,} documents, {self.tokens:,} tokens ({self.task})")
        shown = {name: value for name, value in self.metrics.items() if "loss" in name or name in SHOWN}
        figures = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        return "\n".join([*lines, f"{self.steps} steps: {figures}", f"written: {self.output}"])


SHOWN = ("before_gap", "eval_gap", "eval_perplexity", "eval_accuracy", "train_tokens_per_second")


def train_checkpoint(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> TrainingReport:
    """Trains a checkpoint of this library by a recipe.

    Args:
        recipe: all settings.
        resume: go on from the last complete checkpoint of the run folder; the result is that of an uninterrupted run.
        overwrite: replace what is at the output, and an earlier run.

    Raises:
        ValueError: settings or data that make no sense; nothing, or another run, to resume.
        OSError: files that are not there, or are in the way.
        ImportError: an optional dependency is missing.
    """
    recipe.check()
    output = Path(recipe.output).expanduser().resolve()
    arguments = _arguments(recipe, output)
    notes = clean_leftovers(output) if arguments.process_index == 0 else []
    check_destination(output, overwrite, Path(recipe.model))
    config = _config(recipe)
    multimodal = config.model_type == MULTIMODAL_TYPE
    if multimodal and (recipe.heal_from or recipe.expert_config):
        raise ValueError("heal_from and expert_config are for text models; train the text checkpoint before it is composed")
    # A processor has all that is asked of a tokenizer here, and has one.
    tokenizer = AutoProcessor.from_pretrained(recipe.model) if multimodal else load_tokenizer(recipe.model)
    inner = tokenizer.tokenizer if multimodal else tokenizer
    if inner.pad_token_id is None:
        inner.pad_token = inner.eos_token
    if multimodal:
        arguments.remove_unused_columns = False
    data = prepare_data(recipe, tokenizer, _known_labels(config))
    checkpoint = _checkpoint_of_run(recipe, data, Path(arguments.output_dir), resume, overwrite)
    if not resume and arguments.process_index == 0:
        _begin_run_folder(recipe, data, Path(arguments.output_dir))
    set_seed(recipe.seed)
    model, trained = _model(recipe, data, arguments)
    use_cache = model.config.get_text_config().use_cache
    trainer = _trainer(recipe, model, arguments, data, tokenizer)
    if recipe.clipping == "adaptive":
        trainer.add_callback(AdaptiveClipping())
    metrics = _fit(trainer, data, checkpoint)
    steps, history = trainer.state.global_step, trainer.state.log_history
    report = TrainingReport(
        str(output), data.task, data.documents, data.tokens, trained.summary(), steps, metrics, history, [*notes, *data.notes]
    )
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.config.get_text_config().use_cache = use_cache
        _write(recipe, report, model, tokenizer, output)
    return report


def _trainer(
    recipe: Recipe, model: nn.Module, arguments: DeepseekR1TrainingArguments, data: TrainingData, tokenizer
) -> DeepseekR1Trainer:
    arguments.prediction_loss_only = data.task != "classification"
    trainer_class, healing = DeepseekR1Trainer, {}
    if recipe.heal_from:
        trainer_class, healing = DistillationTrainer, _healing(recipe, data, tokenizer)
    return trainer_class(
        model,
        arguments,
        data_collator=data.collate,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        compute_metrics=_accuracy if data.task == "classification" else None,
        **healing,
    )


def _healing(recipe: Recipe, data: TrainingData, tokenizer) -> dict[str, Any]:
    """What a `DistillationTrainer` needs besides."""
    if data.task == "classification":
        raise ValueError("heal_from teaches to predict texts; these data are those of a classification")
    if source_tokenizer(open_source(recipe.heal_from)).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{recipe.heal_from} and {recipe.model} have different vocabularies; a teacher must have the student's"
        )
    settings = {name: getattr(recipe, f"heal_{name}") for name in DistillationConfig.__dataclass_fields__}
    return {"teacher": load_teacher(recipe.heal_from, DTYPES[recipe.dtype]), "distillation": DistillationConfig(**settings)}


def _fit(trainer: DeepseekR1Trainer, data: TrainingData, checkpoint: Path | None) -> dict[str, float]:
    """Trains and evaluates, with a teacher before as well; returns what was measured."""
    before = {}
    if data.evaluation is not None and isinstance(trainer, DistillationTrainer):
        before = trainer.evaluate(metric_key_prefix="before")
    metrics = before | trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    if data.evaluation is not None:
        metrics |= trainer.evaluate()
        if data.task != "classification":
            metrics["eval_perplexity"] = math.exp(min(metrics["eval_loss"], 700))
    name = "train_tokens_per_second"
    speeds = [entry[name] for entry in trainer.state.log_history if name in entry]
    return metrics | ({name: speeds[-1]} if speeds else {})


def _config(recipe: Recipe) -> PreTrainedConfig:
    path = Path(recipe.model).expanduser()
    if path.suffix == ".gguf":
        raise ValueError(
            f"{recipe.model} is a GGUF file; make a checkpoint of it first: deepseek-r1 convert {recipe.model} FOLDER"
        )
    config = AutoConfig.from_pretrained(recipe.model)
    if config.model_type not in (MODEL_TYPE, MULTIMODAL_TYPE):
        raise ValueError(
            f"{recipe.model} is a {config.model_type} checkpoint; convert it first: deepseek-r1 convert {recipe.model} FOLDER"
        )
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized and not recipe.train_scales:
        raise ValueError(
            f"{recipe.model} is quantized; train the checkpoint that it was made of, and quantize what comes out, or train its scales"
            " alone (train_scales)"
        )
    if recipe.train_scales and not quantized:
        raise ValueError(f"{recipe.model} is not quantized; train_scales is for what deepseek-r1 quantize has made")
    return config


def _known_labels(config: PreTrainedConfig) -> list[str] | None:
    """Classes of a checkpoint that classifies already."""
    if not any("SequenceClassification" in name for name in config.architectures or ()):
        return None
    return [config.id2label[number] for number in range(config.num_labels)]


def _arguments(recipe: Recipe, output: Path) -> DeepseekR1TrainingArguments:
    known = DeepseekR1TrainingArguments.__dataclass_fields__
    # transformers renamed gradient_checkpointing within the supported versions.
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    wrong = sorted(set(recipe.arguments) - set(known))
    if wrong or "output_dir" in recipe.arguments:
        raise ValueError(f"arguments: {wrong[0] if wrong else 'output_dir'} is no field of TrainingArguments that can be set")
    evaluates = bool(recipe.eval_data or recipe.eval_share)
    values = {
        "output_dir": str(output.parent / f"{output.name}-run"),
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": recipe.warmup,
        "lr_scheduler_type": recipe.schedule,
        "weight_decay": recipe.weight_decay,
        "label_smoothing_factor": recipe.label_smoothing,
        "adversarial_noise": recipe.adversarial_noise,
        "seed": recipe.seed,
        # Without being told so, transformers refuses bf16 where there is no accelerator.
        "use_cpu": not torch.accelerator.is_available(),
        "quantization_aware": recipe.quantization_aware or None,
        "bf16": recipe.precision == "bf16",
        "fp16": recipe.precision == "fp16",
        checkpointing: recipe.checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if recipe.checkpointing else None,
        "logging_steps": recipe.log_steps,
        "eval_strategy": "steps" if evaluates and recipe.eval_steps else "no",
        "eval_steps": recipe.eval_steps,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "save_total_limit": recipe.keep,
        "report_to": recipe.report_to,
        **({"max_grad_norm": 0.0} if recipe.clipping == "adaptive" else {}),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    # YAML 1.1 reads no, which some strategies are called, as false.
    texts = {name for name, value in recipe.arguments.items() if value is False and isinstance(known[name].default, str)}
    return DeepseekR1TrainingArguments(**{**values, **recipe.arguments, **dict.fromkeys(texts, "no")})


def _checkpoint_of_run(recipe: Recipe, data: TrainingData, folder: Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to resume from; without `resume`, None where the run folder may be begun."""
    file, checkpoint = folder / RECIPE_FILE, last_checkpoint(folder)
    if not resume:
        if folder.exists() and any(folder.iterdir()) and not file.is_file():
            raise FileExistsError(f"{folder} is not empty and no folder of a training run; choose another output")
        if checkpoint is not None and not overwrite:
            raise FileExistsError(
                f"{folder} holds checkpoints of an earlier run; go on with resume, or replace it with overwrite"
            )
        return None
    if checkpoint is None:
        raise ValueError(f"there is nothing to resume: {folder} holds no complete checkpoint")
    before = json.loads(file.read_text(encoding="utf-8"))
    differences = recipe.differences(before["settings"])
    if before["size"] != _size(data):
        differences.append(f"the data has {_size(data)} (had {before['size']})")
    if differences:
        raise ValueError(f"this is not the run that was interrupted: {'; '.join(differences)}")
    return checkpoint


def _begin_run_folder(recipe: Recipe, data: TrainingData, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    content = {"format_version": FORMAT_VERSION, "settings": recipe.to_dict(), "size": _size(data)}
    (folder / RECIPE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _size(data: TrainingData) -> dict[str, int | None]:
    return {"documents": data.documents, "tokens": data.tokens}


def _model(recipe: Recipe, data: TrainingData, arguments: DeepseekR1TrainingArguments) -> tuple[nn.Module, TrainableReport]:
    auto_class, options = AutoModelForCausalLM, {}
    if data.task == "multimodal":
        auto_class = AutoModelForImageTextToText
    if data.task == "classification":
        auto_class, options = AutoModelForSequenceClassification, {"id2label": dict(enumerate(data.label_names))}
        options["label2id"] = {name: number for number, name in enumerate(data.label_names)}
        options["num_labels"] = len(data.label_names)
    try:
        model = auto_class.from_pretrained(recipe.model, dtype=DTYPES[recipe.dtype], **options)
    except SafetensorError as error:
        raise ValueError(f"the weights of {recipe.model} are damaged: {error}") from error
    built_for = model.config.get_text_config().max_position_embeddings
    if recipe.length > built_for:
        data.notes.append(f"rows of {recipe.length} tokens; the model was built for {built_for}")
    if recipe.expert_config:
        return model, _attach_experts(recipe, model.to(arguments.device), data, arguments)
    if recipe.train_scales:
        count, matrices = train_scales(model), stored_matrices(model)
        others = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(".scale_change"))
        total = sum(math.prod(matrix.shape) for matrix in matrices) + others
        return model, TrainableReport({"scales of matrices, with the norms": len(matrices)}, count, total)
    if recipe.lora_rank is None:
        return model, freeze(model, recipe.freeze)
    targets = recipe.lora_targets
    if recipe.heal_from and "router" not in targets and any(name.endswith(".router") for name, _ in model.named_modules()):
        # Gates are what a converted model has never learned.
        targets = [*targets, "router"]
    settings = {"targets": targets, "alpha": recipe.lora_alpha, "dropout": recipe.lora_dropout}
    return add_adapters(model, rank=recipe.lora_rank, **settings)


def _attach_experts(
    recipe: Recipe, model: nn.Module, data: TrainingData, arguments: DeepseekR1TrainingArguments
) -> TrainableReport:
    """Chooses experts by a sample of the training data, and tells which, why, and what training them takes."""
    shuffle = not isinstance(data.train, IterableDataset)
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = DataLoader(data.train, recipe.batch_size, shuffle=shuffle, collate_fn=data.collate, generator=generator)
    selection = choose_experts(model, recipe.expert_config, batches)
    options = {"rank": recipe.lora_rank, "alpha": recipe.lora_alpha, "train_routers": recipe.train_routers}
    trained = attach_experts(model, selection, **options)
    if arguments.process_index == 0:
        sizes = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in training_bytes(model).items())
        print(f"{selection.table()}\n\n{trained.summary()}; {sizes}", file=sys.stderr)
        content = json.dumps({"format_version": FORMAT_VERSION, **asdict(selection)}, indent=2)
        file = Path(arguments.output_dir, EXPERTS_FILE)
        # A resumed run goes on with the experts that it had.
        if not file.exists():
            file.write_text(content + "\n", encoding="utf-8")
    return trained


def _accuracy(prediction) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}


def _write(recipe: Recipe, report: TrainingReport, model: nn.Module, tokenizer, output: Path) -> None:
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if adapters_of(model):
        merge_experts(model)
        detach_experts(model)
    if recipe.train_scales:
        fold_scales(model)
    content = {"format_version": FORMAT_VERSION, "settings": recipe.to_dict(), **asdict(report)}
    planned = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with atomic_folder(output, planned) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if recipe.expert_config:
            shutil.copy(output.parent / f"{output.name}-run" / EXPERTS_FILE, folder)
        (folder / "README.md").write_text(model_card(recipe, report), encoding="utf-8")
