"""The README's picture, of what was measured: a text whose tokens are coloured by how they came,
and tokens per step beside speed.

  python scripts/dev/readme_picture.py --trace smollm2   # decodes docs/pictures/trace.json anew
  python scripts/dev/readme_picture.py                   # draws docs/pictures/first.svg
"""

import argparse
import dataclasses
import json
from html import escape
from pathlib import Path

from redrafter.files import plain_values, provenance, read_packed, write_json, write_text
from redrafter.report.svg import bars

ROOT = Path(__file__).resolve().parent.parent.parent
TRACE, PICTURE = (ROOT / "docs/pictures" / name for name in ("trace.json", "first.svg"))
SPEED = ROOT / "eval/results/speed-smollm2-kernels.json"
HEAD = "examples/smollm2-135m/head"
QUESTION = "What is the capital of France, and why is it famous?"
SHOWN = {
    "stock": "model.generate", "plain": "plain loop", "suffix:3x1": "suffix:3x1",
    "head:1x1": "head:1x1", "mix(head:1x2,suffix:3x1):nodes=3": "head + suffix",
    "head:4x4": "head:4x4",
}  # fmt: skip
WIDTH, MARGIN, CHAR, LINE, COLUMNS = 800, 20, 9.0, 34, 84
# A white ground of its own: it reads alike on a light page and on a dark one.
STYLE = """
text { font: 11px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #1c2127; }
.t { font-size: 15px; white-space: pre; } .h { font-size: 13px; font-weight: bold; }
.grid { stroke: #d5dae0; } .mark { stroke: #5b6570; stroke-dasharray: 3 3; }
.bar { fill: #4a8af0; } .interval { stroke: #1c2127; stroke-width: 2; }
.bound { stroke: #b32400; stroke-width: 3; }
"""
SHADES = ("#d6e6ff", "#b3d0ff", "#8db8ff", "#6aa1ff")


def trace(target_path: str) -> None:
    """Decode the question with the head that ships, and keep where every token came from."""
    import tempfile

    from redrafter.config import ReportConfig, TargetConfig
    from redrafter.evaluation.models import load_both
    from redrafter.report.texts import trace as traced
    from redrafter.targets.devices import device_name

    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text(json.dumps({"question": QUESTION}) + "\n")
        config = ReportConfig(
            head=str(ROOT / HEAD), target=TargetConfig(path=target_path), prompts=str(prompts),
            n_prompts=1,
        )  # fmt: skip
        target, head = load_both(config)
        (text,), _ = traced(config, target, head)
    facts = provenance(device=device_name(target.device), dtype=str(target.dtype), head=HEAD,
                       target="SmolLM2-135M-Instruct")  # fmt: skip
    del facts["argv"]
    write_json(TRACE, {"question": QUESTION, "text": plain_values(dataclasses.asdict(text)),
                       "provenance": facts})  # fmt: skip


def coloured(found: dict, top: float) -> tuple[list[str], float]:
    """(the text's elements, where they end)."""
    parts, column, row, last = [], 0, 0, 0
    origins, pieces = found["text"]["origins"], found["text"]["pieces"]
    for origin, piece in zip(origins, pieces, strict=True):
        if piece.startswith("<|"):
            continue  # the end of the turn
        if column + len(piece) > COLUMNS:
            column, row, piece = 0, row + 1, piece.lstrip()
        x, y = MARGIN + column * CHAR, top + row * LINE
        width = len(piece) * CHAR
        if origin["kind"] == "drafted":
            shade = SHADES[min(origin["depth"], len(SHADES)) - 1]
            parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="22" fill="{shade}"/>')
        if origin["kind"] == "corrected":
            parts.append(f'<rect x="{x}" y="{y + 20}" width="{width}" height="2" fill="#b32400"/>')
        if origin["step"] != last:
            parts.append(f'<rect x="{x - 0.5}" y="{y}" width="1" height="22" fill="#5b6570"/>')
            last = origin["step"]
        parts.append(f'<text class="t" x="{x}" y="{y + 16}" textLength="{width}" '
                     f'xml:space="preserve">{escape(piece)}</text>')  # fmt: skip
        column += len(piece)
    return parts, top + (row + 1) * LINE


def key(top: float) -> list[str]:
    signs = [(f'<rect x="X" y="{top}" width="14" height="12" fill="{shade}"/>', f"depth {depth}")
             for depth, shade in enumerate(SHADES, 1)]  # fmt: skip
    signs.append((f'<rect x="X" y="{top + 10}" width="14" height="2" fill="#b32400"/>',
                  "the target's, a guess was wrong"))  # fmt: skip
    signs.append((f'<rect x="X" y="{top}" width="1" height="12" fill="#5b6570"/>',
                  "a forward"))  # fmt: skip
    parts, x = [f'<text x="{MARGIN}" y="{top + 10}">drafted at</text>'], MARGIN + 82.0
    for sign, said in signs:
        parts.append(sign.replace('"X"', f'"{x}"'))
        parts.append(f'<text x="{x + 18}" y="{top + 10}">{escape(said)}</text>')
        x += 34 + 6.7 * len(said)
    return parts


def chart(svg: str, x: float, y: float) -> str:
    """What `bars` draws, at a place. Its caption is text of a page; here it is drawn."""
    inner = svg[svg.index("<svg") : svg.index("</svg>")]
    label = inner.split('aria-label="')[1].split('"')[0]
    body = inner[inner.index(">") + 1 :]
    return (f'<text class="h" x="{x}" y="{y}">{label}</text>'
            f'<g transform="translate({x - 4} {y + 8})">{body}</g>')  # fmt: skip


def draw(found: dict, speed: dict) -> str:
    """The whole picture. found: of `trace`; speed: what eval/table.py measured"""
    n, steps = len(found["text"]["origins"]), found["text"]["origins"][-1]["step"]
    where = found["provenance"]
    head = f"{where['target']} with {where['head']}: {n} tokens in {steps + 1} forwards, greedy"
    parts, end = coloured(found, 66)
    asked = escape(f"> {found['question']}")
    parts = [f'<text class="h" x="{MARGIN}" y="26">{escape(head)}</text>',
             f'<text class="t" x="{MARGIN}" y="52">{asked}</text>', *parts, *key(end)]  # fmt: skip
    methods = {label: speed["methods"][name] for name, label in SHOWN.items()}
    top = end + 48
    for i, (key_, label, line) in enumerate((
        ("tokens_per_step", "the same model, GSM8K: tokens per step", None),
        ("speedup_stock", "speed / model.generate, prompts included", 1.0),
    )):  # fmt: skip
        rows = [(n, m[key_], m["low"].get(key_), m["high"].get(key_)) for n, m in methods.items()]
        parts.append(chart(bars(label, rows, line), MARGIN + 390 * i, top))
    height = top + 36 * len(SHOWN) + 34
    facts = speed["provenance"]
    told = (f"{speed['n_prompts']} prompts, 95 % intervals; {facts['device']}, float32, "
            f"{facts['threads']} thread, commit {facts['git_commit'][:10]}")  # fmt: skip
    parts.append(f'<text x="{MARGIN}" y="{height - 8}">{escape(told)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(head, quote=True)}">\n<style>{STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="#ffffff"/>\n'
        + "\n".join(parts) + "\n</svg>\n"
    )  # fmt: skip


def drawn() -> str:
    speed = json.loads(read_packed(SPEED))
    return draw(json.loads(TRACE.read_text(encoding="utf-8")), speed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", metavar="TARGET", help="folder of SmolLM2-135M-Instruct")
    given = parser.parse_args()
    if given.trace:
        trace(given.trace)
    write_text(PICTURE, drawn())
