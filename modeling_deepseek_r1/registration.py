"""The only place that touches transformers' registries, but for that of quantizers (`quantization/quantizer.py`): after `import modeling_deepseek_r1` the Auto classes know the models."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
)

from .configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from .configuration.configuration_multimodal import DeepseekR1Config
from .modeling_deepseek_r1 import (
    DeepseekR1ForCausalLM,
    DeepseekR1ForQuestionAnswering,
    DeepseekR1ForSequenceClassification,
    DeepseekR1ForTokenClassification,
    DeepseekR1TextModel,
)
from .modeling_multimodal import DeepseekR1ForConditionalGeneration, DeepseekR1Model
from .tokenization.processing_deepseek_r1 import DeepseekR1Processor

AUTO_CLASSES = {
    AutoModel: DeepseekR1TextModel,
    AutoModelForCausalLM: DeepseekR1ForCausalLM,
    AutoModelForQuestionAnswering: DeepseekR1ForQuestionAnswering,
    AutoModelForSequenceClassification: DeepseekR1ForSequenceClassification,
    AutoModelForTokenClassification: DeepseekR1ForTokenClassification,
}

MULTIMODAL_AUTO_CLASSES = {
    AutoModel: DeepseekR1Model,
    # What reads texts alone (evaluation, for one) takes it as a text model.
    AutoModelForCausalLM: DeepseekR1ForConditionalGeneration,
    AutoModelForImageTextToText: DeepseekR1ForConditionalGeneration,
    AutoModelForMultimodalLM: DeepseekR1ForConditionalGeneration,
}


def register() -> None:
    """Registers configurations, models and the processor; may be called again."""
    for config, classes in ((DeepseekR1TextConfig, AUTO_CLASSES), (DeepseekR1Config, MULTIMODAL_AUTO_CLASSES)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto_class, model_class in classes.items():
            auto_class.register(config, model_class, exist_ok=True)
    AutoProcessor.register(DeepseekR1Config, DeepseekR1Processor, exist_ok=True)


def register_vllm() -> None:
    """What vLLM calls in each of its processes (entry point `vllm.general_plugins`): checkpoints run on its Transformers backend,
    which looks for a model's class among the names of transformers itself. Patterns that it cannot serve are refused when the
    model is made (`attention/engines.py`)."""
    # Not `import transformers`: that package runs twice, and vLLM may hold the first module.
    from vllm.model_executor.models import registry

    register()
    setattr(registry.transformers, DeepseekR1ForCausalLM.__name__, DeepseekR1ForCausalLM)
