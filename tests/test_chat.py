"""Rows to tokens: hand-written rows with the ids and masks that must come out, and what cannot."""

import json
import re

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from redrafter.config import SourceConfig
from redrafter.contracts import InputError
from redrafter.data.chat import Renderer
from redrafter.data.prepare import prepared
from redrafter.data.rows import RejectedRow, TokenRow
from redrafter.data.show import marked, show_rows
from redrafter.data.sources import read_source

# Every word, blank and sign is a token; ids are places in this list.
WORDS = ["?", "<s>", "</s>", "U", "A", "S", ":", "\n", " ", "hi", "yo", "ok", "no", "go"]
TAGS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['role'][0] | upper + ':' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
PREFIXES = re.sub(r"\{% (end)?generation %\}", "", TAGS)
TEMPLATES = pytest.mark.parametrize("template", [TAGS, PREFIXES], ids=["tags", "prefixes"])


def word_tokenizer(template=None, bos=False):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    made.decoder = decoders.Fuse()
    if bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def renderer(template=None, tokenizer=None, **settings):
    config = SourceConfig("rows.jsonl", **settings)
    return Renderer(tokenizer or word_tokenizer(template), config)


def talk(*turns):
    names = {"U": "user", "A": "assistant", "S": "system"}
    return [{"role": names[turn[0]], "content": turn[2:]} for turn in turns]


def bits(text):
    return tuple(bit == "1" for bit in text.replace(" ", ""))


# <s>U:hi\nA:  and, where there is an answer,  yo</s>\n
ONE_PROMPT = (1, 3, 6, 9, 7, 4, 6)
ONE = ((*ONE_PROMPT, 10, 2, 7), bits("0000000 110"))

# ---------------------------------------------------------------- the expected arrays


@TEMPLATES
@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"messages": talk("U:hi", "A:yo")}, {"format": "messages"}),
        ({"messages": talk("U:hi", "A:yo")}, {}),
        ({"messages": [{**m, "name": None} for m in talk("U:hi", "A:yo")], "text": None}, {}),
        ({"conversations": talk("U:hi", "A:yo")}, {}),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, {}),
        ({"conversations": [{"from": "user", "value": "hi"}, {"from": "model", "value": "yo"}]},
         {"format": "messages"}),
        ({"question": "hi", "answer": "yo"}, {}),
        ({"q": "hi", "a": "yo"},
         {"format": "columns", "prompt_column": "q", "answer_column": "a"}),
        ({"q": "hi", "a": "yo", "text": "no"}, {"prompt_column": "q", "answer_column": "a"}),
    ],
)  # fmt: skip
def test_single_turn(template, row, settings):
    made = renderer(template, **settings)
    assert made.prompt(row, "r") == ONE_PROMPT
    assert made.texts(row, "r") == [ONE]


@TEMPLATES
def test_multi_turn(template):
    row = {"messages": talk("S:ok", "U:hi", "A:yo", "U:no", "A:go ok", "U:hi")}
    made = renderer(template)
    # <s>S:ok\n U:hi\n A:yo</s>\n U:no\n A:    go ok</s>\n; the last question teaches nothing
    prompt = (1, 5, 6, 11, 7, 3, 6, 9, 7, 4, 6, 10, 2, 7, 3, 6, 12, 7, 4, 6)
    ids = (*prompt, 13, 8, 11, 2, 7)
    assert made.prompt(row, "r") == (*ids, 3, 6, 9, 7, 4, 6), "the last question is to be answered"
    assert made.prompt({"messages": row["messages"][:-1]}, "r") == prompt
    assert made.texts(row, "r") == [(ids, bits("00000 0000 00110 0000 00 11110"))]
    last = renderer(template, supervise="last")
    assert last.texts(row, "r") == [(ids, bits("00000 0000 00000 0000 00 11110"))]


def test_without_a_template_messages_stand_below_each_other():
    row = {"messages": talk("U:hi", "A:yo", "U:no", "A:go")}
    made = renderer(tokenizer=word_tokenizer(bos=True))
    assert made.prompt(row, "r") == (1, 9, 7, 10, 7, 12)
    # The newline before an answer is the first thing that the target has to say.
    assert made.texts(row, "r") == [((1, 9, 7, 10, 7, 12, 7, 13), bits("00 11 00 11"))]


@TEMPLATES
def test_a_text_is_a_prompt_and_its_rest(template):
    tokenizer = word_tokenizer(template, bos=True)
    made = renderer(tokenizer=tokenizer, text_prompt_tokens=2)
    assert made.prompt({"text": "hi yo go"}, "r") == (1, 9, 8)
    assert made.texts({"text": "hi yo go"}, "r") == [((1, 9, 8, 10, 8, 13), bits("000111"))]


def test_turns_have_no_answers():
    made = renderer(TAGS)
    assert made.prompt({"turns": ["hi", "yo"]}, "r") == ONE_PROMPT
    with pytest.raises(InputError, match=r"f:7: no assistant message.*turns.*answer the prompts"):
        made.texts({"turns": ["hi", "yo"]}, "f:7")


def test_a_prompt_does_not_need_its_answer():
    made = renderer(TAGS)
    for answer in (3, "", None):
        assert made.prompt({"question": "hi", "answer": answer}, "r") == ONE_PROMPT
    with pytest.raises(InputError, match=r"no 'answer' holding a text.*`format auto`"):
        made.texts({"question": "hi", "answer": 3}, "r")


# ---------------------------------------------------------------- tokens across a border


def byte_tokenizer(template, merges, trim_offsets):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template)


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize(
    ("around", "answer", "shown"),
    [
        ("Q:{} A:|{}|;", "x é", "Q:h A:⟦x é⟧;"),  # é is two tokens
        ("Q:{} A:|{}|;", "\n\nx", "Q:h A:⟦↵\n↵\nx⟧;"),  # a token of blanks only
        ("Q:{} A:| {}|;", "x", "Q:h A:⟦ x⟧;"),  # " x" is one token, wholly in
        ("Q:{} A: |{}|;", "xy", "Q:h A: x⟦y⟧;"),  # begins before the border
        ("Q:{} A:|{}|\n;", "xy.", "Q:h A:⟦xy⟧.↵\n;"),  # ends behind it
    ],
)
def test_a_token_across_the_border_is_not_learned(around, answer, shown, trim_offsets):
    before, inside, after = (part.replace("\n", "{{ '\\n' }}") for part in around.split("|"))
    template = (
        before.replace("{}", "{{ messages[0]['content'] }}") + "{% if messages[1:] %}"
        "{% generation %}" + inside.replace("{}", "{{ messages[1]['content'] }}")
        + "{% endgeneration %}" + after + "{% endif %}"
    )  # fmt: skip
    merges = [("Ġ", "x"), ("Ċ", "Ċ"), (".", "Ċ")]
    tokenizer = byte_tokenizer(template, merges, trim_offsets)
    row = {"question": "h", "answer": answer}
    [(ids, supervised)] = renderer(tokenizer=tokenizer).texts(row, "r")
    assert marked(ids, supervised, tokenizer, color=False) == shown


# ---------------------------------------------------------------- templates and masks


def test_an_answer_stands_behind_the_prompt_that_the_server_was_sent():
    # Without a generation prompt this one leaves out the end of all answers but the last.
    rewriting = PREFIXES.replace("m['content'] + eos_token", "m['content'] + (eos_token if "
                                 "loop.last or add_generation_prompt else '')")  # fmt: skip
    row = {"messages": talk("U:hi", "A:yo", "U:no", "A:go")}
    made = renderer(rewriting).texts(row, "r")
    assert made == renderer(PREFIXES).texts(row, "r") and len(made) == 1


def test_where_the_past_is_rewritten_every_answer_is_a_text_of_its_own():
    rewriting = PREFIXES.replace("m['content'] + eos_token", "m['content'] + ('' if "
                                 "messages[loop.index0:] | map(attribute='role') | list | "
                                 "select('equalto', 'user') | list else eos_token)")  # fmt: skip
    row = {"messages": talk("U:hi", "A:yo", "U:no", "A:go")}
    ids = (*ONE_PROMPT, 10, 7, 3, 6, 12, 7, 4, 6, 13, 2, 7)
    second = (ids, bits("0000000 00 0000 00 110"))
    assert renderer(rewriting).texts(row, "r") == [ONE, second]
    assert renderer(rewriting, supervise="last").texts(row, "r") == [second]


def test_a_mask_of_nothing_shows_the_row():
    empty = TAGS.replace("{% generation %}", "{% generation %}{% endgeneration %}", 1)
    empty = empty.replace("{% endgeneration %}{{ '\n' }}", "{{ '\n' }}")
    with pytest.raises(InputError, match="f:1: none of the 10 tokens would be learned") as error:
        renderer(empty).texts({"question": "hi", "answer": "yo"}, "f:1")
    assert "<s>U:hi↵\nA:yo</s>↵\n" in str(error.value)
    assert "generation %} tags" in str(error.value)
    with pytest.raises(InputError, match=r"none of the 3 tokens.*text_prompt_tokens"):
        renderer(text_prompt_tokens=3).texts({"text": "hi yo"}, "r")


def test_tags_around_everything_are_cut_to_the_answer():
    full = "{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made = renderer(full + "{% endgeneration %}")
    assert made.texts({"question": "hi ", "answer": "yo"}, "r") == [((9, 8, 10), bits("001"))]
    trimming = renderer(full.replace("'] }}", "'] | trim }}") + "{% endgeneration %}")
    with pytest.raises(InputError, match="f:1: all of the 1 tokens would be") as error:
        trimming.texts({"question": " ", "answer": "yo"}, "f:1")
    assert "⟦yo⟧" in str(error.value)


@pytest.mark.parametrize(
    ("row", "settings", "named"),
    [
        ({"q": "x"}, {}, r"keys \['q'\] is one of turns, messages"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, {}, "message 1 .* role 'narrator'"),
        ({"messages": talk("U:hi") + [{"role": "assistant"}]}, {}, "message 2 needs"),
        ({"messages": talk("U:hi") + ["yo"]}, {}, "message 2 needs .* but is 'yo'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, {}, "message 1 needs"),
        ({"question": "hi"}, {}, "no assistant message"),
        ({"question": "\ud800"}, {}, "half a character"),
        ({"text": "hi"}, {"format": "question"}, "no 'question'"),
        ({"messages": talk("A:yo", "A:no")}, {}, "refuses these messages .*in turn"),
    ],
)
def test_what_a_row_can_get_wrong(row, settings, named):
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('in turn') }}{% endif %}"
    with pytest.raises(InputError, match=named) as error:
        renderer(strict + TAGS, **settings).texts(row, "f:9")
    assert str(error.value).startswith("f:9: ")


def test_auto_says_what_it_saw():
    made = renderer(TAGS)
    made.prompt({"question": "hi"}, "f:1")
    with pytest.raises(InputError, match="auto saw question in the first row"):
        made.prompt({"turns": ["hi"]}, "f:2")


@pytest.mark.parametrize(
    "settings",
    [{"format": "columns"}, {"format": "text", "prompt_column": "q"}, {"answer_column": "a"}],
)
def test_settings_that_do_not_go_together(settings):
    with pytest.raises(InputError, match="prompt_column"):
        renderer(TAGS, **settings)


def test_a_tokenizer_without_offsets_makes_prompts_only():
    tokenizer = word_tokenizer(TAGS)
    made = renderer(tokenizer=tokenizer)
    type(tokenizer).is_fast, kept = property(lambda _: False), type(tokenizer).is_fast
    try:
        assert made.prompt({"question": "hi"}, "r") == ONE_PROMPT
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            made.texts({"question": "hi", "answer": "yo"}, "r")
    finally:
        type(tokenizer).is_fast = kept


# ---------------------------------------------------------------- a whole source


def prepare(tmp_path, rows, keep="texts", max_tokens=None, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = SourceConfig(str(path), **settings)
    made = Renderer(word_tokenizer(TAGS), config)
    return prepared(read_source(config), made, config, keep, max_tokens)


ROWS = [
    {"question": "hi", "answer": "yo", "category": 3},
    {"question": "hi", "answer": "yo", "id": 1},
    {"question": "hi"},
    {"question": "hi", "answer": "yo yo yo yo"},
    {"answer": "yo"},
    {"question": "hi", "answer": "go"},
]


def test_every_row_is_accounted_for(tmp_path):
    items = list(prepare(tmp_path, ROWS, max_tokens=12, max_failed_rows=2))
    assert [item.source_row for item in items] == list(range(6))
    assert items[0] == TokenRow(*ONE, 0, "3")
    assert items[1] == RejectedRow(1, "duplicate", failed=False)
    assert items[3] == RejectedRow(3, "16 tokens, more than the 12 that fit", failed=False)
    assert [item.source_row for item in items if getattr(item, "failed", False)] == [2, 4]
    assert "rows.jsonl:5: no 'question'" in items[4].reason
    assert isinstance(items[5], TokenRow)


def test_prompts_have_no_mask_and_repeat_sooner(tmp_path):
    items = list(prepare(tmp_path, ROWS[:4], keep="prompts"))
    assert items[0] == TokenRow(ONE_PROMPT, (False,) * 7, 0, "3")
    assert [item.reason for item in items[1:]] == ["duplicate"] * 3


def test_rows_that_differ_in_the_mask_are_not_duplicates(tmp_path):
    tail = {"messages": talk("U:hi", "A:yo", "U:hi", "A:yo")}
    # The same ids: what the user says looks like an answered turn.
    fake = {"messages": talk("U:hi\nA:yo</s>\nU:hi", "A:yo")}
    first, second = prepare(tmp_path, [tail, fake])
    assert first.ids == second.ids and first.supervised != second.supervised


def test_one_malformed_row_too_many_names_them(tmp_path):
    with pytest.raises(InputError, match=r"(?s)2 malformed rows, more than max_failed_rows 1.*"
                       r"rows\.jsonl:3: .*rows\.jsonl:5: "):  # fmt: skip
        list(prepare(tmp_path, ROWS, max_failed_rows=1))
    with pytest.raises(InputError, match=r"rows\.jsonl:3: (?s:.*)max_failed_rows 0"):
        list(prepare(tmp_path, ROWS))


# ---------------------------------------------------------------- looking at rows


def test_rows_are_shown_with_their_mask(tmp_path, capsys, monkeypatch):
    rows = prepare(tmp_path, [*ROWS[:2], {"question": "ok", "answer": "no\x1b[2J\tgo"}])
    rows = list(rows)
    tokenizer = word_tokenizer()
    monkeypatch.setenv("NO_COLOR", "1")
    show_rows(rows[:2], tokenizer, 2)
    assert capsys.readouterr().out == (
        "--- row 0: 10 tokens, 2 supervised, 3\n<s>U:hi↵\nA:⟦yo</s>⟧↵\n\n\n"
        "--- row 1: left out: duplicate\n\n"
    )
    # Who asks for two rows wants to see two masks, whatever is left out before them.
    show_rows([rows[1]] * 3 + rows, tokenizer, 2)
    shown = capsys.readouterr().out
    assert [line.split(":")[0] for line in shown.splitlines() if line.startswith("---")] == [
        "--- row 1", "--- row 1", "--- row 0", "--- row 2", "--- 2 more rows were left out before"
    ]  # fmt: skip
    show_rows(rows, tokenizer, 1, color=True)
    shown = capsys.readouterr().out
    assert "\x1b[2m<s>U:hi↵\nA:\x1b[0m\x1b[1;32myo</s>\x1b[0m\x1b[2m↵\n\x1b[0m" in shown


def test_prompts_say_why_nothing_of_them_is_learned(tmp_path, capsys):
    show_rows(prepare(tmp_path, ROWS[:1], keep="prompts"), word_tokenizer(), 1, color=False)
    shown = capsys.readouterr().out
    assert shown.startswith("--- row 0: 7 tokens, a prompt, 3\n<s>U:hi↵\nA:\n\n")
    assert "0 supervised" not in shown
    for needed in ("`redrafter answers`", "--store ANSWERS --target.path MODEL --show 3",
                   "--keep texts"):  # fmt: skip
        assert needed in shown
    show_rows(prepare(tmp_path, ROWS[:1]), word_tokenizer(), 1, color=False)
    assert "Nothing of a prompt" not in capsys.readouterr().out


def test_control_characters_cannot_act_on_the_terminal():
    tokenizer = byte_tokenizer(None, [("Ġ", "x")], trim_offsets=True)
    ids = tokenizer("a\x1b[2J\tb x é").input_ids
    shown = marked(ids, [i > 6 for i in range(len(ids))], tokenizer, color=False)
    assert shown == "a\\x1b[2J\\tb⟦ x é⟧"
