"""How far each modality is to be trusted at a token."""

import torch
from torch import nn

from .fusion import ConstantGate

INITIAL_CONFIDENCE = 0.9


class ConflictResolver(nn.Module):
    """A confidence in (0, 1) for what one modality contributes, seen beside what all of them say together.

    Args:
        width: of a contribution.
        hidden_size: of the network between.
    """

    def __init__(self, width: int, hidden_size: int):
        super().__init__()
        self.hidden = nn.Linear(2 * width, hidden_size)
        self.output = ConstantGate(hidden_size, INITIAL_CONFIDENCE)

    def forward(self, contribution: torch.Tensor, together: torch.Tensor) -> torch.Tensor:
        """`[..., 1]` of the modality's contribution `[..., width]` and the sum over all of them."""
        return self.output(nn.functional.silu(self.hidden(torch.cat((contribution, together), -1)))).sigmoid()
