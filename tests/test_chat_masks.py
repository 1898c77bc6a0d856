"""What is learned under the kinds of chat templates there are: masks written by hand."""

import warnings

import pytest
from chat_kinds import (
    CHATML,
    DEEPSEEK_31,
    GEMMA,
    GEMMA4,
    GLM4,
    GLM45,
    GPT_OSS,
    HEAD,
    LLAMA3,
    MISTRAL,
    NANO,
    NEMOTRON,
    PHI,
    Q3_FIRST,
    QWEN3,
    R1,
    TALK,
    THOUGHTS,
    only_last,
    renderer,
    said,
    shown,
    system,
    user,
)  # fmt: skip

from redrafter.contracts import InputError

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
    "deepseek 3.1": (DEEPSEEK_31, TALK[:2], ["<s><|U|>hi<|A|></think>⟦yo</s>⟧"]),
    "deepseek 3.1, thoughts": (DEEPSEEK_31, THOUGHTS, [
        "<s><|U|>hi<|A|><think>⟦what</think>yo</s>⟧",
        "<s><|U|>hi<|A|></think>yo</s><|U|>no<|A|><think>⟦so</think>go</s>⟧"]),
    "gemma 4": (GEMMA4, TALK[:2], [
        "<s><turn>user\nhi<end>\n<turn>model\n<|channel>thought\n<channel|>⟦yo<end>⟧\n"]),
    "nano": (NANO, [system("/no_think ok"), *TALK[:2]], [
        "<|im_start|>system\nok<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n⟦\n</think>\n\nyo<|im_end|>⟧\n"]),
    "nano, thoughts": (NANO, THOUGHTS[:2], [
        "<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n⟦what\n</think>\n\nyo<|im_end|>⟧\n"]),
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


#: where the server is sent another prompt: told to think, or not to
TOLD = ("nemotron", "deepseek 3.1, thoughts")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TOLD])
def test_what_is_learned_follows_what_the_server_was_sent(kind):
    template, messages, _ = KINDS[kind]
    made = renderer(template)
    prompt = made.prompt({"messages": messages[:-1]}, "f:1")
    ids, mask = made.texts({"messages": messages}, "f:1")[-1]
    assert ids[: len(prompt)] == prompt and mask[len(prompt)] and not mask[len(prompt) - 1]


# ---------------------------------------------------------------- turns without an end

CALLS = [user("hi"), {"role": "assistant", "tool_calls": [{"function": {"name": "look",
         "arguments": {"at": "x"}}}]}, {"role": "tool", "content": "7"}, said("yo")]  # fmt: skip
THOUGHT = [user("hi"), said("yo", reasoning_content="what"), user("no"),
           said("go", reasoning_content="so")]  # fmt: skip
ENDLESS = {
    "answers": (GLM4, TALK, [
        "<s><|user|>\nhi<|assistant|>⟦\nyo<|user|>⟧\nno<|assistant|>⟦\ngo<|user|>⟧"]),
    "a call": (GLM4, CALLS[:2], [
        '<s><|user|>\nhi<|assistant|>⟦look\n{"at": "x"}<|observation|>⟧']),
    "a call and its answer": (GLM4, CALLS, [
        '<s><|user|>\nhi<|assistant|>⟦look\n{"at": "x"}<|observation|>⟧\n7'
        "<|assistant|>⟦\nyo<|user|>⟧"]),
    "thoughts that are dropped": (GLM45, THOUGHT, [
        "<s><|user|>\nhi\n<|assistant|>\n⟦<think>what</think>\nyo\n<|user|>⟧",
        "<s><|user|>\nhi\n<|assistant|>\n<think></think>\nyo\n<|user|>\nno\n<|assistant|>\n"
        "⟦<think>so</think>\ngo\n<|user|>⟧"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDLESS)
def test_the_next_turns_token_ends_an_answer_where_the_targets_texts_end_with_it(kind):
    template, messages, wanted = ENDLESS[kind]
    stops = ("</s>", "<|user|>", "<|observation|>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shown(template, messages, stops=stops) == wanted
        assert shown(template, messages, stops=stops, supervise="last") == [only_last(wanted[-1])]
        # Where nobody knows what ends the target's texts, nothing is said and nothing put in.
        assert "<|user|>⟧" not in "".join(shown(template, messages))


@pytest.mark.parametrize(("template", "stops", "why"), [
    (GLM4, ["</s>"], r"'<\|user\|>', which follows it, is not among the target's eos_token_id"),
    (GLM4, [], r"'<\|user\|>', which follows it"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
     "{% if add_generation_prompt %}assistant: {% endif %}", ["</s>"], "no special token follows"),
])  # fmt: skip
def test_an_answer_without_an_end_is_told_of_once(template, stops, why):
    made = renderer(template, stops=stops)
    with pytest.warns(UserWarning, match=why) as found:
        for _ in range(2):
            ((ids, mask),) = made.texts({"messages": TALK}, "f:1")
    assert len(found) == 1 and "learned of when to stop" in str(found[0].message)
    assert mask[-1] or made.tokenizer.decode(ids[-1]) == "\n"


@pytest.mark.parametrize("kind", KINDS)
def test_templates_that_end_their_turns_are_as_before(kind):
    template, messages, wanted = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shown(template, messages, stops=["</s>", "<|user|>", "<|end|>"]) == wanted


def test_tags_say_that_no_end_is_learned():
    content = "{{ m.content | trim }}"
    tagged = GLM4.replace(content, "{% if m.role == 'assistant' %}{% generation %}" + content
                          + "{% endgeneration %}{% else %}" + content + "{% endif %}")  # fmt: skip
    assert shown(tagged, TALK, stops=["<|user|>"]) == [
        "<s><|user|>\nhi<|assistant|>\n⟦yo⟧<|user|>\nno<|assistant|>\n⟦go⟧"
    ]


# ---------------------------------------------------------------- tags and special tokens


def whole_turns_tagged(template):
    """Tags around all that a turn is rendered as, the role's header too."""
    start, end = "{% for m in messages %}", "{% endfor %}"
    head, turns = template.split(start, 1)
    turn, rest = turns.rsplit(end, 1)
    return (f"{head}{start}{{% if m.role == 'assistant' %}}{{% generation %}}{turn}"
            f"{{% endgeneration %}}{{% else %}}{turn}{{% endif %}}{end}{rest}")  # fmt: skip


@pytest.mark.parametrize("kind", ["chatml", "chatml, assistant first", "llama 3", "phi", "r1",
                                  "r1, thoughts", "nemotron", "nemotron, thoughts",
                                  "deepseek 3.1, thoughts"])  # fmt: skip
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
    ends = R1.replace("{{ eos_token }}", "{% generation %}{{ eos_token }}{% endgeneration %}")
    assert shown(ends, THOUGHTS) == [
        text.replace("⟦", "").replace("</s>⟧", "⟦</s>⟧") for text in KINDS["r1, thoughts"][2]
    ]


def test_calls_stand_behind_a_prompt_that_answers_are_rendered_without():
    call = {"function": {"name": "look", "arguments": {"at": "x"}}}
    talk = [user("hi"), {"role": "assistant", "tool_calls": [call]}]
    assert shown(GEMMA4, talk) == [
        "<s><turn>user\nhi<end>\n<turn>model\n<|channel>thought\n<channel|>"
        '⟦call:look{"at": "x"}<end>⟧\n'
    ]


def test_a_word_of_the_template_that_switches_nothing_changes_nothing():
    # It speaks of `thinking`, and opens another prompt where that is off.
    odd = R1.replace("<|A|><think>\n{% endif %}", "{% if thinking is defined and not thinking %}"
                     "<|A|>Answer: {% else %}<|A|><think>\n{% endif %}{% endif %}")  # fmt: skip
    talk = [user("hi"), said("yo", tool_calls=[{"name": "yo", "arguments": {}}])]
    assert shown(odd, talk) == ["<s><|U|>hi<|A|><think>\n⟦\n</think>\n\nyo</s>⟧"]


def test_a_turn_that_ends_with_several_tokens_of_its_own_is_learned_whole():
    call = "<tool_call>x</tool_call>"
    ends = PHI.replace("<|end|>\n{% endfor %}", "<|end|><|eot|>\n{% endfor %}")
    for template, last in ((CHATML, "<|im_end|>"), (R1, "</s>"), (QWEN3, "<|im_end|>"),
                           (PHI, "<|end|>"), (ends, "<|end|><|eot|>")):  # fmt: skip
        (text,) = shown(template, [user("hi"), said(call)])
        assert text.split("⟦")[1].split("⟧")[0].endswith(f"{call}{last}")


def test_behind_an_eos_nothing_is_generated():
    # One that writes an empty answer behind a call.
    twice = MISTRAL.replace("{{ eos_token }}", "{{ eos_token }}<|A|>{{ eos_token }}")
    assert shown(twice, TALK[:2]) == ["<s>[INST] hi [/INST]⟦ yo</s>⟧<|A|></s>"]


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


def test_a_greeting_is_not_learned():
    with pytest.raises(InputError, match="f:1: nothing stands before its answer"):
        shown(CHATML, [said("yo")])
    for template in (None, MISTRAL):  # of which one takes a chat that no user begins
        (text,) = shown(template, [said("yo"), user("no"), said("go")])
        assert text.index("⟦") > text.index("no") and text.count("⟦") == 1


def test_an_answer_that_no_server_gives_behind_its_prompt_is_named():
    odd = CHATML.replace("{% endfor %}", "{% if loop.last %}({{ m.role }}){% endif %}{% endfor %}")
    odd = odd.replace("<|im_start|>assistant\n{% endif %}", "Answer: {% endif %}")
    with pytest.raises(InputError, match="f:1: .* does not render message 2 behind its own "
                       r"generation prompt: '\(user\)Answer: ' there is '.*' here"):  # fmt: skip
        shown(odd, TALK[:2])
