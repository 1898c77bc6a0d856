"""What `target.dtype auto` computes in: float32 on a CPU unless bfloat16 is measured to pay."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from redrafter.config import TargetConfig
from redrafter.planning.meta import MetaTarget
from redrafter.targets import precision
from redrafter.targets.load import load_target


@pytest.fixture(scope="module")
def half_target(tiny_target, tmp_path_factory):
    """The tiny target, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "target"
    shutil.copytree(tiny_target, folder)
    weights = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


def loaded(folder):
    return load_target(TargetConfig(str(folder), device="cpu")).dtype


@pytest.mark.parametrize(("units", "ratio", "wanted"), [
    (False, 0.1, torch.float32), (True, 0.4, torch.bfloat16), (True, 0.9, torch.float32),
])  # fmt: skip
def test_a_measurement_decides_where_there_are_matrix_units(
    half_target, monkeypatch, capsys, units, ratio, wanted
):
    monkeypatch.setattr(precision, "has_matrix_units", lambda: units)
    monkeypatch.setattr(precision, "measured_ratio", lambda hidden, inner: ratio)
    assert loaded(half_target) == wanted
    said = capsys.readouterr().err
    line = f"target.dtype auto: {str(wanted)[6:]}, as this CPU multiplies 17 rows"
    assert (line in said) == units
    assert MetaTarget(TargetConfig(str(half_target), device="cpu")).dtype == wanted


def test_other_checkpoints_launches_and_wishes_keep_float32(
    tiny_target, half_target, monkeypatch
):
    monkeypatch.setattr(precision, "has_matrix_units", lambda: True)
    monkeypatch.setattr(precision, "measured_ratio", lambda hidden, inner: 0.1)
    assert loaded(tiny_target) == torch.float32  # its weights would be rounded
    wish = TargetConfig(str(half_target), device="cpu", dtype="float32")
    assert load_target(wish).dtype == torch.float32
    monkeypatch.setattr(precision, "launched", lambda: 2)
    cpu = torch.device("cpu")
    assert precision.auto_dtype(cpu, lambda: pytest.fail("not asked")) == torch.float32
    assert precision.auto_dtype(torch.device("cuda"), lambda: pytest.fail("not asked")) is None


def test_the_measurement_is_a_ratio_of_two_times():
    found = precision.measured_ratio(64, 128)
    assert 0 < found < float("inf")
