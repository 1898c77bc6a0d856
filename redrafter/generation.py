"""Text in, text out: the shortest way to use a trained head, or any drafter by its name."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from redrafter.config import SourceConfig, TreeConfig
from redrafter.contracts import Drafter, Generation, InputError, Lookahead
from redrafter.data.chat import Renderer
from redrafter.data.formats import messages_of
from redrafter.decode.plain import plain
from redrafter.decode.request import FIELDS, Prompts, as_rows, nearest, sample_seeds
from redrafter.decode.speculative import speculative
from redrafter.drafters.bigram import BigramTable
from redrafter.drafters.build import MISSING, Resources, needs
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.suffix import ReferenceTexts
from redrafter.drafting import Strategy, build_strategy, foreseen, parse_strategy
from redrafter.heads.base import DraftHead
from redrafter.resources import gather
from redrafter.targets.model import Target
from redrafter.targets.text import continuation, encode, tokenizer_of

Text = str | Sequence[str]
Messages = Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]]

#: what is asked for by other names, and where it is
_ELSEWHERE = {
    "texts": "it is called prompt",
    "do_sample": "temperature says it: 0 is greedy",
    "max_length": "give max_new_tokens, the answer's alone",
    "lookahead": "write it into the name, draft='head:4x4:lookahead=static(depth=2)'",
    "rule": "write it into the name, draft='multi:children=[2]:rule=ratio'",
    "generation_config": "give its fields, or call redrafter.speculative",
    "partners": "they are called resources now",
    "num_return_sequences": "it is called samples_per_prompt",
    "attention_mask": "give prompt as the tokenizer returned it, both in one",
}


def generate(
    target: Target,
    prompt: Text | Prompts | Messages | None = None,
    head: DraftHead | str | Path | None = None,
    *,
    messages: Messages | None = None,
    draft: str | Drafter | Strategy | None = None,
    tree: TreeConfig | None = None,
    draft_model: Target | str | Path | None = None,
    bigrams: BigramTable | str | Path | None = None,
    probed: BigramTable | str | Path | None = None,
    reference: ReferenceTexts | str | Path | None = None,
    resources: Resources | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seeds: int | Sequence[int] = 0,
    samples_per_prompt: int = 1,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: Any = None,
    **generation_options: Any,
) -> Generation:
    """Continue text. Whatever drafts, the text is plain decoding's (but by `rule=`, see there).

    prompt: one text or several, continued as they are; token ids, one row or several, as lists, a
        tensor or what a tokenizer returns; or messages
    messages: a conversation or several, of {"role": ..., "content": ...}, instead of prompt; the
        target's chat template makes text of them, up to where the assistant begins
    draft: what drafts: a name that `--methods` knows (`head:4x4`, `suffix:16x1`, `mix(...)`, with
        `lookahead=` and `rule=`; eval/speed.py --help lists them), a Drafter, or what
        `load_strategy` built of a name, which saves doing so in every call. None: `head`, if there
        is one. `plain`, or neither: one token per forward
    head: a trained head, its folder or Hub id; tree: of a head whose name has no size
    draft_model, bigrams, probed, reference: what else names ask for, as objects or paths
    resources: the same in one; what is given by itself comes first
    temperature: 0 is greedy
    seeds: one for all rows or one each; a row's text depends on its own alone
    samples_per_prompt: N rows of every prompt in one batch; sample j of prompt i is row i * N + j.
        Its seed is the prompt's + j, unless `seeds` has one for every row. draft="consensus" lets
        the samples of a prompt draft for each other. At temperature 0 they are all the same
    streamer: of transformers' kind, for one row, see `redrafter.TextStream`
    generation_options: further fields of a transformers GenerationConfig, e.g. top_p=0.9
    Returns a Generation whose `extra["texts"]` are the decoded continuations (where the target has
    a tokenizer). Raises InputError naming the argument that is wrong, before anything is decoded.
    """
    config = _config(max_new_tokens, temperature, generation_options)
    _check_positive("samples_per_prompt", samples_per_prompt)
    given = as_rows(_token_ids(target, prompt, messages), None, target)
    rows = [row for row in given for _ in range(samples_per_prompt)]
    common = {
        "seeds": sample_seeds(seeds, len(given), samples_per_prompt),
        "logits_processor": logits_processor, "stopping_criteria": stopping_criteria,
    }  # fmt: skip
    if isinstance(draft, str) and "texts" in _needs(draft):
        answers = plain(target, rows, config, **common).tokens
        texts = [row + answer for row, answer in zip(rows, answers, strict=True)]
        resources = replace(resources or Resources(), texts=texts)
    strategy = load_strategy(
        target, draft, head=head, tree=tree, draft_model=draft_model, bigrams=bigrams,
        probed=probed, reference=reference, resources=resources, batch_size=len(rows),
    )  # fmt: skip
    result = _decoded(target, rows, config, strategy, streamer, common)
    if target.tokenizer is not None:
        pairs = zip(rows, result.tokens, strict=True)
        result.extra["texts"] = [continuation(target.tokenizer, *pair) for pair in pairs]
    return result


def _decoded(
    target: Target,
    rows: list[list[int]],
    config: GenerationConfig,
    strategy: Strategy | None,
    streamer: Any,
    common: dict[str, Any],
) -> Generation:
    """By the loop that a strategy is for. common: what both loops take besides."""
    if strategy is None:
        return plain(target, rows, config, streamer=streamer, **common)

    def decode(lookahead: Lookahead | None, streamer: Any = None) -> Generation:
        return speculative(
            target, rows, config, drafter=strategy.drafter, rule=strategy.rule, lookahead=lookahead,
            streamer=streamer, **common,
        )  # fmt: skip

    return decode(foreseen(strategy, decode).lookahead, streamer)


def load_strategy(
    target: Target,
    draft: str | Drafter | Strategy | None = None,
    *,
    head: DraftHead | str | Path | None = None,
    tree: TreeConfig | None = None,
    draft_model: Target | str | Path | None = None,
    bigrams: BigramTable | str | Path | None = None,
    probed: BigramTable | str | Path | None = None,
    reference: ReferenceTexts | str | Path | None = None,
    resources: Resources | None = None,
    batch_size: int = 1,
) -> Strategy | None:
    """What `generate` would draft with, for as many generations as you like; its arguments.

    batch_size: rows at a time, for names with `budget=true`, which measure what drafting costs
    Returns a Strategy, whose drafter, rule and lookahead `speculative` takes; None is plain
    decoding.
    Raises InputError naming what is wrong with a name or missing for it.
    """
    given = {"head": head, "draft": draft_model, "bigrams": bigrams, "probed": probed,
             "reference": reference}  # fmt: skip
    if isinstance(draft, (Drafter, Strategy)):
        named = {**given, "tree": tree}
        if names := [_spelt(name) for name, value in named.items() if value is not None]:
            raise InputError(f"{', '.join(names)}: for names of drafters; draft is an object")
        return draft if isinstance(draft, Strategy) else Strategy(draft)
    if draft == "plain" or (draft is None and head is None):
        return None
    resources = resources or Resources()
    given = {
        name: getattr(resources, name) if value is None else value for name, value in given.items()
    }
    if draft is None:
        found = gather({"head": 1}, target, given)
        return Strategy(HeadDrafter(found.head, target, tree))
    wanted = _needs(draft)
    for name in wanted:
        if name in given and given[name] is None:
            what = MISSING[name].removeprefix(f"--{name}, ")
            raise InputError(f"draft: {draft!r} needs {_spelt(name)}=..., {what}")
    found = gather(wanted, target, given, tree or resources.tree, batch_size)
    price = resources.price or found.price
    return build_strategy(draft, target, replace(found, price=price, texts=resources.texts))


def _spelt(resource: str) -> str:
    """As an argument: `draft` is what drafts."""
    return "draft_model" if resource == "draft" else resource


def _needs(draft: Any) -> dict[str, int]:
    """The resources of a name, see `drafters.build.needs`."""
    if not isinstance(draft, str):
        raise InputError(
            f"draft: a {type(draft).__name__} is neither a name such as 'head:4x4', a Drafter nor "
            "a Strategy"
        )
    if draft == "plain":
        return {}
    try:
        return needs(parse_strategy(draft).drafter)
    except InputError as error:
        raise InputError(f"draft: {error}") from None


def _config(max_new_tokens: int, temperature: float, options: dict[str, Any]) -> GenerationConfig:
    """Raises InputError naming an option that nothing would read, or a value that is none."""
    for name in options:
        if name in _ELSEWHERE:
            raise InputError(f"{name}: {_ELSEWHERE[name]}")
        if name not in FIELDS:
            known = [*FIELDS, *inspect.signature(generate).parameters]
            there = name in vars(GenerationConfig())
            why = "nothing here reads it" if there else "generate has no such argument"
            raise InputError(f"{name}: {why}{nearest(name, known)}")
    _check_positive("max_new_tokens", max_new_tokens)
    real = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not real or not 0 <= temperature < math.inf:
        raise InputError(f"temperature: {temperature!r} is not a number of at least 0")
    sampled = {"do_sample": True, "temperature": float(temperature)} if temperature else {}
    try:
        return GenerationConfig(max_new_tokens=max_new_tokens, **sampled, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"generation options: {error}") from error


def _check_positive(name: str, value: Any) -> None:
    try:
        good = operator.index(value) > 0
    except TypeError:
        good = False
    if not good:
        raise InputError(f"{name}: {value!r} is not a whole number above 0")


def _token_ids(target: Target, prompt: Any, messages: Any) -> Prompts:
    """Whatever a prompt may be, as `speculative` takes it."""
    if (prompt is None) == (messages is None):
        raise InputError("give prompt (text, token ids) or messages, one of the two")
    if messages is not None:
        prompt = messages
        if not _conversations(messages):
            raise InputError(
                "messages: neither a conversation, [{'role': 'user', 'content': ...}, ...], nor a "
                "list of such"
            )
    if chats := _conversations(prompt):
        return [_rendered(target, chat, i) for i, chat in enumerate(chats)]
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, Mapping):
        return prompt  # what a tokenizer returned
    if hasattr(prompt, "tolist"):  # a tensor, or numpy's
        found: Tensor = torch.as_tensor(prompt)
        return found[None] if found.dim() == 1 else found
    if not isinstance(prompt, Sequence):
        raise InputError(
            f"prompt: a {type(prompt).__name__} is neither text, messages nor token ids"
        )
    if prompt and all(isinstance(row, str) for row in prompt):
        tokenizer = tokenizer_of(target, "prompt")
        return [encode(tokenizer, text) for text in prompt]
    return [prompt] if prompt and isinstance(prompt[0], int) else prompt


def _conversations(given: Any) -> list[list[Mapping]]:
    """The chats of one or a list of them; empty where it holds none."""

    def chat(item: Any) -> bool:
        return isinstance(item, (list, tuple)) and bool(item) and isinstance(item[0], Mapping)

    if chat(given):
        return [list(given)]
    many = isinstance(given, (list, tuple)) and bool(given) and all(map(chat, given))
    return [list(item) for item in given] if many else []


def _rendered(target: Target, chat: list[Mapping], i: int) -> Sequence[int]:
    """Token ids of a chat up to where the assistant would begin; special tokens are the
    template's."""
    where = f"messages (conversation {i + 1})"
    given = [dict(m) if isinstance(m, Mapping) else m for m in chat]
    said = messages_of({"messages": given}, "messages", where)
    if said[-1]["role"] == "assistant":
        raise InputError(f"{where}: the assistant spoke last; end with what it is to answer")
    source = SourceConfig(path="messages", format="messages")
    renderer = Renderer(tokenizer_of(target, "messages"), source)
    return renderer.conversation(said, where)
