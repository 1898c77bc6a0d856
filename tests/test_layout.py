"""The house of the project: launchers, what may import what, and what a clone must not contain."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER_FOLDERS = ("train", "data", "eval")
LAUNCHERS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in LAUNCHER_FOLDERS
    for path in (ROOT / folder).glob("*.py")
)
GUARD = """\
import os
import sys

# Python puts this folder first on its path, where train/redrafter.py would hide the library.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE)] + [p for p in sys.path if os.path.realpath(p) != HERE]
"""

# ---------------------------------------------------------------- launchers

#: Options that a user's notes and scripts rely on. Launchers not listed need only have some.
OPTIONS = {
    "train/redrafter.py": ["--config", "--target.path", "--output_dir"],
    "eval/speed.py": ["--target.path", "--head", "--prompts", "--methods", "--out"],
    "eval/lossless.py": ["--target.path", "--head", "--prompts", "--out"],
    "eval/costs.py": ["--target.path", "--out"],
}


def test_expected_launchers_exist():
    assert set(OPTIONS) <= set(LAUNCHERS)


# One test each, so that two xdist workers start two of them at a time.
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_explains_itself_from_anywhere(launcher, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(ROOT / launcher), "--help"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shown = set(re.findall(r"--[a-z][\w.]*", done.stdout))
    missing = set(OPTIONS.get(launcher, [])) - shown
    assert not missing, f"{launcher} --help does not name {sorted(missing)}:\n{done.stdout}"
    assert shown - {"--help"}, f"{launcher} --help names no option:\n{done.stdout}"
    assert not list(tmp_path.iterdir()), "asking for help must write nothing"


def test_launcher_finds_its_own_clone(tmp_path):
    """The guard beats the launcher's own name, `-P`, and a stale copy installed elsewhere."""
    (tmp_path / "clone/train").mkdir(parents=True)
    (tmp_path / "clone/redrafter/cli").mkdir(parents=True)
    (tmp_path / "clone/redrafter/__init__.py").touch()
    (tmp_path / "clone/redrafter/cli/__init__.py").touch()
    cli = "def main():\n    print('own clone')\n"
    (tmp_path / "clone/redrafter/cli/train_redrafter.py").write_text(cli)
    (tmp_path / "stale/redrafter").mkdir(parents=True)
    (tmp_path / "stale/redrafter/__init__.py").write_text("raise RuntimeError('stale copy')\n")
    launcher = tmp_path / "clone/train/redrafter.py"
    launcher.write_text((ROOT / "train/redrafter.py").read_text())
    link = tmp_path / "link.py"
    link.symlink_to(launcher)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "stale")}
    for args in (
        [str(launcher)],
        ["-P", str(launcher)],
        [str(link)],
        ["-c", f"import runpy; runpy.run_path({str(launcher)!r}, run_name='__main__')"],
    ):
        done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)
        assert done.stdout == "own clone\n", (args, done.stderr)


def test_launcher_folders_are_not_packages():
    made = [f"{folder}/__init__.py" for folder in LAUNCHER_FOLDERS]
    assert not [path for path in made if (ROOT / path).exists()]


def test_launcher_names_shadow_nothing():
    # Optional dependencies count whether or not they are installed here.
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    taken |= {"datasets", "deepspeed", "evaluate", "matplotlib", "peft", "trackio", "wandb"}
    names = {path: Path(path).stem for path in LAUNCHERS}
    bad = [path for path, name in names.items() if name in taken and path != "train/redrafter.py"]
    assert not bad, f"{bad} would hide a module of the same name from everything beside them"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_is_thin_and_begins_with_the_guard(launcher):
    text = (ROOT / launcher).read_text()
    assert text.startswith(GUARD)
    assert len(text.splitlines()) < 20, "logic belongs in redrafter/cli"


# ---------------------------------------------------------------- imports

BASE = {"contracts", "config", "files"}
DECODE_PARTS = {"decode.tree", "decode.warp", "decode.noise", "decode.cache"}
DATA = BASE | {"target", "decode", "drafters", "lookahead", "processes"}
ALL = DATA | {"heads", "losses", "data", "training", "evaluation", "hub", "generation"}
#: Part of the library: which others it may import (itself always). `a.b` allows that module only.
MAY_IMPORT = {
    "__init__": set(),
    "contracts": set(),
    "config": set(),
    "losses": set(),
    "files": {"config"},
    "processes": {"contracts"},
    "target": BASE | {"processes"},  # of several processes each has its own device
    "heads": BASE | {"hub.fetch"},  # where a head lies, here or there, is one question
    "lookahead": BASE,
    "decode": BASE | {"target"},
    "drafters": BASE | {"target", "heads"} | DECODE_PARTS,
    "generation": BASE | {"target", "heads", "decode", "drafters"},
    "data": DATA,
    "training": BASE
    | {"heads", "losses", "data", "decode", "drafters", "target", "processes"}
    | {"lookahead", "hub.export"},  # DISCO is trained; every export carries what travels with it
    "evaluation": ALL,
    "hub": ALL,
    "planning": ALL,
    "serve": BASE | {"heads"},  # loaded by engines, where no more than that is installed
    "cli": ALL | {"cli", "planning"},
}


def modules_of(package: Path) -> dict[str, Path]:
    """{"decode.tree": path, ...}; a package itself goes by its name, the top one by __init__."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def own_imports(path: Path, package: Path) -> list[tuple[int, str]]:
    """(line, "decode.tree") of each import of ours in a file, TYPE_CHECKING ones included."""
    folder = ("redrafter", *path.parent.relative_to(package).parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = folder[: len(folder) - node.level + 1] if node.level else ()
            base = ".".join([*up, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [
            (node.lineno, name.removeprefix("redrafter.")) for name in names
            if name.startswith("redrafter.")
        ]  # fmt: skip
    return found


def forbidden_imports(package: Path) -> list[str]:
    found = []
    for module, path in modules_of(package).items():
        part = module.split(".")[0]
        assert part in MAY_IMPORT, f"redrafter/{part} is not in the table of the design"
        for line, name in own_imports(path, package):
            other = name.split(".")[0]
            allowed = {part} | MAY_IMPORT[part]
            fine = other in allowed or any(
                f"{name}.".startswith(f"{item}.") for item in allowed if "." in item
            )
            # What `from redrafter import __version__` takes is no part of the library.
            if not fine and not other.startswith("__"):
                found.append(f"{path.relative_to(package.parent)}:{line} imports {name}")
    return found


def test_import_table():
    assert not forbidden_imports(ROOT / "redrafter")


def test_import_table_is_enforced(tmp_path):
    package = tmp_path / "redrafter"
    (package / "drafters").mkdir(parents=True)
    (package / "drafters/bad.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "from redrafter import __version__, losses\n"
        "from redrafter.decode.tree import ancestors\n"
        "from redrafter.decode import tree, verify\n"
        "from ..data import chat\n"
        "from . import dummy\n"
        "if TYPE_CHECKING:\n"
        "    import redrafter.training.loop\n"
    )
    assert forbidden_imports(package) == [
        "redrafter/drafters/bad.py:2 imports losses",
        "redrafter/drafters/bad.py:4 imports decode.verify",
        "redrafter/drafters/bad.py:5 imports data.chat",
        "redrafter/drafters/bad.py:8 imports training.loop",
    ]


@pytest.mark.parametrize("module", ["redrafter", "redrafter.cli.main"])
def test_import_stays_light(module):
    code = f"import sys, {module}; print(*{{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_console_script_has_every_launcher():
    from redrafter.cli.main import SUBCOMMANDS

    launches = re.compile(r"^from redrafter\.cli\.(\w+) import main$", re.MULTILINE)
    found = {path: launches.search((ROOT / path).read_text()) for path in LAUNCHERS}
    assert all(found.values())
    scripts = [launches.search(path.read_text()) for path in (ROOT / "scripts").glob("*.py")]
    modules = {match[1] for match in [*found.values(), *scripts] if match}
    # It runs where vLLM is installed, and a clone is not: it has no launcher.
    assert modules | {"vllm_serve"} == set(SUBCOMMANDS)


# ---------------------------------------------------------------- contents


def clone_files() -> list[Path]:
    """Files that are or would be committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_path_of_a_machine():
    # Spelled in halves, so that this file passes its own test.
    folders = "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers", "op" + "t"])
    pattern = re.compile(rf"(?<![\w.~$}}-])/(?:{folders})/|\b[A-Z]:\\\\?Us" + r"ers\b")
    for sample in ("/" + "home/x", "C:\\" + "Users\\x", " /" + "opt/x/y"):
        assert pattern.search(sample), "the test would see nothing"
    found = []
    for path in clone_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # not text
        found += [
            f"{path.relative_to(ROOT)}:{i}" for i, s in enumerate(lines, 1) if pattern.search(s)
        ]
    assert not found, "absolute paths of one machine"
