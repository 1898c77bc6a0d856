"""Hidden states and what is made of them: as much memory as said, and no more."""

import pytest
import torch
from models import VOCAB, tiny

from redrafter.config import StatesConfig
from redrafter.contracts import InputError
from redrafter.data import states
from redrafter.data.rows import Rows
from redrafter.data.states import StateMaker


@pytest.fixture
def rows():
    """20 rows of 60 tokens; of the last one nothing is learned."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (1200,), generator=random)
    supervised = torch.arange(1200) % 60 > 20
    supervised[-60:] = False
    return Rows(tokens, supervised, torch.arange(0, 1201, 60))


def test_few_rows_of_logits_live_at_a_time(rows, monkeypatch):
    """16384 tokens, the default of a forward, would be 8 GB of logits at a vocabulary of 128k."""
    target, sizes, project = tiny("llama"), [], tiny("llama").project

    def watched(hidden):
        sizes.append(len(hidden))
        return project(hidden)

    maker = StateMaker(target, StatesConfig(teacher_top_k=3), continuation=1)
    whole = maker.columns(rows)
    monkeypatch.setattr(states, "LOGIT_ROWS", 100)
    monkeypatch.setattr(target, "project", watched)
    found = maker.columns(rows)
    assert max(sizes) == 100 and sum(sizes) > 1200
    for name, values in whole.items():
        torch.testing.assert_close(found[name], values)
    # and what is found is what the logits of all positions say
    logits = project(whole["states"])
    best = logits.log_softmax(-1).topk(3)
    assert torch.equal(found["teacher_ids"], best.indices.int())
    torch.testing.assert_close(found["teacher_log_p"], best.values.float())
    wanted = torch.cat((rows.supervised[1:], torch.tensor([False])))
    wanted[59::60] = False
    picks = torch.where(wanted, logits.argmax(-1), -1)
    assert torch.equal(found["continuation"][:, 0], picks.int()) and 0 < wanted.sum() < 1200


def test_a_whole_batch_without_supervision(rows):
    maker = StateMaker(tiny("llama"), StatesConfig(), continuation=1)
    nothing = Rows(rows.tokens, torch.zeros_like(rows.supervised), rows.offsets)
    assert (maker.columns(nothing)["continuation"] == -1).all()


def test_more_probable_tokens_than_there_are():
    with pytest.raises(InputError, match=rf"teacher_top_k {VOCAB + 1} exceeds .*, {VOCAB}"):
        StateMaker(tiny("llama"), StatesConfig(teacher_top_k=VOCAB + 1))
