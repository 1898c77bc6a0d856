"""Every command that README, the docs and the configurations show is taken by the command it names,
in a bare clone, and leaves nothing behind that git would see."""

import itertools
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from redrafter.cli import args
from redrafter.cli.main import SUBCOMMANDS
from redrafter.cli.train import split

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml")) + sorted((ROOT / "configs/eval").glob("*.yaml"))
LAUNCHES = re.compile(r"^from redrafter\.cli\.(\w+) import main$", re.MULTILINE)
#: what a line writes; its place must be one that git ignores
WRITTEN = ("--out", "--output_dir", "--data.folder")
#: words of a path that stand for something of the reader's
OWN = re.compile(r"[A-Z][A-Z_]{2,}")


def commands(text: str) -> list[list[str]]:
    """The words of each line that starts a launcher or a subcommand."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "&&" in words:  # the last of them is ours
            words = words[len(words) - words[::-1].index("&&") :]
        while words and "=" in words[0] and not words[0].startswith("-"):
            words.pop(0)  # VARIABLE=value
        if words and words[0] in ("python", "accelerate", "redrafter") and "..." not in words:
            found.append(words)
    return found


def shown(path: Path) -> list[list[str]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return commands(text.splitlines()[0].removeprefix("# "))
    return commands("\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)))


LINES = [(path, words) for path in (*DOCUMENTS, *CONFIGS) for words in shown(path)]


def start_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(module of redrafter.cli, its arguments); None for what is no command of ours."""
    if words[0] == "redrafter":
        name = words[1].replace("-", "_")
        if name == "train":
            return "train_redrafter", split(words[2:])[1]
        return (name, words[2:]) if name in SUBCOMMANDS else None
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    match = LAUNCHES.search((ROOT / words[scripts[0]]).read_text()) if scripts else None
    return (match[1], words[scripts[0] + 1 :]) if match else None


#: commands that read no configuration -> the words that they take
OWN_WORDS = {
    "configs": r"(list|show \S+|copy( \S+)*)?",
    "examples": r"(list|show \S+|copy( \S+)*)?",
    "make_smollm2": r"--output_dir \S+",
}


class Parsed(Exception):
    pass


@pytest.mark.parametrize(
    ("path", "words"), LINES, ids=lambda x: x.name if isinstance(x, Path) else " ".join(x)[:60]
)
@pytest.mark.usefixtures("files_unseen")
def test_a_documented_line_is_taken(path, words, monkeypatch):
    for word in words:
        if word.startswith(("configs/", "scripts/", "data/", "eval/", "train/")):
            assert OWN.search(word) or (ROOT / word).exists(), f"{word} is not in a clone"
        assert "../" not in word, f"{word} lies outside of a clone"
    started = start_of(words)
    if started is None:
        return
    module = import_module(f"redrafter.cli.{started[0]}")
    monkeypatch.chdir(ROOT)
    if started[0] == "vllm_serve":  # what runs beside vLLM reads its options by itself
        assert module.main([*started[1], "--dry-run"]) == 0
        return
    if started[0] in OWN_WORDS:
        assert re.fullmatch(OWN_WORDS[started[0]], " ".join(started[1]))
        return

    def parse(*given, inner=args.parse, **options):
        options.pop("refuse", None)  # of a folder that is not there
        monkeypatch.setattr(args, "show_plan", lambda *_: None)
        try:
            inner(*given, **options)
        except SystemExit as end:
            assert not end.code, f"{' '.join(words)} is refused"
        raise Parsed

    monkeypatch.setattr(module, "parse", parse)
    with pytest.raises(Parsed):
        module.main([OWN_NAME.sub("quickstart", word) for word in started[1]])


#: NAME in configs/NAME.yaml, but not what stands for a file of the reader's
OWN_NAME = re.compile(r"(?<=configs/)NAME(?=\.yaml)|(?<=configs/plan/)NAME")


def test_what_documented_lines_write_is_ignored_by_git():
    places = set()
    for _, words in LINES:
        for option, value in itertools.pairwise(words):
            if option in WRITTEN and not OWN.search(value.split("/")[0]):
                places.add(value)
    assert any(place.startswith("runs/") for place in places)
    for place in sorted(places):
        done = subprocess.run(["git", "check-ignore", "-q", place], cwd=ROOT)
        if done.returncode == 128:
            pytest.skip("not a git clone")
        assert done.returncode == 0, f"{place} would be seen by git"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_says_what_lies_outside_of_the_clone(path):
    head = "".join(line for line in path.open(encoding="utf-8") if line.startswith("#"))
    text = path.read_text(encoding="utf-8")
    told = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\.\./shared/(\S+)", text):
        assert "Needs first: " in head and "configs/README.md" in head, name
        assert f"`{name}`" in told, name


def test_there_are_lines_to_look_at():
    assert len(LINES) > 30
    assert sum(start_of(words) is not None for _, words in LINES) > 25
