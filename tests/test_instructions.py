"""A chat model writes what a user might ask: seeds decide, and a server would read the same."""

import copy

import chat_kinds
import pytest
from chat_kinds import tokenizer_of
from transformers import GenerationConfig

from redrafter.cli.instructions import main as command
from redrafter.config import InstructionsConfig, TargetConfig
from redrafter.contracts import InputError
from redrafter.data.instructions import around_user, build_instructions
from redrafter.data.template import Template
from redrafter.decode.plain import plain
from redrafter.targets.load import load_target

NEW = 24


@pytest.fixture(scope="module")
def target(tiny_target):
    return load_target(TargetConfig(str(tiny_target), dtype="float64"))


def config(target, **changes):
    settings = {"n": 12, "temperature": 1.3, "max_new_tokens": NEW, "min_words": 1,
                "shard_prompts": 5, "batch_size": 4, **changes}  # fmt: skip
    return InstructionsConfig(TargetConfig("-"), "-", **settings)


def built(target, folder, **changes):
    return build_instructions(target, config(target, **changes), folder, progress=False)


def left_out(store):
    return {r["source_row"]: r["reason"] for s in store.manifest["shards"] for r in s["rejected"]}


def test_every_prompt_is_the_template_around_words_of_the_target(target, tmp_path):
    store = built(target, tmp_path)
    tokenizer = target.tokenizer
    before, _ = around_user(Template(tokenizer))
    opened = tokenizer(before, add_special_tokens=False).input_ids
    for place in range(store.n_rows):
        text = tokenizer.decode(store.rows([place]).ids(0))
        said = text[len(before):]
        rendered = [
            tokenizer.apply_chat_template([{"role": "user", "content": said[:end]}],
                                          tokenize=False, add_generation_prompt=True)
            for end in range(len(said) + 1)
        ]  # fmt: skip
        assert text in rendered, "a server would send another prompt"
    # One of them again, by the plain loop and its seed.
    from redrafter.data.answers import answer_seed

    how = GenerationConfig(
        max_new_tokens=NEW, do_sample=True, temperature=1.3, top_k=0, top_p=1.0,
        eos_token_id=[*target.eos_token_ids, *tokenizer("\n").input_ids[-1:]],
    )  # fmt: skip
    number = int(store.source_row[0])
    words = plain(target, [opened], how, seeds=[answer_seed(0, number, 1.3, 0)]).tokens[0]
    assert tokenizer.decode(words[:-1]).strip() in tokenizer.decode(store.rows([0]).ids(0))


def test_batches_and_resume_change_nothing_and_everything_is_counted(target, tmp_path):
    whole = built(target, tmp_path / "a")
    other = built(target, tmp_path / "b", batch_size=1)
    assert whole.digest == other.digest
    counts, gone = whole.counts, left_out(whole)
    assert counts["rows"] + counts["skipped"] == 12 and counts["skipped"] == len(gone)
    assert set(gone) | set(whole.source_row.tolist()) == set(range(12))
    assert any("not ended within" in why for why in gone.values())

    class Stopped(Exception):
        pass

    def stop_at_second(index, *rest, write):
        if index == 1:
            raise Stopped
        write(index, *rest)

    from redrafter.data import store as store_module

    write = store_module.Job.write
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(store_module.Job, "write", lambda self, index, *rest: stop_at_second(
            index, *rest, write=lambda *a: write(self, *a)))  # fmt: skip
        built(target, tmp_path / "c")
    assert built(target, tmp_path / "c").digest == whole.digest


def test_short_and_repeated_ones_are_left_out_by_name(target, tmp_path, monkeypatch):
    from redrafter.data import instructions

    words = [target.tokenizer.encode(text, add_special_tokens=False) for text in
             ("import os", "import os", "x")]  # fmt: skip

    def said(target, rows, how, **options):
        made = plain(target, rows, GenerationConfig(max_new_tokens=1))
        ends = [[*w, how.eos_token_id[0]] for w in words]
        made.tokens = ends
        return made

    monkeypatch.setattr(instructions, "refilled", said)
    store = built(target, tmp_path, n=3, min_words=2)
    assert left_out(store) == {1: "duplicate", 2: "shorter than 2 words"}
    assert store.n_rows == 1


KINDS = ["CHATML", "LLAMA3", "GEMMA", "MISTRAL", "PHI", "QWEN3", "R1", "NEMOTRON", "GPT_OSS"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_words_stand_between_what_the_template_puts_around_them(kind):
    template = Template(tokenizer_of(getattr(chat_kinds, kind)))
    before, behind = around_user(template)
    said = "why is that so"
    messages = [{"role": "user", "content": said}]
    assert before + said + behind == template.render(messages, True, kind, None)


def test_a_model_without_a_chat_template_is_refused(target, tmp_path, tiny_target):
    bare = copy.copy(target)
    bare.tokenizer = copy.deepcopy(target.tokenizer)
    bare.tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"give a chat model, or read prompts .*prepare"):
        built(bare, tmp_path)


def test_the_command_says_what_it_made(tiny_target, tmp_path, capsys):
    argv = ["--target.path", str(tiny_target), "--n", "12", "--max_new_tokens", "60",
            "--min_words", "1", "--temperature", "1.3",
            "--output_dir", str(tmp_path / "p")]  # fmt: skip
    assert command(argv) == 0
    assert "12 given = " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command([*argv, "--temperature", "0"])
    assert "above 0, or all instructions are one" in capsys.readouterr().err
