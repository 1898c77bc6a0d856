"""Heads walked over known texts: the counts of decoding, without its trees."""

import pytest
import torch
from models import alone, tiny
from test_prefix import greedy_feed, overfitted

from redrafter.config import TreeConfig
from redrafter.contracts import InputError
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.evaluation.walk import walk


@pytest.mark.parametrize("context", [{"prefix": "attention"}, {"state_norm": True}])
def test_a_head_accepts_along_a_text_what_decoding_accepts(context):
    """One that reads the row, and one that reads the last state alone."""
    target = tiny("llama")
    head = overfitted(target, **context)
    rows, config, _ = greedy_feed(target)
    answers, _ = alone(target, rows, config)
    texts = [[*row, *answer][:-1] for row, answer in zip(rows, answers, strict=True)]
    states = [target.states(torch.tensor([text]))[0] for text in texts]
    drafter = HeadDrafter(head, target, TreeConfig(2, 3))
    walked = walk(drafter, rows, answers, config.max_new_tokens, states=states)
    single = [speculative(target, [row], config, drafter=drafter).stats for row in rows]
    assert walked.steps == [one.steps[0] for one in single]
    assert walked.emitted == [one.emitted[0] for one in single]
    assert walked.nodes_verified == sum(one.nodes_verified for one in single)
    for level in ("drafted_at", "accepted_at"):
        per_row = zip(*(getattr(one, level) for one in single), strict=True)
        assert getattr(walked, level) == [sum(counts) for counts in per_row], level
    assert 1.2 < walked.tokens_per_step < 4, "nothing to compare"
    with pytest.raises(InputError, match="needs the target's hidden"):
        walk(drafter, rows, answers)
