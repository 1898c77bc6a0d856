"""Other layers' hidden states in a head's context c (`head.aux_layers`): one map, once per step.

    c = h + W [norm(h); norm(h_a); norm(h_b); ...]        norm(x) = x / sqrt(mean(x^2) + eps)

h is the state that lm_head reads, h_a that after a of the target's decoder layers. The last layer
says what comes next; what lies before it knows more of what comes after that. W begins at 0, so a
new head begins as the one without. (1 + n) H^2 parameters, which no drafted level reads.
Sources: states of low, middle and high layers through one map, EAGLE-3 (arXiv 2503.01840); the sum
with h, ours.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from redrafter.products import Linear

_EPS = 1e-6


class LayerMix(nn.Module):
    """See the module's docstring. states: 1 + n, how many are mixed"""

    def __init__(self, hidden: int, states: int) -> None:
        super().__init__()
        self.states = states
        self.linear = Linear(states * hidden, hidden, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., (1 + n) H) -> (..., H)"""
        parts = hidden.to(self.linear.weight.dtype).unflatten(-1, (self.states, -1))
        normed = F.rms_norm(parts, parts.shape[-1:], eps=_EPS)
        return parts[..., 0, :] + self.linear(normed.flatten(-2))
