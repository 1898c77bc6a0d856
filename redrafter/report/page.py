"""A page of HTML that stands alone: its style and script are in it, and it may reach no network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

# Whatever text the page shows, a browser fetches nothing for it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, introduction: str, sections: Mapping[str, str]) -> str:
    """The whole file. introduction, sections: HTML; a section by its heading"""
    here = files("redrafter.report")
    style, script = ((here / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    ids = {heading: f"part-{i}" for i, heading in enumerate(sections, 1)}
    links = "".join(f'<li><a href="#{ids[h]}">{escape(h)}</a></li>' for h in sections)
    body = "".join(
        f'<section aria-labelledby="{ids[h]}"><h2 id="{ids[h]}">{escape(h)}</h2>{content}</section>'
        for h, content in sections.items()
    )
    contents = f'<nav aria-label="contents"><ul>{links}</ul></nav>' if len(sections) > 1 else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{introduction}{contents}</header>\n<main>{body}</main>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], name: str) -> str:
    """name: for those who do not see it; it scrolls by itself where the page is narrow."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    said = escape(name, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{said}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of two columns without a heading."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in rows
    )
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def charts(*figures: str) -> str:
    shown = "".join(figures)
    return f'<div class="charts">{shown}</div>' if shown else ""


def missing(what: str, command: str) -> str:
    """What stands where nothing was measured: the command that does."""
    return (
        f'<div class="missing">{escape(what)} This command does it:'
        f"<pre><code>{escape(command)}</code></pre></div>"
    )


def tokens(pieces: Sequence[tuple[str, str, str, str]], label: str) -> str:
    """A text whose tokens can be pointed at, and the line that says what is known of one.

    pieces: per token (text, classes, style, what to say); control characters are shown as signs
    """
    spans = "".join(
        f'<span role="option" class="{classes}"{f" style={style!r}" if style else ""} '
        f'title="{escape(said, quote=True)}">{escape(visible(text))}</span>'
        for text, classes, style, said in pieces
    )
    said = escape(label, quote=True)
    hint = "Point at a token, or reach the text by the tab key and go along it by the arrow keys."
    return (
        f'<p class="tokens" role="listbox" aria-label="{said}">{spans}</p>'
        f'<p class="said note" aria-live="polite">{hint}</p>'
    )


def visible(text: str) -> str:
    """A newline with a sign before it; other control characters, and nothing, as signs alone."""
    shown = "".join(
        "↵\n" if char == "\n" else char if char.isprintable() else f"\\x{ord(char):02x}"
        for char in text
    )
    return shown or "▯"
