"""scripts/gpu_check.py, whole, at toy sizes on a CPU: so that the first run on a GPU is not the
first run."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: a larger tiny target; see tests/test_inflation.py
SHAPE = {
    "model_type": "llama", "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 16, "intermediate_size": 200, "vocab_size": 512,
}  # fmt: skip
TREES = ("head:1x2", "head:2x2")
TOY = [
    "--device=cpu", "--dtype=float32", "--n_prompts=1", "--max_new_tokens=6", "--rounds=1",
    "--trees=1x2,2x2", "--train_vocab=300", "--train_hidden=16", "--positions=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "gpu_check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy(script, tiny_target, published_run, tmp_path, monkeypatch):
    """Runs it and returns (exit status, the file it wrote)."""
    monkeypatch.setattr(script, "_PROBE_S", 0.05)
    (tmp_path / "large").mkdir()
    (tmp_path / "large/config.json").write_text(json.dumps(SHAPE))

    def run(*words, head=published_run):
        given = [f"--target={tiny_target}", f"--like={tmp_path / 'large'}",
                 f"--out={tmp_path / 'out.json'}", f"--head={head}"]  # fmt: skip
        status = script.main([*given, *TOY, *words])
        return status, json.loads((tmp_path / "out.json").read_text())

    return run


@pytest.mark.slow
def test_every_part_runs_and_says_what_it_found(script, toy, capsys):
    status, body = toy()
    parts = body["parts"]
    failed = {name: p for name, p in parts.items() if p["status"] != "done"}
    assert not failed and tuple(parts) == script.PARTS and status == 0
    found = {name: p["found"] for name, p in parts.items()}
    methods = {*TREES, "suffix:10x1"}
    assert found["environment"]["versions"]["torch"]
    reads = {name: counts["host_reads"] for name, counts in found["operations"].items()}
    assert [reads[name] for name in ("plain", *TREES)] == [1.0, 1.0, 1.0]
    for name in ("exact_fp32", "exact_bf16"):
        assert found[name]["unexplained"] == 0 and set(found[name]["methods"]) == methods
        assert {m for by in found[name]["methods"].values() for m in by} == {"greedy", "seeded"}
    # The inflated target's texts are the small one's, and so is what is accepted.
    assert found["tokens"]["inflated"] == found["tokens"]["cpu"]
    assert set(found["tokens"]["cpu"]) == methods
    assert {e["n"] for e in found["costs"]["target"]} >= {1, 2, 3, 5, 9, 17}
    speed = found["speed"]
    assert set(speed["methods"]) == {"stock", "plain", *methods} and speed["exact"]
    graphs = found["graphs"]
    assert set(graphs["methods"]) == {"plain", *TREES} and graphs["recordings"] > 0
    assert all(of["equal_rows"] == speed["n_prompts"] for of in graphs["methods"].values())
    assert found["states"]["tokens_per_second"] > 0
    assert found["training"]["step_s"] > 0 and found["training"]["planned_bytes"] > 300 * 32 * 16
    assert found["training"]["measured_bytes"] is None  # of CUDA alone
    assert found["ddp"] == {"backend": "gloo", "largest_difference": 0.0}
    said = capsys.readouterr().out
    assert "(inflated)" in said and "x stock" in said and "exact_bf16" in said
    assert "graphs: x without" in said


#: hides packages as if they were not installed
BARE = """
import sys
from importlib.machinery import PathFinder
hidden = {"accelerate", "datasets", "peft", "deepspeed", "matplotlib", "pandas", "tensorboard"}
known = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *a, **k: None if name.split(".")[0] in hidden else known(name, *a, **k)
)
sys.path.insert(0, sys.argv[1])
import gpu_check
gpu_check._PROBE_S = 0.05
sys.exit(gpu_check.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_little_beside_torch_and_transformers_is_needed(tiny_target, tmp_path):
    out = tmp_path / "out.json"
    words = [f"--target={tiny_target}", f"--out={out}", "--parts=environment,tokens,training,ddp"]
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(ROOT / "scripts"), *words, f"--like={tmp_path}", *TOY],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        ("environment", "tokens", "training", "ddp"), "done"
    )


def test_a_part_that_fails_is_named_and_the_others_go_on(script, toy, monkeypatch, capsys):
    def broken(self):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(script.Check, "states", broken)
    status, body = toy("--parts=environment,states,ddp")
    assert status == 1
    parts = body["parts"]
    assert [p["status"] for p in parts.values()] == ["done", "failed", "done"]
    assert parts["states"]["why"] == "RuntimeError: no kernel image"
    assert any("broken" in line for line in parts["states"]["where"])
    assert "states: failed RuntimeError: no kernel image" in capsys.readouterr().out


def test_what_is_known_is_written_at_once(script, toy, monkeypatch, tmp_path):
    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.Check, "ddp", stopped)
    with pytest.raises(KeyboardInterrupt):
        toy("--parts=environment,ddp")
    assert list(json.loads((tmp_path / "out.json").read_text())["parts"]) == ["environment"]


def test_what_would_begin_too_late_is_left_out(toy):
    status, body = toy("--parts=environment,ddp", "--seconds=0")
    assert [p["status"] for p in body["parts"].values()] == ["left out", "left out"]
    assert "--seconds 0" in body["parts"]["ddp"]["why"] and status == 0


def test_an_unexplained_difference_is_a_failure(script):
    done = {"status": "done", "found": {"unexplained": 0}}
    assert script.passed({"parts": {"exact_fp32": done}})
    done["found"]["unexplained"] = 1
    assert not script.passed({"parts": {"exact_fp32": done}})
    assert not script.passed({"parts": {"ddp": {"status": "failed", "why": "x"}}})


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--parts=speed,sped"], "--parts: 'sped'"),
        (["--dtype=float12"], "--dtype: 'float12'"),
        (["--target=nowhere/at/all"], "does not exist"),
        (["--prompts=missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_input_is_named_before_any_part(script, tiny_target, words, named, capsys):
    assert script.main([f"--target={tiny_target}", "--device=cpu", *words]) == 2
    assert named in capsys.readouterr().err


def test_the_plan_is_of_the_sizes_that_are_measured(script):
    """Head, averages and gradients of a matrix of V x 2H floats, and the frozen (V, H)."""
    args = script.parse_args(["--target=x", "--dtype=bfloat16"])
    planned = script._planned_bytes(args, script.OptimConfig(batch_positions=args.positions))
    vocab, hidden = args.train_vocab, args.train_hidden
    assert planned > vocab * 2 * hidden * 4 * 4 + vocab * hidden * 2
    assert math.isfinite(planned) and planned < 80e9
