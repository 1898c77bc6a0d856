"""Data jobs on several processes: the same files as one makes, whatever happens to them on the way;
and launches that did not give what was asked for."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import debug_launcher
from safetensors.torch import load_file

from redrafter import processes
from redrafter.cli import check_store, count_bigrams, speed
from redrafter.config import AnswersConfig, RecordsConfig, SourceConfig, StatesConfig
from redrafter.contracts import InputError
from redrafter.data.answers import build_answers
from redrafter.data.build_rows import build_rows
from redrafter.data.lookahead_store import build_records
from redrafter.data.probed import probe_bigrams
from redrafter.data.prompts import load_prompts
from redrafter.data.reading import Hybrid
from redrafter.data.states import StateMaker, build_states
from redrafter.drafters.bigram import CountedBigrams
from redrafter.drafters.bigram import count_bigrams as count
from redrafter.files import _MACHINE, digest_file, remove_leftovers
from redrafter.processes import by_main, everyone, join, launched, main_first, mine
from redrafter.target.model import load_target, pick_device

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "kill_processes.py"


def content(folder):
    """Digest of every file, by its name."""
    found = {str(p.relative_to(folder)): digest_file(p) for p in folder.rglob("*") if p.is_file()}
    counted = load_file(folder / "counted.safetensors")  # its metadata names the folder
    return found | {"counted.safetensors": {k: v.tolist() for k, v in counted.items()}}


# ------------------------------------------------------------------------------------ content


def stages(model, folder):
    """Every data job, in shards so small that each process has some."""
    target = load_target(str(model))
    source = SourceConfig(str(model / "prompts_train.jsonl"), n_rows=10)
    prompts = build_rows(source, target.tokenizer, "prompts", folder / "prompts")
    how = AnswersConfig(temperatures=(0.0, 1.0), max_new_tokens=8, shard_prompts=3, batch_size=2)
    answers = build_answers(target, prompts, how, folder / "answers")
    how = StatesConfig(shard_bytes=30_000)
    states = build_states(target, answers, how, folder / "states", continuation=2)
    how = RecordsConfig(
        target=None, prompts=str(model / "prompts_train.jsonl"), drafter="bigram:2x2",
        out=str(folder / "records"), n_prompts=5, max_new_tokens=6, shard_prompts=2,
    )  # fmt: skip
    table = count([answers.rows().ids(i) for i in range(4)], target.vocab_size, 2)
    texts = load_prompts(how.prompts, target.tokenizer, "auto", n=5, part="last")
    records = build_records(target, CountedBigrams(table, width=2, depth=2), texts, how)
    probe_bigrams(target, folder / "probed.safetensors", width=3, part_tokens=100)
    argv = ["--target.path", str(model), "--store", str(folder / "answers"),
            "--out", str(folder / "counted.safetensors")]  # fmt: skip
    assert count_bigrams.main(argv) == 0
    # What training does: every process reads every buffer, twice.
    hybrid = Hybrid(answers, StateMaker(target, StatesConfig()), folder / "hybrid", named=False)
    buffers = torch.arange(hybrid.n_rows).split(4)
    hybrid.begin(buffers, {"seed": 0})
    for epoch in range(2):
        for number, rows in enumerate(buffers):
            found = hybrid.load(rows, (epoch, number))
            own = hybrid.load(rows[mine(len(rows))], (epoch, number)) if epoch == 0 else found
            assert len(own["offsets"]) - 1 == (len(mine(len(rows))) if epoch == 0 else len(rows))
    assert hybrid.end(True) is None
    return [s.digest for s in (prompts, answers, states, records, hybrid.stored.store)]


def run_stages(model, folder):
    digests = stages(model, folder)
    assert everyone(digests) == [digests] * launched(), "every process gets the same stores"


@pytest.fixture(scope="module")
def whole(tiny_target, tmp_path_factory):
    """What one process makes."""
    folder = tmp_path_factory.mktemp("whole")
    run_stages(tiny_target, folder)
    return folder


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_files(tiny_target, whole, tmp_path):
    wanted = content(whole)
    assert len([name for name in wanted if "shard" in name]) > 30
    debug_launcher(run_stages, (tiny_target, tmp_path / "3"), num_processes=3)
    assert content(tmp_path / "3") == wanted
    # What three processes left is gone on with by two; finished shards are not made again.
    removed = {}
    for kind in ("answers", "states", "records"):
        (tmp_path / "3" / kind / "manifest.json").unlink()
        shards = sorted((tmp_path / "3" / kind).glob("shard-*.json"))
        for receipt in shards[1:3]:
            receipt.unlink()
        removed[kind] = {r.with_suffix(".safetensors") for r in shards[1:3]}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "3").glob("*/shard-*.safetensors")}
    debug_launcher(run_stages, (tiny_target, tmp_path / "3"), num_processes=2)
    assert content(tmp_path / "3") == wanted
    again = {p for p, when in before.items() if p.stat().st_mtime_ns != when}
    assert again == set.union(*removed.values())


def work_shared_out(folder):
    """Nobody makes another one's shard; each writes where it was made."""
    rank = join().process_index
    made = everyone(list(mine(7)))
    assert sorted(i for own in made for i in own) == list(range(7)) and max(map(len, made)) == 3
    assert by_main(lambda: f"by {rank}") == "by 0"
    order = []
    main_first(lambda: order.append(time.monotonic()))
    times = everyone(order[0])
    assert times[0] == min(times)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(InputError, match=r"set target\.device auto"):
            pick_device(name)


def test_work_is_shared_out(tmp_path):
    debug_launcher(work_shared_out, (tmp_path,), num_processes=3)


# ------------------------------------------------------------------------------------ faults

# Two processes that no launcher looks after, as on two machines. What the second one does differs.
_PAIR = """
import os, sys, time
from pathlib import Path
from redrafter import processes
from redrafter.cli.args import reports_input_errors
from redrafter.contracts import InputError
from redrafter.data.filling import fill
from redrafter.data.store import Job
import torch
rank, what, folder = int(os.environ["RANK"]), *sys.argv[1:]
processes._LATE_S, processes._LINGER_S = 1.0, 0.3

def make(index, bar):
    if rank == 1 and what == "fails":
        raise InputError("no luck here")
    if rank == 1 and what == "dies":
        os._exit(9)
    rows = torch.tensor([1])
    return dict(row=rows * index, source_row=rows, length=rows.int(), tokens=rows.int(),
                supervised=rows.bool()), ()

@reports_input_errors
def main(argv):
    processes.join()
    mine = Path(folder) / (str(rank) if what == "not_shared" else "0")
    job = Job(mine, "texts", {"n": rank if what == "differs" else 0})
    store = fill(job, [1] * 4, make, what="texts", unit="row")
    assert store.n_rows == 4
    processes.say("done")
main(None)
"""


def pair(what, tmp_path, **environment):
    """(exit status, what it wrote) of both processes."""
    script = tmp_path / "pair.py"
    script.write_text(_PAIR)
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, str(script), what, str(tmp_path)],
            env={**env, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, text) for p, text in zip(started, texts, strict=True)]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_processes_without_accelerates_environment_join(tmp_path):
    """torchrun alone: accelerate would make unsynchronised copies of them."""
    (main, said), (other, silent) = pair("works", tmp_path)
    assert (main, other) == (0, 0), (said, silent)
    assert "done" in said and "1 of 2 processes" in said
    assert "done" not in silent and "processes" not in silent, "one bar, one message"


@pytest.mark.parametrize(
    ("what", "main_says", "other_says"),
    [
        ("fails", "error: another process of this launch has ended", "error: no luck here"),
        ("dies", "error: another process of this launch has ended", None),
        ("differs", "error: another process", r"holds another job (n 0 -> 1)"),
        ("not_shared", "error: another process", "on a shared file system"),
    ],
)
def test_a_process_that_fails_ends_the_others(what, main_says, other_says, tmp_path):
    (main, said), (other, told) = pair(what, tmp_path)
    assert main == 2 and main_says in said, said
    assert "Traceback" not in said + told
    if other_says is None:
        assert other == 9
    else:
        assert other == 2 and other_says in told, told
    assert not (tmp_path / "0" / "manifest.json").exists()


def test_leftovers_of_another_machine_stay_for_a_day(tmp_path):
    names = [".a.json.999999999@elsewhere.part", ".b.json.999999999@elsewhere.part",
             f".c.json.999999999@{_MACHINE}.part"]  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / names[1], (time.time() - 90_000,) * 2)
    remove_leftovers(tmp_path)
    assert [(tmp_path / name).exists() for name in names] == [True, False, False]


# ------------------------------------------------------------------------------------ launching


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("python /bin/accelerate launch --cpu --num_processes 2 train.py", 2),
        ("/bin/accelerate launch --num_processes=3 train.py --num_processes 5", 3),
        ("/bin/accelerate-launch --multi_gpu --num-processes 4 --module train", 4),
        ("python -m accelerate.commands.launch --config_file FILE train.py", 2),
        ("python -m accelerate.commands.accelerate_cli launch --config_file FILE train.py", 2),
        ("python /lib/accelerate/commands/launch.py --config_file FILE --cpu train.py", 2),
        ("accelerate launch --config_file FILE --num_processes 1 train.py", 1),
        ("accelerate launch train.py", None),
        ("accelerate launch --config_file missing.yaml train.py", None),
        ("accelerate launch --no_such_flag train.py", None),
        ("accelerate config", None),
        ("torchrun --nproc_per_node 2 train.py", None),
        ("python launch.py --num_processes 2", None),
        ("bash", None),
    ],
)
def test_what_a_launch_was_asked_for(line, wanted, tmp_path, monkeypatch):
    content = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU",
               "use_cpu": True, "num_processes": 2, "num_machines": 1}  # fmt: skip
    (tmp_path / "cpu.yaml").write_text(json.dumps(content))

    class Parent:
        def cmdline(self):
            return line.replace("FILE", "cpu.yaml").split()

        def cwd(self):
            return str(tmp_path)

    monkeypatch.setattr(psutil.Process, "parent", lambda self: Parent())
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert processes.requested() == wanted
    if wanted == 2:
        with pytest.raises(InputError, match=r"asked for 2 processes and started 1 .* --multi_gpu"):
            processes.check_launch()
        with pytest.raises(InputError, match=r"eval/x\.py works in one process, and 2"):
            processes.check_alone("eval/x.py")
        monkeypatch.setenv("WORLD_SIZE", "2")
        processes.check_launch()
    elif wanted is None:
        processes.check_launch()


def test_a_parent_that_cannot_be_read_stops_nothing(monkeypatch):
    def refuse(self):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "parent", refuse)
    assert processes.requested() is None
    processes.check_launch()


def test_the_silent_one_process_is_refused_for_real(tiny_target, tmp_path):
    """`accelerate launch --cpu --num_processes 2` runs one."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
        str(ROOT / "data/prepare.py"), "--target.path", str(tiny_target),
        "--source.path", str(tiny_target / "prompts_train.jsonl"),
        "--output_dir", str(tmp_path / "prompts"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode != 0
    assert "asked for 2 processes and started 1" in done.stderr
    assert "--multi_gpu --num_processes 2" in done.stderr
    assert not (tmp_path / "prompts").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_commands_of_one_process_refuse_more(rank, tiny_target, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(processes, "_LINGER_S", 0.01)
    with pytest.raises(SystemExit) as ended:
        check_store.main(["--store", str(tmp_path)])
    assert ended.value.code == 2
    assert "data/check.py works in one process, and 2 were launched" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        speed.main(["--help"])
    assert ended.value.code == 0
    assert bool(capfd.readouterr().out) == (rank == "0"), "help is printed once"
    with pytest.raises(SystemExit):
        speed.main(["--no_such_option", "1"])
    assert "--no_such_option" in capfd.readouterr().err


# ------------------------------------------------------------------------------------ kills


@pytest.mark.slow
def test_killing_one_of_several_leaves_no_trace(tiny_target, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--target", str(tiny_target), "--rows", "12",
         "--source", str(tiny_target / "prompts_train.jsonl"), "--kills", "4",
         "--processes", "1,2,3", "--start", "fork", "--seed", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills over" in done.stdout and "no difference" in done.stdout
