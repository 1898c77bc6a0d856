"""A Hub on this machine for tests: speaks the upload and download protocol, and refuses what the
real one refuses. Kept in memory, one branch per repository; pull requests lie beside it.

    with HubServer({"hf_token": "user"}) as hub:
        HfApi(endpoint=hub.url, token="hf_token")
        hub.fail["commit"] = 1          # the next commit is answered with a 500
        hub.repos["user/name"].files    # path -> bytes
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "llama3.1", "gemma", "other", "unknown"}
NAME = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?")
ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
REGULAR_BYTES = 10_000_000  # larger files are not taken inline
LFS_NAMES = (".safetensors", ".bin", ".png")


class Refused(Exception):
    """An answer that is no success. code: X-Error-Code"""

    def __init__(self, status: int, message: str, code: str = "", **more):
        self.status, self.message, self.code, self.more = status, message, code, more


@dataclass
class Repo:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    lfs: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    pulls: list[dict[str, bytes]] = field(default_factory=list)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_card(text: str) -> list[str]:
    """What the Hub has against a README's metadata."""
    match = re.match(r"---\n(.*?)\n---\s", text, re.S)
    if not match:
        return [] if not text.startswith("---") else ["metadata is not closed by ---"]
    try:
        data = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}".replace("\n", " ")]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    found = []
    for key in ("base_model", "datasets"):
        values = data.get(key, [])
        for value in [values] if isinstance(values, str) else values:
            if not isinstance(value, str) or not ID.fullmatch(value):
                found.append(f'"{key}" with value "{value}" is not valid: use an id of the Hub')
    if data.get("license", "mit") not in LICENSES:
        found.append(f'"license" must be one of {sorted(LICENSES)}')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        found.append('"tags" must be strings')
    for model in data.get("model-index", []):
        for result in model["results"] if model.get("name") else [{}]:
            dataset, metrics = result.get("dataset", {}), result.get("metrics", [{}])
            named = [result.get("task", {}).get("type"), dataset.get("name"), dataset.get("type")]
            named += [metric.get("type") for metric in metrics]
            if not all(isinstance(n, str) and n for n in named):
                found.append('"model-index" lacks a name, or the type of something')
            if not all("value" in metric for metric in metrics):
                found.append('"model-index" has a metric without a value')
    return found


class Hub(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.where, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        with self.server.lock:
            self.server.seen.append((self.command, self.where))
            try:
                status, headers, content = self._route()
            except Refused as no:
                said = {"X-Error-Message": no.message, "X-Error-Code": no.code}
                status, headers = no.status, {k: v for k, v in said.items() if v}
                content = json.dumps({"error": no.message, **no.more}).encode()
        self.send_response(status)
        size = {"Content-Length": str(len(content))}
        for key, value in {**size, "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _route(self) -> tuple[int, dict, bytes]:
        for method, pattern, name in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, self.where)):
                if self.server.fail.get(name, 0) > 0:
                    self.server.fail[name] -= 1
                    raise Refused(500, "Internal Error - try again")
                found = getattr(self, name)(*match.groups())
                return found if isinstance(found, tuple) else (200, {}, json.dumps(found).encode())
        raise Refused(404, f"no such address: {self.command} {self.where}")

    def user(self) -> str | None:
        """Whose token it is; None without one."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if (name := self.server.users.get(given.removeprefix("Bearer "))) is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return name

    def writable(self, name: str, create_pr: bool = False) -> Repo:
        """A repository that this user may change (or propose changes to)."""
        repo = self.readable(name)
        if (user := self.user()) is None:
            raise Refused(401, "Invalid username or password.")
        if not create_pr and name.split("/")[0] != user:
            raise Refused(403, f"Forbidden: you may not write to {name}")
        return repo

    def readable(self, name: str) -> Repo:
        user, repo = self.user(), self.server.repos.get(name)
        if repo is None or (repo.private and name.split("/")[0] != user):
            status = 401 if user is None else 404
            raise Refused(status, "Repository not found", "RepoNotFound")
        return repo

    def json(self) -> dict:
        if not (self.headers.get("Content-Type") or "").startswith(JSON_TYPES):
            raise Refused(415, f"unexpected content type {self.headers.get('Content-Type')}")
        return json.loads(self.body)

    # ---- uploads

    def create(self):
        if (user := self.user()) is None:
            raise Refused(401, "Invalid username or password.")
        asked = self.json()
        owner, name = asked.get("organization") or user, asked["name"]
        if not NAME.fullmatch(name):
            raise Refused(400, f"Invalid repo name: {owner}/{name}")
        if owner != user:
            raise Refused(403, f"You don't have the rights to create a model under {owner}")
        full = f"{owner}/{name}"
        if full in self.server.repos:
            raise Refused(
                409, "You already created this model repo", url=f"{self.server.url}/{full}"
            )
        hidden = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repos[full] = Repo(hidden)
        return {"url": f"{self.server.url}/{full}", "name": full}

    def validate(self):
        errors = check_card(self.json()["content"])
        if errors:
            raise Refused(400, "Invalid metadata", errors=[{"message": e} for e in errors],
                          warnings=[])  # fmt: skip
        return {"errors": [], "warnings": []}

    def preupload(self, name: str, revision: str):
        repo, found = self.writable(name, "create_pr" in self.query), []
        for file in self.json()["files"]:
            path = checked(file["path"])
            base64.b64decode(file["sample"], validate=True)
            lfs = path.endswith(LFS_NAMES) or file["size"] > REGULAR_BYTES
            known = repo.files.get(path)
            oid = None if known is None else (sha256 if path in repo.lfs else blob_id)(known)
            mode = "lfs" if lfs else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": found}

    def lfs_batch(self, name: str):
        self.writable(name, create_pr=True)
        objects = []
        for item in self.json()["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if not re.fullmatch("[0-9a-f]{64}", item["oid"]):
                raise Refused(422, f"oid {item['oid']} is no sha256")
            if item["oid"] not in self.server.objects:
                url = f"{self.server.url}/lfs/{name}"
                entry["actions"] = {"upload": {"href": f"{url}/{item['oid']}"},
                                    "verify": {"href": f"{url}/verify"}}  # fmt: skip
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def lfs(self, name: str, oid: str):
        if sha256(self.body) != oid:
            raise Refused(400, "the content's sha256 is not the oid")
        self.server.objects[oid] = self.body
        return {}

    def verify(self, name: str):
        self.writable(name, create_pr=True)
        asked = self.json()
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "the object was not uploaded")
        return {}

    def commit(self, name: str, revision: str):
        create_pr = "create_pr" in self.query
        repo = self.writable(name, create_pr)
        if self.headers.get("Content-Type") != "application/x-ndjson":
            raise Refused(415, "a commit is application/x-ndjson")
        lines = [json.loads(line) for line in self.body.splitlines()]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
            raise Refused(400, "the first line must be a header with a summary")
        files, lfs = dict(repo.files), set(repo.lfs)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            path = checked(value["path"])
            if key == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refused(404, f"no file {path} to delete", "EntryNotFound")
                lfs.discard(path)
            elif key == "lfsFile":
                if value["algo"] != "sha256" or value["oid"] not in self.server.objects:
                    raise Refused(400, f"{path}: its LFS object was not uploaded")
                files[path] = self.server.objects[value["oid"]]
                lfs.add(path)
            elif key == "file" and value["encoding"] == "base64":
                content = base64.b64decode(value["content"], validate=True)
                if path.endswith(LFS_NAMES) or len(content) > REGULAR_BYTES:
                    raise Refused(400, f"{path}: must be an LFS file")
                files[path] = content
                lfs.discard(path)
            else:
                raise Refused(400, f"unknown line {key}")
        if errors := check_card(files.get("README.md", b"").decode()):
            raise Refused(400, f"README.md: {errors[0]}")
        oid = sha256(self.body)[:40]
        found = {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid}
        if create_pr:
            repo.pulls.append(files)
            number = len(repo.pulls)
            return {**found, "pullRequestUrl": f"{self.server.url}/{name}/discussions/{number}"}
        repo.files, repo.lfs = files, lfs
        repo.commits.append(oid)
        return found

    # ---- downloads

    def info(self, name: str, revision: str | None = None):
        repo = self.readable(name)
        revision_of(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        return {"id": name, "modelId": name, "sha": repo.commits[-1], "private": repo.private,
                "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip

    def tree(self, name: str, revision: str):
        repo = self.readable(name)
        revision_of(repo, revision)
        found = []
        for path, content in sorted(repo.files.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if path in repo.lfs:
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            found.append(entry)
        folders = {"/".join(p.split("/")[:-1]) for p in repo.files if "/" in p}
        return [{"type": "directory", "path": p, "oid": "0" * 40} for p in sorted(folders)] + found

    def resolve(self, name: str, revision: str, path: str):
        repo = self.readable(name)
        sha = revision_of(repo, revision)
        if path not in repo.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = repo.files[path]
        etag = sha256(content) if path in repo.lfs else blob_id(content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Content-Type": "text/plain"}
        return 200, headers, content


def checked(path: str) -> str:
    """A path that stays in its repository."""
    if path.startswith("/") or "\\" in path or {"", ".", "..", ".git"} & set(path.split("/")):
        raise Refused(400, f"Invalid path in repo: {path!r}")
    return path


def revision_of(repo: Repo, revision: str | None) -> str:
    """Only the newest commit is kept."""
    if revision not in (None, "main", repo.commits[-1]):
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return repo.commits[-1]


JSON_TYPES = ("application/json", "application/vnd.git-lfs+json")
_REPO, _REVISION = r"([\w.-]+/[\w.-]+)", "/([^/]+)"
ROUTES = [
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate"),
    (("POST",), f"/api/models/{_REPO}/preupload{_REVISION}", "preupload"),
    (("POST",), f"/{_REPO}.git/info/lfs/objects/batch", "lfs_batch"),
    (("POST",), f"/lfs/{_REPO}/verify", "verify"),
    (("PUT",), f"/lfs/{_REPO}{_REVISION}", "lfs"),
    (("POST",), f"/api/models/{_REPO}/commit{_REVISION}", "commit"),
    (("GET",), f"/api/models/{_REPO}", "info"),
    (("GET",), f"/api/models/{_REPO}/revision{_REVISION}", "info"),
    (("GET",), f"/api/models/{_REPO}/tree{_REVISION}", "tree"),
    (("GET", "HEAD"), f"/{_REPO}/resolve{_REVISION}/(.+)", "resolve"),
]


class HubServer(ThreadingHTTPServer):
    """users: token -> name. fail: name of a route -> how often it answers with a 500 from now on;
    seen: (method, path) of every request; objects: LFS objects that arrived."""

    daemon_threads = True

    def __init__(self, users: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Hub)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.users, self.repos = users, {}
        self.fail: dict[str, int] = {}
        self.seen: list[tuple[str, str]] = []
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()
