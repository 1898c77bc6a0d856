"""What a new user meets first: help and refusals at once, in few lines, and logs to be read."""

import io
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from accelerate.utils import LoggerType

from redrafter import __version__, processes
from redrafter.bars import Bar
from redrafter.cli import given
from redrafter.cli.args import parse, reports_input_errors
from redrafter.cli.main import SUBCOMMANDS
from redrafter.cli.main import main as console
from redrafter.cli.push import folded
from redrafter.cli.speed import main as speed
from redrafter.cli.train_redrafter import summary
from redrafter.config import (
    DataConfig,
    MakeStatesConfig,
    SpeedConfig,
    TableConfig,
    TargetConfig,
    TrainConfig,
)
from redrafter.contracts import InputError
from redrafter.training.refusals import TRACKERS, check_tracker

ROOT = Path(__file__).resolve().parent.parent
_ALONE = """\
import sys
from redrafter.cli.{command} import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("status", end.code, *{{"torch", "transformers", "accelerate"}} & set(sys.modules))
"""


def at_once(command: str, *argv: str) -> tuple[str, str]:
    """(stdout, stderr) of a command that must end before anything heavy is imported."""
    done = subprocess.run(
        [sys.executable, "-c", _ALONE.format(command=command), *map(str, argv)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    *said, status = done.stdout.splitlines()
    assert status in ("status 0", "status 2"), done.stdout + done.stderr
    return "\n".join(said), done.stderr


# ------------------------------------------------------------------------------------ at once


_HELP = """\
import contextlib, importlib, io, sys
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        importlib.import_module(f"redrafter.cli.{command}").main(["--help"])
    print(command, *{"torch", "transformers", "accelerate", "numpy"} & set(sys.modules))
"""


def test_help_waits_for_nothing_heavy():
    command = [sys.executable, "-c", _HELP, *SUBCOMMANDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == list(SUBCOMMANDS), done.stdout + done.stderr


def test_a_run_that_would_overwrite_another_is_refused_at_once(tmp_path):
    (tmp_path / "checkpoints/step-40").mkdir(parents=True)
    argv = ["--target.path", "x", "--output_dir", tmp_path, "--data.source.path", "y"]
    _, wrong = at_once("train_redrafter", *argv)
    assert wrong.startswith("error: ") and wrong.count("\n") == 1
    assert "checkpoints up to step 40: give --resume auto to go on" in wrong
    _, wrong = at_once("train_redrafter", *argv, "--resume", tmp_path / "nothing")
    assert "no state.json there" in wrong


def test_a_tracker_that_could_not_log_is_refused_at_once(tmp_path):
    argv = ["--target.path", "x", "--output_dir", tmp_path, "--data.source.path", "y", "--tracker"]
    _, wrong = at_once("train_redrafter", *argv, "tensorbord")
    assert "tracker: 'tensorbord' is unknown; did you mean tensorboard?" in wrong
    _, wrong = at_once("train_redrafter", *argv, "aim")
    assert "tracker: aim is not installed" in wrong and "pip install aim" in wrong


def test_trackers_are_those_that_accelerate_knows(tmp_path, monkeypatch):
    assert set(TRACKERS) == {str(kind.value) for kind in LoggerType} - {"all"}
    for name in (None, "all", "tensorboard"):
        check_tracker(name)
    (tmp_path / "aim").mkdir()  # as a tracker leaves its logs, and no package of it
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="not installed"):
        check_tracker("aim")


# ------------------------------------------------------------------------------------ in few lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--warm_up", "3"], "unrecognized arguments: --warm_up 3"),
        (["--targt.path", "x"], "did you mean --target.path?"),
        (["--repeats", "many"], "error: repeats: expected int, not many"),
        (["--target.dtype", "half"], "error: target.dtype: expected one of 'auto', "),
        (["--threads", "two"], "error: threads: expected one of int, null, not two"),
        ([], "arguments are required: target.path"),
    ],
)
def test_a_wrong_option_is_one_message_without_eighty_lines_of_usage(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(SpeedConfig, words, "eval/speed.py")
    wrong = capsys.readouterr().err
    assert ended.value.code == 2 and said in wrong
    assert wrong.count("\n") <= 3 and "eval/speed.py --help" in wrong


def test_a_wrong_key_names_its_file_and_the_key_that_was_meant(tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: {stepz: 3}\n")
    (tmp_path / "torn.yaml").write_text("optim: {steps: 3\n")
    argv = ["--target.path", "x", "--output_dir", tmp_path / "out"]
    _, wrong = at_once("train_redrafter", *argv, "--config", tmp_path / "mine.yaml")
    assert "mine.yaml; did you mean --optim.steps?" in wrong and wrong.count("\n") == 1
    _, wrong = at_once("train_redrafter", *argv, "--config", tmp_path / "torn.yaml")
    assert "torn.yaml is no YAML (" in wrong and wrong.count("\n") == 1
    _, wrong = at_once("train_redrafter", *argv, "--data.source.format", "autos")
    assert wrong.startswith("error: data.source.format: expected one of 'auto', ")
    _, wrong = at_once("train_redrafter", *argv, "--data.source.pth", "x")
    assert wrong.startswith("error: Option 'data.source.pth' is not accepted; did you mean --data.")
    _, wrong = at_once("speed", "--target.path", "x", "--allow_other_target", "perhaps")
    assert "allow_other_target: expected one of bool, 'merged', not perhaps" in wrong


def test_a_file_that_is_not_there_is_refused_at_once_with_one_like_it(tmp_path):
    (tmp_path / "stories.jsonl").touch()
    argv = ["--target.path", "x", "--prompts", tmp_path / "storys.jsonl"]
    _, wrong = at_once("speed", *argv)
    assert wrong.startswith("error: prompts: ") and wrong.count("\n") == 1
    assert f"did you mean {tmp_path / 'stories.jsonl'}?" in wrong


def test_places_are_found_wherever_a_configuration_names_them():
    config = TableConfig(TargetConfig("t"), sets={"a": "x.jsonl"}, head="h", out="out.json")
    assert dict(given.places(config)) == {"target.path": "t", "sets.a": "x.jsonl", "head": "h"}


def test_a_hub_that_cannot_be_reached_is_said_once_and_its_cache_is_looked_in(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    given._unreachable.cache_clear()
    (tmp_path / "owner/model").mkdir(parents=True)
    given.settle_hub(SpeedConfig(TargetConfig("owner/model"), prompts="x.jsonl"))
    given.settle_hub(MakeStatesConfig(TargetConfig("owner/model"), rows="runs/none", output_dir=""))
    assert "HF_HUB_OFFLINE" not in os.environ, "nothing is asked of it"
    given.settle_hub(SpeedConfig(TargetConfig("owner/model"), prompts="x.jsonl", head="a/head"))
    wrong = capsys.readouterr().err
    assert "head: there is no folder a/head here, and the Hub cannot be reached (" in wrong
    assert os.environ["HF_HUB_OFFLINE"] == "1" and wrong.count("\n") == 1
    given._unreachable.cache_clear()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("spead", "redrafter speed"), ("check", "redrafter check-store"),
     ("data/probe.py", "redrafter probe-bigrams"), ("zzz", "")],
)  # fmt: skip
def test_a_subcommand_that_there_is_not_is_one_line(typed, meant, capsys):
    assert console([typed]) == 2
    wrong = capsys.readouterr().err
    assert wrong.count("\n") == 1 and f"no subcommand {typed!r}" in wrong
    assert (f"did you mean {meant}?" in wrong) if meant else ("did you mean" not in wrong)
    assert console(["--version"]) == 0 and __version__ in capsys.readouterr().out


_TOLD = """\
import contextlib, io, sys
from redrafter.cli.main import main
sys.argv[0] = "redrafter"
for command in sys.argv[1:]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"])
    print("===", command, out.getvalue(), sep="\\n")
"""


def test_help_is_two_screens_begins_with_a_line_to_copy_and_names_what_was_typed():
    names = [name for name in SUBCOMMANDS if name not in ("configs", "examples")]
    done = subprocess.run(
        [sys.executable, "-c", _TOLD, *names], cwd=ROOT, capture_output=True, text=True
    )
    told = dict(part.split("\n", 1) for part in done.stdout.split("===\n")[1:])
    assert list(told) == names, done.stderr
    for name, text in told.items():
        lines = text.splitlines()
        assert len(lines) <= 100, f"{name}: {len(lines)} lines"
        files = re.findall(r"(?<![\w/])(?:train|data|eval)/\w+\.py", text)
        assert not files, f"{name} names {files}, which a wheel does not have"
        command = f"redrafter {name.replace('_', '-')}"
        assert lines[0].startswith(f"usage: {command} "), lines[0]
        example = next((line for line in lines[1:] if line.strip().startswith(command)), "")
        assert example, f"{name} shows no line to copy"
        shown = set(re.findall(r"^  (?:-\w, )?(--[\w.-]+)", text, re.MULTILINE))
        for word in example.split():
            word = word[:2] + word[2:].replace("-", "_")
            known = any(f"{word}.".startswith(f"{option}.") for option in shown)
            assert known or not word.startswith("--"), f"{name} does not explain {word}"


def test_list_shows_every_name_that_a_method_may_have(capsys):
    from redrafter.drafters.build import DRAFTERS

    with pytest.raises(SystemExit) as ended:
        speed(["--list"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    found = set(re.findall(r"^  ([\w-]+)", shown, re.MULTILINE))
    assert set(DRAFTERS) | {"plain", "stock", "hf-assistant"} <= found


# ------------------------------------------------------------------------------------ logs


def lines(monkeypatch, terminal: bool) -> str:
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr("redrafter.bars._FIRST_S", 0.0)
    monkeypatch.setattr("redrafter.bars._LOG_S", 0.0)
    with Bar(total=3, desc="training", unit="step", mininterval=0) as bar:
        for step in range(3):
            bar.update()
            bar.set_postfix(loss=f"{step}.5", refresh=False)
    return out.getvalue()


def test_without_a_terminal_progress_is_whole_lines(monkeypatch):
    found = lines(monkeypatch, terminal=False)
    assert "\r" not in found and found.endswith("\n")
    assert re.fullmatch(r"training: 3 of 3 steps, .*, loss=2\.5", found.splitlines()[-1])
    assert all(line.startswith("training: ") for line in found.splitlines())
    assert "\r" in lines(monkeypatch, terminal=True)


def test_a_log_hears_soon_that_work_goes_on_and_then_seldom(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr("redrafter.bars._FIRST_S", 0.0)
    # Counted by tqdm's own loop, with a postfix at every step, which asks for a line each time.
    bar = Bar(range(9), desc="rows", unit="row")
    for row in bar:
        bar.set_postfix(loss=row)
    found = out.getvalue().splitlines()
    assert len(found) == 2 and found[1].startswith("rows: 9 of 9 rows, "), found
    out.truncate(0)
    with Bar(total=9, initial=9, desc="rows", unit="row"):
        pass
    assert not out.getvalue(), "nothing was left to do, and no rate is known"


def test_a_bar_that_need_not_stay_leaves_no_line_where_it_was_short(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    assert list(Bar(range(3), desc="prompts", unit="prompt", leave=False)) == [0, 1, 2]
    assert out.getvalue() == ""
    monkeypatch.setattr("redrafter.bars._FIRST_S", 0.0)
    monkeypatch.setattr("redrafter.bars._LOG_S", 0.0)
    assert list(Bar(range(3), desc="prompts", unit="prompt", leave=False, mininterval=0))
    assert out.getvalue().splitlines()[-1].startswith("prompts: 3 of 3 prompts, ")


def test_every_bar_is_ours():
    """Fragments in a log, or silence there, is what tqdm gives by itself."""
    for file in [*(ROOT / "redrafter").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        text = file.read_text()
        assert file.name == "bars.py" or not re.search(r"\btqdm\(", text), file


def test_bars_speak_only_when_they_are_asked_to(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with Bar(total=3, disable=True) as bar:
        bar.update()
    assert out.getvalue() == ""


def test_the_quickstarts_table_says_where_the_text_repeats_itself():
    def body(temperature, loops):
        method = {"tokens_per_step": 1.5, "speedup_plain": 1.2, "low": {"speedup_plain": 1.1},
                  "high": {"speedup_plain": 1.3}, "steps": 9}  # fmt: skip
        plain = {**method, "steps": None, "low": {}, "high": {}, "speedup_plain": 1.0}
        return {"methods": {"plain": plain, "head": method}, "temperature": temperature,
                "loop_share": loops}  # fmt: skip

    show = runpy.run_path(str(ROOT / "scripts/quickstart_table.py"))["show"]
    shown = show([body(0.0, 0.69), body(1.0, 0.02)])
    assert re.search(r"^head +1\.50 +1\.20x \[1\.10, 1\.30\] +1\.50 ", shown, re.MULTILINE)
    assert re.search(r"^plain +1\.00 +1\.00x +1\.00 ", shown, re.MULTILINE)
    assert re.search(r"^loops +0\.69 +0\.02", shown, re.MULTILINE)
    assert "At T 0 the target" in shown and "tokens per forward" in shown
    assert "repeats itself" not in show([body(0.0, 0.1), body(1.0, 0.02)])
    assert "At T 0 and 1 the" in show([body(0.0, 0.7), body(1.0, 0.5)])


def test_the_package_says_that_it_is_typed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (ROOT / "redrafter/py.typed").exists()
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["redrafter"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_log_has_no_bars_of_other_libraries(terminal, monkeypatch):
    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    out = io.StringIO()
    out.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", out)
    assert reports_input_errors(lambda argv: 0)([]) == 0
    assert (name in os.environ) != terminal


def test_deepspeed_need_not_say_what_it_found(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    processes._options(False, 1)
    assert "DS_ACCELERATOR" not in os.environ
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    processes._options(False, 1)
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_a_training_ends_with_a_sentence():
    config = TrainConfig(TargetConfig("x"), DataConfig(), output_dir="runs/head")
    assert summary(config, {"step": 7}) == (
        "runs/head holds the head of step 7; the curves: tensorboard --logdir runs/head/logs"
    )
    best = {"step": 7, "tokens_per_step": {"greedy": 2.345, "T=1": 2.0}}
    assert "makes 2.35 (greedy), 2.00 (T=1) tokens per step on 40 held-out" in summary(config, best)


def test_usage_says_what_was_typed(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        speed(["--help"])
    assert capsys.readouterr().out.startswith("usage: eval/speed.py ")
    monkeypatch.setattr(sys, "argv", ["/a folder/bin/redrafter"])
    with pytest.raises(SystemExit):
        console(["speed", "--help"])
    assert capsys.readouterr().out.startswith("usage: redrafter speed ")


def test_what_is_published_is_listed_on_one_screen():
    golden = {"golden/a": 1, "golden/b": 2}
    sizes = {"README.md": 5, **{f"code/{i}.py": 10 for i in range(20)}, **golden}
    assert folded(sizes) == {"README.md": 5, "code/ (20 files)": 200, **golden}
