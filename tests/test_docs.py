"""What the documents say is run, and what they point to is there."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))


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
