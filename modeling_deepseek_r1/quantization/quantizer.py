"""transformers' side: the entry `quantization_config` of a checkpoint, and how `from_pretrained` makes a model of it."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..moe.experts import DeepseekR1Experts, DeepseekR1LowRankExperts
from .formats import Format, encode, fit_grid
from .modules import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedHead,
    QuantizedLinear,
    QuantizedLowRankExperts,
    plain_embedding,
    plain_experts,
    plain_linear,
)
from .targets import Target, replace, replace_all, targets, tie_head

QUANT_METHOD = "deepseek_r1"
METHODS = ("rtn", "gptq", "awq")
FORMAT_VERSION = 1
DEFAULT_GROUP_SIZE = 32


class DeepseekR1QuantizationConfig(QuantizationConfigMixin):
    """Weights in few bits; also an argument of `from_pretrained`, which then rounds the weights of a plain checkpoint.

    Args:
        bits: 8, 4 or "fp8", of linear layers and experts.
        method: how the numbers were chosen: "rtn" rounds to nearest, "gptq" lets later columns make up for the error of earlier
            ones, "awq" scales inputs by how large they are.
        group_size: neighbouring inputs that share a scale, with 4 bits.
        embedding_bits: of the embedding and the head: 8, 4, "fp8", or None: they stay; default: as `bits`.
        modules_to_not_convert: names of modules that stay as they are, with all that is inside of them.
        version: of the stored format.

    Raises:
        ValueError: bits, a method, a group size or a version that do not exist.
    """

    def __init__(
        self,
        bits: int | str = 8,
        method: str = "rtn",
        group_size: int | None = None,
        embedding_bits: int | str | None = "same",
        modules_to_not_convert: Sequence[str] = (),
        version: int = FORMAT_VERSION,
        **kwargs,
    ):
        self.quant_method = QUANT_METHOD
        if method not in METHODS:
            raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"weights of format version {version} need another release of this library, which reads {FORMAT_VERSION}"
            )
        self.bits, self.method, self.version = bits, method, version
        self.embedding_bits = bits if embedding_bits == "same" else embedding_bits
        wants_groups = 4 in (self.bits, self.embedding_bits)
        if group_size is not None and not wants_groups:
            raise ValueError(f"group_size={group_size} belongs to 4 bits; with {bits!r} every row has one scale")
        self.group_size = (group_size or DEFAULT_GROUP_SIZE) if wants_groups else None
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.format, self.embedding_format  # noqa: B018 (both check themselves)

    @property
    def format(self) -> Format:
        """Of linear layers and experts."""
        return Format(self.bits, self.group_size if self.bits == 4 else None)

    @property
    def embedding_format(self) -> Format | None:
        """Of the embedding and the head."""
        bits = self.embedding_bits
        return None if bits is None else Format(bits, self.group_size if bits == 4 else None)

    @property
    def input_scales(self) -> bool:
        """Whether layers scale their inputs."""
        return self.method == "awq"


class DeepseekR1HfQuantizer(HfQuantizer):
    """Makes the modules that stored weights are read into, and rounds the weights of a plain checkpoint."""

    requires_calibration = False
    quantization_config: DeepseekR1QuantizationConfig
    is_qat_trainable = False
    """Whether the scales are being trained; transformers' Trainer asks for it."""

    def validate_environment(self, *args, **kwargs):
        if not self.pre_quantized and self.quantization_config.method != "rtn":
            raise ValueError(
                f"method={self.quantization_config.method!r} reads a text first: deepseek-r1 quantize, or"
                " quantization.quantize_checkpoint; from_pretrained can only round (method='rtn')"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        if self.pre_quantized:
            replace_all(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        if not self.pre_quantized:
            round_to_nearest(model, self.quantization_config)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are; the stored weights are no parameters."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dequantize(model, dtype or model.dtype)
        return model


def register() -> None:
    """Makes transformers know the method; may be called again."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(DeepseekR1HfQuantizer)
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(DeepseekR1QuantizationConfig)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name inside the replacement ("" for itself) -> the weight that is stored there."""
    if type(module) is DeepseekR1Experts:
        return {name: getattr(module, name) for name in ("gate_up_proj", "down_proj")}
    if hasattr(module, "gate_up_proj_a"):
        transposed = QuantizedLowRankExperts.TRANSPOSED
        weights = {name: getattr(module, name) for name in QuantizedLowRankExperts.FACTORS}
        return {f"factors.{name}": w.transpose(-1, -2) if name in transposed else w for name, w in weights.items()}
    return {"": module.weight}


@torch.no_grad()
def rounded_module(target: Target) -> nn.Module:
    """What takes the place of a target, its weights rounded to nearest."""
    new = target.empty().to(next(target.module.parameters()).device)
    for name, weight in weights_of(target.module).items():
        weight = weight.float()
        grid = fit_grid(weight, target.format)
        new.get_submodule(name).fill(encode(weight, grid, target.format), grid)
    return new


def round_to_nearest(
    model: PreTrainedModel, config: DeepseekR1QuantizationConfig, make: Callable[[Target], nn.Module] = rounded_module
) -> None:
    """Quantizes a loaded model in place, one module at a time.

    Args:
        make: gives what takes the place of a target.

    Raises:
        ValueError: as `targets`.
    """
    for target in targets(model, config):
        # Low-rank experts are a target, and so are the layers inside of them.
        current = Target(target.name, model.get_submodule(target.name), target.format, target.input_scale)
        replace(model, target.name, make(current))
    finish(model, config)


def finish(model: PreTrainedModel, config: DeepseekR1QuantizationConfig) -> None:
    """Makes a model with quantized modules one that `save_pretrained` and Trainers take for quantized."""
    tie_head(model)
    model.config.quantization_config = config
    quantizer = DeepseekR1HfQuantizer(config, pre_quantized=True)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, QUANT_METHOD


@torch.no_grad()
def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Puts plain modules in the place of quantized ones; the function stays what quantization has made of it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            replace(model, name, plain_linear(module, dtype))
        elif isinstance(module, QuantizedEmbedding):
            replace(model, name, plain_embedding(module, dtype))
        elif isinstance(module, QuantizedHead):
            replace(model, name, nn.Linear(module.in_features, module.out_features, bias=False, device="meta"))
        elif isinstance(module, (QuantizedExperts, QuantizedLowRankExperts)):
            kind = DeepseekR1Experts if isinstance(module, QuantizedExperts) else DeepseekR1LowRankExperts
            with torch.device("meta"):
                empty = kind(model.config.get_text_config(), int(re.search(r"layers\.(\d+)\.", name)[1]))
            replace(model, name, plain_experts(module, empty, dtype))
    model._tied_weights_keys = type(model)._tied_weights_keys
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights(recompute_mapping=False)
