"""The house of the project: launchers, what may import what, and what a clone must not contain."""

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from launching import run_copy

from redrafter.cli.naming import as_typed, subcommand

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


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_explains_itself(launcher, tmp_path):
    status, said = run_copy(launcher, ["--help"], tmp_path / "said.txt")
    assert status == 0, said
    shown = set(re.findall(r"--[a-z][\w.]*", said))
    missing = set(OPTIONS.get(launcher, [])) - shown
    assert not missing, f"{launcher} --help does not name {sorted(missing)}:\n{said}"
    assert shown - {"--help"}, f"{launcher} --help names no option:\n{said}"
    # What jsonargparse writes where it found no type: it then takes any text for a number.
    assert "Unvalidated" not in said


# They all begin with the same guard, see below.
@pytest.mark.parametrize("folder", LAUNCHER_FOLDERS)
def test_launcher_starts_from_anywhere(folder, tmp_path):
    first = next(path for path in LAUNCHERS if path.startswith(folder))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / first), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "--help" in done.stdout, done.stderr
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
DECODE_PARTS = {"decode.tree", "decode.warp", "decode.noise"}
MAKING = BASE | {"bars", "processes", "targets", "decode", "data"}
#: Part of the library: which others it may import (itself always). `a.b` allows that module only.
#: From the ground up: nobody imports from a line below its own.
MAY_IMPORT = {
    "__init__": set(),
    "contracts": set(),
    "config": set(),
    "files": {"config"},
    "fetch": {"contracts"},
    "shipped": {"contracts"},
    "processes": {"contracts"},
    "threads": {"contracts"},
    "bars": set(),
    "launcher": {"processes"},
    "kernel_trial": set(),
    "kernels": {"files", "kernel_trial"},
    "products": {"kernels"},
    "targets": BASE
    | {"processes", "kernels", "products"},  # of several processes each has its own device
    "heads": BASE | {"fetch", "products"},  # where a head lies, here or there, is one question
    "lookahead": BASE,
    "decode": BASE | {"targets"},
    "drafters": BASE | {"products", "targets", "heads"} | DECODE_PARTS,
    "drafting": BASE | {"fetch", "targets", "decode", "drafters", "lookahead"},
    "data": BASE | {"bars", "processes", "targets", "decode"},
    "tables": MAKING | {"drafters"},
    "records": MAKING | {"drafters", "lookahead"},
    "costs": BASE | {"targets", "decode", "drafters", "data"},
    # What a name is made from may lie in a folder, and be priced: above what they are made by.
    "resources": BASE | {"fetch", "targets", "heads", "drafters", "tables", "costs"},
    "evaluation": MAKING
    | {"fetch", "threads", "heads", "drafters", "lookahead", "drafting"}
    | {"tables", "records", "costs", "resources"},
    "generation": BASE
    | {"targets", "heads", "decode", "drafters", "drafting", "data", "resources"},
    "export": BASE | {"targets", "heads", "decode", "drafters", "data", "evaluation"},
    "training": MAKING | {"launcher", "heads", "drafters", "export"},  # exports are complete
    "hub": BASE | {"heads", "evaluation", "export"},
    "learning": MAKING
    | {"fetch", "heads", "lookahead", "drafters", "drafting", "resources"}
    | {"evaluation", "training", "hub"},
    "report": BASE
    | {"targets", "heads", "decode", "drafters", "drafting", "data", "evaluation"}
    | {"generation", "hub"},
    "planning": BASE
    | {"fetch", "products", "targets", "heads", "decode", "drafters", "data", "tables"}
    | {"training", "export"},
    "studies": BASE | {"targets", "heads", "evaluation", "training", "planning"},
    "serve": BASE | {"heads"},  # loaded by engines, where no more than that is installed
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)


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
        assert part in MAY_IMPORT, f"redrafter/{part} is not in MAY_IMPORT"
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


def circles(package: Path) -> list[list[str]]:
    """Files that import each other, in whatever way (inside functions and for annotations, too)."""
    modules = modules_of(package)

    def file_of(name: str) -> str | None:
        parts = name.split(".")
        tried = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((module for module in tried if module in modules), None)

    graph = {
        module: {file_of(name) for _, name in own_imports(path, package)} - {None, module}
        for module, path in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def test_import_table():
    assert not forbidden_imports(ROOT / "redrafter")


#: modules of the library that name one kind of heads, each with why
NAME_A_KIND = {
    "heads.apple": "a layout of one kind",
    "heads.medusa_layouts": "likewise",
    "heads.hydra_layouts": "likewise",
    "export.layouts": "the one list of writers",
    "heads.load": "the one list of readers",
}


def kinds_named(package: Path, kinds: set[str]) -> list[str]:
    """`file:line` of every import of a kind of heads outside of its own module, and of every
    `isinstance` that asks for one."""
    found = []
    for module, path in modules_of(package).items():
        if module in {*NAME_A_KIND, *kinds}:
            continue
        place = path.relative_to(package.parent)
        found += [
            f"{place}:{line} imports {name}" for line, name in own_imports(path, package)
            if any(f"{name}.".startswith(f"{kind}.") for kind in kinds)
        ]  # fmt: skip
        asked = [
            node for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
        ]  # fmt: skip
        found += [
            f"{place}:{node.lineno} {ast.unparse(node)}" for node in asked
            if re.search(r"RecurrentHead|Speculator|MedusaHead|HydraHead", ast.unparse(node))
        ]  # fmt: skip
    return found


def test_no_kind_of_heads_is_named_outside_of_its_module():
    """What works for one kind works for all: everything reads the contract, `heads/base.py`."""
    from redrafter.config import KINDS

    assert not kinds_named(ROOT / "redrafter", {f"heads.{kind}" for kind in KINDS})


def test_a_named_kind_is_found(tmp_path):
    package = tmp_path / "redrafter"
    (package / "training").mkdir(parents=True)
    (package / "training/bad.py").write_text(
        "from redrafter.heads.recurrent import RecurrentHead\n"
        "from redrafter.heads import base, recurrent\n"
        "def f(head):\n"
        "    return isinstance(head, (int, RecurrentHead))\n"
    )
    assert kinds_named(package, {"heads.recurrent"}) == [
        "redrafter/training/bad.py:1 imports heads.recurrent.RecurrentHead",
        "redrafter/training/bad.py:2 imports heads.recurrent",
        "redrafter/training/bad.py:4 isinstance(head, (int, RecurrentHead))",
    ]


def test_no_circle_and_nothing_imports_upwards():
    assert not circles(ROOT / "redrafter")
    order = list(MAY_IMPORT)
    upwards = [
        (part, other)
        for part, others in MAY_IMPORT.items() if part != "cli"
        for other in others if order.index(other.split(".")[0]) >= order.index(part)
    ]  # fmt: skip
    assert not upwards


def test_circles_are_found(tmp_path):
    package = tmp_path / "redrafter"
    (package / "a").mkdir(parents=True)
    (package / "a/one.py").write_text("from redrafter.b import two\n")
    (package / "b.py").write_text("def f():\n    from redrafter.a.one import x\n")
    (found,) = circles(package)
    assert set(found) == {"a.one", "b"}
    (package / "b.py").write_text("")
    assert not circles(package)


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


def long_functions(folder: Path, most: int) -> list[str]:
    """`file:line name` of every function, methods and inner ones too, of more lines than that."""
    return [
        f"{path.relative_to(folder)}:{node.lineno} {node.name}"
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= most
    ]


def test_commands_parse_check_and_call():
    """What they do is done in the library, where it has types and can be called."""
    assert not long_functions(ROOT / "redrafter/cli", 40)


def test_long_functions_are_found(tmp_path):
    for lines in (40, 41):
        text = "class A:\n    def f():\n" + "        1\n" * (lines - 1)
        (tmp_path / f"of_{lines}.py").write_text(text)
    assert long_functions(tmp_path, 40) == ["of_41.py:2 f"]


@pytest.mark.parametrize("module", ["redrafter", "redrafter.cli.*"])
def test_import_stays_light(module):
    """So that help and refusals come at once, and that settings which torch reads when it is
    imported can be made before."""
    names = {module}
    if module.endswith("*"):
        folder = ROOT / "redrafter/cli"
        names = {f"redrafter.cli.{path.stem}" for path in folder.glob("[!_]*.py")}
    code = f"import sys, {', '.join(sorted(names))}\n"
    code += "print(*{'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_console_script_has_every_launcher():
    from redrafter.cli.main import SUBCOMMANDS

    launches = re.compile(r"^from redrafter\.cli\.(\w+) import main$", re.MULTILINE)
    found = {path: launches.search((ROOT / path).read_text()) for path in LAUNCHERS}
    assert all(found.values())
    scripts = [launches.search(path.read_text()) for path in (ROOT / "scripts").glob("*.py")]
    modules = {match[1] for match in [*found.values(), *scripts] if match}
    # No launcher have those that are for where there is no clone, and the newest one; training is
    # one subcommand, alone or by accelerate.
    own = {"vllm_serve", "train", "configs", "examples", "report"}
    assert modules - {"train_redrafter"} | own == set(SUBCOMMANDS)
    # And messages that name a launcher's file name the same subcommand to who has no clone.
    for path, match in found.items():
        named = subcommand(path).removeprefix("redrafter ").replace("-", "_")
        assert named == match[1].removesuffix("_redrafter"), path


def test_a_text_names_what_was_typed(monkeypatch):
    text = "`eval/speed.py` (python data/check.py), or accelerate launch --multi_gpu "
    text += "--num_processes 2 data/answers.py; redrafter/data/rows.py is no launcher"
    monkeypatch.setattr(sys, "argv", ["eval/speed.py"])
    assert as_typed(text) == text
    for program in ("bin/redrafter speed", str(ROOT / "redrafter/cli/train_redrafter.py")):
        monkeypatch.setattr(sys, "argv", [program])
        assert as_typed(text) == (
            "`redrafter speed` (redrafter check-store), or redrafter answers --launch.multi_gpu "
            "--launch.num_processes 2; redrafter/data/rows.py is no launcher"
        )


# ---------------------------------------------------------------- contents


def clone_files() -> list[Path]:
    """Files that are committed, or staged: what a user leaves in the clone is no part of it."""
    command = ["git", "ls-files", "-z", "--cached"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def names_that_are_not_there(files):
    """(file, module, name) of imports from this library that would fail; what runs inside of vLLM
    left out, which is not installed here."""
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            module = getattr(node, "module", None) or ""
            if not isinstance(node, ast.ImportFrom) or module.split(".")[0] != "redrafter":
                continue
            if module.startswith("redrafter.serve.vllm"):
                continue
            there = importlib.import_module(module)
            for alias in node.names:
                part = f"{module}.{alias.name}"  # of a package, perhaps a module not read yet
                there_too = hasattr(there, "__path__") and importlib.util.find_spec(part)
                if not hasattr(there, alias.name) and not there_too:
                    found.append((file.name, module, alias.name))
    return found


def test_scripts_that_no_test_runs_import_what_is_there(tmp_path):
    """A name that has moved is found here, and not by who runs one of them next."""
    assert not names_that_are_not_there(ROOT.glob("scripts/**/*.py"))
    (tmp_path / "old.py").write_text("from redrafter.targets.model import Target, load_target\n")
    assert names_that_are_not_there([tmp_path / "old.py"]) == [
        ("old.py", "redrafter.targets.model", "load_target")
    ]


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


# ---------------------------------------------------------------- what tests cost


def test_who_only_starts_the_workers_imports_nothing_heavy():
    """pytest-xdist's first process reads conftest.py as well, before there are any workers."""
    body = ast.parse((ROOT / "tests/conftest.py").read_text()).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert outside == {"pytest", "filelock"}


def test_byte_code_is_kept_where_the_environment_asks_for_none():
    code = "source <(grep ^unset scripts/setup.sh) && python -c 'import sys; print(sys.flags)'"
    done = subprocess.run(
        ["bash", "-c", code], cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "dont_write_bytecode=0" in done.stdout, done.stderr
