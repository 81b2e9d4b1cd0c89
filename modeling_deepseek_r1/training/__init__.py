"""Training: callbacks for any Trainer, a Trainer that has them all, and whole runs from a recipe."""

from .arguments import DeepseekR1TrainingArguments
from .balance import BiasUpdate, move_balance_biases
from .centroids import CentroidUpdate, move_centroids
from .recipe import Recipe
from .run import TrainingReport, train_checkpoint
from .thresholds import ThresholdUpdate, move_thresholds
from .trainable import TrainableReport, add_adapters, freeze
from .trainer import DeepseekR1Trainer, last_checkpoint

__all__ = [
    "BiasUpdate",
    "CentroidUpdate",
    "DeepseekR1Trainer",
    "DeepseekR1TrainingArguments",
    "Recipe",
    "ThresholdUpdate",
    "TrainableReport",
    "TrainingReport",
    "add_adapters",
    "freeze",
    "last_checkpoint",
    "move_balance_biases",
    "move_centroids",
    "move_thresholds",
    "train_checkpoint",
]
