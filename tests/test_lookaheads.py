"""The text by every lookahead with every drafter, and its law where drafts are drawn."""

import functools
import itertools

import pytest
import torch
from chi_square import DISTANCE, follows, n_draws
from models import VOCAB, alone, endless, paired, prompts, settings, tiny
from test_draft_model import SMALL, close_draft
from test_head_drafter import make_head

from redrafter.config import TreeConfig
from redrafter.contracts import InputError, Lookahead, NoDraft
from redrafter.costs import CostMeter
from redrafter.decode.speculative import speculative
from redrafter.drafters.bigram import CountedBigrams, count_bigrams
from redrafter.drafters.build import DRAFTERS, Resources
from redrafter.drafters.consensus import Consensus
from redrafter.drafters.dummy import DummyDrafter
from redrafter.drafters.frontier import ModelFrontier
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.lookup import PromptLookup
from redrafter.drafters.mixture import Mixture
from redrafter.drafters.model import DraftModel
from redrafter.drafters.multi import MultiCandidate
from redrafter.drafters.ngrammys import NGrammys
from redrafter.drafters.recycling import TokenRecycling
from redrafter.drafters.replay import ReplayDrafter
from redrafter.drafters.selector import Selector
from redrafter.drafters.skipping import LayerSkipping
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.drafting import LOOKAHEADS, Strategy, build_strategy, foreseen, parse_strategy
from redrafter.evaluation.acceptance import Counter
from redrafter.evaluation.lossless import check_mode, references
from redrafter.evaluation.methods import PromptBatch, build_method
from redrafter.lookahead.confidence import ConfidenceLookahead
from redrafter.lookahead.oracle import FullDepth, OracleLookahead
from redrafter.lookahead.roc import RocLookahead

FREE = dict(eos_token_id=-1)

# ---------------------------------------------------------------- every lookahead, every drafter

MODES = {"greedy": {}, "t0.7": dict(do_sample=True, temperature=0.7)}


class RandomPlan(Lookahead):
    """Any number of levels per row, none at all in every fifth step, and any stop in between."""

    def __init__(self, n_rows: int, most: int, seed: int):
        self.n_rows, self.most = n_rows, most
        self.random = torch.Generator().manual_seed(seed)

    def plan(self):
        levels = torch.randint(self.most + 1, (self.n_rows,), generator=self.random)
        return levels * bool(torch.rand((), generator=self.random) < 0.8)

    def go_on(self, features, level):
        return torch.rand(self.n_rows, generator=self.random) < 0.85


class Noted(Lookahead):
    """Passes everything on, and keeps what live rows drafted and had accepted.

    first: {(row, tokens known): the tokens of the first level}, where there were any
    """

    def __init__(self, inner: Lookahead):
        self.inner, self.needs, self.level_by_level = inner, inner.needs, inner.level_by_level
        self.steps: list[list[tuple[int, int]]] = []
        self.first: dict[tuple[int, int], set[int]] = {}

    def begin(self, seqs):
        self.seqs = seqs
        self.inner.begin(seqs)

    def plan(self):
        self.live, self.length = self.seqs.live, self.seqs.length.tolist()
        return self.inner.plan()

    def go_on(self, features, level):
        return self.inner.go_on(features, level)

    def observe(self, drafted, accepted, truth):
        if truth.tree is not None:
            pairs = torch.stack([drafted, accepted], 1)[self.live].tolist()
            self.steps.append([tuple(pair) for pair in pairs])
            level = truth.tree.valid & (truth.tree.depth == 1) & self.live[:, None]
            for row in level.any(1).nonzero()[:, 0].tolist():
                told = set(truth.tree.tokens[row, level[row]].tolist())
                self.first[row, self.length[row]] = told
        self.inner.observe(drafted, accepted, truth)


@functools.cache
def case(mode: str):
    """Target, prompts, settings, plain texts and why they end, texts that go on, bigrams.

    The prompts say something twice, for drafters that copy.
    """
    target, config = tiny("llama"), settings(**MODES[mode])
    texts = [row[: 1 + len(row) // 2] * 2 for row in prompts()]
    want = alone(target, texts, config)
    longer = endless(target, texts, config)
    return target, texts, config, want, longer, count_bigrams(longer, VOCAB, 4)


def of_three(kind, target, texts):
    return kind({
        "model": DraftModel(close_draft(target, 0.1), target, 3),
        "replay": ReplayDrafter(texts, VOCAB, 4, 1, 0.6, False, 0),
        "suffix": SuffixDrafter(3),
    })  # fmt: skip


#: kind of `DRAFTERS`[:variant] -> a drafter, from target, texts and bigrams
KINDS = {
    "head": lambda t, x, b: HeadDrafter(make_head(t, "own"), t, TreeConfig(2, 4)),
    "model": lambda t, x, b: DraftModel(close_draft(t, 0.1), t, 4),
    "model:tree": lambda t, x, b: DraftModel(close_draft(t, 0.1), t, 3, 2),
    "model:itself": lambda t, x, b: DraftModel(t, t, 4),
    "multi": lambda t, x, b: MultiCandidate(
        [ModelFrontier(close_draft(t, 0.1), t, 7)], (2, 1, 1), "iid"),
    "skip": lambda t, x, b: LayerSkipping(t, 3, fixed=(1,)),
    "skip:step": lambda t, x, b: LayerSkipping(
        t, 3, threshold=None, max_skipped=1, refresh="step"),
    "suffix": lambda t, x, b: SuffixDrafter(4),
    "consensus": lambda t, x, b: Consensus(4),
    "lookup": lambda t, x, b: PromptLookup(4, 2),
    "ngrammys": lambda t, x, b: NGrammys(b, 4, 3),
    "bigram": lambda t, x, b: CountedBigrams(b, 2, 3),
    "recycling": lambda t, x, b: TokenRecycling(VOCAB),
    "mix": lambda t, x, b: of_three(functools.partial(Mixture, nodes=9), t, x),
    "select": lambda t, x, b: of_three(
        functools.partial(Selector, clock=itertools.count().__next__), t, x),
    "replay": lambda t, x, b: ReplayDrafter(x, VOCAB, 4, 2, 0.6, True, 0),
    "dummy": lambda t, x, b: DummyDrafter(3),
    "none": lambda t, x, b: NoDraft(),
}  # fmt: skip
LOOKS = {
    "static": dict(depth=2), "exit": {}, "heuristic": dict(start=2), "confidence": {},
    "roc": dict(least_samples=2), "oracle": {},
}  # fmt: skip
SAY_Q = {
    "head", "model", "multi", "skip", "suffix", "consensus", "lookup", "bigram", "recycling",
}  # fmt: skip
#: what they guess depends on what they were told or drew before
MOODY = {"recycling", "mix", "select", "replay"}


def test_every_kind_is_here():
    assert {name.split(":")[0] for name in KINDS} == {*DRAFTERS, "dummy"}
    assert set(LOOKS) == set(LOOKAHEADS) - {"disco"}, "disco needs a file: see its own tests"


@pytest.mark.parametrize(("kind", "look", "mode"), paired(KINDS, LOOKS, MODES))
def test_text_is_plain_decoding(kind, look, mode):
    base, options = kind.split(":")[0], LOOKS[look]
    target, texts, config, want, longer, bigrams = case(mode)
    drafter = KINDS[kind](target, longer, bigrams)
    unsaid = {"exit": base != "skip", "confidence": base not in SAY_Q, "roc": base not in SAY_Q}
    if unsaid.get(look):
        with pytest.raises(InputError, match="publishes"):
            LOOKAHEADS[look](drafter, **options)
        return
    decode = functools.partial(speculative, target, texts, config, seeds=range(4), drafter=drafter)
    lookahead = LOOKAHEADS[look](drafter, **options)
    if look == "oracle":
        lookahead.strict = base not in MOODY
        first = []
        strategy = foreseen(
            Strategy(drafter, lookahead=lookahead),
            lambda full: first.append(decode(lookahead=full)),
        )
        lookahead = strategy.lookahead
    noted = Noted(lookahead)
    got = decode(lookahead=noted)
    assert (got.tokens, got.finish) == want
    if look == "oracle" and base not in MOODY:
        assert all(n == m for step in noted.steps for n, m in step), "nothing in vain"
        assert got.stats.steps == first[0].stats.steps
        assert got.stats.accepted_at == first[0].stats.accepted_at


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_random_plans_and_stops(kind):
    """Steps without a draft for some rows, and for all, of which the drafter hears nothing but the
    outcome. It then guesses what it guesses at the same place where it never paused."""
    lengths, alone_at_0, skipped, compared = set(), 0, 0, 0
    for seed, mode in enumerate(MODES):
        target, texts, config, want, longer, bigrams = case(mode)
        drafter = KINDS[kind](target, longer, bigrams)
        decode = functools.partial(
            speculative, target, texts, config, seeds=range(4), drafter=drafter
        )
        full = Noted(FullDepth())
        decode(lookahead=full)
        noted = Noted(RandomPlan(4, drafter.max_depth, seed))
        for _ in range(2):
            got = decode(lookahead=noted)
            assert (got.tokens, got.finish) == want
        for step in noted.steps:
            drafted = {n for n, _ in step}
            lengths |= drafted
            skipped += drafted == {0}
            alone_at_0 += 0 in drafted and len(drafted) > 1
        if kind.split(":")[0] in MOODY or kind == "skip:step":
            continue
        common = full.first.keys() & noted.first.keys()
        assert all(full.first[place] == noted.first[place] for place in common)
        compared += len(common)
        if kind == "model:itself":
            assert all(n == m for step in noted.steps for n, m in step), "always right"
    assert {0, 1, drafter.max_depth} <= lengths
    assert alone_at_0 and skipped
    assert compared > 5 or kind.split(":")[0] in MOODY or kind == "skip:step"


def test_a_draft_model_without_room():
    """Where the text has outgrown its context there is nothing to be sure of."""
    target = tiny("llama")
    short = tiny("llama", **SMALL, num_key_value_heads=1, max_position_embeddings=20)
    texts, config = prompts(), settings(**FREE)
    for kind in (ConfidenceLookahead, RocLookahead):
        drafter = DraftModel(short, target, 3)
        got = speculative(target, texts, config, drafter=drafter, lookahead=kind.of(drafter))
        assert got.tokens == alone(target, texts, config)[0]
        assert got.stats.drafted_at[0] < sum(got.stats.steps)


def test_who_counts_what_was_tested_decides_nothing():
    target, texts, config, _, longer, _ = case("t0.7")
    made, counter = [], None
    for wrap in (False, True):
        drafter = ReplayDrafter(longer, VOCAB, 4, 1, 0.6, False, 0)
        lookahead = RandomPlan(4, 4, 0)
        if wrap:
            lookahead = counter = Counter(lookahead)
        made.append(speculative(target, texts, config, seeds=range(4), drafter=drafter,
                                lookahead=lookahead).stats)  # fmt: skip
    assert made[0].drafted_at == made[1].drafted_at != [sum(made[0].steps)] * 4
    assert counter.accepted >= sum(made[1].accepted_at) > 0


def test_drafters_of_several_depths_are_priced_with_noise_of_their_own():
    target = tiny("llama")
    drafters = {f"K = {depth}": DraftModel(close_draft(target), target, depth) for depth in (4, 2)}
    meter = CostMeter(target, new_tokens=(1, 5), contexts=(16,), drafters=drafters, temperature=1.0)
    assert [len(cost.levels) for cost in meter.run(rounds=3).drafters] == [4, 2]


# ---------------------------------------------------------------- the oracle in reports


def test_the_oracle_by_name():
    """Two batches through the timed method, then all prompts through the lossless check."""
    target, texts, config, want, *_ = case("t0.7")
    resources = Resources(draft=close_draft(target, 0.1))
    names = [f"model:1x4{part}" for part in ("", ":lookahead=oracle")]
    batches = [PromptBatch(texts[i : i + 2], [i, i + 1], texts[i : i + 2]) for i in (0, 2)]
    stats = []
    for name in names:
        loop = build_method(name, target, config, resources)
        assert loop.stops_early == (name != names[0])
        for i, batch in enumerate(batches):
            loop.prepare(batch)
            run = loop.run(batch)
            assert run.tokens == want[0][2 * i : 2 * i + 2]
            stats.append(run.stats)
    for full, best in zip(stats[:2], stats[2:], strict=True):
        assert best.steps == full.steps and best.accepted_at == full.accepted_at
        assert best.forwards == full.forwards and sum(best.drafted_at) < sum(full.drafted_at)
    strategy = build_strategy(names[1], target, resources)
    plain_of = references(target, texts, config)
    result = check_mode(target, lambda _: strategy, texts, config, plain_of, (1, 4))
    assert result.rows_equal == result.rows_compared == 8 and not result.unexplained


def test_where_no_oracle_can_be():
    target, texts, config, _, longer, _ = case("greedy")
    with pytest.raises(InputError, match="by rule ratio the text depends"):
        parse_strategy("multi:rule=ratio:lookahead=oracle")
    strategy = build_strategy("lookup:4x2:lookahead=oracle", target, Resources())
    with pytest.raises(InputError, match="FullDepth first"):
        speculative(target, texts, config, drafter=strategy.drafter, lookahead=strategy.lookahead)
    # One that draws anew in every run: what it drafts is no longer what was seen.
    drafter = ReplayDrafter(longer, VOCAB, 4, 1, 0.5, False, 0)
    for strict in (True, False):
        strategy = Strategy(drafter, lookahead=OracleLookahead(strict=strict))
        decode = functools.partial(speculative, target, texts, config, drafter=drafter)
        strategy = foreseen(strategy, lambda full, go=decode: go(lookahead=full))
        if strict:
            with pytest.raises(InputError, match="depend on what it drafted before"):
                decode(lookahead=strategy.lookahead)
        else:
            decode(lookahead=strategy.lookahead)
            assert strategy.lookahead.unknown_steps > 0


# ---------------------------------------------------------------- the law under a ratio rule


class Dropping(ConfidenceLookahead):
    """The classical mistake: the token below the bar is taken out of the draft."""

    def __init__(self, drafter: MultiCandidate, threshold: float):
        super().__init__(drafter.feature_names, threshold)
        self.drafter = drafter

    def go_on(self, features, level):
        answer = super().go_on(features, level)
        self.drafter._valid[-1] &= answer[:, None]
        return answer


def test_a_stop_that_drops_what_was_drawn_is_seen():
    """Seeds as rows: the first four tokens of texts against the model's own law, alpha 1e-4, and a
    total variation of 0.03 is found with 99 %. What dropping does to it is worked out."""
    vocab, prompt, bar = 4, [3, 1, 2], 0.4
    target = tiny("llama", vocab_size=vocab, hidden_size=16, num_hidden_layers=1,
                  initializer_range=0.35)  # fmt: skip
    draft = close_draft(target, 0.4)
    config = settings(do_sample=True, max_new_tokens=4, **FREE)

    def law(model, length):
        """(V, ..., V) of the token behind each text of this many tokens."""
        texts = torch.cartesian_prod(*[torch.arange(vocab)] * length).view(-1, length)
        ids = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], 1)
        logits = model.project(model.states(ids)[:, -1])
        return logits.softmax(-1).view([vocab] * length + [vocab])

    p1 = target.project(target.states(torch.tensor([prompt]))[:, -1]).softmax(-1)[0]
    p2, p3, q2 = law(target, 1), law(target, 2), law(draft, 1)
    right = p1[:, None] * p2
    # Of a draw below the bar nothing is left: the token is then the target's own.
    kept, overlap, rest = q2 >= bar, torch.minimum(p2, q2), (p2 - q2).clamp(min=0)
    rejected = ((q2 - overlap) * kept).sum(1, keepdim=True)
    biased = overlap * kept + rejected * rest / rest.sum(1, keepdim=True)
    biased = p1[:, None] * (biased + (q2 * ~kept).sum(1, keepdim=True) * p2)
    assert float((biased - right).abs().sum() / 2) > 2 * DISTANCE

    n, batch = n_draws(vocab**2), 4500
    for kind in ("confidence", "roc", "dropping"):
        drafter = MultiCandidate([ModelFrontier(draft, target, 4)], (1, 1, 1), "iid")
        lookahead = {
            "confidence": functools.partial(ConfidenceLookahead.of, drafter),
            "roc": functools.partial(RocLookahead.of, drafter),
            "dropping": functools.partial(Dropping, drafter),
        }[kind](threshold=bar)
        made, drafted, steps = [], torch.zeros(3), 0
        for start in range(0, n, batch):
            got = speculative(
                target, [prompt] * batch, config, seeds=range(start, start + batch),
                drafter=drafter, lookahead=lookahead, rule="ratio",
            )  # fmt: skip
            made += got.tokens
            drafted += torch.tensor(got.stats.drafted_at)
            steps += sum(got.stats.steps)
        y1, y2, y3, _ = torch.tensor(made).T
        first, second = y1 * vocab + y2, y2 * vocab + y3
        if kind == "dropping":
            assert not follows(first, right.flatten()) and follows(first, biased.flatten())
            continue
        assert 0.2 * steps < drafted[1] < 0.8 * drafted[0], "it stops often, and not always"
        assert follows(first, right.flatten())
        assert follows(second, torch.einsum("ab,abc->bc", right, p3).flatten())
