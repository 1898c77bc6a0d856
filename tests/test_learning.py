"""A head that learns while it drafts: the text stays the target's, and the head becomes better."""

import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from head_kinds import make_head
from models import alone, prompts, settings, tiny

from redrafter.cli import chat, stream
from redrafter.cli.args import parse
from redrafter.config import (
    ChatConfig,
    LearnConfig,
    LoraSettings,
    LossConfig,
    StreamConfig,
    TreeConfig,
)
from redrafter.contracts import InputError
from redrafter.decode.speculative import speculative
from redrafter.drafters.compose import Wrapped
from redrafter.drafters.head import HeadDrafter
from redrafter.drafting import Strategy
from redrafter.evaluation.operations import per_step
from redrafter.files import digest_weights
from redrafter.heads.load import head_class, load_head
from redrafter.learning import learner as learners
from redrafter.learning.learner import Learner
from redrafter.learning.ring import Ring
from redrafter.training.feed import gather
from redrafter.training.sharded import Whole
from redrafter.training.step import loss_weights

MODES = {"greedy": {}, "seeded": dict(do_sample=True, temperature=0.8)}
#: a step as often as there is something to learn from
ALWAYS = LearnConfig(
    share=1.0, every_tokens=1, batch_positions=4, buffer_tokens=64, warmup_steps=0, lr=0.01
)


class Clock:
    """What takes time says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def digest(head):
    """Its weights as they are now; `fingerprint` is remembered."""
    return digest_weights(head.state_dict().items())


def learning(target, head, config=ALWAYS, folder=None, **options):
    """(the learner, decode(rows, **settings) by a drafter of the head that learns)."""
    learner = Learner(head, target, folder, config, **{"clock": Clock(), **options})
    strategy = learner.watching(Strategy(HeadDrafter(head, target, TreeConfig(3, 2))))

    def decode(rows, seeds=0, **changes):
        return speculative(target, rows, settings(**changes), seeds=seeds,
                           drafter=strategy.drafter, lookahead=strategy.lookahead)  # fmt: skip

    return learner, decode


# ---------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    ("case", "loss", "mode", "n_rows"),
    [("recurrent", LossConfig(), "greedy", 1), ("recurrent", LossConfig(), "greedy", 4),
     ("recurrent", LossConfig(), "seeded", 1), ("recurrent", LossConfig(), "seeded", 4),
     ("medusa-pruned", LossConfig(kl=1.0), "seeded", 4),
     ("hydra-target", LossConfig(cross_entropy=0.0, minus_log_acceptance=1.0), "greedy", 4)],
)  # fmt: skip
def test_the_text_is_plains_at_an_absurd_learning_rate(case, loss, mode, n_rows):
    target, rows = tiny("llama"), prompts()[:n_rows]
    head = make_head(target, case)
    before = digest(head)
    learner, decode = learning(target, head, replace(ALWAYS, lr=1e3, loss=loss))
    for seeds in (range(n_rows), range(7, 7 + n_rows)):
        made = decode(rows, seeds, **MODES[mode])
        want, finish = alone(target, rows, settings(**MODES[mode]), seeds)
        assert (made.tokens, made.finish) == (want, finish)
    assert learner.steps > 3 and digest(head) != before, "else nothing was tried"


def heads_of_drafts(decode, drafter_of, rows):
    """Per step, the weights that each part of its draft was made with."""
    steps = []

    class Noted(Wrapped):
        def start(self):
            steps.append([digest(self.inner.head)])
            super().start()

        def extend(self, level):
            super().extend(level)
            steps[-1].append(digest(self.inner.head))

        def tree(self):
            steps[-1].append(digest(self.inner.head))
            return super().tree()

    decode(Noted(drafter_of), rows)
    return steps


@pytest.fixture
def drafts():
    """Of a generation in which a head learns: heads_of_drafts."""
    target = tiny("llama")
    head = make_head(target, "recurrent")
    learner = Learner(head, target, None, ALWAYS, clock=Clock())

    def decode(drafter, rows):
        strategy = learner.watching(Strategy(drafter))
        speculative(target, rows, settings(), drafter=drafter, lookahead=strategy.lookahead)

    drafter = HeadDrafter(head, target, TreeConfig(2, 3))
    return lambda: heads_of_drafts(decode, drafter, prompts()[:2])


def test_all_levels_of_a_draft_are_of_one_head(drafts):
    steps = drafts()
    assert all(len(step) == 5 for step in steps), "start, three levels, tree"
    assert all(len(set(step)) == 1 for step in steps)
    assert len({step[0] for step in steps}) > len(steps) // 2, "between steps it does change"


def test_a_head_that_changes_between_levels_is_found(drafts, monkeypatch):
    def go_on(self, features, level):
        with torch.inference_mode(False):
            self.learner._learn()
        return True

    monkeypatch.setattr(learners._Watching, "go_on", go_on)
    inner = learners._Watching.__init__

    def init(self, *given):
        inner(self, *given)
        self.level_by_level = True

    monkeypatch.setattr(learners._Watching, "__init__", init)
    assert any(len(set(step)) > 1 for step in drafts())


def test_a_step_reads_the_host_no_more_often():
    """Where no optimiser step is due."""
    target = tiny("llama")
    idle = replace(ALWAYS, every_tokens=10_000)
    _, decode = learning(target, make_head(target, "recurrent"), idle)

    def wanted(n):
        return dict(max_new_tokens=n, eos_token_id=-1)

    found = per_step(lambda config: decode(prompts(), **config), wanted, (6, 18))
    assert found["host_reads"] == 1.0


# ------------------------------------------------------------------------------- what it learns


def test_it_learns_what_the_target_says():
    target, row = tiny("llama"), prompts()[:1]
    head = make_head(target, "recurrent")
    learner, decode = learning(target, head)
    first = decode(row, eos_token_id=-1).stats.tokens_per_step
    for _ in range(8):
        last = decode(row, eos_token_id=-1).stats.tokens_per_step
    assert first < 1.5 and last > 2.5, (first, last)
    assert learner.skipped == 0


def test_lora_learns_and_the_drafting_head_has_no_lora(tmp_path):
    pytest.importorskip("peft")
    target, row = tiny("llama"), prompts()[:1]
    head = make_head(target, "recurrent")
    names = set(head.state_dict())
    config = replace(ALWAYS, lora=LoraSettings(r=8), lr=0.03)
    learner, decode = learning(target, head, config, tmp_path)
    first = decode(row, eos_token_id=-1).stats.tokens_per_step
    for _ in range(4):
        last = decode(row, eos_token_id=-1).stats.tokens_per_step
    assert last > first + 0.5, (first, last)
    assert set(head.state_dict()) == names
    learner.save()
    assert digest(load_head(tmp_path, target).double()) == digest(head)
    again = make_head(target, "recurrent")
    resumed = Learner(again, target, tmp_path, config, clock=Clock())
    assert resumed.steps == learner.steps and digest(again) == digest(head)


def test_the_ring_holds_each_token_with_what_predicts_the_next():
    target, rows = tiny("llama"), prompts((9, 3))
    learner, decode = learning(target, make_head(target, "recurrent"), replace(ALWAYS, share=1e-9))
    for lengths in ((9, 3), (5, 8)):
        rows = prompts(lengths, seed=lengths[0])
        decode(rows, eos_token_id=-1)
    columns, starts = learner._ring.columns()
    batch = gather(columns, starts, 3, torch.float64, teacher="states")
    texts = [row + text for row, text in zip(rows, alone(
        target, rows, settings(eos_token_id=-1))[0], strict=True)]  # fmt: skip
    assert batch.mask[:, 0].all() and not batch.mask[:, 2].all(), "rows end"
    said = target.project(batch.context).argmax(-1)
    assert torch.equal(said, batch.tokens[:, 0]), "h_t says token t+1"
    taught = target.project(batch.teacher).argmax(-1)
    assert torch.equal(taught[batch.mask], batch.labels[batch.mask])
    whole = {tuple(text[i : i + 4]) for text in texts for i in range(len(text))}
    found = torch.cat((batch.tokens, batch.labels[:, -1:]), 1)[batch.mask[:, 2]].tolist()
    assert len(found) > 10 and whole & {tuple(row) for row in found}


def test_the_ring_forgets_the_oldest():
    ring = Ring(5)
    states = torch.arange(12.0).view(2, 3, 2)
    ring.begin(2)
    assert ring.columns() is None
    ring.add([[1, 2], [7]], states)
    ring.add([[3], []], states)
    columns, starts = ring.columns()
    assert columns["tokens"].tolist() == [0, 1, 2, 3, 0, 7] and starts.tolist() == [0, 1]
    assert columns["end"].tolist() == [4, 4, 4, 4, 6, 6]
    ring.add([[4, 5], [8]], states)  # [1, 2] make room for them
    assert ring.columns()[0]["tokens"].tolist() == [0, 3, 4, 5, 0, 7, 8]
    ring.begin(1)
    ring.add([[9, 9, 9]], states[:1])
    assert ring.columns()[0]["tokens"].tolist() == [0, 7, 8, 0, 9, 9, 9] and ring.n_tokens == 5
    assert not ring.columns()[0]["states"].is_inference()


def test_learning_keeps_within_its_share(monkeypatch):
    """A draft takes a second, an optimiser step four."""
    target, clock = tiny("llama"), Clock()
    learner, decode = learning(
        target, make_head(target, "recurrent"), replace(ALWAYS, share=0.25), clock=clock
    )
    learned, start = learner._learn, HeadDrafter.start

    def draft(self):
        clock.now += 1.0
        start(self)

    def slow():
        before = learner.steps
        learned()
        clock.now += 4.0 * (learner.steps - before)

    monkeypatch.setattr(HeadDrafter, "start", draft)
    monkeypatch.setattr(learner, "_learn", slow)
    for _ in range(4):
        decode(prompts()[:1], eos_token_id=-1)
    assert learner.decode_s + learner.learning_s == clock.now
    assert learner.steps >= 3 and learner.learning_s == 4.0 * learner.steps
    # The first step's time is not known before.
    assert learner.learning_s - 4.0 <= 0.25 * clock.now
    assert learner.learning_s + 4.0 > 0.25 * clock.now - 1.0, "nor is time left that it could take"


@pytest.mark.parametrize("where", ["context", "weights"])
def test_what_is_not_finite_is_left_out_and_said_once(where, monkeypatch):
    target, told = tiny("llama"), []
    head = make_head(target, "recurrent")
    learner, decode = learning(target, head, tell=told.append)
    batch = learner._batch

    def spoilt():
        found = batch()
        if found is not None and where == "context":
            found.context[0] = float("nan")
        return found

    if where == "weights":
        learner.student.rnn_w.weight.data.mul_(float("inf"))
    monkeypatch.setattr(learner, "_batch", spoilt)
    before, rows = digest(head), prompts()[:1]
    made = decode(rows)
    assert made.tokens == alone(target, rows, settings())[0]
    assert learner.steps == 0 and learner.skipped > 1 and digest(head) == before
    assert len(told) == 1 and "not finite" in told[0]


# ---------------------------------------------------------------------------------------- files


def test_what_was_learned_is_gone_on_from(tmp_path):
    target, rows = tiny("llama"), prompts()[:1]
    config = replace(ALWAYS, save_steps=2, keep_checkpoints=1)
    head = make_head(target, "recurrent")
    one = Learner(head, target, tmp_path, config, clock=Clock())
    with pytest.raises(RuntimeError), one:
        strategy = one.watching(Strategy(HeadDrafter(head, target, TreeConfig(3, 2))))
        speculative(target, rows, settings(), drafter=strategy.drafter,
                    lookahead=strategy.lookahead)  # fmt: skip
        one.steps += 1  # not saved yet
        raise RuntimeError
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{one.steps}"]
    assert digest(load_head(tmp_path, target).double()) == digest(head)
    again = make_head(target, "recurrent")
    two = Learner(again, target, tmp_path, config, clock=Clock())
    assert two.steps == one.steps > 2 and digest(again) == digest(head)
    theirs, mine = (Whole(x.student, x._optimizer).averages() for x in (one, two))
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[n], mine[n]) for n in mine)
    assert max(mean.abs().max() for mean in mine.values()) > 0
    other = make_head(target, "recurrent", seed=5)
    with pytest.raises(InputError, match="learner of another start"):
        Learner(other, target, tmp_path, config)
    with pytest.raises(InputError, match="another lora"):
        Learner(make_head(target, "recurrent"), target, tmp_path,
                replace(config, lora=LoraSettings()))  # fmt: skip


def test_a_head_that_reads_the_row_is_refused():
    """Else it would learn without its layer, and forget what it had learned with it."""
    target = tiny("llama")
    head = head_class("recurrent").for_target(target, prefix="attention")
    with pytest.raises(InputError, match=r"learn: this head reads the whole row \(head.prefix"):
        Learner(head, target, None, ALWAYS)


def test_a_folder_of_anything_else_is_refused(tmp_path):
    target = tiny("llama")
    head = make_head(target, "recurrent")
    head.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no learner left there"):
        Learner(head, target, tmp_path)
    assert not (tmp_path / "checkpoints").exists(), "and not touched"
    with pytest.raises(InputError, match="cannot be made"):
        Learner(head, target, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [("share", 0.0), ("share", 1.5), ("every_tokens", 0), ("lr", 0.0), ("false_alarms", 0.0),
     ("buffer_tokens", 0), ("drift_margin", 1.5), ("loss", LossConfig(teacher="top_k")),
     ("loss", LossConfig(towards={"kl": 1.0}))],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        LearnConfig(**{name: value})


@pytest.mark.parametrize(
    ("given", "weights"),
    [([], {"cross_entropy": 1.0}), (["--learning.loss.kl=1"], {"kl": 1.0}),
     (["--learning.lr=0.1", "--learning.loss.depth_decay=0.5"], {"cross_entropy": 1.0})],
)  # fmt: skip
def test_it_learns_by_the_losses_given_alone_or_by_cross_entropy(given, weights):
    target = tiny("llama")
    config = parse(StreamConfig, ["--target.path=t", "--prompts=p", *given], "test")
    talk = parse(ChatConfig, ["--target.path=t", *given], "test")
    assert loss_weights(config.learning.loss) == weights, "a result's file says which"
    for chosen in (config.learning, talk.learning):
        loss = Learner(make_head(target, "recurrent"), target, settings=chosen).settings.loss
        assert loss_weights(loss) == weights
    assert loss_weights(Learner(make_head(target, "recurrent"), target).settings.loss) == {
        "cross_entropy": 1.0
    }


# ------------------------------------------------------------------------------------- commands


def test_a_stream_end_to_end(tiny_target, run, tmp_path, capsys):
    argv = [
        f"--target.path={tiny_target}", f"--head={run}", "--n_prompts=5", "--held_out=2",
        f"--prompts={tiny_target / 'prompts_heldout.jsonl'}", "--max_new_tokens=16", "--window=2",
        "--batch_size=2",
        f"--learn={tmp_path / 'learned'}", f"--out={tmp_path / 'out.json'}",
        "--learning.share=1", "--learning.every_tokens=4", "--learning.batch_positions=4",
        "--threads=1",
    ]  # fmt: skip
    assert stream.main(argv) == 0
    body = json.loads((tmp_path / "out.json").read_text())
    assert body["equal_texts"] == body["n_prompts"] == 5
    assert [(w["first"], w["last"]) for w in body["windows"]] == [(1, 2), (3, 4), (5, 5)]
    assert [probe["after"] for probe in body["held_out"]] == [0, 2, 4, 5]
    assert set(body["arms"]) == {"as it was", "learning"} and body["learner"]["steps"] > 3
    steps = body["learner"]["steps"]
    assert (tmp_path / "learned/checkpoints" / f"step-{steps}").is_dir()
    promised = json.loads((run / "speculation_profile.json").read_text())["profiles"][0]
    drift = body["arms"]["as it was"]["drift"]
    assert drift["promised"] == promised["marginal_accept_rates"] and drift["generations"] == 3
    assert load_head(tmp_path / "learned").fingerprint() != load_head(run).fingerprint()
    said = capsys.readouterr().out
    assert "texts equal: 5/5" in said and "prompts 5..5" in said
    with pytest.raises(SystemExit) as ended:
        stream.main([*argv, "--drafter=suffix:8x1"])
    assert ended.value.code == 2 and "it is a head that learns" in capsys.readouterr().err


def test_a_conversation_is_learned_from(tiny_target, run, tmp_path, monkeypatch, capsys):
    argv = [
        f"--target.path={tiny_target}", f"--head={run}", f"--learn={tmp_path / 'learned'}",
        "--max_new_tokens=16", "--learning.share=1", "--learning.every_tokens=4",
        "--learning.batch_positions=4",
    ]  # fmt: skip
    steps = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a question\nanother one\n"))
        assert chat.main(argv) == 0
        (newest, *_) = sorted((tmp_path / "learned/checkpoints").iterdir(), reverse=True,
                              key=lambda path: int(path.name.removeprefix("step-")))  # fmt: skip
        steps.append(int(newest.name.removeprefix("step-")))
    assert 0 < steps[0] < steps[1], "the second went on from the first"
    assert capsys.readouterr().out.count(" per step") == 4
    with pytest.raises(SystemExit):
        chat.main([f"--target.path={tiny_target}", f"--learn={tmp_path / 'learned'}"])
    assert "it is a head that learns: give --head" in capsys.readouterr().err
