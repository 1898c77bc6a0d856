"""What the documents say is run, and what they point to is there."""

import doctest
import re
from pathlib import Path

import pytest

from redrafter.config import TreeConfig
from redrafter.drafters.recurrent import RecurrentDrafter
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead
from redrafter.lookahead.disco import Disco, DiscoConfig, save_disco
from redrafter.targets.model import load_target

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))


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
    drafter = RecurrentDrafter(load_head(place, target), target, TreeConfig(4, 4))
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
