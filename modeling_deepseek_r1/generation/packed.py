"""Weights in the layout that oneDNN multiplies fastest on this CPU.

`torch.nn.functional.linear` gives plain matrices to a library that rearranges them in every call, or reads them as they are. Weights
that are packed once are read in the order of the products, which is faster for the few rows of a decoding step, and in float32 for
long prompts as well. Compiled code has another way (`compiled.py`), and cannot read packed weights.
"""

from typing import Any

import torch
from torch import nn

ROWS = 16
"""Rows of inputs that the layout is chosen for; any number can be multiplied."""


class PackedLinear(nn.Module):
    """An `nn.Linear` whose weight is packed; for inference only.

    `weight` and the state dict give the plain matrix, which is made anew each time.

    Args:
        linear: the layer, on a CPU, in float32 or bfloat16.
        keep_weight: the weight is in use elsewhere (tied to the embedding), so it stays a parameter beside the packed one.
    """

    def __init__(self, linear: nn.Linear, keep_weight: bool = False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        if keep_weight:
            self.weight = linear.weight
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.training = linear.training

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "weight" not in self._parameters:
            return self.packed.to_dense()
        return super().__getattr__(name)

    @torch.compiler.disable(reason="packed weights cannot be compiled: load the model again, without pack_weights()")
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`, in the dtype of the weight, under autocast too.

        Raises:
            RuntimeError: a gradient is asked for.
        """
        if inputs.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("packed weights have no gradients: load the model again to train it, or use torch.no_grad()")
        return torch.ops.mkldnn._linear_pointwise(inputs.to(self.packed.dtype), self.packed, self.bias, "none", [], "")

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.setdefault(f"{prefix}weight", self.weight)

    def _apply(self, fn, recurse: bool = True):
        probe = torch.empty(0, dtype=self.packed.dtype)
        moved = fn(probe)
        if (moved.device, moved.dtype) != (probe.device, probe.dtype):
            raise RuntimeError(
                f"packed weights stay in {self.packed.dtype} on the CPU: move or convert the model before pack_weights()"
            )
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol):
        raise TypeError("packed weights cannot be copied or pickled: copy the model before pack_weights()")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack_weights(model: nn.Module) -> int:
    """Packs the weights of all linear layers of a model for inference on a CPU, in place.

    Results differ by rounding. Layers that are elsewhere, in other dtypes (or bfloat16, where the CPU has no instructions for it),
    quantized, or part of fused experts stay as they are. The model takes no more memory than before, but for a head that shares its
    weight with the embedding, though `num_parameters()` no longer counts them. It can be saved; it cannot be trained, compiled,
    copied or moved to another device.

    Returns:
        How many layers have been packed.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    dtypes = [torch.float32, *[torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()]
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    users = [id(own) for module in model.modules() for own in module._parameters.values() if own is not None]
    count = 0
    for name, linear in linears:
        weight = linear.weight
        if weight.device.type == "cpu" and weight.dtype in dtypes:
            model.set_submodule(name, PackedLinear(linear, keep_weight=users.count(id(weight)) > 1))
            count += 1
    return count
