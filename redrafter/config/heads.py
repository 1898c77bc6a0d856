"""`head.`: which kind of head is trained, and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from redrafter.config.common import at_least

#: Kind of head -> its options, and what they are where nothing is said. The kind itself is the
#: module of that name in `redrafter/heads` (docs/add-a-head.md).
KINDS: dict[str, dict[str, Any]] = {
    "recurrent": {
        "num_draft_layers": 2, "exit_dim": None, "first_state": "code", "cell": "simple",
        "embedding_scale": "rms", "input_norm": False, "state_norm": False, "output": "own",
        "draft_vocab_size": None, "prefix": "none", "aux_layers": None,
    },
    "medusa": {
        "num_draft_layers": 1, "output": "own", "draft_vocab_size": None, "prefix": "none",
        "aux_layers": None,
    },
    "hydra": {
        "num_draft_layers": 1, "embedding_scale": "rms", "output": "own", "draft_vocab_size": None,
        "prefix": "none", "aux_layers": None,
    },
    "mlp_speculator": {"inner_dim": None, "tie_weights": False, "scale_input": True},
}  # fmt: skip


@dataclass(frozen=True)
class LoraSettings:
    """LoRA on the head's linear maps; see `redrafter/heads/lora.py`."""

    r: int = 16
    """Rank of the added maps."""
    alpha: float = 32.0
    """They are added with the factor alpha / r."""
    dropout: float = 0.0
    """Share of their inputs dropped while training (not of the output matrix's)."""
    target_modules: tuple[str, ...] | None = None
    """Names or ends of names of linear maps, e.g. [rnn_w, rnn_u, to_hidden]; none takes all of
    them, the output matrices too where they are the head's own."""

    def __post_init__(self) -> None:
        at_least(1, self, "r")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} must lie in 0..1, below 1 (LoraSettings)")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules: name some, or none for all (LoraSettings)")


@dataclass(frozen=True)
class HeadConfig:
    """The head to train: a kind, and options that this kind has."""

    kind: Literal["recurrent", "medusa", "hydra", "mlp_speculator"] = "recurrent"
    """Which one, see the file of that name in `redrafter/heads`. All but `recurrent` have maps of
    their own for each depth, optim.depth of them, and draft no further."""
    init_from: str | None = None
    """Folder or Hub id of a head to go on from (ours, Apple's or a speculator); it is not changed,
    and the other fields but `lora` do nothing then, `kind` neither."""
    lora: LoraSettings | None = None
    """Retune the head of `init_from` by LoRA, for a fine-tuned target or a new domain: only small
    maps are trained and checkpointed, and merged into the head that is exported. None trains all
    of it."""
    num_draft_layers: int | None = None
    """Residual blocks; none is 2 (recurrent), or 1 in each head (medusa, hydra)."""
    exit_dim: int | None = None
    """E, width of the residual blocks and of an own matrix's rows: one far below the hidden width
    makes that matrix one of low rank; none is twice the target's hidden width (recurrent)."""
    first_state: Literal["code", "paper"] | None = None
    """`code`: s_1 = SiLU(W e_1 + b) as in Apple's code, or `paper`: s_1 = e_1; none is code
    (recurrent)."""
    cell: Literal["simple", "gru", "sum"] | None = None
    """The recurrence; `sum` adds up embeddings; none is simple (recurrent)."""
    embedding_scale: Literal["none", "rms"] | None = None
    """`rms` divides the frozen embeddings by their root mean square, which learns faster; none
    given is rms (recurrent, hydra)."""
    input_norm: bool | None = None
    """RMSNorm on the concatenated hidden state and recurrent state; none is false (recurrent)."""
    state_norm: bool | None = None
    """RMSNorm on the recurrent state after every step; none is false (recurrent)."""
    output: Literal["own", "target"] | None = None
    """The matrix over the vocabulary: trained, or the target's lm_head, which recurrent heads put
    behind a projection; none is own (recurrent, medusa, hydra)."""
    draft_vocab_size: int | None = None
    """Draft only this many tokens, the most frequent ones of the answers; none drafts all
    (recurrent, medusa, hydra)."""
    prefix: Literal["none", "attention"] | None = None
    """`attention`: a decoder layer over the row, run once per step, adds to the hidden state that a
    draft begins from (heads/prefix.py); none given is none (recurrent, medusa, hydra)."""
    aux_layers: tuple[int, ...] | None = None
    """Mix the target's hidden states after these decoder layers into the one that a draft begins
    from, by one map, once per step (heads/aux_layers.py), e.g. [2, 15] of 30: a low one and a
    middle one; none reads the last one alone (recurrent, medusa, hydra)."""
    inner_dim: int | None = None
    """D, width of the speculator's state; none is the target's hidden width (mlp_speculator)."""
    tie_weights: bool | None = None
    """One set of maps for all depths but the first projection; none is false (mlp_speculator)."""
    scale_input: bool | None = None
    """Divide the hidden state by sqrt(2) times its root mean square; none is true
    (mlp_speculator)."""

    def __post_init__(self) -> None:
        if self.lora is not None and self.init_from is None:
            raise ValueError("head.lora retunes a head: give head.init_from, the one to start from")
        if self.kind not in KINDS:
            raise ValueError(f"head.kind: {self.kind!r} is none of {', '.join(KINDS)}")
        options = KINDS[self.kind]
        for name in sorted({name for kind in KINDS.values() for name in kind} - set(options)):
            if getattr(self, name) is not None:
                having = " and ".join(kind for kind, known in KINDS.items() if name in known)
                raise ValueError(
                    f"head.{name} is an option of {having} heads, head.kind is {self.kind}: leave "
                    f"it out; {self.kind} has {', '.join(options)}"
                )

    @property
    def options(self) -> dict[str, Any]:
        """Those of the kind, with the values that stand where nothing was said."""
        known = KINDS[self.kind].items()
        said = {name: getattr(self, name) for name, _ in known}
        return {name: none if said[name] is None else said[name] for name, none in known}

    def resolved(self) -> HeadConfig:
        """The same, with the options of its kind written out."""
        return replace(self, **self.options)
