"""The head that ships is whole, small, and says what it was made from."""

import json
from pathlib import Path

import torch

from redrafter.export.golden import file_faults, read_golden
from redrafter.heads.load import load_head

HEAD = Path(__file__).resolve().parent.parent / "examples" / "smollm2-135m" / "head"


def test_the_shipped_head_is_what_was_exported():
    assert not file_faults(HEAD, read_golden(HEAD).facts)
    head = load_head(HEAD)
    assert head.config.target_fingerprint and head.config.trained_depth == 4
    assert head.draft_vocab_size == 6144
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    assert sum(f.stat().st_size for f in HEAD.rglob("*") if f.is_file()) < 5_000_000


def test_it_says_what_it_was_trained_on_and_how():
    facts = json.loads((HEAD / "provenance.json").read_text())["converted_from"]["provenance"]
    config = facts["config"]
    assert config["head"]["draft_vocab_size"] == 6144 and config["optim"]["steps"] == 8000
    assert any("self" in store for store in config["data"]["stores"])
