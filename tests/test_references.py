"""Transformers' own assisted generation as methods: equal to plain, and steps counted honestly."""

import copy

import pytest
from models import prompts, settings, shared, tiny

from redrafter.contracts import InputError
from redrafter.evaluation.methods import Loop, PromptBatch, Resources, build_method, plain_answers
from redrafter.evaluation.references import ForwardCounter
from redrafter.targets.model import Target

NAMES = ("hf-lookup", "hf-lookup:3", "hf-assistant", "hf-exit:1")


def method(name, config, draft=None, family="llama"):
    target = tiny(family)
    return build_method(name, target, config, Resources(draft=draft or twin(family)))


@shared
def twin(family):
    """The same weights in another module: forwards of drafts must not be taken for the target's."""
    return Target(copy.deepcopy(tiny(family).model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedily_they_say_what_plain_says(name, family):
    config = settings()
    rows = prompts((9, 3, 14, 8, 5))
    expected = plain_answers(tiny(family), rows, config, range(5))
    assert {len(text) for text in expected} != {20}, "some texts end with an EOS"
    hf = method(name, config, family=family)
    runs = [hf.run(PromptBatch([row], [i])) for i, row in enumerate(rows)]
    assert [run.tokens[0] for run in runs] == expected
    for run, text in zip(runs, expected, strict=True):
        assert len(run.nodes) == run.stats.forwards == run.stats.steps[0]
        assert run.stats.steps[0] <= run.stats.emitted[0] < len(text) or not run.stats.steps[0]


def test_steps_are_forwards_after_the_first():
    """Against counts made by hand: a looping text that prompt lookup copies."""
    target = tiny("llama")
    row = prompts((9,))[0]
    assert 0 in row, "a token that must not be taken for padding"
    config = settings(max_new_tokens=12, eos_token_id=-1)
    text = plain_answers(target, [row], config, [0])[0]
    # A draft model of the target's weights that never doubts: its draft is accepted whole.
    sure = Target(copy.deepcopy(target.model))
    sure.model.generation_config.assistant_confidence_threshold = 0.0
    run = method("hf-assistant", config, draft=sure).run(PromptBatch([row], [0]))
    assert run.tokens == [text]
    assert (run.stats.steps, run.nodes) == ([0], []), "one forward read prompt and whole draft"
    # A draft of one token each: every step accepts 0 or 1, and the bonus.
    run = method("hf-lookup:1", config).run(PromptBatch([row], [0]))
    assert run.tokens == [text] and set(run.nodes) <= {1, 2}
    known, lengths, first = list(row), [], None
    while len(known) < len(row) + 12:
        kept = known + text[len(known) - len(row) :][: 1 + _copied(known, text, len(row))]
        if first is None:
            first = len(kept) - len(known)
        else:
            lengths.append(len(kept) - len(known))
        known = kept
    assert run.stats.steps == [len(lengths)] and run.stats.emitted == [12 - first]
    assert run.stats.lengths == [lengths]


def _copied(known, text, start):
    """Accepted tokens of transformers' lookup of one token: 2-gram, then 1-gram, leftmost."""
    if len(known) + 1 == start + len(text):
        return 0  # no draft where only one token is missing
    for n in (2, 1):
        for place in range(len(known) - n):
            if known[place : place + n] == known[-n:] and place + n < len(known):
                return int(known[place + n] == text[len(known) - start])
    return 0


def test_drafts_of_an_early_exit_are_not_counted():
    target = tiny("llama")
    row = prompts((9,))[0]
    calls = []
    hook = target.model.register_forward_pre_hook(lambda *a: calls.append(1))
    run = method("hf-exit:1", settings(eos_token_id=-1)).run(PromptBatch([row], [0]))
    hook.remove()
    assert 1 + run.stats.forwards < len(calls) / 2, "the same module drafts many tokens per step"
    assert target.model.config.num_hidden_layers == 2
    assert not target.model._forward_pre_hooks, "the counter took its hook away"


def test_one_row_at_a_time_and_layers_that_exist():
    with pytest.raises(InputError, match="set batch_size and samples_per_prompt to 1"):
        method("hf-lookup", settings()).run(PromptBatch(prompts(), [0] * 4))
    for name in ("hf-exit:2", "hf-exit:layer=0"):
        with pytest.raises(InputError, match="must be 1 to 1"):
            method(name, settings())
    with pytest.raises(InputError, match="vocabulary"):
        method("hf-assistant", settings(), draft=tiny("llama", vocab_size=40))


def test_sampled_texts_are_of_the_law_alone():
    config = settings(do_sample=True, temperature=0.8)
    hf = method("hf-assistant", config)
    assert hf.law_only and not method("stock", config).law_only
    assert not method("hf-assistant", settings()).law_only
    run = hf.run(PromptBatch([prompts()[0]], [3]))
    again = hf.run(PromptBatch([prompts()[0]], [3]))
    assert run.tokens == again.tokens, "seeded, though its own way"
    assert Loop("plain", tiny("llama"), config).drafter is None


def test_counter_without_a_second_forward():
    counter = ForwardCounter(tiny("llama").model)
    counter.cached, counter.new = [0], [12]
    assert counter.stats(9, 3).steps == [0]
    counter.cached, counter.new = [0, 10, 14], [12, 4, 4]
    stats = counter.stats(9, 8)
    # 11 tokens were known before the second forward: the first one emitted 2.
    assert (stats.steps, stats.emitted, stats.nodes_verified) == ([2], [6], 8)
