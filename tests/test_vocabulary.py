"""A token that was added to the tokenizer without resizing the model."""

import json
import re
import shutil

import pytest
from transformers import AutoTokenizer

from redrafter.cli.prepare import main as prepare
from redrafter.config import AnswersConfig, SourceConfig, StatesConfig
from redrafter.contracts import InputError
from redrafter.data.answers import build_answers
from redrafter.data.build_rows import build_rows
from redrafter.data.prompts import load_prompts
from redrafter.data.states import build_states
from redrafter.targets.load import load_target


@pytest.fixture(scope="module")
def folder(tiny_target, tmp_path_factory):
    """The target with one token more in its tokenizer than rows in its matrices."""
    folder = tmp_path_factory.mktemp("added") / "target"
    shutil.copytree(tiny_target, folder, ignore=shutil.ignore_patterns("*.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = load_target(str(tiny_target))
    tokenizer.add_tokens([f"<filler{i}>" for i in range(target.vocab_size - len(tokenizer))])
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def target(folder):
    return load_target(str(folder))


@pytest.fixture
def source(tmp_path):
    """Row 1 has the token."""
    rows = ["import os\nimport sys\n", "import <tool>\nimport os\n", "a = 1\nb = 2\n"]
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return SourceConfig(str(path), format="text", text_prompt_tokens=6)


@pytest.fixture
def named(target):
    """The row, the token, and both sizes; and what to do."""
    size = target.vocab_size
    return (
        rf"s\.jsonl.*'<tool>' has id {size} of {size + 1} in the tokenizer, the target's lm_head "
        rf"has {size} rows.*resize_token_embeddings"
    )


@pytest.mark.parametrize("keep", ["prompts", "texts"])
def test_prepare_refuses_it(folder, source, named, tmp_path, capsys, keep):
    out = tmp_path / "out"
    given = {"target.path": folder, "source.path": source.path, "source.format": "text",
             "source.text_prompt_tokens": 6, "keep": keep, "output_dir": out}  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in given.items()]
    with pytest.raises(SystemExit):
        prepare(arguments)
    assert re.search(named, " ".join(capsys.readouterr().err.split()))
    assert not list(out.glob("shard-*"))
    assert prepare([*arguments, "--source.max_failed_rows=1"]) == 0
    assert "2 written + 0 skipped + 1 failed" in capsys.readouterr().out


def test_every_way_in_refuses_it(target, source, named, tmp_path):
    with pytest.raises(InputError, match=named):
        build_rows(source, target.tokenizer, "prompts", tmp_path / "p",
                   vocab_size=target.vocab_size, progress=False)  # fmt: skip
    with pytest.raises(InputError, match=named):
        load_prompts(source.path, target.tokenizer, "text", vocab_size=target.vocab_size)
    # A store of somebody who knew no sizes: named by its own row, before anything is made.
    rows = {
        keep: build_rows(source, target.tokenizer, keep, tmp_path / keep, progress=False)
        for keep in ("prompts", "texts")
    }
    unknown = rf"row 1 \(row 1 of the source\): token '<tool>' has id {target.vocab_size}"
    with pytest.raises(InputError, match=unknown):
        build_answers(target, rows["prompts"], AnswersConfig(), tmp_path / "a", progress=False)
    with pytest.raises(InputError, match=unknown):
        build_states(target, rows["texts"], StatesConfig(), tmp_path / "t", progress=False)
    for made in ("a", "t"):
        assert [path.name for path in (tmp_path / made).iterdir()] == ["job.json"]
