"""Losses against the target's distribution: from stored states, or from its stored best tokens."""

import pytest
import safetensors.torch
import torch

from redrafter.cli.args import parse
from redrafter.config import TargetConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.targets.load import load_model_config
from redrafter.training.loop import train
from redrafter.training.losses import top_k_log_p


def test_the_rest_is_spread_evenly():
    log_p = torch.tensor([[0.5, 0.2, 0.1]]).log()
    got = top_k_log_p(torch.tensor([[3, 0, 4]]), log_p, 6).exp()
    torch.testing.assert_close(got, torch.tensor([[0.2, 0.2 / 3, 0.2 / 3, 0.5, 0.1, 0.2 / 3]]))
    whole = torch.randn(4, 7, dtype=torch.float64).log_softmax(-1)
    best = whole.topk(7)
    torch.testing.assert_close(top_k_log_p(best.indices, best.values, 7), whole)


@pytest.fixture
def trained(tiny_target, tmp_path):
    """trained(name, **changes) -> weights after a short run with a KL loss."""

    def run(name, **changes):
        given = {
            "target.path": tiny_target, "output_dir": tmp_path / name,
            "data.source.path": tiny_target / "prompts_train.jsonl", "data.source.n_rows": 6,
            "data.source.format": "text", "data.answers.max_new_tokens": 16,
            "data.folder": tmp_path / "data", "optim.steps": 8, "optim.batch_positions": 32,
            "optim.warmup_steps": 1, "eval.prompts": 0, "tracker": "null",
            "loss.cross_entropy": 0.5, "loss.kl": 0.5, **changes,
        }  # fmt: skip
        train(parse(TrainConfig, [f"--{k}={v}" for k, v in given.items()], "test"))
        return safetensors.torch.load_file(tmp_path / name / "model.safetensors")

    return run


def test_all_tokens_stored_are_the_states(trained, tiny_target, tmp_path):
    """With k = V nothing is left out, so both ways must train the same head; with k = 4 not."""
    vocab = load_model_config(TargetConfig(str(tiny_target))).vocab_size
    states = trained("states")
    whole = trained(
        "whole", **{"loss.teacher": "top_k", "data.states.teacher_top_k": vocab}
    )
    few = trained("few", **{"loss.teacher": "top_k", "data.states.teacher_top_k": 4})
    for name, one in states.items():
        torch.testing.assert_close(whole[name], one, atol=1e-5, rtol=0)
    assert max((few[n] - one).abs().max() for n, one in states.items()) > 1e-4
    with pytest.raises(InputError, match="labels local has no predictions"):
        trained("local", **{"data.labels": "local"})
    with pytest.raises(InputError, match=r"teacher top_k needs data\.states\.teacher_top_k"):
        trained("none", **{"loss.teacher": "top_k"})
    plain = next(
        s for s in (tmp_path / "data").glob("states-*")
        if '"teacher_top_k": null' in (s / "job.json").read_text()
    )  # fmt: skip
    with pytest.raises(InputError, match="holds no probable tokens of the target"):
        trained("bare", **{"loss.teacher": "top_k", "data.stores": f'["{plain}"]'})
