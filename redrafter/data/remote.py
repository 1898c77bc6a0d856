"""Files of a folder that is local or anywhere fsspec reaches (s3://, gs://, hf://, memory://)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from redrafter.contracts import InputError
from redrafter.files import cache_folder, digest_file, digest_json


class Folder(Protocol):
    def exists(self, name: str) -> bool: ...

    def local(self, name: str, size: int | None = None, sha256: str | None = None) -> Path:
        """A path on this machine with the content of a file. size in bytes and sha256 are what is
        expected of it, where known."""
        ...


class LocalFolder:
    def __init__(self, path: str | Path):
        self.path = Path(path)

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def local(self, name: str, size: int | None = None, sha256: str | None = None) -> Path:
        return self.path / name


class RemoteFolder:
    """Files are fetched whole when first asked for, and kept in the cache folder
    ($REDRAFTER_CACHE, else redrafter/ in the user's cache)."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.fs, self.path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise InputError(f"{url}: {error}") from None
        self.cache = cache_folder() / digest_json(self.url)[:24]

    def exists(self, name: str) -> bool:
        try:
            return self.fs.exists(f"{self.path}/{name}")
        except Exception as error:  # every backend has its own class of network error
            raise InputError(f"{self.url}: cannot be reached ({error})") from error

    def local(self, name: str, size: int | None = None, sha256: str | None = None) -> Path:
        # Named after its content where that is known: a store that was made anew may have files of
        # the same name and size. What has no digest (the manifest) is fetched every time.
        kept = self.cache / (name if sha256 is None else f"{name}.{sha256[:16]}")
        if sha256 is not None and kept.exists() and kept.stat().st_size == size:
            return kept
        self.cache.mkdir(parents=True, exist_ok=True)
        part = self.cache / f".{name}.{os.getpid()}.part"
        try:
            self.fs.get_file(f"{self.path}/{name}", str(part))
        except Exception as error:
            part.unlink(missing_ok=True)
            raise InputError(f"{self.url}/{name}: cannot be fetched ({error})") from error
        if sha256 is not None and digest_file(part) != sha256:
            part.unlink()
            raise InputError(f"{self.url}/{name} is damaged: its digest differs from the manifest")
        os.replace(part, kept)
        return kept


def open_folder(folder: str | Path) -> Folder:
    """A local path, or a URL with ://."""
    return RemoteFolder(str(folder)) if "://" in str(folder) else LocalFolder(folder)
