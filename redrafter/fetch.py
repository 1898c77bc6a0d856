"""Paths that may lie on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from redrafter.contracts import InputError

_NAMED = 8  # of a folder's files, in a message

# owner/name, then a file or folder inside the repository, then a revision
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(/[^@]+)?(?:@([\w./-]+))?")


def fetch(
    path: str, option: str, *, revision: str | None = None, token: str | bool | None = None
) -> str:
    """A local path as it is; else `owner/name[/inside][@revision]` of the Hub, downloaded into its
    cache. Returns the local path.

    option: what the path was given for, for messages
    revision: for one that is not in `path`; token: None is the usual one (HF_TOKEN, or a login)
    Raises InputError where there is neither.
    """
    if Path(path).exists():
        return path
    match = _HUB.fullmatch(path)
    if not match or path.startswith("."):
        raise InputError(f"{option}: {path!r} does not exist, and is no owner/name of the Hub")
    from huggingface_hub import snapshot_download

    repo, inside, in_path = match.groups()
    if revision is not None and in_path not in (None, revision):
        raise InputError(f"{option}: {path!r} names a revision, and revision is {revision!r}")
    inside = (inside or "").strip("/")
    patterns = [inside, f"{inside}/*"] if inside else None
    try:
        folder = snapshot_download(
            repo, revision=in_path or revision, allow_patterns=patterns, token=token
        )
    except Exception as error:  # offline, unknown, gated, interrupted: each its own class
        first = str(error).strip().splitlines()[0]
        if (beside := Path(path).parent).is_dir():  # a folder's name that was misspelt
            there = ", ".join(sorted(p.name for p in beside.iterdir())[:_NAMED]) or "nothing"
            raise InputError(
                f"{option}: {path!r} does not exist: {beside} holds {there} (and the Hub has no "
                "such repository, or cannot be asked)"
            ) from None
        raise InputError(
            f"{option}: {path!r} does not exist here, and the Hub did not give it: {first}"
        ) from None
    if not (found := Path(folder, inside)).exists():
        raise InputError(f"{option}: {repo} on the Hub has no {inside!r}")
    return str(found)
