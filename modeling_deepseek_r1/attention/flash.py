"""FlashAttention-2 (https://arxiv.org/abs/2307.08691) as the kernel of a plan's products (`blockwise.py`), for GPUs.

Its kernels know causal products, aligned at the last query and the last key, and windows, but no masks. So plans for it have none:
the window of all queries is one product, the sink tokens are one or two more, and nodes are one, see `FlashKernel.attend`. The
bands of routed layers are left to the products of this library. Each part's backward is the kernel's own, called with the output
and log-sum-exp of the merged softmax.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class FlashKernel:
    """Products of one kind.

    Attributes:
        forward, backward: functions with the signature of flash_attn's `_flash_attn_forward` and `_flash_attn_backward` (2.7 and
            later); states are `[B, n, heads, D]` there.
        window: a query sees so many keys up to its own; None = all. Only for causal products.
        in_sdpa: whether `scaled_dot_product_attention` has the same kernels and may be called instead.
        stride, lead: of a causal product in which a query sees one key more only every `stride` queries: the first query is the
            `lead`-th of those that see equally many.
    """

    forward: Callable
    backward: Callable
    window: int | None = None
    stride: int = 1
    lead: int = 0
    in_sdpa: bool = False

    def attend(self, query, key, value, scale, mask=None, causal=False) -> tuple[torch.Tensor, torch.Tensor]:
        """As `kernels.attend`, without masks, for any numbers of queries and keys: the last query sees up to the last key."""
        states = (self._fold(query), key, value)
        output, logsumexp, *_ = self.forward(*map(_by_token, states), **self._options(scale, causal), return_softmax=False)
        output = output.transpose(1, 2)[..., : query.shape[3]]
        return self._unfold(output, query.shape[2]), self._unfold(logsumexp, query.shape[2])

    def attend_backward(
        self, grad, query, key, value, output, logsumexp, scale, mask=None, causal=False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `kernels.attend_backward`, see `attend`."""
        states = [_by_token(x) for x in (self._fold(query), key, value)]
        grads = [torch.empty_like(x) for x in states]
        merged = _by_token(self._fold(output)), self._fold(logsumexp).contiguous()
        options = self._options(scale, causal)
        self.backward(_by_token(self._fold(grad)), *states, *merged, *grads, **options, deterministic=False)
        grads = [x.transpose(1, 2)[..., : query.shape[3]] for x in grads]
        return self._unfold(grads[0], query.shape[2]), grads[1], grads[2]

    def _options(self, scale: float, causal: bool) -> dict:
        sides = (self.window - 1 if self.window is not None else -1, 0) if causal else (-1, -1)
        return {
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": causal,
            "window_size_left": sides[0],
            "window_size_right": sides[1],
            "softcap": 0.0,
            "alibi_slopes": None,
        }

    def _fold(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, H, Q, ...]` to `[B, H * stride, Q', ...]`: queries that see equally many keys become heads."""
        if self.stride == 1:
            return states
        tail = -(self.lead + states.shape[2]) % self.stride
        # What is put around the queries has no gradient, and with a log-sum-exp of 0 finite weights.
        states = F.pad(states, (*(0, 0) * (states.dim() - 3), self.lead, tail))
        return states.unflatten(2, (-1, self.stride)).transpose(2, 3).flatten(1, 2)

    def _unfold(self, states: torch.Tensor, num_queries: int) -> torch.Tensor:
        if self.stride == 1:
            return states
        states = states.unflatten(1, (-1, self.stride)).transpose(2, 3).flatten(2, 3)
        return states[:, :, self.lead : self.lead + num_queries]


def _by_token(states: torch.Tensor) -> torch.Tensor:
    """`[B, heads, n, D]` to contiguous `[B, n, heads, D']`, D' the next multiple of 8, as the kernels want it."""
    return F.pad(states, (0, -states.shape[3] % 8)).transpose(1, 2).contiguous()


def flash_kernel() -> FlashKernel:
    """The kernel of the package flash_attn.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
    except ImportError as error:
        raise ImportError(
            'attn_implementation="flash_attention_2" needs a GPU and the package flash-attn:'
            ' pip install "modeling-deepseek-r1[flash]"; "sdpa", the default, needs nothing'
        ) from error
    return FlashKernel(_flash_attn_forward, _flash_attn_backward)
