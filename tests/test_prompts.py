"""Prompt files in every format, the split between training and evaluation, and bad rows."""

import gzip
import json

import pytest
from transformers import AutoTokenizer

from redrafter.config import SourceConfig
from redrafter.contracts import InputError
from redrafter.data.formats import format_of, messages_of
from redrafter.data.prompts import load_prompts
from redrafter.evaluation.prompts import holdout_warning
from redrafter.files import write_config


@pytest.fixture(scope="module")
def tokenizer(tiny_target):
    return AutoTokenizer.from_pretrained(tiny_target)


@pytest.fixture
def plain_tokenizer(tiny_target):
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    tokenizer.chat_template = None
    return tokenizer


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


QUESTION = "sort a list"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("question", {"question": QUESTION}),
        ("prompt", {"prompt": QUESTION, "completion": "sorted(x)"}),
        ("instruction", {"instruction": QUESTION, "input": "", "output": "sorted(x)"}),
        ("turns", {"turns": [QUESTION, "again"], "category": "code"}),
        ("messages", {"messages": [{"role": "user", "content": QUESTION},
                                   {"role": "assistant", "content": "sorted(x)"}]}),
        ("messages", {"conversations": [{"role": "user", "content": QUESTION}]}),
    ],
)  # fmt: skip
def test_one_user_message_reads_alike_in_every_format(
    tmp_path, tokenizer, plain_tokenizer, format, row, suffix
):
    path = write(tmp_path / f"p{suffix}", [row])
    (prompt,) = load_prompts(path, tokenizer, format)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(prompt.ids) == chat
    assert prompt.ids.count(tokenizer.bos_token_id) == chat.count(tokenizer.bos_token)
    assert prompt.category == row.get("category")
    (raw,) = load_prompts(path, plain_tokenizer, format)
    assert tuple(plain_tokenizer(QUESTION).input_ids) == raw.ids != prompt.ids


def test_a_prompt_ends_with_what_is_to_be_answered(tmp_path, tokenizer):
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    messages = [{"role": role, "content": content} for role, content in talk]
    for given, kept in ((messages, 5), (messages[:4], 3)):
        path = write(tmp_path / "p.jsonl", [{"messages": given}])
        (prompt,) = load_prompts(path, tokenizer, "messages")
        wanted = tokenizer.apply_chat_template(
            messages[:kept], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(prompt.ids) == wanted


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"instruction": "Translate.", "input": "two words", "output": "zwei Worte"}, "zwei Worte"),
        ({"instruction": "Translate.", "context": "two words", "response": "zwei"}, "zwei"),
        ({"prompt": "Translate.\n\ntwo words", "response": "zwei"}, "zwei"),
    ],
)
def test_keys_that_others_use_are_guessed(tmp_path, tokenizer, row, answer):
    chat = [{"role": "user", "content": "Translate.\n\ntwo words"}]
    form = format_of(row, "here")
    assert messages_of(row, form, "here") == chat
    learned = messages_of(row, form, "here", answered=True)
    assert learned == [*chat, {"role": "assistant", "content": answer}]
    (prompt,) = load_prompts(write(tmp_path / "p.jsonl", [row]), tokenizer, "auto")
    wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt.ids) == wanted


def test_keys_that_were_known_before_come_first():
    for row, form in (
        ({"instruction": "a", "output": "b", "text": "a b"}, "text"),
        ({"prompt": "a", "question": "b"}, "question"),
        ({"prompt": "def f():", "entry_point": "f"}, "humaneval"),
        ({"prompt": ["a", "b"]}, "turns"),
    ):
        assert format_of(row, "here") == form


def test_named_columns(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", [{"ask": QUESTION, "say": "sorted(x)"}])
    wanted = load_prompts(write(tmp_path / "q.jsonl", [{"question": QUESTION}]), tokenizer, "auto")
    for form in ("auto", "columns"):
        assert load_prompts(path, tokenizer, form, prompt_column="ask") == wanted
    for form, column in (("columns", None), ("question", "ask")):
        with pytest.raises(InputError, match="set both"):
            load_prompts(path, tokenizer, form, prompt_column=column)


def test_text_keeps_its_first_tokens(tmp_path, tokenizer):
    text = "import os\nfor name in os.listdir('.'):\n    print(name)\n"
    path = write(tmp_path / "p.jsonl", [{"text": text}])
    whole = tokenizer(text).input_ids
    special = len(tokenizer("").input_ids)
    for n in (1, 5):
        (prompt,) = load_prompts(path, tokenizer, "text", text_prompt_tokens=n)
        assert list(prompt.ids) == whole[: special + n]


def test_training_and_evaluation_never_share_a_row(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", [{"question": f"question {i}"} for i in range(10)])

    def rows(**options):
        return [p.row for p in load_prompts(path, tokenizer, "question", **options)]

    assert rows(holdout_rows=3) == list(range(7))
    assert rows(holdout_rows=3, n=4) == list(range(4))
    assert rows(holdout_rows=3, part="last") == [7, 8, 9]
    assert rows(holdout_rows=3, part="last", n=2) == [8, 9]
    assert rows(holdout_rows=3, part="last", n=9) == [7, 8, 9], "evaluation reached into training"
    assert rows(part="last", n=2) == [8, 9]
    with pytest.raises(InputError, match="holdout_rows"):
        rows(holdout_rows=10)


def test_auto_looks_at_the_first_row_of_the_file(tmp_path, tokenizer):
    # Not at the first one that is used, or training and evaluation would read it differently.
    path = write(tmp_path / "p.jsonl", [{"question": "a"}, {"turns": ["b"], "question": "c"}])
    wanted = load_prompts(path, tokenizer, "question")
    assert load_prompts(path, tokenizer, "auto") == wanted
    assert load_prompts(path, tokenizer, "auto", part="last", n=1) == wanted[1:]
    path = write(tmp_path / "q.jsonl", [{"query": "a"}])
    with pytest.raises(InputError, match=r"q\.jsonl:1: none of this row's keys \['query'\]"):
        load_prompts(path, tokenizer, "auto")


@pytest.mark.parametrize(
    ("format", "line", "named"),
    [
        ("question", '{"text": "x"}', "question"), ("question", "{", "not valid JSON"),
        ("question", "[1]", "not a JSON object"), ("question", '{"question": 3}', "question"),
        ("turns", '{"turns": []}', "turns"), ("turns", '{"turns": [1]}', "turns"),
        ("messages", '{"messages": [{"role": "user"}]}', "content"),
        ("messages", '{"messages": [{"role": "assistant", "content": "x"}]}', "before"),
        ("text", '{"text": ""}', "text"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_by_file_and_line(tmp_path, tokenizer, format, line, named):
    good = {"question": "x", "text": "x", "turns": ["x"],
            "messages": [{"role": "user", "content": "x"}]}  # fmt: skip
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + line + "\n")
    with pytest.raises(InputError, match=named) as error:
        load_prompts(path, tokenizer, format)
    assert f"{path}:3" in str(error.value)


def test_too_long_missing_and_unreadable(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", [{"question": "x"}, {"question": "x " * 50}])
    with pytest.raises(InputError, match=r"p\.jsonl:2: a prompt of \d+ tokens, only 20"):
        load_prompts(path, tokenizer, "question", max_tokens=20)
    with pytest.raises(InputError, match="does not exist"):
        load_prompts(tmp_path / "none.jsonl", tokenizer, "question")
    with pytest.raises(InputError, match="no tokenizer"):
        load_prompts(path, None, "question")
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match=r"b\.jsonl\.gz: cannot be read"):
        load_prompts(tmp_path / "b.jsonl.gz", tokenizer, "question")


@pytest.mark.parametrize("n_rows", [None, 8])
def test_a_head_evaluated_on_rows_that_its_record_names_is_told(tmp_path, n_rows):
    path = write(tmp_path / "p.jsonl", [{"text": "x"}] * 20)
    (tmp_path / "run/head").mkdir(parents=True)
    head = str(tmp_path / "run/head")
    assert holdout_warning(head, str(path), 0) is None, "nothing is known"
    source = SourceConfig("elsewhere/p.jsonl", holdout_rows=5, n_rows=n_rows)
    measured = {"source": SourceConfig("p.jsonl")}  # all of it, but not to train on
    record = {"data": {"stores": [], "source": source}, "eval": measured}
    write_config(tmp_path / "run/config.yaml", record)
    trained = n_rows or 15
    assert holdout_warning(head, str(path), trained) is None
    assert f"first {trained} rows" in holdout_warning(head, str(path), trained - 1)
    assert holdout_warning(head, str(tmp_path / "other.jsonl"), 0) is None
