"""scripts/make_tiny_target.py, run as users run it, at `--size test`."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_tiny_target.py"
STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


def run(*args: object, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def loaded(tiny_target):
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()
    return model, AutoTokenizer.from_pretrained(tiny_target)


def test_is_an_ordinary_folder(loaded):
    model, tokenizer = loaded
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (0, 0, 1)
    assert model.generation_config.eos_token_id == 0
    assert model.dtype == torch.float32
    code = "def f(x):\n    return {'ä': x}  # \t€\n"
    ids = tokenizer(code).input_ids
    assert ids[0] == 0 and tokenizer.decode(ids[1:]) == code
    assert len(tokenizer) == model.config.vocab_size


def test_chat_template_marks_the_answer(loaded):
    _, tokenizer = loaded
    messages = [
        {"role": "user", "content": "add one"},
        {"role": "assistant", "content": "x += 1"},
        {"role": "user", "content": "and again"},
        {"role": "assistant", "content": "x += 2"},
    ]
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = out["input_ids"], out["assistant_masks"]
    answer = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert answer == "x += 1<|endoftext|>x += 2<|endoftext|>"
    assert ids[0] == 0 and ids.count(0) == 3


def test_beats_unigrams_on_files_it_never_saw(loaded, tiny_target):
    model, tokenizer = loaded
    rows = texts(tiny_target / "prompts_heldout.jsonl")[:64]
    ids = [tokenizer(row).input_ids for row in rows]
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(
                model(input_ids=torch.tensor([row])).logits[0, :-1],
                torch.tensor(row[1:]),
                reduction="sum",
            ).item()
            for row in ids
        ]
    tokens = [token for row in ids for token in row[1:]]
    entropy = -sum(n * math.log(n / len(tokens)) for n in Counter(tokens).values()) / len(tokens)
    # The entropy of these very tokens: a unigram model fitted elsewhere would do worse.
    assert sum(losses) / len(tokens) < entropy - 0.3


def test_prompt_files_share_no_source_file(tiny_target):
    manifest = json.loads((tiny_target / "tiny_target.json").read_text())
    train, heldout = (set(manifest["files"][split]) for split in ("train", "heldout"))
    assert train and heldout and not train & heldout
    root = Path(sysconfig.get_paths()["stdlib"])
    assert all((root / name).is_file() for name in train | heldout)
    rows, prompts = (texts(tiny_target / f"prompts_{s}.jsonl") for s in ("train", "heldout"))
    assert len(rows) >= 100 and len(prompts) >= 64
    # Checked on the text too: nothing held out may be read off the training rows.
    seen = "".join(rows)
    assert not [prompt for prompt in prompts if prompt in seen]


def test_same_again_is_a_no_op(tiny_target):
    before = {path.name: path.stat().st_mtime_ns for path in tiny_target.iterdir()}
    done = run("--size", "test", "--output_dir", tiny_target)
    assert done.returncode == 0 and "nothing to do" in done.stdout
    assert {path.name: path.stat().st_mtime_ns for path in tiny_target.iterdir()} == before


def test_prompts_go_elsewhere_without_training_again(tiny_target, tmp_path):
    done = run("--size", "test", "--output_dir", tiny_target, "--prompts", tmp_path / "p")
    assert done.returncode == 0 and "training" not in done.stderr
    for name in ("prompts_train.jsonl", "prompts_heldout.jsonl"):
        assert (tmp_path / "p" / name).read_bytes() == (tiny_target / name).read_bytes()


def test_leaves_other_folders_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    done = run("--size", "test", "--output_dir", tmp_path)
    assert done.returncode == 1 and "was not made by this script" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_says_so_when_there_are_no_sources(tmp_path):
    code = (
        "import runpy, sys, sysconfig\n"
        f"sysconfig.get_paths = lambda: {{'stdlib': {str(tmp_path / 'none')!r}}}\n"
        f"sys.argv = ['x', '--size', 'test', '--output_dir', {str(tmp_path / 'out')!r}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "the standard library" in done.stderr
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- word problems


@pytest.fixture
def corpus(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from tiny_corpora import made_up

    return made_up(150_000, seed=0)


def test_word_problems_are_solved_right(corpus):
    rows = [*corpus.prompts["train"], *corpus.prompts["heldout"]]
    lengths = set()
    for row in rows:
        numbers = [int(n) for n in re.findall(r"\d+", row["question"])]
        steps = [(int(a), sign, int(b), int(c)) for a, sign, b, c in STEP.findall(row["answer"])]
        lengths.add(len(steps))
        assert [b for _, _, b, _ in steps] == numbers[1:] and steps[0][0] == numbers[0]
        for (_, _, _, before), (after, *_) in itertools.pairwise(steps):
            assert before == after
        assert all(c == a + (b if sign == "+" else -b) > 0 for a, sign, b, c in steps), row
        assert int(re.findall(r"\d+", row["answer"])[-1]) == steps[-1][-1]
    assert lengths == {2, 3}
    questions = [{row["question"] for row in rows} for rows in corpus.prompts.values()]
    assert len(set.union(*questions)) == len(rows), "what is held out is nowhere else"
    assert min(map(len, questions)) > 20


def test_a_word_problem_is_taught_as_the_template_asks_it(corpus, loaded):
    """A row of training is texts one behind the other; BOS, which is EOS, stands before each."""
    from make_tiny_target import packed_rows

    tokenizer = loaded[1]
    texts, rows = corpus.texts["train"], corpus.prompts["train"]
    (packed, *_) = packed_rows(tokenizer, texts, 256).tolist()
    messages = [{"role": "user", "content": rows[0]["question"]},
                {"role": "assistant", "content": rows[0]["answer"]}]  # fmt: skip
    asked = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert len(packed) == 256 and packed[: len(asked)] == asked
