"""`scripts/push_to_hub.py`: publish a head with its card."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from redrafter.cli.args import parse, reports_input_errors
from redrafter.config import PushConfig

_DESCRIPTION = """\
Publish a trained head on the Hugging Face Hub, with what makes it checkable.

  python scripts/push_to_hub.py --head runs/head --repo USER/NAME --dry-run
      writes runs/head/card/README.md and lists what would be uploaded; reaches no network
  python scripts/push_to_hub.py --head runs/head --repo USER/NAME [--private] [--pr]

Uploaded in one commit: the head, its lookahead (disco/), device profiles, what eval/lossless.py
(lossless.json) and eval/speed.py (speed.json, results/) wrote into its folder, the golden batch,
code for plain transformers, pictures, settings and provenance without the names of folders, and the
card. Checkpoints, data and logs stay. The token is the usual one: `hf auth login`, or HF_TOKEN.
After a failure the same command can be given again.
"""
_MANY = 6  # files of a folder that are listed by name
_SWITCHES = ("private", "pr", "dry_run")


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    words = switched(sys.argv[1:] if argv is None else argv)
    config = parse(PushConfig, words, "scripts/push_to_hub.py", _DESCRIPTION, alone=True)
    from redrafter.hub.push import prepare, push

    release = prepare(config)
    sizes = release.sizes()
    print(f"{config.repo}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
    listed = folded(sizes)
    width = max(len(f"{size:,}") for size in listed.values())
    for name, size in listed.items():
        print(f"  {size:>{width},}  {name}")
    if release.left_out:
        print(f"left out: {', '.join(release.left_out)}")
    for note in release.notes:
        print(f"note: {note}")
    print(f"card: {release.card / 'README.md'}", flush=True)
    if config.dry_run:
        print("dry run: nothing was uploaded")
        return 0
    print(f"published: {push(release, config)}")
    return 0


def folded(sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes by name, those of a folder of many files in one entry."""
    folders = [name.rpartition("/")[0] for name in sizes]
    found: dict[str, int] = {}
    for (name, size), folder in zip(sizes.items(), folders, strict=True):
        many = folder and folders.count(folder) > _MANY
        shown = f"{folder}/ ({folders.count(folder)} files)" if many else name
        found[shown] = found.get(shown, 0) + size
    return found


def switched(words: Sequence[str]) -> list[str]:
    """Options with `-` or `_` in their names, and switches without a value: jsonargparse wants
    underscores, and a value after a flag."""
    found = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
            if word[2:] in _SWITCHES and following.lower() not in ("true", "false"):
                word += "=true"
        found.append(word)
    return found
