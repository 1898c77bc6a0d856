"""The recurrent draft head of ReDrafter (arXiv 2403.09919; Apple's ml-recurrent-drafter).

    s_1 = SiLU(W e_1 + b)              s_t = SiLU(W e_t + U s_{t-1} + b)
    x   = [c ; s_t]                    (2H), through a linear map to E where E != 2H
    x   = x + SiLU(A_i x + a_i)        for every residual block i
    logits = O x                       O: (V, E), or the target's own lm_head behind E -> H

Alignment, stated here once for training and decoding alike
------------------------------------------------------------
c = h_t is the hidden state that the target's lm_head turned into its prediction of token t+1.
e_1 is the embedding of that next token t+1, which is therefore known for sure. So *(h_t, e_{t+1})
first predicts token t+2*, and after k steps (h_t; e_{t+1}, ..., e_{t+k}) predicts token t+1+k.
c stays the same at all steps of a draft. In decoding, e_1 embeds the root of the tree (the last
emitted token, not yet in the cache) and the logits of step k are about depth k.

The caller supplies embeddings (`target.embed(tokens)`): the head never owns the embedding matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from redrafter import __version__
from redrafter.contracts import InputError
from redrafter.files import digest_weights
from redrafter.heads.lora import effective_weight
from redrafter.heads.owner import describe

_CHOICES = {
    "first_state": ("code", "paper"),
    "cell": ("simple", "gru", "sum"),
    "embedding_scale": ("none", "rms"),
    "output": ("own", "target"),
}


class RecurrentHeadConfig(PreTrainedConfig):
    """What a recurrent head is made of; stored as `config.json` beside its weights.

    vocab_size: V of the target                hidden_size: H of the target
    exit_dim: E, width of the residual blocks (None = 2H)
    num_draft_layers: residual blocks
    first_state: "code" s_1 = SiLU(W e_1 + b), as Apple's code; "paper" s_1 = e_1
    cell: "simple" (above), "gru", or "sum" (the running sum of embeddings; Apple's rnn=False)
    embedding_scale: "rms" divides embeddings by the root mean square of the target's embedding
        matrix (one frozen number, saved); "none" takes them as they are
    input_norm: RMSNorm on x = [c ; s]
    output: "own" matrix (V, E), or "target": E -> H, then the target's frozen lm_head (not saved)
    draft_vocab_size: Vd, size of a pruned draft vocabulary (None = full); the buffer `draft_ids`
        (Vd,) then holds the target's id of each drafted id
    target_fingerprint, target_name, target_base, target_adapter, target_probe: which target it was
        trained for ("" or None = unknown); see `redrafter/heads/owner.py`
    trained_depth: depths it was trained on (None = unknown)
    """

    model_type = "redrafter_recurrent"

    vocab_size: int = 0
    hidden_size: int = 0
    exit_dim: int | None = None
    num_draft_layers: int = 2
    first_state: str = "code"
    cell: str = "simple"
    embedding_scale: str = "none"
    input_norm: bool = False
    output: str = "own"
    draft_vocab_size: int | None = None
    target_fingerprint: str = ""
    target_name: str = ""
    target_base: str = ""
    target_adapter: str = ""
    target_probe: dict[str, list[float]] | None = None
    trained_depth: int | None = None
    redrafter_version: str = __version__

    def __post_init__(self, **kwargs: Any) -> None:
        if self.exit_dim is None:
            self.exit_dim = 2 * self.hidden_size
        super().__post_init__(**kwargs)


class ResidualBlock(nn.Module):
    """x + SiLU(A x + a)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class RecurrentHead(PreTrainedModel):
    """See the module's docstring. Parameters carry Apple's names where Apple has them.

    A head with output "target" must be given the frozen matrix once: `head.bind(target)`.
    """

    config_class = RecurrentHeadConfig
    main_input_name = "context"
    #: levels that it can draft; None: any
    max_depth: int | None = None

    def __init__(self, config: RecurrentHeadConfig) -> None:
        check_config(config)
        super().__init__(config)
        hidden, width = config.hidden_size, config.exit_dim
        if config.cell == "simple":
            self.rnn_w = nn.Linear(hidden, hidden, bias=False)
            self.rnn_u = nn.Linear(hidden, hidden)
        elif config.cell == "gru":
            self.gru = nn.GRUCell(hidden, hidden)
        if config.embedding_scale == "rms":
            self.register_buffer("inverse_rms", torch.ones(()))
        if config.input_norm:
            self.input_norm = nn.RMSNorm(2 * hidden, eps=1e-6)
        if width != 2 * hidden:
            self.input_proj = nn.Linear(2 * hidden, width)
        layers: list[nn.Module] = [ResidualBlock(width) for _ in range(config.num_draft_layers)]
        if config.output == "own":
            layers.append(nn.Linear(width, self.draft_vocab_size, bias=False))
        else:
            self.to_hidden = nn.Linear(width, hidden, bias=False)
        self.lm_head = nn.ModuleList(layers)
        if config.draft_vocab_size is not None:
            ids = torch.arange(config.draft_vocab_size)
            self.register_buffer("draft_ids", ids)
        self._frozen_matrix: Tensor | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: torch's own initialisation of nn.Linear is Apple's too."""

    def get_input_embeddings(self) -> None:
        return None

    def get_output_embeddings(self) -> None:
        return None

    @classmethod
    def for_target(cls, target: Any, **fields: Any) -> RecurrentHead:
        """A new head of the target's shape, on its device, in float32, bound where needed.

        target: anything with hidden_size, vocab_size, name, device, fingerprint(), parts(),
            probe(), embed(), lm_head_weight
        fields: of RecurrentHeadConfig; `draft_ids` (Vd,) int64 tensor prunes the draft vocabulary
        """
        draft_ids = fields.pop("draft_ids", None)
        config = RecurrentHeadConfig(
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            draft_vocab_size=None if draft_ids is None else len(draft_ids),
            **describe(target),
            **fields,
        )
        head = cls(config)
        if draft_ids is not None:
            head.draft_ids.copy_(draft_ids)
        if config.embedding_scale == "rms":
            head.inverse_rms.fill_(1.0 / embedding_rms(target))
        return head.to(target.device).bind(target)

    @property
    def draft_vocab_size(self) -> int:
        """Vd: columns of `logits`."""
        pruned = self.config.draft_vocab_size
        return self.config.vocab_size if pruned is None else pruned

    @property
    def draws_on_target(self) -> bool:
        """True if the vocabulary matrix is the target's frozen one."""
        return self.config.output == "target"

    def bind(self, target: Any) -> RecurrentHead:
        """Take the target's frozen lm_head (shared, not copied, unless the vocabulary is pruned).

        Its soft-caps and logit scales are left out on purpose: they keep the order of tokens, and
        the trained map E -> H can express a scale. Does nothing for a head with its own matrix.
        """
        if not self.draws_on_target:
            return self
        matrix = target.lm_head_weight.detach()
        if tuple(matrix.shape) != (self.config.vocab_size, self.config.hidden_size):
            raise InputError(
                f"this head expects an lm_head of {self.config.vocab_size} x "
                f"{self.config.hidden_size}, the target's is {' x '.join(map(str, matrix.shape))}: "
                "use the target that the head was trained for"
            )
        if self.config.draft_vocab_size is not None:
            matrix = matrix[self.draft_ids.to(matrix.device)]
        self._frozen_matrix = matrix
        return self

    def step(self, e: Tensor, s: Tensor | None = None) -> Tensor:
        """The recurrence; the only place where it exists.

        e: (..., H) embedding of the next token of each path, as `target.embed` returns it
        s: (..., H) state before it, or None at the first step
        Returns (..., H), the state after it.
        """
        e = e.to(self.dtype_of_weights)
        if self.config.embedding_scale == "rms":
            e = e * self.inverse_rms
        if s is None and self.config.first_state == "paper":
            return e
        if self.config.cell == "sum":
            return e if s is None else s + e
        if self.config.cell == "gru":
            flat = e.reshape(-1, e.shape[-1])
            return self.gru(flat, None if s is None else s.reshape(flat.shape)).view(e.shape)
        recurrent = self.rnn_u.bias if s is None else self.rnn_u(s)
        return F.silu(self.rnn_w(e) + recurrent)

    def features(self, c: Tensor, s: Tensor) -> Tensor:
        """The tensor that multiplies the vocabulary matrix.

        c: (..., H) hidden state of the target, broadcast against s: (..., H)
        Returns (..., E), or (..., H) where the matrix is the target's.
        """
        if c.shape != s.shape:
            c = c.expand_as(s)
        x = torch.cat((c.to(s.dtype), s), dim=-1)
        if self.config.input_norm:
            x = self.input_norm(x)
        if self.config.exit_dim != 2 * self.config.hidden_size:
            x = self.input_proj(x)
        for block in self.lm_head[: self.config.num_draft_layers]:
            x = block(x)
        return self.to_hidden(x) if self.draws_on_target else x

    def vocab_matrix(self) -> Tensor:
        """(Vd, E) trained, or (Vd, H) frozen: what `features` are multiplied with."""
        if not self.draws_on_target:
            return effective_weight(self.lm_head[-1])
        if self._frozen_matrix is None:
            raise InputError(
                "this head draws on the target's lm_head: give the target too (head.bind(target))"
            )
        return self._frozen_matrix

    def logits(self, c: Tensor, s: Tensor) -> Tensor:
        """Scores of the token after the last one seen. c, s: (..., H). Returns (..., Vd)."""
        matrix = self.vocab_matrix()
        return F.linear(self.features(c, s).to(matrix.dtype), matrix)

    def read(
        self, target: Any, tokens: Tensor, context: Tensor, states: Tensor | None, level: int
    ) -> tuple[Tensor, Tensor]:
        """One level of a draft, as every head answers it.

        tokens: (B, w) int64, read next by each path; context: (B, 1, H) c of each row
        states: (B, w, S) of each path before, None at level 1; level: 1, 2, ...
        Returns states after them (B, w, S), and logits of what follows (B, w, Vd).
        """
        states = self.step(target.embed(tokens), states)
        return states, self.logits(context, states)

    def forward(self, context: Tensor, embeddings: Tensor) -> Tensor:
        """Features of all K steps of given paths, teacher-forced (training).

        context: (..., H) c of each path; embeddings: (..., K, H) e_1 .. e_K
        Returns (..., K, E or H); [..., k, :] is about depth k + 1.
        """
        states: list[Tensor] = []
        for e in embeddings.unbind(-2):
            states.append(self.step(e, states[-1] if states else None))
        return self.features(context.unsqueeze(-2), torch.stack(states, dim=-2))

    def to_vocab_ids(self, draft_ids: Tensor) -> Tensor:
        """Ids of the target's vocabulary for columns of `logits` (any shape, int64)."""
        return draft_ids if self.config.draft_vocab_size is None else self.draft_ids[draft_ids]

    def fingerprint(self) -> str:
        """16 hex digits over its own weights; what it borrows from the target is left out."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = digest_weights(self.state_dict().items())
        return self._fingerprint

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """Cheaper than `dtype`, which walks all parameters: read once per drafted level."""
        layer = self.to_hidden if self.draws_on_target else self.lm_head[-1]
        return layer.weight.dtype


def check_config(config: RecurrentHeadConfig, where: str = "head config") -> None:
    """Raises InputError naming the first field that makes no sense."""
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise InputError(
                f"{where}: {name} = {getattr(config, name)!r}; choose one of {', '.join(allowed)}"
            )
    for name, least in (
        ("vocab_size", 1),
        ("hidden_size", 1),
        ("exit_dim", 1),
        ("num_draft_layers", 0),
    ):
        if getattr(config, name) < least:
            raise InputError(f"{where}: {name} = {getattr(config, name)}; at least {least} needed")
    pruned = config.draft_vocab_size
    if pruned is not None and not 1 <= pruned <= config.vocab_size:
        raise InputError(
            f"{where}: draft_vocab_size = {pruned}; must lie in 1..{config.vocab_size}"
        )


def embedding_rms(target: Any, rows: int = 8192) -> float:
    """Root mean square of the target's embedding matrix, read `rows` rows at a time."""
    total, count = 0.0, 0
    for start in range(0, target.vocab_size, rows):
        ids = torch.arange(start, min(start + rows, target.vocab_size), device=target.device)
        block = target.embed(ids).detach().double()
        total += block.pow(2).sum().item()
        count += block.numel()
    return (total / count) ** 0.5
