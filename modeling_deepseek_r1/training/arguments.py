"""Arguments of a training run."""

import json
from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class DeepseekR1TrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, with what only these models have.

    Tokens are counted by default, without padding, so that every line of the log has tokens per second.

    Args:
        centroid_decay: share of the old centroid that an optimizer step keeps in routed layers; 1 leaves the centroids alone.
        quantization_aware: settings of `DeepseekR1QuantizationConfig`, e.g. `{"bits": 4, "group_size": 32}`: forwards see weights
            rounded so.

        adversarial_noise: adds the loss at embeddings moved so far, relative to their length, to where it is highest
            (`data.augment.adversarial_loss`); a step then takes about three times as long. 0 = none.

    Raises:
        ValueError: a decay outside of [0, 1], noise below 0, or fp16 on a CPU.
    """

    centroid_decay: float = field(
        default=0.99,
        metadata={"help": "Share of the old centroid that an optimizer step keeps in routed layers; 1 = they stay."},
    )
    quantization_aware: dict | str | None = field(
        default=None, metadata={"help": "Train with rounded weights: settings of DeepseekR1QuantizationConfig."}
    )
    adversarial_noise: float = field(
        default=0.0, metadata={"help": "Also learn at embeddings moved so far to where the loss is highest; 0 = no."}
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={"help": "Whether to count the tokens seen, for tokens per second: all, non_padding or no."},
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.quantization_aware, str):
            self.quantization_aware = json.loads(self.quantization_aware)
        if not 0 <= self.centroid_decay <= 1:
            raise ValueError(f"centroid_decay={self.centroid_decay} must lie in [0, 1]")
        if self.adversarial_noise < 0:
            raise ValueError(f"adversarial_noise={self.adversarial_noise} must be 0 or more")
        if self.fp16 and self.device.type == "cpu":
            # accelerate has no loss scaling there and would train in float32 without a word.
            raise ValueError("fp16=True: mixed precision in float16 needs an accelerator; on a CPU use bf16=True")
