"""For mkdocs: what lies in the clone beside docs/ is linked to where it lies. In the clone such a
link is a path, which tests/test_docs.py follows; a page outside of it has none.

REDRAFTER_SOURCE is the address of the clone's files, e.g. https://HOST/OWNER/NAME/blob/main;
without it those links become plain text.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, **_) -> str:
    """mkdocs calls it for every page."""
    here = (ROOT / "docs" / page.file.src_uri).parent

    def mended(match: re.Match) -> str:
        picture, text, path, _ = match.groups()
        place = (here / path).resolve()
        if "://" in path or (place.is_relative_to(ROOT / "docs") and place.is_file()):
            return match[0]
        if picture:
            return f"*{text}: {path.rsplit('/', 1)[-1]}, in the clone*"
        source = os.environ.get("REDRAFTER_SOURCE")
        if source is None or not place.is_relative_to(ROOT):
            return text
        return f"[{text}]({source}/{place.relative_to(ROOT).as_posix()})"

    return LINK.sub(mended, markdown)
