"""Numbers that are not finite: a target that overflows on one word, row by row, in all that the
pipeline writes and reads."""

import json
import warnings

import pytest
import torch
from models import VOCAB, tiny
from transformers import AutoModelForCausalLM

from redrafter.cli.check_store import main as check
from redrafter.config import AnswersConfig, StatesConfig
from redrafter.config.lookahead import RecordsConfig
from redrafter.contracts import Generation, InputError, StepStats
from redrafter.data import answers as answering
from redrafter.data.answers import build_answers
from redrafter.data.build_rows import columns_of, report
from redrafter.data.finite import OVERFLOWED, choice, finite_rows
from redrafter.data.local import continue_greedily
from redrafter.data.prompts import Prompt
from redrafter.data.reading import Fresh, Hybrid, Stored
from redrafter.data.rows import TokenRow
from redrafter.data.states import StateMaker, build_states
from redrafter.data.store import Job, Store
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.records.store import build_records
from redrafter.tables import probed
from redrafter.tables.probed import probe_bigrams
from redrafter.targets.model import Target
from redrafter.training.feed import Feed

LOUD = 7  # the token whose embedding float16 cannot hold
NAN, INF = float("nan"), float("inf")


def loud(dtype=torch.float16, token=LOUD):
    """A target that overflows in float16 where it reads `token`, and not in wider dtypes."""
    model = AutoModelForCausalLM.from_config(tiny("llama").model.config, dtype=torch.float32)
    model.load_state_dict(tiny("llama").model.state_dict())
    target = Target(model.to(dtype), name="loud")
    target.model.get_input_embeddings().weight.data[token] = 1e5  # inf in float16
    return target


#: six rows of different lengths; those of `BAD` hold the token
BAD = (1, 4)


def texts(folder, kind="texts"):
    random = torch.Generator().manual_seed(3)
    rows = []
    for i in range(6):
        ids = torch.randint(8, VOCAB, (6 + 3 * i,), generator=random).tolist()
        if i in BAD:
            ids[2 + i] = LOUD
        half = len(ids) // 2
        mask = [kind == "texts" and place >= half for place in range(len(ids))]
        rows.append(TokenRow(tuple(ids), tuple(mask), 10 + i))
    job = Job(folder, kind, {})
    job.write(0, columns_of(rows, range(6)))
    job.finish(1, input=6)
    return Store(folder)


@pytest.fixture
def rows(tmp_path):
    return texts(tmp_path / "rows")


def adds_up(store, given=6):
    """The rows left out, listed."""
    counts = store.counts
    assert counts["rows"] + counts["skipped"] == given == store.manifest["input"]
    return [r for shard in store.manifest["shards"] for r in shard["rejected"]]


def left_out(store):
    """The two rows with the token are missing, counted, and named with the reason."""
    listed = adds_up(store)
    assert [r["source_row"] for r in listed] == [10 + i for i in BAD]
    assert not any(r["failed"] for r in listed)
    assert store.row.tolist() == [0, 2, 3, 5]
    said = report(store)
    assert "2 skipped" in said and "not finite" in said and "rows 11, 14 of the source" in said
    assert "float16" in said and "wider target.dtype" in said


# ------------------------------------------------------------------ one judgement


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["states", "scale", "teacher_log_p", "continuation"])
def test_a_row_is_judged_by_all_of_its_numbers(name, dtype, value):
    lengths = torch.tensor([3, 0, 4])
    columns = {
        "states": torch.ones(7, 5, dtype=dtype), "scale": torch.ones(7, 1),
        "teacher_log_p": -torch.ones(7, 2), "continuation": torch.full((7, 2), -1),
        "tokens": torch.full((7,), OVERFLOWED),
    }  # fmt: skip
    assert finite_rows(columns, lengths).tolist() == [True, True, True]
    columns[name][6, -1] = OVERFLOWED if name == "continuation" else value
    assert finite_rows(columns, lengths).tolist() == [True, True, False]


def test_a_choice_from_scores_that_are_not_finite_is_none():
    scores = torch.tensor([[1.0, 3.0, 2.0], [1, NAN, 2], [1, 3, INF], [-INF, 1, 0], [-INF] * 3])
    assert choice(scores).tolist() == [1, OVERFLOWED, OVERFLOWED, 1, OVERFLOWED]


# ------------------------------------------------------------------ states


@pytest.mark.parametrize("options", [{}, {"dtype": "int8"}, {"teacher_top_k": 3},
                                     {"shard_bytes": 1000}])  # fmt: skip
def test_rows_whose_states_overflow_are_left_out(rows, tmp_path, options):
    made = build_states(loud(), rows, StatesConfig(**options), tmp_path / "s", progress=False)
    left_out(made)
    made.verify()
    assert check([f"--store={tmp_path / 's'}"]) == 0
    wide = build_states(
        loud(torch.float32), rows, StatesConfig(**options), tmp_path / "wide", progress=False
    )
    assert adds_up(wide) == []
    again = build_states(loud(), rows, StatesConfig(**options), tmp_path / "s", progress=False)
    assert again.digest == made.digest


def test_what_is_stored_too_narrow_is_left_out_or_refused(rows, tmp_path):
    target = loud(torch.float32)
    target.model.base_model.norm.weight.data.mul_(1e6)
    with pytest.raises(
        InputError, match=r"none of 6 rows.*computed in float32, stored as float16.*states\.dtype"
    ):
        build_states(target, rows, StatesConfig(dtype="float16"), tmp_path / "s", progress=False)
    whole = build_states(target, rows, StatesConfig(dtype="bfloat16"), tmp_path / "b",
                         progress=False)  # fmt: skip
    assert whole.n_rows == 6


@pytest.mark.parametrize("n", [1, 3])
def test_what_the_target_would_say_next_counts_too(tmp_path, n):
    """A text that does not hold the token, but leads to it: what follows it is nothing."""
    wide = tiny("llama")
    rows = texts(tmp_path / "rows")
    read = rows.rows()
    said = continue_greedily(wide, [read.ids(0)], [[True] * len(read.ids(0))], 3, eos=set())[0]
    own = set(read.ids(0))
    token = next(t for t in said[len(own) // 2 : -1, 0].tolist() if t not in own)
    target = loud(token=token)
    found = continue_greedily(target, [read.ids(0)], [[True] * len(read.ids(0))], 3, eos=set())[0]
    assert (found == OVERFLOWED).any() and (found[:, 0] >= 0).all()
    made = build_states(target, rows, StatesConfig(), tmp_path / "s", continuation=n,
                        progress=False)  # fmt: skip
    assert (0 in made.row.tolist()) == (n == 1)  # of one token the choice itself is finite
    assert int(made.read(range(made.n_rows), ["continuation"])["continuation"].min()) == -1


def test_padding_that_overflows_reaches_no_row(rows, tmp_path):
    """Rows are padded to be read together; 0 times nan is nan."""
    target = loud(token=0)  # what batches were padded with
    states = build_states(target, rows, StatesConfig(), tmp_path / "s", continuation=3,
                          progress=False)  # fmt: skip
    assert adds_up(states) == []


# ------------------------------------------------------------------ training reads


def batches(part, target, epochs=2):
    feed = Feed(target, [part], positions=4, depth=2, seed=1, buffer_rows=2, teacher="states")
    steps = epochs * feed.steps_per_epoch
    return feed, [feed.step(step) for step in range(steps)]


def contexts(made):
    return torch.cat([batch.context for batch in made]).double()


@pytest.mark.parametrize("kind", ["online", "hybrid"])
def test_rows_that_overflow_are_not_learned_from(rows, tmp_path, kind):
    target = loud()
    maker = StateMaker(target, StatesConfig())
    part = Fresh(rows, maker) if kind == "online" else Hybrid(rows, maker, tmp_path / "h", False)
    with pytest.warns(UserWarning, match=r"1 of 6 rows are not learned from.*wider target\.dtype"):
        feed, made = batches(part, target)
    told = feed.end(feed.steps_per_epoch)
    assert "2 of 6 rows are not learned from" in told[0] and "(rows 1, 4)" in told[0]
    for batch in made:
        assert batch.context.isfinite().all() and batch.teacher.isfinite().all()
    stored = build_states(target, rows, StatesConfig(), tmp_path / "s", progress=False)
    wanted = contexts(Feed(target, [Stored(stored)], positions=1, depth=2, seed=1).batches(999))
    found = contexts(made)
    near = (found[:, None] - wanted).abs().amax(-1) < 0.05
    assert near.any(1).all() and near.any(0).all(), "another row, or one of the good ones missing"
    assert len(contexts(feed.batches(999))) == len(wanted)
    if kind == "hybrid":
        assert Store(tmp_path / "h").row.tolist() == [0, 2, 3, 5]
        assert check([f"--store={tmp_path / 'h'}"]) == 0
        with warnings.catch_warnings():  # what it holds is finite, and what it lacks stays away
            warnings.simplefilter("error")
            _, later = batches(Hybrid(rows, maker, tmp_path / "h", False), target)
        assert torch.equal(contexts(later), contexts(made))


def damaged(folder, name="states", value=NAN):
    """A store as it was made before rows were judged: one number of row 3 is none."""
    job = json.loads((folder / "job.json").read_text())
    columns = Job(folder, "states", {k: v for k, v in job.items() if k not in ("kind", "format")})
    read = columns.read(0)
    read[name][int(read["length"][:3].sum()), 0] = value
    manifest = json.loads((folder / "manifest.json").read_text())
    columns.write(0, read)
    columns.finish(1, input=manifest["input"])
    return Store(folder)


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "states"), ({"dtype": "int8"}, "scale"), ({"teacher_top_k": 2}, "teacher_log_p")],
)
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_store_made_before_is_named_and_its_other_rows_learned(
    rows, tmp_path, capsys, options, name, value
):
    target = tiny("llama")
    build_states(target, rows, StatesConfig(**options), tmp_path / "s", progress=False)
    store = damaged(tmp_path / "s", name, value)
    store.verify()
    with pytest.raises(SystemExit):
        check([f"--store={tmp_path / 's'}"])
    said = capsys.readouterr().err
    assert "shard-00000.safetensors: row 3" in said and "make it anew" in said
    with pytest.warns(UserWarning, match=r"1 of 6 rows are not learned from.*\(row 3\).*anew"):
        feed, made = batches(Stored(store), target)
    assert "(row 3)" in feed.end(0)[0]
    assert all(batch.context.isfinite().all() for batch in made)


# ------------------------------------------------------------------ answers


def stand_in(marked):
    """A loop as it marks rows that met scores that are not finite: those that hold the token."""

    def say(target, rows, config, *, seeds, **loop):
        tokens = [[9, 8] if LOUD in row else [9, 8, 5] for row in rows]
        finish = ["not_finite" if LOUD in row else "length" for row in rows]
        marked.extend(finish)
        return Generation(tokens, finish, StepStats([0] * len(rows), [0] * len(rows)))

    return say


@pytest.mark.parametrize("drafted", [False, True])
def test_answers_that_met_no_number_are_left_out(tmp_path, monkeypatch, drafted):
    marked = []
    for name in ("refilled", "speculative"):
        monkeypatch.setattr(answering, name, stand_in(marked))
    prompts = texts(tmp_path / "p", "prompts")
    how = AnswersConfig(temperatures=(0.0, 1.0), max_new_tokens=3, batch_size=4)
    drafter = (lambda: None) if drafted else None
    made = build_answers(loud(), prompts, how, tmp_path / "a", drafter=drafter, progress=False)
    assert marked.count("not_finite") == 4
    listed = adds_up(made, 12)
    assert [r["source_row"] for r in listed] == [11, 14, 11, 14]
    assert "scores of the target in float16" in listed[0]["reason"]
    assert made.row.tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    assert "4 x scores" in report(made) and "rows 11, 14, 11, 14 of the source" in report(made)
    assert all(made.rows([i]).tokens[-3:].tolist() == [9, 8, 5] for i in range(made.n_rows))


def test_answers_of_a_target_that_overflows(tmp_path):
    target, prompts = loud(), texts(tmp_path / "p", "prompts")
    how = AnswersConfig(max_new_tokens=3, temperatures=(0.0,))
    left_out(build_answers(target, prompts, how, tmp_path / "a", progress=False))


# ------------------------------------------------------------------ tables and records


def test_a_probe_knows_no_successor_where_scores_overflow(tmp_path):
    target = loud()
    table = probe_bigrams(target, tmp_path / "t", width=3)
    assert table.tokens[LOUD].tolist() == [0, 0, 0] and table.log_p[LOUD].tolist() == [-INF] * 3
    others = torch.arange(VOCAB) != LOUD
    assert table.log_p[others].isfinite().all() and table.n_seen == VOCAB - 1
    wide = probe_bigrams(loud(torch.float32), tmp_path / "w", width=3)
    assert wide.log_p.isfinite().all() and wide.n_seen == VOCAB
    assert table.unigram is not None and len(set(table.unigram.tolist())) == 3
    target.lm_head_weight.data[5] = INF
    with pytest.raises(InputError, match=r"lm_head is not finite.*wider target\.dtype"):
        probed.unigram_of_weights(target, 3)
    with pytest.raises(InputError, match=r"after every token is not finite"):
        probe_bigrams(target, tmp_path / "none", width=3)
    loud_bos = loud()
    with pytest.raises(InputError, match=r"after BOS is not finite"):
        probed.unigram_after_bos(loud_bos, 3, LOUD)


def test_records_of_a_text_that_overflows_are_left_out(tmp_path):
    prompts = texts(tmp_path / "p", "prompts")
    read = prompts.rows()
    asked = [Prompt(tuple(read.ids(i)), 10 + i) for i in range(6)]
    config = RecordsConfig(
        target=None, prompts="p.jsonl", out=str(tmp_path / "r"), drafter="suffix",
        max_new_tokens=6, temperature=0.0, batch_size=3,
    )  # fmt: skip
    made = build_records(loud(), SuffixDrafter(3), asked, config, progress=False)
    listed = adds_up(made)
    assert [r["source_row"] for r in listed] == [10 + i for i in BAD]
    assert "not finite" in listed[0]["reason"] and made.row.tolist() == [0, 2, 3, 5]
    assert check([f"--store={tmp_path / 'r'}"]) == 0
