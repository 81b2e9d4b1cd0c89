"""Training the scales of stored weights, and the norms beside them, end to end, while the codes stay what they are
(https://arxiv.org/abs/2407.11062).

Calibration looks at one layer after another; what all of them together do to the predictions only a training sees. There is one
scale for a group of weights (or a row, with 8 bits), so that gradients and optimizer states are small beside the model, and the
result is a quantized checkpoint like any other, of the same size.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from .modules import PackedMatrices


def stored_matrices(model: nn.Module) -> list[PackedMatrices]:
    """All of a model's."""
    return [module for module in model.modules() if isinstance(module, PackedMatrices)]


def train_scales(model: PreTrainedModel) -> int:
    """Freezes a quantized model and makes its scales and norms trainable, by any Trainer or loop; `fold_scales` ends it.

    What is trained of scales are relative changes, `scale * (1 + scale_change)`, float32 parameters that begin at zero: one learning
    rate (2e-3 or so) suits all of them. Norms are trained as they are.

    Returns:
        The number of trainable weights.

    Raises:
        ValueError: the model is not quantized.
    """
    matrices = stored_matrices(model)
    if not matrices:
        raise ValueError("only a quantized model has scales to train; quantize the checkpoint first")
    model.requires_grad_(False)
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.requires_grad_(True)
    for one in matrices:
        one.scale_change = nn.Parameter(torch.zeros_like(one.scales, dtype=torch.float32))
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.is_qat_trainable = True
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def fold_scales(model: PreTrainedModel) -> None:
    """Makes the trained scales the stored ones, rounded to their dtype, after which nothing is trainable."""
    model.requires_grad_(False)
    for one in stored_matrices(model):
        one.scales = one.current_scales.to(one.scales.dtype).contiguous()
        one.scale_change = None
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.is_qat_trainable = False
