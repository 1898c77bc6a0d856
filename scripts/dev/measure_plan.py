#!/usr/bin/env python
"""Compare what `--plan` says of memory with what the same job then takes, in a process of its own.

Each case plans a job, runs it for a few steps, and reads the kernel's figure of its largest
resident set (wait4). The plan's figure is for the same thing on a CPU: everything that one process
holds at once, interpreter and libraries included (the plan measures those of its own process).
"beside libraries" compares what is left without them. Linux; a CPU.

  python scripts/dev/measure_plan.py --cases wide-train,wide-states,wide-answers,wide-online
  python scripts/dev/measure_plan.py --target MODEL --prompts PROMPTS.jsonl --out plan.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

#: shape of the synthetic target: a wide vocabulary, so that a head is most of a training
VOCAB, HIDDEN, ROW_TOKENS = 32_000, 512, 256
TOLERANCE = 0.2
_QUIET = ["--tracker=null", "--save_steps=1000000"]
_STEPS = ["--optim.steps=3", "--log_steps=1"]

PLAN = """
import importlib, json, sys
from redrafter.cli.args import parse
from redrafter.config import PlanConfig
import redrafter.config as configs
module, function, cls = sys.argv[1:4]
config = parse(getattr(configs, cls), sys.argv[4:], "plan")
plan = getattr(importlib.import_module("redrafter.planning." + module), function)(
    config, PlanConfig(probe_s=0))
need, phase = plan.peak("device")
print(json.dumps({"peak": need, "when": phase.name, "libraries": phase.items[0].n_bytes,
                  "items": {i.name: i.n_bytes for i in phase.items}}))
"""
JOBS = {
    "train": ("train/redrafter.py", "training_job", "plan_training", "TrainConfig"),
    "states": ("data/states.py", "data_jobs", "plan_states", "MakeStatesConfig"),
    "answers": ("data/answers.py", "data_jobs", "plan_answers", "MakeAnswersConfig"),
    "probe": ("data/probe.py", "data_jobs", "plan_probe", "ProbeConfig"),
}


def make_wide(folder: Path, n_rows: int) -> None:
    """A random target without a tokenizer, and random rows for it: prompts, texts, states."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from redrafter.config import StatesConfig
    from redrafter.data.build_rows import write_rows
    from redrafter.data.rows import TokenRow
    from redrafter.data.states import build_states
    from redrafter.targets.load import load_target

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "target")
    for kind, said in (("prompts", False), ("texts", True)):
        rows = [
            TokenRow(tuple(torch.randint(VOCAB, (ROW_TOKENS,)).tolist()), (said,) * ROW_TOKENS, i)
            for i in range(n_rows)
        ]
        texts = write_rows(lambda rows=rows: rows, kind, folder / kind, {"made": "random"})
    target = load_target(str(folder / "target"))
    build_states(target, texts, StatesConfig(), folder / "states", progress=False)


def make_gemma(folder: Path, n_rows: int) -> None:
    """Random weights in the shape of Gemma 3 270M: a tied vocabulary of 262,144, windows."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from redrafter.config import StatesConfig
    from redrafter.data.build_rows import write_rows
    from redrafter.data.rows import TokenRow
    from redrafter.data.states import build_states
    from redrafter.targets.load import load_target

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
        max_position_embeddings=32_768, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder / "gemma")
    rows = [
        TokenRow(tuple(torch.randint(config.vocab_size, (128,)).tolist()), (True,) * 128, i)
        for i in range(n_rows // 6)
    ]
    texts = write_rows(lambda: rows, "texts", folder / "gemma-texts", {"made": "random"})
    target = load_target(str(folder / "gemma"))
    build_states(target, texts, StatesConfig(), folder / "gemma-states", progress=False)


def cases(folder: Path, args: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """name -> (job, its arguments)"""
    wide = f"--target.path={folder}/target"
    out = f"--output_dir={folder}/out"
    stored = [f'--data.stores=["{folder}/states"]', "--eval.prompts=0", *_QUIET, *_STEPS]
    found = {
        "wide-train": ("train", [wide, out, *stored, "--optim.batch_positions=48",
                                 "--loss.cross_entropy=1", "--loss.chunk_rows=512"]),
        "wide-kl": ("train", [wide, out, *stored, "--optim.batch_positions=128", "--loss.kl=1",
                              "--loss.cross_entropy=1", "--loss.chunk_rows=640",
                              "--head.output=target"]),
        "wide-positions": ("train", [wide, out, *stored, "--optim.batch_positions=4096",
                                     "--loss.cross_entropy=1", "--head.draft_vocab_size=500",
                                     "--head.exit_dim=512"]),
        "wide-states": ("states", [wide, out, f"--rows={folder}/texts",
                                   "--states.forward_tokens=32768"]),
        "wide-answers": ("answers", [wide, out, f"--prompts={folder}/prompts",
                                     "--answers.max_new_tokens=16", "--answers.batch_size=96"]),
        "wide-probe": ("probe", [wide, f"--out={folder}/out/probed.safetensors",
                                 "--batch_size=2048"]),
    }  # fmt: skip
    found["gemma-pruned"] = ("train", [
        f"--target.path={folder}/gemma", out, f'--data.stores=["{folder}/gemma-states"]',
        "--eval.prompts=0", *_QUIET, *_STEPS, "--head.draft_vocab_size=8192",
        "--head.output=target", "--loss.kl=0.5", "--loss.cross_entropy=0.5",
    ])  # fmt: skip
    if args.target:
        name = Path(args.target).name
        own = [
            f"--target.path={args.target}",
            out,
            f"--data.source.path={args.prompts}",
            "--data.source.n_rows=400",
            "--data.source.holdout_rows=64",
            *_QUIET,
            *_STEPS,
        ]
        found |= {
            f"{name}-train": ("train", [*own, "--optim.batch_positions=4096"]),
            f"{name}-online": ("train", [*own, "--data.mode=online", "--eval.prompts=0",
                                         "--optim.batch_positions=512"]),
        }  # fmt: skip
    return found


def run(command: list[str], log: Path) -> tuple[int, str]:
    """(largest resident set in bytes, output). Ends the program where the command fails."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    return usage.ru_maxrss * 1024, output


def compare(job: str, arguments: list[str], folder: Path) -> dict:
    launcher, module, function, cls = JOBS[job]
    planner = [sys.executable, "-c", PLAN, module, function, cls, *arguments]
    planned = json.loads(run(planner, folder / "plan.log")[1].splitlines()[-1])
    out = folder / "out"
    subprocess.run(["rm", "-rf", str(out)], check=True)
    measured, _ = run([sys.executable, str(ROOT / launcher), *arguments], folder / "run.log")
    subprocess.run(["rm", "-rf", str(out)], check=True)
    beside = (planned["peak"] - planned["libraries"]) / (measured - planned["libraries"])
    return {
        "planned_bytes": planned["peak"], "measured_bytes": measured, "when": planned["when"],
        "ratio": planned["peak"] / measured, "ratio_beside_libraries": beside,
        "items": planned["items"],
    }  # fmt: skip


def keep(file: Path, found: dict[str, dict]) -> None:
    """Adds to the cases that the file holds already."""
    from redrafter.files import versions, write_json

    before = json.loads(file.read_text())["cases"] if file.is_file() else {}
    write_json(file, {"versions": versions(), "device": "cpu", "cases": {**before, **found}})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", help="comma-separated; default: all that can be run")
    parser.add_argument("--rows", type=int, default=96, help="of a synthetic target (%(default)s)")
    parser.add_argument("--target", help="folder of a real target, for two more cases")
    parser.add_argument("--prompts", help="its prompts (.jsonl)")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args(argv)
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), {}
        known = cases(folder, args)
        asked = args.cases.split(",") if args.cases else list(known)
        for name, make in (("wide", make_wide), ("gemma", make_gemma)):
            if not any(case.startswith(name) for case in asked):
                continue
            # In a process of its own: the kernel counts a parent's memory as its children's, up to
            # the moment that they are another program.
            given = folder, args.rows
            maker = multiprocessing.get_context("spawn").Process(target=make, args=given)
            maker.start()
            maker.join()
            if maker.exitcode:
                raise SystemExit("the synthetic target could not be made")
        for case in asked:
            found[case] = compare(*known[case], folder)
            row = found[case]
            print(
                f"{case:22} planned {row['planned_bytes'] / 1e6:7.0f} MB, measured "
                f"{row['measured_bytes'] / 1e6:7.0f} MB: {row['ratio']:.2f}, beside libraries "
                f"{row['ratio_beside_libraries']:.2f} ({row['when']})", flush=True,
            )  # fmt: skip
            if args.out:
                keep(Path(args.out), found)
    bad = [case for case, row in found.items() if abs(row["ratio"] - 1) > TOLERANCE]
    if bad:
        print(f"off by more than {TOLERANCE:.0%}: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
