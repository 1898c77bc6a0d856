"""The report of a head: what its page says is in the files, and it is usable as it stands."""

import json
import re
import shlex
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from redrafter.cli.check_store import main as check_store
from redrafter.cli.main import SUBCOMMANDS
from redrafter.cli.report import main as report
from redrafter.data.answers import generation_config
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.mixture import Mixture
from redrafter.drafters.replay import ReplayDrafter
from redrafter.drafters.selector import Selector
from redrafter.evaluation.report import measured_by, with_interval
from redrafter.files import write_json
from redrafter.generation import load_strategy
from redrafter.report.curves import read_logs
from redrafter.report.origins import KINDS, Tracer
from redrafter.report.page import page, tokens
from redrafter.report.svg import bars, lines, ticks
from redrafter.report.texts import pieces
from redrafter.targets.load import load_target
from redrafter.targets.text import continuation, text_of

VOID = {"meta", "rect", "line", "circle", "polyline"}


class Reader(HTMLParser):
    """The elements of a page; every one that is opened is closed, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)


def made(run: Path, *words: str) -> tuple[Reader, str]:
    assert report([str(run), *words]) == 0
    text = (run / "report.html").read_text()
    reader = Reader(text)
    return reader, "".join(reader.texts)


@pytest.fixture(scope="module")
def traced(published_run, tiny_target):
    """(target, prompts, {drafter's name: [(tracer, generation, plain tokens)]}), sampled."""
    target = load_target(str(tiny_target))
    wanted = generation_config(0.7, 24)
    prompts = [target.tokenizer(t).input_ids for t in ("# Anna has 3 cards.", "Ben 12 + 4 =")]
    found = {}
    for name in ("head:3x3", "mix(head:3x3,suffix:4x1):nodes=9", "select(none,head:3x3)"):
        strategy = load_strategy(target, name, head=published_run)
        tracer = Tracer(strategy.drafter, name)
        found[name] = []
        for i, ids in enumerate(prompts):
            drafted = speculative(target, [ids], wanted, seeds=[i], drafter=tracer)
            alone = plain(target, [ids], wanted, seeds=[i]).tokens[0]
            found[name].append((list(tracer.origins), drafted, alone))
    return target, prompts, found


def test_every_token_has_an_origin_and_the_counts_are_the_loops(traced):
    _, _, found = traced
    seen = set()
    for name, rows in found.items():
        for origins, drafted, alone in rows:
            kept = origins[: len(alone)]
            assert [o.token for o in kept] == drafted.tokens[0] == alone
            seen |= {o.kind for o in kept}
            stats = drafted.stats
            for depth, count in enumerate(stats.accepted_at, start=1):
                assert sum(o.kind == "drafted" and o.depth == depth for o in kept) == count
            assert kept[-1].step == stats.steps[0] and kept[0].kind == "first"
            assert sum(o.kind == "first" for o in kept) == 1
            if name.startswith("head"):
                assert {o.by for o in kept if o.kind == "drafted"} <= {(name,)}
            for o in kept:
                assert (o.kind == "drafted") == bool(o.depth) == bool(o.by)
                assert bool(o.rejected) == (o.kind == "corrected")
                assert o.token not in {token for token, _ in o.rejected}
    assert seen == set(KINDS), "a test that saw every kind"


def test_a_member_is_named_where_its_own_tree_had_the_token(traced):
    """Of a mixture every one that proposed it; of a selector the one that was asked."""
    target, prompts, found = traced
    texts = [[*prompts[0], *found["head:3x3"][0][2]]]

    def replay(acceptance: float, width: int = 1) -> ReplayDrafter:
        return ReplayDrafter(texts, target.vocab_size, 3 - min(width, 2), width, acceptance)

    def by(drafter) -> set[tuple[str, ...]]:
        tracer = Tracer(drafter, "all")
        speculative(target, prompts[:1], generation_config(0.7, 24), seeds=[0], drafter=tracer)
        kinds = [o.by for o in tracer.origins if o.kind == "drafted"]
        assert kinds
        return set(kinds)

    assert by(Mixture({"right": replay(1.0), "wrong": replay(0.0)})) == {("right",)}
    assert by(Mixture({"a": replay(1.0), "b": replay(1.0)})) == {("a", "b")}
    every = target.vocab_size  # any token is among the guesses of any step, a past one's too
    found = by(Selector({"a": replay(0.0, every), "b": replay(0.0, every)}))
    assert found == {("a",), ("b",)}


def test_probabilities_are_the_targets(traced):
    target, prompts, found = traced
    for ids, (origins, _, alone) in zip(prompts, found["head:3x3"], strict=True):
        row = torch.tensor([[*ids, *alone]])
        scores = target.model(row).logits[0, len(ids) - 1 : -1].double() / 0.7
        p = scores.softmax(-1).gather(1, torch.tensor(alone)[:, None])[:, 0]
        given = torch.tensor([o.p for o in origins[: len(alone)]], dtype=torch.float64)
        assert torch.allclose(p, given, atol=1e-4)
        assert all(0 <= o.q <= 1.0001 for o in origins if o.kind == "drafted")


def test_pieces_joined_are_the_text(tiny_target):
    target = load_target(str(tiny_target))
    ids = target.tokenizer("Zoë → 3 cards, ok").input_ids
    more = target.tokenizer(" näh → 12", add_special_tokens=False).input_ids
    assert "".join(pieces(target.tokenizer, ids, more)) == continuation(target.tokenizer, ids, more)
    assert "".join(pieces(target.tokenizer, [], ids)) == text_of(target.tokenizer, ids)


def test_the_page_says_what_the_files_say(run, tiny_target):
    prompts = tiny_target / "prompts_heldout.jsonl"
    reader, text = made(run, f"--target.path={tiny_target}", f"--prompts={prompts}",
                        "--n_prompts=2", "--max_new_tokens=16")  # fmt: skip
    body = json.loads((run / "speed.json").read_text())
    for name, m in body["methods"].items():
        assert name in text
        for key in ("tokens_per_step", "speedup_stock", "speedup_plain"):
            assert with_interval(m[key], m["low"].get(key), m["high"].get(key)) in text
    rates = body["methods"]["head"]["acceptance"]["unconditional"]
    assert " ".join("-" if r is None else f"{r:.3f}" for r in rates) in text
    proof = json.loads((run / "lossless.json").read_text())["methods"]["head"]["greedy"]
    assert f"{proof['compared_tokens']}{proof['near_ties']}{proof['unexplained']}" in text
    assert sum(tag == "svg" for tag, _ in reader.found) >= 5
    lists = [a for tag, a in reader.found if a.get("role") == "listbox"]
    assert len(lists) == 2
    options = [a for tag, a in reader.found if a.get("role") == "option"]
    assert options and all(re.search(r"the target gives it \d", a["title"]) for a in options)


def test_the_page_reaches_no_network(run):
    reader, _ = made(run)
    text = (run / "report.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttp|https?://(?!www\.w3\.org)", text)
    assert not [a for _, a in reader.found if {"src", "srcset", "action"} & set(a)]
    links = [a["href"] for tag, a in reader.found if "href" in a]
    ids = {a["id"] for _, a in reader.found if "id" in a}
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)


def test_a_wheel_names_its_version_where_a_clone_names_its_commit():
    versions = {"redrafter": "0.1.0"}
    assert measured_by({"git_commit": "0123456789abcdef", "versions": versions}) == (
        "commit 0123456789"
    )
    assert measured_by({"git_commit": None, "versions": versions}) == "redrafter 0.1.0"


def test_what_is_missing_names_the_command_that_makes_it(run):
    for name in ("speed.json", "lossless.json", "provenance.json"):
        (run / name).unlink()
    _, text = made(run)
    commands = re.findall("<code>(redrafter .*?)</code>", (run / "report.html").read_text())
    named = {shlex.split(unescape(command))[1] for command in commands}
    assert {"speed", "lossless", "costs", "acceptance", "report"} <= named
    assert named <= set(SUBCOMMANDS)
    assert not re.search(r"\d\.\d\d x", text), "nothing measured, nothing claimed"


def test_what_is_damaged_or_of_another_head_is_refused(run, capsys):
    body = json.loads((run / "speed.json").read_text())
    other = {**body["provenance"], "head": {"fingerprint": "f" * 16}}
    for name, content, said in (
        ("acceptance.json", {**body, "provenance": other}, "another head"),
        ("costs.json", {"target": []}, "no result of eval/costs.py"),
        ("costs.json", {**body["costs"], "provenance": {**body["provenance"], "target": {
            "fingerprint": "0" * 16}}}, "another target"),
    ):  # fmt: skip
        write_json(run / name, content)
        with pytest.raises(SystemExit) as end:
            report([str(run)])
        assert end.value.code == 2 and said in capsys.readouterr().err
        assert not (run / "report.html").exists()
        (run / name).unlink()
    with pytest.raises(SystemExit):
        report([str(run), "--target.path=nowhere"])
    assert "give --prompts" in capsys.readouterr().err


def test_measured_costs_come_before_those_of_a_speed(run):
    body = json.loads((run / "speed.json").read_text())
    write_json(run / "costs.json", {**body["costs"], "provenance": body["provenance"]})
    _, text = made(run)
    assert "ms (costs.json)" in text and "ms (speed.json)" not in text


def test_text_is_shown_and_never_run():
    bad = "</p><script>alert('x')</script>"
    shown = page(bad, "", {bad: tokens([(bad, "learned", "", bad + '"')], bad)})
    reader = Reader(shown)
    assert sum(tag == "script" for tag, _ in reader.found) == 1
    assert bad in unescape("".join(reader.texts))


def test_masks_are_those_of_the_rows(published_run, tiny_target, tmp_path, capsys):
    store = next((published_run / "data").glob("answers-*"))
    out = tmp_path / "rows.html"
    check_store([f"--store={store}", f"--html={out}", f"--target.path={tiny_target}", "--show=2"])
    assert str(out) in capsys.readouterr().out
    found = Reader(out.read_text()).found
    kinds = [a["class"] for tag, a in found if a.get("role") == "option"]
    counts = re.findall(r"Row \d+: (\d+) tokens, (\d+) learned", out.read_text())
    assert len(counts) == 2
    assert len(kinds) == sum(int(n) for n, _ in counts)
    assert kinds.count("learned") == sum(int(n) for _, n in counts) > 0
    assert kinds.count("unlearned") > 0


def test_curves_are_those_of_the_log(run):
    assert read_logs(run, ("train/loss",)) == {}
    for part, points in enumerate(([(2, 5.0), (4, 4.0)], [(4, 3.0), (6, 2.0)])):  # gone on from 2
        with SummaryWriter(run / "logs/redrafter", filename_suffix=f".{part}") as writer:
            for step, loss in points:
                writer.add_scalar("train/loss", loss, step, walltime=100.0 * part + step)
    curves = read_logs(run, ("train/loss", "train/none"))
    assert curves == {"train/loss": [(2, 5.0), (4, 3.0), (6, 2.0)]}
    reader, _ = made(run)
    assert "loss" in {a.get("aria-label") for tag, a in reader.found if tag == "svg"}


def test_charts_stand_for_their_numbers():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 3) == [3]
    assert lines("y", "x", {"none": []}) == "" and bars("y", []) == ""
    drawn = lines("y", "x", {"a": [(0, 0.0), (10, 2.0)], "b": [(5, 1.0)]})
    first, second = re.findall(r'points="(.*?)"', drawn)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in first.split())
    x, y = map(float, second.split(","))
    assert x == pytest.approx((x0 + x1) / 2, abs=0.1)
    assert y == pytest.approx((y0 + y1) / 2, abs=0.1)
    Reader(drawn)
    two, one = (
        float(w) for w in re.findall(r'class="bar" .*?width="(.*?)"',
                                     bars("y", [("a", 2.0, None, None), ("b", 1.0, 0.5, 1.5)]))
    )  # fmt: skip
    assert two == pytest.approx(2 * one, abs=0.2)
