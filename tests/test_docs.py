"""What the documents say is run, and what they point to is there."""

import doctest
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest
import yaml

from redrafter.config import TreeConfig
from redrafter.drafters.head import HeadDrafter
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead
from redrafter.lookahead.disco import Disco, DiscoConfig, save_disco
from redrafter.targets.load import load_target

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md")) + [ROOT / "examples/README.md"]


def test_the_worked_examples_run():
    done = doctest.testfile(str(ROOT / "docs/worked-examples.md"), module_relative=False)
    assert done.attempted > 30, "they are marked as doctest reads them"
    assert done.failed == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        path = link.partition("#")[0]
        if path and "://" not in path:
            assert (document.parent / path).exists(), link


@pytest.fixture(scope="module")
def quickstart(tiny_target, tmp_path_factory) -> Path:
    """A folder with what the quickstart makes, by name; head and classifier know nothing."""
    base = tmp_path_factory.mktemp("clone")
    (base / "quickstart").mkdir()
    (base / "quickstart/target").symlink_to(tiny_target)
    target, place = load_target(str(tiny_target)), base / "quickstart/head"
    RecurrentHead.for_target(target).save_pretrained(place)
    drafter = HeadDrafter(load_head(place, target), target, TreeConfig(4, 4))
    network = DiscoConfig(
        drafter.identity(), target.fingerprint(), drafter.feature_names, 4, hidden=4,
        added_s=(1e-3,) * 4,
    )  # fmt: skip
    save_disco(place / "disco", Disco(network))
    return base


@pytest.mark.parametrize(
    ("document", "heading", "least"),
    [("docs/in-a-program.md", "# In a program", 10), ("README.md", "## Use a head", 1)],
)
def test_code_in_the_documents_runs(quickstart, monkeypatch, document, heading, least):
    """As a reader would run it: block after block of a section, beside the quickstart's folder."""
    monkeypatch.chdir(quickstart)
    level = heading.partition(" ")[0]
    text = (ROOT / document).read_text(encoding="utf-8")
    section = text[text.index(f"{heading}\n") + len(heading) :]
    section = re.split(rf"^{level} ", section, maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) >= least
    names: dict = {}
    for block in blocks:
        exec(compile(block, document, "exec"), names)


def test_the_readmes_picture_is_drawn_from_the_files():
    """What it shows is in docs/pictures/trace.json and in a committed table."""
    place = ROOT / "scripts/dev/readme_picture.py"
    spec = importlib.util.spec_from_file_location("readme_picture", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PICTURE.read_text(encoding="utf-8") == module.drawn()
    assert module.PICTURE.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text()


def pages(item) -> list[str]:
    """The files that a navigation names."""
    if isinstance(item, str):
        return [item]
    return [page for part in (item.values() if isinstance(item, dict) else item)
            for page in pages(part)]  # fmt: skip


def test_every_page_can_be_reached_and_every_name_of_the_api_is_there():
    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    there = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert sorted(named) == sorted(there)
    api = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in re.findall(r"^::: (\S+)$", api, re.MULTILINE):
        assert pkgutil.resolve_name(name), name
    assert "::: " in api
