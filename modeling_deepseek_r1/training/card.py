"""The README.md of a trained checkpoint: what it was made of, with figures from the run's own log."""

from pathlib import Path
from typing import TYPE_CHECKING

from .recipe import Recipe, setting_fields

if TYPE_CHECKING:
    from .run import TrainingReport

CARD = """---
base_model: {base}
library_name: transformers
pipeline_tag: {pipeline}
tags: [modeling-deepseek-r1]
---

# {name}

`{base}`, trained on {data}.

```python
import modeling_deepseek_r1  # makes the Auto classes know the model
from transformers import {auto_class}, {reader_class}

model = {auto_class}.from_pretrained("{name}")
{reader} = {reader_class}.from_pretrained("{name}")
```

## Training

{trained}. {steps} optimizer steps.

| | |
|---|--:|
{metrics}

| step | loss |
|--:|--:|
{losses}

## Settings

What differs from the defaults:

```yaml
{settings}
```

## Intended use, limits, licence

Not stated yet: those of the base model, and of the data, apply.
"""
LOSS_ROWS = 10
CLASSES = {
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
    "multimodal": ("image-text-to-text", "AutoModelForImageTextToText"),
}
"""Task -> pipeline and Auto class, where they are not those of a text model."""


def model_card(recipe: Recipe, report: "TrainingReport") -> str:
    """Markdown with the metadata that the Hub reads. Folders are named without their paths."""
    import yaml

    pipeline, auto_class = CLASSES.get(report.task, ("text-generation", "AutoModelForCausalLM"))
    history = [(entry["step"], entry["loss"]) for entry in report.history if "loss" in entry]
    # The last line is always shown, and as many before it as give an even picture.
    stride = max(1, -(-len(history) // LOSS_ROWS))
    shown = [row for number, row in enumerate(reversed(history)) if number % stride == 0][::-1]
    metrics = {name: value for name, value in report.metrics.items() if isinstance(value, (int, float))}
    settings = {name: getattr(recipe, name) for name, _, default, _ in setting_fields() if getattr(recipe, name) != default}
    settings = {
        name: _public(value) if name in ("model", "data", "eval_data", "output") else value for name, value in settings.items()
    }
    size = f" ({report.documents:,} documents, {report.tokens:,} tokens)" if report.tokens is not None else ""
    return CARD.format(
        base=_public(recipe.model),
        pipeline=pipeline,
        name=Path(report.output).name,
        data=", ".join(_public(recipe.data)) + size,
        auto_class=auto_class,
        reader="processor" if report.task == "multimodal" else "tokenizer",
        reader_class="AutoProcessor" if report.task == "multimodal" else "AutoTokenizer",
        trained=report.trained[0].upper() + report.trained[1:],
        steps=report.steps,
        metrics="\n".join(f"| {name} | {value:.6g} |" for name, value in metrics.items()),
        losses="\n".join(f"| {step} | {loss:.4f} |" for step, loss in shown),
        settings=yaml.safe_dump(settings, sort_keys=False).strip(),
    )


def _public(value):
    """Names of local files and folders without the path to them; hub ids stay."""
    if isinstance(value, list):
        return [_public(one) for one in value]
    path = Path(value).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else value
