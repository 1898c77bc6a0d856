"""`data/bigrams.py`: count which token follows which, for the n-gram drafter."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import BigramsConfig
from redrafter.processes import by_main

_DESCRIPTION = """\
Count which tokens follow each token in the supervised text of a store: a draft table that needs no
training, and a baseline that a head has to beat.

  python data/bigrams.py --target.path MODEL --store runs/answers --out runs/bigrams.safetensors
  python eval/speed.py --methods plain,bigram:4x4 --bigrams runs/bigrams.safetensors ...
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(BigramsConfig, argv, "data/bigrams.py", _DESCRIPTION)
    from redrafter.data.store import Store
    from redrafter.drafters.bigram import save_bigrams
    from redrafter.tables.bigrams import bigrams_of_store, table_identity
    from redrafter.targets.load import load_model_config

    def count() -> None:
        store = Store(config.store)
        vocab_size = load_model_config(config.target).get_text_config().vocab_size
        table = bigrams_of_store(store, vocab_size, config.width, progress=True)
        save_bigrams(config.out, table, table_identity(store))
        print(
            f"{config.out}: successors of {table.n_seen} of {vocab_size} tokens, at most "
            f"{config.width} each"
        )

    by_main(count)  # quicker than processes could tell each other what they counted
    return 0
