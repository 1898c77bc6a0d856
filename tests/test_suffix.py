"""The suffix automaton against brute force and by counted operations; its drafter in the loop."""

import functools

import pytest
import torch
from models import Recorder, alone, prompts, settings, tiny

from redrafter.contracts import InputError, RowState, Truth
from redrafter.decode.speculative import speculative
from redrafter.drafters.suffix import Cursor, ReferenceTexts, SuffixAutomaton, SuffixDrafter


def random_text(n: int, vocab: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (n,), generator=random).tolist()


def fibonacci_word(n: int) -> list[int]:
    a, b = [0], [0, 1]
    while len(b) < n:
        a, b = b, b + a
    return b[:n]


def places(text: list[int], string: list[int], ends: bool) -> list[int]:
    """Positions behind the occurrences of a string, the one at the text's end only if `ends`."""
    last = len(text) + ends
    return [e for e in range(len(string), last) if text[e - len(string) : e] == string]


def brute_force_match(text: list[int]) -> tuple[int, int]:
    """Position behind the most recent earlier occurrence of the longest such suffix; its length."""
    for n in range(len(text) - 1, 0, -1):
        found = places(text, text[-n:], ends=False)
        if found:
            return found[-1], n
    return 0, 0


def texts(count: int = 40) -> list[list[int]]:
    """Over 1 to 5 letters, and a few that repeat."""
    rows = [random_text(30, 1 + i % 5, i) for i in range(count)]
    return rows + [fibonacci_word(60), [0, 1, 2] * 12, [0] * 30, [0, 0, 1] * 8 + [0, 1, 0, 0, 1]]


# ---------------------------------------------------------------- the automaton


@pytest.mark.parametrize("refresh_links", [None, 1, 0])
def test_match_is_brute_forces_after_every_token(refresh_links):
    lengths = set()
    for text in texts():
        automaton = SuffixAutomaton(refresh_links=refresh_links)
        for n, token in enumerate(text, start=1):
            automaton.extend(token)
            place, length = brute_force_match(text[:n])
            assert automaton.match[1] == length
            if refresh_links is None:
                assert automaton.match == (place, length)
            elif length:  # any earlier occurrence
                assert automaton.match[0] in places(text[:n], text[n - length : n], ends=False)
            lengths.add(length)
    assert lengths >= set(range(20)), "short and long matches, and none"


def test_hand_written_matches():
    # (1 2) stood at 0 (then 9) and at 3 (then 8): the most recent one goes on with 8.
    automaton = SuffixAutomaton([1, 2, 9, 1, 2, 8, 1, 2])
    assert automaton.match == (5, 2)
    assert automaton.continuation(2) == [8, 1]
    assert SuffixAutomaton().continuation(3) == SuffixAutomaton([4]).continuation(3) == []
    assert SuffixAutomaton([1, 2, 3, 4]).match == (0, 0), "a suffix does not match itself"
    # The earlier occurrence may overlap the suffix, and the copy may overlap the text's end.
    loop = SuffixAutomaton([7, 1, 2, 1, 2, 1])
    assert loop.match == (4, 3)
    assert loop.continuation(5) == [2, 1, 2, 1, 2]
    assert SuffixAutomaton([3, 3]).continuation(3) == [3, 3, 3]


def test_continuation_is_the_copy_behind_the_match():
    for text in texts():
        automaton = SuffixAutomaton(text, refresh_links=None)
        place, length = brute_force_match(text)
        copied = list(text)
        for i in range(40 if length else 0):
            copied.append(copied[place + i])  # token by token, so that it may overlap
        assert automaton.continuation(40) == copied[len(text) :]


STRINGS = {
    "random2": lambda n: random_text(n, 2),
    "random50": lambda n: random_text(n, 50),
    "random5000": lambda n: random_text(n, 5000),
    "run": lambda n: [0] * n,
    "period3": lambda n: [0, 1, 2] * (n // 3),
    "period997": lambda n: (random_text(997, 40) * (1 + n // 997))[:n],
    "fibonacci": fibonacci_word,
    "a^n b^n": lambda n: [0] * (n // 2) + [1] * (n // 2),
    "every token once": lambda n: list(range(n)),
}


@pytest.mark.parametrize("name", STRINGS)
def test_operations_are_linear(name):
    """Per token at most 2 states, 3 transitions, 1 redirected one, 4 occurrences noted."""
    for n in (1000, 10_000, 100_000):
        text = STRINGS[name](n)
        automaton = SuffixAutomaton(text)
        assert len(text) <= automaton.operations <= 12 * len(text)
        assert len(automaton.next) <= 2 * len(text)
        assert sum(map(len, automaton.next)) <= 3 * len(text)
        # The same text again, shifted, is a match that grows and breaks.
        cursor = Cursor(automaton)
        for token in text[n // 3 :] + text[: n // 3]:
            cursor.advance(token)
        assert cursor.operations <= 2 * len(text)


# ---------------------------------------------------------------- reference texts


def test_cursor_carries_the_longest_match():
    for seed in range(20):
        rows = [random_text(25, 3, seed), random_text(12, 3, 100 + seed), []]
        reference = ReferenceTexts(rows)
        text = random_text(30, 4, 200 + seed)  # the letter 3 is in none of them
        cursor = Cursor(reference.automaton)
        for n, token in enumerate(text, start=1):
            cursor.advance(token)
            want = max(
                k for k in range(n + 1) if any(places(row, text[n - k : n], True) for row in rows)
            )
            assert cursor.length == want


def test_reference_continuation_is_the_most_frequent():
    for seed in range(20):
        rows = [random_text(25, 3, seed), random_text(12, 3, 100 + seed)]
        reference = ReferenceTexts(rows)
        cursor = Cursor(reference.automaton)
        for token in random_text(30, 3, 200 + seed):
            cursor.advance(token)
            state = cursor.state
            shown: list[int] = []
            # One occurrence of the match: where its state was first seen.
            at = reference.automaton.recent[state]
            string = reference.automaton.text[at - cursor.length : at]
            for _ in range(4):
                counts = [sum(len(places(r, string + [t], True)) for r in rows) for t in range(3)]
                if not any(counts):
                    break
                shown.append(counts.index(max(counts)))
                string = string + shown[-1:]
            assert reference.continuation(state, 4) == shown


def test_reference_texts_do_not_run_into_each_other():
    reference = ReferenceTexts([[1, 2], [3, 4]])
    cursor = Cursor(reference.automaton)
    cursor.advance(1)
    assert reference.continuation(cursor.state, 5) == [2]
    cursor.advance(2)
    assert reference.continuation(cursor.state, 5) == []
    cursor.advance(3)
    assert cursor.length == 1
    with pytest.raises(InputError, match="reference text 1 has the token id -1"):
        ReferenceTexts([[1], [2, -1]])


# ---------------------------------------------------------------- the drafter's tree


def drafted(drafter: SuffixDrafter, rows: list[list[int]], levels: int | None = None, live=None):
    """Per row what is drafted after it, and the features of every level."""
    width = max(map(len, rows)) + 6
    ids = torch.tensor([(row + row[-1:] * width)[:width] for row in rows])  # stale behind the end
    length = torch.tensor([len(row) for row in rows])
    live = torch.tensor(live or [True] * len(rows))
    seqs = RowState(ids, length, length.clone(), live)
    drafter.begin(seqs)
    drafter.start()
    levels = drafter.max_depth if levels is None else levels
    features = []
    for level in range(1, levels + 1):
        features.append(drafter.features()[:, :2].tolist())  # of the level to come
        drafter.extend(level)
    tree = drafter.tree()
    assert tree.n_nodes <= 1 + levels
    assert tree.tokens[:, 0].tolist() == [row[-1] for row in rows]
    assert (tree.parent == (tree.depth - 1).clamp(min=0)).all()
    chains = [tree.tokens[b, tree.valid[b]].tolist()[1:] for b in range(len(rows))]
    return chains, features


def test_draft_length_follows_the_match():
    rows = [[1, 2, 3, 4, 5, 6, 9, 1], [1, 2, 3, 4, 5, 6, 9, 1, 2, 3], [1, 2, 3]]
    chains, features = drafted(SuffixDrafter(8, factor=1.5), rows)
    assert chains == [[2], [4, 5, 6, 9], []]
    assert [level[0] for level in features] == [[1, 1]] + [[0, 0]] * 7
    assert [level[1] for level in features] == [[1, 3]] * 4 + [[0, 0]] * 4
    assert drafted(SuffixDrafter(3, factor=1.5), rows)[0] == [[2], [4, 5, 6], []], "max depth"
    assert drafted(SuffixDrafter(8, factor=0.1), rows)[0] == [[2], [4], []], "at least one"
    assert drafted(SuffixDrafter(8, 2, factor=1.5), rows)[0] == [[], [4, 5, 6, 9], []], "min match"
    assert drafted(SuffixDrafter(8, 4, factor=1.5), rows)[0] == [[], [], []]
    assert drafted(SuffixDrafter(8, factor=float("inf")), rows[1:2])[0] == [
        [4, 5, 6, 9, 1, 2, 3, 4]
    ]
    assert drafted(SuffixDrafter(8, factor=1.5), rows, levels=2)[0] == [[2], [4, 5], []]
    assert drafted(SuffixDrafter(8), rows, levels=0)[0] == [[], [], []]


def test_the_longer_match_wins_own_text_on_ties():
    reference = ReferenceTexts([[1, 2, 3, 7, 7], [1, 2, 3, 7], [1, 2, 3, 6]])
    drafter = SuffixDrafter(4, factor=1, reference=reference)
    rows = [[2, 3, 8, 1, 2, 3], [1, 2, 3, 8, 1, 2, 3], [9, 8, 7], [4, 5]]
    chains, features = drafted(drafter, rows)
    # Three tokens against the own two; three and three; only the reference; none.
    assert chains == [[7, 7], [8, 1, 2], [7], []]
    assert features[0] == [[2, 3], [1, 3], [2, 1], [0, 0]]


def test_own_text_steps_in_where_the_longer_match_ends_its_text():
    drafter = SuffixDrafter(2, factor=1, reference=ReferenceTexts([[1, 2, 3]]))
    chains, features = drafted(drafter, [[3, 8, 1, 2, 3], [5, 2, 3]])
    assert chains == [[8], []]
    assert features[0] == [[1, 1], [0, 0]]


def test_finished_rows_draft_and_learn_nothing():
    rows = [[1, 2, 1, 2], [1, 2, 1, 2]]
    drafter = SuffixDrafter(3)
    assert drafted(drafter, rows, live=[True, False])[0] == [[1, 2, 1], []]
    drafter.observe(Truth(torch.tensor([[1, 3, 5], [1, 3, 5]]), torch.tensor([2, 0])))
    assert [row.own.text for row in drafter.rows] == [[1, 2, 1, 2, 1, 3], [1, 2, 1, 2]]


def test_begin_forgets_the_last_generation():
    reference = ReferenceTexts([[5, 6, 7]])
    before = (list(map(dict, reference.automaton.next)), list(reference.automaton.recent))
    drafter = SuffixDrafter(3, reference=reference)
    assert drafted(drafter, [[1, 2, 1], [3, 4, 3]])[0] == [[2, 1], [4, 3]]
    # Neither the neighbour nor the row of before has taught anything.
    assert drafted(drafter, [[3], [1], [8, 3, 1]])[0] == [[], [], []]
    assert drafted(drafter, [[5], [5, 6]])[0] == [[6, 7], [7]]
    assert (reference.automaton.next, reference.automaton.recent) == before


@pytest.mark.parametrize("wrong", [dict(depth=0), dict(min_match=0), dict(factor=0.0)])
def test_options_are_checked(wrong):
    with pytest.raises(InputError, match="must be positive"):
        SuffixDrafter(**wrong)


# ---------------------------------------------------------------- inside the loop


@functools.cache
def looping(sampled: bool, eos: bool):
    """A ragged batch with repeats to look up, its settings and what `plain` says alone."""
    target, rows = tiny("llama"), prompts()
    rows = [rows[0] * 3, rows[1], rows[2] * 2, rows[3]]
    changes = {} if eos else {"eos_token_id": -1}
    config = settings(do_sample=sampled, **changes)
    return target, rows, config, alone(target, rows, config)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("which", ["own", "reference", "others"])
def test_drafter_changes_nothing(which, eos, sampled):
    target, rows, config, (want, finish) = looping(sampled, eos)
    whole = [row + text for row, text in zip(rows, want, strict=True)]
    given = {"own": None, "reference": whole, "others": [row[::-1] for row in whole]}[which]
    reference = given and ReferenceTexts(given)
    recorder = Recorder(SuffixDrafter(6, factor=3.0, reference=reference))
    seeds = range(len(rows))
    made = speculative(target, rows, config, seeds=seeds, drafter=recorder)
    assert (made.tokens, made.finish) == (want, finish)
    assert made.stats.drafted_at[0] > 0
    if which == "reference":
        assert made.stats.tokens_per_step > 3, "it has read the answers"
    # The automata hold what was reported: all but the tokens of a row's last step.
    for row, text in zip(recorder.inner.rows, whole, strict=True):
        assert row.own.text == text[: len(row.own.text)]
    # A row's draft depends neither on its neighbours nor on the generation before.
    single = [
        speculative(target, [row], config, seeds=[i], drafter=recorder.inner).stats.accepted_at
        for i, row in enumerate(rows)
    ]
    assert made.stats.accepted_at == [sum(level) for level in zip(*single, strict=True)]


def test_a_looping_text_is_drafted_to_full_depth():
    """A target that falls into runs of one token."""
    target = tiny("llama")
    row = prompts((6,))[0]
    config = settings(max_new_tokens=50, eos_token_id=-1, repetition_penalty=0.5)
    (want,), _ = alone(target, [row], config)
    assert len(set(want[-20:])) < 6, "it loops"
    made = speculative(target, [row], config, drafter=SuffixDrafter(8))
    assert made.tokens == [want]
    assert made.stats.accepted_at[7] > 0 and made.stats.tokens_per_step > 1.5
