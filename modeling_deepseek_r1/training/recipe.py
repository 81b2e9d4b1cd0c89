"""A training run as a list of settings, from a YAML file and a command line."""

import difflib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from .trainable import TARGETS


def _setting(default: Any, help: str, **metadata: Any) -> Any:
    metadata["help"] = help
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


HEALING = {
    "lora_rank": 8,
    "learning_rate": 1e-3,
    "length": 2048,
    "packing": "concatenate",
    "accumulation": 1,
    "heal_window": 128,
}
"""What `heal_from` changes where nothing else is asked for: adapters on attention, long rows of whole texts, narrow windows."""
SCALE_TRAINING = {"learning_rate": 2e-3, "length": 512, "packing": "concatenate", "batch_size": 2, "accumulation": 1}
"""What `train_scales` changes where nothing else is asked for."""


@dataclass(frozen=True)
class Recipe:
    """Settings of `train_checkpoint`; each is an argument of the command `train` and a key of a recipe file."""

    model: str = _setting("", "checkpoint folder or hub id")
    data: list[str] = _setting([], "files (.txt .md .py .jsonl .csv .parquet), folders or hub datasets")
    output: str = _setting("", "folder to be made; it appears only when it is complete", metavar="DIR")

    task: Literal["auto", "text", "chat", "classification"] = _setting(
        "auto", "what is learned; auto: by the columns of the data"
    )
    split: str = _setting("train", "split of a hub dataset")
    subset: str | None = _setting(None, "configuration of a hub dataset")
    text_column: str = _setting("text", "column with the text")
    eval_data: list[str] = _setting([], "data to evaluate on, in the form of DATA", metavar="DATA")
    eval_share: float = _setting(0.0, "share of the documents set aside to evaluate on, from 0 to 1")
    length: int = _setting(1024, "tokens of a row, or of a text to classify, at most", metavar="TOKENS")
    packing: Literal["best_fit", "concatenate", "none"] = _setting("best_fit", "how documents share rows; none: padded batches")
    streaming: bool = _setting(False, "read the data while training instead of before; needs --max-steps")
    shuffle_buffer: int = _setting(1000, "records that a stream chooses from", metavar="RECORDS")
    labels: list[str] = _setting([], "classes in order (default: all that the data has)", metavar="NAME")

    epochs: float = _setting(1.0, "passes over the data")
    max_steps: int | None = _setting(None, "optimizer steps; wins over --epochs", metavar="N")
    batch_size: int = _setting(1, "rows per device and forward", metavar="ROWS")
    accumulation: int = _setting(8, "forwards per optimizer step", metavar="N")
    learning_rate: float = _setting(2e-5, "highest learning rate; 10 times as much suits adapters")
    warmup: float = _setting(0.03, "share of the steps during which the learning rate rises")
    schedule: str = _setting("cosine", "how the learning rate falls, by transformers' names")
    weight_decay: float = _setting(0.0, "of AdamW")
    label_smoothing: float = _setting(0.0, "share of the target spread over the vocabulary")
    adversarial_noise: float = _setting(
        0.0, "also learn at embeddings moved so far, relative to their length, to where the loss is highest, e.g. 0.05"
    )
    number_jitter: float = _setting(0.0, "numbers in table rows vary by this share in training, e.g. 0.05")
    clipping: Literal["fixed", "adaptive"] = _setting(
        "fixed", "gradients are cut at norm 1 (max_grad_norm), or where their norm is unusual for this run"
    )
    seed: int = _setting(0, "of data order, splits, dropout and adapters")

    dtype: Literal["float32", "bfloat16"] = _setting("float32", "of the weights while training")
    precision: Literal["no", "bf16", "fp16"] = _setting("no", "mixed precision of the computation; fp16 needs an accelerator")
    checkpointing: bool = _setting(False, "compute activations again in the backward pass to save memory")
    lora_rank: int | None = _setting(None, "train adapters of this rank instead of the weights, and merge them", metavar="R")
    lora_targets: list[str] = _setting(
        ["attention"], f"parts that get adapters: {', '.join(TARGETS)}", metavar="PART", comma=True
    )
    lora_alpha: float | None = _setting(None, "adapters are scaled by alpha / rank (default: twice the rank)")
    lora_dropout: float = _setting(0.0, "dropout before the adapters")
    expert_config: dict[str, Any] = _setting(
        {},
        "train only the experts that the data uses most, so many of each domain in a layer, e.g. text=6,code=2; with lora_rank,"
        " low-rank deltas of them",
        metavar="DOMAIN=N",
        comma=True,
    )
    train_routers: bool = _setting(False, "train the routers beside the experts of expert_config")
    freeze: list[str] = _setting([], "leave parameters alone whose names match, e.g. 'model.embed_tokens.*'", metavar="PATTERN")
    quantization_aware: dict[str, Any] = _setting(
        {},
        "compute with weights rounded as `quantize` will round them, e.g. bits=4 group_size=32, so that they learn to do well so",
        metavar="NAME=VALUE",
    )

    train_scales: bool = _setting(
        False,
        "train the scales of a quantized checkpoint, and its norms, as a rule with heal_from the checkpoint that it was made of",
    )

    heal_from: str | None = _setting(
        None, "learn from this model, as a rule the dense source: checkpoint folder, GGUF file or hub id", metavar="SOURCE"
    )
    heal_temperature: float = _setting(1.0, "of both models' distributions")
    heal_top_k: int | None = _setting(None, "compare the K most probable tokens and the rest (default: all)", metavar="K")
    heal_ce_weight: float = _setting(0.0, "weight of the cross-entropy to the text itself")
    heal_hidden_weight: float = _setting(0.0, "weight of the error of the hidden states behind every layer")
    heal_window: int | None = _setting(
        None, "sliding windows are at most so long while healing, so that rows reach far beyond them", metavar="TOKENS"
    )

    log_steps: int = _setting(10, "optimizer steps between lines of the log", metavar="N")
    eval_steps: int | None = _setting(None, "optimizer steps between evaluations (default: at the end)", metavar="N")
    save_steps: int = _setting(500, "optimizer steps between checkpoints to resume from", metavar="N")
    keep: int = _setting(2, "checkpoints that are kept", metavar="N")
    report_to: list[str] = _setting([], "log to, e.g. tensorboard, trackio, wandb", metavar="NAME")
    arguments: dict[str, Any] = _setting({}, "any field of transformers' TrainingArguments", metavar="NAME=VALUE")

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """Reads a YAML file.

        Raises:
            OSError: no such file.
            ValueError: it is not a YAML mapping, or as `changed`.
        """
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a YAML file: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold settings as `name: value`, not {type(content).__name__}")
        return cls().changed({str(name).replace("-", "_"): value for name, value in content.items()}, where=str(path))

    def changed(self, values: Mapping[str, Any], where: str = "settings") -> "Recipe":
        """With other values for some settings; `heal_from` brings the defaults of `HEALING` with it, `train_scales` those of
        `SCALE_TRAINING`.

        Raises:
            ValueError: an unknown setting, or a value of the wrong type.
        """
        wanted = typing.get_type_hints(type(self))
        checked = {}
        for name, value in values.items():
            if name not in wanted:
                close = difflib.get_close_matches(name, wanted, 1)
                raise ValueError(f"{where}: there is no setting {name!r}{f'; did you mean {close[0]!r}?' if close else ''}")
            checked[name] = _converted(value, wanted[name], f"{where}: {name}")
        scales, defaults = checked.get("train_scales", self.train_scales), {}
        if scales and not self.train_scales:
            defaults = SCALE_TRAINING
        elif checked.get("heal_from") and not self.heal_from and not scales:
            defaults = HEALING
        if defaults:
            own = Recipe()
            usual = {name: value for name, value in defaults.items() if getattr(self, name) == getattr(own, name)}
            if checked.get("freeze", self.freeze):
                # Whoever freezes parts trains the others themselves.
                usual.pop("lora_rank", None)
            checked = usual | checked
        return replace(self, **checked)

    def check(self) -> None:
        """Raises ValueError for what is missing or cannot be."""
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give it in the recipe or on the command line")
        for name in ("length", "batch_size", "accumulation", "log_steps", "save_steps", "keep"):
            if getattr(self, name) < (2 if name == "length" else 1):
                raise ValueError(f"{name}={getattr(self, name)} must be at least {2 if name == 'length' else 1}")
        for name in ("max_steps", "eval_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.eval_share < 1 or (self.eval_share and self.eval_data):
            raise ValueError(f"eval_share={self.eval_share} must lie in [0, 1), and be 0 beside eval_data")
        if self.epochs <= 0 or self.learning_rate < 0 or not 0 <= self.warmup < 1 or not 0 <= self.label_smoothing < 1:
            raise ValueError("epochs must be above 0, learning_rate 0 or more, warmup in [0, 1), label_smoothing in [0, 1)")
        if self.adversarial_noise < 0 or not 0 <= self.number_jitter < 1:
            raise ValueError("adversarial_noise must be 0 or more, number_jitter in [0, 1)")
        if self.heal_from and self.adversarial_noise:
            raise ValueError("heal_from compares with a teacher that sees the same embeddings: no adversarial_noise")
        if self.streaming and (not self.max_steps or self.eval_share):
            raise ValueError(
                "streaming needs max_steps, as nobody knows the data's length, and eval_data instead of eval_share"
            )
        if self.lora_rank is not None and self.freeze:
            raise ValueError("freeze and lora_rank exclude each other: with adapters everything else is frozen already")
        if self.expert_config and (self.freeze or self.lora_targets != Recipe().lora_targets or self.lora_dropout):
            raise ValueError(
                "expert_config trains experts alone, without dropout: leave out freeze, lora_targets, lora_dropout"
            )
        if self.train_routers and not self.expert_config:
            raise ValueError("train_routers belongs to expert_config; the adapters of lora_rank have lora_targets router")
        others = {
            name: getattr(self, name) for name in ("lora_rank", "expert_config", "freeze", "quantization_aware", "heal_window")
        }
        if self.train_scales and any(others.values()):
            wrong = next(name for name, value in others.items() if value)
            raise ValueError(f"train_scales trains the scales of stored weights, and norms, alone: leave out {wrong}")
        if self.quantization_aware and (self.lora_rank is not None or self.expert_config or self.heal_from):
            raise ValueError(
                "quantization_aware trains the weights themselves: leave out lora_rank, expert_config and heal_from"
            )
        if self.heal_from and (self.task == "classification" or self.label_smoothing):
            raise ValueError("heal_from teaches to predict texts as another model does: no classification, no label_smoothing")
        if self.heal_from and self.expert_config:
            raise ValueError("heal_from trains gates and adapters, expert_config single experts: leave one of them out")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What makes this another run than one with the settings `other`, apart from how it is watched; a setting that `other` does
        not know yet had its default."""
        watching = {"output", "log_steps", "eval_steps", "save_steps", "keep", "report_to"}
        mine, usual = (json.loads(json.dumps(recipe.to_dict())) for recipe in (self, Recipe()))
        theirs = usual | dict(other)
        return [
            f"{name}={mine[name]!r} (was {theirs[name]!r})"
            for name in mine
            if name not in watching and mine[name] != theirs[name]
        ]


def setting_fields() -> list[tuple[str, Any, Any, dict[str, Any]]]:
    """Name, type, default and metadata of every setting."""
    hints = typing.get_type_hints(Recipe)
    return [
        (one.name, hints[one.name], one.default if one.default is not MISSING else one.default_factory(), dict(one.metadata))
        for one in fields(Recipe)
    ]


def plain_type(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A setting's type without None, and its choices."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint)
    return typing.get_origin(hint) or hint, ()


def _converted(value: Any, hint: Any, where: str) -> Any:
    kind, choices = plain_type(hint)
    if value is None:
        if type(None) not in typing.get_args(hint):
            raise ValueError(f"{where} has no value")
        return None
    if kind is list:
        value = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(value, list):
            raise ValueError(f"{where}={value!r} must be a list")
        return [str(item) for item in value]
    if kind in (int, float) and not isinstance(value, (bool, dict, list)):
        # YAML 1.1 reads 2e-5 as a text.
        try:
            number = float(value)
        except ValueError:
            number = None
        if number is not None and (kind is float or number == int(number)):
            return kind(number)
    if kind is str and isinstance(value, (str, int, float, bool)):
        # YAML 1.1 reads no as false.
        value = "no" if value is False else str(value)
    if not isinstance(value, kind) or kind in (int, float):
        raise ValueError(f"{where}={value!r} must be of type {kind.__name__}")
    if choices and value not in choices:
        raise ValueError(f"{where}={value!r} must be one of {', '.join(choices)}")
    return value
