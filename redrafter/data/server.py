"""An OpenAI-compatible server over HTTP: one request, its retries, and what its refusals mean.

    succeeds       200 with a body that the reader takes
    again          no connection, a timeout, a body that ends early or is none; 408, 409, 425, 429,
                   5xx: after a while, up to `retries` times, then `Failed`
    refused        other 4xx: this request alone, in the server's own words
    InputError     401, 403, 404: key, path or model are wrong, and every request will fare alike

No connection is kept, so an answer that came late can never be read as another request's.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from redrafter.config import RequestsConfig
from redrafter.contracts import InputError

Read = TypeVar("Read")

_AGAIN = {408, 409, 425, 429}
_LONGEST_S = 60.0  # between two tries, where the server asks for no more
_WORDS = 300  # characters of what a server says


class Refused(Exception):
    """The server does not take this request, or its answer cannot be used."""


class Failed(Exception):
    """No answer after all tries."""


class Again(Exception):
    """Another try may succeed. after_s: the server's own wish"""

    def __init__(self, why: str, after_s: float = 0.0):
        super().__init__(why)
        self.after_s = after_s


class Server:
    """Asks; safe to use from several threads.

    url: as OpenAI's clients take it, .../v1 (put there where a URL has no path)
    model: the name in `config`, or the only one that the server lists
    stop: once set, nobody waits for another try
    Raises InputError where nothing answers there, or it lists several models or none.
    """

    def __init__(self, url: str, config: RequestsConfig):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"answers.server: {url!r} is no URL; such as http://HOST:8000/v1")
        self.url = url.rstrip("/") + ("/v1" if parts.path.strip("/") == "" else "")
        self.config, self.stop = config, threading.Event()
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get(config.key_from):
            self._headers["Authorization"] = f"Bearer {key}"
        self.model = config.model or self._only_model()

    def ask(self, path: str, body: dict[str, Any], read: Callable[[Any], Read]) -> tuple[Read, int]:
        """(what `read` makes of the JSON that comes back, tries that went wrong before it).

        read: raises Again for a body that is not what it should be
        """
        why = ""
        for attempt in range(self.config.retries + 1):
            try:
                return read(self._send(path, body)), attempt
            except Again as error:
                why, wished = str(error), error.after_s
            if attempt < self.config.retries:
                wait = min(self.config.backoff_s * 2**attempt, _LONGEST_S)
                # Not all at once: those that were refused together come back one by one.
                if self.stop.wait(max(wished, wait * random.uniform(0.5, 1.0))):
                    break
        raise Failed(f"no answer from the server after {attempt + 1} tries: {why}")

    def _only_model(self) -> str:
        try:
            listed, _ = self.ask("/models", {}, lambda made: [m["id"] for m in made["data"]])
        except (Failed, Refused, KeyError, TypeError) as error:
            raise InputError(
                f"{self.url}/models does not say which models are served ({error}): is the server "
                "up, and the URL right? Name the model with --answers.requests.model otherwise"
            ) from None
        if len(listed) != 1:
            raise InputError(
                f"{self.url} serves {listed or 'no model'}: say which is the target, with "
                "--answers.requests.model"
            )
        return listed[0]

    def _send(self, path: str, body: dict[str, Any]) -> Any:
        """GET without a body, else POST. Returns the JSON."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout_s) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:  # timeouts are OSErrors
            raise Again(_short(str(getattr(error, "reason", error)) or repr(error))) from None
        except ValueError as error:  # no JSON, or no text at all
            raise Again(f"a body that is no JSON ({error})") from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        words, status = _words(error), error.code
        if status in (401, 403):
            there = "is set" if "Authorization" in self._headers else "is not set"
            return InputError(
                f"{self.url} refuses the key ({status}: {words}): it is read from the environment "
                f"variable {self.config.key_from} (--answers.requests.key_from), which {there}"
            )
        if status == 404:
            return InputError(
                f"{error.url} is not known there ({status}: {words}): is the URL right, the model "
                "served under that name, and this kind of request (--answers.requests.send)?"
            )
        if status in _AGAIN or status >= 500:
            try:
                wished = float(error.headers.get("Retry-After", 0))
            except ValueError:  # a date
                wished = 0.0
            return Again(f"{status}: {words}", wished)
        return Refused(f"the server refuses it ({status}: {words})")


def _words(error: urllib.error.HTTPError) -> str:
    """What a server says about a refusal."""
    try:
        said = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        found = json.loads(said)
        found = found.get("error", found)
        said = found["message"] if isinstance(found, dict) else found
    except (ValueError, KeyError, AttributeError):
        pass
    return _short(str(said)) or str(error.reason)


def _short(text: str) -> str:
    return " ".join(text.split())[:_WORDS]
