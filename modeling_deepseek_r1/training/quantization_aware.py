"""Training with the weights that quantization will make of them, so that they learn to do well as such.

Forwards see weights rounded to nearest, gradients pass the rounding as if it were not there (straight-through estimator,
https://arxiv.org/abs/1308.3432). What is trained and saved are the weights themselves; quantized afterwards with the same settings,
they become exactly what the forwards saw.
"""

from functools import partial

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback

from ..quantization.formats import Format, fit_grid, rounded
from ..quantization.modules import QuantizedLowRankExperts
from ..quantization.quantizer import DeepseekR1QuantizationConfig
from ..quantization.targets import targets


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, format, transposed):
        value = weight.float()
        value = value.transpose(-1, -2) if transposed else value
        value = rounded(value, fit_grid(value, format), format)
        return (value.transpose(-1, -2) if transposed else value).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def fake_quantized(weight: torch.Tensor, format: Format, transposed: bool = False) -> torch.Tensor:
    """A weight `[..., out, in]` rounded to nearest, whose gradient is that of the weight.

    Args:
        transposed: whether it is stored as `[..., in, out]`.
    """
    return _Rounded.apply(weight, format, transposed)


class QuantizationAware(TrainerCallback):
    """Lets a model compute with rounded weights while any Trainer trains and evaluates it.

    In a loop of your own call `attach(model)` and `detach()`.

    Args:
        config: bits, groups, and what is quantized; the method must be "rtn", which needs no calibration.

    Raises:
        ValueError: another method.
    """

    def __init__(self, config: DeepseekR1QuantizationConfig):
        if config.method != "rtn":
            raise ValueError(f"quantization-aware training rounds to nearest (method='rtn'), not {config.method!r}")
        self.config = config
        self._hooks: list = []

    def attach(self, model: nn.Module) -> None:
        """Puts hooks on everything that the configuration quantizes.

        Raises:
            ValueError: it is attached already, the model is quantized, has adapters, or nothing to be quantized.
        """
        model = getattr(model, "module", model)
        if self._hooks:
            raise ValueError("QuantizationAware is attached already")
        if getattr(model.config, "quantization_config", None) is not None:
            raise ValueError("the weights of a quantized model are not trained; begin with the checkpoint that it was made of")
        for target in targets(model, self.config):
            names = [name for name, _ in target.module.named_parameters(recurse=False) if name != "bias"]
            before = partial(_round, names=names, format=target.format)
            self._hooks.append(target.module.register_forward_pre_hook(before))
            self._hooks.append(target.module.register_forward_hook(partial(_restore, names=names), always_call=True))

    def detach(self) -> None:
        """Takes the hooks away; forwards see the weights as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.detach()
        self.attach(model)


def _round(module: nn.Module, args, names: list[str], format: Format) -> None:
    # An entry of the instance hides the parameter of the same name, which stays one.
    for name in names:
        module.__dict__[name] = fake_quantized(module._parameters[name], format, name in QuantizedLowRankExperts.TRANSPOSED)


def _restore(module: nn.Module, args, output, names: list[str]) -> None:
    for name in names:
        module.__dict__.pop(name, None)
