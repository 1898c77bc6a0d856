"""A target's probe is passed once, for as long as nothing changes that it depends on."""

import os
import shutil
import sys

import pytest
from models import tiny
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.targets import passed
from redrafter.targets.load import load_target
from redrafter.targets.model import Target


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "cache"))
    tiny("llama").model.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def probed(monkeypatch):
    """The targets that are probed."""
    found, check = [], passed.check_target
    monkeypatch.setattr(
        passed, "check_target", lambda target: (found.append(target), check(target))
    )
    return found


def load(folder, dtype="float32", **more):
    config = TargetConfig(str(folder), device="cpu", dtype=dtype, forward="model", **more)
    return load_target(config)


def test_it_is_passed_once(folder, probed):
    first = load(folder)
    again = load(folder)
    assert probed == [first]
    assert first.fingerprint() == again.fingerprint()
    Target(again.model)  # not from a folder: its own check, each time
    assert len(probed) == 1 and len(list((folder.parent / "cache" / "probed").iterdir())) == 1


def other_weights(folder, monkeypatch):
    file = folder / "model.safetensors"
    weights, times = load_file(file), file.stat()
    weights["model.norm.weight"] *= 2
    save_file(weights, file, {"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as tools that copy do
    assert file.stat().st_size == times.st_size


def other_configuration(folder, monkeypatch):
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def other_version(folder, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.99.0")


def other_code(folder, monkeypatch):
    """As libraries of faster kernels do it."""
    real = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *given: real(*given))


def other_forward(folder, monkeypatch):
    real = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: real(self, x))


def other_kernels(folder, monkeypatch):
    sources = shutil.copytree(passed.SOURCES, folder.parent / "csrc")
    (sources / "vectors.h").write_text("\n" + (sources / "vectors.h").read_text())
    monkeypatch.setattr(passed, "SOURCES", sources)


CHANGES = [
    other_weights, other_configuration, other_version, other_code, other_forward, other_kernels,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changed_is_probed(folder, probed, monkeypatch, change):
    load(folder)
    change(folder, monkeypatch)
    load(folder)
    assert len(probed) == 2
    load(folder)
    assert len(probed) == 2


def test_another_dtype_is_probed(folder, probed):
    for dtype, expected in (("float32", 1), ("float64", 2), ("bfloat16", 3), ("float64", 3)):
        load(folder, dtype)
        assert len(probed) == expected


def test_another_adapter_is_probed(folder, probed, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model = load(folder).model
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    for expected in (2, 2):
        load(tmp_path / "adapter", base=str(folder))
        assert len(probed) == expected
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: w + 0.01 for name, w in weights.items()}, file, {"format": "pt"})
    load(tmp_path / "adapter", base=str(folder))
    assert len(probed) == 3


def test_a_class_that_went_wrong_since_is_refused(folder, monkeypatch):
    load(folder)
    real = modeling_llama.LlamaModel.forward

    def causal(self, *args, attention_mask=None, **kwargs):
        return real(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", causal)
    with pytest.raises(InputError, match=r"ignores masks of single keys .*; it cannot be a target"):
        load(folder)


def test_a_refusal_is_not_remembered(folder, probed):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 1e9
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for _ in range(2):
        with pytest.raises(InputError, match=r"not finite in torch\.float16"):
            load(folder, "float16")
    assert len(probed) == 2


def test_a_model_that_was_changed_after_it_was_made_is_not_remembered(folder, probed):
    model = load(folder).model
    files = [passed.files_of(str(folder))]
    for change in (
        lambda: model.model.layers[0].register_forward_hook(lambda *_: None),
        lambda: setattr(model.model, "forward", model.model.forward),
    ):
        probed.clear()
        change()
        for _ in range(2):
            Target(model, check=lambda target: passed.check_once(target, files))
        assert len(probed) == 2


def test_without_a_cache_folder_it_loads(folder, probed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REDRAFTER_CACHE", str(tmp_path / "file"))
    for expected in (1, 2):
        load(folder)
        assert len(probed) == expected


def test_a_repository_is_its_snapshot(folder, monkeypatch, tmp_path):
    """Files of the Hub, as they lie in its cache: links into a folder of blobs."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    found = {("some/model", "main"): str(snapshot / "config.json")}

    def cached(path, name, revision, local_files_only):
        assert name == "config.json" and local_files_only, "no look-up over the network"
        if (path, revision) not in found:
            raise OSError(path)
        return found[path, revision]

    monkeypatch.setattr("transformers.utils.cached_file", cached)
    assert passed.files_of("some/model") is None
    place, *files = passed.files_of("some/model", "main")
    assert place == str(snapshot) and files == passed.files_of(str(folder))[1:]

