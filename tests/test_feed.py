"""What a draft head learns from, position by position: against arrays written by hand.

The rows are written into a store of states by hand. The state at position t of row r is
(1000 r + t, its negative), so that a batch tells which positions it was made of.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from redrafter.contracts import InputError
from redrafter.data.reading import Stored, epoch_order
from redrafter.data.store import Job, Store
from redrafter.training.feed import Feed, frequent_ids

X = -7  # in expected arrays: masked, so it does not matter what stands there


@dataclass
class Frozen:
    """As much of a target as a feed needs."""

    vocab_size: int = 1000
    hidden_size: int = 2
    dtype: torch.dtype = torch.float64
    device: str = "cpu"


@dataclass
class Row:
    """ids; learned: one character per token, "#" where it is supervised; says: per token what the
    target goes on with, "" where nothing was asked."""

    ids: list[int]
    learned: str
    says: list[list[int]] | None = None


def write_store(folder, rows, first=0, rows_per_shard=2, states_as=torch.float64):
    """A store of states of `rows`, the first of which is row number `first`."""
    job = Job(folder, "states", {"by": "hand", "first": first})
    starts = range(0, len(rows), rows_per_shard)
    for index, begin in enumerate(starts):
        own = rows[begin : begin + rows_per_shard]
        number = [
            1000 * (first + begin + i) + t for i, r in enumerate(own) for t in range(len(r.ids))
        ]
        columns = {
            "row": torch.arange(begin, begin + len(own)),
            "source_row": torch.arange(begin, begin + len(own)),
            "length": torch.tensor([len(r.ids) for r in own], dtype=torch.int32),
            "tokens": torch.tensor([t for r in own for t in r.ids], dtype=torch.int32),
            "supervised": torch.tensor([c == "#" for r in own for c in r.learned]),
            "states": torch.tensor([[n, -n] for n in number], dtype=states_as),
        }
        if own[0].says is not None:
            says = [s for r in own for s in r.says]
            width = max(len(s) for r in rows for s in r.says)
            padded = [s + [-1] * (width - len(s)) for s in says]
            columns["continuation"] = torch.tensor(padded, dtype=torch.int32)
        job.write(index, columns)
    job.finish(len(starts))
    return Stored(Store(folder))


def feed_of(*parts, depth=3, positions=1, seed=0, weights=None, **options):
    return Feed(Frozen(), parts, weights, positions=positions, depth=depth, seed=seed, **options)


def starts_in(batch):
    """1000 * row + t of every start, which its state tells."""
    assert torch.equal(batch.context[:, 0], -batch.context[:, 1])
    return batch.context[:, 0].long().tolist()


def epoch(feed):
    """{start: (tokens, labels, mask)} of all batches of the first epoch; each start once."""
    found = {}
    for step in range(feed.steps_per_epoch):
        batch = feed.step(step)
        for p, start in enumerate(starts_in(batch)):
            assert start not in found, "a position came twice in an epoch"
            found[start] = (
                batch.tokens[p].tolist(), batch.labels[p].tolist(), batch.mask[p].tolist()
            )  # fmt: skip
            assert (batch.teacher is not None) == (feed.teacher == "states")
            if batch.teacher is not None:  # h_{t+1} .. h_{t+K}: of the tokens read
                at = batch.teacher[p, :, 0][batch.mask[p]].tolist()
                depths = batch.mask[p].nonzero()[:, 0].tolist()
                assert at == [start + 1 + k for k in depths]
    return found


def check(feed, wanted):
    """wanted: {start: (tokens, labels, mask)}, the mask as a string; X stands for anything."""
    found = epoch(feed)
    assert sorted(found) == sorted(wanted)
    for start, (tokens, labels, mask) in wanted.items():
        assert found[start][2] == [m == "#" for m in mask], f"mask of {start}"
        for k, (token, label) in enumerate(zip(tokens, labels, strict=True)):
            if mask[k] == "#":
                assert (found[start][0][k], found[start][1][k]) == (token, label), f"{start}, {k}"


# ------------------------------------------------------------------ arrays written by hand

SINGLE = Row([10, 11, 12, 13, 14, 15], "...###")
# The prompt ends at position 2. Decoding emits token 13 first and begins to draft after it, from
# h_2: start 2 learns 14, and start 1 learns 13 itself, as the token after 12.
SINGLE_WANTED = {
    1: ([12, 13, 14], [13, 14, 15], "###"),
    2: ([13, 14, 15], [14, 15, X], "##."),
    3: ([14, 15, X], [15, X, X], "#.."),
}
# user 20 21, assistant 22 23 24, user 25 26, assistant 27 28, user 29
MULTI = Row([20, 21, 22, 23, 24, 25, 26, 27, 28, 29], "..###..##.")
MULTI_WANTED = {
    0: ([21, 22, 23, 24, 25], [22, 23, 24, X, X], "###.."),
    1: ([22, 23, 24, 25, 26], [23, 24, X, X, X], "##..."),  # nor 27, behind the user's turn
    2: ([23, 24, 25, 26, 27], [24, X, X, X, X], "#...."),  # nor 27 and 28
    5: ([26, 27, 28, 29, X], [27, 28, X, X, X], "##..."),
    6: ([27, 28, 29, X, X], [28, X, X, X, X], "#...."),
}
WHOLE = Row([30, 31, 32], "###")  # supervised from its first token on: a neighbour must not see
WHOLE_WANTED = {0: ([31, X, X], [32, X, X], "#..")}
UNUSED = [Row([40, 41, 42, 43], "...."), Row([50, 51], "##"), Row([60], "#")]


def test_single_turn(tmp_path):
    check(feed_of(write_store(tmp_path, [SINGLE]), teacher="states"), SINGLE_WANTED)


def test_the_first_drafted_position_is_supervised(tmp_path):
    """After the prompt's last state and the sure token, the first draft is learned."""
    found = epoch(feed_of(write_store(tmp_path, [SINGLE]), depth=1))
    last_of_prompt = SINGLE.learned.index("#") - 1
    assert found[last_of_prompt] == ([13], [14], [True])


def test_multi_turn(tmp_path):
    check(feed_of(write_store(tmp_path, [MULTI]), depth=5, teacher="states"), MULTI_WANTED)


def test_packed_rows(tmp_path):
    """Rows one after the other in one buffer; nothing reaches from one into the next."""
    rows = [SINGLE, WHOLE, UNUSED[0], WHOLE, MULTI, UNUSED[1], UNUSED[2], SINGLE]
    wanted = {s: w for s, w in SINGLE_WANTED.items()}
    wanted |= {1000 + s: w for s, w in WHOLE_WANTED.items()}
    wanted |= {3000 + s: w for s, w in WHOLE_WANTED.items()}
    wanted |= {4000 + s: tuple(x[:3] for x in w) for s, w in MULTI_WANTED.items()}
    wanted |= {7000 + s: w for s, w in SINGLE_WANTED.items()}
    part = write_store(tmp_path, rows)
    for positions in (1, 13):  # 13 are all of them, in one batch
        feed = feed_of(part, positions=positions, teacher="states")
        assert feed.steps_per_epoch == len(wanted) // positions and len(wanted) == 13
        check(feed, wanted)


@pytest.mark.parametrize("buffer_rows", [1, 2, 3, 100])
def test_a_batch_may_take_from_several_buffers(tmp_path, buffer_rows):
    rows = [SINGLE, WHOLE, UNUSED[0], WHOLE, SINGLE, UNUSED[1]]
    wanted = {1000 * r + s: w for r in (0, 4) for s, w in SINGLE_WANTED.items()}
    wanted |= {1000 * r + s: w for r in (1, 3) for s, w in WHOLE_WANTED.items()}
    check(feed_of(write_store(tmp_path, rows), positions=4, buffer_rows=buffer_rows), wanted)


def test_greedy_labels(tmp_path):
    """What the target says after the text's own tokens: labels only, the tokens stay."""
    row = Row(SINGLE.ids, SINGLE.learned, [[], [], [113], [114], [115], []])
    check(
        feed_of(write_store(tmp_path, [row]), labels="greedy"),
        {
            1: ([12, 13, 14], [113, 114, 115], "###"),
            2: ([13, 14, 15], [114, 115, X], "##."),
            3: ([14, 15, X], [115, X, X], "#.."),
        },
    )


def test_local_labels(tmp_path):
    """From start t on both tokens and labels are the target's; an EOS (99) ends them."""
    row = Row(SINGLE.ids, SINGLE.learned, [
        [], [], [213, 214, 215, 216], [313, 99], [413, 414, 99], [],
    ])  # fmt: skip
    wanted = {
        2: ([213, 214, 215], [214, 215, 216], "###"),
        3: ([313, X, X], [99, X, X], "#.."),
        4: ([413, 414, X], [414, 99, X], "##."),
    }
    other = Row([70, 71], ".#", [[501, 502, 503, 504], []])
    wanted[1000] = ([501, 502, 503], [502, 503, 504], "###")
    part = write_store(tmp_path, [row, other])
    check(feed_of(part, labels="local"), wanted)
    shallow = {s: tuple(x[:2] for x in w) for s, w in wanted.items()}
    check(feed_of(part, labels="local", depth=2, positions=2), shallow)


def test_a_pruned_vocabulary(tmp_path):
    """Labels are columns of the head; what it cannot draft is not supervised."""
    check(
        feed_of(write_store(tmp_path, [SINGLE, WHOLE]), draft_ids=torch.tensor([5, 13, 15, 900])),
        {
            1: ([12, X, 14], [1, X, 2], "#.#"),
            2: ([X, 14, X], [X, 2, X], ".#."),
            3: ([14, X, X], [2, X, X], "#.."),
            1000: ([X, X, X], [X, X, X], "..."),
        },
    )


def test_every_start_once_and_in_order_for_measuring(tmp_path):
    part = write_store(tmp_path, [SINGLE, UNUSED[0], WHOLE, SINGLE])
    batches = feed_of(part).batches(3)
    assert [starts_in(b) for b in batches] == [[1, 2, 3], [2000, 3001, 3002], [3003]]
    assert batches[1].labels[:, 0].tolist() == [32, 13, 14]
    assert batches[1].mask.tolist() == [
        [True, False, False], [True, True, True], [True, True, False]
    ]  # fmt: skip


def test_frequent_ids(tmp_path):
    """Of supervised tokens only; ties go to the smaller id."""
    first = write_store(tmp_path / "a", [Row([9, 9, 9, 4, 4, 4, 7], "...####"), WHOLE])
    second = write_store(tmp_path / "b", [Row([9, 7, 7], ".##")])
    assert frequent_ids([first, second], 2, 1000).tolist() == [4, 7]
    assert frequent_ids([first, second], 4, 1000).tolist() == [4, 7, 30, 31]


# ------------------------------------------------------------------ order


def plain_rows(n):
    """n rows of three starts each."""
    return [Row([100, 101, 102, 103, 104], "..###") for _ in range(n)]


def order_of(feed, steps):
    return [start for step in steps for start in starts_in(feed.step(step))]


def test_order_is_shuffled_and_new_in_every_epoch(tmp_path):
    part = write_store(tmp_path, plain_rows(9))
    feed = feed_of(part, buffer_rows=4)
    assert feed.steps_per_epoch == 27
    first, second = (order_of(feed, range(27 * e, 27 * e + 27)) for e in (0, 1))
    every = [1000 * r + t for r in range(9) for t in range(3)]
    assert sorted(first) == sorted(second) == every
    assert first != every and second != every and first != second
    assert order_of(feed_of(part, buffer_rows=4, seed=1), range(27)) != first
    assert order_of(feed_of(part, buffer_rows=4), range(27)) == first


def test_steps_per_epoch_leaves_out_what_fills_no_batch(tmp_path):
    part = write_store(tmp_path, plain_rows(9))
    feed = feed_of(part, positions=6, buffer_rows=4)
    assert feed.steps_per_epoch == 27 // 6
    seen = Counter(order_of(feed, range(4)))
    assert len(seen) == 24 and set(seen.values()) == {1}
    # The next epoch begins anew: what was left out can come first.
    later = Counter(order_of(feed, range(4, 8)))
    assert len(later) == 24 and set(later.values()) == {1} and later != seen


def test_a_feed_that_starts_at_a_step_gives_what_one_that_ran_there_gives(tmp_path):
    """What resuming rests on, over several epochs, with mixed stores, and backwards too."""
    parts = [write_store(tmp_path / str(i), plain_rows(n), 10 * i) for i, n in enumerate((5, 3))]
    options = dict(positions=7, buffer_rows=3, weights=[1, 3], teacher="states")
    ran = feed_of(*parts, **options)
    batches = [ran.step(step) for step in range(14)]
    assert ran.steps_per_epoch == 3  # 14 steps are five epochs
    for step in (0, 1, 5, 9, 13):
        there = feed_of(*parts, **options)
        for one, other in ((there.step(step), batches[step]), (ran.step(step), batches[step])):
            assert one.teacher is not None
            for a, b in zip(one._fields(), other._fields(), strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


def test_mixtures_take_their_share_and_each_row_equally_often(tmp_path):
    n_rows, weights = (6, 4, 10), (1, 2, 1)  # shares of an epoch of 20 rows: 5, 10 and 5
    parts = [write_store(tmp_path / str(i), plain_rows(n), 100 * i) for i, n in enumerate(n_rows)]
    feed = feed_of(*parts, positions=3, buffer_rows=7, weights=weights)
    assert feed.steps_per_epoch == 20
    rows = Counter()
    for number in range(6):
        steps = range(20 * number, 20 * number + 20)
        starts = order_of(feed, steps)
        assert Counter(s // 100_000 for s in starts) == {0: 15, 1: 30, 2: 15}, number
        rows.update(s // 1000 for s in starts)
    # 6 epochs: 30 of 6 rows, 60 of 4, 30 of 10; every row brings three positions each time
    wanted = {0: 3 * 5, 1: 3 * 15, 2: 3 * 3}
    assert rows == {100 * p + r: wanted[p] for p, n in enumerate(n_rows) for r in range(n)}


def test_equal_weights_take_every_row_once(tmp_path):
    parts = [write_store(tmp_path / str(i), plain_rows(n), 100 * i) for i, n in enumerate((5, 2))]
    for weights in (None, [0.3, 0.3]):
        starts = order_of(feed_of(*parts, weights=weights), range(21))
        assert sorted(starts) == [1000 * r + t for r in (*range(5), 100, 101) for t in range(3)]
        both = {s // 100_000 for s in starts[:11]}, {s // 100_000 for s in starts[11:]}
        assert both == ({0, 1}, {0, 1}), "the stores came one after the other"


def test_epoch_order_is_a_pure_function():
    """Any epoch by itself, however many were asked for before."""
    for epoch_number in (0, 3, 17):
        one = epoch_order([7, 3], [1, 4], 5, epoch_number)
        two = epoch_order([7, 3], [1, 4], 5, epoch_number)
        assert torch.equal(one.part, two.part) and torch.equal(one.row, two.row)
        assert torch.bincount(one.part).tolist() == [2, 8]
        other = epoch_order([7, 3], [1, 4], 6, epoch_number)
        assert not torch.equal(one.row, other.row)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("rows", "positions", "found"),
    [([SINGLE], 4, "3 positions"), (UNUSED, 1, "0 positions")],
    ids=["fewer than a step", "nothing supervised"],
)  # fmt: skip
def test_too_few_positions(tmp_path, rows, positions, found):
    with pytest.raises(InputError, match=f"^{found}.*optim.batch_positions"):
        feed_of(write_store(tmp_path, rows), positions=positions)


def test_damage_while_reading_ahead_is_named(tmp_path):
    """The error of the thread that reads ahead reaches the caller."""
    part = write_store(tmp_path, plain_rows(4), rows_per_shard=1)
    feed = feed_of(part, positions=3, buffer_rows=1)
    shard = tmp_path / "shard-00002.safetensors"
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-00002\.safetensors is missing"):
        order_of(feed, range(4))
