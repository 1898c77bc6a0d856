"""Data jobs on several processes: the same files as one makes, whatever happens to them on the way;
and launches that did not give what was asked for."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback

import psutil
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from launching import ROOT, ranks, run_copy
from safetensors.torch import load_file

from redrafter import processes
from redrafter.cli import check_store, count_bigrams, speed
from redrafter.cli.args import reports_input_errors
from redrafter.config import AnswersConfig, RecordsConfig, SourceConfig, StatesConfig
from redrafter.contracts import InputError
from redrafter.data.answers import build_answers
from redrafter.data.build_rows import build_rows
from redrafter.data.filling import fill, open_filled
from redrafter.data.prompts import load_prompts
from redrafter.data.reading import Hybrid
from redrafter.data.states import StateMaker, build_states
from redrafter.data.store import Job
from redrafter.drafters.bigram import CountedBigrams
from redrafter.drafters.bigram import count_bigrams as count
from redrafter.files import _MACHINE, digest_file, remove_leftovers
from redrafter.processes import by_main, everyone, join, launched, main_first, mine
from redrafter.records.store import build_records
from redrafter.tables.probed import probe_bigrams
from redrafter.targets.devices import pick_device
from redrafter.targets.load import load_target

SCRIPT = ROOT / "scripts" / "dev" / "kill_processes.py"


@pytest.fixture(autouse=True)
def nobody_has_joined():
    """What other tests made of accelerate would be inherited by processes forked here."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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
    assert hybrid.end(True) == []  # nothing to say
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

    def work():
        time.sleep(0.0 if rank else 0.3)
        return time.monotonic()

    times = everyone(main_first(work))
    assert times[0] == min(times)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(InputError, match=r"set target\.device auto"):
            pick_device(name)


def test_work_is_shared_out(tmp_path):
    debug_launcher(work_shared_out, (tmp_path,), num_processes=3)


# ------------------------------------------------------------------------------------ faults


def small_job(what, folder):
    """Four shards. what: the second process does otherwise."""
    rank = join().process_index
    other = rank == 1

    def make(index, bar):
        if other and what == "fails":
            raise InputError("no luck here")
        if other and what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        one = torch.tensor([1])
        return {"row": one * index, "source_row": one, "length": one.int(), "tokens": one.int(),
                "supervised": one.bool()}, ()  # fmt: skip

    place = folder / "elsewhere" if other and what == "shares_no_folder" else folder / "job"
    job = Job(place, "texts", {"n": int(other and what == "has_other_settings")})
    if job.complete:
        store = open_filled(job)
    else:
        store = fill(job, [1] * 4, make, what="texts", unit="row")
    assert store.n_rows == 4
    processes.say("done")


def pair(what, folder):
    """(exit status, what it wrote) of two processes that no launcher looks after, as if each were
    on a machine of its own."""
    (folder / "meeting").unlink(missing_ok=True)
    ids = []
    for rank in range(2):
        ids.append(os.fork())
        if ids[-1] == 0:
            try:
                _run(rank, what, folder)
            finally:
                os._exit(99)
    deadline, codes = time.monotonic() + 100, {}
    while len(codes) < 2 and time.monotonic() < deadline:
        for rank, process in enumerate(ids):
            if rank not in codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for rank in {0, 1} - set(codes):
        os.kill(ids[rank], signal.SIGKILL)
        os.waitpid(ids[rank], 0)
    assert len(codes) == 2, "a process hangs"
    return [(codes[rank], (folder / f"said-{rank}").read_text()) for rank in range(2)]


def _run(rank, what, folder):
    said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
    sys.stdout, sys.stderr = (os.fdopen(said, "w", buffering=1) for _ in range(2))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    store = torch.distributed.FileStore(str(folder / "meeting"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    processes._LATE_S, processes._LINGER_S = 1.0, 0.3
    try:
        reports_input_errors(lambda argv: small_job(what, folder))()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("fails", "error: no luck here"),
        ("dies", None),
        ("has_other_settings", "holds another job (n 0 -> 1)"),
        ("shares_no_folder", "job.json, which another process of this launch wrote: all machines "
         "need the same folder"),
    ],
)  # fmt: skip
def test_a_process_that_fails_ends_the_others(what, says, tmp_path):
    found = what == "has_other_settings"  # also where there is nothing left to write
    if found:
        pair("works", tmp_path)
    (main, said), (other, told) = pair(what, tmp_path)
    assert (main, other) == (2, -9 if says is None else 2), said + told
    assert said.count("error: another process of this launch has ended") == 1, said
    if says is not None:
        assert told.count("error: ") == 1 and says in told
    assert (tmp_path / "job" / "manifest.json").exists() == found


def test_processes_speak_once(tmp_path):
    (main, said), (other, told) = pair("works", tmp_path)
    assert (main, other) == (0, 0), said + told
    assert said == "done\n" and told == ""
    # All have the same to report: the launcher ends the second one while it waits.
    (tmp_path / "job" / "shard-00002.safetensors").unlink()
    (main, said), (other, told) = pair("works", tmp_path)
    assert (main, other) == (2, 2) and "shard-00002.safetensors is missing" in said + told


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


def test_more_processes_than_accelerators(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not processes._options(False, 4)["cpu"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=r"process 2 of this machine has no accelerator .* are 2:"):
        processes._options(False, 4)
    assert processes._options(True, 4)["cpu"], "CPUs can be shared"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert processes._options(False, 4)["cpu"]
    assert pick_device("auto") == torch.device("cpu")


def test_a_parent_that_cannot_be_read_stops_nothing(monkeypatch):
    def refuse(self):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "parent", refuse)
    assert processes.requested() is None
    processes.check_launch()


def test_processes_without_accelerates_environment_join(tmp_path):
    """As torchrun alone starts them; accelerate by itself makes copies that know of no other."""
    code = "from redrafter.processes import everyone, join; join(); print(everyone(7))"
    (tmp_path / "join.py").write_text(code)
    started = ranks(2, tmp_path / "join.py", [], tmp_path, told={})
    assert [process.wait(120) for process in started] == [0, 0]
    assert [process.said().splitlines()[-1] for process in started] == ["[7, 7]"] * 2


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
    argv = ["--target", tiny_target, "--rows", 12, "--source", tiny_target / "prompts_train.jsonl",
            "--kills", 4, "--processes", "1,2,3", "--start", "fork", "--seed", 1]  # fmt: skip
    status, said = run_copy(SCRIPT, argv, tmp_path / "said.txt", TMPDIR=str(tmp_path))
    assert status == 0, said
    assert "4 kills over" in said and "no difference" in said
