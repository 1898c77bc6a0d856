"""The ratio rules keep the target's law: by enumeration through the shipped function.

All that the rules do is compare uniform numbers with thresholds and look one up in a cumulative
distribution. So the exact law of their output follows from the thresholds, which are found by
bisection *through* `verify_ratio`: no formula of the rules is repeated here.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models import make_tree

from redrafter.contracts import Draws, InputError, TokenTree
from redrafter.decode.noise import ACCEPTING, DRAWING, draw, gumbel, private_uniform
from redrafter.decode.ratio import guesses, verify_ratio
from redrafter.evaluation.optimum import best_acceptance

V = 3
_HALVINGS = 34  # to 6e-11
LOW, HIGH = 1e-15, 1 - 1e-15


def law(seed: int, peak: float = 2.0, zeros: int = 0) -> torch.Tensor:
    """A made-up distribution over V tokens."""
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(V, generator=random, dtype=torch.float64) * 2 * peak
    scores[torch.randperm(V, generator=random)[:zeros]] = float("-inf")
    return scores.softmax(0)


def repeated(tree: TokenTree, n: int) -> TokenTree:
    """Its rows n times over."""
    draws = replace(
        tree.draws, order=tree.draws.order.repeat(n, 1, 1),
        log_q=None if tree.draws.log_q is None else tree.draws.log_q.repeat(n, 1, 1, 1),
        source=None if tree.draws.source is None else tree.draws.source.repeat(n, 1, 1),
    )  # fmt: skip
    rows = {name: getattr(tree, name).repeat(n, 1) for name in ("tokens", "parent", "depth")}
    return replace(tree, **rows, valid=tree.valid.repeat(n, 1), draws=draws)


def thresholds(holds: Callable[[torch.Tensor], torch.Tensor], shape: tuple) -> torch.Tensor:
    """float64 of the shape: where `holds(u)`, true for small u, becomes false, each by itself."""
    low, high = torch.zeros(shape).double(), torch.ones(shape).double()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        yes = holds(middle.clamp(LOW, HIGH))
        low, high = torch.where(yes, middle, low), torch.where(yes, high, middle)
    return (low + high) / 2


def step_law(
    scores: torch.Tensor, tree: TokenTree, max_depth: int, rule: str, nodes: torch.Tensor,
    depth: int, u: torch.Tensor,
):  # fmt: skip
    """The law of what happens at one depth. u: (rows, K+1, R+1) leads the walk to that depth.
    nodes: (rows, n), the node of every draw there; draws have nodes of their own.

    Returns (rows, n) chances that the r-th draw is the one accepted, and (rows, V) that none is and
    the token is drawn: together they sum to 1.
    """
    rows, n_rounds = nodes.shape
    # A draw is tested only where all before it were rejected: those are at HIGH. Of what is left,
    # the last token's share ends at 1.
    varied = [*range(n_rounds), *[-1] * (V - 1)]
    u = u.repeat(len(varied), 1, 1).view(len(varied), *u.shape)
    u[:, :, depth, :n_rounds] = HIGH
    scores, tree = scores.repeat(len(varied), 1, 1), repeated(tree, len(varied))
    below = torch.arange(V - 1)[:, None]

    def holds(x):
        for test, column, value in zip(u, varied, x, strict=True):
            test[:, depth, column] = value
        got = verify_ratio(scores, tree, u.flatten(0, 1), max_depth, rule)
        count, tokens = got.count.view(-1, rows), got.tokens[:, depth].view(-1, rows)
        child = got.path[:, min(depth + 1, max_depth)].view(-1, rows)[:n_rounds]
        accepted = (count[:n_rounds] > depth) & (child == nodes.T)
        assert (tokens < V).all()
        return torch.cat([accepted, tokens[n_rounds:] <= below])

    found = thresholds(holds, (len(varied), rows)).T
    # Where an earlier draw is certain, a later one is never reached: `left` is 0 there.
    rejected = (1 - found[:, :n_rounds]).cumprod(1)
    left = torch.cat([torch.ones(rows, 1).double(), rejected], 1)
    drawn = torch.cat([found[:, n_rounds:], torch.ones(rows, 1).double()], 1)
    mass = torch.diff(drawn, dim=1, prepend=torch.zeros(rows, 1).double())
    return left[:, :-1] * found[:, :n_rounds], mass * left[:, -1:]


def all_draws(mode: str, qs: list[torch.Tensor]) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Every ordered list of draws, one from each of qs, with its probability."""
    lists, weight = [], []
    for xs in itertools.product(range(V), repeat=len(qs)):
        w, gone = 1.0, 0.0
        for i, (x, q) in enumerate(zip(xs, qs, strict=True)):
            if mode == "without_replacement":
                w *= 0.0 if x in xs[:i] else float(q[x]) / (1 - gone)
                gone += float(q[x])
            else:
                w *= float(q[x])
        if w > 0:
            lists.append(xs)
            weight.append(w)
    return lists, torch.tensor(weight, dtype=torch.float64)


def depth_one(lists, q: torch.Tensor, mode: str, source=None) -> TokenTree:
    """Trees of one level, a node for every draw. q: (Q, V)."""
    rounds = len(lists[0])
    order = [[list(range(1, 1 + rounds))] + [[-1] * rounds] * rounds] * len(lists)
    tree = make_tree([[0, *xs] for xs in lists], [0] * (1 + rounds))
    log_q = q.log()[None, None].expand(len(lists), 1, -1, -1)
    order = torch.tensor(order)
    source = None if source is None else torch.tensor(source).expand_as(order)
    tree.draws = Draws(order, mode, None if mode == "deterministic" else log_q, source)
    return tree


def first_token_law(tree: TokenTree, weight, p: torch.Tensor, rule: str):
    """Exact (V,) law of the first token over weighted rows, and the chance of acceptance."""
    rows, rounds = len(weight), tree.draws.order.shape[2]
    scores = p.log().expand(rows, tree.n_nodes, -1)
    u = torch.full((rows, 2, rounds + 1), 0.5).double()
    taken, drawn = step_law(scores, tree, 1, rule, tree.draws.order[:, 0], 0, u)
    token = tree.tokens.gather(1, tree.draws.order[:, 0].clamp(min=0))
    out = drawn.clone().scatter_add_(1, token, taken)
    return (weight[:, None] * out).sum(0), float((weight * taken.sum(1)).sum())


CASES = {
    # name: mode, rule, draws, drafters
    "speculative sampling": ("iid", "ratio", 1, 1),
    "with replacement": ("iid", "ratio", 3, 1),
    "without replacement": ("without_replacement", "ratio", 3, 1),
    "SpecInfer": ("iid", "ratio", 3, 3),
    "k-SEQ 1": ("iid", "kseq", 1, 1),
    "k-SEQ": ("iid", "kseq", 3, 1),
}


@pytest.mark.parametrize("kind", ["near", "far", "zeros", "equal"])
@pytest.mark.parametrize("case", CASES)
def test_the_law_is_the_targets(case, kind):
    mode, rule, rounds, drafters = CASES[case]
    zeros = 1 if kind == "zeros" else 0
    if mode == "without_replacement":
        rounds -= zeros  # there is no third token to draw
    p = law(1, 0.5 if kind == "near" else 2.0, zeros)
    q = torch.stack([law(11 + i, 0.5 if kind == "near" else 2.0, zeros) for i in range(drafters)])
    if kind == "equal":
        q = p.expand(drafters, -1)
    source = list(range(drafters)) if drafters > 1 else None
    lists, weight = all_draws(mode, [q[i % drafters] for i in range(rounds)])
    tree = depth_one(lists, q, mode, source)
    got, accepted = first_token_law(tree, weight, p, rule)
    torch.testing.assert_close(got, p, rtol=0, atol=1e-9)
    if kind == "equal":
        assert accepted == pytest.approx(1.0, abs=1e-9)
    elif rounds == 1:
        assert accepted == pytest.approx(float(torch.minimum(p, q[0]).sum()), abs=1e-9)
    elif kind != "zeros":
        assert accepted > float(torch.minimum(p, q[0]).sum()) + 1e-3  # more draws, more accepted


def test_acceptances_of_the_notes():
    """Two draws: the order of the rules, and none but without-replacement, whose
    proposal is another one, may pass the optimum of independent draws."""
    for seed in range(2):
        p, q = law(seed), law(100 + seed)
        rates = {}
        for case in ("speculative sampling", "with replacement", "without replacement", "k-SEQ"):
            mode, rule, _, _ = CASES[case]
            rounds = 1 if case == "speculative sampling" else 2
            lists, weight = all_draws(mode, [q] * rounds)
            rates[case] = first_token_law(depth_one(lists, q[None], mode), weight, p, rule)[1]
        best = best_acceptance(p, q, 2)
        assert rates["speculative sampling"] < rates["with replacement"] <= best + 1e-9
        assert rates["k-SEQ"] <= best + 1e-9
        assert rates["without replacement"] > rates["speculative sampling"]


@pytest.mark.parametrize("guess", [(0,), (2, 1), (2, 0, 1), (1, 1, 2)])
def test_guesses_have_q_one(guess):
    """Any tree that was not drawn, equal siblings too: accepted with the target's own mass."""
    p = law(3, zeros=1)
    tree = make_tree([[0, *guess]], [0] * (1 + len(guess)))
    assert guesses(tree).order[0, 0].tolist() == list(range(1, 1 + len(guess)))
    tree.draws = guesses(tree)
    got, accepted = first_token_law(tree, torch.ones(1).double(), p, "ratio")
    torch.testing.assert_close(got, p, rtol=0, atol=1e-9)
    assert accepted == pytest.approx(float(p[list(set(guess))].sum()), abs=1e-9)


@pytest.mark.parametrize(("mode", "rule"), [("iid", "ratio"), ("without_replacement", "ratio"),
                                            ("iid", "kseq")])  # fmt: skip
def test_two_levels(mode, rule):
    """Two draws, then two below the first and one below the second: the law of both tokens, and of
    the third where the walk reaches a leaf. Every node has distributions of its own."""
    p0, q0 = law(1), law(2)
    q1 = torch.stack([law(20 + x) for x in range(V)])
    p1 = torch.stack([law(40 + x) for x in range(V)])
    lists, weight = all_draws(mode, [q0, q0])
    two, one = ([all_draws(mode, [q1[x]] * n) for x in range(V)] for n in (2, 1))
    rows, w = [], []
    for xs, wx in zip(lists, weight, strict=True):
        first, second = (list(zip(*d, strict=True)) for d in (two[xs[0]], one[xs[1]]))
        for (left, wl), (right, wr) in itertools.product(first, second):
            rows.append((xs, left, right))
            w.append(float(wx * wl * wr))
    w = torch.tensor(w, dtype=torch.float64)
    assert float(w.sum()) == pytest.approx(1, abs=1e-12)
    # Nodes: root, two children, two below the one and one below the other.
    tokens = [[0, *xs, *left, *right] for xs, left, right in rows]
    order = torch.tensor([[1, 2], [3, 4], [5, -1]] + [[-1, -1]] * 3).expand(len(rows), -1, -1)
    log_q = [torch.stack([q0, q1[xs[0]], q1[xs[1]]]).log() for xs, _, _ in rows]
    log_p = [torch.stack([p0, p1[xs[0]], p1[xs[1]], *[law(60)] * 3]).log() for xs, _, _ in rows]
    tree = make_tree(tokens, [0, 0, 0, 1, 1, 2])
    tree.draws = Draws(order, mode, torch.stack(log_q)[:, :, None])
    scores, n = torch.stack(log_p), len(rows)
    walk = functools.partial(step_law, scores, tree, 2, rule)
    u = torch.full((n, 3, 3), 0.5).double()
    taken, drawn = walk(order[:, 0], 0, u)
    pair = torch.zeros(V, V).double()
    ended = (w[:, None] * drawn).sum(0)  # stopped at depth 0: one token only
    for r in range(2):
        lead = u.clone()
        lead[:, 0, :r], lead[:, 0, r] = HIGH, LOW
        reached = w * taken[:, r]
        got = verify_ratio(scores, tree, lead, 2, rule)
        x = tree.tokens[:, 1 + r]
        live = reached > 1e-8  # thresholds are known to 6e-11
        assert (got.count >= 1)[live].all() and torch.equal(got.tokens[live, 0], x[live])
        child = order[:, 1 + r]
        below_taken, below_drawn = walk(child, 1, lead)
        token = tree.tokens.gather(1, child.clamp(min=0))
        second = below_drawn.scatter_add(1, token, below_taken)
        pair.index_add_(0, x, reached[:, None] * second)
    first = ended + pair.sum(1)
    torch.testing.assert_close(first, p0, rtol=0, atol=1e-8)
    torch.testing.assert_close(pair / pair.sum(1, keepdim=True), p1, rtol=0, atol=1e-8)
    # At a leaf the next token is the target's own.
    lead = torch.full((n, 3, 3), LOW).double()
    assert (verify_ratio(scores, tree, lead, 2, rule).count == 2).all()
    _, leaf = walk(order[:, 3, :0], 2, lead)
    torch.testing.assert_close(leaf, law(60).expand(n, -1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("fault", ["merged siblings", "pruned draw", "pseudo-q", "likelier of two"])
def test_known_biases_are_seen(fault):
    """The enumeration is no formality: the classical mistakes shift the law by far more than it
    tolerates. Each is made in the draws, so the shipped rule runs on wrong claims."""
    p, q = law(1), law(2)
    lists, weight = all_draws("iid", [q, q])
    if fault == "merged siblings":
        tree = depth_one(lists, q[None], "iid")
        for row, xs in enumerate(lists):
            if xs[0] == xs[1]:
                tree.draws.order[row, 0, 1] = -1  # the second draw lost its round
    elif fault == "pruned draw":  # the likelier of the two by the target is kept, as one draw
        lists = [(max(xs, key=lambda x: float(p[x])),) for xs in lists]
        tree = depth_one(lists, q[None], "iid")
    elif fault == "likelier of two":  # by the drafter
        lists = [(max(xs, key=lambda x: float(q[x])),) for xs in lists]
        tree = depth_one(lists, q[None], "iid")
    else:  # the two likeliest, as if drawn from q among themselves
        top = q.topk(2).indices
        pseudo = torch.zeros(V).double()
        pseudo[top] = q[top] / q[top].sum()
        lists, weight = [tuple(top.tolist())], torch.ones(1).double()
        tree = depth_one(lists, pseudo[None], "without_replacement")
    got, _ = first_token_law(tree, weight, p, "ratio")
    assert float((got - p).abs().sum() / 2) > 0.01


@pytest.mark.parametrize(("mode", "rule"), [("iid", "ratio"), ("iid", "kseq")])
def test_equal_draws_may_share_a_node(mode, rule):
    """Sharing the forward changes nothing, as long as each keeps its round."""
    p, q = law(1), law(2)
    lists, _ = all_draws(mode, [q] * 3)
    own, shared = depth_one(lists, q[None], mode), depth_one(lists, q[None], mode)
    for row, xs in enumerate(lists):
        first = [xs.index(x) for x in xs]
        shared.draws.order = shared.draws.order.clone()
        shared.draws.order[row, 0] = 1 + torch.tensor(first)
        shared.valid[row, 1:] = torch.tensor([i == f for i, f in enumerate(first)])
    random = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        u = torch.rand(len(lists), 2, 4, generator=random, dtype=torch.float64)
        scores = p.log().expand(len(lists), 4, -1)
        a, b = (verify_ratio(scores, tree, u, 1, rule) for tree in (own, shared))
        assert torch.equal(a.count, b.count) and torch.equal(a.tokens[:, 0], b.tokens[:, 0])
        seen |= set(a.path[a.count == 1, 1].tolist())
    assert seen == {1, 2, 3}


def test_kseq_wants_independent_draws():
    lists, _ = all_draws("without_replacement", [law(2)] * 2)
    tree = depth_one(lists, law(2)[None], "without_replacement")
    with pytest.raises(InputError, match="kseq"):
        verify_ratio(law(1).log().expand(len(lists), 3, -1), tree,
                     torch.full((len(lists), 2, 3), 0.5).double(), 1, "kseq")  # fmt: skip


def test_the_optimum_is_that_of_all_sets():
    for seed, k in itertools.product(range(4), (1, 2, 5)):
        p, q = law(seed, zeros=seed % 2), law(100 + seed, zeros=seed // 2)
        sets = itertools.product((0.0, 1.0), repeat=V)
        sets = torch.tensor(list(sets), dtype=torch.float64)
        best = float((sets @ p + 1 - (sets @ q) ** k).min())
        assert best_acceptance(p, q, k) == pytest.approx(best, abs=1e-12)
        if k == 1:
            assert best == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-12)


def test_draw_inverts_the_distribution():
    p = law(5, zeros=1)
    u = (torch.arange(100000).double() + 0.5) / 100000
    share = torch.bincount(draw(p, u), minlength=V) / 100000
    torch.testing.assert_close(share, p, rtol=0, atol=1e-4, check_dtype=False)
    last = torch.tensor([0.5, 0.5, 0.0]).double()
    assert draw(last, torch.tensor([1.0 - 2**-53]).double()).tolist() == [1]
    assert draw(3 * p, u[::1000]).tolist() == draw(p, u[::1000]).tolist()


def test_private_numbers_are_private():
    """Uniform, and unrelated to the noise that tokens are chosen with and to each other."""
    seeds, position = torch.arange(300), torch.arange(20).expand(300, -1)
    a = private_uniform(seeds, DRAWING, position, 20)
    b = private_uniform(seeds, ACCEPTING, position, 20)
    noise = (-(-gumbel(seeds, position, 20)).exp()).exp()
    n = a.numel()
    grid = (torch.arange(n) + 0.5) / n
    for x in (a, b):  # Kolmogorov and Smirnov at 1e-4
        assert (x.flatten().sort().values - grid).abs().max() < (9.9 / 2 / n) ** 0.5
    for x, y in itertools.combinations((a, b, noise), 2):
        for shift in (0, 1):
            both = torch.stack([x[:, shift:].flatten(), y[:, : 20 - shift].flatten()])
            assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / (n - 300 * 20 * shift) ** 0.5
    assert torch.equal(a[7:8], private_uniform(seeds[7:8], DRAWING, position[7:8], 20))
