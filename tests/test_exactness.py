"""Drafting changes nothing: float64, token for token, against `plain` on each row alone."""

import pytest
import torch
from models import (
    CONTEXT,
    FAMILIES,
    NEW,
    VOCAB,
    RandomLookahead,
    Recorder,
    alone,
    endless,
    path_to,
    prompts,
    replays,
    tiny,
)
from models import shorter as settings
from transformers import GenerationConfig

from redrafter.contracts import Drafter, Lookahead
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.dummy import DummyDrafter
from redrafter.drafters.replay import ReplayDrafter
from redrafter.targets.model import Target

# RMS norms round to float32 inside a float64 model, which swallows the difference of two shapes
# unless it straddles two float32 (odds about 1e-9 per value).
TOLERANCE = 1e-10


def check(target: Target, rows, config, drafters: dict[str, Drafter | None], seeds=None, **more):
    """Every drafter, batched and (the last row) alone, gives the texts of `plain` alone."""
    seeds = list(range(len(rows))) if seeds is None else seeds
    want, finish = alone(target, rows, config, seeds, **more)
    batched = plain(target, rows, config, seeds=seeds, **more)
    assert (batched.tokens, batched.finish) == (want, finish)
    for name, drafter in drafters.items():
        got = speculative(target, rows, config, seeds=seeds, drafter=drafter, **more)
        assert (got.tokens, got.finish) == (want, finish), name
        # The prefill emits the first token of every row, the steps all others.
        assert got.stats.emitted == [len(w) - 1 for w in want], name


def some_drafters(target, rows, config, seeds=None, **more):
    texts = endless(target, rows, config, seeds, **more)
    return {**replays(texts), "dummy": DummyDrafter(4), "none": None}


GREEDY = settings()
SAMPLED = {
    "t0.7": settings(do_sample=True, temperature=0.7),
    "t1.5": settings(
        do_sample=True, temperature=1.5, top_k=12, top_p=0.9, repetition_penalty=1.3
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["greedy", "t1.5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_ragged_and_alone(family, name):
    target, rows = tiny(family), prompts()
    config = SAMPLED.get(name, GREEDY)
    texts = endless(target, rows, config)
    drafters = some_drafters(target, rows, config)
    if family not in ("llama", "gemma3_text"):  # what never hits, or always, is the loop's alone
        drafters = {k: d for k, d in drafters.items() if k in ("half", "often", "chain", "none")}
    check(target, rows, config, drafters)
    one = {k: d for k, d in replays(texts[:1]).items() if k in ("half", "always")}
    check(target, rows[:1], config, {**one, "none": None})  # alone, a root needs no mask


WARPS = {
    "plain": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.5},
    "all": {"top_k": 20, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 0.8},
}


@pytest.mark.parametrize(
    ("temperature", "warp"), [*((1.0, warp) for warp in WARPS), (0.7, "all"), (1.5, "all")]
)
def test_sampling_grid(temperature, warp):
    target, rows = tiny("llama"), prompts()
    config = settings(do_sample=True, temperature=temperature, **WARPS[warp])
    seeds = [11, -4, 2**62, 0]
    texts = endless(target, rows, config, seeds)
    drafters = replays(texts)
    check(target, rows, config, {k: drafters[k] for k in ("half", "often")}, seeds)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generate(family):
    """Row by row. transformers warps in float32, which no gap between two logits here notices."""
    target, rows = tiny(family), prompts()
    for changes, n in (({}, 4), ({"repetition_penalty": 1.3, "min_new_tokens": 6}, 2)):
        config = settings(**changes, pad_token_id=0)
        want, _ = alone(target, rows[:n], config)
        for row, text in zip(rows[:n], want, strict=True):
            ids = torch.tensor([row])
            out = target.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
            assert out[0, len(row) :].tolist() == text


def overtaken(target, rows, texts) -> GenerationConfig:
    """An EOS that ends row 0 early, so that the shorter row 1 passes its length."""
    longer = len(rows[0]) - len(rows[1])
    for token in dict.fromkeys(texts[0][len(rows[0]) :]):
        config = settings(eos_token_id=token)
        (first, second), _ = alone(target, rows[:2], config)
        if len(first) > 1 and len(second) > len(first) + longer:
            return config
    raise AssertionError("no token of row 0 ends it early enough")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", ["one", "two", "four"])
def test_logits_are_those_of_a_fresh_forward(family, batch):
    """Tokens forgive a wrong mask or position that moves the logits a little; this does not."""
    target, rows = tiny(family), prompts()
    texts = endless(target, rows, settings())
    stop = overtaken(target, rows, texts)
    picked = {"one": slice(2, 3), "two": slice(2), "four": slice(4)}[batch]
    rows, texts = rows[picked], texts[picked]
    want, _ = alone(target, rows, stop)

    def fresh(b):
        text = rows[b] + want[b]
        hidden = target.states(torch.tensor([text]))[0, len(rows[b]) - 1 : -1]
        return target.project(hidden), hidden

    seen = [[] for _ in rows]
    forward = target.forward

    def recorded(*args, **kwargs):
        out = forward(*args, **kwargs)
        for b, row in enumerate(seen):
            row.append(out.logits[b, 0])
        return out

    target.forward = recorded
    try:
        plain(target, rows, stop)
    finally:
        del target.forward
    for b, text in enumerate(want):
        torch.testing.assert_close(
            torch.stack(seen[b][: len(text)]), fresh(b)[0], rtol=0, atol=TOLERANCE
        )

    for inner in (replays(texts)["half"], replays(texts)["chain"]):
        drafter = Recorder(inner, needs=("hidden", "logits"))
        speculative(target, rows, stop, drafter=drafter)
        for b in range(len(rows)):
            logits, hidden = ([getattr(drafter.prefill, k)[b]] for k in ("logits", "hidden"))
            for _, truth, _, _ in drafter.steps:
                count = int(truth.count[b])
                logits.append(truth.logits[b, :count])
                hidden.append(truth.hidden[b, :count])
                if count:
                    assert torch.equal(truth.last_hidden()[b], truth.hidden[b, count - 1])
            # A row's last step is not reported: the row is not live any more.
            known = torch.cat(logits)
            assert 0 < len(known) <= len(want[b])
            for got, should in zip((known, torch.cat(hidden)), fresh(b), strict=True):
                torch.testing.assert_close(got, should[: len(got)], rtol=0, atol=TOLERANCE)


def test_every_branch_occurs():
    """The texts above are equal because every branch was taken, not because none was."""
    target, rows = tiny("llama"), prompts((9, 3, 14, 8, 5, 11))
    branches = set()
    for config in (GREEDY, *SAMPLED.values()):
        want, finish = alone(target, rows, config)
        for inner in some_drafters(target, rows, config).values():
            if inner is None:
                continue
            drafter = Recorder(inner)
            seeds = range(len(rows))
            got = speculative(target, rows, config, seeds=seeds, drafter=drafter)
            assert got.tokens == want
            branches |= _branches(drafter, rows, want, finish, got.stats)
    depth = 5
    assert branches >= {("accepted", n) for n in range(depth + 1)}
    assert branches >= {
        "all levels accepted", "equal siblings accepted", "true token under a wrong parent",
        "path not in index order", "eos inside the path", "length inside the path",
        "finished beside live",
    }  # fmt: skip


def _branches(drafter: Recorder, rows, want, finish, stats) -> set:
    """What happened, by an independent walk along what the target said at each node's parent.

    Checks on the way that the loop reported and counted the same.
    """
    found = set()
    accepted = [0] * drafter.max_depth
    assert drafter.prefill.tokens.tolist() == [[w[0]] for w in want]
    assert drafter.prefill.count.tolist() == [int(len(w) > 1) for w in want]
    for tree, truth, lengths, live in drafter.steps:
        if len(set(live)) > 1:
            found.add("finished beside live")
        for b, length in enumerate(lengths):
            if not live[b]:
                assert truth.count[b] == 0
                continue
            said = truth.tokens[b].tolist()
            reached = [0]  # all nodes whose whole path is right
            for node in range(1, tree.n_nodes):
                path = path_to(tree, b, node)[1:]
                right = [int(tree.tokens[b, i]) for i in path] == said[: len(path)]
                if right and bool(tree.valid[b, path].all()):
                    reached.append(node)
                elif tree.valid[b, node] and not right:
                    depth = len(path)
                    if int(tree.tokens[b, node]) == said[depth - 1]:
                        found.add("true token under a wrong parent")
            depths = [len(path_to(tree, b, node)) - 1 for node in reached]
            count = max(depths)
            found.add(("accepted", count))
            if count == drafter.max_depth > 0:
                found.add("all levels accepted")
            if len(depths) > len(set(depths)):
                found.add("equal siblings accepted")
            path = path_to(tree, b, reached[depths.index(count)])
            if path != list(range(count + 1)):
                found.add("path not in index order")
            left = len(rows[b]) + len(want[b]) - length  # tokens that the row still lacks
            kept = min(count + 1, left)
            assert said[:kept] == want[b][len(want[b]) - left :][:kept]
            assert truth.count[b] == (count + 1 if left > kept else 0)
            if left <= count:
                found.add(f"{finish[b]} inside the path")
            for level in range(min(count, kept)):
                accepted[level] += 1
    assert accepted == stats.accepted_at
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_to_the_end_of_the_context(family):
    """The last position is filled, no position beyond it is asked for, trees are cut to fit."""
    target, rows = tiny(family), prompts((CONTEXT - 9, CONTEXT - 1, CONTEXT - 4))
    config = settings(max_new_tokens=None, max_length=10 * CONTEXT, eos_token_id=-1)
    want, finish = alone(target, rows, config)
    assert [len(r) + len(w) for r, w in zip(rows, want, strict=True)] == [CONTEXT] * 3
    assert finish == ["length"] * 3
    # The true text goes on, so that nothing but the limit ends the last path.
    texts = [row + text + [1] * NEW for row, text in zip(rows, want, strict=True)]
    check(target, rows, config, {**replays(texts), "none": None})


def test_a_row_depends_on_nothing_but_itself():
    target, rows, seeds = tiny("llama"), prompts(), [7, 8, 9, 10]
    config = settings(do_sample=True, temperature=1.2)
    want, _ = alone(target, rows, config, seeds)
    texts = endless(target, rows, config, seeds)
    for order in ([3, 1, 0, 2], [2, 2, 1], [0, 3]):
        picked = [rows[i] for i in order]
        for n, drafter in enumerate(replays([texts[i] for i in order]).values()):
            for dynamic in (True, False):
                got = speculative(
                    target,
                    picked,
                    config,
                    seeds=[seeds[i] for i in order],
                    drafter=drafter,
                    lookahead=RandomLookahead(len(order), n, dynamic),
                )
                assert got.tokens == [want[i] for i in order]


def test_lookahead_limits_what_is_drafted():
    """A row whose lookahead said stop is verified without the surplus levels."""
    target, rows, config = tiny("llama"), prompts(), settings(eos_token_id=-1)
    texts = endless(target, rows, config)

    class Stop(Lookahead):
        def go_on(self, features, level):
            return torch.tensor([level < 2, False, True, True])

    drafter = Recorder(ReplayDrafter(texts, VOCAB, 4, 2, 1.0))
    got = speculative(target, rows, config, drafter=drafter, lookahead=Stop())
    assert got.tokens == alone(target, rows, config)[0]
    tree = drafter.steps[0][0]
    assert torch.where(tree.valid, tree.depth, 0).amax(1).tolist() == [2, 1, 4, 4]
    first = drafter.steps[0][1]
    assert first.count.tolist() == [3, 2, 5, 5]


def test_seeds():
    target, row = tiny("llama"), prompts()[0]
    config = settings(do_sample=True, eos_token_id=-1)
    texts = [tuple(plain(target, [row], config, seeds=[s]).tokens[0]) for s in range(20)]
    assert len(set(texts)) == len(texts)
    assert tuple(plain(target, [row], config, seeds=3).tokens[0]) == texts[3]
    again = plain(target, [row] * 20, config, seeds=range(20)).tokens
    assert [tuple(t) for t in again] == texts
    greedy = [plain(target, [row], GREEDY, seeds=s).tokens for s in (0, 1)]
    assert greedy[0] == greedy[1]


def test_replay_and_dummy_do_draft():
    """The statistics of a drafter that always knows, and of one that never does."""
    target, rows = tiny("llama"), prompts()
    config = settings(eos_token_id=-1, max_new_tokens=1 + 2 * 5)  # prefill + two full steps
    texts = endless(target, rows, config)
    drafters = replays(texts)
    stats = speculative(target, rows, config, drafter=drafters["always"]).stats
    assert stats.steps == [2] * 4 and stats.tokens_per_step == 5 and stats.forwards == 2
    # The limit leaves room for a fifth token of the second step, but not for a bonus after it.
    assert stats.accepted_at == stats.drafted_at == [8, 8, 8, 8]
    assert stats.lengths == [[5, 5]] * 4
    stats = speculative(target, rows, config, drafter=drafters["never"]).stats
    assert stats.steps == [10] * 4 and stats.tokens_per_step == 1
    assert stats.accepted_at == [0] * 4
    assert stats.drafted_at == [40, 36, 32, 28]  # cut where the limit comes near
    none = speculative(target, rows, config, drafter=None).stats
    base = plain(target, rows, config).stats
    assert none.steps == base.steps and none.emitted == base.emitted
    assert none.forwards == base.forwards == 10
    assert none.nodes_verified == base.nodes_verified == 40
