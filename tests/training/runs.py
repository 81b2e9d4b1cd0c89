"""Short training runs of tiny models."""

from transformers import Trainer, TrainerCallback

from modeling_deepseek_r1.data import Documents, PackedCollator, PackedDocuments
from modeling_deepseek_r1.training import DeepseekR1Trainer, DeepseekR1TrainingArguments
from tests.models import random_ids


def make_rows(count=24, row_length=24):
    documents = Documents({"input_ids": random_ids(1, 5 + number % 17, seed=number)[0].tolist()} for number in range(count))
    return PackedDocuments(documents, row_length)


def make_arguments(folder, arguments_class=DeepseekR1TrainingArguments, **fields):
    values = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return arguments_class(**{**values, **fields})


def make_trainer(model, folder, trainer_class=DeepseekR1Trainer, rows=None, callbacks=None, **fields):
    rows = make_rows() if rows is None else rows
    collate = PackedCollator(0, 24)
    arguments = make_arguments(folder, **fields)
    assert issubclass(trainer_class, Trainer)
    return trainer_class(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate, callbacks=callbacks)


class StopAfter(TrainerCallback):
    """Interrupts a run without changing its schedule."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
