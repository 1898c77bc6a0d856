"""The baselines that draft without a network: against brute force, and inside the loop."""

from collections import Counter

import pytest
import torch
from models import VOCAB, alone, prompts, settings, tiny

from redrafter.contracts import InputError, RowState
from redrafter.decode.noise import gumbel
from redrafter.decode.speculative import speculative
from redrafter.drafters.bigram import CountedBigrams, count_bigrams
from redrafter.drafters.lookup import PromptLookup, chain_scores, find_match


def known_rows(rows: list[list[int]], room: int = 6) -> RowState:
    """Rows as the loop holds them; what lies past a row's end is stale and must not be read."""
    width = max(map(len, rows)) + room
    # Stale content repeats the row's own end: whoever looks at it finds a match there.
    ids = torch.tensor([(row + row[-3:] * width)[:width] for row in rows])
    length = torch.tensor([len(row) for row in rows])
    return RowState(ids, length, length.clone(), torch.ones(len(rows), dtype=torch.bool))


def brute_force_lookup(
    row: list[int], max_ngram: int, depth: int, occurrence: str = "leftmost"
) -> tuple[list[int], int]:
    for n in range(max_ngram, 0, -1):
        starts = range(len(row) - n)
        for start in starts if occurrence == "leftmost" else reversed(starts):
            if row[start : start + n] == row[-n:]:
                return row[start + n : start + n + depth], n
    return [], 0


def small_rows(count: int = 60, vocab: int = 3) -> list[list[int]]:
    random = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 14, (count,), generator=random).tolist()
    return [torch.randint(vocab, (n,), generator=random).tolist() for n in lengths]


# ---------------------------------------------------------------- prompt lookup


@pytest.mark.parametrize("occurrence", ["leftmost", "recent"])
@pytest.mark.parametrize("max_ngram", [1, 3, 20])
def test_match_is_brute_forces(max_ngram, occurrence):
    rows = small_rows()
    seqs = known_rows(rows)
    place, ngram = find_match(seqs.ids, seqs.length, max_ngram, occurrence)
    found = Counter()
    for row, at, n in zip(rows, place.tolist(), ngram.tolist(), strict=True):
        tokens, expected = brute_force_lookup(row, max_ngram, 4, occurrence)
        assert n == expected
        assert not n or row[at : at + 4] == tokens
        found[n] += 1
    assert found[0] and found[1], "the rows must show both a match and none"


def test_occurrences_by_hand():
    row = [[5, 6, 7, 5, 6, 8, 5, 6]]
    for occurrence, copied in (("leftmost", [7, 5]), ("recent", [8, 5])):
        drafter = PromptLookup(2, 3, occurrence)
        drafter.begin(known_rows(row))
        drafter.start()
        for level in (1, 2):
            drafter.extend(level)
        assert drafter.tree().tokens.tolist() == [[6, *copied]]
    assert PromptLookup().occurrence == "leftmost", "the original's, and that of all results so far"
    with pytest.raises(InputError, match="'first' is none of"):
        PromptLookup(occurrence="first")


@pytest.mark.parametrize("occurrence", ["leftmost", "recent"])
@pytest.mark.parametrize("levels", [0, 1, 5])
def test_lookup_tree_is_the_copied_chain(levels, occurrence):
    rows = small_rows()
    drafter = PromptLookup(depth=5, max_ngram=3, occurrence=occurrence)
    drafter.begin(known_rows(rows))
    drafter.start()
    features = []
    for level in range(1, levels + 1):
        features.append(drafter.features())  # of the level to come
        drafter.extend(level)
    tree = drafter.tree()
    assert tree.n_nodes <= 1 + levels
    for b, row in enumerate(rows):
        tokens, n = brute_force_lookup(row, 3, levels, occurrence)
        valid = tree.valid[b].tolist()
        assert tree.tokens[b, tree.valid[b]].tolist() == [row[-1], *tokens]
        assert valid == sorted(valid, reverse=True), "a chain has no holes"
        shown = [int(f[b, 0]) for f in features]
        left = [int(f[b, 1]) for f in features]
        whole = brute_force_lookup(row, 3, 5, occurrence)[0]
        assert left == [max(len(whole) - k, 0) for k in range(levels)]
        assert shown == [n if k < len(tokens) else 0 for k in range(levels)]


def test_lookup_without_a_match_verifies_the_root_alone():
    drafter = PromptLookup()
    drafter.begin(known_rows([[1, 2, 3, 4], [5, 6, 7]]))
    drafter.start()
    for level in range(1, 11):
        drafter.extend(level)
    assert drafter.tree().n_nodes == 1


# ---------------------------------------------------------------- bigrams


def test_bigram_tree_keeps_the_best_paths_of_every_level():
    # After 0 come 1 (3 of 4) and 2; after 1 come 3, 4; after 2 comes 5 alone: of the level below,
    # (1, 3) .75 * .6 and (1, 4) .75 * .4 beat (2, 5) .25.
    rows = [[0, 1]] * 3 + [[0, 2]] + [[1, 3]] * 3 + [[1, 4]] * 2 + [[2, 5]]
    drafter = CountedBigrams(count_bigrams(rows, 6, width=3), width=2, depth=3)
    drafter.begin(known_rows([[0], [2]]))
    drafter.start()
    for level in (1, 2, 3):
        drafter.extend(level)
    tree = drafter.tree()
    assert tree.tokens[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert tree.parent[0, :5].tolist() == [0, 0, 0, 1, 1]
    assert tree.depth[0].tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert tree.valid[0].tolist() == [True] * 5 + [False] * 2, "nothing ever followed 3 or 4"
    assert tree.valid[1].tolist() == [True, True] + [False] * 5
    assert torch.allclose(tree.log_q[0, 3:5].exp(), torch.tensor([0.45, 0.3]))


# ---------------------------------------------------------------- inside the loop


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("which", ["lookup", "recent", "bigram"])
def test_baselines_change_nothing_and_accept_something(which, sampled):
    target, rows = tiny("llama"), prompts()
    rows[0] = rows[0] * 3  # something to look up
    config = settings(do_sample=sampled)
    texts, finish = alone(target, rows, config)
    whole = [row + text for row, text in zip(rows, texts, strict=True)]
    table = count_bigrams(whole, VOCAB, 3)
    drafter = {
        "lookup": PromptLookup(4),
        "recent": PromptLookup(4, occurrence="recent"),
        "bigram": CountedBigrams(table, 3, 3),
    }[which]
    made = speculative(target, rows, config, seeds=range(len(rows)), drafter=drafter)
    assert (made.tokens, made.finish) == (texts, finish)
    assert made.stats.drafted_at[0] > 0
    assert made.stats.accepted_at[0] > 0 or which != "bigram"
    # A row's draft does not depend on its neighbours.
    single = [
        speculative(target, [row], config, seeds=[i], drafter=drafter).stats.accepted_at
        for i, row in enumerate(rows)
    ]
    assert made.stats.accepted_at == [sum(level) for level in zip(*single, strict=True)]


def test_scores_of_a_chain_are_chances():
    """Without noise r per token; with noise, on average over it, the same, and more where the
    noise is in its favour: against Gumbel and argmax themselves."""
    matched, tokens = torch.tensor([0, 3]), torch.tensor([[2, 0, 1], [1, 1, 0]])
    log_r = -1 / (1 + matched.double())
    plain = chain_scores(tokens, matched, None)
    want = log_r[:, None] * torch.arange(4)
    torch.testing.assert_close(plain.double(), want, rtol=1e-6, atol=1e-6)
    seeds = torch.arange(20000)
    noise = gumbel(seeds, torch.arange(3).expand(len(seeds), 3), 4)
    for row in range(2):
        r = float(log_r[row].exp())
        p = torch.full((4,), (1 - r) / 3).double()
        p[int(tokens[row, 0])] = r
        wins = (p.log() + noise[:, 0]).argmax(-1) == tokens[row, 0]
        scores = chain_scores(
            tokens[row : row + 1].expand(len(seeds), -1), matched[row].expand(len(seeds)), noise
        )
        chance = scores[:, 1].double().exp()
        assert float(chance.mean()) == pytest.approx(r, abs=0.02)
        for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.0)):
            some = (chance >= low) & (chance < high)
            if some.sum() > 500:
                rate = float(wins[some].double().mean())
                assert rate == pytest.approx(float(chance[some].mean()), abs=0.04)
        assert (scores.diff(dim=1) <= 0).all()
