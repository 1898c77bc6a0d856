"""Short chat templates of the kinds there are, and what is learned under them, for people to read.

A character is a token, but for the special tokens of all kinds. Learned ones stand in ⟦ ⟧.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from redrafter.config import SourceConfig
from redrafter.data.chat import Renderer
from redrafter.data.show import marked

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
# Thoughts are off unless asked for, and no answer is rendered with one.
DEEPSEEK_31 = (
    "{{ bos_token }}{% set on = thinking is defined and thinking %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|A|></think>{{ m.content.split('</think>')[-1] | trim }}"
    "{{ eos_token }}{% else %}<|U|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|A|>{{ '<think>' if on else '</think>' }}{% endif %}"
)
# The generation prompt holds a thought that is over; answers are rendered without.
GEMMA4 = (
    "{{ bos_token }}{% for m in messages %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% for c in m.tool_calls | default([]) %}call:{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ (m.content | default('')).split('<channel|>')[-1] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n<|channel>thought\n<channel|>{% endif %}"
)
# The last answer is written behind the opened thought as it stands.
NANO = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n{{ m.content }}"
    "{% else %}{{ (m.content.split('</think>')[-1]).replace('/no_think', '') | trim }}{% endif %}"
    "\n<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n{% endif %}"
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
# No token ends a turn: the one that begins the next does.
GLM4 = (
    "<s>{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n{{ m.content }}"
    "{% else %}<|{{ m.role }}|>{% for c in m.tool_calls | default([]) %}"
    "{{ c.function.name ~ '\n' }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.content %}{{ '\n' }}{{ m.content | trim }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As before, with thoughts that are dropped once a user goes on.
GLM45 = (
    "<s>{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think>"
    "{% if loop.index0 > ns.last %}{{ m.reasoning_content }}{% endif %}</think>\n{% endif %}"
    "{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<turn>",
    "<end>", "<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>", "<tool_call>",
    "</tool_call>", "<|A|>", "<|U|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>",
    "<|observation|>",
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
    """stops: tokens that end the target's texts (None: nobody knows)"""
    bos, eos, stops = (settings.pop(name, None) for name in ("bos", "eos", "stops"))
    tokenizer = tokenizer_of(template, bool(bos), bool(eos))
    ids = None if stops is None else tokenizer.convert_tokens_to_ids(list(stops))
    return Renderer(tokenizer, SourceConfig("rows.jsonl", **settings), eos=ids)


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


def only_last(text):
    """The same text where its last answer alone is learned."""
    *before, last = text.split("⟦")
    return "".join(before).replace("⟧", "") + f"⟦{last}"
