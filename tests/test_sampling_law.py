"""A sampled token follows the target's distribution: by enumeration, and by counting draws."""

import functools
import itertools
import math

import pytest
import torch
from chi_square import ALPHA, follows, n_draws
from models import alone, endless, make_tree, prompts, replays, settings, tiny

from redrafter.contracts import Drafter, TokenTree
from redrafter.decode import noise as noise_module
from redrafter.decode.noise import _GOLDEN, _MUL_1, _MUL_2, NoiseAhead, gumbel
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.decode.tree import ancestors
from redrafter.decode.verify import choose, verify

# ------------------------------------------------------------------- the noise

P4 = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
P8 = torch.tensor([0.35, 0.25, 0.15, 0.1, 0.06, 0.04, 0.03, 0.02]).double()


def winners(p: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return choose(p.log(), gumbel(seeds, positions, len(p)))


@pytest.mark.parametrize("p", [P4, P8], ids=["4", "8"])
def test_gumbel_and_argmax_draw_from_p(p):
    n = n_draws(len(p))
    count = torch.arange(n)
    assert follows(winners(p, count, torch.tensor([[17]]).expand(n, 1))[:, 0], p)  # over seeds
    assert follows(winners(p, torch.tensor([5]), count[None])[0], p)  # over positions
    side = math.isqrt(n) + 1
    grid = torch.arange(side).expand(side, side)
    assert follows(winners(p, -torch.arange(side), 1000 + grid).flatten(), p)


def test_gumbel_and_argmax_draw_from_a_large_vocabulary():
    vocab, groups = 2000, 8
    random = torch.Generator().manual_seed(0)
    p = torch.rand(vocab, generator=random, dtype=torch.float64) ** 3 + 1e-3
    p /= p.sum()
    for of in (torch.arange(vocab) % groups, torch.arange(vocab) * groups // vocab):
        law = torch.zeros(groups).double().index_add_(0, of, p)
        chunks = torch.arange(n_draws(groups)).split(2000)
        drawn = torch.cat([winners(p, c, torch.zeros(len(c), 1).long())[:, 0] for c in chunks])
        assert follows(of[drawn], law)


def test_draws_of_neighbours_are_independent():
    """Next position, next seed, both, and the same sum of both: pairs fill the product law."""
    p = torch.tensor([0.3, 0.25, 0.25, 0.2]).double()
    pair = (p[:, None] * p).flatten()
    side = math.isqrt(n_draws(len(pair))) + 2
    got = winners(p, torch.arange(side), torch.arange(side).expand(side, side))
    for a, b in (
        (got[:-1], got[1:]),
        (got[:, :-1], got[:, 1:]),
        (got[:-1, :-1], got[1:, 1:]),
        (got[:-1, 1:], got[1:, :-1]),
    ):
        assert follows((a * len(p) + b).flatten(), pair)


def test_noise_is_gumbel_and_uncorrelated():
    noise = gumbel(torch.arange(100), torch.arange(50).expand(100, 50), 100)
    n = noise.numel()
    # Five standard errors of each figure: P < 1e-6
    deviation = math.pi / 6**0.5
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=5 * deviation / n**0.5)
    excess = 12 / 5  # of the Gumbel distribution's kurtosis
    error = 5 * deviation**2 * ((2 + excess) / n) ** 0.5
    assert float(noise.var()) == pytest.approx(deviation**2, abs=error)
    # Kolmogorov and Smirnov: P(D > x / sqrt(n)) -> 2 exp(-2 x^2)
    u = (-(-noise).exp()).exp().flatten().sort().values
    grid = (torch.arange(n) + 0.5) / n
    assert (u - grid).abs().max() < math.sqrt(math.log(2 / ALPHA) / 2 / n)
    z = (noise - noise.mean()) / noise.std()
    for a, b in (
        (z[1:], z[:-1]),
        (z[:, 1:], z[:, :-1]),
        (z[..., 1:], z[..., :-1]),
        (z[1:, 1:], z[:-1, :-1]),
        (z[1:, :-1], z[:-1, 1:]),
        (z[:, 1:, 1:], z[:, :-1, :-1]),
    ):
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5
    assert noise.unique().numel() == n  # no stream runs into another


def test_noise_is_the_same_whatever_the_batch():
    seeds = torch.tensor([3, -1, 2**63 - 1, -(2**63), 0])
    positions = torch.tensor([[4, 5, 6]]) + torch.tensor([0, 7, 1, 100000, 2])[:, None]
    batch = gumbel(seeds, positions, 30)
    for b, t in itertools.product(range(5), range(3)):
        one = gumbel(seeds[b : b + 1], positions[b : b + 1, t : t + 1], 30)
        assert torch.equal(one[0, 0], batch[b, t])
    # A larger vocabulary only appends, so a padded lm_head changes no real token's noise.
    assert torch.equal(gumbel(seeds, positions, 40)[..., :30], batch)


@pytest.mark.parametrize("span", [1, 3, 10])
def test_noise_ahead_is_noise(monkeypatch, span):
    """Rows that advance unequally, one that stands still, blocks used up and replaced."""
    vocab, seeds = 11, torch.tensor([5, -2, 9])
    monkeypatch.setattr(noise_module, "_AHEAD", span * len(seeds) * vocab)
    random = torch.Generator().manual_seed(span)
    source, first = NoiseAhead(seeds, vocab), [7, 0, 30]
    assert source.span == span
    for step in range(60):
        n = 1 + step % 4
        position = torch.tensor(first)[:, None] + torch.arange(n)
        assert torch.equal(source(first, n), gumbel(seeds, position, vocab))
        ahead = torch.randint(5, (2,), generator=random).tolist()
        first = [first[0] + ahead[0], first[1] + ahead[1], first[2]]


@pytest.mark.parametrize("piece", [1, 7, 30, 64])
def test_noise_is_the_same_in_pieces(monkeypatch, piece):
    seeds, positions = torch.tensor([5, -2, 9]), torch.arange(12).view(3, 4)
    whole = gumbel(seeds, positions, 30)
    monkeypatch.setattr(noise_module, "_PIECE", piece)
    turned = positions.t().contiguous().t()  # lies in memory the other way round
    assert torch.equal(gumbel(seeds, turned, 30), whole)
    assert torch.equal(gumbel(seeds, positions, 30), whole)


def test_no_noise_is_computed_twice_on_the_way_forward(monkeypatch):
    vocab, made = 11, []

    def counted(seed, position, vocab_size):
        made.extend(position[0].tolist())
        return gumbel(seed, position, vocab_size)

    monkeypatch.setattr(noise_module, "_AHEAD", 4 * vocab)
    monkeypatch.setattr(noise_module, "gumbel", counted)
    source = NoiseAhead(torch.tensor([5]), vocab)
    for first in (0, 1, 3, 6, 7, 12, 13):
        source([first], 5)
    assert made == list(range(len(made))) and len(made) < 22


def test_noise_ahead_of_a_single_row(monkeypatch):
    """One position at a time and several, mixed, forwards and back: `at` has a shortcut."""
    vocab, seed = 11, torch.tensor([5])
    monkeypatch.setattr(noise_module, "_AHEAD", 4 * vocab)
    source = NoiseAhead(seed, vocab)
    for position, n in [(7, 1), (8, 3), (9, 1), (12, 1), (11, 2), (3, 1), (30, 6), (33, 1)]:
        want = gumbel(seed, torch.arange(position, position + n)[None], vocab)
        got = source.at([position])[:, None] if n == 1 else source([position], n)
        assert torch.equal(got, want)


def test_texts_do_not_depend_on_how_far_ahead(monkeypatch):
    target, rows = tiny("llama"), prompts()
    config = settings(do_sample=True, temperature=1.3)
    want, _ = alone(target, rows, config)
    texts = endless(target, rows, config)
    for span in (1, 2, 7):
        monkeypatch.setattr(noise_module, "_AHEAD", span * len(rows) * target.vocab_size)
        assert plain(target, rows, config, seeds=range(4)).tokens == want
        for drafter in replays(texts).values():
            got = speculative(target, rows, config, seeds=range(4), drafter=drafter)
            assert got.tokens == want


def test_noise_is_finite_at_both_ends():
    """Where all 64 mixed bits are ones, or none: found by running the mixer backwards."""
    word = 1 << 64

    def unshift(x, bits):
        y = x
        for _ in range(64 // bits):
            y = x ^ (y >> bits)
        return y

    def unmix(x):
        x = unshift(x, 31) * pow(_MUL_2 % word, -1, word) % word
        x = unshift(x, 27) * pow(_MUL_1 % word, -1, word) % word
        return unshift(x, 30)

    def signed(x):
        return x - word if x >= word // 2 else x

    golden = _GOLDEN % word
    seed = signed((unmix(0) - golden) % word)  # a seed whose own stream is zero
    for bits, sign in ((word - 1, 1), (0, -1)):
        stream = (unmix(bits) - golden) % word  # token 0
        position = (unmix(stream) * pow(golden, -1, word) - 1) % word
        noise = gumbel(torch.tensor([seed]), torch.tensor([[signed(position)]]), 1)
        assert torch.isfinite(noise).all()
        assert sign * float(noise) > (30 if sign > 0 else 3)


# ------------------------------------------------------------------- verify, by enumeration

SHAPES = {
    # name: vocabulary, tokens, parents, nodes that are padding
    "root only": (5, [0], [0], []),
    "chain": (4, [0, 1, 3, 2], [0, 0, 1, 2], []),
    "two by two": (5, [0, 1, 4, 0, 2, 3, 1], [0, 0, 0, 1, 1, 2, 2], []),
    "equal siblings": (4, [0, 2, 2, 1, 3, 1, 1, 0], [0, 0, 0, 1, 1, 2, 2, 5], []),
    "the same token everywhere": (4, [1, 1, 1, 1, 1], [0, 0, 1, 2, 2], []),
    "true token under a wrong parent": (4, [0, 3, 1, 2, 2, 0], [0, 0, 0, 1, 1, 2], []),
    "padding": (4, [0, 1, 2, 3, 1, 0], [0, 0, 0, 1, 2, 0], [2, 5]),
    "padding above a valid node": (4, [0, 1, 2, 3], [0, 0, 1, 2], [1]),
    "all children": (5, [0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [0] * 6 + [3] * 5, []),
    "depth first": (4, [0, 1, 2, 3, 2, 1], [0, 0, 1, 2, 0, 4], []),
}


@functools.cache
def conditional(vocab: int, prefix: tuple[int, ...]) -> torch.Tensor:
    """A made-up law of the next token, different for every prefix."""
    random = torch.Generator().manual_seed(int.from_bytes(bytes((vocab, *prefix))))
    return torch.rand(vocab, generator=random, dtype=torch.float64).mul(3).softmax(0)


@pytest.mark.parametrize("shape", SHAPES)
def test_verify_by_enumeration(shape):
    """All outcomes of the noise, one row each, weighted by their exact probability.

    The noise of a row makes y_d win at depth d below the true prefix, by a hair: anywhere else
    in the tree other tokens win, so a look at a wrong node or a wrong row of noise shows.
    """
    vocab, tokens, parents, padding = SHAPES[shape]
    n = len(tokens)
    row = make_tree([tokens], parents)
    depth = int(row.depth.max())
    outcomes = list(itertools.product(range(vocab), repeat=depth + 1))
    valid = [[i not in padding for i in range(n)]] * len(outcomes)
    tree = make_tree([tokens] * len(outcomes), parents, valid)

    def path(node):
        return (*path(parents[node]), tokens[node]) if node else ()

    scores = torch.stack([conditional(vocab, path(node)).log() for node in range(n)])
    noise, weight = [], []
    for y in outcomes:
        law = [conditional(vocab, y[:d]) for d in range(depth + 1)]
        win = torch.eye(vocab).double() * 1e-6
        noise.append(torch.stack([win[y[d]] - law[d].log() for d in range(depth + 1)]))
        weight.append(math.prod(float(law[d][y[d]]) for d in range(depth + 1)))
    weight = torch.tensor(weight, dtype=torch.float64)
    scores = scores.expand(len(outcomes), -1, -1)
    verdict = verify(scores, tree, torch.stack(noise), ancestors(tree, depth), depth)

    emitted = []
    reachable = {()}
    for node in range(1, n):
        chain, up = [], node
        while up:
            chain.append(up)
            up = parents[up]
        if not set(chain) & set(padding):
            reachable.add(path(node))
    for i, y in enumerate(outcomes):
        longest = max(d for d in range(depth + 1) if y[:d] in reachable)
        assert verdict.count[i] == longest
        emitted.append(tuple(verdict.tokens[i, : longest + 1].tolist()))
        assert emitted[i] == y[: longest + 1]
        nodes = verdict.path[i].tolist()
        assert nodes[0] == 0 and nodes[longest + 1 :] == [0] * (depth - longest)
        for above, below in itertools.pairwise(nodes[: longest + 1]):
            assert parents[below] == above and below not in padding
    assert {e[:-1] for e in emitted} <= reachable  # the last one is the target's own

    def mass(prefix):
        same = [e[: len(prefix)] == prefix for e in emitted]
        return float(weight[torch.tensor(same)].sum())

    # The law of each emitted token, given the tokens before it
    assert mass(()) == pytest.approx(1, abs=1e-12)
    for prefix in reachable:
        below = [mass((*prefix, v)) for v in range(vocab)]
        law = torch.tensor(below, dtype=torch.float64) / sum(below)
        torch.testing.assert_close(law, conditional(vocab, prefix), rtol=0, atol=1e-12)
    # Greedy is the same walk along the scores alone.
    greedy = verify(scores[:1], make_tree([tokens], parents, valid[:1]), None,
                    ancestors(row, depth), depth)  # fmt: skip
    said = ()
    while said in reachable:
        said = (*said, int(conditional(vocab, said).argmax()))
    assert tuple(greedy.tokens[0, : len(said)].tolist()) == said
    assert int(greedy.count[0]) == len(said) - 1


def test_verify_gives_the_same_text_for_every_tree():
    """One noise, every shape of one vocabulary: the texts are prefixes of one another."""
    vocab, depth = 4, 3
    noise = gumbel(torch.arange(200), torch.arange(depth + 1).expand(200, -1), vocab)
    texts = [()] * 200
    for v, tokens, parents, padding in SHAPES.values():
        if v != vocab:
            continue
        tree = make_tree([tokens] * 200, parents, [i not in padding for i in range(len(tokens))])

        def path(node, tokens=tokens, parents=parents):
            return (*path(parents[node]), tokens[node]) if node else ()

        table = [conditional(vocab, path(node)).log() for node in range(len(tokens))]
        scores = torch.stack(table).expand(200, -1, -1)
        verdict = verify(scores, tree, noise, ancestors(tree, depth), depth)
        for i, count in enumerate(verdict.count.tolist()):
            text = tuple(verdict.tokens[i, : count + 1].tolist())
            n = min(len(text), len(texts[i]))
            assert text[:n] == texts[i][:n]
            texts[i] = max(text, texts[i], key=len)
    assert max(map(len, texts)) == depth + 1


# ------------------------------------------------------------------- end to end


class Menu(Drafter):
    """Two guesses below each of two guesses, from a distribution q of its own.

    coupled: it guesses with the verifier's own noise, which a membership rule allows
    """

    max_depth, max_nodes = 2, 7

    def __init__(self, q: torch.Tensor, coupled: bool):
        self.log_q, self.coupled = q.log(), coupled

    def start(self):
        self.levels = []

    def extend(self, level):
        scores = self.log_q + (self.seqs.noise[:, level - 1] if self.coupled else 0)
        best = scores.expand(len(self.seqs.ids), -1).topk(2).indices
        self.levels.append(best if level == 1 else best.repeat(1, 2))

    def tree(self):
        tokens = torch.cat([self.seqs.root[:, None], *self.levels], 1)
        shape = make_tree([[0] * 7], [0, 0, 0, 1, 1, 2, 2])
        parent, depth = (x.expand_as(tokens).clone() for x in (shape.parent, shape.depth))
        return TokenTree(tokens, parent, depth, torch.ones_like(tokens, dtype=torch.bool))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "fixed guesses", "coupled guesses"])
def test_first_tokens_end_to_end(how):
    """Seeds as rows: the first tokens of texts, against the model's own exact law of them."""
    vocab, prompt, temperature = 8, [3, 1, 4], 1.2
    target = tiny("llama", vocab_size=vocab, hidden_size=16, num_hidden_layers=1,
                  initializer_range=0.25)  # fmt: skip
    config = settings(do_sample=True, temperature=temperature, max_new_tokens=3, eos_token_id=-1)

    def law(prefixes):  # (n, T) -> (n, V), one plain forward
        logits = target.project(target.states(torch.tensor(prefixes))[:, -1])
        return (logits / temperature).softmax(-1)

    p1 = law([prompt])[0]
    p2 = law([[*prompt, a] for a in range(vocab)])
    p3 = law([[*prompt, a, b] for a in range(vocab) for b in range(vocab)]).view(vocab, vocab, -1)
    joint12 = p1[:, None] * p2
    joint23 = torch.einsum("a,ab,abc->bc", p1, p2, p3)
    rarest = float(min(joint12.min(), joint23.min()))
    n = max(n_draws(vocab**2), math.ceil(5 / rarest))  # what Pearson's statistic needs of a cell
    drafter = None if how == "plain" else Menu((p1 @ p2) ** 0.3, "coupled" in how)
    texts, accepted, rows = [], torch.zeros(2), 4000
    for start in range(0, n, rows):
        seeds = range(start, start + rows)
        decode = plain if how == "plain" else speculative
        got = decode(target, [prompt] * rows, config, seeds=seeds, drafter=drafter)
        texts += got.tokens
        if drafter:
            accepted += torch.tensor(got.stats.accepted_at)
    if drafter:  # guesses of either level are accepted, and not always
        share = accepted / len(texts)
        assert (share > 0.1).all() and (share < 0.99).all()
    y1, y2, y3 = torch.tensor(texts).T
    assert follows(y1, p1)
    assert follows(y1 * vocab + y2, joint12.flatten())
    assert follows(y2 * vocab + y3, joint23.flatten())
