"""Answers of an OpenAI-compatible server: what is asked, what is taken, what is counted."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from answer_server import PASSING, AnswerServer

from redrafter.cli.answers import main as answers_command
from redrafter.config import AskedAnswersConfig, RequestsConfig, SourceConfig, TargetConfig
from redrafter.contracts import InputError
from redrafter.data.answers import Answer, Asked, answer_seed, build_answers, generation_config
from redrafter.data.build_rows import build_rows, report, write_rows
from redrafter.data.conversations import build_conversations
from redrafter.data.rows import TokenRow
from redrafter.data.served import ServedAnswers, end_token
from redrafter.data.store import Store
from redrafter.decode.plain import plain
from redrafter.evaluation import served_sample
from redrafter.evaluation.lossless import Reference
from redrafter.evaluation.served_sample import compare_sample, differences
from redrafter.targets.load import load_target
from redrafter.targets.text import text_of, tokens_behind

NEW = 8
ASK = RequestsConfig(at_once=4, backoff_s=0.0, check_prompts=3)


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(TargetConfig(str(tiny_target), dtype="float64"))


@pytest.fixture(scope="module")
def prompts(tiny_target, target, tmp_path_factory):
    source = SourceConfig(path=str(tiny_target / "prompts_heldout.jsonl"), n_rows=7)
    folder = tmp_path_factory.mktemp("prompts") / "p"
    return build_rows(source, target.tokenizer, "prompts", folder, progress=False)


def many(folder, n):
    """Prompts of token ids alone, each its own."""
    rows = [TokenRow((1, 5 + i % 50, 5 + i // 50), (False,) * 3, i) for i in range(n)]
    return write_rows(lambda: rows, "prompts", folder, {"n": n})


def by_the_target(target):
    """Says what the target does."""

    def say(prompt, seed, temperature, limit):
        config = generation_config(temperature, limit)
        return plain(target, [prompt], config, seeds=seed or 0).tokens[0]

    return say


def made_up(prompt, seed, temperature, limit):
    """Depends on all that it should."""
    return [7 + (sum(prompt) + (seed or 0) + i) % 200 for i in range(limit)]


def how(server, requests=ASK, **more):
    settings = {"temperatures": (0.0, 1.0), "max_new_tokens": NEW, "shard_prompts": 5, **more}
    return AskedAnswersConfig(server=server.url, requests=requests, **settings)


def build(target, prompts, config, folder, check=None):
    answerer = ServedAnswers(target, config, check)
    return build_answers(target, prompts, config, folder, answerer=answerer, progress=False)


def rows_of(store):
    rows = store.rows()
    parts = rows.supervised.split(rows.lengths().tolist())
    return [(int(store.source_row[i]), rows.ids(i), p.tolist()) for i, p in enumerate(parts)]


def reasons(store):
    return Counter(r["reason"] for shard in store.manifest["shards"] for r in shard["rejected"])


# ---------------------------------------------------------------- what is asked and taken


@pytest.mark.parametrize("gives, send", [("ids", "tokens"), ("text", "tokens"), ("text", "text")])
def test_a_server_of_the_target_gives_its_answers(target, prompts, tmp_path, gives, send):
    """Seeds included: this server draws as the target here does."""
    tokenizer, say = target.tokenizer, by_the_target(target)
    counted = {"tokens": len, "text": lambda text: len(tokens_behind(tokenizer, [], text))}[send]

    def of_text(prompt, *more):
        return say(tokens_behind(tokenizer, [], prompt) if send == "text" else prompt, *more)

    with AnswerServer(
        of_text, target.eos_token_ids, partial(text_of, tokenizer), gives,
        read=lambda body: counted(body["prompt"]),
    ) as server:  # fmt: skip
        config = how(server, replace(ASK, send=send))
        store = build(target, prompts, config, tmp_path / "a", partial(compare_sample, target))
    own = build_answers(target, prompts, config, tmp_path / "b", progress=False)
    tally = dict(store.manifest["tally"])
    refused = 2 * prompts.n_rows - store.n_rows
    assert tally.pop("as token ids" if gives == "ids" else "as text") == store.n_rows
    if gives == "ids":
        assert rows_of(store) == rows_of(own) and tally == own.manifest["tally"] and refused == 0
    else:  # a sampled text need not be tokenised as it was drawn, or hold whole characters only
        texts = {(row, text_of(tokenizer, ids)) for row, ids, _ in rows_of(own)}
        assert {(row, text_of(tokenizer, ids)) for row, ids, _ in rows_of(store)} <= texts
        assert all("does not render back" in reason for reason in reasons(store)) and refused <= 2
    asked = server.paths["/v1/completions"]
    assert asked["top_k"] == -1 and asked["repetition_penalty"] == 1.0 and asked["top_p"] == 1.0
    assert asked["model"] == "target" and asked["return_token_ids"] is True and asked["n"] == 1
    last = prompts.n_rows - 1  # rows go out in order, and the last shard is of temperature 1
    seeds = {answer_seed(0, int(prompts.source_row[i]), 1.0, 0) for i in range(last + 1)}
    assert asked["seed"] in seeds


@pytest.mark.parametrize("past_eos", [False, True])
@torch.inference_mode()
def test_answers_that_go_on_behind_an_eos_are_compared_to_their_end(target, prompts, past_eos):
    """Told so, the target is run along all of the text; a wrong token behind the EOS is found."""
    eos, prompt = min(target.eos_token_ids), prompts.rows().ids(0)
    text = [eos]
    for _ in range(3):
        logits = target.project(target.states(torch.tensor([[*prompt, *text]]))[:, -1])
        text.append(int(logits.argmax()))
    text[-1] = (text[-1] + 1) % target.vocab_size
    found = differences(target, [Asked(prompt)], [Answer(text, "length")], past_eos)
    assert (3 in {d.position for d in found}) == past_eos


def test_conversations_put_every_turn_behind_the_servers_own_answers(target, tmp_path):
    file = tmp_path / "chats.jsonl"
    turns = [[f"import os  # {i}", "def f(x):", "return x"][: 1 + i % 3] for i in range(6)]
    file.write_text("".join(json.dumps({"turns": said}) + "\n" for said in turns))
    source, say = SourceConfig(str(file)), by_the_target(target)

    def render(messages):
        return target.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )

    with AnswerServer(
        lambda messages, *more: say(render(messages), *more), target.eos_token_ids,
        read=lambda body: len(render(body["messages"])),
    ) as server:  # fmt: skip
        config = how(server, replace(ASK, send="chat"))
        store = build_conversations(
            target, source, config, tmp_path / "a", progress=False,
            answerer=ServedAnswers(target, config, partial(compare_sample, target)),
        )  # fmt: skip
        own = build_conversations(target, source, config, tmp_path / "b", progress=False)
        assert rows_of(store) == rows_of(own) and store.n_rows == 2 * sum(map(len, turns))
        server.read = lambda body: len(render(body["messages"])) + 1  # another template's header
        with pytest.raises(InputError, match=r"read a prompt of .* tokens .*chat template"):
            ServedAnswers(target, config)(
                [Asked(render(m), m) for m in [[{"role": "user", "content": "x"}]]], [0], 0.0, None
            )


def read(target, choice, body=None, prompt=(1, 5)):
    served = ServedAnswers.__new__(ServedAnswers)
    served.target, served._end = target, end_token(target)
    return served._read(Asked(list(prompt)), choice, body or {}, NEW)


def test_what_ends_an_answer_and_where_its_tokens_are(target):
    eos = end_token(target)
    stop, length = {"finish_reason": "stop"}, {"finish_reason": "length"}
    for choice, tokens, finish in [
        ({**stop, "token_ids": [9, eos]}, [9, eos], "eos"),
        ({**stop, "token_ids": [9]}, [9, eos], "eos"),  # some leave it out
        ({**length, "tokens": [9, 8]}, [9, 8], "length"),
        ({**length, "token_ids": None, "text": "import"}, None, "length"),
        ({**stop, "text": ""}, [eos], "eos"),
        ({**stop, "message": {"content": "import"}}, None, "eos"),
    ]:
        made = read(target, choice)
        assert made.finish == finish
        if tokens is None:
            kept = made.tokens[:-1] if finish == "eos" else made.tokens
            assert text_of(target.tokenizer, kept) == "import"
        else:
            assert made.tokens == tokens
    for choice, why in [
        ({**stop, "token_ids": [eos, 9]}, "goes on behind"),
        ({**length, "token_ids": [9] * 99}, "99 tokens, 8 were asked"),
        ({**length, "token_ids": [10**6]}, "not all among"),
        ({**length, "text": "half a \ufffd"}, "render back"),
        ({**stop, "message": {"content": "x", "reasoning_content": "hm"}}, "apart"),
        ({"finish_reason": "content_filter", "text": "x"}, "filter"),
        ({**length, "text": ""}, "without a text"),
        ({"finish_reason": "abort", "token_ids": [9]}, "ended by 'abort'"),
    ]:
        with pytest.raises(Exception, match=why):
            read(target, choice)


def test_a_turn_ends_as_the_template_ends_it(target):
    class Two:
        eos_token_ids, tokenizer = {2, 3}, target.tokenizer

    assert end_token(target) in target.eos_token_ids
    own = next(iter(target.eos_token_ids))
    Two.eos_token_ids = {own, own + 1}
    assert end_token(Two) == own, "the template's, where there are several"
    Two.tokenizer = None
    assert end_token(Two) in Two.eos_token_ids


# ---------------------------------------------------------------- faults, and what is counted

REFUSED, FAILED = set(range(13, 2000, 400)), set(range(17, 2000, 500))


def row_of(body):
    """Of `many`; -1 where only the beginning of a prompt is asked."""
    prompt = body["prompt"]
    return prompt[1] - 5 + 50 * (prompt[2] - 5) if len(prompt) > 2 else -1


def bad_prompt(body):
    row = row_of(body)
    return "400" if row in REFUSED else "500" if row in FAILED else None


def test_two_thousand_prompts_while_one_request_in_five_fails(target, tmp_path):
    """Every prompt is answered, refused or failed, once; and as if nothing had gone wrong."""
    prompts = many(tmp_path / "p", 2000)
    requests = replace(ASK, retries=6, check_prompts=0, model="target")
    with AnswerServer(made_up) as server:
        config = how(server, requests, temperatures=(1.0,), max_new_tokens=3, shard_prompts=600)
        server.fault = lambda number, body: bad_prompt(body) or (
            PASSING[number // 5 % len(PASSING)] if number % 5 == 4 else None
        )
        store = build(target, prompts, config, tmp_path / "a")
    counts = store.counts
    assert counts["rows"] + counts["skipped"] + counts["failed"] == store.manifest["input"] == 2000
    assert (counts["skipped"], counts["failed"]) == (len(REFUSED), len(FAILED))
    left_out = REFUSED | FAILED
    assert store.source_row.tolist() == [i for i in range(2000) if i not in left_out]
    for i, (row, ids, mask) in enumerate(rows_of(store)):
        prompt = prompts.rows([row]).ids(0) if i % 100 == 0 else ids[:3]
        answer = made_up(prompt, answer_seed(0, row, 1.0, 0), 1.0, 3)
        assert ids == [*prompt, *answer] and mask == [False] * 3 + [True] * 3
    assert all(server.faults[fault] for fault in PASSING), "each kind must have occurred"
    # None was answered twice; beside them the looks whether the server is alive.
    assert 0 <= server.faults[None] - store.n_rows <= 1 + len(FAILED)
    assert server.faults["400"] == len(REFUSED) and store.manifest["tally"]["asked again"] > 400
    listed = reasons(store)
    assert any("maximum context length" in reason for reason in listed)
    assert any("after 7 tries: 500: out of luck" in reason for reason in listed)
    assert "1991 ended by length" in report(store) and "failed" in report(store)


def test_an_answer_that_comes_too_late_is_asked_for_again(target, tmp_path):
    prompts = many(tmp_path / "p", 6)
    with AnswerServer(made_up) as server:
        server.fault = lambda number, body: "late" if number in (2, 4) else None
        server.late_s = 1.5
        requests = replace(ASK, timeout_s=0.4, check_prompts=0)
        config = how(server, requests, temperatures=(1.0,), max_new_tokens=3)
        store = build(target, prompts, config, tmp_path / "a")
        assert server.faults["late"] == 2 == store.manifest["tally"]["asked again"]
    assert store.n_rows == 6 == len({row for row, _, _ in rows_of(store)})


def test_a_server_that_is_gone_loses_nothing(target, tmp_path):
    prompts = many(tmp_path / "p", 40)
    with AnswerServer(made_up) as server:
        config = how(server, replace(ASK, retries=1, check_prompts=0))
        want = build(target, prompts, config, tmp_path / "whole")
        for at in (1, 30, 20):
            server.n, server.fault = 0, lambda number, body, at=at: "hang up" * (number >= at)
            with pytest.raises(InputError, match=r"answers nothing .* run the same command again"):
                build(target, prompts, config, tmp_path / "a")
            assert not (tmp_path / "a/manifest.json").exists()
        server.fault = lambda number, body: None
        store = build(target, prompts, config, tmp_path / "a")
    assert rows_of(store) == rows_of(want) and store.counts["failed"] == 0


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_killed_at_any_moment_and_gone_on_with(target, tmp_path):
    """The child is killed once the server was asked so many times; no rows are lost or doubled."""
    prompts = many(tmp_path / "p", 60)
    with AnswerServer(made_up) as server:
        config = how(server, replace(ASK, check_prompts=0), max_new_tokens=3)
        want = build(target, prompts, config, tmp_path / "whole")
        asked = []

        def fault(number, body):
            asked.append((body["temperature"], row_of(body)))
            return PASSING[number % len(PASSING)] if number % 5 == 4 else None

        server.fault = fault
        fork, shards = multiprocessing.get_context("fork"), []
        for more in (3, 11, 17, 29, 31):
            end = server.n + more
            child = fork.Process(target=build, args=(target, prompts, config, tmp_path / "a"))
            child.start()
            while server.n < end and child.is_alive():
                time.sleep(0.001)
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            assert child.exitcode == -signal.SIGKILL
            shards.append(len(list((tmp_path / "a").glob("shard-*.json"))))
        assert shards == sorted(shards) and 0 < shards[-1] < 24, "kills at work, before the end"
        made = {int(path.stem[6:]) for path in (tmp_path / "a").glob("shard-*.json")}
        asked.clear()
        store = build(target, prompts, config, tmp_path / "a")
    groups = {(t, row): 12 * t + row // 5 for t, row in asked if row >= 0}
    assert set(groups.values()) == set(range(24)) - made, "what shards hold is not asked for again"
    assert rows_of(store) == rows_of(want) and store.counts == want.counts
    assert [s["sha256"] for s in store.shards] == [s["sha256"] for s in want.shards]


# ---------------------------------------------------------------- is it the right server?


def test_another_checkpoint_is_found_before_anything_is_made(target, prompts, tmp_path):
    right = by_the_target(target)

    def almost(prompt, seed, temperature, limit):
        tokens = right(prompt, seed, temperature, limit)
        return [*tokens[:5], 7 if tokens[5] != 7 else 8, *tokens[6:]] if len(tokens) > 6 else tokens

    with AnswerServer(almost, target.eos_token_ids) as server:
        config = how(server)
        with pytest.raises(InputError, match=r"not the target's.*token 5: .* the target says") as e:
            build(target, prompts, config, tmp_path / "a", partial(compare_sample, target))
        assert "check_prompts 0" in str(e.value) and "dtype" in str(e.value)
        assert not list((tmp_path / "a").glob("shard-*"))
        trusting = how(server, replace(ASK, check_prompts=0))
        build(target, prompts, trusting, tmp_path / "a", partial(compare_sample, target))


def test_a_near_tie_is_explained_and_a_clear_choice_is_not(target, monkeypatch, capsys):
    def scores(along):
        return lambda target, prompt, config, seed, text=None: along

    made = torch.zeros(2, target.vocab_size)
    made[0, 9], made[0, 8], made[1, 9] = 1.0, 0.99, 1.0
    answer = Answer([8, 9], "length")
    for rounding, explained in ((0.006, True), (0.004, False)):
        along = Reference([8, 9], "length", made, rounding)
        monkeypatch.setattr(served_sample, "reference", scores(along))
        if explained:
            compare_sample(target, [Asked([1])], [answer])
            assert "2 tokens, 1 of them near-ties" in capsys.readouterr().out
        else:
            with pytest.raises(InputError, match=r"1 of 2 tokens in 1 of 1 .*by 0.01; .* 0.008"):
                compare_sample(target, [Asked([1])], [answer])


def test_a_text_is_compared_as_a_text(target, prompts):
    """Its tokens may be others than those that were said, which the target would not say so."""
    tokenizer = target.tokenizer
    for prompt in (prompts.rows().ids(i) for i in range(prompts.n_rows)):
        said = by_the_target(target)(prompt, None, 0.0, NEW)
        letters = tokenizer([*text_of(tokenizer, said)], add_special_tokens=False).input_ids
        split = [token for letter in letters for token in letter]
        same = text_of(tokenizer, split) == text_of(tokenizer, said)
        if same and split != said and not set(split) & target.eos_token_ids:
            break
    else:
        pytest.fail("no answer can be split into smaller tokens: this tested nothing")
    as_text = Answer(split, "length", {"as text": 1})
    compare_sample(target, [Asked(prompt)], [as_text])
    with pytest.raises(InputError, match="not the target's"):
        compare_sample(target, [Asked(prompt)], [replace(as_text, counted={"as token ids": 1})])


def test_what_no_prompt_can_be_asked_with_is_said_at_once(target, tmp_path, monkeypatch):
    prompts = many(tmp_path / "p", 4)
    monkeypatch.setenv("A_KEY", "sesame")
    requests = replace(ASK, retries=0, key_from="A_KEY")
    with AnswerServer(made_up) as server:
        for fault, why in [
            ("401", r"refuses the key \(401: no such key\).* A_KEY .*which is set"),
            ("404", r"/v1/completions is not known there \(404: no such model\)"),
            ("400", "answers nothing .*maximum context length"),
            ("500", "answers nothing .*after 1 tries: 500"),
        ]:
            server.fault = lambda number, body, fault=fault: fault
            with pytest.raises(InputError, match=why):
                build(target, prompts, how(server, requests), tmp_path / "a")
        assert server.headers["Authorization"] == "Bearer sesame"
        written = "".join(p.read_text() for p in (tmp_path / "a").iterdir())
        assert "sesame" not in written and server.url not in written
        server.models = ["a", "b"]
        with pytest.raises(InputError, match=r"serves \['a', 'b'\]: say which"):
            ServedAnswers(target, how(server))
        chat = replace(ASK, send="chat", model="a")
        with pytest.raises(InputError, match=r"send chat: prompts .* are tokens"):
            build(target, prompts, how(server, chat), tmp_path / "b")
    with pytest.raises(InputError, match=r"/v1/models does not say .* is the server up"):
        ServedAnswers(target, how(server, replace(ASK, retries=0)))
    for url in ("localhost:8000", "ftp://x"):
        with pytest.raises(InputError, match="is no URL"):
            ServedAnswers(target, AskedAnswersConfig(server=url))


def test_the_command(target, tiny_target, prompts, tmp_path, capsys):
    own = next(iter(target.eos_token_ids))
    with AnswerServer(by_the_target(target), {own}) as server:
        words = [
            f"--target.path={tiny_target}", "--target.dtype=float64", f"--prompts={prompts.name}",
            f"--output_dir={tmp_path / 'a'}", f"--answers.server={server.url}/v1",
            "--answers.max_new_tokens=8", "--answers.requests.check_prompts=2",
        ]  # fmt: skip
        assert answers_command(words) == 0
        said = capsys.readouterr().out
        assert "2 greedy answers of the server" in said and "ended by" in said
        with pytest.raises(SystemExit):
            answers_command([*words, "--drafter=lookup"])
        assert "a server drafts by itself" in capsys.readouterr().err
    assert Store(tmp_path / "a").identity["answered_by"] == "server"
