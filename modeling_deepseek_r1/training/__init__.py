"""Training: callbacks for any Trainer, a Trainer that has them all, and whole runs from a recipe."""

from .accumulation import AdaptiveAccumulation
from .arguments import DeepseekR1TrainingArguments
from .balance import BiasUpdate, move_balance_biases
from .centroids import CentroidUpdate, move_centroids
from .clipping import AdaptiveClipping
from .distillation import DistillationConfig, DistillationTrainer, load_teacher, share_weights
from .expert_clipping import ExpertClipping
from .expert_lora import (
    attach_experts,
    detach_experts,
    export_peft,
    import_peft,
    load_experts,
    merge_experts,
    save_experts,
    unmerge_experts,
)
from .learning_rate import AdaptiveLearningRate
from .quantization_aware import QuantizationAware
from .recipe import Recipe
from .router_hooks import ExpertCapacity, ExpertSampling
from .run import TrainingReport, train_checkpoint
from .select_experts import ExpertSelection, choose_experts, measure_relevance
from .sparsity import ProgressiveSparsity
from .task_gate import (
    attach_task_gates,
    detach_task_gates,
    load_task_gates,
    measure_neurons,
    save_task_gates,
    select_task,
    specialise,
)
from .temporary import TemporaryTraining
from .thresholds import ThresholdUpdate, fit_thresholds, move_thresholds
from .trainable import TrainableReport, add_adapters, freeze
from .trainer import DeepseekR1Trainer, last_checkpoint

__all__ = [
    "AdaptiveAccumulation",
    "AdaptiveClipping",
    "AdaptiveLearningRate",
    "BiasUpdate",
    "CentroidUpdate",
    "DeepseekR1Trainer",
    "DeepseekR1TrainingArguments",
    "DistillationConfig",
    "DistillationTrainer",
    "ExpertCapacity",
    "ExpertClipping",
    "ExpertSampling",
    "ExpertSelection",
    "ProgressiveSparsity",
    "QuantizationAware",
    "Recipe",
    "TemporaryTraining",
    "ThresholdUpdate",
    "TrainableReport",
    "TrainingReport",
    "add_adapters",
    "attach_experts",
    "attach_task_gates",
    "choose_experts",
    "detach_experts",
    "detach_task_gates",
    "export_peft",
    "fit_thresholds",
    "freeze",
    "import_peft",
    "last_checkpoint",
    "load_experts",
    "load_task_gates",
    "load_teacher",
    "measure_neurons",
    "measure_relevance",
    "merge_experts",
    "move_balance_biases",
    "move_centroids",
    "move_thresholds",
    "save_experts",
    "save_task_gates",
    "select_task",
    "share_weights",
    "specialise",
    "train_checkpoint",
    "unmerge_experts",
]
