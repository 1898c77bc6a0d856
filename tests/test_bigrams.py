"""Counted bigrams: what is counted, in rows and in stores, and the table's way over the disk."""

import json
from collections import Counter
from itertools import pairwise
from math import log

import pytest
import safetensors
import torch
from models import VOCAB, tiny
from safetensors.torch import load_file, save_file

import redrafter.drafters.bigram as bigram
import redrafter.tables.bigrams as data_bigrams
from redrafter.cli import count_bigrams as command
from redrafter.cli import speed as speed_cli
from redrafter.contracts import InputError
from redrafter.data.build_rows import write_rows
from redrafter.data.rows import TokenRow
from redrafter.drafters.bigram import (
    BigramTable,
    CountedBigrams,
    PairCounts,
    count_bigrams,
    load_bigrams,
    save_bigrams,
)
from redrafter.files import write_tensors
from redrafter.tables.bigrams import bigrams_of_store, open_bigrams, table_identity
from redrafter.targets.identity import text_identity
from redrafter.targets.load import load_target

# (ids, first supervised position) of a store's rows; pairs that count stand behind.
ROWS = [
    ([9, 9, 1, 2, 1, 2], 2),  # 9>1 1>2 2>1 1>2; 9>9 is the prompt's
    ([3, 1, 3], 1),  # 3>1 1>3
    ([8], 0),  # a supervised token with nothing before it, not even the row above
    ([4, 4], 2),  # a prompt
    ([2, 1, 4], 0),  # 2>1 1>4: the first token follows nothing
]
COUNTED = {9: {1: 1}, 1: {2: 2, 3: 1, 4: 1}, 2: {1: 2}, 3: {1: 1}}


def make_store(folder, rows=ROWS, kind="texts", **identity):
    made = [
        TokenRow(tuple(ids), tuple(i >= first for i in range(len(ids))), n)
        for n, (ids, first) in enumerate(rows)
    ]
    return write_rows(lambda: made, kind, folder, {"made_for": "test", **identity})


def random_rows(n=80, vocab=7):
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 12, (n,), generator=random).tolist()
    return [torch.randint(0, vocab, (k,), generator=random).tolist() for k in lengths]


def expected(counted, vocab_size, width):
    """The table by hand: most frequent first, the smaller id at equal counts."""
    tokens = torch.zeros(vocab_size, width, dtype=torch.long)
    log_p = torch.full((vocab_size, width), float("-inf"))
    for a, after in counted.items():
        for i, (b, n) in enumerate(sorted(after.items(), key=lambda x: (-x[1], x[0]))[:width]):
            tokens[a, i], log_p[a, i] = b, log(n / sum(after.values()))
    return BigramTable(tokens, log_p)


def same(table, other, exact=True):
    assert table.tokens.dtype == torch.int64 and table.log_p.dtype == torch.float32
    assert torch.equal(table.tokens, other.tokens)
    close = torch.equal if exact else torch.allclose
    return close(table.log_p, other.log_p)


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize("width", [1, 3, 9])
def test_rows_are_counted(width):
    rows = random_rows()
    counted: dict[int, Counter] = {}
    for a, b in (pair for row in rows for pair in pairwise(row)):
        counted.setdefault(a, Counter())[b] += 1
    table = count_bigrams(rows, vocab_size=9, width=width)
    assert same(table, expected(counted, 9, width), exact=False)
    assert (table.vocab_size, table.width, table.n_seen) == (9, width, 7)
    ties = [after for after in counted.values() if len(set(after.values())) < len(after)]
    assert ties, "the test would not see how ties are broken"


def test_piece_by_piece_is_all_at_once(monkeypatch):
    rows = random_rows()
    whole = count_bigrams(rows, 7, 4)
    merges = []
    merge = PairCounts._merge
    monkeypatch.setattr(PairCounts, "_merge", lambda self: (merges.append(1), merge(self)))
    for limit in (1, 5, 40):
        monkeypatch.setattr(bigram, "_MERGE_PAIRS", limit)
        merges.clear()
        assert same(count_bigrams(rows, 7, 4), whole)
        assert len(merges) > 5, "many merges, on the way too"


def test_memory_is_that_of_distinct_pairs(monkeypatch):
    monkeypatch.setattr(bigram, "_MERGE_PAIRS", 8)
    counts, random = PairCounts(4), torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(0, 4, (101,), generator=random)
        counts.add(ids[:-1], ids[1:])
        assert len(counts._pair) + counts._n_new <= 16 + 16
    total = counts.table(4).log_p.exp().sum(1)
    assert torch.allclose(total, torch.ones(4)), "and nothing was lost"


def test_rows_that_cannot_be_counted():
    with pytest.raises(InputError, match="no two successive tokens"):
        count_bigrams([[1], []], 5, 2)
    with pytest.raises(InputError, match="row 1"):
        count_bigrams([[1, 2], [3, 5]], 5, 2)
    with pytest.raises(InputError, match="width 0"):
        count_bigrams([[1, 2]], 5, 0)


# ---------------------------------------------------------------- stores


def test_a_store_counts_what_is_supervised_within_rows(tmp_path):
    store = make_store(tmp_path / "store")
    table = bigrams_of_store(store, 10, 2)
    assert same(table, expected(COUNTED, 10, 2), exact=False)
    assert table.tokens[1].tolist() == [2, 3], "3 and 4 came equally often"
    assert table.n_seen == 4


@pytest.mark.parametrize("tokens", [1, 3, 5, 100])
def test_a_store_in_chunks_is_the_whole(tmp_path, monkeypatch, tokens):
    rows = [(row, len(row) // 3) for row in random_rows()]
    store = make_store(tmp_path / "store", rows)
    whole = bigrams_of_store(store, 7, 5)
    reads = []
    read = store.rows
    monkeypatch.setattr(store, "rows", lambda chosen: (reads.append(chosen), read(chosen))[1])
    monkeypatch.setattr(data_bigrams, "_CHUNK_TOKENS", tokens)
    assert same(bigrams_of_store(store, 7, 5), whole)
    assert len(reads) > 2 and torch.cat(reads).tolist() == list(range(len(rows)))
    assert all(int(store.lengths[chosen].sum()) < tokens + 12 for chosen in reads)


def test_stores_that_cannot_be_counted(tmp_path):
    prompts = make_store(tmp_path / "prompts", [([1, 2], 2), ([3], 1)], "prompts")
    with pytest.raises(InputError, match=r"prompts \(prompts\) has no supervised"):
        bigrams_of_store(prompts, 10, 2)
    alone = make_store(tmp_path / "alone", [([1], 0)])
    with pytest.raises(InputError, match="no supervised token behind another"):
        bigrams_of_store(alone, 10, 2)
    with pytest.raises(InputError, match="ids 1 to 9, the vocabulary is 9"):
        bigrams_of_store(make_store(tmp_path / "store"), 9, 2)


# ---------------------------------------------------------------- on disk


@pytest.fixture
def saved(tmp_path):
    table = count_bigrams(random_rows(), 9, 3)
    save_bigrams(tmp_path / "made" / "t.safetensors", table, {"tokenizer": "abc", "n": (1, 2)})
    return tmp_path / "made" / "t.safetensors", table


def test_a_table_survives_the_disk(saved):
    path, table = saved
    loaded, about = load_bigrams(path, 9)
    assert same(loaded, table)
    assert about == {"format": 1, "vocab_size": 9, "width": 3, "tokenizer": "abc", "n": [1, 2]}
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing is left over"
    with safetensors.safe_open(path, "pt") as file:
        assert len(file.metadata()) == 1, "safetensors does not keep the order of several"
    before = path.read_bytes()
    save_bigrams(path, table, {"n": [1, 2], "tokenizer": "abc"})
    assert path.read_bytes() == before


def test_an_interrupted_write_leaves_the_old_table(saved, monkeypatch):
    path, table = saved

    def full(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="full"):
        save_bigrams(path, BigramTable(table.tokens[:2], table.log_p[:2]), {})
    assert same(load_bigrams(path, 9)[0], table)
    assert len(list(path.parent.iterdir())) == 1


def rewrite(path, change=None, **about):
    """The same file with other tensors, or other words about them."""
    tensors = load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        old = json.loads(file.metadata()["redrafter_bigrams"])
    if change is not None:
        change(tensors)
    write_tensors(path, tensors, {"redrafter_bigrams": json.dumps(old | about)})


BAD_FILES = {
    "missing": (lambda path: path.unlink(), "does not exist"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "text": (lambda path: path.write_text('{"tokens": [1, 2]}\n' * 9), "cannot be read"),
    "of another program": (lambda path: save_file({"x": torch.zeros(1)}, path), "no table"),
    "not our JSON": (
        lambda path: write_tensors(path, load_file(path), {"redrafter_bigrams": "{"}),
        "cannot be read",
    ),
    "newer": (lambda path: rewrite(path, format=2), "bigram format 2, this version .* 1"),
    "for 8 tokens": (lambda path: rewrite(path, vocab_size=8), "of 8 tokens, this target has 9"),
    "a wide id": (lambda path: rewrite(path, lambda t: t["tokens"][3, 0].fill_(9)), "damaged"),
    "a negative id": (lambda path: rewrite(path, lambda t: t["tokens"][3, 0].fill_(-1)), "damaged"),
    "other sizes": (lambda path: rewrite(path, width=4), "damaged"),
    "no log_p": (lambda path: rewrite(path, lambda t: t.pop("log_p")), "cannot be read"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_is_no_such_table_is_named(saved, what):
    spoil, message = BAD_FILES[what]
    spoil(saved[0])
    with pytest.raises(InputError, match=rf"t\.safetensors .*{message}"):
        load_bigrams(saved[0], 9)


# ---------------------------------------------------------------- drafting, and the commands


def test_a_drafter_takes_the_front_of_a_wider_table():
    rows = random_rows()
    wide, narrow = (CountedBigrams(count_bigrams(rows, 7, w), 2, 3) for w in (5, 2))
    assert torch.equal(wide.next_tokens, narrow.next_tokens)
    assert torch.equal(wide.next_log_p, narrow.next_log_p)
    with pytest.raises(InputError, match=r"width 6 needs .* the table has 5"):
        CountedBigrams(count_bigrams(rows, 7, 5), 6, 3)


def test_table_or_store_and_what_it_was_counted_on(tmp_path, monkeypatch):
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))
    target = tiny("llama")
    store = make_store(tmp_path / "store", kind="answers")
    save_bigrams(tmp_path / "t", bigrams_of_store(store, VOCAB, 3), table_identity(store))
    (table, from_file), (counted, from_store) = (
        open_bigrams(str(tmp_path / name), target, 3) for name in ("t", "store")
    )
    assert same(table, counted)
    assert same(open_bigrams(f"file://{tmp_path / 'store'}", target, 3)[0], counted)
    for shown in (from_file, from_store):
        assert f"{tmp_path / 'store'} (answers, 5 rows, 10 supervised tokens" in shown
    assert f"{tmp_path / 't'} says" in from_file
    with pytest.raises(InputError, match="no store"):
        open_bigrams(str(tmp_path), target, 3)
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        open_bigrams(str(tmp_path / "nowhere"), target, 3)


def test_commands(tiny_target, tmp_path, capsys):
    target = load_target(str(tiny_target))
    own = text_identity(target.tokenizer)
    rows = [([9, 9, 1, 2, 1, 2, 7] * 4, 3)]
    ours = make_store(tmp_path / "ours", rows, "answers", target=own)
    theirs = make_store(tmp_path / "theirs", rows, "answers", target=own | {"tokenizer": "x"})
    out = str(tmp_path / "new" / "bigrams.safetensors")
    count = ["--target.path", str(tiny_target), "--out", out, "--width", "2"]
    assert command.main([*count, "--store", ours.name]) == 0
    assert f"{out}: successors of 4 of {target.vocab_size} tokens" in capsys.readouterr().out
    table, about = load_bigrams(out, target.vocab_size)
    assert same(table, bigrams_of_store(ours, target.vocab_size, 2))
    assert about["tokenizer"] == own["tokenizer"] and about["counted_on"]["digest"] == ours.digest

    speed = ["--target.path", str(tiny_target), "--n_prompts", "2", "--max_new_tokens", "6",
             "--prompts", str(tiny_target / "prompts_heldout.jsonl"), "--cost_rounds", "1",
             "--methods"]  # fmt: skip
    assert speed_cli.main([*speed, "bigram:1x2,plain,bigram:2x2", "--bigrams", out]) == 0
    shown = capsys.readouterr().out
    assert "exact: yes" in shown and f"bigrams counted on: {ours.name} (answers, 1 rows" in shown
    assert speed_cli.main([*speed, "bigram:1x2,plain", "--bigrams", ours.name]) == 0
    assert "exact: yes" in capsys.readouterr().out

    def refused(run, args, *words):
        with pytest.raises(SystemExit):
            run(args)
        error = capsys.readouterr().err
        assert all(word in error for word in words) and "Traceback" not in error

    refused(speed_cli.main, [*speed, "bigram:3x2", "--bigrams", out], "width 3", "has 2")
    refused(speed_cli.main, [*speed, "bigram", "--bigrams", theirs.name], "another tokenizer", "x")
    command.main([*count, "--store", theirs.name])
    refused(speed_cli.main, [*speed, "bigram", "--bigrams", out], out, "another tokenizer")
    refused(command.main, [*count, "--store", "nowhere"], "nowhere holds no store")
