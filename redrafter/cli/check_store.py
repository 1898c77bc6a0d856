"""`data/check.py`: is every byte of a store what was written, and every number one?"""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import CheckConfig
from redrafter.contracts import InputError

_DESCRIPTION = """\
Compare every shard of a store with the digest recorded when it was written, look for numbers that
are not finite, and print what it holds. (Reading for training checks each row it reads; this checks
all.)

  python data/check.py --store runs/states --show 3 --target.path MODEL
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(CheckConfig, argv, "data/check.py", _DESCRIPTION, alone=True)
    from redrafter.data.build_rows import report
    from redrafter.data.finite import check_finite
    from redrafter.data.rows import TokenRow
    from redrafter.data.show import show_rows
    from redrafter.data.store import Store
    from redrafter.targets.text import load_tokenizer

    store = Store(config.store)
    if config.show:
        if config.target is None:
            raise InputError("show needs --target.path, for the tokenizer")
        tokenizer = load_tokenizer(config.target)
        rows = store.rows(range(min(config.show, store.n_rows)))
        masks = rows.supervised.split(rows.lengths().tolist())
        show_rows(
            (
                TokenRow(rows.ids(i), mask.tolist(), int(store.source_row[i]))
                for i, mask in enumerate(masks)
            ),
            tokenizer,
            config.show,
        )
    store.verify()
    print(report(store))
    check_finite(store)
    print("every shard has the digest recorded when it was written, and every number is finite")
    return 0
