"""`scripts/push_to_hub.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PushConfig:
    """What is published, and where to."""

    head: str
    """Folder of a training run, or of a head that was saved."""
    repo: str
    """Repository on the Hub, USER/NAME; made where it does not exist."""
    private: bool = False
    """Make the repository private. One that exists and is public is refused."""
    pr: bool = False
    """Open a pull request instead of writing to the main branch."""
    dry_run: bool = False
    """Write the card, list what would be uploaded, and reach no network."""
    base_model: str | None = None
    """Hub id of the target, where it was loaded from a folder."""
    license: str | None = None
    """Licence of the head by its Hub name (apache-2.0, llama3.1, ...); none takes the one that the
    target's own card states."""
    card: str | None = None
    """Folder for the card and its pictures; none is `card` in the head's folder."""
