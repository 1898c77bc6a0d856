"""How many rows a job reads, and how long they are: counted, looked at, or assumed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from redrafter.config import PlanConfig, SourceConfig, TargetConfig
from redrafter.contracts import InputError
from redrafter.data.chat import Renderer
from redrafter.data.prepare import prepared
from redrafter.data.rows import TokenRow
from redrafter.data.sources import read_source
from redrafter.data.store import Store
from redrafter.targets.text import load_tokenizer

_LOOKED_AT = 512  # rows of a source that are tokenized


@dataclass(frozen=True)
class Texts:
    """rows: None where it is not known; mean, longest: tokens of a row; how: where that is from"""

    rows: int | None
    mean: float
    longest: int
    how: str

    @property
    def tokens(self) -> int | None:
        return None if self.rows is None else round(self.rows * self.mean)

    def answered(self, passes: int, new_tokens: int) -> Texts:
        """Every row `passes` times, each with an answer as long as allowed."""
        rows = None if self.rows is None else self.rows * passes
        return Texts(rows, self.mean + new_tokens, self.longest + new_tokens, self.how)


def texts_of_store(store: Store) -> Texts:
    longest = int(store.lengths.max()) if store.n_rows else 1
    mean = float(store.lengths.double().mean()) if store.n_rows else 1.0
    return Texts(store.n_rows, mean, longest, f"{store.n_rows} rows of {store.name}")


def assumed(wanted: PlanConfig) -> Texts:
    n, rows = wanted.prompt_tokens, wanted.rows
    known = "an unknown number of" if rows is None else str(rows)
    return Texts(rows, n, n, f"{known} prompts of {n} tokens, as --plan_for says")


def texts_of_source(
    source: SourceConfig, target: TargetConfig, keep: str, context: int | None, wanted: PlanConfig
) -> Texts:
    """By the first rows; assumed where the target has no tokenizer."""
    try:
        tokenizer = load_tokenizer(target)
    except InputError:
        return assumed(wanted)
    read = read_source(source)
    kept = prepared(read, Renderer(tokenizer, source), source, keep, context)
    seen = list(islice(kept, _LOOKED_AT))
    lengths = [len(row.ids) for row in seen if isinstance(row, TokenRow)]
    if not lengths:
        return assumed(wanted)
    try:
        rows = len(read)
    except TypeError:  # a stream
        rows = wanted.rows
    looked_at = len({row.source_row for row in seen})
    if rows is not None:  # a row of the source may become several
        rows = round(rows * max(1.0, len(seen) / looked_at))
    return Texts(
        rows, sum(lengths) / len(lengths), max(lengths),
        f"{'an unknown number of' if rows is None else rows} rows of {source.path.split('/')[-1]}, "
        f"lengths by the first {looked_at}",
    )  # fmt: skip
