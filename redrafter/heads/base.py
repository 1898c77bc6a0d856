"""What a draft head is: the one contract that training, planning, decoding and exports read.

A head reads one token per level and says what follows. At level k = 1, 2, ... of a draft:

    state_k    = advance(token_k, c, state_{k-1})     what the path has read so far
    features_k = features(c, state_k)
    logits_k   = vocab_matrix_k features_k

Training multiplies the features of all depths by the matrices chunk by chunk (`training/step.py`)
and decoding level by level (`read`), so features and matrix are given apart. Where every depth has
a matrix of its own, `shares_matrix` is False.

Alignment, stated here once for training and decoding alike
------------------------------------------------------------
c = h_t is the hidden state that the target's lm_head turned into its prediction of token t+1.
token_1 is that next token t+1, which is therefore known for sure. So *(h_t, token t+1) first
predicts token t+2*, and after k levels (h_t; t+1, ..., t+k) predicts token t+1+k. c stays the same
at all levels of a draft. In decoding, token_1 is the root of the tree (the last emitted token, not
yet in the cache) and the logits of level k are about depth k. With `prefix attention` c is h_t plus
what one layer makes of the pairs (h_0, token 1), ..., (h_t, token t+1) of the row, and with
`aux_layers` other layers' states at t are mixed into h_t first (`contexts`).

A head never owns the target's embeddings (`target.embed(tokens)`), and its lm_head at most by
reference (`bind`). How to write another kind: docs/add-a-head.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from redrafter import __version__
from redrafter.contracts import InputError
from redrafter.files import digest_weights
from redrafter.heads.aux_layers import LayerMix
from redrafter.heads.lora import effective_weight
from redrafter.heads.owner import describe
from redrafter.heads.prefix import PrefixLayer, heads_for
from redrafter.heads.reading import read_config, with_weights
from redrafter.products import Linear, PackedProduct, silu_of


class DraftHeadConfig(PreTrainedConfig):
    """What a head is made of; stored as `config.json` beside its weights. A kind adds its fields.

    vocab_size: V of the target                hidden_size: H of the target
    draft_vocab_size: Vd, size of a pruned draft vocabulary (None = full); the buffer `draft_ids`
        (Vd,) then holds the target's id of each drafted id
    target_fingerprint, target_name, target_base, target_adapter, target_probe: which target it was
        trained for ("" or None = unknown); see `redrafter/heads/owner.py`
    trained_depth: depths it was trained on (None = unknown)
    prefix: what c is: "none", h_t; "attention", that and a layer over the row (`heads/prefix.py`),
        of `prefix_heads` attention heads (None: chosen by the width)
    aux_layers: layers of the target whose states are mixed into h_t before (`heads/aux_layers.py`),
        in ascending order; None: of none
    """

    #: field -> what it may be, and field -> its smallest value, of a kind's own fields
    choices = {}  # noqa: RUF012 - an annotation would make a field of it
    least = {}  # noqa: RUF012

    vocab_size: int = 0
    hidden_size: int = 0
    draft_vocab_size: int | None = None
    target_fingerprint: str = ""
    target_name: str = ""
    target_base: str = ""
    target_adapter: str = ""
    target_probe: dict[str, list[float]] | None = None
    trained_depth: int | None = None
    prefix: str = "none"
    prefix_heads: int | None = None
    aux_layers: list[int] | None = None
    redrafter_version: str = __version__

    def __post_init__(self, **kwargs: Any) -> None:
        if self.prefix != "none" and self.prefix_heads is None:
            self.prefix_heads = heads_for(self.hidden_size)
        self.aux_layers = list(self.aux_layers) if self.aux_layers else None
        super().__post_init__(**kwargs)

    def check(self, where: str = "head config") -> None:
        """Raises InputError naming the first field that makes no sense. where: for the message"""
        for name, allowed in {"prefix": ("none", "attention"), **self.choices}.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{where}: {name} = {getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )
        for name, least in {"vocab_size": 1, "hidden_size": 1, **self.least}.items():
            if getattr(self, name) < least:
                raise InputError(
                    f"{where}: {name} = {getattr(self, name)}; at least {least} needed"
                )
        pruned = self.draft_vocab_size
        if pruned is not None and not 1 <= pruned <= self.vocab_size:
            raise InputError(
                f"{where}: draft_vocab_size = {pruned}; must lie in 1..{self.vocab_size}"
            )
        layers = self.aux_layers or []
        if not all(type(a) is int and a > 0 for a in layers) or layers != sorted({*layers}):
            raise InputError(
                f"{where}: aux_layers = {layers!r}; must be numbers of layers, from 1 on, "
                "each once and in ascending order"
            )
        heads = self.prefix_heads
        if self.prefix != "none" and (heads < 1 or self.hidden_size % (2 * heads)):
            raise InputError(
                f"{where}: prefix {self.prefix} with prefix_heads = {heads}: hidden_size = "
                f"{self.hidden_size} must be that many times an even number"
            )


class DraftHead(PreTrainedModel):
    """What every head answers; a kind gives `advance`, `features` and `output_layer`.

    One that draws on the target's lm_head must be given the frozen matrix once: `bind(target)`.
    """

    config_class = DraftHeadConfig
    main_input_name = "context"
    #: as `head.kind` names it; the module of that name in `redrafter/heads` calls the class HEAD
    kind = ""
    #: (what it is called, arXiv number of its paper)
    paper = ("", "")
    #: field of its configuration with the levels that it can draft; None: any number of them
    depth_field: str | None = None
    #: settings that make it smaller, for a plan that does not fit
    smaller = ""

    def __init__(self, config: DraftHeadConfig) -> None:
        config.check()
        super().__init__(config)
        #: layers of the target whose states it reads beside the last one's
        self.aux_layers = tuple(config.aux_layers or ())
        if self.aux_layers:
            self.layer_mix = LayerMix(config.hidden_size, 1 + len(self.aux_layers))
        if self.reads_prefix:
            self.prefix_layer = PrefixLayer(config.hidden_size, config.prefix_heads)
        self._frozen_matrix: Tensor | None = None
        self.rounds = False  # see `round_while_drafting`
        self._pruned = False
        #: by where the matrix lies, and whether it is rounded
        self._products: dict[tuple[int, bool], PackedProduct] = {}

    # -- what a kind gives -----------------------------------------------------------------

    def advance(
        self, target: Any, tokens: Tensor, context: Tensor, states: Tensor | None, level: int
    ) -> Tensor:
        """The states of paths that have read one more token.

        tokens: (...) int64; context: (..., H) c, broadcast against tokens
        states: (..., S) before, S as the kind likes it at each level, 0 too; None at level 1
        Returns (..., S'), one state for each of the tokens.
        """
        raise NotImplementedError

    def features(self, context: Tensor, states: Tensor, level: int = 1) -> Tensor:
        """(..., E), what multiplies `vocab_matrix(level)`. context: (..., H), broadcast against
        states, those after the token of this level: (..., S)"""
        raise NotImplementedError

    def output_layer(self, level: int = 1) -> nn.Linear:
        """The map whose weight (Vd, E) is the matrix of a level, where it is the head's own."""
        raise NotImplementedError

    def begin(self, target: Any) -> None:
        """Initial values that a new head takes from its target."""

    def summary(self) -> str:
        """What it is made of, for people, in one line."""
        raise NotImplementedError

    def described(self) -> str:
        """`summary`, and what makes its context."""
        layers = ", ".join(map(str, self.aux_layers))
        return (
            self.summary()
            + f", context of layers {layers} and the last" * bool(layers)
            + ", context by attention over the row" * self.reads_prefix
        )

    @property
    def only_drafts(self) -> str | None:
        """What it is, of a head that can neither be trained nor written here; None of others."""
        return None

    # -- how it is made --------------------------------------------------------------------

    @classmethod
    def for_target(cls, target: Any, **fields: Any) -> Self:
        """A new head of the target's shape, on its device, in float32, bound where needed.

        target: anything with hidden_size, vocab_size, name, device, fingerprint(), digests(),
            probe(), embed(), lm_head_weight
        fields: of the kind's configuration; `draft_ids` (Vd,) int64 prunes the draft vocabulary
        """
        draft_ids = fields.pop("draft_ids", None)
        config = cls.config_class(
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            draft_vocab_size=None if draft_ids is None else len(draft_ids),
            **describe(target),
            **fields,
        )
        head = cls(config)
        if draft_ids is not None:
            head.draft_ids.copy_(draft_ids)
        head.begin(target)
        return head.to(target.device).bind(target)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a head of this kind from a folder in this library's layout, in the dtype that it is
        stored in. Raises InputError naming the file that does not fit."""
        folder = Path(folder)
        config = cls.config_class.from_dict(read_config(folder))
        config.check(str(folder / "config.json"))
        return with_weights(cls(config), folder)

    def prune(self) -> None:
        """Called by a kind's constructor: the buffer of a pruned draft vocabulary."""
        # Said once: a configuration of transformers answers slowly, and it is asked per level.
        self._pruned = self.config.draft_vocab_size is not None
        if self._pruned:
            self.register_buffer("draft_ids", torch.arange(self.config.draft_vocab_size))

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: torch's own initialisation stands, or `begin` says otherwise."""

    def get_input_embeddings(self) -> None:
        return None

    def get_output_embeddings(self) -> None:
        return None

    # -- what is the same for all ----------------------------------------------------------

    @property
    def max_depth(self) -> int | None:
        """Levels that it can draft; None: any."""
        return None if self.depth_field is None else getattr(self.config, self.depth_field)

    @property
    def draft_vocab_size(self) -> int:
        """Vd: columns of `logits`."""
        pruned = self.config.draft_vocab_size
        return self.config.vocab_size if pruned is None else pruned

    @property
    def reads_prefix(self) -> bool:
        """True if c is made of the hidden states of the whole row."""
        return self.config.prefix != "none"

    @property
    def reads_more(self) -> str | None:
        """What of the target its context is made of beside the last hidden state; None: nothing."""
        read = [f"layers {list(self.aux_layers)} (head.aux_layers)"] * bool(self.aux_layers)
        read += ["the whole row (head.prefix attention)"] * self.reads_prefix
        return " and ".join(read) or None

    def contexts(
        self, target: Any, hidden: Tensor, tokens: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """c at n positions of B rows, (B, n, H); of any shape where it does not `reads_prefix`.

        hidden: (B, n, (1 + a) H), h_t and behind it what its a `aux_layers` gave
        tokens, cache: of a head that `reads_prefix`, (B, n) int64, t+1 of each, and what
            `PrefixLayer.forward` says
        """
        c = self.layer_mix(hidden) if self.aux_layers else hidden
        return self.prefix_layer(c, target.embed(tokens), cache) if self.reads_prefix else c

    @property
    def draws_on_target(self) -> bool:
        """True if the vocabulary matrix is the target's frozen one."""
        return getattr(self.config, "output", "own") == "target"

    @property
    def shares_matrix(self) -> bool:
        """True if the features of all levels multiply one matrix."""
        return self.draws_on_target or self.output_layer(1) is self.output_layer(2)

    def bind(self, target: Any) -> Self:
        """Take the target's frozen lm_head (shared, not copied, unless the vocabulary is pruned).

        Its soft-caps and logit scales are left out on purpose: they keep the order of tokens, and
        a trained map before it can express a scale. A head with its own matrix takes nothing.
        Either has the target show its `aux_layers`.
        """
        if self.aux_layers:
            target.show(self.aux_layers)
        if self.draws_on_target:
            self._frozen_matrix = self.rows_of(target)
            if shared := getattr(target, "lm_product", None):  # packed once for both
                self._products[shared.matrix.data_ptr(), False] = shared
        return self

    def rows_of(self, target: Any) -> Tensor:
        """(Vd, H), the target's lm_head or the rows of the draft vocabulary."""
        matrix = target.lm_head_weight.detach()
        if tuple(matrix.shape) != (self.config.vocab_size, self.config.hidden_size):
            raise InputError(
                f"this head expects an lm_head of {self.config.vocab_size} x "
                f"{self.config.hidden_size}, the target's is {' x '.join(map(str, matrix.shape))}: "
                "use the target that the head was trained for"
            )
        if self.config.draft_vocab_size is not None:
            matrix = matrix[self.draft_ids.to(matrix.device)]
        return matrix

    def vocab_matrix(self, level: int = 1) -> Tensor:
        """(Vd, E) trained, or (Vd, H) frozen: what `features` of that level are multiplied with."""
        if not self.draws_on_target:
            return effective_weight(self.output_layer(level))
        if self._frozen_matrix is None:
            raise InputError(
                "this head draws on the target's lm_head: give the target too (head.bind(target))"
            )
        return self._frozen_matrix

    def logits(self, context: Tensor, states: Tensor, level: int = 1) -> Tensor:
        """Scores of the token after the last one read. Arguments: see `features`; (..., Vd)."""
        matrix = self.vocab_matrix(level)
        features = self.features(context, states, level).to(matrix.dtype)
        if not isinstance(matrix, nn.Parameter) and matrix is not self._frozen_matrix:
            return F.linear(features, matrix)  # made anew in every call
        return self._product(matrix)(features)

    def round_while_drafting(self, on: bool) -> None:
        """Whether its matrices, and the target's that it borrows, are rounded to bfloat16 where the
        CPU's kernels multiply by them: half the bytes are read. It changes a draft, by little, and
        no text."""
        if on != self.rounds:
            self.rounds = on
            for module in self.modules():
                if isinstance(module, Linear):
                    module.rounds = on

    def _product(self, matrix: Tensor) -> PackedProduct:
        """What multiplies by a vocabulary's matrix."""
        place, rounds = matrix.data_ptr(), self.rounds
        product = self._products.get((place, rounds))
        if product is not None and product.is_of(matrix):
            return product
        there = self._products.get((place, False)) if rounds else None
        if there is not None and there.is_of(matrix) and not there.shrinks():
            return there
        product = PackedProduct(matrix, always=True, rounds=rounds)
        self._products[place, rounds] = product
        return product

    def train(self, mode: bool = True) -> Self:
        """Also where it is told what it is already, matrices are packed anew: fused optimisers
        change weights without a trace, and between steps and drafting this is called."""
        self._products = {k: p for k, p in self._products.items() if p.is_of(self._frozen_matrix)}
        return super().train(mode)

    def read(
        self, target: Any, tokens: Tensor, context: Tensor, states: Tensor | None, level: int
    ) -> tuple[Tensor, Tensor]:
        """One level of a draft.

        tokens: (B, w) int64, read next by each path; context: (B, 1, H) c of each row
        states: (B, w, S) of each path before, None at level 1; level: 1, 2, ...
        Returns states after them (B, w, S'), and logits of what follows (B, w, Vd).
        """
        states = self.advance(target, tokens, context, states, level)
        return states, self.logits(context, states, level)

    def forward(self, context: Tensor, tokens: Tensor, target: Any) -> Tensor:
        """Features of all K levels of given paths, teacher-forced (training).

        context: (..., H) c of each path; tokens: (..., K) int64, read one after the other
        Returns (..., K, E); [..., k, :] is about depth k + 1.
        """
        states: Tensor | None = None
        found: list[Tensor] = []
        for level, read in enumerate(tokens.unbind(-1), start=1):
            states = self.advance(target, read, context, states, level)
            found.append(self.features(context, states, level))
        return torch.stack(found, dim=-2)

    def to_vocab_ids(self, draft_ids: Tensor) -> Tensor:
        """Ids of the target's vocabulary for columns of `logits` (any shape, int64)."""
        return self.draft_ids[draft_ids] if self._pruned else draft_ids

    def fingerprint(self) -> str:
        """16 hex digits over its own weights; what it borrows from the target is left out."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = digest_weights(self.state_dict().items())
        return self._fingerprint


class ResidualBlock(nn.Module):
    """x + SiLU(A x + a)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return silu_of(self.linear, x, x)


def embedding_rms(target: Any, rows: int = 8192) -> float:
    """Root mean square of the target's embedding matrix, read `rows` rows at a time."""
    total, count = 0.0, 0
    for start in range(0, target.vocab_size, rows):
        ids = torch.arange(start, min(start + rows, target.vocab_size), device=target.device)
        block = target.embed(ids).detach().double()
        total += block.pow(2).sum().item()
        count += block.numel()
    return (total / count) ** 0.5
