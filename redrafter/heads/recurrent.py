"""The recurrent draft head of ReDrafter (arXiv 2403.09919; Apple's ml-recurrent-drafter).

    s_1 = SiLU(W e_1 + b)              s_t = SiLU(W e_t + U s_{t-1} + b)
    x   = [c ; s_t]                    (2H), through a linear map to E where E != 2H
    x   = x + SiLU(A_i x + a_i)        for every residual block i
    logits = O x                       O: (V, E), or the target's own lm_head behind E -> H

c is the hidden state and e_1, e_2, ... embed the tokens that are read, aligned as in
`heads/base.py`. Parameters, with R blocks: 2 H^2 + H (simple), R (E^2 + E), V E (own matrix), and
2 H E + E where E != 2H. An E far below H so makes O a matrix of low rank (over the vocabulary,
SlimSpec, arXiv 2605.10453).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redrafter.heads.base import DraftHead, DraftHeadConfig, ResidualBlock, embedding_rms
from redrafter.heads.recurrent_level import ReadyLevels
from redrafter.products import Linear, SplitProduct, gains, state_of

#: entries above which no table of W e of all tokens is made: 8 MiB
_TABLE = 1 << 21


class RecurrentHeadConfig(DraftHeadConfig):
    """What a recurrent head is made of, beside what all heads say (`DraftHeadConfig`).

    exit_dim: E, width of the residual blocks (None = 2H)
    num_draft_layers: residual blocks
    first_state: "code" s_1 = SiLU(W e_1 + b), as Apple's code; "paper" s_1 = e_1
    cell: "simple" (above), "gru", or "sum" (the running sum of embeddings; Apple's rnn=False)
    embedding_scale: "rms" divides embeddings by the root mean square of the target's embedding
        matrix (one frozen number, saved); "none" takes them as they are
    input_norm: RMSNorm on x = [c ; s]
    state_norm: RMSNorm on every s_t, as it is read by the maps behind and by the step after
    output: "own" matrix (V, E), or "target": E -> H, then the target's frozen lm_head (not saved)
    """

    model_type = "redrafter_recurrent"
    choices = {  # noqa: RUF012
        "first_state": ("code", "paper"),
        "cell": ("simple", "gru", "sum"),
        "embedding_scale": ("none", "rms"),
        "output": ("own", "target"),
    }
    least = {"exit_dim": 1, "num_draft_layers": 0}  # noqa: RUF012

    exit_dim: int | None = None
    num_draft_layers: int = 2
    first_state: str = "code"
    cell: str = "simple"
    embedding_scale: str = "none"
    input_norm: bool = False
    state_norm: bool = False
    output: str = "own"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.exit_dim is None:
            self.exit_dim = 2 * self.hidden_size
        super().__post_init__(**kwargs)


class RecurrentHead(DraftHead):
    """See the module's docstring. Parameters carry Apple's names where Apple has them."""

    config_class = RecurrentHeadConfig
    kind = "recurrent"
    paper = ("ReDrafter", "2403.09919")
    smaller = "head.draft_vocab_size, head.output target, or a smaller head.exit_dim"

    def __init__(self, config: RecurrentHeadConfig) -> None:
        super().__init__(config)
        self._forget()
        hidden, width = config.hidden_size, config.exit_dim
        # Said once: a configuration of transformers answers slowly, and these are asked per level.
        self._n_blocks, self._norms = config.num_draft_layers, config.input_norm
        self._projects, self._scales = width != 2 * hidden, config.embedding_scale == "rms"
        self._norms_state = config.state_norm
        #: whether the maps of a level are those that `ReadyLevels` knows
        self._in_one = (config.cell, config.first_state) == ("simple", "code")
        self._in_one &= not (config.input_norm or config.state_norm)
        self._tabulates = config.cell == "simple" and config.vocab_size * hidden <= _TABLE
        if config.cell == "simple":
            self.rnn_w = Linear(hidden, hidden, bias=False)
            self.rnn_u = Linear(hidden, hidden)
        elif config.cell == "gru":
            self.gru = nn.GRUCell(hidden, hidden)
        if config.embedding_scale == "rms":
            self.register_buffer("inverse_rms", torch.ones(()))
        if config.input_norm:
            self.input_norm = nn.RMSNorm(2 * hidden, eps=1e-6)
        if config.state_norm:
            self.state_norm = nn.RMSNorm(hidden, eps=1e-6)
        if width != 2 * hidden:
            self.input_proj = Linear(2 * hidden, width)
        layers: list[nn.Module] = [ResidualBlock(width) for _ in range(config.num_draft_layers)]
        if config.output == "own":
            layers.append(nn.Linear(width, self.draft_vocab_size, bias=False))
        else:
            self.to_hidden = Linear(width, hidden, bias=False)
        self.lm_head = nn.ModuleList(layers)
        self.prune()
        self.post_init()

    def begin(self, target: Any) -> None:
        if self.config.embedding_scale == "rms":
            self.inverse_rms.fill_(1.0 / embedding_rms(target))

    def output_layer(self, level: int = 1) -> nn.Linear:
        return self.lm_head[-1]

    def summary(self) -> str:
        config = self.config
        return f"{config.num_draft_layers} residual blocks, cell `{config.cell}`"

    def step(self, e: Tensor, s: Tensor | None = None) -> Tensor:
        """The recurrence.

        e: (..., H) embedding of the next token of each path, as `target.embed` returns it
        s: (..., H) state before it, or None at the first step
        Returns (..., H), the state after it.
        """
        return self._normed(self._cell(e, s))

    def _normed(self, s: Tensor) -> Tensor:
        return self.state_norm(s) if self._norms_state else s

    def _cell(self, e: Tensor, s: Tensor | None) -> Tensor:
        """`step` without its norm."""
        e = self._scaled(e)
        if s is None and self.config.first_state == "paper":
            return e
        if self.config.cell == "sum":
            return e if s is None else s + e
        if self.config.cell == "gru":
            flat = e.reshape(-1, e.shape[-1])
            return self.gru(flat, None if s is None else s.reshape(flat.shape)).view(e.shape)
        return self._next(self.rnn_w(e), s)

    def _scaled(self, e: Tensor) -> Tensor:
        e = e.to(self.dtype_of_weights)
        return e * self.inverse_rms if self._scales else e

    def _next(self, read: Tensor, s: Tensor | None) -> Tensor:
        """SiLU(W e + U s + b). read: W e"""
        return F.silu(read + (self.rnn_u.bias if s is None else self.rnn_u(s)))

    def advance(
        self, target: Any, tokens: Tensor, context: Tensor, states: Tensor | None, level: int
    ) -> Tensor:
        known = states is not None or self.config.first_state == "code"
        table = self._read_ahead(target) if known else None
        if table is None:
            return self.step(target.embed(tokens), states)
        read = F.embedding(tokens, table)
        return self._normed(F.silu(read if states is None else read + self._of_u(states)))

    def _of_u(self, s: Tensor) -> Tensor:
        """U s, without the bias."""
        product = self.rnn_u.product()
        return F.linear(s, self.rnn_u.weight) if product is None else product(s)

    def read(
        self, target: Any, tokens: Tensor, context: Tensor, states: Tensor | None, level: int
    ) -> tuple[Tensor, Tensor]:
        """As every head's; by kernels in one call."""
        ready = self._ready
        begins = states is None or (ready is not None and ready.context is not context)
        if begins and self._in_one:
            ready = self._ready = ReadyLevels.for_draft(ready, self, target, context)
        made = None
        if ready is not None:
            e = None if ready.table is not None else self._scaled(target.embed(tokens))
            made = ready.read(tokens, states, e)
        return super().read(target, tokens, context, states, level) if made is None else made

    def features(self, c: Tensor, s: Tensor, level: int = 1) -> Tensor:
        """The tensor that multiplies the vocabulary matrix, by the same maps at every level.

        c: (..., H) hidden state of the target, broadcast against s: (..., H)
        Returns (..., E), or (..., H) where the matrix is the target's.
        """
        first = self._split_first()
        y = None if first is None else first(c, s, level > 1)
        if y is not None and self._projects:
            x = y
        else:
            x = torch.cat((c.to(s.dtype).expand(*s.shape[:-1], -1), s), dim=-1)
            if self._norms:
                x = self.input_norm(x)
            if self._projects:
                x = self.input_proj(x)
            elif y is not None:
                x = x + F.silu(y)
        read = int(y is not None and not self._projects)
        for i in range(read, self._n_blocks):
            x = self.lm_head[i](x)
        return self.to_hidden(x) if self.draws_on_target else x

    # -- what is ready while it drafts -----------------------------------------------------

    def _split_first(self) -> SplitProduct | None:
        """The first map of x, which is the head's only one that reads c; None where it is not
        faster in two, and in training."""
        if self._projects:
            linear = self.input_proj
        else:
            linear = self.lm_head[0].linear if self._n_blocks else None
        if type(linear) is not Linear or self._norms or not gains(linear.weight):
            return None
        if self._first is None or not self._first.is_of(linear):
            self._first = SplitProduct(linear, self.config.hidden_size)
        return self._first

    def _read_ahead(self, target: Any) -> Tensor | None:
        """(V, H), W e + b of every token; None where it would be large, where nothing tells whether
        the target's embeddings have changed, and in training."""
        if not (self._tabulates and type(self.rnn_w) is type(self.rnn_u) is Linear):
            return None
        embeddings = getattr(target, "embedding_weight", None)
        if embeddings is None or not gains(self.rnn_w.weight):
            return None
        weights = [embeddings, self.rnn_w.weight, self.rnn_u.bias]
        weights += [self.inverse_rms] if self._scales else []
        state = weakref.ref(target), self.rounds, *map(state_of, weights)
        if self._table is None or self._table[0] != state:
            every = torch.arange(self.config.vocab_size, device=self.rnn_w.weight.device)
            read = self.rnn_w(self._scaled(target.embed(every)))
            self._table = state, read + self.rnn_u.bias
        return self._table[1]

    def _forget(self) -> None:
        self._first: SplitProduct | None = None
        self._ready: ReadyLevels | None = None  # with the context of the draft that was begun last
        self._table: tuple[tuple, Tensor] | None = None

    def train(self, mode: bool = True) -> RecurrentHead:
        self._forget()
        return super().train(mode)

    def forward(self, context: Tensor, tokens: Tensor, target: Any) -> Tensor:
        """As every head's; the maps behind the recurrence run once for all levels."""
        states: list[Tensor] = []
        for e in target.embed(tokens).unbind(-2):
            states.append(self.step(e, states[-1] if states else None))
        return self.features(context.unsqueeze(-2), torch.stack(states, dim=-2))

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """Cheaper than `dtype`, which walks all parameters: read once per drafted level."""
        layer = self.to_hidden if self.draws_on_target else self.lm_head[-1]
        return layer.weight.dtype


HEAD = RecurrentHead
