"""A Trainer that does what a plain one leaves out; the models train under the plain one and under TRL's as well."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..data.augment import adversarial_loss
from ..quantization import DeepseekR1QuantizationConfig
from .arguments import DeepseekR1TrainingArguments
from .balance import BiasUpdate, biased_routers
from .centroids import CentroidUpdate, routers
from .quantization_aware import QuantizationAware
from .thresholds import ThresholdUpdate, adaptive_routers

BUFFERS_FILE = "moved_buffers.safetensors"
STATE_FILE = "trainer_state.json"


class DeepseekR1Trainer(Trainer):
    """transformers' Trainer, and besides:

    - The centroids of routed layers follow the keys (`CentroidUpdate`), thresholds of expert layers their target
      (`ThresholdUpdate`), and balance biases the load (`BiasUpdate`).
    - Every part of the loss is logged: `loss_parts` of the model's output, a dictionary whose entries add up to the loss, as sums
      over the micro-batches of a step; `utilisation`, a dictionary, and single numbers such as `aux_loss`, as means.
    - Label smoothing shifts the labels, divides by the items of the whole step, and keeps the auxiliary losses. It acts in
      training only: the loss of an evaluation stays the one that perplexity is made of.
    - With `adversarial_noise`, the loss at embeddings that are moved to where it is highest is added in training.
    - With `quantization_aware`, forwards see rounded weights (`QuantizationAware`).
    - A run with an adapter resumes with the centroids that it had: a PEFT checkpoint does not hold them.
    """

    def __init__(self, model: nn.Module | None = None, args: DeepseekR1TrainingArguments | None = None, *rest, **named):
        args = DeepseekR1TrainingArguments() if args is None else args
        super().__init__(model, args, *rest, **named)
        # The parent's smoother takes the labels away from the model, and with them the auxiliary losses.
        self.label_smoother = None
        self._parts: dict[str, torch.Tensor] = {}
        self._part_counts: dict[str, int] = {}
        self._first_step = 0
        if routers(self.model) and args.centroid_decay < 1:
            self._add_missing(CentroidUpdate(args.centroid_decay))
        if adaptive_routers(self.model):
            self._add_missing(ThresholdUpdate())
        if biased_routers(self.model):
            self._add_missing(BiasUpdate())
        if args.quantization_aware:
            self._add_missing(QuantizationAware(DeepseekR1QuantizationConfig(**args.quantization_aware)))

    def _add_missing(self, callback: TrainerCallback) -> None:
        if not any(isinstance(present, type(callback)) for present in self.callback_handler.callbacks):
            self.add_callback(callback)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss, smoothed in training if asked for; its parts are remembered for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            if self.args.label_smoothing_factor and "labels" in inputs and self.compute_loss_func is None:
                loss = loss + self.args.label_smoothing_factor * self._smoothing(outputs, inputs, num_items_in_batch)
            if self.args.adversarial_noise:
                loss = loss + self._adversarial(model, inputs, outputs, num_items_in_batch)
            self._remember(outputs)
        return (loss, outputs) if return_outputs else loss

    def _adversarial(self, model, inputs: dict[str, Any], outputs, num_items_in_batch) -> torch.Tensor:
        def compute() -> torch.Tensor:
            return super(DeepseekR1Trainer, self).compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

        noisy = adversarial_loss(self.accelerator.unwrap_model(model), compute, self.args.adversarial_noise)
        outputs.loss_parts = {**(getattr(outputs, "loss_parts", None) or {}), "adversarial_loss": noisy}
        return noisy

    def _smoothing(self, outputs, inputs: dict[str, Any], num_items_in_batch) -> torch.Tensor:
        """What smoothing by 1 would add to the cross-entropy.

        Cross-entropy to the uniform distribution minus that to the label: the log-sum-exps cancel, and the label's logit minus
        the mean of all logits is left.
        """
        logits, labels = outputs["logits"], inputs["labels"]
        if "shift_labels" in inputs:
            labels = inputs["shift_labels"]
        elif self._loss_shifts_labels:
            labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        labels = labels.to(logits.device)
        learned = labels != -100
        own = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).float()
        terms = (own - logits.mean(-1, dtype=torch.float32)).masked_fill(~learned, 0.0)
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
            return terms.sum() / learned.sum().clamp(min=1)
        ranks = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        return terms.sum() / num_items_in_batch * ranks

    def _remember(self, outputs) -> None:
        parts = getattr(outputs, "loss_parts", None) or {}
        means = {name: value for name, value in outputs.items() if name != "loss" and getattr(value, "ndim", None) == 0}
        means |= getattr(outputs, "utilisation", None) or {}
        if not self._parts:
            self._first_step = self.state.global_step
        for name, value in [*parts.items(), *means.items()]:
            value = torch.as_tensor(value).detach().float()
            self._parts[name] = self._parts[name] + value if name in self._parts else value
            self._part_counts[name] = self._part_counts.get(name, 0) + (name in means)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss since the last line, averaged over steps and ranks."""
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - self._first_step)
            names = sorted(self._parts)
            values = torch.stack([self._parts[name] / (self._part_counts[name] or steps) for name in names])
            values = self.accelerator.reduce(values.to(self.args.device), "mean").tolist()
            logs.update(dict(zip(names, values, strict=True)))
            self._parts, self._part_counts = {}, {}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        moved = self._moved_buffers()
        if moved and self.args.should_save:
            save_file(
                {name: buffer.contiguous() for name, buffer in moved.items()},
                Path(output_dir or self.args.output_dir, BUFFERS_FILE),
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        files = [folder / name for name in _weight_files(folder)]
        if files and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            # The parent reads config.json by the base class, which refuses layer types that it does not know.
            _load_whole(self.model if model is None else model, files)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        moved, file = self._moved_buffers(), Path(resume_from_checkpoint, BUFFERS_FILE)
        if moved and file.is_file():
            for name, saved in load_file(file).items():
                moved[name].copy_(saved)

    def _moved_buffers(self) -> dict[str, torch.Tensor]:
        """Persistent buffers that a checkpoint of an adapter leaves out; nothing for a model that is saved whole."""
        if not hasattr(self.model, "peft_config"):
            return {}
        names = dict(self.model.named_buffers())
        return {name: names[name] for name in self.model.state_dict() if name in names}


def _weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights of a whole model; none for an adapter."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [SAFE_WEIGHTS_NAME] if (folder / SAFE_WEIGHTS_NAME).is_file() else []


def _load_whole(model: nn.Module, files: list[Path]) -> None:
    """Loads weights and buffers, one file at a time.

    Raises:
        ValueError: a tensor of the model or of the files that the other one lacks.
    """
    own, loaded = model.state_dict(), set()
    for file in files:
        state = load_file(file)
        model.load_state_dict(state, strict=False)
        loaded |= set(state)
    # Of tied weights one is stored.
    places = {own[name].data_ptr() for name in loaded & set(own)}
    missing = [name for name, tensor in own.items() if name not in loaded and tensor.data_ptr() not in places]
    if missing or loaded - set(own):
        raise ValueError(
            f"{files[0].parent} is no checkpoint of this model: it lacks {missing[:3]}, and the model lacks"
            f" {sorted(loaded - set(own))[:3]}"
        )


def last_checkpoint(folder: str | Path) -> Path | None:
    """The last complete checkpoint of a Trainer below a folder.

    One that an interruption left half-written is passed over: `trainer_state.json` is written last.
    """
    found = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rsplit("-", 1)[1]
        try:
            json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if number.isdigit():
            found.append((int(number), path))
    return max(found)[1] if found else None
