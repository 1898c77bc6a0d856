"""Multi-candidate trees: what is drawn, how it is laid out, and that the text keeps its law."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from chi_square import follows, n_draws
from models import NEW, SHORT, RandomLookahead, Recorder, alone, path_to, prompts, tiny
from models import shorter as settings
from test_draft_model import BOTH, MODES, SMALL, close_draft, keys_of
from test_head_drafter import make_head

from redrafter.contracts import Drafter, InputError
from redrafter.decode.ratio import RULES
from redrafter.decode.speculative import speculative
from redrafter.drafters.frontier import Frontier, HeadFrontier, ModelFrontier
from redrafter.drafters.multi import HOW, MultiCandidate, n_nodes
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.targets.model import Target

CHILDREN = (3, 2, 2)
FREE = dict(eos_token_id=-1)


def model(target, draft=None, children=CHILDREN) -> ModelFrontier:
    draft = close_draft(target, 0.1) if draft is None else draft
    return ModelFrontier(draft, target, n_nodes(children))


def head(target, name="own") -> HeadFrontier:
    return HeadFrontier(make_head(target, name), target)


def drafter(target, how, children=CHILDREN, **more) -> MultiCandidate:
    return MultiCandidate([model(target, children=children)], children, how, **more)


# ------------------------------------------------------------------- the seeded rule: plain's text


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_text_is_plain_decoding(family, how, mode):
    """Draws or not: a tree that does not depend on the rule's own choice is exact under it."""
    target, rows, config = tiny(family), prompts(), settings(**MODES[mode])
    want, drafts = alone(target, rows, config), [drafter(target, how)]
    if family == "llama":  # to a head all families are hidden states
        heads = (head(target, name) for name in ("own", "pruned"))
        drafts += [MultiCandidate([h], CHILDREN, how) for h in heads]
    for draft in drafts:
        got = speculative(target, rows, config, seeds=range(4), drafter=draft)
        assert (got.tokens, got.finish) == want
    if how == "iid":
        both = MultiCandidate([model(target), head(target)], CHILDREN, how)
        got = speculative(
            target, rows, config, seeds=range(4), drafter=both, lookahead=RandomLookahead(4, 1)
        )
        assert (got.tokens, got.finish) == want


@pytest.mark.parametrize("rule", RULES)
def test_greedy_is_the_same_by_every_rule(rule):
    target, rows, config = tiny("llama"), prompts(), settings()
    got = speculative(target, rows, config, drafter=drafter(target, "iid"), rule=rule)
    assert (got.tokens, got.finish) == alone(target, rows, config)


@pytest.mark.parametrize("mode", ["greedy", "t1.5"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_the_target_drafting_for_itself_is_always_right(family, mode):
    target, rows = tiny(family), prompts()
    config = settings(**MODES[mode], **FREE, max_new_tokens=1 + 4 * 4)
    for children in ((1, 1, 1), (2, 2, 1)):
        draft = MultiCandidate([model(target, target, children)], children, "seeded")
        got = speculative(target, rows, config, seeds=range(4), drafter=draft)
        assert got.tokens == alone(target, rows, config)[0]
        assert got.stats.accepted_at == got.stats.drafted_at == [16] * 3


@pytest.mark.parametrize("how", ["iid", "seeded"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_cached_keys_are_those_of_a_fresh_forward(noise, how):
    target, rows = tiny("llama"), prompts()
    frontier = model(target, close_draft(target, noise))
    draft = MultiCandidate([frontier], CHILDREN, how)
    for n_tokens in (2, 9, NEW):
        config = settings(**MODES["t1.5"], **FREE, max_new_tokens=n_tokens)
        got = speculative(
            target, rows, config, seeds=range(4), drafter=draft, lookahead=RandomLookahead(4, 5)
        )
        for b, row in enumerate(rows):
            known = int(frontier._known[b])
            assert known > len(row)
            fresh = keys_of(frontier.draft, (row + got.tokens[b])[:known])
            for layer, want in enumerate(fresh):
                keys = frontier._cache._views[layer][0][b, :, :known]
                torch.testing.assert_close(keys, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("draft_vocab", [40, 56])
def test_other_padding_of_the_vocabulary(draft_vocab):
    """A draft model whose lm_head is padded further, or less, than the target's."""
    tokenizer = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(40)})
    other = tiny("llama", **SMALL, num_key_value_heads=1, vocab_size=draft_vocab)
    target, other = (Target(m.model, tokenizer) for m in (tiny("llama"), other))
    rows, draft = prompts(), model(target, other)
    for how in HOW:
        got = speculative(target, rows, settings(**MODES["t1.5"]), seeds=range(4),
                          drafter=MultiCandidate([draft], CHILDREN, how))  # fmt: skip
        assert got.tokens == alone(target, rows, settings(**MODES["t1.5"]))[0]


# ------------------------------------------------------------------- what is drawn


class Fixed(Frontier):
    """The same logits whatever was read; keeps what it was given."""

    def __init__(self, logits: torch.Tensor):
        self.logits, self.read = logits, []

    def start(self):
        return self.logits.expand(len(self.seqs.ids), 1, -1)

    def advance(self, tokens, place):
        self.read.append((tokens, place))
        return self.logits.expand(*tokens.shape, -1)


def drawn_trees(target, draft: Drafter, n: int):
    """The first trees of n rows that differ in their seed alone."""
    seen = Recorder(draft)
    config = settings(do_sample=True, **FREE, max_new_tokens=2 + draft.max_depth)
    speculative(target, [[1, 2, 3]] * n, config, seeds=range(n), drafter=seen)
    return seen.steps[0][0]


@pytest.mark.parametrize("how", ["iid", "without"])
def test_draws_follow_q(how):
    """Ordered lists of draws below the root and below a node of the first level."""
    vocab = 4
    target = tiny("llama", vocab_size=vocab, bos_token_id=1, pad_token_id=0)
    q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    law = {}
    for a, b in itertools.product(range(vocab), repeat=2):
        if how == "iid":
            law[a, b] = float(q[a] * q[b])
        elif a != b:
            law[a, b] = float(q[a] * q[b] / (1 - q[a]))
    cells = list(law)
    n = n_draws(len(cells))
    tree = drawn_trees(target, MultiCandidate([Fixed(q.log())], (2, 2), how), n)
    order = tree.draws.order

    def cell(node):
        pair = tree.tokens.gather(1, order[torch.arange(n), node])
        return torch.tensor([cells.index(tuple(x)) for x in pair.tolist()])

    first = cell(torch.zeros(n, dtype=torch.long))
    second = cell(order[:, 0, 0])  # below the first draw
    p = torch.tensor([law[c] for c in cells])
    assert follows(first, p) and follows(second, p)
    # and they have nothing to do with each other
    both = first * len(cells) + second
    counts = torch.bincount(both, minlength=len(cells) ** 2).double()
    want = n * (p[:, None] * p).flatten()
    some = want >= 5
    assert some.sum() > 20
    chi = ((counts - want)[some] ** 2 / want[some]).sum()
    assert float(chi) < some.sum() + 6 * (2 * some.sum()) ** 0.5


def test_layout_of_draws():
    """Equal draws below a node share it; every draw has its place; q is what was drawn from."""
    target = tiny("llama", vocab_size=6, bos_token_id=1, pad_token_id=0)
    logits = torch.tensor([1.0, 0.5, 0.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    fixed, n = Fixed(logits), 300
    tree = drawn_trees(target, MultiCandidate([fixed], (3, 2), "iid"), n)
    order, draws = tree.draws.order, tree.draws
    assert draws.mode == "iid" and draws.source is None
    torch.testing.assert_close(draws.log_q, logits.log_softmax(0).expand_as(draws.log_q))
    shared = 0
    for row in range(n):
        reached = {0}
        for node in range(tree.n_nodes):
            below = [i for i in order[row, node].tolist() if i >= 0]
            want = 0 if node not in reached or tree.depth[row, node] == 2 else (3, 2)[
                int(tree.depth[row, node])]  # fmt: skip
            assert len(below) == want
            for i in below:
                assert tree.parent[row, i] == node and tree.valid[row, i]
                assert tree.depth[row, i] == tree.depth[row, node] + 1
            tokens = tree.tokens[row, below].tolist()
            assert len(set(below)) == len(set(tokens))  # one node per token
            shared += len(set(below)) < len(below)
            reached |= set(below)
        assert set(tree.valid[row].nonzero()[:, 0].tolist()) == reached
        # a node that is read is on the path that it claims
        assert all(path_to(tree, row, i)[0] == 0 for i in reached)
    assert shared > n / 4
    # Fewer nodes than (3, 2) has when none are shared: the forward was shared too.
    read = fixed.read[0][0]
    assert read.shape[1] == 3 and int(tree.valid.sum(1).float().mean()) < n_nodes((3, 2))


def test_several_drafters_take_turns():
    target = tiny("llama", vocab_size=4, bos_token_id=1, pad_token_id=0)
    q = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.01, 0.01, 0.01, 0.97]], dtype=torch.float64)
    draft = MultiCandidate([Fixed(q[0].log()), Fixed(q[1].log())], (3, 2), "iid")
    tree = drawn_trees(target, draft, 200)
    assert tree.draws.source[0, 0].tolist() == [0, 1, 0]
    torch.testing.assert_close(tree.draws.log_q[0, 0], q.log())
    first = tree.tokens.gather(1, tree.draws.order[:, 0])
    assert (first == torch.tensor([0, 3, 0])).double().mean() > 0.9


# ------------------------------------------------------------------- ratio rules end to end

RATIO = {
    # name: rule, how, children, several drafters
    "speculative sampling": ("ratio", "iid", (1, 1), False),
    "with replacement": ("ratio", "iid", (3, 2), False),
    "without replacement": ("ratio", "without", (3, 2), False),
    "k-SEQ": ("kseq", "iid", (3, 2), False),
    "SpecInfer": ("ratio", "iid", (2, 2), True),
    "guesses": ("ratio", "top", (3, 2), False),
    "guesses with the noise": ("ratio", "seeded", (3, 2), False),
}


@pytest.mark.parametrize("case", RATIO)
def test_a_row_depends_on_nothing_but_itself(case):
    rule, how, children, several = RATIO[case]
    target, rows, config = tiny("llama"), prompts(), settings(**MODES["t1.5"])
    fronts = [model(target, children=children)] + ([head(target)] if several else [])
    draft = MultiCandidate(fronts, children, how)
    whole = speculative(target, rows, config, seeds=range(4), drafter=draft, rule=rule)
    for b, row in enumerate(rows):
        one = speculative(target, [row], config, seeds=[b], drafter=draft, rule=rule)
        assert (one.tokens[0], one.finish[0]) == (whole.tokens[b], whole.finish[b])
    assert sum(whole.stats.accepted_at) > 0


def test_a_row_depends_on_no_other_rows_tree():
    """Guesses, where the size of the batch's trees is that of the largest one."""
    target, rows, config = tiny("llama"), prompts(), settings(**MODES["t1.5"], **FREE)
    draft = SuffixDrafter(6)
    whole = speculative(target, rows, config, seeds=range(4), drafter=draft, rule="ratio")
    for b, row in enumerate(rows):
        one = speculative(target, [row], config, seeds=[b], drafter=draft, rule="ratio")
        assert one.tokens[0] == whole.tokens[b]


@pytest.mark.slow
@pytest.mark.parametrize("case", RATIO)
def test_first_tokens_end_to_end(case):
    """Seeds as rows: the first tokens of texts, against the model's own exact law of them."""
    rule, how, children, several = RATIO[case]
    vocab, prompt, temperature = 4, [3, 1, 2], 1.2
    target = tiny("llama", vocab_size=vocab, hidden_size=16, num_hidden_layers=1,
                  initializer_range=0.35)  # fmt: skip
    config = settings(do_sample=True, temperature=temperature, max_new_tokens=3, eos_token_id=-1)

    def law(prefixes):
        logits = target.project(target.states(torch.tensor(prefixes))[:, -1])
        return (logits / temperature).softmax(-1)

    p1 = law([prompt])[0]
    p2 = law([[*prompt, a] for a in range(vocab)])
    p3 = law([[*prompt, a, b] for a in range(vocab) for b in range(vocab)]).view(vocab, vocab, -1)
    fronts = [model(target, close_draft(target, 0.4), children)]
    if several:
        fronts.append(model(target, close_draft(target, 0.8), children))
    draft = MultiCandidate(fronts, children, how)
    n, rows, texts, counts = n_draws(vocab**2), 4000, [], torch.zeros(2, 2)
    for start in range(0, n, rows):
        seeds = range(start, start + rows)
        got = speculative(target, [prompt] * rows, config, seeds=seeds, drafter=draft, rule=rule)
        texts += got.tokens
        counts += torch.tensor([got.stats.accepted_at, got.stats.drafted_at])
    rate = counts[0] / counts[1]  # draws are accepted at either level, and not always
    assert (rate > 0.1).all() and (rate < 0.98).all()
    y1, y2, y3 = torch.tensor(texts).T
    # The prefill's token is y1; the draws of the first step are about y2 and y3.
    assert follows(y1, p1)
    assert follows(y1 * vocab + y2, (p1[:, None] * p2).flatten())
    assert follows(y2 * vocab + y3, torch.einsum("a,ab,abc->bc", p1, p2, p3).flatten())


def test_acceptance_is_what_the_distance_says():
    """One draw by ratio is accepted with probability 1 - TV, at every prefix."""
    target, rows = tiny("llama"), prompts((6,) * 40)
    draft = close_draft(target, 0.05)
    config = settings(do_sample=True, temperature=1.5, **FREE, max_new_tokens=40)
    seen = Recorder(MultiCandidate([model(target, draft, (1,))], (1,), "iid"), ["logits"])
    got = speculative(target, rows, config, seeds=range(40), drafter=seen, rule="ratio")
    overlap = []
    for row, text in zip(rows, got.tokens, strict=True):
        ids = torch.tensor([row + text])
        p, q = ((m.project(m.states(ids)) / 1.5).softmax(-1)[0] for m in (target, draft))
        overlap.append(torch.minimum(p, q).sum(-1)[len(row) : -1])
    expected = float(torch.cat(overlap).mean())
    rate = got.stats.accepted_at[0] / got.stats.drafted_at[0]
    # Steps begin at prefixes chosen by the rule itself: no more than a few hundredths apart.
    assert 0.2 < rate < 0.95 and rate == pytest.approx(expected, abs=0.06)


# ------------------------------------------------------------------- a pruned vocabulary


class Scattered(HeadFrontier):
    """A head's logits over the whole vocabulary, as any frontier's may be."""

    ids = None

    def _read(self, tokens):
        logits = super()._read(tokens)
        whole = torch.full((*logits.shape[:-1], self.vocab_size), -torch.inf, dtype=logits.dtype)
        whole[..., self.head.draft_ids] = logits
        return whole


PRUNED = {
    # name: mode, rule, how, children (of 9 tokens), several drafters
    "greedy": ("greedy", "seeded", "seeded", (3, 2), False),
    "seeded": ("t1.5", "seeded", "seeded", (3, 2), False),
    "more children than tokens": ("t1.5", "seeded", "top", (12,), False),
    "more draws than tokens": ("t1.5", "ratio", "without", (12,), False),
    **{name: ("t1.5", *case) for name, case in RATIO.items() if case[1] in ("iid", "without")},
}


@pytest.mark.parametrize("case", PRUNED)
def test_drafted_columns_alone_make_the_trees_of_the_whole_vocabulary(case):
    mode, rule, how, children, several = PRUNED[case]
    target, rows, config = tiny("llama"), prompts(), settings(**MODES[mode])
    seen, texts = [], []
    for kind in (HeadFrontier, Scattered):
        fronts = [kind(make_head(target, "pruned"), target)]
        fronts += [model(target, children=children)] if several else []
        seen.append(Recorder(MultiCandidate(fronts, children, how)))
        made = speculative(target, rows, config, seeds=range(4), drafter=seen[-1], rule=rule)
        texts.append((made.tokens, made.finish, made.stats.emitted))
    assert texts[0] == texts[1] and seen[0].steps
    assert any(tree.draws is not None for tree, *_ in seen[0].steps) == (how in ("iid", "without"))
    for (tree, *_), (whole, *_) in zip(seen[0].steps, seen[1].steps, strict=True):
        for name in ("valid", "depth", "parent"):
            assert torch.equal(getattr(tree, name), getattr(whole, name))
        assert torch.equal(tree.tokens[tree.valid], whole.tokens[whole.valid])
        torch.testing.assert_close(tree.log_q, whole.log_q)
        assert (tree.draws is None) == (whole.draws is None)
        if tree.draws is not None:
            assert torch.equal(tree.draws.order, whole.draws.order)
            place = slice(None), slice(None), target.vocab_size
            torch.testing.assert_close(tree.draws.q(*place), whole.draws.q(*place))
            assert tree.draws.log_q.shape[-1] == (target.vocab_size if several else 9)


# ------------------------------------------------------------------- errors


def test_bad_options_are_named():
    target = tiny("llama")
    for options, words in (
        (dict(children=()), "children"),
        (dict(children=(2, 0)), "children"),
        (dict(how="many"), "how='many'"),
        (dict(temperature=-1.0), "temperature"),
    ):
        with pytest.raises(InputError, match=words):
            MultiCandidate([head(target)], **options)
    with pytest.raises(InputError, match="several"):
        MultiCandidate([head(target), head(target)], (2,), "without")
    config = settings(do_sample=True)
    with pytest.raises(InputError, match="rule: 'fair'"):
        speculative(target, prompts(), config, drafter=drafter(target, "iid"), rule="fair")
    with pytest.raises(InputError, match="kseq"):
        speculative(target, prompts(), config, drafter=drafter(target, "without"), rule="kseq")


def test_a_draft_temperature_of_zero_is_no_draw():
    target, rows = tiny("llama"), prompts()
    seen = Recorder(drafter(target, "iid", temperature=0.0))
    config = settings(**MODES["t0.7"])
    speculative(target, rows, config, seeds=range(4), drafter=seen, rule="ratio")
    assert all(tree.draws is None for tree, *_ in seen.steps)


def test_rows_that_outgrow_the_draft_model():
    target = tiny("llama")
    short = tiny("llama", **SMALL, num_key_value_heads=1, max_position_embeddings=20)
    rows = prompts()
    for how in HOW:
        draft = MultiCandidate([model(target, short)], CHILDREN, how)
        config = settings(**MODES["t1.5"], **FREE)
        got = speculative(target, rows, config, seeds=range(4), drafter=draft)
        assert got.tokens == alone(target, rows, config)[0]
        for rule in RULES if how == "iid" else ("ratio",):  # to the last step, which drafts nothing
            got = speculative(target, rows, config, seeds=range(4), drafter=draft, rule=rule)
            assert all(len(t) == SHORT for t in got.tokens)
