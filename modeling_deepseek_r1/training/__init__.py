"""Training: callbacks for any Trainer, a Trainer that has them all, and whole runs from a recipe."""

from .arguments import DeepseekR1TrainingArguments
from .centroids import CentroidUpdate, move_centroids
from .distillation import DistillationConfig, DistillationTrainer, load_teacher, share_weights
from .recipe import Recipe
from .run import TrainingReport, train_checkpoint
from .thresholds import ThresholdUpdate, move_thresholds
from .trainable import TrainableReport, add_adapters, freeze
from .trainer import DeepseekR1Trainer, last_checkpoint

__all__ = [
    "CentroidUpdate",
    "DeepseekR1Trainer",
    "DeepseekR1TrainingArguments",
    "DistillationConfig",
    "DistillationTrainer",
    "Recipe",
    "ThresholdUpdate",
    "TrainableReport",
    "TrainingReport",
    "add_adapters",
    "freeze",
    "last_checkpoint",
    "load_teacher",
    "move_centroids",
    "move_thresholds",
    "share_weights",
    "train_checkpoint",
]
