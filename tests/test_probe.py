"""Probed bigrams: what is probed, an interrupted build, and tables of another target."""

import json
from itertools import chain

import pytest
import torch
from models import FAMILIES, VOCAB, tiny
from safetensors.torch import load_file

import redrafter.tables.probed as probed
from redrafter.cli import probe_bigrams as command
from redrafter.cli import speed as speed_cli
from redrafter.contracts import InputError
from redrafter.drafters.bigram import BigramTable, count_bigrams, load_bigrams, save_bigrams
from redrafter.tables.bigrams import open_bigrams, open_probed
from redrafter.tables.probed import (
    probe_bigrams,
    unembedding_distance,
    unigram_of_weights,
)
from redrafter.targets.load import load_target

BOS = 1  # of every tiny target's configuration


def by_hand(target, context: list[int], width: int):
    """Ids and log-probabilities after a context, by transformers' own forward and a full sort."""
    logits = target.model(torch.tensor([context])).logits[0, -1]
    order = logits.argsort(descending=True)[:width]
    return order.tolist(), logits.log_softmax(-1)[order]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_table_is_brute_force(family, bos, tmp_path):
    target = tiny(family)
    table = probe_bigrams(target, tmp_path / "t", width=6, bos=bos, batch_size=7, part_tokens=20)
    assert table.tokens.shape == (VOCAB, 6) and table.n_seen == VOCAB
    for x in range(VOCAB):
        ids, log_p = by_hand(target, [BOS, x] if bos else [x], 6)
        assert torch.allclose(table.log_p[x].double(), log_p, atol=1e-5)
        # Padding's embedding is zero in some families: all tokens are then equally probable.
        assert table.tokens[x].tolist() == ids or (x == 0 and log_p[0] - log_p[-1] < 1e-9)
    loaded, about = load_bigrams(tmp_path / "t", VOCAB)
    assert torch.equal(loaded.tokens, table.tokens) and torch.equal(loaded.log_p, table.log_p)
    assert torch.equal(loaded.unigram, table.unigram)
    assert (about["kind"], about["bos"], about["width"]) == ("probed", bos, 6)
    assert about["target"]["weights"] == target.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["t"], "no parts are left"


def test_unigrams(tmp_path):
    target = tiny("llama")
    width = VOCAB

    def unigram(kind):
        return probe_bigrams(target, tmp_path / kind, width=width, unigram=kind).unigram.tolist()

    assert unigram("bos") == by_hand(target, [BOS], width)[0]
    every = target.model(torch.arange(VOCAB)[:, None]).logits[:, 0].softmax(-1).mean(0)
    assert unigram("table") == every.argsort(descending=True).tolist()
    rows = target.lm_head_weight.double()
    away = rows - rows.mean(0)
    whitened = away @ torch.linalg.inv(torch.cov(rows.T, correction=0))
    distance = (whitened * away).sum(1)
    assert torch.allclose(unembedding_distance(target), distance)
    assert unigram("weights") == distance.argsort(descending=True).tolist()
    assert load_bigrams(tmp_path / "bos", VOCAB)[1]["unigram"] == "bos"


def test_distance_in_pieces_is_the_whole(monkeypatch):
    target = tiny("qwen3")
    whole = unembedding_distance(target)
    monkeypatch.setattr(probed, "_CHUNK_ROWS", 7)
    assert torch.allclose(unembedding_distance(target), whole)
    assert len(unigram_of_weights(target, 5)) == 5


# ---------------------------------------------------------------- interruptions


class Killed(Exception):
    pass


@pytest.fixture
def asked(monkeypatch):
    """The tokens that the target is asked about, and a limit after which the build is killed."""
    inner, seen = probed.top_successors, []
    limit = [None]

    def ask(target, tokens, width, bos):
        if limit[0] is not None and len(seen) >= limit[0]:
            raise Killed
        seen.append(tokens.tolist())
        return inner(target, tokens, width, bos)

    monkeypatch.setattr(probed, "top_successors", ask)
    return seen, limit


SMALL = dict(width=3, batch_size=5, part_tokens=10)


@pytest.mark.parametrize("n_batches", [0, 1, 2, 5, 9])
def test_a_killed_build_goes_on(tmp_path, asked, n_batches):
    seen, limit = asked
    target = tiny("llama")
    whole = probe_bigrams(target, tmp_path / "whole", **SMALL)
    seen.clear()
    limit[0] = n_batches
    with pytest.raises(Killed):
        probe_bigrams(target, tmp_path / "t", **SMALL)
    assert not (tmp_path / "t").exists()
    n_parts = n_batches // 2
    assert len(list((tmp_path / "t.parts").glob("*.safetensors"))) == n_parts
    seen.clear()
    limit[0] = None
    table = probe_bigrams(target, tmp_path / "t", **SMALL)
    assert list(chain(*seen)) == list(range(n_parts * 10, VOCAB)), (
        "finished parts are not made again"
    )
    assert torch.equal(table.tokens, whole.tokens) and torch.equal(table.log_p, whole.log_p)
    assert (tmp_path / "t").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "t.parts").exists()


def test_a_kill_after_the_table_was_written(tmp_path, asked, monkeypatch):
    seen, _ = asked

    def killed(*_):
        raise Killed

    monkeypatch.setattr(probed, "rmtree", killed)
    with pytest.raises(Killed):
        probe_bigrams(tiny("llama"), tmp_path / "t", **SMALL)
    monkeypatch.undo()
    before = (tmp_path / "t").read_bytes()
    seen.clear()
    probe_bigrams(tiny("llama"), tmp_path / "t", **SMALL)
    assert not seen and (tmp_path / "t").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_damaged_parts_and_leftovers(tmp_path, asked):
    seen, limit = asked
    limit[0] = 6
    with pytest.raises(Killed):
        probe_bigrams(tiny("llama"), tmp_path / "t", **SMALL)
    parts = sorted((tmp_path / "t.parts").glob("*.safetensors"))
    parts[1].write_bytes(parts[1].read_bytes()[:-3])
    parts[2].unlink()
    (tmp_path / "t.parts" / ".x.999999999.part").write_text("half a part")
    seen.clear()
    limit[0] = None
    probe_bigrams(tiny("llama"), tmp_path / "t", **SMALL)
    assert list(chain(*seen)) == list(range(10, VOCAB))
    assert not (tmp_path / "t.parts").exists()


def test_parts_of_another_build_are_refused(tmp_path, asked):
    seen, limit = asked
    limit[0] = 3
    out = tmp_path / "t"
    with pytest.raises(Killed):
        probe_bigrams(tiny("llama"), out, **SMALL)
    seen.clear()
    with pytest.raises(InputError, match=r"t\.parts holds parts of another build.*target"):
        probe_bigrams(tiny("qwen3"), out, **SMALL)
    for change in ({"bos": True}, {"width": 4}, {"part_tokens": 5}, {"unigram": "bos"}):
        name = next(iter(change))
        with pytest.raises(InputError, match=rf"t\.parts holds .* differs in {name}\)"):
            probe_bigrams(tiny("llama"), out, **{**SMALL, **change})
    (tmp_path / "t.parts" / "settings.json").write_text("{")
    with pytest.raises(InputError, match="parts of another build"):
        probe_bigrams(tiny("llama"), out, **SMALL)
    (tmp_path / "t.parts" / "settings.json").unlink()
    with pytest.raises(InputError, match="parts of another build"):
        probe_bigrams(tiny("llama"), out, **SMALL)
    assert not seen, "refused before any work"


# ---------------------------------------------------------------- use


def test_a_table_of_another_target_is_refused(tmp_path):
    path = str(tmp_path / "t")
    probe_bigrams(tiny("llama"), path, **SMALL)
    table, said = open_bigrams(path, tiny("llama"), 2)
    assert said == f"{path}: probed without BOS" and table.unigram is not None
    other = tiny("llama", hidden_size=40)  # the same vocabulary
    with pytest.raises(InputError, match=rf"{path} was probed from another target.*probe\.py"):
        open_bigrams(path, other, 2)


def test_a_counted_table_is_no_probed_one(tmp_path):
    path, target = str(tmp_path / "t"), tiny("llama")
    probe_bigrams(target, path, **SMALL)
    assert torch.equal(open_probed(path, target).tokens, load_bigrams(path, VOCAB)[0].tokens)
    with pytest.raises(InputError, match=r"probed from another target"):
        open_probed(path, tiny("llama", hidden_size=40))
    save_bigrams(tmp_path / "c", count_bigrams([[1, 2, 3]], VOCAB, 2), {"counted_on": {}})
    with pytest.raises(InputError, match=r"holds counted bigrams.*--bigrams.*probe\.py"):
        open_probed(str(tmp_path / "c"), target)
    with pytest.raises(InputError, match=r"does not exist.*probe\.py"):
        open_probed(str(tmp_path / "none"), target)


def test_what_cannot_be_probed(tmp_path):
    for width in (0, VOCAB + 1):
        with pytest.raises(InputError, match=f"width: {width} must be"):
            probe_bigrams(tiny("llama"), tmp_path / "t", width=width)
    target = tiny("llama", bos_token_id=None)
    for change in ({"bos": True}, {"unigram": "bos"}):
        with pytest.raises(InputError, match=f"{next(iter(change))}: .* has no BOS token"):
            probe_bigrams(target, tmp_path / "t", **change)
    assert not list(tmp_path.iterdir())
    table = BigramTable(torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 2), torch.tensor([4]))
    save_bigrams(tmp_path / "t", table, {})
    with pytest.raises(InputError, match="damaged"):
        load_bigrams(tmp_path / "t", 4)


def test_commands(tiny_target, tmp_path, capsys):
    out = str(tmp_path / "new" / "probed.safetensors")
    args = ["--target.path", str(tiny_target), "--out", out]
    assert command.main([*args, "--width", "4", "--batch_size", "100"]) == 0
    assert "4 successors of each of" in capsys.readouterr().out
    target = load_target(str(tiny_target))
    table, about = load_bigrams(out, target.vocab_size)
    ids, _ = by_hand(target, [40], 4)
    assert table.tokens[40].tolist() == ids and about["bos"] is False
    assert sorted(load_file(out)) == ["log_p", "tokens", "unigram"]
    assert json.dumps(about)
    speed = ["--target.path", str(tiny_target), "--n_prompts", "2", "--max_new_tokens", "6",
             "--prompts", str(tiny_target / "prompts_heldout.jsonl"), "--cost_rounds", "1",
             "--methods", "bigram:2x2,plain", "--bigrams", out]  # fmt: skip
    assert speed_cli.main(speed) == 0
    assert "exact: yes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main([*args, "--width", "0"])
    assert "width: 0 must be at least 1" in capsys.readouterr().err
