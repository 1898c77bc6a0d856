"""Second stage for conversations: every turn answered by the target, each next one put after the
target's own earlier answers, as a server would have seen it.

A row is a turn: the chat so far as the template renders it then, and the answer. So a template that
rewrites the history (it drops what was thought, say) is no matter. Turns of a conversation share a
source row and stand one after the other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from redrafter.config import AnswersConfig, SourceConfig
from redrafter.contracts import Drafter, InputError
from redrafter.data.answers import (
    Answerer,
    Asked,
    LeftOut,
    OwnAnswers,
    answer_seed,
    answered_row,
    answers_identity,
    groups_of,
    left_out,
    passes_of,
    tally_of,
)
from redrafter.data.build_rows import columns_of, need_rows, origin, source_identity
from redrafter.data.chat import Renderer
from redrafter.data.day import dated, day_of
from redrafter.data.filling import Shard, fill, open_filled
from redrafter.data.formats import Messages, tools_of
from redrafter.data.rows import TokenRow
from redrafter.data.sources import Source, read_source
from redrafter.data.store import Store, begun, job_folder, open_job
from redrafter.data.template import Tools
from redrafter.data.vocabulary import check_ids
from redrafter.processes import by_main, main_first
from redrafter.targets.model import Target
from redrafter.targets.text import tokenizer_of


@dataclass(frozen=True)
class Conversation:
    """turns: what is said before each answer; tools: that the row offers; row: 0-based, in the
    source; where: `file:line`, for messages; first: number of its first turn among those of all
    conversations."""

    turns: list[Messages]
    tools: Tools | None
    row: int
    where: str
    first: int


def build_conversations(
    target: Target,
    source_config: SourceConfig,
    config: AnswersConfig,
    folder: str | Path,
    *,
    seed: int = 0,
    drafter: Callable[[], Drafter] | None = None,
    answerer: Answerer | None = None,
    named: bool = False,
    progress: bool = True,
) -> Store:
    """Let the target answer every turn of a source's conversations, or open what it said before.

    seed, drafter, answerer, named: as for `build_answers`. One shard is `config.shard_prompts`
    conversations at one temperature.
    A conversation ends early where its next prompt fills the target's context; the turns left are
    counted as skipped. An answer that `config.max_new_tokens` cut short is part of the history as
    it is (`cut_turns` counts them). Rows that cannot be read are failed ones, and repeated
    conversations are skipped. Raises InputError before any work where more than
    `source_config.max_failed_rows` fail.
    """
    source = main_first(lambda: read_source(source_config))
    tokenizer = tokenizer_of(target, source_config.path)
    answerer = answerer or OwnAnswers(target, config, drafter)
    identity = {
        **source_identity(source, tokenizer), "turns": "all",
        **answers_identity(target, config, seed), **answerer.identity,
    }  # fmt: skip
    place = job_folder(folder, "answers", identity, named)
    day = by_main(lambda: day_of(tokenizer, begun(place)))
    identity, renderer = dated(identity, day), Renderer(tokenizer, source_config, day)
    job = open_job(folder, "answers", identity, named)
    if job.complete:
        return need_rows(open_filled(job), source_config.path)
    found, unread = _conversations(source, renderer, target.vocab_size)
    passes, groups = passes_of(config), groups_of(len(found), config.shard_prompts)
    turns = sum(len(chat.turns) for chat in found)

    def make(index: int, bar: tqdm) -> Shard:
        number, group = divmod(index, len(groups))
        chats = [found[i] for i in groups[group]]
        rows, rejected, tally = _converse(
            target, renderer, chats, *passes[number], seed, answerer, bar
        )
        numbers = [number * turns + place for place in rows]
        rejected += unread if index == 0 else []
        return columns_of(rows.values(), numbers), rejected, tally

    sizes = [sum(len(found[i].turns) for i in group) for _ in passes for group in groups]
    store = fill(
        job, sizes, make, what="answers", unit="turn", progress=progress, together=target.together,
        input=sum(sizes) + len(unread), made_from=[origin(source)],
        conversations=len(found), turns=turns,
    )  # fmt: skip
    return need_rows(store, source_config.path)


def cut_turns(store: Store, target: Target) -> int:
    """Answers that do not end with an EOS: the limit or the context ended them."""
    last = store.rows().tokens[store.lengths.cumsum(0) - 1].tolist()
    return sum(token not in target.eos_token_ids for token in last)


def _conversations(
    source: Source, renderer: Renderer, vocab_size: int
) -> tuple[list[Conversation], list[dict]]:
    """What can be asked, in order; and what is left out, as a shard's receipt lists it.

    Rendered once with a made-up answer, so that what the template refuses is known beforehand.
    """
    found: list[Conversation] = []
    unread, seen, failed, first = [], set(), 0, 0
    for row, content in source:
        where, reason = source.where(row), "duplicate"
        try:
            turns, tools = renderer.turns(content, where), tools_of(content, where)
            made_up = {"role": "assistant", "content": "."}
            chat = [m for turn in turns for m in (*turn, made_up)][:-1]
            ids = renderer.conversation(chat, where, tools)
            check_ids(ids, vocab_size, renderer.tokenizer, where)
        except InputError as error:
            failed, allowed = failed + 1, source.config.max_failed_rows
            if failed > allowed:
                raise InputError(
                    f"{error}\n(max_failed_rows {allowed}: mend the row, or raise it to go on)"
                ) from error
            turns, tools, reason = [], None, str(error)
        said = json.dumps([turns, tools])
        if not turns or said in seen:
            unread.append({"source_row": row, "failed": not turns, "reason": reason})
            continue
        seen.add(said)
        found.append(Conversation(turns, tools, row, where, first))
        first += len(turns)
    if not found:
        raise InputError(f"{source.config.path}: none of its rows asks anything; give another")
    return found, unread


def _converse(
    target: Target,
    renderer: Renderer,
    chats: list[Conversation],
    temperature: float,
    sample: int,
    seed: int,
    answerer: Answerer,
    bar: tqdm,
) -> tuple[dict[int, TokenRow], list[dict[str, Any]], Counter[str]]:
    """Number of a turn -> what was asked and said; and the turns that leave no room for an answer.

    The first turns of all are answered together, then the second ones, and so on.
    """
    room = target.max_positions
    rows: dict[int, TokenRow] = {}
    rejected: list[dict[str, Any]] = []
    tally: Counter[str] = Counter()
    history: dict[int, Messages] = {place: [] for place in range(len(chats))}

    def end(place: int, turn: int, why: LeftOut) -> None:
        """Of a conversation: this turn and those behind it are left out."""
        del history[place]
        why = LeftOut(f"turn {turn + 1}, {why.reason}", why.failed)
        left = len(chats[place].turns) - turn
        rejected.extend([left_out(chats[place].row, why)] * left)

    for turn in range(max(len(chat.turns) for chat in chats)):
        prompts: dict[int, list[int]] = {}
        for place in [p for p in history if turn < len(chats[p].turns)]:
            chat = chats[place]
            history[place] += chat.turns[turn]
            where = f"{chat.where}, turn {turn + 1}"
            try:  # of the target's own words a template, or the target, may not take all
                ids = list(renderer.conversation(history[place], where, chat.tools))
                check_ids(ids, target.vocab_size, renderer.tokenizer, where)
                why = f"a prompt of {len(ids)} tokens, fills the context of {room}"
            except InputError as error:
                ids, why = [], str(error)
            if ids and (room is None or len(ids) < room):
                prompts[place] = ids
                continue
            end(place, turn, LeftOut(why))
            bar.update(len(chat.turns) - turn)
        seeds = [answer_seed(seed, chats[p].row, temperature, sample, turn) for p in prompts]
        asked = [Asked(ids, [*history[p]], chats[p].tools) for p, ids in prompts.items()]
        answers = answerer(asked, seeds, temperature, bar)
        tally += tally_of(answers)
        for (place, ids), found in zip(prompts.items(), answers, strict=True):
            if isinstance(found, LeftOut):
                end(place, turn, found)
                bar.update(len(chats[place].turns) - turn - 1)
                continue
            rows[chats[place].first + turn] = answered_row(ids, found.tokens, chats[place].row)
            said = renderer.tokenizer.decode(found.tokens, skip_special_tokens=True)
            history[place].append({"role": "assistant", "content": said})
    return dict(sorted(rows.items())), rejected, tally
