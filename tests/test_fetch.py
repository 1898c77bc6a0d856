"""Paths of the Hub, with a substituted download."""

import huggingface_hub
import pytest

from redrafter.contracts import InputError
from redrafter.fetch import fetch


def test_a_local_path_is_left_alone(tmp_path):
    assert fetch(str(tmp_path), "head") == str(tmp_path)


def test_a_repository_or_a_part_of_it(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "b.safetensors").write_bytes(b"")

    def download(repo, revision=None, allow_patterns=None, token=None):
        asked.append((repo, revision, allow_patterns, token))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("me/heads", "head") == str(tmp_path)
    want = str(tmp_path / "tables" / "b.safetensors")
    assert fetch("me/heads/tables/b.safetensors@v1.2", "bigrams") == want
    fetch("me/heads", "head", revision="v2", token="hf_x")
    assert asked == [
        ("me/heads", None, None, None),
        ("me/heads", "v1.2", ["tables/b.safetensors", "tables/b.safetensors/*"], None),
        ("me/heads", "v2", None, "hf_x"),
    ]
    with pytest.raises(InputError, match="'me/heads@v1' names a revision, and revision is 'v2'"):
        fetch("me/heads@v1", "head", revision="v2")
    with pytest.raises(InputError, match="bigrams: me/heads on the Hub has no 'c'"):
        fetch("me/heads/c", "bigrams")


@pytest.mark.parametrize("path", ["nowhere", "/a/b", "./me/heads", "me/heads/x y z@@"])
def test_neither_here_nor_there(path):
    with pytest.raises(InputError, match="head:"):
        fetch(path, "head")


def test_the_hub_says_no(monkeypatch):
    def download(*args, **kwargs):
        raise OSError("offline mode is enabled\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"draft: 'me/heads' .* offline mode is enabled$"):
        fetch("me/heads", "draft")


def test_a_misspelt_local_folder_is_no_matter_of_the_hub(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("couldn't connect")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    for name in ("head", "notes"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="head: 'runs/haed' does not exist: runs holds head, not"):
        fetch("runs/haed", "head")
    with pytest.raises(InputError, match="the Hub did not give it: couldn't connect"):
        fetch("me/heads", "head")
