"""The wheel stands alone: what the README names works from it, without the clone."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from redrafter import shipped
from redrafter.cli import train
from redrafter.cli.configs import main as configs
from redrafter.cli.given import with_recipes
from redrafter.cli.main import SUBCOMMANDS, TASKS, usage
from redrafter.cli.main import main as console
from redrafter.cli.train_redrafter import main as train_redrafter
from redrafter.contracts import InputError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(once) -> Path:
    """Built without a network, of a copy: what an earlier build left would get into it."""

    def make(folder: Path) -> None:
        source = folder.with_name("wheel_source")
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        left_out = shutil.ignore_patterns("__pycache__")
        for name in ("redrafter", "configs", "examples"):
            shutil.copytree(ROOT / name, source / name, ignore=left_out)
        for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
                   "--disable-pip-version-check", "-w", str(folder), str(source)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip to build a wheel with")
    (found,) = once("wheel", make).glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel's files and nothing of the clone."""
    place = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place)
    return place


def alone(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    """A subcommand, in an empty folder, by the wheel's files."""
    code = "import sys, redrafter; from redrafter.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip


def test_the_wheel_has_all_of_the_library_and_the_recipes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    library = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "redrafter").rglob("*")
        if p.suffix in (".py", ".c", ".h", ".css", ".js", ".typed") or p.name == "py.typed"
    }  # fmt: skip
    assert library <= names
    for what in ("configs", "examples"):
        assert {f"redrafter/shipped_{what}/{name}" for name in shipped.names(what)} <= names
    recipes = [p for p in (ROOT / "configs").rglob("*") if p.is_file()]
    assert len(recipes) == len(shipped.names())
    outside = {name.split("/")[0] for name in names}
    assert {re.sub("-.*", "", name) for name in outside} == {"redrafter"}, "tests, docs, data"
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "redrafter = redrafter.cli.main:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_from_the_wheel_configs_are_listed_and_copied(installed, tmp_path):
    where = alone(installed, tmp_path, "configs", "show", "quickstart")
    assert where.stdout == (ROOT / "configs/quickstart.yaml").read_text(), where.stderr
    assert alone(installed, tmp_path, "configs", "copy", "accelerate/ddp").returncode == 0
    assert (tmp_path / "ddp.yaml").read_text() == (ROOT / "configs/accelerate/ddp.yaml").read_text()
    again = alone(installed, tmp_path, "configs", "copy", "accelerate/ddp.yaml")
    assert again.returncode == 2 and "ddp.yaml exists" in again.stderr
    assert alone(installed, tmp_path, "examples", "copy").returncode == 0
    head = (tmp_path / "examples/smollm2-135m/head").iterdir()
    assert {p.name for p in head} >= {"config.json", "model.safetensors"}
    listed = alone(installed, tmp_path, "configs").stdout.splitlines()
    assert [line.split()[0] for line in listed] == shipped.names()


def test_from_the_wheel_a_page_is_styled(installed, tmp_path):
    code = "import redrafter; print(redrafter.__file__)\n"
    code += "from redrafter.report.page import page; print(page('t', '', {'a': 'b'}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert done.stdout.startswith(str(installed)), "the clone is out of the way"
    assert "prefers-color-scheme" in done.stdout and "ArrowRight" in done.stdout, done.stderr


def test_every_command_of_the_readme_that_is_a_launcher_is_a_subcommand():
    told = re.findall(r"redrafter ([a-z][a-z_-]+) ", (ROOT / "README.md").read_text())
    named = {name.replace("-", "_") for name in told if name.replace("-", "_") in SUBCOMMANDS}
    assert len(named) >= 3
    assert [name for name in usage().split() if name in SUBCOMMANDS and TASKS]
    assert all(f"\n{task}:\n" in usage() for task in TASKS)


def test_help_of_training_shows_what_matters_first(capsys):
    def shown(word: str) -> set[str]:
        with pytest.raises(SystemExit) as end:
            train_redrafter([word])
        assert not end.value.code
        return set(re.findall(r"^  (--[\w.]+)", capsys.readouterr().out, re.MULTILINE))

    few, every = shown("--help"), shown("--help-all")
    assert len(few - {"--config", "--plan", "--help"}) == 10
    assert few < every and len(every) > 90


def test_options_of_a_launch_are_told_from_those_of_training(tmp_path, monkeypatch):
    words = ["--config", "a.yaml", "--launch.num_processes", "2", "--optim.steps=3",
             "--launch.cpu", "--launch.main_process_port=5", "--target.path", "x"]  # fmt: skip
    launch, own = train.split(words)
    assert launch == ["--num_processes", "2", "--cpu", "--main_process_port", "5"]
    assert own == ["--config", "a.yaml", "--optim.steps=3", "--target.path", "x"]
    launch, _ = train.split(["--launch.config_file", "ddp"])
    assert launch == ["--config_file", str(ROOT / "configs/accelerate/ddp.yaml")]
    with pytest.raises(InputError, match=r"launch.config_file: no file 'none'.*zero3\.yaml"):
        train.split(["--launch.config_file=none"])
    ran = []
    monkeypatch.setattr(train.os, "execv", lambda program, command: ran.append(command))
    train.main(words)
    assert ran[0][1:3] == ["-m", "accelerate.commands.launch"]
    assert ran[0][-7:] == ["-m", "redrafter.cli.train_redrafter", *own]
    ran.clear()
    with pytest.raises(SystemExit):
        train.main(["--no_such_option"])
    assert not ran, "one process needs no launcher"


def test_in_a_clone_its_own_folders_are_copied_nowhere(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    assert configs(["copy"]) == 0 and capsys.readouterr().out.startswith("configs: ")
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        configs(["copy"])
    assert "configs exists" in capsys.readouterr().err


def test_a_recipe_goes_by_its_name(tmp_path, monkeypatch):
    """`--config` takes what comes with the library; a file of the user's goes first."""
    monkeypatch.chdir(tmp_path)
    theirs = str(ROOT / "configs/quickstart.yaml")
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert with_recipes(["--config", name, "--x"]) == ["--config", theirs, "--x"]
        assert with_recipes([f"--config={name}"]) == [f"--config={theirs}"]
    (tmp_path / "quickstart.yaml").write_text("seed: 1\n")
    assert with_recipes(["--config", "quickstart.yaml"])[1] == "quickstart.yaml"
    with pytest.raises(InputError, match=r"config: no file 'quikstart'.* mean quickstart\.yaml"):
        with_recipes(["--config", "quikstart"])


def test_any_subcommand_is_launched_in_several_processes(monkeypatch):
    ran = []
    monkeypatch.setattr(train.os, "execv", lambda program, command: ran.append(command))
    console(["answers", "--launch.num_processes", "2", "--launch.multi_gpu", "--target.path", "x"])
    assert ran[0][1:] == ["-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu",
                          "-m", "redrafter.cli.main", "answers", "--target.path", "x"]  # fmt: skip


def test_a_config_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        configs(["show", "none"])
    assert "no file 'none'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        configs(["show"])
    assert "name a file" in capsys.readouterr().err
