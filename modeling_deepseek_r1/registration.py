"""The only place that touches transformers' registries: after `import modeling_deepseek_r1` the Auto classes know the models."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from .modeling_deepseek_r1 import (
    DeepseekR1ForCausalLM,
    DeepseekR1ForQuestionAnswering,
    DeepseekR1ForSequenceClassification,
    DeepseekR1ForTokenClassification,
    DeepseekR1TextModel,
)

AUTO_CLASSES = {
    AutoModel: DeepseekR1TextModel,
    AutoModelForCausalLM: DeepseekR1ForCausalLM,
    AutoModelForQuestionAnswering: DeepseekR1ForQuestionAnswering,
    AutoModelForSequenceClassification: DeepseekR1ForSequenceClassification,
    AutoModelForTokenClassification: DeepseekR1ForTokenClassification,
}


def register() -> None:
    """Registers the configuration and the models; may be called again."""
    AutoConfig.register(DeepseekR1TextConfig.model_type, DeepseekR1TextConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(DeepseekR1TextConfig, model_class, exist_ok=True)
