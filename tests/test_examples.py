"""The head that ships is whole, small, and says what it was made from; the programs run."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from redrafter import generate
from redrafter.cli.main import main
from redrafter.config import TargetConfig
from redrafter.export.golden import file_faults, read_golden
from redrafter.heads.load import load_head
from redrafter.targets.load import load_target

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HEAD = EXAMPLES / "smollm2-135m" / "head"


def module_of(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shell(
    name: str, *words: object, first: Path = Path(sys.executable).parent
) -> subprocess.CompletedProcess:
    """A script, with the commands of a folder: this environment's own."""
    path = f"{first}{os.pathsep}{os.environ['PATH']}"
    root = str(EXAMPLES.parent)
    return subprocess.run(
        ["bash", EXAMPLES / name, *map(str, words)], capture_output=True, text=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": root},
    )  # fmt: skip


def test_the_shipped_head_is_what_was_exported():
    assert not file_faults(HEAD, read_golden(HEAD).facts)
    head = load_head(HEAD)
    assert head.config.target_fingerprint and head.config.trained_depth == 4
    assert head.draft_vocab_size == 6144
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    assert sum(f.stat().st_size for f in HEAD.rglob("*") if f.is_file()) < 5_000_000


def test_it_says_what_it_was_trained_on_and_how():
    facts = json.loads((HEAD / "provenance.json").read_text())["converted_from"]["provenance"]
    config = facts["config"]
    assert config["head"]["draft_vocab_size"] == 6144 and config["optim"]["steps"] == 6000
    assert any("self" in store for store in config["data"]["stores"])


@pytest.mark.parametrize("acceptance", ["copied", "all", "some", "none"])
def test_the_teaching_loop_gives_the_librarys_tokens(acceptance, tiny_target):
    """In float64, with every length of an accepted draft from none to all."""
    loop = module_of("teaching_loop")
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float64)
    target = load_target(TargetConfig(path=str(tiny_target), dtype="float64"))
    for text in ("# Anna has 24 books. Anna has", "Ben 3"):
        ids = target.tokenizer(text).input_ids
        for n in (1, 2, 30):
            wanted = generate(target, [ids], max_new_tokens=n).tokens[0]
            known = [*ids, *wanted]

            def draft(so_far, known=known):
                """The truth, wrong from a place on that moves along."""
                guess = known[len(so_far) : len(so_far) + 4]
                right = {"all": 4, "some": len(so_far) % 5, "none": 0}[acceptance]
                return [*guess[:right], *[(t + 1) % target.vocab_size for t in guess[right:]]]

            given = {} if acceptance == "copied" else {"draft": draft}
            tokens, steps = loop.speculate(model, ids, n, **given)
            assert tokens == wanted
            if acceptance == "none":
                assert steps == len(wanted)
            if acceptance == "all":
                assert steps == -(-len(wanted) // 5)


def test_the_chat_says_what_was_accepted(published_run, tiny_target, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Anna has 3 cards.\nBen has 4.\n"))
    module_of("chat").main(str(tiny_target), str(published_run), "head:2x2", 24)
    said = capsys.readouterr().out
    assert said.count(" tokens, ") == 2 and said.count("by depth ") == 2
    target = load_target(str(tiny_target))
    first = [{"role": "user", "content": "Anna has 3 cards."}]
    assert generate(target, messages=first, max_new_tokens=24).extra["texts"][0] in said


def lines_of(folder: Path, name: str, *words: object) -> list[list[str]]:
    """What a script asks `redrafter` for, kept by what stands for the command: a process that
    imports the library costs seconds, and that the command is one, other tests say."""
    kept = folder / "redrafter"
    kept.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {folder}/lines\n')
    kept.chmod(0o755)
    done = shell(name, *words, first=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split(" ") for line in (folder / "lines").read_text().splitlines()]


def test_own_prompts_are_evaluated(run, tiny_target, tmp_path):
    """The script's own lines."""
    for name in ("lossless.json", "speed.json"):
        (run / name).unlink()
    prompts = tiny_target / "prompts_heldout.jsonl"
    given = (tiny_target, run, prompts, 2, 8, "--cost_rounds=1")
    for command, *words in lines_of(tmp_path, "evaluate_own_prompts.sh", *given):
        assert not import_module(f"redrafter.cli.{command}").main(words)
    for name in ("lossless.json", "speed.json", "report.html"):
        assert (run / name).is_file()
    assert "redrafter speed" not in (run / "report.html").read_text(), "it was measured"


def test_what_would_be_served_is_said(published_run, tiny_target, tmp_path, capsys):
    (words,) = lines_of(tmp_path, "serve_vllm.sh", tiny_target, published_run, "--dry-run")
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "vllm" in said and str(tiny_target) in said and str(published_run) in said
    for script in ("serve_vllm.sh", "evaluate_own_prompts.sh"):
        assert shell(script).returncode == 2 and "MODEL HEAD" in shell(script).stderr


@pytest.mark.slow
def test_the_notebook_runs(tiny_target, tmp_path):
    """Cell by cell, at toy size: what its first cell says is said otherwise."""
    text = (EXAMPLES / "train_own.ipynb").read_text(encoding="utf-8")
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert not [c for c in cells if c["outputs"]], "committed without what it printed"
    first, *others = ["".join(c["source"]) for c in cells]
    names: dict = {}
    exec(first, names)
    out = tmp_path / "head"
    toy = {
        "MODEL": str(tiny_target), "PROMPTS": str(tiny_target / "prompts_train.jsonl"),
        "OUT": str(out), "MEASURE": ["--n_prompts=2", "--max_new_tokens=8"],
        "TRAIN": ["--data.source.n_rows=8", "--data.answers.max_new_tokens=8", "--optim.steps=2",
                  "--optim.batch_positions=8", "--optim.depth=2", "--eval.prompts=0"],
    }  # fmt: skip
    assert set(toy) == {name for name in names if name.isupper()}
    names |= toy
    for cell in others:
        exec(cell.replace("speed([*given,", "speed([*given, '--cost_rounds=1',"), names)
    for name in ("model.safetensors", "rows.html", "lossless.json", "speed.json", "report.html"):
        assert (out / name).is_file()
