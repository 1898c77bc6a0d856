"""Attention over the row as a head's context c (`head.prefix attention`): one decoder layer.

    x_t = h_t + W norm(e_{t+1})
    y_t = x_t + O Attention(norm(x))_t               over positions 0 .. t, rotary
    c_t = y_t + D (SiLU(G norm(y_t)) * U norm(y_t))  2H inside

h_t and e_{t+1} are aligned as in `heads/base.py`: position t reads the token that h_t led to, which
is known wherever a draft begins, and nothing behind it. 11 H^2 + 3 H parameters.

The layer adds to h_t and does not replace it: W, O and D begin at 0, so a new head begins as the
one without the layer, and what stands behind c goes on reading what the target's lm_head reads.
Sources: one layer over the prefix, run once per step, Hydra++ (arXiv 2402.05109); its input, pairs
of a hidden state and the next token's embedding, EAGLE (2401.15077); the sum with h_t, ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-6
_MOST_HEAD_DIM = 64
_ROTARY_BASE = 10000.0


class PrefixLayer(nn.Module):
    """See the module's docstring. heads: number of attention heads, of an even width each"""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.token_norm = nn.RMSNorm(hidden, eps=_EPS)
        self.token_in = nn.Linear(hidden, hidden, bias=False)
        self.attention_norm = nn.RMSNorm(hidden, eps=_EPS)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.attention_out = nn.Linear(hidden, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=_EPS)
        self.gate_up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(2 * hidden, hidden, bias=False)
        for written in (self.token_in, self.attention_out, self.down):
            nn.init.zeros_(written.weight)

    def forward(self, hidden: Tensor, embedded: Tensor, cache: Any = None) -> Tensor:
        """c at n positions of B rows, (B, n, H).

        hidden: (B, n, H) h_t; embedded: (B, n, H) e_{t+1}
        cache: a `RowCache` of one layer, prepared for n more positions of every row; None: the rows
            begin here
        """
        dtype = self.token_in.weight.dtype
        x = hidden.to(dtype) + self.token_in(self.token_norm(embedded.to(dtype)))
        x = x + self.attention_out(self._attended(self.attention_norm(x), cache))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def _attended(self, x: Tensor, cache: Any) -> Tensor:
        n = x.shape[1]
        position = torch.arange(n, device=x.device)[None]
        if cache is not None:
            position = cache.length[:, None] + position
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, keys = rotated(split[:2], position)  # (B, heads, n, d) each
        values = split[2]
        if cache is not None:
            keys, values = cache.update(keys, values, 0)
        if keys.shape[2] == n:  # nothing stands before these positions
            found = F.scaled_dot_product_attention(query, keys, values, is_causal=True)
        else:
            # Behind a row's own position lies what is padding, or was left by an earlier step.
            place = torch.arange(keys.shape[2], device=x.device)
            seen = (place <= position[:, :, None])[:, None]
            found = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
        return found.transpose(1, 2).flatten(2)


def rotated(x: Tensor, position: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864), halves of a head's width as pairs.

    x: (..., B, heads, n, d); position: (B or 1, n) int64
    """
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    rate = _ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = position[:, None, :, None].to(wide) * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    one, other = x.chunk(2, dim=-1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


def heads_for(hidden: int) -> int:
    """Attention heads of the greatest even width up to 64 that divides H; H of them, which
    `DraftHeadConfig.check` refuses, where H is odd."""
    widths = range(2, min(hidden, _MOST_HEAD_DIM) + 1, 2)
    return hidden // max((w for w in widths if hidden % w == 0), default=1)
