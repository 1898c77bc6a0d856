"""Stores: what is written is what is read, and every kind of damage is named."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from redrafter.cli.check_store import main as check
from redrafter.contracts import InputError
from redrafter.data.build_rows import columns_of
from redrafter.data.rows import TokenRow
from redrafter.data.store import FORMAT, Job, Store, shard_name

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = 8


def row(n, start):
    """n tokens start, start + 1, ...; the second half is supervised."""
    ids = tuple(range(start, start + n))
    return TokenRow(ids, tuple(i >= n // 2 for i in range(n)), source_row=start)


def write(folder, shards, identity=None, dtype=torch.float32, finish=True, factor=1):
    """shards: lists of (row number, TokenRow). The state of token v is v, v + 0.5, ... times
    `factor`"""
    job = Job(folder, "states", identity or {"target": "t"})
    for index, rows in enumerate(shards):
        columns = columns_of([r for _, r in rows], [n for n, _ in rows])
        values = (columns["tokens"][:, None] + torch.arange(HIDDEN) / 2) * factor
        job.write(index, {**columns, "states": values.to(dtype)})
    if finish:
        job.finish(len(shards))
    return Path(folder)


@pytest.fixture
def folder(tmp_path):
    """Two shards, whose rows are not in order of their numbers."""
    return write(tmp_path / "s", [[(3, row(5, 300)), (0, row(4, 100))], [(1, row(7, 200))]])


def test_rows_come_back_in_order_of_their_numbers(folder):
    store = Store(folder, "states")
    assert (store.n_rows, store.row.tolist()) == (3, [0, 1, 3])
    assert store.lengths.tolist() == [4, 7, 5] and store.source_row.tolist() == [100, 200, 300]
    rows = store.rows()
    assert [rows.ids(i)[0] for i in range(3)] == [100, 200, 300]
    assert rows.supervised.tolist() == [False] * 2 + [True] * 2 + [False] * 3 + [True] * 4 + [
        False] * 2 + [True] * 3  # fmt: skip
    some = store.read([2, 0, 2], ["states", "tokens"])
    assert some["offsets"].tolist() == [0, 5, 9, 14]
    assert some["tokens"].tolist() == [*range(300, 305), *range(100, 104), *range(300, 305)]
    assert torch.equal(some["states"], some["tokens"][:, None] + torch.arange(HIDDEN) / 2)
    counts = store.counts
    assert (counts["rows"], counts["tokens"], counts["supervised"]) == (3, 16, 9)
    store.verify()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_every_dtype_comes_back(tmp_path, dtype):
    store = Store(write(tmp_path / "s", [[(0, row(6, 3))]], dtype=dtype))
    assert store.columns["states"] == (dtype, (HIDDEN,))
    found = store.read([0], ["states"])["states"]
    assert torch.equal(found, (torch.arange(3, 9)[:, None] + torch.arange(HIDDEN) / 2).to(dtype))


def test_shards_can_be_shared(folder):
    """safetensors writes files that nobody else may read."""
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes[".safetensors"] == modes[".json"]


def test_starts_are_counted_within_rows(tmp_path):
    """A supervised first token has none before it, though another row ends there."""
    one = TokenRow((1, 2, 3), (True, True, True), 0)
    two = TokenRow((4, 5), (False, True), 1)
    store = Store(write(tmp_path / "s", [[(0, one), (1, two)]]))
    assert store.starts.tolist() == [[2, 1], [1, 0]]


def test_the_same_rows_have_the_same_bytes(tmp_path):
    rows = [[(0, row(5, 1)), (1, row(9, 50))], [(2, row(4, 9))]]
    a, b = (write(tmp_path / name, rows) for name in "ab")
    for file in sorted(a.iterdir()):
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    assert Store(a).digest == Store(b).digest
    other = write(tmp_path / "c", [[(0, row(5, 1)), (1, row(9, 51))], [(2, row(4, 9))]])
    assert Store(other).digest != Store(a).digest


# ------------------------------------------------------------------ damage


def shard(folder, index=0):
    return folder / f"{shard_name(index)}.safetensors"


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(bytes(content))


def test_every_flipped_byte_is_found(folder):
    """By the digest, always; by reading too, but for what lies between the data."""
    size = shard(folder).stat().st_size
    read = 0
    for at in range(0, size, 5):
        flip(shard(folder), at)
        with pytest.raises(InputError, match=r"shard-00000\.safetensors is damaged"):
            Store(folder).verify()
        try:
            store = Store(folder)
            store.read(range(3), ["states", "tokens", "supervised"])
        except InputError as error:
            read += 1
            assert "shard-00000.safetensors is damaged" in str(error)
            assert "run the command that made the store" in str(error)
        flip(shard(folder), at)
    assert read > 0.9 * len(range(0, size, 5))  # blanks of the header are nobody's
    Store(folder).verify()


def test_a_flipped_state_names_its_row(folder):
    flip(shard(folder, 1), -1)  # the last byte: `tokens` or `states` of row number 1
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is damaged \(row 1, \w+"):
        Store(folder).read([1], ["states", "supervised", "tokens"])
    Store(folder).read([0, 2], ["states", "tokens"])  # the other shard is whole


def test_missing_and_shortened_shards_are_named(folder):
    kept = shard(folder, 1).read_bytes()
    shard(folder, 1).write_bytes(kept[:-8])
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is damaged .*bytes long"):
        Store(folder)
    shard(folder, 1).unlink()
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is missing"):
        Store(folder)
    shard(folder, 1).write_bytes(kept)
    Store(folder).verify()


def test_check_command(folder, capsys):
    assert check([f"--store={folder}"]) == 0
    assert "every shard has the digest" in capsys.readouterr().out
    flip(shard(folder), -1)
    with pytest.raises(SystemExit):
        check([f"--store={folder}"])
    assert "shard-00000.safetensors is damaged" in capsys.readouterr().err


def test_unfinished_foreign_and_old_stores_are_named(tmp_path, folder):
    begun = write(tmp_path / "begun", [[(0, row(4, 1))]], finish=False)
    with pytest.raises(InputError, match="not complete: run the command that makes it once more"):
        Store(begun)
    with pytest.raises(InputError, match=rf"{tmp_path} holds no store .* give one of {folder} \("):
        Store(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no store"):
        Store(tmp_path / "empty")
    with pytest.raises(InputError, match="holds states, not answers"):
        Store(folder, "answers")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"]["format"] = FORMAT - 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"store format {FORMAT - 1}, this version .* {FORMAT}"):
        Store(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json cannot be read"):
        Store(folder)


def test_another_job_in_the_same_folder_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"holds another job \(target 't' -> 'u'\)"):
        Job(folder, "states", {"target": "u"})
    with pytest.raises(InputError, match=r"kind 'states' -> 'answers'"):
        Job(folder, "answers", {"target": "t"})
    job = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps({**job, "format": 0}))
    with pytest.raises(InputError, match="store format 0"):
        Job(folder, "states", {"target": "t"})
    (folder / "job.json").unlink()
    with pytest.raises(InputError, match=r"job\.json is missing"):
        Job(folder, "states", {"target": "t"})


def test_a_job_that_has_written_nothing_gives_way(tmp_path):
    """Refused for its size, say: the remedy is another dtype, and not another folder."""
    Job(tmp_path / "s", "states", {"dtype": "float32"})
    write(tmp_path / "s", [[(0, row(4, 1))]], {"dtype": "int8"})
    assert Store(tmp_path / "s").identity["dtype"] == "int8"
    with pytest.raises(InputError, match="holds another job"):
        Job(tmp_path / "s", "states", {"dtype": "float32"})
    # It may not have ended, though: two jobs must not mix.
    first = Job(tmp_path / "u", "states", {"dtype": "float32"})
    Job(tmp_path / "u", "states", {"dtype": "int8"})
    with pytest.raises(InputError, match="holds another job"):
        first.write(0, columns_of([row(4, 1)], [0]))
    assert not list((tmp_path / "u").glob("shard-*"))
    # A shard of which every row was left out is something, too.
    job = Job(tmp_path / "t", "texts", {"n": 1})
    job.write(0, {}, [{"source_row": 0, "reason": "duplicate", "failed": False}])
    with pytest.raises(InputError, match="holds another job"):
        Job(tmp_path / "t", "texts", {"n": 2})


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=f"{re.escape(str(path))} cannot be made a folder"):
            Job(path, "states", {"target": "t"})


# ------------------------------------------------------------------ interruptions


def test_what_a_kill_leaves_is_made_again(tmp_path):
    """A shard without receipt, a receipt without shard, a part of a file: none counts."""
    shards = [[(i, row(4 + i, 10 * i))] for i in range(4)]
    whole = write(tmp_path / "whole", shards)
    folder = write(tmp_path / "s", shards, finish=False)
    (folder / "shard-00001.json").unlink()
    shard(folder, 2).unlink()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (folder / f".shard-00003.safetensors.{ended.pid}.part").write_bytes(b"half")
    job = Job(folder, "states", {"target": "t"})
    assert sorted(job.receipts) == [0, 3] and not list(folder.glob(".*.part"))
    write(folder, shards)
    for file in whole.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


def test_what_another_process_is_writing_stays(tmp_path):
    """Runs started together share the stages of one data folder."""
    write(tmp_path / "s", [[(0, row(4, 1))]], finish=False)
    names = [f".shard-00001.safetensors.{pid}.part" for pid in (os.getppid(), os.getpid())]
    for name in names:
        (tmp_path / "s" / name).write_bytes(b"half")
    Job(tmp_path / "s", "states", {"target": "t"})
    assert [(tmp_path / "s" / name).exists() for name in names] == [True, False]


def test_nothing_half_written_is_seen(tmp_path, monkeypatch):
    """The process ends in the middle of a write: no shard, no receipt."""
    def dies(columns, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", [[(0, row(4, 1))]])
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["job.json"]


_FILL = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from redrafter.contracts import InputError
from test_store import row, write
try:
    write(sys.argv[2], [[(i, row(400, 7 * i))] for i in range(40)])
except InputError as error:
    print(error)
    sys.exit(7)
"""


def test_a_full_disk_says_so_and_loses_nothing(tmp_path):
    """On a file system of 200 kB, mounted for this test alone."""
    place, kept = tmp_path / "small", tmp_path / "kept"
    place.mkdir()
    (tmp_path / "fill.py").write_text(_FILL)
    script = (
        f"mount -t tmpfs -o size=200k tmpfs {place} || exit 99; "
        f"{sys.executable} {tmp_path}/fill.py {ROOT} {place}/s; code=$?; "
        f"cp -r {place}/s {kept}; exit $code"
    )
    if shutil.which("unshare") is None:
        pytest.skip("no unshare: a file system of limited size cannot be mounted")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no rights to mount a file system of limited size: {done.stderr.strip()}")
    assert done.returncode == 7, done.stderr
    assert "the disk is full" in done.stdout and "run the same command again" in done.stdout
    assert not list(kept.glob(".*")), "what was half written takes the room of the next try"
    found = Job(kept, "states", {"target": "t"})
    assert 3 < len(found.receipts) < 40
    # With room again, the same job goes on and ends as if nothing had happened.
    shards = [[(i, row(400, 7 * i))] for i in range(40)]
    whole = write(tmp_path / "whole", shards)
    before = {i: shard(kept, i).stat().st_mtime_ns for i in found.receipts}
    for index in sorted(set(range(40)) - set(found.receipts)):
        columns = columns_of([shards[index][0][1]], [index])
        values = columns["tokens"][:, None] + torch.arange(HIDDEN) / 2
        found.write(index, {**columns, "states": values})
    found.finish(40)
    assert all(shard(kept, i).stat().st_mtime_ns == when for i, when in before.items())
    for file in whole.iterdir():
        assert file.read_bytes() == (kept / file.name).read_bytes(), file.name


def test_a_quota_is_told_from_other_errors(tmp_path, monkeypatch):
    def refuses(code):
        def save(columns, path, metadata):
            raise OSError(code, "refused")

        monkeypatch.setattr("safetensors.torch.save_file", save)
        write(tmp_path / str(code), [[(0, row(4, 1))]])

    with pytest.raises(InputError, match="the disk is full"):
        refuses(122)  # EDQUOT
    with pytest.raises(OSError, match="refused"):
        refuses(5)  # EIO: not ours to explain


# ------------------------------------------------------------------ elsewhere


def test_a_store_behind_a_url(folder, monkeypatch, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/remote", recursive=True)
    store = Store("memory://remote")
    assert torch.equal(store.rows().tokens, Store(folder).rows().tokens)
    store.verify()
    fetched = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("shard-*")}
    assert len(fetched) == 2
    Store("memory://remote").verify()
    assert {p: p.stat().st_mtime_ns for p in fetched} == fetched, "fetched twice"
    with pytest.raises(InputError, match="holds no store"):
        Store("memory://nothing")
    with pytest.raises(InputError, match=re.escape("nosuch://x")):
        Store("nosuch://x")
    # Made anew with shards of the same names and sizes: what was fetched before is another store's.
    fsspec.filesystem("memory").rm("/remote", recursive=True)
    states = [[(3, row(5, 300)), (0, row(4, 100))], [(1, row(7, 200))]]
    other = write(tmp_path / "other", states, {"target": "u"}, torch.float32, factor=2)
    memory.put(str(other), "/remote", recursive=True)
    found = Store("memory://remote")
    assert found.digest == Store(other).digest
    a, b = (s.read([0], ["states"])["states"] for s in (found, Store(other)))
    assert torch.equal(a, b)
    # A transfer that changed a byte is found before anything is read from it.
    shutil.rmtree(tmp_path / "cache")
    content = bytearray(memory.cat_file("/remote/shard-00000.safetensors"))
    content[-1] ^= 1
    memory.pipe_file("/remote/shard-00000.safetensors", bytes(content))
    with pytest.raises(InputError, match="its digest differs from the manifest"):
        Store("memory://remote")
