"""The trainer on several processes: one trajectory, one format of checkpoints, whoever trains."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from accelerate import debug_launcher
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from launching import ROOT, launch, training_argv
from models import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GenerationConfig

from redrafter.cli.args import parse
from redrafter.config import LossConfig, OptimConfig, TrainConfig
from redrafter.contracts import InputError
from redrafter.data.store import Store
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.head import HeadDrafter
from redrafter.heads.load import load_head
from redrafter.heads.recurrent import RecurrentHead
from redrafter.processes import join
from redrafter.targets.load import load_target
from redrafter.training.engine import check_engine
from redrafter.training.feed import Batch, Feed, owners
from redrafter.training.loop import Training, make_optimizer
from redrafter.training.sharded import FullySharded, Whole
from redrafter.training.step import StepLoss, total_weight

STEPS = 30
SETTINGS = {
    "data.source.format": "text", "data.source.n_rows": 24, "data.source.holdout_rows": 8,
    "data.answers.max_new_tokens": 24, "data.answers.temperatures": "[0, 1]",
    "data.buffer_rows": 10, "optim.steps": STEPS, "optim.batch_positions": 32,
    "optim.accumulation": 2, "optim.depth": 3, "optim.warmup_steps": 5, "optim.lr": 5e-3,
    "optim.weight_decay": 0.01, "eval.prompts": 3, "eval.max_new_tokens": 12,
    "eval.every_steps": 15, "eval.tree.width": 2, "eval.tree.depth": 2, "save_steps": 10,
    "keep_checkpoints": 100, "log_steps": 1,
    # ZeRO-3 splits parameters of more than 100,000 numbers: the vocabulary matrix is one.
    "head.exit_dim": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def argv(folder, tiny_target):
    return training_argv(folder, tiny_target, SETTINGS)


@pytest.fixture(scope="module")
def one(folder, argv):
    """The run that the others must agree with, by one process."""
    Training(parse(TrainConfig, argv("one"), "test")).train()
    return folder / "one"


def losses(out: Path) -> dict[int, float]:
    """Step -> loss, as logged."""
    (events,) = (out / "logs" / "redrafter").glob("events.out.tfevents*")
    log = EventAccumulator(str(events)).Reload()
    return {event.step: event.value for event in log.Scalars("train/loss")}


def tensors(out: Path, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / f"checkpoints/step-{step}/{name}.safetensors")


def check_agrees(out: Path, one: Path, first: int = 0) -> None:
    """Losses from step `first` on, and the last weights and averages, to 1e-3."""
    mine, theirs = losses(out), losses(one)
    assert sorted(mine) == list(range(first + 1, STEPS + 1))
    assert mine == pytest.approx({step: theirs[step] for step in mine}, rel=1e-3)
    for name in ("model", "optimizer"):
        a, b = tensors(out, name), tensors(one, name)
        assert a.keys() == b.keys() and all(a[key].shape == b[key].shape for key in a)
        for key in a:
            assert (a[key] - b[key]).norm() <= 1e-3 * b[key].norm() + 1e-12, (name, key)
    assert not [p for p in out.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")]


def continued(source: Path, out: Path, step: int) -> None:
    """A run of which all that is left are its checkpoints up to a step."""
    for path in (source / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) <= step:
            shutil.copytree(path, out / "checkpoints" / path.name)


def zero(stage: int) -> list[str]:
    return ["--config_file", str(ROOT / f"configs/accelerate/zero{stage}.yaml")]


# ------------------------------------------------------------------ one trajectory


def test_data_parallel_then_zero_1(one, argv, folder):
    pytest.importorskip("deepspeed")
    told = launch(
        ["--multi_gpu", "--num_processes", "2"], "train/redrafter.py", argv("ddp"),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    last = f"{folder / 'ddp'} holds the head of step"
    assert told.count(last) == 1, "one process says how it ended"
    check_agrees(folder / "ddp", one)
    assert not any(torch.equal(a, b) for a, b in zip(
        tensors(folder / "ddp", "model").values(), tensors(one, "model").values(), strict=True
    ) if a.numel() > 1), "bit for bit the same: were there two processes at all?"  # fmt: skip

    continued(folder / "ddp", folder / "zero1", 20)
    launch(zero(1), "train/redrafter.py", argv("zero1", resume="auto"), DS_ACCELERATOR="cpu")
    check_agrees(folder / "zero1", one, first=20)


def train(argv):
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, which was one process
    assert join().num_processes == 2
    Training(parse(TrainConfig, argv, "test")).train()


def test_hybrid_data_by_two_processes(one, argv, folder):
    """Each makes the states of its own rows while the first epoch trains, and its share of the
    store's after it; the later epochs read that."""
    debug_launcher(train, (argv("hybrid", **{"data.mode": "hybrid"}),), num_processes=2)
    check_agrees(folder / "hybrid", one)
    kinds = [Store(path) for path in (folder / "data").glob("states-*")]
    assert len(kinds) == 2 and len({store.identity["rows"] for store in kinds}) == 1
    by_length = [sorted(store.lengths.tolist()) for store in kinds]
    assert by_length[0] == by_length[1], "all rows are in both"
    for store in kinds:
        store.verify()


def test_zero_3_then_zero_2_then_one_process(one, argv, folder, tiny_target):
    pytest.importorskip("deepspeed")
    launch(zero(3), "train/redrafter.py", argv("zero3"), DS_ACCELERATOR="cpu")
    check_agrees(folder / "zero3", one)
    target = load_target(str(tiny_target))
    head = load_head(folder / "zero3", target)
    assert head.config.exit_dim * target.vocab_size > 100_000, "nothing was split"
    # What it learned from: which text that is depends on the Python at hand.
    lines = (tiny_target / "prompts_train.jsonl").read_text().splitlines()[:4]
    rows = [target.tokenizer(json.loads(line)["text"]).input_ids[:16] for line in lines]
    config = GenerationConfig(max_new_tokens=24, eos_token_id=-1)
    drafter = HeadDrafter(head, target)
    drafted = speculative(target, rows, config, seeds=range(4), drafter=drafter)
    assert drafted.tokens == plain(target, rows, config, seeds=range(4)).tokens
    assert sum(drafted.stats.emitted) > 1.2 * sum(drafted.stats.steps), "it learned nothing"

    continued(folder / "zero3", folder / "zero2", 10)
    launch(zero(2), "train/redrafter.py", argv("zero2", resume="auto"), DS_ACCELERATOR="cpu")
    check_agrees(folder / "zero2", one, first=10)
    continued(folder / "zero2", folder / "alone", 20)
    Training(parse(TrainConfig, argv("alone", resume="auto"), "test")).train()
    check_agrees(folder / "alone", one, first=20)


# ------------------------------------------------------------------ torch's FSDP, natively


def batches_of(target, n):
    """n steps of 8 positions with 3 depths."""
    random = torch.Generator().manual_seed(0)
    for _ in range(n):
        tokens = torch.randint(target.vocab_size, (8, 4), generator=random)
        mask = (torch.rand(8, 3, generator=random) < 0.8).cumprod(1).bool()
        context = torch.randn(8, target.hidden_size, generator=random)
        yield Batch(context, tokens[:, :3], tokens[:, 1:], mask)


def train_few(model, optimizer, batches, share):
    (rank, world), config = share, model.loss_config
    for batch in batches:
        loss, _ = model(batch.split(world)[rank], total_weight(batch, config))
        (loss * world).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def fully_sharded():
    """In each of two processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # the fork brought its parent's along
    state = join(cpu=True)
    share = (state.process_index, state.num_processes)
    assert share[1] == 2
    target, optim = tiny("llama"), OptimConfig(weight_decay=0.1)
    mesh = init_device_mesh("cpu", (2,))

    def built(shard):
        torch.manual_seed(0)
        model = StepLoss(RecurrentHead.for_target(target), target, LossConfig(cross_entropy=1.0))
        if shard:
            for block in model.head.lm_head[: model.head.config.num_draft_layers]:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model, make_optimizer(model.head, optim)

    batches = list(batches_of(target, 12))
    alone, adam = built(shard=False)
    train_few(alone, adam, batches, (0, 1))
    model, optimizer = built(shard=True)
    assert model.head.lm_head[-1].weight.to_local().shape[0] == target.vocab_size // 2
    train_few(model, optimizer, batches[:6], share)
    middle = FullySharded(model, optimizer)
    weights, averages = middle.weights(), middle.averages()
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    # What process 0 would have written to a checkpoint; both read it.
    held = [averages if share[0] == 0 else None]
    torch.distributed.broadcast_object_list(held)
    again, optimizer = built(shard=False)
    again.head.load_state_dict(weights)
    for block in again.head.lm_head[: again.head.config.num_draft_layers]:
        fully_shard(block, mesh=mesh)
    fully_shard(again, mesh=mesh)
    optimizer = make_optimizer(again.head, optim)
    parts = FullySharded(again, optimizer)
    parts.load_averages(held[0])
    train_few(again, optimizer, batches[6:], share)
    found, expected = parts.weights(), alone.head.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    if share[0] == 0:
        whole = Whole(alone.head, adam).averages()
        assert held[0].keys() == whole.keys()
        assert all(held[0][name].shape == whole[name].shape for name in whole)


def test_a_head_trains_under_fully_shard_and_its_whole_state_comes_out():
    tiny("llama")
    debug_launcher(fully_sharded, num_processes=2)


# ------------------------------------------------------------------ sharing out


class Rows:
    """A part of a feed in memory, which notes the rows asked for."""

    def __init__(self, lengths, hidden):
        random = torch.Generator().manual_seed(len(lengths))
        self.n_rows, self.asked = len(lengths), []
        self.tokens = [torch.randint(40, (n,), generator=random) for n in lengths]
        self.states = [torch.randn(n, hidden, generator=random) for n in lengths]
        self.starts = torch.tensor([[n - 1, n - 2] for n in lengths]).clamp(min=0)

    def load(self, rows, place):
        rows = rows.tolist()
        self.asked.append((place, rows))
        lengths = torch.tensor([0] + [len(self.tokens[r]) for r in rows])
        tokens = torch.cat([self.tokens[r] for r in rows])
        return {
            "tokens": tokens, "supervised": torch.ones(len(tokens), dtype=torch.bool),
            "states": torch.cat([self.states[r] for r in rows]), "offsets": lengths.cumsum(0),
            "there": torch.ones(len(rows), dtype=torch.bool),
        }  # fmt: skip


@pytest.mark.parametrize("world", [2, 3])
def test_shares_are_the_step_of_one_process_and_no_row_is_read_twice(world):
    target = tiny("llama")

    def feed(share):
        parts = [Rows([9, 4, 30, 2, 12, 7, 15], 32), Rows([5, 22, 6], 32)]
        found = Feed(
            target, parts, [1.0, 2.0], positions=16, depth=3, seed=1, buffer_rows=4, share=share
        )
        return found, parts

    alone, _ = feed((0, 1))
    shares = [feed((rank, world)) for rank in range(world)]
    uneven = 0
    for step in range(3 * alone.steps_per_epoch):
        whole = alone.step(step)
        parts = [f.step(step) for f, _ in shares]
        sizes = [len(p.tokens) for p in parts]
        assert sum(sizes) == 16
        uneven += len(set(sizes)) > 1
        for name in ("context", "tokens", "labels", "mask"):
            joined = torch.cat([getattr(p, name).double() for p in parts])
            expected = getattr(whole, name).double()
            assert torch.equal(joined.unique(dim=0), expected.unique(dim=0)), name
    assert uneven, "an even share at every step would not have tested the split"
    for part in (0, 1):
        asked = [set(parts[part].asked[i][1]) for _, parts in shares for i in range(1)]
        assert sum(map(len, asked)) <= len(set().union(*asked)) + world - 1


def test_rows_are_dealt_out_evenly():
    random = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 400, (512,), generator=random)
    for n in (1, 2, 3, 8):
        got = torch.zeros(n, dtype=torch.long).index_add_(0, owners(counts, n), counts)
        assert got.max() <= 1.02 * counts.sum() / n
    assert owners(counts[:2], 3).tolist() in ([0, 1], [1, 0])


def test_a_batch_splits_where_positions_are_few():
    batch = Batch(*(torch.arange(5)[:, None] for _ in range(4)))
    assert [len(piece.tokens) for piece in batch.split(4)] == [2, 1, 1, 1]
    assert [len(piece.tokens) for piece in batch.split(8)] == [1] * 5 + [0] * 3


# ------------------------------------------------------------------ launches that are not


@pytest.mark.parametrize(
    ("engine", "found", "named"),
    [
        ("DEEPSPEED", DistributedType.MULTI_CPU, "unset ACCELERATE_USE_CPU"),
        ("DEEPSPEED", DistributedType.NO, "use_cpu: false"),
        ("FSDP", DistributedType.MULTI_CPU, "ddp.yaml or zero3.yaml"),
        ("FSDP", DistributedType.NO, "accelerators only"),
    ],
)
def test_an_engine_that_accelerate_dropped_is_missed(monkeypatch, engine, found, named):
    accelerator = SimpleNamespace(distributed_type=found)
    check_engine(accelerator)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match=named):
        check_engine(accelerator)


def test_ready_configurations_are_read_by_accelerate():
    paths = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
    names = {"single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"}
    assert {path.stem for path in paths} == names
    for path in paths:
        first = path.read_text().splitlines()[0]
        assert f"accelerate launch --config_file configs/accelerate/{path.name} train/" in first
        config = load_config_from_file(str(path))
        assert config.num_processes == (1 if path.stem == "single" else 2)
        if path.stem.startswith("zero"):
            assert config.deepspeed_config["zero_stage"] == int(path.stem[4])
