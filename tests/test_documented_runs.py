"""The lines of README and docs, run to their end in the order in which a reader meets them, beside
what the quickstart makes: MODEL, PROMPTS.jsonl and HEAD are its. Only how much is done is less."""

import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from test_documented_lines import DOCUMENTS, ROOT, shown, start_of

from redrafter.heads.recurrent import RecurrentHead
from redrafter.targets.load import load_target

#: what stands for something of the reader's -> what the quickstart has made of that kind
OURS = {
    "MODEL": "quickstart/target", "PROMPTS.jsonl": "quickstart/target/prompts_train.jsonl",
    "HELDOUT.jsonl": "quickstart/target/prompts_heldout.jsonl", "HEAD": "quickstart/head",
    "USER/NAME": "runs/head",
}  # fmt: skip
#: module of redrafter.cli -> options that make its work small
SMALL = {
    "train_redrafter": "--optim.steps=2 --optim.batch_positions=32 --optim.depth=2 "
    "--eval.prompts=2 --eval.max_new_tokens=8",
    "prepare": "--source.n_rows=12",
    "answers": "--answers.max_new_tokens=12",
    "lossless": "--n_prompts=2 --max_new_tokens=8 --batch_sizes=2",
    "speed": "--n_prompts=2 --max_new_tokens=8 --cost_rounds=1",
    "costs": "--rounds=1 --contexts=16 --batch_sizes=1 --new_tokens=1,9,33",
    "report": "--n_prompts=1 --max_new_tokens=8",
    "table": "--n_prompts=2 --max_new_tokens=8 --cost_rounds=1 --temperatures=[0.0]",
    "lookahead_records": "--n_prompts=4 --skip_rows=2 --max_new_tokens=8",
    "train_disco": "--validation_prompts=2 --epochs=1 --rollouts=1 --hidden=4",
}
#: training from a source, not from stores
SOURCE = "--data.source.n_rows=12 --data.source.holdout_rows=4 --data.answers.max_new_tokens=8"
#: lines that end elsewhere -> why they do
ELSEWHERE = {
    "--repo USER/NAME$": "it publishes: test_push does that, on a Hub of its own",
    r"TARGET|smollm2|configs/plan": "it needs a target that is no part of a clone",
    "configs/eval/lookahead.yaml": "it needs data that is no part of a clone",
    "vllm-serve": "test_documented_lines runs it",
    r"--answers\.server": "it needs a server: test_served_answers has one",
    "vllm-medusa": "it needs a head of another kind: scripts/test_vllm.sh has one",
    "PREPARED": "it needs a folder of speculators: test_speculators has one",
    "redrafter doctor": "test_doctor runs it",
    "redrafter chat": "it waits for a question: test_chat_command asks some",
    "eval/stream": "test_learning runs it",
}


@pytest.fixture
def clone(tiny_target, tmp_path, monkeypatch) -> Path:
    """A working directory as the quickstart leaves it; the head knows nothing."""
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart/target").symlink_to(tiny_target)
    head = RecurrentHead.for_target(load_target(str(tiny_target)))
    head.save_pretrained(tmp_path / "quickstart/head")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reason_not_to(words: list[str]) -> str | None:
    line = " ".join(words)
    return next((why for what, why in ELSEWHERE.items() if re.search(what, line)), None)


def run_line(words: list[str]) -> None:
    module, given = start_of(words)
    for name, ours in OURS.items():
        given = [re.sub(rf"\b{re.escape(name)}\b", ours, word) for word in given]
    given = [path for word in given for path in globbed(word)]
    small = SMALL.get(module, "").split()
    if "--data.source.path" in given:
        small += SOURCE.split()
    assert not import_module(f"redrafter.cli.{module}").main([*given, *small]), " ".join(words)
    for option in ("--out", "--output_dir"):
        if option in given:
            assert Path(given[given.index(option) + 1]).exists(), " ".join(words)


def globbed(word: str) -> list[str]:
    """As a shell does it."""
    return sorted(map(str, Path().glob(word))) or [word] if "*" in word else [word]


LINES = {
    path.name: [words for words in shown(path) if start_of(words) is not None] for path in DOCUMENTS
}


#: documents, each read after the one before it -> how many of their lines are run, at least
RUN = {
    ("README.md",): 5, ("start.md", "publish.md"): 8, ("data.md",): 5, ("lookaheads.md",): 4
}  # fmt: skip
READ = {document for documents in RUN for document in documents}


@pytest.mark.parametrize(("documents", "least"), RUN.items(), ids=lambda x: str(x))
def test_the_lines_of_a_document_run_to_their_end(documents, least, clone):
    lines = [words for document in documents for words in LINES[document]]
    lines = [words for words in lines if reason_not_to(words) is None]
    assert len(lines) >= least
    for words in lines:
        if any("more/states" in word for word in words):
            shutil.copytree("runs/states", "more/states")
        run_line(words)
    if {"README.md", "publish.md"} & set(documents):
        card = Path("runs/head/card/README.md").read_text()
        assert "Nothing was measured" not in card
        assert "lossless.json" in card and "speed.json" in card


def test_only_lines_that_need_more_than_a_clone_are_left_out():
    for document, lines in LINES.items():
        for words in lines:
            assert document in READ or reason_not_to(words)
