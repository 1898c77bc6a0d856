"""scripts/dev/peers.py with engines that are made up: who is asked when, what becomes of one that
fails, and the figures and tables of the result. The engines themselves are not run here."""

import gzip
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts/dev"
sys.path.insert(0, str(SCRIPTS))
import peers  # noqa: E402
import peers_figures  # noqa: E402

#: A worker without torch. Each method writes down that it was asked.
FAKE = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import peers_worker

def method(name):
    if name == "unbuilt":
        raise ValueError("no such | model")
    asked = []

    def decode(ids):
        asked.append(ids)
        with open({turns!r}, "a") as file:
            file.write(f"{{name}} {{ids[0]}}\\n")
        if name == "dies" and ids[0] == 2:
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(7)
        if name == "raises" and ids[0] == 2:
            raise RuntimeError("needs a GPU")
        if name == "hangs":
            time.sleep(60)
        print("libraries print", flush=True)
        return [ids[0], len(asked) if name == "fickle" else 5]
    return decode

say = peers_worker.own_stdout()
peers_worker.serve(method, sys.argv[1:], say)
"""


@pytest.fixture
def fake(tmp_path):
    """A maker of groups: fake("a", "b") is one process of two methods."""
    worker, turns = tmp_path / "fake.py", tmp_path / "turns"
    worker.write_text(FAKE.format(scripts=str(SCRIPTS), turns=str(turns)))

    def group(*methods, **limits):
        return peers.Group(
            "fake", {f"the {m}": m for m in methods}, [sys.executable, str(worker), *methods],
            {}, tmp_path / "logs" / f"{methods[0]}.log", **limits,
        )  # fmt: skip

    group.turns = lambda: turns.read_text().split("\n")[:-1]
    return group


def test_peers_take_turns_and_one_that_fails_is_left_out(fake, tmp_path, capsys):
    records, saved = {}, []
    groups = [
        fake("a", "raises", "unbuilt", "fickle"), fake("dies", "b"), fake("hangs", answer_s=0.3),
        replace(fake("missing"), command=[str(tmp_path / "no-python")]),
    ]  # fmt: skip
    peers.measure(groups, [[1], [2]], 2, records, lambda: saved.append(json.dumps(records)))

    why = {peer: record["error"] for peer, record in records.items()}
    assert why["the a"] is None
    assert why["the raises"] == "RuntimeError: needs a GPU"
    assert why["the unbuilt"] == "ValueError: no such | model"
    assert why["the fickle"] == "other tokens for prompt 1 in round 2 than before"
    for peer in ("the dies", "the b"):  # of one process
        assert why[peer] == "its process ended with status 7: out of memory"
    assert "no-python" in why["the missing"]
    assert why["the hangs"] == "no answer within 0.3 s"

    record = records["the a"]
    assert record["tokens"] == [[1, 5], [2, 5]]
    for key in ("seconds", "cpu_seconds"):
        assert [len(of) for of in record[key]] == [2, 2]
        assert all(s >= 0 for of in record[key] for s in of)
    # The warm-up is in the order given; then it rotates from prompt to prompt.
    turns = fake.turns()
    assert turns[:6] == ["a 1", "raises 1", "fickle 1", "dies 1", "b 1", "hangs 1"]
    assert turns[6:11] == ["a 1", "raises 1", "fickle 1", "dies 1", "b 1"]
    assert turns[11:15] == ["raises 2", "fickle 2", "dies 2", "a 2"]
    assert len(saved) == 4
    assert json.loads(saved[0])["the a"]["tokens"] == [[1, 5]]  # partial results are results
    assert "the raises is left out" in capsys.readouterr().err


def test_every_engine_gets_so_many_threads(monkeypatch):
    """numba's default is every core, and its pool makes that OpenMP's number for the process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for engine in peers.GROUPS:
        env = peers.environment(engine, sys.executable, 2, "elsewhere")
        assert env["OMP_NUM_THREADS"] == env["NUMBA_NUM_THREADS"] == "2"
        assert env["OMP_WAIT_POLICY"]
        assert ("elsewhere" in env["PYTHONPATH"]) == (engine == "flashspec")


def record(tokens, seconds, error=None, cpu=None):
    return {"engine": "fake", "tokens": tokens, "seconds": seconds,
            "cpu_seconds": cpu or seconds, "error": error}  # fmt: skip


@pytest.fixture
def records():
    text = [[1, 2, 3, 4], [5, 6, 7, 8]]
    return {
        "redrafter plain": record(text, [[2.0, 4.0]]),
        "redrafter head:1x2": record(text, [[1.0, 2.0], [9.0, 2.0], [1.0, 2.0]]),
        "transformers stock": record(text, [[4.0, 4.0]], cpu=[[8.0, 8.0]]),
        "vLLM plain": record([text[0], [5, 6, 7, 9]], [[0.5, 2.0]]),
        "FlashSpec n-gram": record([text[0]], [[1.0]], "needs | CUDA"),
    }


def test_figures_are_of_rounds_and_prompts(records):
    found = peers_figures.figures(records)
    head = found["redrafter head:1x2"]
    assert head["tokens_per_second"][0] == pytest.approx(8 / 3)  # the median round, all prompts
    assert head["x_plain"] == pytest.approx((2, 2, 2))
    assert head["x_stock"][0] == pytest.approx(3)  # of 4 and 2
    assert head["x_stock"][1:] == pytest.approx((2, 4))
    assert head["cpu_x_stock"][0] == pytest.approx(6)
    assert head["equal_texts"] == 2
    assert found["redrafter plain"]["cpu_ms_per_token"][0] == pytest.approx(750)
    assert found["vLLM plain"]["equal_texts"] == 1
    assert found["vLLM plain"]["x_plain"][0] == pytest.approx(3)
    assert "FlashSpec n-gram" not in found

    best, faster = peers_figures.ahead(records)
    assert best == "redrafter head:1x2"
    assert set(faster) == {"vLLM plain"}
    assert faster["vLLM plain"][0] == pytest.approx(1.5)
    del records["redrafter plain"]
    assert peers_figures.figures(records)["vLLM plain"]["x_plain"] is None


def test_tables_name_what_failed_and_who_is_ahead(records, tmp_path, capsys):
    body = {
        "asked": {"n_prompts": 2, "new_tokens": 4, "rounds": 1, "model": "small", "eager": False},
        "device": "a CPU", "machine": "x86_64, 2 CPUs", "git_commit": "0123456789abcdef",
        "versions": {"fake": {"torch": "2"}}, "runs": {"1": records, "2": {}},
    }  # fmt: skip
    file = tmp_path / "peers.json.gz"
    file.write_bytes(gzip.compress(json.dumps(body).encode()))
    assert peers.main(["table", str(file)]) == 0
    shown = capsys.readouterr().out
    rows = {line.split("|")[1].strip(" `"): line for line in shown.split("\n") if "|" in line}
    assert "needs / CUDA" in rows["FlashSpec n-gram"]
    assert len({line.count("|") for line in rows.values()}) == 1
    assert "1/2" in rows["vLLM plain"] and "3.00 [2.00, 4.00]" in rows["vLLM plain"]
    assert "ahead of it: `vLLM plain` by 1.50 [1.00, 2.00]." in shown
    assert "None of our loops was measured." in shown
    with pytest.raises(SystemExit):
        peers.main(["table", str(tmp_path / "none.json")])


def test_the_committed_tables_are_of_the_committed_result():
    text = (ROOT / "docs/results/speed.md").read_text(encoding="utf-8")
    named = re.search(r"<!-- python scripts/dev/peers.py table (\S+) -->\n", text)
    body = json.loads(gzip.decompress((ROOT / named[1]).read_bytes()))
    assert text[named.end() :].startswith(peers_figures.show(body) + "\n")
