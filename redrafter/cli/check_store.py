"""`data/check.py`: is every byte of a store what was written, and every number one?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import CheckConfig
from redrafter.contracts import InputError

_DESCRIPTION = """\
Compare every shard of a store with the digest recorded when it was written, look for numbers that
are not finite, and print what it holds. (Reading for training checks each row it reads; this checks
all.)

  python data/check.py --store runs/states --show 3 --target.path MODEL
  python data/check.py --store runs/states --html runs/rows.html --target.path MODEL
"""
_ON_A_PAGE = 20  # rows, where nobody says how many


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(CheckConfig, argv, "data/check.py", _DESCRIPTION, alone=True)
    from redrafter.data.build_rows import report
    from redrafter.data.finite import check_finite
    from redrafter.data.store import Store

    store = Store(config.store)
    if config.show or config.html:
        show(config, store)
    store.verify()
    print(report(store))
    check_finite(store)
    print("every shard has the digest recorded when it was written, and every number is finite")
    return 0


def show(config: CheckConfig, store: Any) -> None:
    """The first rows of a store, on the terminal or as a page."""
    from redrafter.data.rows import TokenRow
    from redrafter.data.show import show_rows
    from redrafter.files import write_text
    from redrafter.report.masks import mask_page
    from redrafter.targets.text import load_tokenizer

    if config.target is None:
        raise InputError(
            f"{'html' if config.html else 'show'} needs --target.path, for the tokenizer"
        )
    tokenizer = load_tokenizer(config.target)
    n = config.show or _ON_A_PAGE
    rows = store.rows(range(min(n, store.n_rows)))
    masks = rows.supervised.split(rows.lengths().tolist())
    found = [
        TokenRow(rows.ids(i), mask.tolist(), int(store.source_row[i]))
        for i, mask in enumerate(masks)
    ]
    if config.html is None:
        show_rows(found, tokenizer, n)
        return
    write_text(config.html, mask_page(found, tokenizer, f"What is learned from {config.store}"))
    print(f"{config.html}: written, {len(found)} rows; open it in a browser")
