"""What is learned under the kinds of chat templates there are: masks written by hand.

Learned characters stand in ⟦ ⟧. Templates are short ones of each kind; a character is a token, but
for the special tokens of the kind.
"""

import json
import re

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from redrafter.config import SourceConfig
from redrafter.contracts import InputError
from redrafter.data.build_rows import build_rows, report
from redrafter.data.chat import Renderer
from redrafter.data.show import marked
from redrafter.data.sources import read_source

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set ns = namespace(head='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.head = m.content + '\n\n' %}{% else %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.role == 'user' %}{{ ns.head }}{% set ns.head = '' %}{% endif %}"
    "{{ m.content | trim }}<end>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Thoughts are kept behind the last question, and dropped before it.
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set said = m.content | default('') %}{% set thought = m.reasoning_content | default('') %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought | trim }}\n</think>\n\n{% endif %}{{ said | trim }}"
    "{% for c in m.tool_calls | default([]) %}<tool_call>\n"
    "{\"name\": \"{{ c.function.name }}\", \"arguments\": {{ c.function.arguments | tojson }}}\n"
    "</tool_call>{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>{{ m.content }}</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if loop.first and tools %}{{ tools | tojson }}\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a thought, and no answer is rendered with one.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|A|>{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ eos_token }}"
    "{% else %}<|U|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|A|><think>\n{% endif %}"
)
# As before, but it can be told that no thought is wanted.
NEMOTRON = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n"
    "{% else %}<think></think>{% endif %}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
# Channels; the last answer ends with another token than earlier ones.
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<turn>",
    "<end>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>", "<tool_call>",
    "</tool_call>", "<|A|>", "<|U|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>",
]  # fmt: skip


def tokenizer_of(template, bos=False, eos=False):
    """Every character is a token, and every special one of any kind."""
    characters = [chr(i) for i in range(32, 127)] + ["\n", "?"]
    vocab = {c: i for i, c in enumerate(dict.fromkeys([*SPECIAL, *characters]))}
    made = Tokenizer(models.WordLevel(vocab, "?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    if bos or eos:
        around = f"{'<s> ' * bos}$A{' </s>' * eos}"
        made.post_processor = processors.TemplateProcessing(
            around, special_tokens=[("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=template,
        extra_special_tokens=SPECIAL[2:],
    )  # fmt: skip


def renderer(template, **settings):
    bos, eos = settings.pop("bos", False), settings.pop("eos", False)
    return Renderer(tokenizer_of(template, bos, eos), SourceConfig("rows.jsonl", **settings))


def shown(template, messages, tools=None, **settings):
    made = renderer(template, **settings)
    row = {"messages": messages, "tools": tools}
    return [marked(ids, mask, made.tokenizer, False).replace("↵\n", "\n")
            for ids, mask in made.texts(row, "f:1")]  # fmt: skip


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


TALK = [user("hi"), said("yo"), user("no"), said("go ")]
HEAD = "<|im_start|>system\nBe kind.<|im_end|>\n"
Q3_FIRST = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
THOUGHTS = [user("hi"), said("<think>\nwhat\n</think>\n\nyo"), user("no"),
            said("go", reasoning_content="so")]  # fmt: skip

KINDS = {
    "chatml": (CHATML, TALK, [
        f"{HEAD}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"
        "<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n⟦go <|im_end|>⟧\n"]),
    "chatml, assistant first": (CHATML, [said("yo"), user("no"), said("go")], [
        f"{HEAD}<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n⟦go<|im_end|>⟧\n"]),
    "llama 3": (LLAMA3, [system("ok"), *TALK], [
        "<s><|header|>system<|/header|>\n\nok<|eot|>"
        "<|header|>user<|/header|>\n\nhi<|eot|><|header|>assistant<|/header|>\n\n⟦yo<|eot|>⟧"
        "<|header|>user<|/header|>\n\nno<|eot|><|header|>assistant<|/header|>\n\n⟦go<|eot|>⟧"]),
    "gemma": (GEMMA, [system("ok"), *TALK], [
        "<s><turn>user\nok\n\nhi<end>\n<turn>model\n⟦yo<end>⟧\n"
        "<turn>user\nno<end>\n<turn>model\n⟦go<end>⟧\n"]),
    "mistral": (MISTRAL, TALK, ["<s>[INST] hi [/INST]⟦ yo</s>⟧[INST] no [/INST]⟦ go </s>⟧"]),
    "phi": (PHI, TALK, [
        "<|user|>\nhi<|end|>\n<|assistant|>\n⟦yo<|end|>⟧\n"
        "<|user|>\nno<|end|>\n<|assistant|>\n⟦go <|end|>⟧\n</s>"]),
    "qwen 3": (QWEN3, TALK, [
        f"{Q3_FIRST}⟦<think>\n\n</think>\n\nyo<|im_end|>⟧\n",
        f"{Q3_FIRST}yo<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\ngo<|im_end|>⟧\n"]),
    "qwen 3, thoughts": (QWEN3, THOUGHTS, [
        f"{Q3_FIRST}⟦<think>\nwhat\n</think>\n\nyo<|im_end|>⟧\n",
        f"{Q3_FIRST}yo<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nso\n</think>\n\ngo<|im_end|>⟧\n"]),
    "r1": (R1, TALK, [
        "<s><|U|>hi<|A|><think>\n⟦\n</think>\n\nyo</s>⟧",
        "<s><|U|>hi<|A|>yo</s><|U|>no<|A|><think>\n⟦\n</think>\n\ngo </s>⟧"]),
    "r1, thoughts": (R1, THOUGHTS, [
        "<s><|U|>hi<|A|><think>\n⟦what\n</think>\n\nyo</s>⟧",
        "<s><|U|>hi<|A|>\n\nyo</s><|U|>no<|A|><think>\n⟦so\n</think>\n\ngo</s>⟧"]),
    "nemotron": (NEMOTRON, [user("hi"), said("yo")], [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think></think>⟦yo<|im_end|>⟧\n"]),
    "nemotron, thoughts": (NEMOTRON, [user("hi"), said("yo", reasoning="what")], [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n⟦what\n</think>\nyo<|im_end|>⟧\n"]),
    "gpt-oss": (GPT_OSS, [user("hi"), said("yo", thinking="what"), user("no"), said("go")], [
        "<|start|>user<|message|>hi<|end|><|start|>assistant⟦<|channel|>analysis<|message|>what"
        "<|end|><|start|>assistant<|channel|>final<|message|>yo<|return|>⟧",
        "<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>final<|message|>yo<|end|>"
        "<|start|>user<|message|>no<|end|><|start|>assistant⟦<|channel|>final<|message|>go"
        "<|return|>⟧"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind):
    template, messages, wanted = KINDS[kind]
    assert shown(template, messages) == wanted
    assert shown(template, messages, supervise="last") == [only_last(wanted[-1])]


def only_last(text):
    *before, last = text.split("⟦")
    return "".join(before).replace("⟧", "") + f"⟦{last}"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nemotron"])
def test_what_is_learned_follows_what_the_server_was_sent(kind):
    # (The one left out is sent another prompt where no thought is wanted.)
    template, messages, _ = KINDS[kind]
    made = renderer(template)
    prompt = made.prompt({"messages": messages[:-1]}, "f:1")
    ids, mask = made.texts({"messages": messages}, "f:1")[-1]
    assert ids[: len(prompt)] == prompt and mask[len(prompt)] and not mask[len(prompt) - 1]


# ---------------------------------------------------------------- tags and special tokens


def whole_turns_tagged(template):
    """Tags around all that a turn is rendered as, the role's header too."""
    start, end = "{% for m in messages %}", "{% endfor %}"
    head, turns = template.split(start, 1)
    turn, rest = turns.rsplit(end, 1)
    return (f"{head}{start}{{% if m.role == 'assistant' %}}{{% generation %}}{turn}"
            f"{{% endgeneration %}}{{% else %}}{turn}{{% endif %}}{end}{rest}")  # fmt: skip


@pytest.mark.parametrize("kind", ["chatml", "chatml, assistant first", "llama 3", "phi", "r1",
                                  "r1, thoughts", "nemotron", "nemotron, thoughts"])  # fmt: skip
def test_tags_around_the_header_are_cut_to_what_is_generated(kind):
    template, messages, wanted = KINDS[kind]
    tagged = whole_turns_tagged(template)
    assert shown(tagged, messages) == wanted
    assert shown(tagged, messages, supervise="last") == [only_last(wanted[-1])]


def test_tags_may_leave_out_what_a_server_generates():
    content = CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' %}{% generation %}"
                             "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
                             "{% endif %}")  # fmt: skip
    wanted = KINDS["chatml"][2][0].replace("<|im_end|>⟧", "⟧<|im_end|>")
    assert shown(content, TALK) == [wanted]


def test_without_a_template_an_eos_ends_the_last_answer_and_no_prompt():
    row = {"messages": TALK[:2]}
    for bos, eos in ((True, True), (False, True), (True, False)):
        made = renderer(None, bos=bos, eos=eos)
        decode = made.tokenizer.decode
        assert decode(made.prompt(row, "r")) == f"{'<s>' * bos}hi"
        assert decode(made.conversation(TALK[:1], "r")) == f"{'<s>' * bos}hi"
        assert shown(None, TALK[:2], bos=bos, eos=eos) == [
            f"{'<s>' * bos}hi⟦\nyo{'</s>' * eos}⟧"
        ]
        text = renderer(None, bos=bos, eos=eos, text_prompt_tokens=2)
        assert decode(text.prompt({"text": "hi yo"}, "r")) == f"{'<s>' * bos}hi"
        ((ids, mask),) = text.texts({"text": "hi yo"}, "r")
        assert decode(ids[mask.index(True) :]) == f" yo{'</s>' * eos}"


def test_a_greeting_alone_is_named():
    with pytest.raises(InputError, match="f:1: nothing stands before its answer"):
        shown(CHATML, [said("yo")])


def test_an_answer_that_no_server_gives_behind_its_prompt_is_named():
    odd = CHATML.replace("{% endfor %}", "{% if loop.last %}({{ m.role }}){% endif %}{% endfor %}")
    odd = odd.replace("<|im_start|>assistant\n{% endif %}", "Answer: {% endif %}")
    with pytest.raises(InputError, match="f:1: .* does not render message 2 behind its own "
                       r"generation prompt: '\(user\)Answer: ' there is '.*' here"):  # fmt: skip
        shown(odd, TALK[:2])


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
    with pytest.raises(InputError, match=r"f:1: message 2 \(assistant\): its tool call's name 'look'"):
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
    assert shown(CHATML, talk) == [only_last(KINDS["chatml"][2][0])]
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
