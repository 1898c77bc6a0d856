"""Publishing a head: what goes up, the card, and one commit.

The protocol is huggingface_hub's. What is added: everything is read and checked before the network
is touched, a commit holds all files or none, files of an earlier push that are no more are removed,
and every refusal says in one line what happened and what to do. All steps can be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redrafter.config import PushConfig
from redrafter.contracts import InputError
from redrafter.hub.card import model_card
from redrafter.hub.pictures import pictures_or_none
from redrafter.hub.profile import PROFILE, write_profile
from redrafter.hub.release import Files, files_of, is_ours, write_card
from redrafter.hub.run import read_run

_ADVICE = {
    "lossless.json": "redrafter lossless --out RUN/lossless.json checks every token",
    "speed.json": "redrafter speed --out RUN/speed.json measures it",
    "golden": "an export by this version holds a batch to verify copies with",
    "custom_generate": "an export by this version holds code for plain transformers",
}


@dataclass(frozen=True)
class Release:
    """files: path in the repository -> a local path, or the content; card: folder that the card
    was written to; left_out: names in the run's folder that stay; notes: what is missing"""

    files: Files
    card: Path
    left_out: list[str]
    notes: list[str]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }


def prepare(config: PushConfig) -> Release:
    """Read the run, write its card into a folder of its own, gather what is published.

    Raises InputError before anything is written where the run or the name is not right. Reaches the
    network, unless `config.dry_run`, for the target's licence alone.
    """
    check_repo(config.repo)
    files, left_out = files_of(config.head)
    run = read_run(config.head, config.base_model, config.license, online=not config.dry_run)
    if write_profile(config.head, run.head) is None:
        files.pop(PROFILE, None)
    else:
        files[PROFILE] = Path(config.head) / PROFILE
    folder = Path(config.card or Path(config.head) / "card")
    drawn = pictures_or_none(run)
    made = {
        f"pictures/{name}.{kind}": content
        for name, kinds in (drawn or {}).items()
        for kind, content in kinds.items()
    }
    shown = {name: f"pictures/{name}.png" for name in drawn or {}}
    card = model_card(run, config.repo, sorted(files), shown)
    made["README.md"] = card.encode()
    write_card(folder, made)
    names = {part for name in files for part in (name, name.split("/")[0])}
    notes = [f"no {name}: {advice}" for name, advice in _ADVICE.items() if name not in names]
    if drawn is None:
        notes.append("no pictures: they need matplotlib (pip install matplotlib)")
    if run.target.hub_id is None:
        notes.append("the target's Hub id is not known: --base_model OWNER/NAME names it")
    if not run.target.license:
        notes.append("the target's licence is not known: --license NAME states it")
    left_out = [name for name in left_out if Path(config.head, name) != folder]
    return Release({**files, **made}, folder, left_out, notes)


def check_repo(repo: str) -> None:
    """Raises InputError for what is no USER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"repo: {error}") from None
    if repo.count("/") != 1:
        raise InputError(f"repo: {repo!r} must be USER/NAME (or ORGANISATION/NAME)")


def push(release: Release, config: PushConfig, api: Any = None) -> str:
    """Upload in one commit. Returns the address of the commit, or of the pull request.

    api: a huggingface_hub.HfApi; None takes the usual endpoint and token
    Raises InputError saying what happened; the same call may then be made again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo, doing = api or HfApi(), config.repo, "making the repository"
    try:
        if not (config.pr and api.repo_exists(repo)):  # who may not write there may propose
            api.create_repo(repo, private=config.private or None, exist_ok=True)
        doing = "reading what it holds"
        if config.private and not api.repo_info(repo).private:
            raise InputError(
                f"{repo} exists and is public, and --private was asked for: make it private in its "
                "settings on the Hub, take another name, or leave --private out. Nothing was "
                "uploaded"
            )
        there = [name for name in api.list_repo_files(repo) if is_ours(name)]
        doing = "uploading"
        info = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, content) for name, content in release.files.items()),
                *(CommitOperationDelete(name) for name in there if name not in release.files),
            ],
            commit_message="Draft head, with its card",
            create_pr=config.pr,
        )
    except InputError:
        raise
    except Exception as error:  # the library's own, the network's, the file system's: each its own
        raise InputError(what_happened(error, repo, doing, api)) from error
    return info.pr_url or info.commit_url


def what_happened(error: Exception, repo: str, doing: str, api: Any) -> str:
    """One line: what was refused or broke, whether something is published, how to repeat it."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    again = "Nothing is published; run the same command again"
    what = error  # an upload's own error says only which file it was
    while what is not None and not isinstance(what, HfHubHTTPError):
        what = what.__cause__
    error = what or error
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo}: HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it. {again}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = _said(error)
    if status == 401:
        if (api.token or get_token()) is None:
            why = "no token: log in with `hf auth login`, or set HF_TOKEN"
        else:
            why = (
                "the Hub does not accept the token: log in again with `hf auth login`, or set "
                "HF_TOKEN to one that may write (https://huggingface.co/settings/tokens)"
            )
        return f"{repo}: {doing}: {why}. {again}"
    if status == 403:
        user = repo.split("/")[0]
        return (
            f"{repo}: {doing}: the token may not write there ({said}): take one of {user} with "
            f"write access, or another name for --repo. {again}"
        )
    if status == 404:
        return f"{repo}: {doing}: the Hub knows no such repository for this token ({said}). {again}"
    if status in (409, 412):
        return f"{repo}: {doing}: somebody else changed it in the meantime ({said}). {again}"
    if status is not None and (status >= 500 or status == 429):
        return (
            f"{repo}: {doing}: the Hub failed ({said}). Nothing is published, files that had "
            "arrived are kept there: run the same command again, it goes on with the others"
        )
    if status is not None or isinstance(error, ValueError):
        return f"{repo}: {doing}: the Hub refused it ({said}). {again} once that is mended"
    return (
        f"{repo}: {doing}: it broke ({type(error).__name__}: {said}). {again} once the network is "
        "back"
    )


def _said(error: Exception) -> str:
    """The server's own words on one line, or the error's."""
    words = getattr(error, "server_message", None) or str(error)
    return " ".join(words.split())[:300] or type(error).__name__
