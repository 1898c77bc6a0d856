"""What a row of a chat may hold: tools, turns that are not learned, and what no template drops."""

import dataclasses
import datetime as clock
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_kinds import (
    CHATML,
    GLM4,
    HEAD,
    LLAMA3,
    MISTRAL,
    PHI,
    Q3_FIRST,
    QWEN3,
    TALK,
    THOUGHTS,
    only_last,
    renderer,
    said,
    shown,
    system,
    tokenizer_of,
    user,
)  # fmt: skip
from transformers import AutoConfig, GenerationConfig

from redrafter.cli import prepare
from redrafter.config import PlanConfig, SourceConfig, SpecBenchConfig, TargetConfig
from redrafter.contracts import InputError
from redrafter.data import chat
from redrafter.data.build_rows import build_rows, report
from redrafter.data.chat import Renderer
from redrafter.data.day import dated
from redrafter.data.sources import read_source
from redrafter.data.store import Store
from redrafter.evaluation.journal import Journal
from redrafter.evaluation.spec_bench.questions import open_questions
from redrafter.planning.texts import texts_of_source
from redrafter.training.data import held_out_prompts

# ---------------------------------------------------------------- tools

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"at": "string"}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": 'a "b"'}}}


def called(*calls, **more):
    return {"role": "assistant", "tool_calls": list(calls), **more}


def as_json(call):
    inner = call["function"]
    return {**call, "function": {**inner, "arguments": json.dumps(inner["arguments"])}}


WRITTEN = '<tool_call>\n{"name": "look", "arguments": {"at": "a \\"b\\""}}\n</tool_call>'
ASKED = (f"<|im_start|>user\n{json.dumps(TOOLS)}\nhi<|im_end|>\n<|im_start|>assistant\n")
FOUND = "<|im_start|>user\n<tool_response>42</tool_response><|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("call", [CALL, as_json(CALL), {**CALL, "id": None}])
def test_tool_turns(call):
    talk = [user("hi"), called(call), {"role": "tool", "content": "42"}, said("yo")]
    empty = "<think>\n\n</think>\n\n"
    # An answer without a thought loses its empty one as soon as it is history.
    assert shown(QWEN3, talk, TOOLS) == [
        f"{ASKED}⟦{empty}{WRITTEN}<|im_end|>⟧\n",
        f"{ASKED}{WRITTEN}<|im_end|>\n{FOUND}⟦{empty}yo<|im_end|>⟧\n",
    ]
    # Thoughts behind the last question are kept: one text.
    talk[1]["reasoning_content"], talk[3]["reasoning_content"] = "what", "so"
    thought = "<think>\nwhat\n</think>\n\n"
    assert shown(QWEN3, talk, json.dumps(TOOLS)) == [
        f"{ASKED}⟦{thought}{WRITTEN}<|im_end|>⟧\n{FOUND}⟦<think>\nso\n</think>\n\nyo<|im_end|>⟧\n"
    ]


def test_turns_hold_all_that_is_said_before_an_answer():
    made = renderer(CHATML)
    greeted = [system("Sys"), said("hello"), user("a"), said("b"), system("new"), user("c")]
    turns = made.turns({"messages": greeted}, "f:1")
    assert turns == [[system("Sys"), user("a")], [system("new"), user("c")]]
    replied = [user("a"), called(CALL), {"role": "tool", "content": "it"}, said("b")]
    with pytest.raises(InputError, match="f:1: a tool answers a call that the target may not make"):
        made.turns({"messages": replied}, "f:1")
    with pytest.raises(InputError, match="no user says anything"):
        made.turns({"messages": [system("Sys"), said("hello")]}, "f:1")


def test_the_older_function_call_is_a_tool_call():
    old = {"role": "assistant", "content": None, "function_call": as_json(CALL)["function"]}
    assert shown(QWEN3, [user("hi"), old], TOOLS) == shown(QWEN3, [user("hi"), called(CALL)], TOOLS)


def test_arguments_are_what_the_template_takes():
    calls = "{% for c in m.tool_calls | default([]) %}{{ c.function.name }}(ARGS){% endfor %}"
    wanted = [f"{HEAD}{Q3_FIRST}⟦look({json.dumps(CALL['function']['arguments'])})<|im_end|>⟧\n"]
    for written in ("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}",
                    "{{ c.function.arguments }}"):  # fmt: skip
        template = CHATML.replace("{{ m.content }}", "{{ m.content + CALLS }}")
        template = template.replace(" + CALLS }}", " }}" + calls.replace("ARGS", written))
        for call in (CALL, as_json(CALL)):
            assert shown(template, [user("hi"), called(call)]) == wanted, written


@pytest.mark.parametrize("template", [CHATML, LLAMA3, PHI, MISTRAL, None])
def test_a_template_without_tools_does_not_learn_an_empty_answer(template):
    with pytest.raises(InputError, match=r"f:1: message 2 .*: its tool call's name 'look'"):
        shown(template, [user("hi"), called(CALL, content="")])
    with pytest.raises(InputError, match=r"f:1: tool 1: its name 'look' is not in what the chat"):
        shown(template, TALK, TOOLS)
    with pytest.raises(InputError, match="tool 1: its name"):
        renderer(template).prompt({"messages": TALK, "tools": TOOLS}, "f:1")


# ---------------------------------------------------------------- what must be rendered


@pytest.mark.parametrize(
    ("change", "messages", "named"),
    [
        (("{{ m.content }}", ""), TALK, "message 1 (user): its content 'hi'"),
        (("{{ m.content }}", "{{ m.text }}"), TALK, "message 1 (user): its content 'hi'"),
        (("messages %}<", "messages if m.role != 'system' %}<"), [system("ok"), *TALK],
         "message 1 (system): its content 'ok'"),
        # Said twice, rendered once.
        (("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}"),
         [user("why"), said("why")], "message 2 (assistant): its content 'why'"),
        (("{{ m.content }}", "{% if not loop.first %}{{ m.content }}{% endif %}"),
         [user("why"), said("yo"), user("why"), said("go")],
         "message 3 (user): its content 'why'"),
        # There is a B in every text.
        (("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}"),
         [user("which?"), said("B")], "message 2 (assistant): its content 'B'"),
        (("{{ m.content }}", "{{ m.content[:3] }}"), [user("hi"), said("yo no")],
         "message 2 (assistant): its content 'yo no'"),
        (("", ""), [user("hi"), said("yo", reasoning_content="what")],
         "message 2 (assistant): its thought 'what'"),
        (("", ""), [user("hi"), said("yo", reasoning_content="what"), user("no"), said("go")],
         "message 2 (assistant): its thought 'what'"),
    ],
)  # fmt: skip
def test_what_a_template_drops_is_named(change, messages, named):
    template = CHATML.replace(*change) if change[0] else CHATML
    with pytest.raises(InputError, match=re.escape(f"f:1: {named} is not in what the chat")):
        shown(template, messages)


def test_what_a_template_drops_by_design_is_not_lost():
    # Thoughts of earlier answers, blanks around a text, and JSON in place of a text.
    made = renderer(QWEN3)
    assert "what" not in made.tokenizer.decode(made.prompt({"messages": THOUGHTS[:3]}, "f:1"))
    assert "what" not in made.tokenizer.decode(made.conversation(THOUGHTS[:3], "f:1"))
    assert len(made.texts({"messages": [user(" hi\n "), said(" yo ")]}, "f:1")) == 1
    listing = CHATML.replace("{{ m.content }}", "{{ m.content | tojson }}")
    assert len(shown(listing, [user('say "hi"\n'), said("yo")])) == 1


def test_a_conversation_may_lose_of_the_targets_own_answers_alone():
    half = CHATML.replace("{{ m.content }}", "{{ m.content[:2] }}")
    assert renderer(half).conversation([user("hi"), said("yo no"), user("no")], "f:1")
    with pytest.raises(InputError, match=r"f:1: message 3 \(user\): its content 'no more'"):
        renderer(half).conversation([user("hi"), said("yo no"), user("no more")], "f:1")


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_turns_that_are_not_to_be_learned(flag):
    talk = [user("hi"), said("yo", **flag), user("no"), said("go ", weight=1, train=True)]
    assert shown(CHATML, talk) == [only_last(shown(CHATML, talk[:1] + [said("yo")] + talk[2:])[0])]
    assert shown(CHATML, talk[:2]) == [] == shown(CHATML, talk[:2], supervise="last")
    talk[1]["weight"] = "none"
    with pytest.raises(InputError, match="f:1: 'weight' of message 2 is 'none'; it must be a num"):
        shown(CHATML, talk)


def test_nulls_of_a_table_are_no_content(tmp_path):
    # Parquet gives every object of a column the keys of all of them.
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    other = {"type": "function", "function": {"name": "find", "arguments": {"where": "x"}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": {"where": "string"}}}
    talks = [[user("hi"), called(call)] for call in (CALL, other)]
    rows = [{"messages": talk, "tools": tools} for talk, tools in zip(talks, (TOOLS, [tool]),
            strict=True)]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    config = SourceConfig(str(tmp_path / "rows.parquet"))
    made = Renderer(tokenizer_of(QWEN3), config)
    read = [content for _, content in read_source(config)]
    assert read != rows, "nothing was put in"
    assert [made.texts(row, "r") for row in read] == [made.texts(row, "r") for row in rows]


def test_a_row_of_several_texts_is_accounted_for(tmp_path):
    rows = [TALK, [user("hi"), said("yo")], [user("hi"), said("yo", weight=0)], [user("hi")]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config = SourceConfig(str(path), max_failed_rows=1)
    tokenizer = tokenizer_of(QWEN3)
    store = build_rows(config, tokenizer, "texts", tmp_path / "store", progress=False)
    assert store.source_row.tolist() == [0, 0] and store.manifest["input"] == 5
    assert store.manifest["source_rows"] == 4
    rejected = [r for shard in store.manifest["shards"] for r in shard["rejected"]]
    assert [(r["source_row"], r["failed"]) for r in rejected] == [(1, False), (2, False), (3, True)]
    assert "5 given = 2 written + 2 skipped + 1 failed" in report(store)
    assert "4 rows of the source" in report(store)
    assert "1 x none of its answers is to be learned" in report(store)


def test_rows_that_an_earlier_version_made_otherwise_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [said("yo"), *TALK]}) + "\n")
    make = lambda: build_rows(  # noqa: E731
        SourceConfig(str(path)), tokenizer_of(CHATML), "texts", tmp_path / "s", progress=False
    )
    learned_texts = chat.learned_texts

    def earlier(*given):  # it learned the head, too
        (text,) = learned_texts(*given)
        return [dataclasses.replace(text, spans=[(0, 12), *text.spans])]

    with monkeypatch.context() as patch:
        patch.setattr(chat, "learned_texts", earlier)
        make()
    with pytest.raises(InputError, match=r"made by an earlier version.*row 0 of the source"):
        make()
    (tmp_path / "s" / "manifest.json").unlink()  # nor is one gone on with
    with pytest.raises(InputError, match=r"made by an earlier version.*shard-00000.*remove it"):
        make()
    for file in (tmp_path / "s").iterdir():
        file.unlink()
    assert make().digest == make().digest


def test_a_plan_counts_the_texts_that_rows_become(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": [*TALK, user(f"{i}"), said("yo")]}) + "\n"
                            for i in range(4)))  # fmt: skip
    config = SourceConfig(str(path))
    for template, wanted in ((CHATML, 4), (QWEN3, 12)):
        tokenizer = tokenizer_of(template)
        monkeypatch.setattr("redrafter.planning.texts.load_tokenizer", lambda _, t=tokenizer: t)
        planned = texts_of_source(config, TargetConfig("t"), "texts", None, PlanConfig())
        assert planned.rows == wanted


# ---------------------------------------------------------------- days

DATED = "{{ strftime_now('%d %b %Y') }}|" + CHATML


@pytest.fixture
def day(monkeypatch):
    """Sets the clock: of the project, and the one that transformers gives a template."""

    def turn(year, month, number):
        class Day(clock.date):
            @classmethod
            def today(cls):
                return clock.date(year, month, number)

        class Moment(clock.datetime):
            @classmethod
            def now(cls, tz=None):
                return clock.datetime(year, month, number, 9, 30)

        monkeypatch.setattr("redrafter.data.day.date", Day)
        monkeypatch.setattr("redrafter.data.template.date", Day)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Moment)

    return turn


def rows_file(folder, n=3):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": "yo"}) + "\n"
                            for i in range(n)))  # fmt: skip
    return SourceConfig(str(path))


def texts_of(store, tokenizer):
    return [tokenizer.decode(store.rows([i]).ids(0)) for i in range(store.n_rows)]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("keep", ["prompts", "texts"])
def test_a_store_that_is_gone_on_with_keeps_its_day(tmp_path, day, named, keep):
    tokenizer, config = tokenizer_of(DATED), rows_file(tmp_path)
    make = lambda folder: build_rows(  # noqa: E731
        config, tokenizer, keep, tmp_path / folder, named=named, progress=False
    )
    day(2026, 11, 29)
    first = make("store")
    folder = Path(first.name)
    assert first.identity["day"] == "2026-11-29" == first.lineage[-1]["day"]
    assert texts_of(first, tokenizer)[0].startswith("29 Nov 2026|")
    for file in [folder / "manifest.json", *folder.glob("shard-*")]:
        file.unlink()
    day(2026, 11, 30)
    again = make("store")
    assert again.name == first.name and again.digest == first.digest
    assert texts_of(again, tokenizer) == texts_of(first, tokenizer)
    other = make("another")
    assert texts_of(other, tokenizer)[0].startswith("30 Nov 2026|")
    assert other.digest != first.digest, "the day does not tell stores apart"


def test_without_a_date_stores_are_what_they_were(tmp_path, day):
    day(2026, 11, 29)
    store = build_rows(
        rows_file(tmp_path), tokenizer_of(CHATML), "prompts", tmp_path / "s", progress=False
    )
    assert "day" not in store.identity


def test_a_dated_store_from_before_days_were_kept_is_read(tmp_path, day):
    tokenizer, config = tokenizer_of(DATED), rows_file(tmp_path)
    day(2026, 11, 29)
    store = build_rows(config, tokenizer, "prompts", tmp_path / "s", progress=False)
    for name in ("job.json", "manifest.json"):
        path = tmp_path / "s" / name
        path.write_text(re.sub(r',\s*"day": "2026-11-29"', "", path.read_text()))
    assert "day" not in Store(tmp_path / "s").identity
    day(2026, 11, 30)
    again = build_rows(config, tokenizer, "prompts", tmp_path / "s", progress=False)
    assert texts_of(again, tokenizer) == texts_of(store, tokenizer)


def test_one_renderer_has_one_day(day):
    day(2026, 11, 29)
    made = renderer(DATED)
    before = made.conversation([user("hi")], "r")
    day(2026, 11, 30)
    assert made.conversation([user("hi")], "r") == before != renderer(DATED).conversation(
        [user("hi")], "r"
    )
    # The clock that transformers gives to a template is its own again.
    text = made.tokenizer.apply_chat_template([user("hi")], tokenize=False)
    assert text.startswith("30 Nov 2026|")
    tagged = DATED.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    given = Renderer(tokenizer_of(tagged), SourceConfig("rows.jsonl"), "2025-01-02")
    ((ids, _),) = given.texts({"question": "hi", "answer": "yo"}, "r")
    assert given.tokenizer.decode(ids).startswith("02 Jan 2025|")


def told():
    """What is asked of a target here."""
    tokenizer = tokenizer_of(DATED)
    return SimpleNamespace(tokenizer=tokenizer, max_positions=None, vocab_size=None, name="t")


def test_training_measures_on_the_prompts_of_its_first_day(tmp_path, day):
    target = told()
    source = dataclasses.replace(rows_file(tmp_path), holdout_rows=2)
    config = SimpleNamespace(
        data=SimpleNamespace(source=source),
        eval=SimpleNamespace(source=None, prompts=2, max_new_tokens=8),
    )
    day(2026, 11, 29)
    first = held_out_prompts(config, target, tmp_path / "data")
    day(2026, 11, 30)
    again = held_out_prompts(config, target, tmp_path / "data")
    assert again.name == first.name and again.digest == first.digest
    assert texts_of(again, target.tokenizer)[0].startswith("29 Nov 2026|")


def test_questions_are_gone_on_with_on_their_first_day(tmp_path, day):
    target = told()
    config = SpecBenchConfig(
        target=TargetConfig("t"), questions=rows_file(tmp_path).path, format="question",
        out=str(tmp_path),
    )  # fmt: skip
    day(2026, 11, 29)
    asked, questions, _ = open_questions(target, config, Journal.begun(tmp_path / "j.jsonl"))
    first = asked.prompt(questions[0].turns[0], "q")
    assert asked.day == "2026-11-29"
    Journal(tmp_path / "j.jsonl", dated({}, asked.day))
    day(2026, 11, 30)
    asked, questions, _ = open_questions(target, config, Journal.begun(tmp_path / "j.jsonl"))
    assert asked.prompt(questions[0].turns[0], "q") == first
    Journal(tmp_path / "j.jsonl", dated({}, asked.day))
    with pytest.raises(InputError, match="was made with another day"):
        Journal(tmp_path / "j.jsonl", dated({}, "2026-11-30"))


# ---------------------------------------------------------------- special tokens, once


@pytest.mark.parametrize("text", ["ab cd", "<s>ab cd", "ab cd</s>", "<s>ab cd</s>"])
@pytest.mark.parametrize("template", [None, CHATML])
def test_a_text_may_bring_its_own_special_tokens(template, text):
    made = renderer(template, bos=True, eos=True, format="text", text_prompt_tokens=2)

    def written(ids):
        return made.tokenizer.decode(ids)

    assert written(made.prompt({"text": text}, "r")) == "<s>ab"
    ((ids, mask),) = made.texts({"text": text}, "r")
    assert written(ids) == "<s>ab cd</s>"
    assert mask == (False,) * 3 + (True,) * 4


def test_messages_without_a_template_may_bring_theirs():
    row = {"question": "<s>ab", "answer": "cd</s>"}
    made = renderer(None, bos=True, eos=True)
    ((ids, mask),) = made.texts(row, "r")
    assert made.tokenizer.decode(ids) == "<s>ab\ncd</s>"
    assert made.tokenizer.decode([t for t, learned in zip(ids, mask, strict=True) if learned]) in (
        "\ncd</s>", "cd</s>",
    )  # fmt: skip
    assert made.tokenizer.decode(made.prompt(row, "r")) == "<s>ab"


# ---------------------------------------------------------------- what ends the target's texts


def glm(folder, in_generation_config, in_config=None):
    """A target's folder of GLM's kind, without weights."""
    tokenizer = tokenizer_of(GLM4)
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), eos_token_id=in_config)
    config.save_pretrained(folder)
    if in_generation_config is not None:
        GenerationConfig(eos_token_id=in_generation_config).save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_prepare_learns_the_end_that_the_targets_configuration_names(tmp_path, where):
    ids = tokenizer_of(GLM4).convert_tokens_to_ids(["</s>", "<|user|>"])
    in_config = where == "config.json"
    tokenizer = glm(tmp_path / "target", None if in_config else ids, ids if in_config else None)
    source = rows_file(tmp_path)
    args = ["--target.path", str(tmp_path / "target"), "--source.path", source.path, "--keep",
            "texts", "--output_dir", str(tmp_path / "store")]  # fmt: skip
    assert prepare.main(args) == 0
    rows = Store(tmp_path / "store").rows([0])
    assert tokenizer.decode(rows.ids(0)) == "<s><|user|>\nq0<|assistant|>\nyo<|user|>"
    assert tokenizer.decode(rows.tokens[rows.supervised].tolist()) == "\nyo<|user|>"
    # Where it is named afterwards, or no longer, the store is another one.
    GenerationConfig(eos_token_id=ids[0]).save_pretrained(tmp_path / "target")
    with pytest.warns(UserWarning, match="learned of when to stop"), pytest.raises(SystemExit):
        prepare.main(args)
