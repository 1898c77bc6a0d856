"""Every turn of a conversation is answered, after the target's own earlier answers."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from redrafter.cli.answers import main as answers_command
from redrafter.config import AnswersConfig, DataConfig, SourceConfig, TargetConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.data.answers import answer_seed, generation_config
from redrafter.data.build_rows import report
from redrafter.data.conversations import build_conversations, cut_turns
from redrafter.decode.plain import plain
from redrafter.drafters.lookup import PromptLookup
from redrafter.targets.load import load_target
from redrafter.training.data import load_training_data

NEW = 24
HOW = AnswersConfig(temperatures=(0.0, 1.0), max_new_tokens=NEW, batch_size=5)
ASKED = ["import os", "def f(x):", "class A:", "for i in range(3):", "return x", "try:"]
#: the turns of every conversation; 1 to 4 of them
TURNS = [[f"{ASKED[(i + k) % 6]}  # {i}" for k in range(1 + i % 4)] for i in range(11)]


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(TargetConfig(str(tiny_target), dtype="float64"))


@pytest.fixture
def write(tmp_path):
    def written(rows) -> SourceConfig:
        file = tmp_path / "chats.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SourceConfig(path=str(file), format="auto")

    return written


def messages(turns):
    """With somebody else's answers, which are not to be seen."""
    said = [({"role": "user", "content": t}, {"role": "assistant", "content": "?"}) for t in turns]
    return {"messages": [m for pair in said for m in pair]}


def rows_of(store):
    rows = store.rows()
    parts = rows.supervised.split(rows.lengths().tolist())
    return [(int(store.source_row[i]), rows.ids(i), p.tolist()) for i, p in enumerate(parts)]


def by_hand(target, turns, answer):
    """(prompt, answer) of every turn. answer: prompt ids, turn -> new ids"""
    history, made = [], []
    for turn, said in enumerate(turns):
        history.append({"role": "user", "content": said})
        prompt = target.tokenizer.apply_chat_template(
            history, add_generation_prompt=True, return_dict=False
        )
        made.append((prompt, answer(prompt, turn)))
        text = target.tokenizer.decode(made[-1][1], skip_special_tokens=True)
        history.append({"role": "assistant", "content": text})
    return made


def test_equal_to_a_loop_over_generate(target, write, tmp_path):
    source = write([messages(turns) for turns in TURNS])
    store = build_conversations(target, source, HOW, tmp_path / "a", progress=False)
    turns = sum(map(len, TURNS))
    assert store.counts["rows"] == 2 * turns == store.manifest["input"]
    assert (store.manifest["conversations"], store.manifest["turns"]) == (len(TURNS), turns)
    greedy = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, pad_token_id=0,
        eos_token_id=sorted(target.eos_token_ids),
    )  # fmt: skip

    def generate(prompt, turn):
        made = target.model.generate(torch.tensor([prompt]), generation_config=greedy)
        return made[0, len(prompt) :].tolist()

    def sample(prompt, turn):
        seed = answer_seed(0, row, 1.0, 0, turn)
        return plain(target, [prompt], generation_config(1.0, NEW), seeds=seed).tokens[0]

    found, want = rows_of(store), []
    for how in (generate, sample):
        for row, said in enumerate(TURNS):
            want += [(row, *made) for made in by_hand(target, said, how)]
    assert [(row, ids) for row, ids, _ in found] == [(row, p + a) for row, p, a in want]
    for (_, ids, mask), (_, prompt, answer) in zip(found, want, strict=True):
        assert mask == [i >= len(prompt) for i in range(len(ids))] and len(answer) > 0
    ended = sum(answer[-1] in target.eos_token_ids for _, _, answer in want)
    assert cut_turns(store, target) == 2 * turns - ended


@pytest.mark.parametrize(
    "how", [{"batch_size": 1}, {"shard_prompts": 3}, {"drafter": PromptLookup}]
)
def test_how_they_are_made_changes_nothing(target, write, tmp_path, how):
    source = write([{"turns": turns} for turns in TURNS[:7]])
    want = build_conversations(target, source, HOW, tmp_path / "a", progress=False)
    drafter = how.get("drafter")
    config = HOW if drafter else replace(HOW, **how)
    made = build_conversations(
        target, source, config, tmp_path / "b", drafter=drafter, progress=False
    )
    assert rows_of(made) == rows_of(want)


def test_an_answer_that_the_template_refuses_ends_its_conversation_alone(
    target, write, tmp_path
):
    """What can be refused of the made-up answers is known before any work; not of real ones."""
    picky = copy.copy(target)
    picky.tokenizer = copy.deepcopy(target.tokenizer)
    picky.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content != '.' %}"
        "{{ raise_exception('never') }}{% endif %}{% endfor %}" + target.tokenizer.chat_template
    )
    greedy = AnswersConfig(temperatures=(0.0,), max_new_tokens=4)
    rows = write([{"turns": turns} for turns in TURNS[:3]])
    store = build_conversations(picky, rows, greedy, tmp_path / "a", progress=False)
    assert [row for row, _, _ in rows_of(store)] == [0, 1, 2]
    listed = [r for shard in store.manifest["shards"] for r in shard["rejected"]]
    assert [r["source_row"] for r in listed] == [1, 2, 2]
    assert all("turn 2" in r["reason"] and "never" in r["reason"] for r in listed)


def test_the_tools_of_a_row_are_rendered_in_every_turn(target, write, tmp_path):
    told = copy.copy(target)
    told.tokenizer = copy.deepcopy(target.tokenizer)
    told.tokenizer.chat_template = (
        "{% for t in tools or [] %}# {{ t.function.name }}\n{% endfor %}"
        + target.tokenizer.chat_template
    )
    tools = [{"type": "function", "function": {"name": "lookup"}}]
    rows = [{"turns": TURNS[1]}, {"turns": TURNS[1], "tools": tools}]
    greedy = AnswersConfig(temperatures=(0.0,), max_new_tokens=4)
    store = build_conversations(told, write(rows), greedy, tmp_path / "a", progress=False)
    asked = [told.tokenizer.decode(ids) for _, ids, _ in rows_of(store)]
    assert [text.count("# lookup\n") for text in asked] == [0, 0, 1, 1], "no duplicates either"
    with pytest.raises(InputError, match=r"tool 1: its name 'lookup' is not in what"):
        build_conversations(target, write(rows), greedy, tmp_path / "b", progress=False)


def test_what_is_left_out_is_accounted_for(target, write, tmp_path):
    """A repeated conversation, a broken row, and turns that no longer fit."""
    long = ["x = 1\n" * 20] * 9
    broken = {"messages": [{"role": "user"}]}
    source = write([messages(TURNS[3]), broken, messages(TURNS[3]), messages(long)])
    with pytest.raises(InputError, match=r"chats.jsonl:2.*\n.*max_failed_rows 0"):
        build_conversations(target, source, HOW, tmp_path / "a", progress=False)
    assert not (tmp_path / "a" / "manifest.json").exists()
    source = SourceConfig(path=source.path, format="auto", max_failed_rows=1)
    greedy = AnswersConfig(temperatures=(0.0,), max_new_tokens=NEW)
    store = build_conversations(target, source, greedy, tmp_path / "b", progress=False)
    answered = [row for row, _, _ in rows_of(store)]
    assert answered[:4] == [0] * 4 and set(answered[4:]) == {3} and 1 < len(answered[4:]) < 9
    counts = store.counts
    assert counts["failed"] == 1 and counts["skipped"] == 1 + 9 - len(answered[4:])
    assert store.manifest["input"] == counts["rows"] + counts["failed"] + counts["skipped"] == 15
    said = report(store)
    assert f"fills the context of {target.max_positions}" in said and "1 x duplicate" in said


def test_the_command_and_a_training_take_them(target, tiny_target, write, tmp_path, capsys):
    source = write([messages(turns) for turns in TURNS[:3]])
    folder = ["--target.path", str(tiny_target), "--output_dir", str(tmp_path / "a")]
    how = ["--answers.max_new_tokens", "8", "--answers.temperatures", "[0]"]
    assert answers_command([*folder, *how, "--source.path", source.path]) == 0
    said = capsys.readouterr().out
    assert "6 given = 6 written" in said and "turns of 3 conversations" in said
    with pytest.raises(SystemExit):
        answers_command([*folder, *how])
    assert "give either --prompts" in capsys.readouterr().err
    config = TrainConfig(
        target=TargetConfig(str(tiny_target)), output_dir=str(tmp_path / "run"),
        data=DataConfig(
            source=source, text="conversations",
            answers=AnswersConfig(temperatures=(0.0,), max_new_tokens=8),
        ),
    )  # fmt: skip
    (part,) = load_training_data(config, target).parts
    assert len(part.starts) == 6
