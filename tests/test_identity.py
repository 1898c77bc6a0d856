"""What identifies a target: everything that its answers depend on, and nothing else."""

import pytest
from models import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from redrafter.targets.identity import target_identity, text_identity


def tokenizer(words=("a", "b"), **asked):
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(("?", *words))}, unk_token="?"))
    backend.pre_tokenizer = Whitespace()
    if "max_length" in asked:
        backend.enable_truncation(**asked)
    if "length" in asked:
        backend.enable_padding(**asked)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("asked", [{"max_length": 3}, {"length": 9}, {}])
def test_a_call_does_not_change_a_tokenizer_s_identity(asked):
    """Many tokenizer.json ask for truncation; transformers switches it off in the first call, and
    the next stage would take its own prompts for another tokenizer's."""
    one = tokenizer(**asked)
    before = text_identity(one)
    one("a b a b")
    assert text_identity(one) == before
    assert text_identity(tokenizer(("b", "a"))) != before
    assert len(tokenizer(**asked)("a b a b a b").input_ids) == 6, "nothing is cut off"


def test_what_ends_a_text_is_part_of_a_target(monkeypatch):
    """generation_config.json may name more of it than config.json: answers would go on."""
    target = tiny("llama")
    before = target_identity(target)
    monkeypatch.setattr(target.model.generation_config, "eos_token_id", [7, 3])
    after = target_identity(target)
    assert {k for k in before | after if before.get(k) != after.get(k)} == {"eos"}
    assert (before["eos"], after["eos"]) == ([], [3, 7])
