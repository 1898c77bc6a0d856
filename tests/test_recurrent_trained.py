"""A head for a target with recurrent layers: trained, exported, verified, run by transformers."""

import shutil
from pathlib import Path

import pytest
import torch
from families import build
from test_kinds_trained import CHANGES
from test_training import SETTINGS
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from redrafter.cli.args import parse
from redrafter.cli.verify import main as verify
from redrafter.config import TrainConfig
from redrafter.contracts import InputError
from redrafter.data.local import continue_greedily
from redrafter.decode.plain import plain
from redrafter.decode.refill import refilled
from redrafter.targets.load import load_target
from redrafter.targets.model import Target
from redrafter.training.loop import Training

FAMILY = "qwen3_next"


@pytest.fixture(scope="module")
def hybrid(tiny_target, tmp_path_factory) -> Path:
    """A hybrid of random weights that has the tiny target's tokenizer and prompts."""
    folder = tmp_path_factory.mktemp("hybrid") / "target"
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    model = build(FAMILY, vocab_size=len(tokenizer), max_position_embeddings=256).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in tiny_target.glob("prompts*.jsonl"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def head(hybrid, tmp_path_factory) -> Path:
    """Answers, states, training, the exported head with its figures."""
    base = tmp_path_factory.mktemp("run")
    given = {
        "target.path": hybrid, "output_dir": base / "head", "data.folder": base / "data",
        "data.source.path": hybrid / "prompts_train.jsonl", **SETTINGS, **CHANGES,
    }  # fmt: skip
    Training(parse(TrainConfig, [f"--{k}={v}" for k, v in given.items()], "test")).train()
    return base / "head"


def test_a_trained_head_does_in_another_process_what_it_did(head, hybrid, capsys):
    assert verify([str(head), "--target.path", str(hybrid)]) == 0, capsys.readouterr().out


def test_transformers_alone_runs_it(head, hybrid):
    model = AutoModelForCausalLM.from_pretrained(hybrid, dtype=torch.float32)
    ids = torch.tensor([[3, 7, 11, 5, 9, 4]])
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    stock = model.generate(ids, **options)
    ours = model.generate(ids, custom_generate=str(head), trust_remote_code=True, **options)
    assert ours.tolist() == stock.tolist()


def test_a_batch_kept_full_says_what_plain_says(hybrid):
    """Rows with states go a batch at a time; the texts, the ends and the counts are plain's."""
    target, ended = load_target(str(hybrid)), []
    rows = [[3, 5, 9], [4], [8, 8, 3, 7, 9, 11], [6, 5]]
    how = GenerationConfig(max_new_tokens=6, eos_token_id=-1, do_sample=True)
    made = refilled(target, rows, how, slots=2, seeds=[1, 2, 3, 4], ended=ended.append)
    alone = [plain(target, [row], how, seeds=[i]) for i, row in enumerate(rows, start=1)]
    assert made.tokens == [one.tokens[0] for one in alone]
    assert made.stats.emitted == [one.stats.emitted[0] for one in alone]
    assert sorted(ended) == [0, 1, 2, 3] and ended[0] == 2
    with pytest.raises(InputError, match="seeds"):
        refilled(target, rows, how, slots=2, seeds=[1, 2])


def test_labels_that_need_many_chains_at_once_are_refused():
    target = Target(build(FAMILY))
    rows, wanted = [[9, 10, 11, 12]], [[True] * 4]
    said = continue_greedily(target, rows, wanted, n=1, max_nodes=2)[0]
    own = target.model(input_ids=torch.tensor(rows)).logits[0].argmax(-1)
    assert said[:, 0].tolist() == own.tolist()
    with pytest.raises(InputError, match=r"data\.labels local"):
        continue_greedily(target, rows, wanted, n=2)
