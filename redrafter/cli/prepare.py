"""`data/prepare.py`: text of a source as rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import PrepareConfig
from redrafter.contracts import InputError
from redrafter.processes import is_main, say

_DESCRIPTION = """\
First stage of the data: read text, apply the target's own chat template, write rows of tokens.

  python data/prepare.py --target.path MODEL --source.path FILE.jsonl --output_dir runs/prompts
      prompts, for the target to answer (data/answers.py): the usual way. Nothing of a prompt is
      learned; with --show 3 it prints three
  python data/prepare.py --target.path MODEL --source.path FILE.jsonl --keep texts --show 3
      whole texts; prints three with what would be learned from in colour, and writes nothing
"""


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(PrepareConfig, argv, "data/prepare.py", _DESCRIPTION)
    from redrafter.data.build_rows import build_rows, report
    from redrafter.data.chat import Renderer
    from redrafter.data.day import day_of
    from redrafter.data.prepare import prepared
    from redrafter.data.show import show_rows
    from redrafter.data.sources import read_source
    from redrafter.data.store import begun
    from redrafter.targets.layers import context_of
    from redrafter.targets.load import load_eos, load_model_config
    from redrafter.targets.text import load_tokenizer

    if config.output_dir is None and not config.show:
        raise InputError("give --output_dir to write rows, --show 5 to look at some, or both")
    tokenizer = load_tokenizer(config.target)
    whole = load_model_config(config.target)
    shape, eos = whole.get_text_config(), load_eos(config.target, whole)
    max_tokens = context_of(shape) if config.max_tokens is None else config.max_tokens
    vocab_size = getattr(shape, "vocab_size", None)
    if config.show and is_main():
        made = None if config.output_dir is None else begun(Path(config.output_dir))
        renderer = Renderer(tokenizer, config.source, day_of(tokenizer, made), eos)
        source = read_source(config.source)
        found = prepared(source, renderer, config.source, config.keep, max_tokens, vocab_size)
        show_rows(found, tokenizer, config.show)
    if config.output_dir is not None:
        store = build_rows(
            config.source, tokenizer, config.keep, config.output_dir, max_tokens=max_tokens,
            vocab_size=vocab_size, eos=eos,
        )  # fmt: skip
        say(report(store))
    return 0
