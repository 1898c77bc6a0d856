"""How many threads a command computes with, and how they wait for each other."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from redrafter import threads
from redrafter.contracts import InputError

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def bare(**more: str) -> dict[str, str]:
    """This environment with nothing said about threads but `more`."""
    kept = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def settings_of(code: str, **more: str) -> dict[str, str | None]:
    shown = f"import json, os; print(json.dumps([os.environ.get(n) for n in {SETTINGS}]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{shown}"], env=bare(**more), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(SETTINGS, json.loads(done.stdout), strict=True))


def test_commands_wait_asleep_and_a_users_setting_is_left_alone():
    command = "import redrafter.cli.speed"
    assert settings_of(command)["OMP_WAIT_POLICY"] == "passive"
    for given in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "10"}, {"KMP_BLOCKTIME": "1"}):
        found = {key: value for key, value in settings_of(command, **given).items() if value}
        assert found == given
    for elsewhere in ("import redrafter, redrafter.threads", f"import torch\n{command}"):
        assert not any(settings_of(elsewhere).values()), "it is not ours to change, or too late"


def test_torch_hears_of_it(tmp_path):
    """Of a launcher from its start, by what libgomp itself says it took."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "data/check.py"), "--store", str(tmp_path)],
        env=bare(OMP_DISPLAY_ENV="verbose"), capture_output=True, text=True,
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this build of torch has another OpenMP than libgomp")
    # The policy is shown as PASSIVE in any case, and spins for 300000 rounds if nothing is said.
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) == {"0"}


def test_quickstart_and_tests_leave_a_users_number_alone():
    line = 'source scripts/setup.sh >/dev/null; echo "$OMP_WAIT_POLICY ${OMP_NUM_THREADS-unset}"'
    # Without the installing, which is not what is asked about.
    line = line.replace("source scripts/setup.sh", "source <(grep '^export OMP' scripts/setup.sh)")
    for given, shown in (({}, "passive unset"), ({"OMP_NUM_THREADS": "3"}, "passive 3"),
                         ({"OMP_WAIT_POLICY": "active"}, "active unset")):  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", line], cwd=ROOT, env=bare(**given), capture_output=True, text=True
        )
        assert done.stdout.strip() == shown, done.stderr
    assert "OMP_NUM_THREADS=" not in (ROOT / "scripts/quickstart.sh").read_text()


# ------------------------------------------------------------------------------------ how many


def groups(root: Path, own: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        # A group above grants less than the own one.
        ("0::/pods/one\n", {"sys/fs/cgroup/pods/cpu.max": "50000 100000\n",
                            "sys/fs/cgroup/pods/one/cpu.max": "400000 100000\n"}, 0.5),
        # Version 1; within a container the path is that of the machine, which is not there.
        ("4:memory:/x\n3:cpu,cpuacct:/docker/abc\n",
         {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
          "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("3:cpu,cpuacct:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                               "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("4:cpuset:/\n", {"sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "1\n",
                          "sys/fs/cgroup/cpuset/cpu.cfs_period_us": "100000\n"}, None),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "what is this\n"}, None),
    ],
)  # fmt: skip
def test_the_quota_of_a_container(own, files, cpus, tmp_path):
    assert threads.quota(groups(tmp_path, own, files)) == cpus


def test_no_control_groups_no_quota(tmp_path):
    assert threads.quota(tmp_path) is None


@pytest.fixture
def free(monkeypatch):
    """Nothing is said of the number of threads, torch would take three."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield monkeypatch
    torch.set_num_threads(before)


@pytest.mark.parametrize(("granted", "number"), [(1.2, 2), (0.3, 1), (None, 3), (9.0, 3)])
def test_no_more_threads_than_the_quota_grants(free, granted, number):
    free.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    free.setattr(threads, "quota", lambda: granted)
    threads.settle()
    assert torch.get_num_threads() == number


def test_the_users_number_stands(free):
    free.setattr(threads, "quota", lambda: 1.0)
    threads.settle(4)
    assert torch.get_num_threads() == 4 and threads.fixed(4)
    free.setenv("OMP_NUM_THREADS", "3")  # torch has read it by then
    threads.settle()
    assert torch.get_num_threads() == 4 and threads.fixed(None)
    with pytest.raises(InputError, match="threads: 0 must be at least 1"):
        threads.settle(0)


@pytest.mark.parametrize(
    ("one_s", "all_s", "number"), [(0.002, 0.001, 3), (0.002, 0.0019, 1), (0.001, 0.004, 1)]
)
def test_more_threads_are_taken_where_they_are_clearly_faster(free, one_s, all_s, number):
    seen = []

    def work():
        seen.append(torch.get_num_threads())
        time.sleep(one_s if seen[-1] == 1 else all_s)

    assert threads.choose(work) == torch.get_num_threads() == number
    assert seen.count(1) >= 2 * 5 and seen.count(3) >= 2 * 5


def test_large_work_is_not_repeated(free):
    seen = []
    assert threads.choose(lambda: seen.append(time.sleep(0.06))) == 3
    assert len(seen) == 4, "once to begin with, and three looks"


def test_evaluations_measure_and_jobs_that_are_gone_on_with_do_not(free, tiny_target, monkeypatch):
    from redrafter.config import LosslessConfig, TargetConfig
    from redrafter.evaluation.models import load_both

    config = LosslessConfig(TargetConfig(str(tiny_target)), prompts="")
    free.setattr(threads, "allowed", lambda: 2)
    free.setattr(threads, "choose", lambda work: [work(), torch.set_num_threads(1)])
    load_both(config)
    assert torch.get_num_threads() == 2
    load_both(config, measured=True)
    assert torch.get_num_threads() == 1
