"""Where rows come from: every kind of file, what is counted and left out, and what is broken."""

import gzip
import json
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redrafter.config import SourceConfig
from redrafter.contracts import InputError
from redrafter.data.sources import read_source

ROWS = [
    {"question": "2024-01-01", "answer": "a\u2028b"},  # a loader that guesses makes it a date
    {"question": 3, "extra": [1, "x", {"y": None}]},
    {"messages": [{"role": "user", "content": "hi"}, {"from": "gpt", "value": "yo"}]},
    {"question": None, "answer": "d"},
]
READ = [*ROWS[:3], {"answer": "d"}]


def lines(rows):
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def write(path, content):
    raw = content.encode()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    return path


def source(path, **settings):
    return read_source(SourceConfig(str(path), **settings))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "array"),
    [("a.jsonl", False), ("a.jsonl.gz", False), ("a.json", False), ("a.json.gz", False),
     ("a.json", True), ("a.json.gz", True)],
)  # fmt: skip
def test_json_in_every_wrapping(tmp_path, name, array, streaming):
    text = "\ufeff" + (json.dumps(ROWS, indent=1) if array else lines(ROWS))
    made = source(write(tmp_path / name, text), streaming=streaming)
    assert list(made) == list(enumerate(READ)) == list(made)
    assert made.n_rows == (None if streaming else 4)
    assert made.where(2) == f"{tmp_path / name}{' row ' if array else ':'}3"


def test_parquet_leaves_nothing_behind(tmp_path):
    rows = [{"question": "a", "answer": "x"}, {"question": "b", "answer": None}]
    path = tmp_path / "strange [1].parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    code = (
        "from redrafter.config import SourceConfig; from redrafter.data.sources import read_source;"
        f"s = read_source(SourceConfig({str(path)!r})); print(list(s), len(s), s.where(1))"
    )
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = [(0, rows[0]), (1, {"question": "b"})]
    assert done.stdout == f"{wanted} 2 {path} row 2\n"
    assert done.stderr == "", "reading a file is no reason to draw bars"
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_globs_number_rows_through(tmp_path):
    for name in "cab":
        write(tmp_path / f"{name}.jsonl", f'{{"text": "{name}"}}\n\n{{"text": "{name}2"}}\n')
    pq.write_table(pa.Table.from_pylist([{"text": "p"}]), tmp_path / "b.parquet")
    made = source(tmp_path / "[ab].*")
    rows = list(made)
    assert [content["text"] for _, content in rows] == ["a", "a2", "b", "b2", "p"]
    assert [row for row, _ in rows] == [0, 2, 3, 5, 6], "a row is not its place in the files"
    assert [made.where(row).removeprefix(str(tmp_path)) for row, _ in rows] == [
        "/a.jsonl:1", "/a.jsonl:3", "/b.jsonl:1", "/b.jsonl:3", "/b.parquet row 1",
    ]  # fmt: skip
    assert len(made) == 5


def test_a_folder_keeps_its_splits_apart(tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    write(folder / "README.md", "# a data set\n")
    write(folder / "data/train-1.jsonl", lines(ROWS[:2]))
    write(folder / "data/train-2.jsonl", lines(ROWS[2:]))
    write(folder / "data/test.jsonl", '{"text": "held out"}\n')
    assert [content for _, content in source(folder)] == READ
    assert [content for _, content in source(folder, split="test")] == [{"text": "held out"}]
    with pytest.raises(InputError, match=r"no split 'dev'.*train"):
        source(folder, split="dev")


@pytest.mark.parametrize("streaming", [False, True])
def test_what_else_datasets_reads(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "a.csv", "question,answer\nhi,yo\nno,\n")
    made = source(folder, streaming=streaming)
    assert [content for _, content in made] == [{"question": "hi", "answer": "yo"},
                                                {"question": "no"}]  # fmt: skip
    assert made.n_rows == (None if streaming else 2)
    assert made.digest == source(folder, streaming=not streaming).digest


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_id_is_asked_for_by_all_its_names(tmp_path, monkeypatch, streaming):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "valid.csv", "question\nhi\nyo\n")
    load, asked = datasets.load_dataset_builder, []

    def local_instead(path, **options):
        asked.append((path, options.pop("name"), options.pop("revision")))
        return load(str(folder), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr("datasets.load_dataset_builder", local_instead)
    settings = {"subset": "main", "revision": "v2", "split": "validation", "streaming": streaming}
    made = source("some/set", **settings)
    assert asked == [("some/set", "main", "v2")]
    assert [content["question"] for _, content in made] == ["hi", "yo"]
    assert (made.n_rows, made.where(1)) == (None if streaming else 2,
                                            "some/set (validation) row 2")  # fmt: skip
    assert made.digest != source("some/set", **{**settings, "revision": "v3"}).digest
    with pytest.raises(InputError, match="check split 'test'"):
        source("some/set", **{**settings, "split": "test"})


def test_front_and_end(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"text": str(i)} for i in range(10)))

    def rows(**settings):
        made = source(path, **settings)
        rows = [row for row, _ in made]
        assert made.n_rows == len(made) == len(rows)
        return rows

    assert rows(n_rows=3) == [0, 1, 2]
    assert rows(holdout_rows=3) == list(range(7))
    assert rows(holdout_rows=3, n_rows=2) == [0, 1]
    assert rows(holdout_rows=3, n_rows=9) == list(range(7))
    held = source(path, holdout_rows=3)
    assert [row for row, _ in held.held_out()] == [7, 8, 9]
    assert [row for row, _ in held.held_out(2)] == [8, 9]
    assert [row for row, _ in source(path).held_out(2)] == [8, 9]
    assert [row for row, _ in source(path, streaming=True, n_rows=2)] == [0, 1]


def test_settings_that_cannot_be_met(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(ROWS))
    with pytest.raises(InputError, match="end of a stream is not known; set streaming false"):
        source(path, streaming=True, holdout_rows=1)
    with pytest.raises(InputError, match=r"no rows left \(4 rows, 4 of them held out\)"):
        list(source(path, holdout_rows=4))
    for wrong in ({"n_rows": 0}, {"holdout_rows": -1}):
        with pytest.raises(InputError, match="must be positive"):
            source(path, **wrong)
    with pytest.raises(TypeError):
        len(source(path, streaming=True))


def test_the_digest_is_the_content(tmp_path):
    one = source(write(tmp_path / "a.jsonl", lines(ROWS))).digest
    assert one == source(write(tmp_path / "b.jsonl", lines(ROWS))).digest
    assert one != source(write(tmp_path / "c.jsonl", lines(ROWS[:3]))).digest
    assert one != source(tmp_path / "[ac].jsonl").digest
    assert len(one) == 64


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": }\n', r"a\.jsonl:3: not valid JSON .*column 7"),
        ("a.jsonl", b'{"a": 1}\n"text"\n', r"a\.jsonl:2: not a JSON object but a str"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: JSON nested"),
        ("a.jsonl", b"\n", "has no rows"),
        ("a.json", b'[{"a": 1},\n {"a": }]', r"a\.json: not valid JSON .*line 2, column 8"),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json row 2: not a JSON object"),
        ("a.json", b'{\n"a": [1]}', r"a\.json:1: not valid JSON.*one array"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-12],
            r"a\.jsonl\.gz: cannot be read",
        ),
        ("a.json.gz", gzip.compress(b'[{"a": 1}]', mtime=0)[:-9], r"a\.json\.gz: cannot be read"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a whole Parquet file"),
        ("a.txt", b"text", r"a\.txt: no format that is known"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=named):
        list(source(tmp_path / name))


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("none.jsonl", "does not exist"),
        ("a/b/c", "does not exist"),
        ("*.parquet", "matches no file"),
        ("nobody/nothing", "HF_HUB_OFFLINE is set.*Hub id"),
    ],
)
def test_nothing_there(tmp_path, monkeypatch, path, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=named):
        source(path)
