"""Publishing a head: the round trip through a local Hub, refusals and repeats."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer, check_card, sha256
from huggingface_hub import HfApi, constants
from published import released

from redrafter.cli.push import main, switched
from redrafter.contracts import InputError
from redrafter.hub.push import prepare, push
from redrafter.hub.release import is_ours, without_folders

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def hub(monkeypatch):
    """A Hub for clients of this process, whose retries do not wait."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with HubServer({"hf_me": "me", "hf_you": "you"}) as server:
        yield server


def api(hub: HubServer, token: str | bool = "hf_me") -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


# ------------------------------------------------------------------------------ round trip

#: by one process, whose imports take longer than all the rest
THERE_AND_BACK = """
import json, runpy, sys
script, local, card, target_path, out = sys.argv[1:]
sys.argv = [script, "--head", local, "--card", card, "--repo", "me/tiny"]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as ended:
    if ended.code:
        raise

from huggingface_hub import snapshot_download
from redrafter import RecurrentHead, generate, load_head, load_target
from redrafter.cli.verify import main as verify

folder = snapshot_download("me/tiny")
target = load_target(target_path)
text = "def main():"
options = dict(max_new_tokens=12, temperature=1.0)
heads = {
    "local": local, "copy": folder, "id": "me/tiny", "revision": "me/tiny@main",
    "pretrained": RecurrentHead.from_pretrained("me/tiny").bind(target),
    "load_head": load_head("me/tiny", target, revision="main", token="hf_me"),
}
found = {n: generate(target, text, head=h, **options) for n, h in heads.items()}
steps = {n: (g.tokens, g.stats.steps, g.stats.accepted_at) for n, g in found.items()}
verified = verify(["me/tiny", f"--target.path={target_path}"])
json.dump({"folder": folder, "steps": steps, "verified": verified}, open(out, "w"))
"""


def client(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    """The environment of a user of this Hub."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return {
        **kept, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more,
    }  # fmt: skip


def test_a_run_goes_up_and_comes_down_the_same(published_run, tiny_target, hub, tmp_path):
    script, out = ROOT / "scripts" / "push_to_hub.py", tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-c", THERE_AND_BACK, script, published_run, tmp_path / "card",
         tiny_target, out],
        env=client(hub, tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: checkpoints, data, notes.txt" in done.stdout.replace("logs, ", "")
    repo = hub.repos["me/tiny"]
    assert f"published: {hub.url}/me/tiny/commit/{repo.commits[-1]}" in done.stdout
    assert len(repo.commits) == 2, "one commit"
    wanted = {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "config.yaml",
        "provenance.json", "lossless.json", "speed.json", "disco/config.json",
        "speculation_profile.json",
    }  # fmt: skip
    pictures = {f"pictures/{n}.{k}" for n in ("training", "speedup", "acceptance")
                for k in ("png", "svg")}  # fmt: skip
    folders = ("golden", "custom_generate")  # written by the training, whole
    exported = {f"{d}/{f.name}" for d in folders for f in (published_run / d).iterdir()}
    assert {"golden/golden.json", "custom_generate/generate.py"} < exported
    assert set(repo.files) == wanted | pictures | exported
    assert repo.lfs >= {"model.safetensors"}

    found = json.loads(out.read_text())
    for name in ("config.json", "model.safetensors"):
        assert (Path(found["folder"]) / name).read_bytes() == (published_run / name).read_bytes()
    assert found["verified"] == 0
    assert found["steps"]["local"][0][0]
    for name, steps in found["steps"].items():
        assert steps == found["steps"]["local"], name


def test_nothing_published_names_a_folder_of_this_machine(published_run, hub):
    release, config = released(published_run, card=str(published_run.parent / "card"))
    push(release, config, api(hub))
    repo = hub.repos["me/tiny"]
    texts = {n: c.decode() for n, c in repo.files.items() if n.endswith((".json", ".yaml", ".md"))}
    assert len(texts) > 6
    secret = [str(published_run.parent), str(Path(sys.executable).parent), str(ROOT)]
    for name, text in texts.items():
        assert not [path for path in secret if path in text], name
    local = json.loads((published_run / "speed.json").read_text())
    assert json.loads(texts["speed.json"])["methods"] == local["methods"], "figures stay"
    config_there = yaml.safe_load(texts["config.yaml"])
    assert config_there["data"]["source"]["path"] == "prompts_train.jsonl"


# ------------------------------------------------------------------------- broken and refused

AGAIN = r"me/tiny: .*: the Hub failed \(.*Internal Error.*\)\. Nothing is published, .* again"
ROUTES = ["create", "tree", "validate", "preupload", "lfs_batch", "lfs", "verify", "commit"]


@pytest.mark.parametrize("where", ROUTES)
def test_a_500_is_named_and_a_repeat_succeeds(run, hub, where):
    release, config = released(run)
    hub.fail[where] = 99
    with pytest.raises(InputError, match=AGAIN) as error:
        push(release, config, api(hub))
    assert "\n" not in str(error.value)
    repo = hub.repos.get("me/tiny")
    assert repo is None or set(repo.files) == {".gitattributes"}
    hub.fail.clear()
    hub.seen.clear()
    assert "/commit/" in push(release, config, api(hub))
    assert set(hub.repos["me/tiny"].files) == {".gitattributes", *release.files}
    sent = [path for method, path in hub.seen if method == "PUT"]
    if where == "commit":
        assert not sent, "what had arrived is not sent again"


@pytest.mark.parametrize("where", ["preupload", "lfs", "commit"])
def test_one_500_in_the_middle(run, hub, where):
    """The library repeats what may be repeated by itself; a commit may have arrived."""
    release, config = released(run)
    hub.fail[where] = 1
    if where == "commit":
        with pytest.raises(InputError, match=AGAIN):
            push(release, config, api(hub))
    assert push(release, config, api(hub))
    assert set(hub.repos["me/tiny"].files) == {".gitattributes", *release.files}


def test_refusals_say_what_to_do(run, hub, monkeypatch):
    release, config = released(run)
    for token, repo, match in (
        ("hf_old", "me/tiny", "does not accept the token: log in again .* or set HF_TOKEN"),
        (False, "me/tiny", "making the repository: no token: log in with `hf auth login`"),
        ("hf_me", "you/tiny", "the token may not write there .*take one of you with write access"),
    ):
        with pytest.raises(InputError, match=match) as error:
            push(release, replace(config, repo=repo), api(hub, token))
        assert "run the same command again" in str(error.value) and not hub.repos
        assert "\n" not in str(error.value) and "hf_" not in str(error.value)
    for repo in ("tiny", "me/a/b", "me/ti ny", "me/x..y", "me/-x"):
        with pytest.raises(InputError, match="repo: "):
            prepare(replace(config, repo=repo, dry_run=True))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        push(release, config, api(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.server_close()
    with pytest.raises(InputError, match=r"it broke .* once the network is back"):
        push(release, config, HfApi(endpoint="http://127.0.0.1:9", token="hf_me"))


def test_metadata_that_the_hub_refuses_stops_before_any_file(run, hub):
    release, config = released(run, license="my own")
    with pytest.raises(InputError, match=r"the Hub refused it .*license"):
        push(release, config, api(hub))
    assert not hub.objects and set(hub.repos["me/tiny"].files) == {".gitattributes"}


def test_an_existing_repository(run, hub):
    """A repeat is one more commit, or none; what is no more is removed, what is not ours stays."""
    release, config = released(run)
    push(release, config, api(hub))
    repo = hub.repos["me/tiny"]
    push(release, config, api(hub))
    assert len(repo.commits) == 2, "nothing changed"
    repo.files["LICENSE"] = b"theirs"
    repo.files["golden/old.json"] = b"{}"
    (run / "lossless.json").unlink()
    release, config = released(run)
    push(release, config, api(hub))
    assert set(repo.files) == {".gitattributes", "LICENSE", *release.files}
    assert len(repo.commits) == 3 and "lossless.json" not in repo.files


def test_private_and_pull_requests(run, hub):
    release, config = released(run, private=True)
    push(release, config, api(hub))
    assert hub.repos["me/tiny"].private
    with pytest.raises(InputError, match="exists and is public, and --private was asked for"):
        hub.repos["me/tiny"].private = False
        push(release, config, api(hub))
    release, config = released(run, pr=True)
    repo = hub.repos["me/tiny"]
    before = dict(repo.files)
    (run / "speed.json").unlink()
    release, config = released(run, pr=True)
    where = push(release, config, api(hub, "hf_you"))  # who may not write may propose
    assert where == f"{hub.url}/me/tiny/discussions/1"
    assert repo.files == before and "speed.json" not in repo.pulls[0]


def test_a_dry_run_reaches_no_network(run, hub, monkeypatch, capsys):
    def no(*args):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", no)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    base = ["--head", str(run), "--repo", "me/tiny"]
    main([*base, "--dry-run", "--base-model=owner/model"])
    shown = capsys.readouterr().out
    assert not hub.seen and "dry run: nothing was uploaded" in shown
    card = (run / "card" / "README.md").read_bytes()
    sizes = {n: int(s.replace(",", "")) for s, n in re.findall(r"^ +([\d,]+)  (\S+)$", shown, re.M)}
    assert sizes["README.md"] == len(card)
    assert sizes["model.safetensors"] == (run / "model.safetensors").stat().st_size
    assert (run / "card" / "pictures" / "training.png").stat().st_size > 5000
    assert "left out: notes.txt\n" in shown.replace("logs, ", "")
    with pytest.raises(AssertionError, match="opened"):  # the test would see one
        HfApi(endpoint=hub.url).model_info("me/tiny")


def test_switches():
    given = ["--dry-run", "--pr", "--private", "true", "--dry-run=false", "--repo", "me/pr",
             "--base-model", "a-b/c-d"]  # fmt: skip
    wanted = ["--dry_run=true", "--pr=true", "--private", "true", "--dry_run=false", "--repo",
              "me/pr", "--base_model", "a-b/c-d"]  # fmt: skip
    assert switched(given) == wanted


# ---------------------------------------------------------------------------- texts and names


def test_folders_are_left_out_of_texts():
    for text, wanted in {
        "/data/me/model": "model", "~/x/y.json": "y.json", "C:\\me\\x y\\z.bin": "z.bin",
        "/a/with space/m": "m", "runs/head": "runs/head", "s3://bucket/a/b": "s3://bucket/a/b",
        "https://host/a/b": "https://host/a/b", "--target.path=/a/b/c": "--target.path=c",
        '["/a/b/states", "/c/more=0.5"]': '["states", "more=0.5"]', "/a/b=0.5": "b=0.5",
        "head /a/b/c was trained on /d/e.jsonl (x)": "head c was trained on e.jsonl (x)",
        "3/4": "3/4", "1/2 x": "1/2 x", "owner/name": "owner/name", "a=/b/c": "a=c",
    }.items():  # fmt: skip
        assert without_folders(text) == wanted
    assert without_folders({"a": ["/b/c", 1, None]}) == {"a": ["c", 1, None]}
    assert is_ours("disco/config.json") and is_ours("pictures/a.png")
    for name in ("checkpoints/step-1/model.safetensors", "logs/a.json", "data/x/manifest.json",
                 "optimizer.safetensors", ".gitattributes", "LICENSE", "a/README.md"):  # fmt: skip
        assert not is_ours(name)


# ---------------------------------------------------------------------------- the Hub of the tests


def ask(hub, method, path, body=b"", token="hf_me", kind="application/json"):
    headers = {"Content-Type": kind, **({"Authorization": f"Bearer {token}"} if token else {})}
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(hub.url + path, body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_hub_refuses_what_the_real_one_refuses(hub):
    create = "/api/repos/create"
    assert ask(hub, "POST", create, {"name": "a", "organization": "me"}, token=None) == 401
    assert ask(hub, "POST", create, {"name": "a", "organization": "me"}, token="hf_no") == 401
    assert ask(hub, "POST", create, {"name": "a", "organization": "you"}) == 403
    for bad in ("-a", "a--b", "a..b", "a b", "a.git", "x" * 97):
        assert ask(hub, "POST", create, {"name": bad, "organization": "me"}) == 400
    assert ask(hub, "POST", create, {"name": "a", "organization": "me"}) == 200
    assert ask(hub, "POST", create, {"name": "a", "organization": "me"}) == 409
    oid, content = sha256(b"weights"), b"weights"
    lfs_file = {"key": "lfsFile", "value": {"path": "m.bin", "algo": "sha256", "oid": oid}}

    def commit(*lines, kind="application/x-ndjson", head=True):
        first = [{"key": "header", "value": {"summary": "s"}}] if head else []
        body = b"".join(json.dumps(line).encode() + b"\n" for line in [*first, *lines])
        return ask(hub, "POST", "/api/models/me/a/commit/main", body, kind=kind)

    def file(path, text):
        content = base64.b64encode(text).decode()
        value = {"path": path, "content": content, "encoding": "base64"}
        return {"key": "file", "value": value}

    assert commit(lfs_file) == 400, "not uploaded"
    assert ask(hub, "PUT", f"/lfs/me/a/{oid}", b"other") == 400, "another sha256"
    assert ask(hub, "POST", "/lfs/me/a/verify", {"oid": oid, "size": 7}) == 404
    assert ask(hub, "PUT", f"/lfs/me/a/{oid}", content) == 200
    assert ask(hub, "POST", "/lfs/me/a/verify", {"oid": oid, "size": 8}) == 404
    assert commit(lfs_file, kind="application/json") == 415
    assert commit(lfs_file, head=False) == 400
    for path in ("../x", "/x", "a/../../x", ".git/config", "a\\x", "a//b"):
        assert commit(file(path, b"x")) == 400, path
    assert commit(file("m.safetensors", b"x")) == 400, "must be LFS"
    assert commit({"key": "deletedFile", "value": {"path": "none"}}) == 404
    assert commit(file("README.md", b"---\nlicense: [\n---\n")) == 400
    assert hub.repos["me/a"].files == {".gitattributes": b""}
    assert commit(lfs_file, file("README.md", b"# a")) == 200
    assert hub.repos["me/a"].files["m.bin"] == content
    for text in (
        "base_model: ./x y",
        "license: mine",
        "datasets: [a/b/c]",
        "- a",
        "tags: [1]",
        "model-index: [{name: a, results: [{task: {type: t}, metrics: [{type: m}]}]}]",
    ):
        assert check_card(f"---\n{text}\n---\n"), text
        wrong = {"content": f"---\n{text}\n---\n", "repoType": "model"}
        assert ask(hub, "POST", "/api/validate-yaml", wrong) == 400
    assert ask(hub, "GET", "/api/models/me/none") == 404
    assert ask(hub, "GET", "/me/a/resolve/main/none.txt") == 404
    assert ask(hub, "GET", "/me/a/resolve/v9/README.md") == 404
