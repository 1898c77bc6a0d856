"""Answers of a server that serves the target, in the target's place.

What is sent is the prompt's own tokens (or text, or messages) and the target's pure distribution:
engines take top_k, penalties and so on from the model's generation_config.json unless told
otherwise. What comes back is taken as token ids where the server gives them (`token_ids` of vLLM,
`tokens` of llama.cpp), else its text is tokenised behind the prompt and must render back to that
text. Where the server says which prompt it read (`prompt_token_ids`, or their number in `usage`),
that must be the prompt that was meant.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm

from redrafter.config import AskedAnswersConfig, SourceConfig
from redrafter.contracts import InputError
from redrafter.data.answers import Answer, Asked, LeftOut
from redrafter.data.chat import Renderer
from redrafter.data.server import Again, Failed, Refused, Server
from redrafter.targets.model import Target
from redrafter.targets.text import text_of, tokens_behind

Made = TypeVar("Made")
#: compares greedy answers with the target's own; raises InputError where they are another model's
Check = Callable[[Sequence[Asked], Sequence[Answer]], None]

_ENGINE = {
    "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0,
    "skip_special_tokens": False, "return_token_ids": True, "return_tokens": True,
}  # fmt: skip
_STOPPED = {"stop", "eos", "eos_token", "tool_calls", "function_call"}
_CHECK_TOKENS = 32
_PROBE_TOKENS = 2  # of the first prompt: enough to see whether anything is answered


class OtherPrompt(Refused):
    """The server read another prompt than was meant."""


class ServedAnswers:
    """An `Answerer` (see `answers.py`) that asks a server, `requests.at_once` prompts at a time.

    check: what is made of the first prompts' greedy answers before any others are asked for
    Of a prompt that stays without an answer while others are answered, a `LeftOut` says so. Raises
    InputError where the server is gone, or takes no request at all: nothing is lost then.
    """

    def __init__(self, target: Target, config: AskedAnswersConfig, check: Check | None = None):
        self.target, self.config, self.requests = target, config, config.requests
        self.server = Server(config.server, config.requests)
        self.identity = {"answered_by": "server", "send": config.requests.send}
        self._check = check if config.requests.check_prompts else None
        self._checked = False
        self._end = end_token(target)

    def __call__(
        self, asked: Sequence[Asked], seeds: Sequence[int], temperature: float, bar: tqdm
    ) -> list[Answer | LeftOut]:
        if not asked:
            return []
        if self.requests.send == "chat" and asked[0].messages is None:
            raise InputError(
                "answers.requests.send chat: prompts from data/prepare.py are tokens, of which no "
                "messages are known: give --source.path, or send tokens or text"
            )
        if not self._checked:
            self._first(asked)
        made: dict[int, Answer | LeftOut] = {}
        limit = self.config.max_new_tokens

        def one(i: int) -> Answer | LeftOut:
            return self._answer(asked[i], seeds[i], temperature, limit)

        for i, found in in_threads(one, len(asked), self.requests.at_once, self.server.stop):
            if isinstance(found, LeftOut) and found.failed:
                self._alive(asked[0])  # else all others would fail, too
            made[i] = found
            bar.update(1)
        return [made[i] for i in range(len(asked))]

    # ------------------------------------------------------------ is it the right server?

    def _first(self, asked: Sequence[Asked]) -> None:
        """Raises InputError where the server answers nothing, or not as the target does."""
        self._alive(asked[0])
        n = min(self.requests.check_prompts, len(asked))
        sample = [asked[i * len(asked) // n] for i in range(n)]
        limit = min(self.config.max_new_tokens, _CHECK_TOKENS)

        def one(i: int) -> Answer | LeftOut | OtherPrompt:
            try:
                return self._ask(sample[i], 0, 0.0, limit)
            except OtherPrompt as error:
                return error
            except (Refused, Failed) as error:
                return LeftOut(str(error))

        found = dict(in_threads(one, n, self.requests.at_once, self.server.stop))
        for i in range(n):
            if isinstance(found[i], OtherPrompt):
                raise InputError(
                    f"{self.server.url}: {found[i]}: is it the target's own tokenizer and chat "
                    "template? (--answers.requests.send tokens leaves both to this side)"
                )
        good = [i for i in range(n) if isinstance(found[i], Answer)]
        if self._check is not None:
            self._check([sample[i] for i in good], [found[i] for i in good])
        self._checked = True

    def _alive(self, asked: Asked) -> None:
        """Raises InputError where not even a token behind the beginning of a prompt is answered."""
        messages = [{"role": "user", "content": "."}]
        short = Asked(asked.ids[:_PROBE_TOKENS], messages)
        try:
            self.server.ask(*self._body(short, 0, 0.0, 1), read=_choice)
        except (Failed, Refused) as error:
            raise InputError(
                f"{self.server.url} answers nothing ({error}). What is written is whole: run the "
                "same command again to go on"
            ) from None

    # ------------------------------------------------------------ a question, and what comes back

    def _answer(self, asked: Asked, seed: int, temperature: float, limit: int) -> Answer | LeftOut:
        try:
            return self._ask(asked, seed, temperature, limit)
        except Refused as error:
            return LeftOut(str(error))
        except Failed as error:
            return LeftOut(str(error), failed=True)

    def _ask(self, asked: Asked, seed: int, temperature: float, limit: int) -> Answer:
        room = self.target.max_positions
        limit = limit if room is None else min(limit, room - len(asked.ids))

        def read(body: Any) -> Answer:
            choice = _choice(body)
            self._same_prompt(asked, choice, body)
            return self._read(asked, choice, body, limit)

        found, tries = self.server.ask(*self._body(asked, seed, temperature, limit), read=read)
        return Answer(found.tokens, found.finish, {**found.counted, "asked again": tries})

    def _body(
        self, asked: Asked, seed: int, temperature: float, limit: int
    ) -> tuple[str, dict[str, Any]]:
        """(path, body) of a request."""
        body: dict[str, Any] = {
            "model": self.server.model, "max_tokens": limit, "temperature": temperature, "n": 1,
            "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "stream": False,
        }  # fmt: skip
        if temperature > 0:
            body["seed"] = seed
        if self.requests.fields == "engine":
            body |= _ENGINE
        if self.requests.send == "chat":
            body["messages"] = asked.messages
            if asked.tools:
                body["tools"] = asked.tools
            return "/chat/completions", body
        if self.requests.send == "tokens":
            body["prompt"] = asked.ids
        else:
            body["prompt"] = text_of(self.target.tokenizer, asked.ids)
            if self.requests.fields == "engine":  # the text brings them
                body["add_special_tokens"] = False
        return "/completions", body

    def _same_prompt(self, asked: Asked, choice: dict[str, Any], body: dict[str, Any]) -> None:
        """Raises OtherPrompt where the server says that it read something else."""
        read = _ids(choice.get("prompt_token_ids")) or _ids(body.get("prompt_token_ids"))
        if read is not None and read != asked.ids:
            pairs = enumerate(zip(read, asked.ids, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(read), len(asked.ids)))
            raise OtherPrompt(
                f"the server read another prompt: {len(read)} tokens in place of {len(asked.ids)}, "
                f"the same up to token {same}"
            )
        n = (body.get("usage") or {}).get("prompt_tokens")
        if isinstance(n, int) and n != len(asked.ids):
            raise OtherPrompt(
                f"the server read a prompt of {n} tokens in place of {len(asked.ids)}"
            )

    def _read(
        self, asked: Asked, choice: dict[str, Any], body: dict[str, Any], limit: int
    ) -> Answer:
        """Raises Refused for what cannot be learned from, Again for what is no answer."""
        stopped, eos = _stopped(choice), self.target.eos_token_ids
        tokens = next(filter(None, map(_ids, (choice.get("token_ids"), choice.get("tokens"),
                                              body.get("tokens")))), None)  # fmt: skip
        counted = {"as token ids": 1} if tokens is not None else {"as text": 1}
        if tokens is None:
            tokens = self._tokens(asked, choice, stopped)
        elif len(tokens) > limit:
            raise Refused(f"the server gave {len(tokens)} tokens, {limit} were asked for")
        if stopped and not (tokens and tokens[-1] in eos):
            said = choice.get("stop_reason")
            end = said if isinstance(said, int) and said in eos else self._end
            tokens = tokens if end is None else [*tokens, end]
        if not tokens:
            raise Again("an answer without a token")
        room = self.target.max_positions
        if room is not None and len(asked.ids) + len(tokens) > room:
            raise Refused(f"an answer of {len(tokens)} tokens leaves the context of {room}")
        if any(token in eos for token in tokens[:-1]):
            raise Refused("the server's answer goes on behind an end-of-text token")
        if not 0 <= min(tokens) <= max(tokens) < self.target.vocab_size:
            raise Refused(
                f"the server's tokens {min(tokens)} to {max(tokens)} are not all among the "
                f"{self.target.vocab_size} of the target"
            )
        return Answer(tokens, "eos" if tokens[-1] in eos else "length", counted)

    def _tokens(self, asked: Asked, choice: dict[str, Any], stopped: bool) -> list[int]:
        """Of a text. Raises Refused where tokens of it are not known for sure."""
        message = choice.get("message") or {}
        if message.get("tool_calls") or message.get("reasoning_content"):
            raise Refused(
                "the server took the answer apart (thoughts or tool calls), and gave no token ids"
            )
        text = message.get("content") if "message" in choice else choice.get("text")
        if not isinstance(text, str) or not (text or stopped):
            raise Again("an answer without a text")
        tokens = tokens_behind(self.target.tokenizer, asked.ids, text)
        if tokens is None:
            raise Refused(
                f"the server gave no token ids, and its text does not render back: {text[-80:]!r}"
            )
        return tokens


def _choice(body: Any) -> dict[str, Any]:
    """The one choice of an answer. Raises Again where there is not exactly that."""
    found = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        n = len(found) if isinstance(found, list) else "no"
        raise Again(f"a body with {n} choices in place of one")
    return found[0]


def _stopped(choice: dict[str, Any]) -> bool:
    """Whether the answer came to its end by itself."""
    why = choice.get("finish_reason")
    if why == "content_filter" or (choice.get("message") or {}).get("refusal"):
        raise Refused("the server's filter refuses it")
    if why not in _STOPPED | {"length"}:
        raise Again(f"an answer that ended by {why!r}")
    return why in _STOPPED


def _ids(found: Any) -> list[int] | None:
    if isinstance(found, list) and found and all(type(token) is int for token in found):
        return found
    return None


def end_token(target: Target) -> int | None:
    """What the target says at the end of a turn: of several EOS tokens the one that the chat
    template puts there, else the tokenizer's own. None where the target knows none."""
    eos, tokenizer = target.eos_token_ids, target.tokenizer
    if len(eos) < 2 or tokenizer is None:
        return next(iter(eos), None)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ((ids, learned),) = Renderer(tokenizer, SourceConfig("chat", "messages")).texts(
            {"messages": chat}, "chat"
        )
        last = [token for token, mask in zip(ids, learned, strict=True) if mask][-1]
    except InputError:  # a template of another kind of talk
        last = None
    own = tokenizer.eos_token_id
    return next((token for token in (last, own) if token in eos), min(eos))


def in_threads(
    work: Callable[[int], Made], n: int, threads: int, stop: threading.Event
) -> Iterator[tuple[int, Made]]:
    """(i, work(i)) of 0 .. n - 1, as they are done. An exception of any ends all.

    stop: set when the caller leaves, whose threads then begin nothing more. They are daemons: a
        program that is stopped does not wait for answers that are on their way
    """
    stop.clear()
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    for i in range(n):
        todo.put(i)

    def run() -> None:
        while not stop.is_set():
            try:
                i = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((i, work(i), None))
            except BaseException as error:
                done.put((i, None, error))

    for _ in range(min(threads, n)):
        threading.Thread(target=run, daemon=True).start()
    left = True
    try:
        for _ in range(n):
            i, made, error = done.get()
            if error is not None:
                raise error
            yield i, made
        left = False
    finally:
        if left:
            stop.set()
