"""What a head has accepted by teacher forcing is what decoding accepts of it, for every kind.

On text that the target says greedily, a chain drafted at a position of it is accepted exactly as
far as the teacher-forced head is right there: training and decoding then agree on which hidden
state is c, which tokens are read, and which depth's label is whose. Texts stay right whatever is
confused of these; only this test sees it.
"""

import functools
import itertools

import pytest
import torch
from head_kinds import CASES, make_head
from models import NEW, prompts, settings, tiny

from redrafter.config import LossConfig, StatesConfig, TreeConfig
from redrafter.contracts import Truth
from redrafter.data.reading import Stored
from redrafter.data.rows import Rows
from redrafter.data.states import StateMaker
from redrafter.data.store import Job, Store
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.training.feed import Feed
from redrafter.training.step import batch_loss, best_five, depth_accuracy, total_weight

FREE = settings(eos_token_id=-1)
KINDS_READING = [case for case, (kind, _) in CASES.items() if kind != "medusa"]


@functools.cache
def texts():
    """Prompts, and with what the target says greedily after each."""
    rows = prompts()
    said = [plain(tiny("llama"), [row], FREE).tokens[0] for row in rows]
    return rows, [row + text for row, text in zip(rows, said, strict=True)]


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """Stored states of these texts."""
    given, whole = texts()
    lengths = torch.tensor([len(row) for row in whole])
    said = [torch.arange(len(w)) >= len(g) for g, w in zip(given, whole, strict=True)]
    tokens = torch.tensor(list(itertools.chain(*whole)))
    rows = Rows(tokens, torch.cat(said), torch.cat((torch.zeros(1).long(), lengths.cumsum(0))))
    made = StateMaker(tiny("llama"), StatesConfig()).columns(rows)
    job = Job(tmp_path_factory.mktemp("states"), "states", {"by": "test"})
    number = torch.arange(len(whole))
    about = {"row": number, "source_row": number.clone(), "length": lengths.int()}
    text = {"tokens": tokens.int(), "supervised": rows.supervised}
    job.write(0, {**about, **text, **made})
    job.finish(1)
    return Stored(Store(job.folder))


def feed_of(part, depth, positions=64, draft_ids=None):
    return Feed(
        tiny("llama"), [part], positions=positions, depth=depth, seed=0, draft_ids=draft_ids
    )


_taught = {}


def taught(case, part):
    """A head that says of these texts some tokens as the target and some not. Returns (head, K)"""
    if case not in _taught:
        target = tiny("llama")
        head = make_head(target, case).train()
        depth = min(3, head.max_depth or 3)
        feed = feed_of(part, depth, draft_ids=getattr(head, "draft_ids", None))
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        loss = LossConfig(cross_entropy=1.0)
        for step in range(8):
            batch = feed.step(step)
            batch_loss(head, head, target, batch, loss, total_weight(batch, loss))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        _taught[case] = head.eval(), depth
    return _taught[case]


def forced(head, depth, part):
    """{(row, t): (depths right up to the first wrong one, depths supervised)}, by teacher forcing
    on stored states, of starts t whose token t+1 the target has said."""
    given, whole = texts()
    (batch,) = feed_of(part, depth).batches(10_000)
    right = best_five(head, tiny("llama"), batch, 50)[..., 0]
    found = zip(right.cumprod(1).sum(1).tolist(), batch.mask.sum(1).tolist(), strict=True)
    starts = [(r, t) for r, w in enumerate(whole) for t in range(len(given[r]) - 2, len(w) - 2)]
    of_start = dict(zip(starts, found, strict=True))
    return {(r, t): n for (r, t), n in of_start.items() if t >= len(given[r]) - 1}


def drafted(head, depth, forced):
    """The same starts: what a chain is accepted of that is drafted behind the row up to t."""
    rows = [texts()[1][r][: t + 1] for r, t in forced]
    drafter = HeadDrafter(head, tiny("llama"), TreeConfig(1, depth))
    config = settings(eos_token_id=-1, max_new_tokens=depth + 2)
    made = speculative(tiny("llama"), rows, config, drafter=drafter)
    firsts = [lengths[0] - 1 for lengths in made.stats.lengths]
    return {
        start: (min(accepted, there), there)
        for (start, (_, there)), accepted in zip(forced.items(), firsts, strict=True)
    }


def on_the_way(head, depth, forced):
    """Those of these starts at which a whole generation happens to draft."""
    given, whole = texts()
    drafter = HeadDrafter(head, tiny("llama"), TreeConfig(1, depth))
    longer = settings(eos_token_id=-1, max_new_tokens=NEW + depth + 1)  # no step is cut short
    made = speculative(tiny("llama"), given, longer, drafter=drafter)
    found = {}
    for r, lengths in enumerate(made.stats.lengths):
        assert given[r] + made.tokens[r][:NEW] == whole[r]
        for before, n in zip(itertools.accumulate([0, *lengths]), lengths, strict=False):
            if (start := (r, len(given[r]) - 1 + before)) in forced:  # of others no label is known
                there = forced[start][1]
                found[start] = (min(n - 1, there), there)
    return found


def by_depth(found, depth):
    """(depth,) of (starts that have so many depths supervised, that are right up to there)."""
    return [
        (sum(there > k for _, there in found.values()), sum(n > k for n, _ in found.values()))
        for k in range(depth)
    ]


@pytest.mark.parametrize("case", CASES)
def test_training_accepts_what_decoding_does(case, part):
    head, depth = taught(case, part)
    expected = forced(head, depth, part)
    assert len(expected) == sum(len(w) - len(g) - 1 for g, w in zip(*texts(), strict=True))
    found = drafted(head, depth, expected)
    assert by_depth(found, depth) == by_depth(expected, depth)
    assert found == expected, "equal counts, at other positions"
    for k, (there, right) in enumerate(by_depth(expected, depth)):
        assert 0 < right < there, f"depth {k + 1} is never right, or always: this tested nothing"
    visited = on_the_way(head, depth, expected)
    assert visited == {start: expected[start] for start in visited}
    assert len(visited) >= 3 * len(texts()[0]), "most steps go on behind what was drafted before"


@pytest.mark.parametrize("case", CASES)
def test_the_measure_while_training_is_that_acceptance(case, part):
    head, depth = taught(case, part)
    given, _ = texts()
    batches = feed_of(part, depth).batches(7)
    said = depth_accuracy(head, tiny("llama"), batches, 9)["accepted"]
    (whole,) = feed_of(part, depth).batches(10_000)
    right = best_five(head, tiny("llama"), whole, 10_000)[..., 0].cumprod(1).sum(0)
    assert said == pytest.approx((right / whole.mask.sum(0)).tolist())
    assert len(whole.mask) == sum(len(batch.mask) for batch in batches) == len(given) * NEW


# ------------------------------------------------------------------------ planted, and seen


def planted(monkeypatch, change):
    """What training reads is changed: change(batch, the batch of one position later)."""
    real = Feed._gather

    def gather(self, columns, t):
        later = real(self, columns, torch.minimum(t + 1, columns["end"][t] - 1))
        return change(real(self, columns, t), later)

    monkeypatch.setattr(Feed, "_gather", gather)


def late_context(batch, later):
    batch.context = later.context
    return batch


def label_of_the_next_depth(batch, later):
    batch.labels = later.labels
    return batch


def token_one_depth_late(batch, later):
    batch.tokens = torch.cat((batch.tokens[:, :1], batch.tokens[:, :-1]), 1)
    return batch


FAULTS = [
    *((case, late_context) for case in CASES),
    *((case, label_of_the_next_depth) for case in CASES),
    *((case, token_one_depth_late) for case in KINDS_READING),  # Medusa reads none
]


@pytest.mark.parametrize(("case", "fault"), FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_fault_of_what_is_learned_is_seen(case, fault, part, monkeypatch):
    head, depth = taught(case, part)
    right = by_depth(forced(head, depth, part), depth)
    planted(monkeypatch, fault)
    wrong = by_depth(forced(head, depth, part), depth)
    assert wrong != right


@pytest.mark.parametrize("case", CASES)
def test_a_context_of_an_earlier_position_in_decoding_is_seen(case, part, monkeypatch):
    head, depth = taught(case, part)
    expected = forced(head, depth, part)

    def earlier(self):
        before = (self.count - 2).clamp(min=0)[:, None, None]
        return self.hidden.gather(1, before.expand(-1, -1, self.hidden.shape[-1]))[:, 0]

    monkeypatch.setattr(Truth, "last_hidden", earlier)
    visited = on_the_way(head, depth, expected)  # and the text is right, all the same
    assert visited != {start: expected[start] for start in visited}
