"""Values out of range, and settings that do not go together, are refused before any work."""

import pytest

from redrafter.cli.args import parse
from redrafter.config import (
    AnswersConfig,
    ImportSpeculatorsConfig,
    MakeAnswersConfig,
    MakeStatesConfig,
    OptimConfig,
    RequestsConfig,
    SourceConfig,
    StatesConfig,
    TrainConfig,
    TrainEvalConfig,
)
from redrafter.contracts import InputError
from redrafter.training import loop

#: of fields without a default
_NEEDED = {ImportSpeculatorsConfig: {"target": None, "folder": "f", "output_dir": "o"}}


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        (AnswersConfig, "batch_size", 0), (AnswersConfig, "shard_prompts", 0),
        (AnswersConfig, "samples_per_prompt", 0), (AnswersConfig, "max_new_tokens", -1),
        (AnswersConfig, "temperatures", ()), (AnswersConfig, "temperatures", (1.0, -0.5)),
        (StatesConfig, "teacher_top_k", 0), (StatesConfig, "forward_tokens", 0),
        (RequestsConfig, "at_once", 0), (RequestsConfig, "retries", -1),
        (RequestsConfig, "timeout_s", 0.0), (RequestsConfig, "timeout_s", float("nan")),
        (RequestsConfig, "check_prompts", -1), (ImportSpeculatorsConfig, "check_rows", -1),
        (OptimConfig, "depth", 0), (OptimConfig, "steps", 0), (OptimConfig, "accumulation", 0),
        (TrainEvalConfig, "every_steps", 0), (TrainEvalConfig, "temperatures", ()),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(section, name, value):
    with pytest.raises(ValueError, match=rf"{name}: .* must be"):
        section(**{**_NEEDED.get(section, {}), name: value})


def test_the_smallest_values_are_taken():
    AnswersConfig((0.0,), 1, 1, 1, 1)
    StatesConfig(max_bytes=None, shard_bytes=1, forward_tokens=1, teacher_top_k=None)
    SourceConfig("x", text_prompt_tokens=0)
    TrainEvalConfig(prompts=0)


@pytest.mark.parametrize(
    ("config", "argv", "said"),
    [
        (MakeAnswersConfig, ["--prompts=p", "--answers.batch_size=0"], "batch_size: 0 must be"),
        (MakeStatesConfig, ["--rows=r", "--continuation=-1"], "continuation: -1 must be"),
        (TrainConfig, ["--data.source.path=x", "--data.source.text_prompt_tokens=-2"],
         "text_prompt_tokens: -2 must be"),
    ],
)  # fmt: skip
def test_commands_end_with_the_message(config, argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(config, ["--target.path=m", "--output_dir=o", *argv], "test")
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval.prompts": 2}, "no held-out prompts to measure on"),
        ({"head.init_from": "nothing"}, "head.init_from: 'nothing' does not exist"),
        ({"loss.kl": 1.0, "loss.teacher": "top_k"}, "needs data.states.teacher_top_k"),
    ],
)
def test_training_refuses_before_the_data_is_made(
    changes, said, tiny_target, tmp_path, monkeypatch
):
    def made(*_):
        raise AssertionError("the data was made first, which may take days")

    monkeypatch.setattr(loop, "load_training_data", made)
    given = {
        "target.path": tiny_target, "output_dir": tmp_path / "out", "tracker": "null",
        "data.source.path": tiny_target / "prompts_train.jsonl", "eval.prompts": 0, **changes,
    }  # fmt: skip
    config = parse(TrainConfig, [f"--{k}={v}" for k, v in given.items()], "test")
    with pytest.raises(InputError, match=said):
        loop.Training(config)
    assert not (tmp_path / "out" / "data").exists()
