"""A target whose numbers overflow on some tokens: every row ends before the first token that it
would choose from scores that are not finite, whatever was drafted, and the other rows go on."""

import copy
import functools
import warnings

import pytest
import torch
from chi_square import follows, n_draws
from models import VOCAB, Recorder, alone, make_tree, paired, prompts, replays, settings, tiny
from test_multi import Fixed
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from redrafter.contracts import Lookahead
from redrafter.decode.plain import plain
from redrafter.decode.ratio import verify_ratio
from redrafter.decode.refill import refilled
from redrafter.decode.speculative import speculative
from redrafter.decode.tree import ancestors
from redrafter.decode.verify import verify
from redrafter.drafters.multi import MultiCandidate
from redrafter.drafters.replay import ReplayDrafter
from redrafter.targets.model import Target

MODES = {"greedy": {}, "t1": dict(do_sample=True, temperature=1.0, top_k=20, top_p=0.95)}
SEEDS = [3, 4, 5, 6]
STOP = "not_finite"
NAN, INF = float("nan"), float("inf")
#: 0 as well: it is what rows are filled up with, and stands in no prompt
ROWS = [[t or 1 for t in row] for row in prompts()]


def broken(family: str, tokens, value: float = INF) -> Target:
    """`tiny`, but for the tokens that it cannot read: their keys and values are nan everywhere."""
    target = Target(copy.deepcopy(tiny(family).model))
    with torch.no_grad():
        target.model.get_input_embeddings().weight[list(tokens)] = value
    return target


@functools.cache
def case(family: str, mode: str):
    """A broken target, settings, whole texts of the sound one, and what must come of them."""
    config = settings(**MODES[mode], eos_token_id=-1)
    sound, _ = alone(tiny(family), ROWS, config, SEEDS)
    prompted = {t for row in ROWS for t in row}
    # Three rows meet such a token, at different places; one of them at once.
    first = [next(t for t in sound[b][n:] if t not in prompted) for b, n in ((0, 0), (1, 6))]
    bad = {0, *first} - prompted
    ends = [next((i for i, t in enumerate(text) if t in bad), None) for text in sound]
    want = [text if end is None else text[: end + 1] for text, end in zip(sound, ends, strict=True)]
    # Where nothing is left to choose behind the last token allowed, the length has ended the row.
    finish = ["length" if len(text) == config.max_new_tokens else STOP for text in want]
    texts = [row + text + [0] * 8 for row, text in zip(ROWS, sound, strict=True)]
    return broken(family, bad), config, texts, want, finish


def decode(name: str, texts, target, config, **more):
    if name == "plain":
        return plain(target, ROWS, config, seeds=SEEDS)
    drafters = {**replays(texts), "none": None}
    return speculative(target, ROWS, config, seeds=SEEDS, drafter=drafters[name], **more)


@pytest.mark.filterwarnings("ignore:.*not finite")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_end_where_plain_decoding_of_each_alone_would(family, mode):
    target, config, texts, want, finish = case(family, mode)
    assert len({len(w) for w, f in zip(want, finish, strict=True) if f == STOP}) > 1
    assert alone(target, ROWS, config, SEEDS) == (want, finish)
    for name in ("plain", "none", "never", "half", "often", "chain", "always"):
        got = decode(name, texts, target, config)
        assert (got.tokens, got.finish) == (want, finish), name
        assert got.stats.emitted == [len(w) - 1 for w in want], name
        if name != "plain":
            assert [sum(n) for n in got.stats.lengths] == got.stats.emitted, name


@pytest.mark.filterwarnings("ignore:.*not finite")
@pytest.mark.parametrize(
    ("slots", "mode", "family"), paired((1, 2, 3, 8), MODES, ("llama", "gpt2"))
)
def test_rows_that_come_and_go_leave_nothing_behind(family, mode, slots):
    """Numbers that are not finite in a row's keys and values reach neither the row that takes its
    place, nor the shorter ones beside either. Token 0, which rows are filled up with, is such a
    token; some rows have one in their prompt and end before their first token."""
    target, config, _, want, finish = case(family, mode)
    bad = next(t for text, f in zip(want, finish, strict=True) if f == STOP for t in text[-1:])
    rows, seeds = [], []
    for n in (25, 3, 12, 7):  # the longest leave first, and before the shorter ones enter
        rows += [[bad] * n, *ROWS]
        seeds += [0, *SEEDS]
    got = refilled(target, rows, config, slots=slots, seeds=seeds)
    assert got.tokens == [[], *want] * 4
    assert got.finish == [STOP, *finish] * 4
    assert got.stats.emitted == [0, *(len(w) - 1 for w in want)] * 4


@pytest.mark.filterwarnings("ignore:.*not finite")
def test_drafts_go_onto_such_tokens_and_past_them():
    """Else the test above would show nothing."""
    target, config, texts, _, _ = case("llama", "greedy")
    bad = {t for t in range(VOCAB) if not target.embed(torch.tensor(t)).isfinite().all()}
    seen = Recorder(replays(texts)["half"])
    speculative(target, ROWS, config, drafter=seen)
    found = set()
    for tree, truth, _, live in seen.steps:
        for b in range(len(ROWS)):
            drafted = tree.tokens[b, 1:].tolist()
            if live[b] and bad & set(drafted):
                found.add("onto and going on" if truth.count[b] else "onto and ending")
                inside = [t for t, p in zip(drafted, tree.parent[b, 1:].tolist(), strict=True)
                          if p and int(tree.tokens[b, p]) in bad]  # fmt: skip
                found |= {"past"} if inside else set()
    assert found == {"onto and going on", "onto and ending", "past"}


@pytest.mark.filterwarnings("ignore:.*not finite")
def test_ratio_rules_end_rows_there_too():
    target, config, texts, _, _ = case("llama", "t1")
    bad = {t for t in range(VOCAB) if not target.embed(torch.tensor(t)).isfinite().all()}
    met = 0
    for seed in range(5):
        drafter = ReplayDrafter(texts, VOCAB, 4, 3, 0.7, seed=seed)
        seeds = [seed * 7 + s for s in SEEDS]
        got = speculative(target, ROWS, config, seeds=seeds, drafter=drafter, rule="ratio")
        for text, finish in zip(got.tokens, got.finish, strict=True):
            ends = [i for i, t in enumerate(text) if t in bad]
            last = len(text) == config.max_new_tokens
            assert ends == ([len(text) - 1] if finish == STOP else []) or last
            assert finish == STOP or last
            met += finish == STOP
    assert met > 5


@pytest.mark.filterwarnings("ignore:.*not finite")
@pytest.mark.parametrize("rule", ["ratio", "kseq"])
def test_law_where_such_a_token_was_drawn(rule):
    """The draws are tested by what the root's scores are without them."""
    row, three = [3, 9, 4], [5, 11, 2]
    texts = torch.tensor([[*row, t] for t in three])
    sound = tiny("llama")
    logits = sound.project(sound.states(texts)[:, -2:])[..., three] / 8
    p, after = logits[0, 0].softmax(-1), logits[:, 1].softmax(-1)
    bad = int(p.argmin())
    # Cells: the pairs of a first token that can be read and any second one; the other first token.
    pairs = (p[:, None] * after).masked_fill(torch.arange(3)[:, None] == bad, 0)
    cells = torch.cat([pairs.flatten(), p[bad, None]])
    index = cells.nonzero()[:, 0].tolist()
    q = torch.full((VOCAB,), -INF, dtype=torch.float64)
    q[three] = torch.where(torch.arange(3) == bad, 0.5, 0.25).double().log()
    n = n_draws(len(index))
    config = settings(
        do_sample=True, temperature=8.0, max_new_tokens=2, eos_token_id=-1,
        suppress_tokens=sorted(set(range(VOCAB)) - set(three)),
    )  # fmt: skip
    got = speculative(
        broken("llama", [three[bad]]), [row] * n, config, seeds=range(n), rule=rule,
        drafter=MultiCandidate([Fixed(q.log_softmax(-1))], (2,), "iid"),
    )  # fmt: skip
    drawn = []
    for text, finish in zip(got.tokens, got.finish, strict=True):
        first, *second = (three.index(t) for t in text)
        assert (finish == STOP) == (first == bad) == (not second)
        drawn.append(index.index(9 if first == bad else 3 * first + second[0]))
    assert follows(torch.tensor(drawn), cells[index])


# ---------------------------------------------------------------- what is not finite


def scores_of(*rows) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.float64)


FINITE = [0.0, 2.0, 1.0]
BAD = {
    "one nan": [0.0, NAN, 1.0], "plus infinity": [0.0, 1.0, INF], "nothing": [-INF] * 3,
    "nan among -inf": [-INF, NAN, -INF],
}  # fmt: skip


@pytest.mark.parametrize("rule", ["seeded", "sampled", "ratio"])
@pytest.mark.parametrize("bad", BAD)
def test_verdict(bad, rule):
    """A chain 1, 1 of which any node may be bad; a single -inf is no fault."""

    def judged(*rows, depth=2):
        tree = make_tree([[0, 1, 1][: len(rows)]], [0, 0, 1][: len(rows)])
        scores, seen = scores_of(*rows), ancestors(tree, depth)
        if rule == "ratio":  # every guess is accepted that can be
            uniform = torch.full((1, depth + 1, 4), 1e-9, dtype=torch.float64)
            made = verify_ratio(scores, tree, uniform, depth)
        else:
            noise = torch.zeros(1, depth + 1, 3) if rule == "sampled" else None
            made = verify(scores, tree, noise, seen, depth)
        count = int(made.count)
        return made.path[0, : count + 1].tolist(), made.tokens[0, : count + 1].tolist()

    masked = [-INF, 2.0, -INF]
    assert judged(FINITE, masked, masked) == ([0, 1, 2], [1, 1, 1])
    assert judged(FINITE, masked, BAD[bad]) == ([0, 1], [1, 1])
    assert judged(FINITE, BAD[bad], FINITE) == ([0], [1])
    assert judged(BAD[bad], FINITE, FINITE) == ([], [])
    assert judged(BAD[bad], depth=0) == ([], [])
    assert judged(masked, depth=0) == ([0], [1])


class After(LogitsProcessor):
    """Nothing is allowed after a token, or what is there is nan."""

    def __init__(self, token: int, value: float):
        self.token, self.value = token, value

    def __call__(self, input_ids, scores):
        return scores.masked_fill(input_ids[:, -1:] == self.token, self.value)


@pytest.mark.filterwarnings("ignore:.*not finite")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_processed_scores_count(value):
    """And `remove_invalid_values`, which mends them as transformers does, is at work before."""
    config, target = settings(eos_token_id=-1), tiny("llama")
    sound, _ = alone(target, ROWS, config)
    own = LogitsProcessorList([After(sound[0][4], value)])
    want, finish = alone(target, ROWS, config, logits_processor=own)
    assert finish[0] == STOP and want[0] == sound[0][: sound[0].index(sound[0][4]) + 1]
    texts = [row + text for row, text in zip(ROWS, sound, strict=True)]
    for drafter in replays(texts).values():
        got = speculative(target, ROWS, config, drafter=drafter, logits_processor=own)
        assert (got.tokens, got.finish) == (want, finish)


def test_remove_invalid_values_goes_on():
    target, config, texts, _, _ = case("llama", "greedy")
    config = settings(eos_token_id=-1, remove_invalid_values=True)
    want, finish = alone(target, ROWS, config)
    assert finish == ["length"] * 4
    got = decode("none", texts, target, config)
    assert (got.tokens, got.finish) == (want, finish)


# ---------------------------------------------------------------- the edges


class Collect(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.flatten().tolist())

    def end(self):
        self.seen.append("end")


@pytest.mark.filterwarnings("ignore:.*not finite")
def test_first_token_streamer_and_warning():
    """An lm_head that is damaged: there is no first token. One warning says so, by name."""
    target = Target(copy.deepcopy(tiny("llama").model))
    with torch.no_grad():
        target.model.lm_head.weight[9] = NAN
    for way in (plain, speculative):
        streamer = Collect()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            got = way(target, ROWS[:1], settings(), streamer=streamer)
        assert (got.tokens, got.finish, got.stats.emitted) == ([[]], [STOP], [0])
        assert streamer.seen == [ROWS[0], "end"]
        (said,) = [str(w.message) for w in warned]
        assert target.name in said and "float64" in said and "bfloat16 or float32" in said
        assert way(target, ROWS[:1], settings()).stats.tokens_per_step is None


def test_half_precision_overflows():
    """The real thing: a float16 target that is too large for one word."""
    target = Target(copy.deepcopy(tiny("llama").model).half())
    with torch.no_grad():
        target.model.model.embed_tokens.weight[40] = 6e4
        for layer in target.model.model.layers:
            layer.mlp.down_proj.weight *= 1e3
    config, row = settings(eos_token_id=-1), [3, 9, 4]
    with pytest.warns(UserWarning, match="float16"):
        got = plain(target, [[*row, 40]], config)
    assert (got.tokens, got.finish) == ([[]], [STOP])


@pytest.mark.filterwarnings("ignore:.*not finite")
def test_lookaheads_are_told_no_less_than_nothing():
    class Told(Lookahead):
        least = 0

        def observe(self, drafted, accepted, truth):
            self.least = min(self.least, int(accepted.min()), int(truth.count.min()))

    target, config, texts, want, _ = case("llama", "greedy")
    told = Told()
    told.needs = frozenset({"last_logits"})
    got = decode("often", texts, target, config, lookahead=told)
    assert got.tokens == want and told.least == 0
