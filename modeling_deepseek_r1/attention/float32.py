"""Modules that stay float32 in a model of any dtype."""

from torch import nn


class Float32Module(nn.Module):
    """Own parameters and buffers stay float32 where a whole model is cast, without having been rounded in between."""

    def _apply(self, fn, recurse: bool = True):
        exact = {name: tensor for name, tensor in [*self._parameters.items(), *self._buffers.items()] if tensor is not None}
        exact = {name: tensor.data for name, tensor in exact.items()}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            own = getattr(self, name)
            if own.dtype != tensor.dtype:
                own.data = tensor.to(own.device)
        return self
