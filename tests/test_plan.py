"""`--plan`: shapes against real models, traces against real tensors, and a whole job against what
the kernel says it took."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import FAMILIES, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from redrafter.cli.args import parse
from redrafter.cli.states import main as make_states
from redrafter.cli.train_redrafter import main as train
from redrafter.config import (
    HeadConfig,
    LoraSettings,
    LossConfig,
    MakeStatesConfig,
    OptimConfig,
    PlanConfig,
    StatesConfig,
    TargetConfig,
    TrainConfig,
    TreeConfig,
)
from redrafter.contracts import InputError
from redrafter.data.build_rows import write_rows
from redrafter.data.rows import TokenRow
from redrafter.data.states import StateMaker, build_states
from redrafter.data.store import Store
from redrafter.decode import noise
from redrafter.drafters.head import HeadDrafter
from redrafter.heads.lora import adapt
from redrafter.heads.recurrent import RecurrentHead
from redrafter.planning import memory
from redrafter.planning.data_jobs import plan_probe, plan_states
from redrafter.planning.meta import MetaTarget, has_weights, meta_head
from redrafter.planning.plan import Disk, Item, Memory, Phase, Plan
from redrafter.planning.speed import bound
from redrafter.planning.tracing import traced
from redrafter.planning.training_job import plan_training
from redrafter.planning.world import World, shares, world_of
from redrafter.targets.load import load_target
from redrafter.targets.text import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
LLAMA = ROOT / "configs/plan"
HEADS = {
    "plain": {},
    "gru": {"cell": "gru", "num_draft_layers": 1, "input_norm": True},
    "narrow": {"exit_dim": 24, "draft_vocab_size": 40},
    "borrowed": {"output": "target", "cell": "sum", "first_state": "paper"},
    "borrowed, pruned": {"output": "target", "draft_vocab_size": 40},
}
OFF = PlanConfig(probe_s=0)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Folder of a random target without tokenizer: grouped keys, embeddings of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("target")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(target):
    """(meta, real)"""
    config = TargetConfig(path=str(target), device="cpu")
    return MetaTarget(config), load_target(config)


def rows_of(folder: Path, n: int = 40, length: int = 50) -> Path:
    rows = [TokenRow(tuple((i + j) % 600 for j in range(length)), (True,) * length, i)
            for i in range(n)]  # fmt: skip
    write_rows(lambda: rows, "texts", folder, {"made": "here"})
    return folder


def plan_config(cls, target, **values):
    return parse(cls, [f"--target.path={target}", *(f"--{k}={v}" for k, v in values.items())], "x")


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_meta_target_has_the_parameters_of_the_real_target(family, tmp_path):
    real = tiny(family)
    real.model.config.save_pretrained(tmp_path)
    meta = MetaTarget(TargetConfig(path=str(tmp_path), dtype="float64"))
    assert meta.n_parameters == sum(p.numel() for p in real.model.parameters())
    assert (meta.hidden_size, meta.vocab_size) == (real.hidden_size, real.vocab_size)
    assert meta.dtype == real.dtype and meta.device.type == "meta"
    assert not has_weights(TargetConfig(path=str(tmp_path)))


@pytest.mark.parametrize("way", ["kernels", "without"])
@pytest.mark.parametrize("forward", ["auto", "model"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_copies_that_products_are_faster_by_are_planned(family, forward, way, tmp_path, request):
    """Wide enough for some to be packed: the lm_head, and of a fused forward's layers those of the
    MLP, or by kernels all."""
    if way == "without":
        request.getfixturevalue("no_kernels")
    wide = dict(vocab_size=4096, hidden_size=128, intermediate_size=4096)
    tiny.__wrapped__(family, **wide).model.float().save_pretrained(tmp_path)
    config = TargetConfig(path=str(tmp_path), device="cpu", dtype="float32", forward=forward)
    real = load_target(config)
    products = [real.lm_product]
    for layer in real.fused.layers if real.fused else ():
        products += [m.product for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    packed = [p.matrix.nbytes for p in products if p._packed is not None or p.panels is not None]
    each = 4 if products[0].panels is not None else 2
    assert len(packed) == (1 + 2 * each if real.fused else 1)
    assert MetaTarget(config).copied_bytes == sum(packed)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496),
        ("vicuna-7b", 6_738_415_616), ("qwen3-8b", 8_190_735_360), ("gemma-3-1b", 999_885_952),
    ],
)  # fmt: skip
def test_targets_are_as_large_as_published(name, parameters):
    config = TargetConfig(path=str(LLAMA / name), device="cuda")
    meta = MetaTarget(config)
    with pytest.raises(InputError):  # none is made out of nothing
        load_tokenizer(config)
    assert meta.n_parameters == parameters and meta.weight_bytes == 2 * parameters
    wide, vocab = 2 * meta.hidden_size, meta.vocab_size
    head = sum(p.numel() for p in meta_head(HeadConfig(), meta).parameters())
    hidden = meta.hidden_size
    assert head == 2 * hidden**2 + hidden + 2 * (wide**2 + wide) + vocab * wide


@pytest.mark.usefixtures("files_unseen")
@pytest.mark.parametrize("name", ["vicuna-7b", "llama-3.1-8b", "qwen3-8b", "gemma-3-1b"])
def test_the_recipes_say_what_their_configurations_give(name):
    said = (ROOT / "docs/recipes.md").read_text()
    given = ["--config", str(ROOT / f"configs/{name}.yaml"), "--output_dir=o", "--target.path",
             str(LLAMA / name), "--target.device=cuda"]  # fmt: skip
    config = parse(TrainConfig, given, "test")
    meta = MetaTarget(config.target)
    head = sum(p.numel() for p in meta_head(config.head, meta).parameters())
    plan = said.split(f"  target {name}: ")[1].split("```")[0]
    assert plan.startswith(f"{meta.n_parameters:,} parameters")
    assert f"  head: {head:,} parameters" in plan
    assert f"  {config.optim.steps} steps" in plan


@pytest.mark.parametrize("name", HEADS)
def test_a_meta_head_has_the_parameters_of_the_real_head(name, both, tmp_path):
    meta, real = both
    fields = dict(HEADS[name])
    wanted = HeadConfig(**fields)
    if n := fields.pop("draft_vocab_size", None):
        fields["draft_ids"] = torch.arange(n)
    head = RecurrentHead.for_target(real, embedding_scale="rms", **fields)
    found = meta_head(wanted, meta)
    assert {k: v.shape for k, v in found.state_dict().items()} == {
        k: v.shape for k, v in head.state_dict().items()
    }
    assert found.vocab_matrix().shape == head.vocab_matrix().shape
    head.save_pretrained(tmp_path)
    again = meta_head(HeadConfig(init_from=str(tmp_path)), meta)
    assert again.state_dict().keys() == head.state_dict().keys()
    settings = LoraSettings(r=2)
    tuned = meta_head(HeadConfig(init_from=str(tmp_path), lora=settings), meta)
    adapt(head, settings, tmp_path)
    assert sizes(tuned) == sizes(head), "what LoRA trains, and what it leaves"


def sizes(head):
    return {name: (p.shape, p.requires_grad) for name, p in head.named_parameters()}


# ---------------------------------------------------------------- traces


def test_a_trace_counts_what_lives_at_once():
    with traced() as trace:
        a = torch.zeros(1000, device="meta")
        view = a.view(10, 100)[2:].t()
        a += 1
        b = a + view.sum()
        assert trace.live_bytes == 8000
        del a, view
        assert trace.live_bytes == 4000
        with trace.label("last"):
            c = b.double()
    assert trace.live_bytes == trace.peak_bytes == 12_000
    assert sorted((p.n_bytes, p.label) for p in trace.at_peak.values()) == [
        (4000, ""), (8000, "last"),
    ]  # fmt: skip
    del b, c
    assert trace.live_bytes == 0


def test_parameters_that_were_there_are_not_counted_and_gradients_are():
    layer = torch.nn.Linear(100, 100, bias=False, device="meta")
    with traced() as trace:
        layer(torch.zeros(2, 100, device="meta")).sum().backward()
        assert trace.live_bytes == 40_000
        assert trace.numbers_of([layer.weight.grad])
        assert not trace.numbers_of([layer.weight])


STEPS = {
    "cross entropy": (LossConfig(cross_entropy=1.0, chunk_rows=32), {}, {}),
    "kl": (LossConfig(kl=1.0, chunk_rows=64), {}, {}),
    "top k": (LossConfig(kl=1.0, teacher="top_k", chunk_rows=64), {}, {}),
    "accumulation": (LossConfig(cross_entropy=1.0, chunk_rows=32), {"accumulation": 2}, {}),
    "pruned": (LossConfig(minus_log_acceptance=1.0), {}, HEADS["narrow"]),
    "borrowed": (LossConfig(total_variation=1.0), {}, HEADS["borrowed"]),
    "prefix": (LossConfig(kl=1.0, chunk_rows=32), {"accumulation": 2}, {"prefix": "attention"}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_without_content_takes_what_a_real_one_takes(name, both):
    meta, real = both
    loss, changes, fields = STEPS[name]
    optim = OptimConfig(batch_positions=48, **changes)
    wanted = HeadConfig(**fields)
    planned = memory.step_memory(meta_head(wanted, meta), meta, loss, optim, 4, 50)
    fields = dict(fields)
    if n := fields.pop("draft_vocab_size", None):
        fields["draft_ids"] = torch.arange(n)
    head = RecurrentHead.for_target(real, **fields)
    measured = memory.step_memory(head, real, loss, optim, 4, 50)
    assert planned.gradients == measured.gradients
    assert planned.batch == measured.batch
    assert planned.peak == pytest.approx(measured.peak, rel=0.06)
    assert planned.loss.logits == pytest.approx(measured.loss.logits, rel=0.06)


def test_states_and_decoding_take_what_real_ones_take(both, monkeypatch):
    """Noise is made whole, as on accelerators; in pieces, as on a CPU, it takes less than that."""
    monkeypatch.setattr(noise, "_PIECE", 1 << 40)
    meta, real = both
    config = StatesConfig(teacher_top_k=3, dtype="int8")
    planned, measured = (memory.states_memory(StateMaker(t, config, 1), 5, 60) for t in both)
    assert planned == pytest.approx(measured, rel=0.02)
    for prefix in (None, "none", "attention"):
        found = []
        fields = {"prefix": prefix or "none"}
        heads = [meta_head(HeadConfig(**fields), meta), RecurrentHead.for_target(real, **fields)]
        for one, head in zip(both, heads, strict=True):
            drafter = HeadDrafter(head.eval(), one, TreeConfig(3, 3)) if prefix else None
            found.append(memory.decode_memory(one, 6, 40, 20, 1.0, drafter))
        assert found[0].cache == found[1].cache
        assert found[0].working == pytest.approx(found[1].working, rel=0.02)


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_decoding_is_planned_by_one_step_of_the_shipped_loop(both, which, drafted, monkeypatch):
    """On tensors with and without content alike: the prompts, then the step that ends the rows."""
    target, seen = both[which], []
    head = meta_head(HeadConfig(), target) if which == 0 else RecurrentHead.for_target(target)
    drafter = HeadDrafter(head.eval(), target, TreeConfig(3, 3)) if drafted else None
    forward = target.forward

    def watched(tokens, positions, masks, cache, *kept, **wanted):
        seen.append((tokens.shape[1], max(cache.lengths), cache.width))
        return forward(tokens, positions, masks, cache, *kept, **wanted)

    monkeypatch.setattr(target, "forward", watched)
    memory.decode_memory(target, 6, 40, 20, 1.0, drafter)
    n = drafter.max_nodes if drafted else 1
    assert seen == [(40, 0, 40), (n, 58, 58 + n)]


def test_more_positions_and_wider_chunks_take_more(both):
    meta, _ = both
    head = meta_head(HeadConfig(), meta)

    def peak(positions, chunk):
        loss = LossConfig(cross_entropy=1.0, chunk_rows=chunk)
        return memory.step_memory(head, meta, loss, OptimConfig(batch_positions=positions))

    few, many, wide = peak(64, 32), peak(128, 32), peak(64, 320)
    assert many.loss.activations > 1.9 * few.loss.activations
    assert wide.loss.logits > 4 * few.loss.logits  # beside them, gradients of the features


def test_the_optimizer_keeps_two_averages():
    assert memory.averages_per_element(OptimConfig()) == 2


# ---------------------------------------------------------------- processes


def test_zero_divides_what_its_stage_says():
    trained, n = 1000, 4
    worlds = {s: World(n, n, s) for s in ("ddp", "zero1", "zero2", "zero3", "fsdp")}
    found = {name: shares(world, trained, 100, 600) for name, world in worlds.items()}
    assert [found[s].averages for s in found] == [8000, 2000, 2000, 2000, 2000]
    assert [found[s].gradients for s in found] == [4000, 4000, 3400, 3400, 3400]
    assert [found[s].parameters for s in found] == [4400, 4400, 4400, 1100, 1100]
    assert [found[s].master for s in found] == [0, 1000, 1000, 1000, 0]
    assert found["ddp"].buckets == 4000 and found["zero3"].gathered == 2400
    alone = shares(World(), trained, 100, 600)
    assert (alone.averages, alone.gradients, alone.buckets, alone.master) == (8000, 4000, 0, 0)
    half = shares(World(n, n, "zero2", "bf16", bucket=10), trained, 0, 600)
    assert (half.parameters, half.master, half.buckets) == (2000, 1000, 20)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (1, "none", "no")),
        ({"WORLD_SIZE": "4"}, (4, "ddp", "no")),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true",
          "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_MIXED_PRECISION": "bf16"},
         (2, "zero3", "bf16")),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, (2, "fsdp", "no")),
    ],
)  # fmt: skip
def test_the_launch_is_read_from_the_environment(environment, expected):
    world = world_of(OFF, environment)
    assert (world.processes, world.sharding, world.mixed) == expected


def test_options_stand_before_the_launch(tmp_path):
    file = tmp_path / "ds.json"
    zero = {"stage": 1, "reduce_bucket_size": 77, "offload_optimizer": {"device": "cpu"}}
    file.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": True}}))
    launch = {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true",
              "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}  # fmt: skip
    world = world_of(OFF, launch)
    assert (world.stage, world.bucket, world.mixed) == (1, 77, "bf16")
    assert world.offload_optimizer and not world.offload_parameters
    assert world_of(PlanConfig(processes=8, sharding="zero2"), launch).stage == 2
    with pytest.raises(InputError, match="sharding none goes with one process"):
        world_of(PlanConfig(processes=2, sharding="none"), {})


def test_processes_share_the_step_out(target):
    wanted = replace(OFF, processes=4, sharding="zero2")

    def step(wanted):
        config = plan_config(TrainConfig, target, output_dir="x", **{"optim.batch_positions": 400})
        plan = plan_training(config, wanted)
        phase = next(p for p in plan.phases if p.name == "step: loss")
        return {item.name: item.n_bytes for item in phase.items}

    one, four = step(OFF), step(wanted)
    assert 4 * four["optimizer's averages"] == pytest.approx(one["optimizer's averages"], rel=0.01)
    assert 4 * four["activations"] == pytest.approx(one["activations"], rel=0.05)
    assert four["head's weights"] == one["head's weights"]
    assert four["target's weights"] == one["target's weights"]


# ---------------------------------------------------------------- plans


def plan_of(**changes) -> Plan:
    phase = Phase("step", (Item("weights", 60, remedy="smaller.model"), Item("rows", 7, "host")))
    values = {"device": Memory("the device", 100, 80), "host": Memory("the host", 50, 40)}
    return Plan("a job", [], False, **{**values, **changes}, phases=[phase, Phase("end", ())])


def test_what_fits_is_not_refused():
    plan_of().check()
    assert plan_of().peak("device")[0] == 60 and plan_of().peak("host")[0] == 7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": Memory("the device", 100, 59)},
         "60 B needed, the device has 59 B free of 100 B. weights .60 B.: smaller.model"),
        ({"host": Memory("the host", 50, 13, sharers=2)}, "7 B needed for each of 2 processes"),
        ({"disk": [Disk("a", 5, 9), Disk("b", 5, 9)]}, "10 B are to be written, a .5 B., b"),
        ({"disk": [Disk("a", 5, 99, "max_bytes is 4")]}, "max_bytes is 4"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_number_limit_and_key(changes, said):
    with pytest.raises(InputError, match=said):
        plan_of(**changes).check()


def test_on_a_cpu_everything_is_one_memory():
    plan = plan_of(device=Memory("this machine", 100, 66), host=None)
    plan.one_memory = True
    assert plan.peak("device")[0] == 67
    with pytest.raises(InputError, match="67 B needed"):
        plan.check()


def test_a_configuration_is_enough_and_nothing_is_written(target, tmp_path, monkeypatch, capsys):
    (there := tmp_path / "model").mkdir()
    (here := tmp_path / "here").mkdir()
    # Two of its layers: all 32 would be traced six times, for seconds.
    config = json.loads((LLAMA / "llama-3.1-8b/config.json").read_text())
    (there / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    left_out = (config["num_hidden_layers"] - 2) * 218_112_000
    monkeypatch.chdir(here)
    args = ["--plan", "--target.device=cuda", "--plan_for.host_bytes=64000000000",
            "--plan_for.disk_bytes=200000000000", "--eval.prompts=0"]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        train([*args, f"--target.path={there}", "--data.text=source",
               "--plan_for.memory_bytes=141000000000"])  # fmt: skip
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"{8_030_261_248 - left_out:,} parameters, 2.97 GB in bfloat16" in shown
    assert "no weights here" in shown and "breaks even at" in shown
    with pytest.raises(SystemExit) as ended:
        train([*args, f"--target.path={target}", "--plan_for.memory_bytes=2000000",
               "--data.states.forward_tokens=64"])  # fmt: skip
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "cuda has 2 MB" in said and "data.answers.batch_size" in said
    assert not list(here.iterdir())


def test_the_store_is_as_large_as_planned_and_its_time_is_probed(target, tmp_path, capsys):
    rows = rows_of(tmp_path / "rows")
    args = [f"--target.path={target}", f"--rows={rows}", f"--output_dir={tmp_path / 'out'}",
            "--states.teacher_top_k=2", "--target.device=cpu"]  # fmt: skip
    config = parse(MakeStatesConfig, args, "x")
    plan = plan_states(config, OFF)
    with pytest.raises(SystemExit) as ended:
        make_states([*args, "--plan", "--plan_for.probe_s=0.05"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and not (tmp_path / "out").exists()
    assert "2,000 tokens" in shown and "unknown" not in shown
    made = build_states(load_target(config.target), Store(rows), config.states, tmp_path / "out",
                        progress=False)  # fmt: skip
    assert plan.disk[0].n_bytes == pytest.approx(made.counts["bytes"], rel=0.02)
    with pytest.raises(InputError, match="max_bytes is 1000"):
        small = replace(config, states=replace(config.states, max_bytes=1000))
        plan_states(small, OFF).check()


def test_a_training_is_probed_part_by_part(target, tmp_path, capsys):
    rows = rows_of(tmp_path / "rows")
    build_states(load_target(str(target)), Store(rows), StatesConfig(), tmp_path / "states",
                 progress=False)  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        train(["--plan", f"--target.path={target}", f'--data.stores=["{tmp_path}/states"]',
               "--eval.prompts=4", "--eval.max_new_tokens=8", "--plan_for.probe_s=0.05",
               "--plan_for.prompt_tokens=20", "--optim.steps=1000"])  # fmt: skip
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "unknown" not in shown
    for part in ("40 rows of", "1000 steps", "evaluations", "all of it", "4 checkpoints of"):
        assert part in shown, shown


def test_probing_bigrams_is_planned(target, tmp_path):
    from redrafter.config import ProbeConfig

    config = plan_config(ProbeConfig, target, out=tmp_path / "table", batch_size=200)
    plan = plan_probe(config, replace(OFF, probe_s=0.05))
    assert plan.hours[0].seconds > 0 and plan.peak("device")[1].name == "probe"


@pytest.mark.parametrize("job", ["train", "answers", "states", "lookahead", "probe"])
def test_help_teaches_plan(job, capsys):
    names = {"train": "train_redrafter", "lookahead": "lookahead_records", "probe": "probe_bigrams"}
    with pytest.raises(SystemExit):
        importlib.import_module(f"redrafter.cli.{names.get(job, job)}").main(["--help-all"])
    shown = capsys.readouterr().out
    assert "--plan " in shown and "--plan_for.memory_bytes" in shown


# ---------------------------------------------------------------- the bound


def test_bytes_per_drafted_token(both):
    meta, _ = both
    head = meta_head(HeadConfig(), meta)
    found = bound(head, meta, depth=4)
    assert found.level_bytes == 4 * sum(p.numel() for p in head.parameters())
    embedding = 4 * 600 * 64
    assert found.target_bytes == meta.weight_bytes - embedding  # of which single rows are read
    assert found.break_even == 1 + 4 * found.level_bytes / found.target_bytes
    assert found.speedup(found.break_even) == 1 and found.most == 5 / found.break_even
    borrowed = meta_head(HeadConfig(**HEADS["borrowed"]), meta)
    own = 4 * sum(p.numel() for p in borrowed.parameters())
    assert bound(borrowed, meta, 4).level_bytes == own + 4 * 600 * 64
    pruned = meta_head(HeadConfig(**HEADS["borrowed, pruned"]), meta)
    own = 4 * sum(p.numel() for p in pruned.parameters())
    assert bound(pruned, meta, 4).level_bytes == own + 4 * 40 * 64


# ---------------------------------------------------------------- a whole job


#: from a small process: the kernel counts what a parent has as its child's, until that is another
#: program
MEASURE = """
import argparse, json, sys
from pathlib import Path
import measure_plan as script
folder = Path(sys.argv[1])
job, arguments = script.cases(folder, argparse.Namespace(target=None))["wide-train"]
print(json.dumps(script.compare(job, [*arguments, "--optim.steps=2"], folder)))
"""


@pytest.mark.slow
def test_a_whole_training_takes_what_was_planned(tmp_path, monkeypatch):
    """The committed figures of scripts/dev/measure_plan.py are of more jobs."""
    if sys.platform != "linux":
        pytest.skip("the largest resident set is the Linux kernel's")
    scripts = str(ROOT / "scripts/dev")
    monkeypatch.syspath_prepend(scripts)
    importlib.import_module("measure_plan").make_wide(tmp_path, 24)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{scripts}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["planned_bytes"] == pytest.approx(found["measured_bytes"], rel=0.2)
    assert found["ratio_beside_libraries"] == pytest.approx(1, abs=0.2)
    assert found["measured_bytes"] > 3 * found["items"]["interpreter and libraries"]
