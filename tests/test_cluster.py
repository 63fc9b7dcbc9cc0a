"""Runs on several hosts (network namespaces, each with an sshd) that are cut off, stopped and killed; the doctor."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from packspeed.launch.run_folder.heartbeat import read_beats
from support import ROOT
from support.namespaces import Cluster
from support.ranks import run_many
from support.workspace import Workspace

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

STEPS = 60
TOLERANCE = 1e-5
LONG = 150  # of a run that must not be over before a host is back
# With the warm-up, training is stable. Without it, the loss rises in mid-run, and rounding grows to 1e-4 (LOG.md).
SETS = (
    f"train.steps={STEPS}", "train.global_batch_tokens=384", "train.schedule.warmup_steps=20",
    "eval.every_steps=0", "checkpoint={every_steps: 5}",
)  # fmt: skip
TRAIN = str(ROOT / "launch" / "train.py")
DEEPSPEED, PACKSPEED = (str(Path(sys.executable).with_name(name)) for name in ("deepspeed", "packspeed"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(4, tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="module")
def reference(workspace: Workspace) -> None:
    """The same run on one host, and a longer one."""
    runs = [workspace.arguments("one-host", *SETS), workspace.arguments("long", *SETS, f"train.steps={LONG}")]
    codes, output = run_many(workspace.folder / "one-host", runs, ranks=1)
    assert codes == [0, 0], output[-3000:]


class Launch:
    """`packspeed launch` on node1, or what is typed there by hand (`by_hand`: the words before --hostfile)."""

    def __init__(
        self, cluster: Cluster, workspace: Workspace, name: str, slots: list[int], *options: str, steps: int = STEPS,
        by_hand: bool = False,
    ) -> None:  # fmt: skip
        self.cluster, self.workspace, self.name = cluster, workspace, name
        sets = [part for text in (f"name={name}", *SETS, f"train.steps={steps}") for part in ("--set", text)]
        hostfile = ["--hostfile", str(cluster.hostfile(slots))]
        words = [PACKSPEED, "launch", str(workspace.run_file), *sets, *hostfile, *options]
        if by_hand:
            words = [DEEPSPEED, *hostfile, *options, TRAIN, "--config", str(workspace.run_file), *sets]
        self.output = workspace.folder / f"{name}.output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                cluster.inside("node1", *words),
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "OMPI_ALLOW_RUN_AS_ROOT": "1",
                    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                },
                cwd=workspace.folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def step(self) -> int:
        """Last step of the run."""
        path = self.workspace.folder / "runs" / self.name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1]).get("step", 0) if lines and lines[-1].endswith("}") else 0

    def wait_for(self, condition: Callable[[], Any], seconds: float = 400) -> None:
        """Wait until the condition holds; fails if the launch ends first."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def text(self) -> str:
        """What it printed."""
        return self.output.read_text(errors="replace")

    def end(self, code: int = 0, seconds: float = 400) -> str:
        """Wait for the end, check that no process is left on any host, and return what was printed."""
        assert self.process.wait(seconds) == code, self.text()
        deadline = time.monotonic() + 40  # a host that was cut off ends its ranks by itself
        while left := [pid for name in self.cluster.names for pid in self.cluster.pids(name, "train.py")]:
            assert time.monotonic() < deadline, (left, self.text())
            time.sleep(0.2)
        return self.text()

    def history(self) -> list[dict[str, Any]]:
        """One entry per attempt that has ended."""
        path = self.workspace.folder / "runs" / self.name / "launches.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rank(self, rank: int) -> int:
        """Pid of a rank."""
        return int(json.loads((self.logs / f"rank-{rank}.beat").read_text())["pid"])

    def wait_for_rank_1(self, step: int, after: int) -> int:
        """Wait until rank 1 is at a step, in another process than `after`; returns its pid."""
        pids: list[int] = []

        def arrived() -> bool:
            beat = read_beats(self.logs).get(1)
            if beat is not None and beat.pid != after and beat.step >= step:
                pids.append(beat.pid)
            return bool(pids)

        self.wait_for(arrived)
        return pids[0]

    @property
    def logs(self) -> Path:
        return self.workspace.folder / "runs" / self.name / "logs"

    def check_curve(self, reference: str = "one-host") -> None:
        """The curve equals that of the run on one host: every step once, from the same samples, with the same loss."""
        mine, its = ([x for x in self.workspace.metrics(name) if "loss" in x] for name in (self.name, reference))
        assert [line["step"] for line in mine] == [line["step"] for line in its]
        assert [line["data_hash"] for line in mine] == [line["data_hash"] for line in its]
        assert [line["loss"] for line in mine] == pytest.approx([line["loss"] for line in its], abs=TOLERANCE)


def test_three_hosts_give_the_curve_of_one(cluster: Cluster, workspace: Workspace, reference: None) -> None:
    launch = Launch(cluster, workspace, "three", [1, 1, 1])
    output = launch.end()
    launch.check_curve()
    assert f"plan: 3 ranks on 3 host(s), rendezvous at {cluster.address('node1')} port" in output
    assert f"node3                    ranks 2-2  {cluster.address('node3')}  eth0" in output
    assert (launch.logs / "rank-2.log").exists()
    assert [entry["kind"] for entry in launch.history()] == ["finished"]


def test_deepspeed_typed_by_hand_runs_on_four_hosts(cluster: Cluster, workspace: Workspace, reference: None) -> None:
    launch = Launch(cluster, workspace, "by-hand", [1, 1, 1, 1], by_hand=True)
    output = launch.end()
    launch.check_curve()
    assert "x 4 ranks" in output


def test_openmpi_runs_on_two_hosts(cluster: Cluster, workspace: Workspace, reference: None) -> None:
    launch = Launch(cluster, workspace, "openmpi", [1, 1], "--launcher", "openmpi")
    launch.end()
    launch.check_curve()


def test_a_host_that_is_cut_off_is_left_out_and_taken_back(
    cluster: Cluster, workspace: Workspace, reference: None
) -> None:
    launch = Launch(cluster, workspace, "cut", [1, 1, 1], "--max-restarts", "3", "--take-back", "1", steps=LONG)
    launch.wait_for(lambda: launch.step() >= 15)
    cluster.cut("node3")
    try:
        launch.wait_for(lambda: "continuing without node3" in launch.text())
    finally:
        cluster.plug("node3")
    launch.wait_for(lambda: "all hosts can be used again" in launch.text())
    output = launch.end()
    launch.check_curve("long")
    assert "host node3 is gone" in output
    assert "continuing without node3" in output
    kinds = [(e["kind"], e["ranks"]) for e in launch.history()]
    assert kinds[0] == ("lost", 3)
    assert kinds[1:] == [("stopped", 2), ("finished", 3)], "node3 came back while the others trained"


def test_a_resume_is_proved_over_two_hosts(cluster: Cluster, workspace: Workspace) -> None:
    """Both ranks are killed, each by a shell on its own host, and resumed. Seed 5 chooses all ranks."""
    words = [
        PACKSPEED,
        "prove",
        str(workspace.run_file),
        "--set",
        "name=two-hosts",
        "--seed",
        "5",
        "--other-ranks",
        "0",
    ]
    done = subprocess.run(
        cluster.inside("node1", *words, "--json", "--hostfile", str(cluster.hostfile([1, 1]))),
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=workspace.folder, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert len(found["environment"]["ranks_per_host"]) == 2
    (same,) = found["legs"]
    assert same["killed"].startswith("all ranks killed (-9) after step ")
    assert (same["ranks"], same["samples_equal"]) == (2, True)
    assert same["losses_differ_by"] == same["weights_differ_by"] == 0.0
    assert same["resumed_from"]
    assert not [pid for name in cluster.names for pid in cluster.pids(name, "train.py")]


def test_a_frozen_rank_is_named(cluster: Cluster, workspace: Workspace, reference: None) -> None:
    launch = Launch(cluster, workspace, "frozen", [1, 2], "--max-restarts", "1", "--hang-seconds", "6")
    launch.wait_for(lambda: launch.step() >= 25)
    os.kill(launch.rank(1), signal.SIGSTOP)
    output = launch.end()
    launch.check_curve()
    assert "no rank made progress for" in output
    assert "rank 1 on node2 is still in" in output
    assert "the process is stopped" in output
    assert "2 other rank(s) wait in" in output
    assert launch.history()[0]["kind"] == "hung"


MEMORY_HOG = """\
import os, sys, threading, time

def take_memory():
    start_file, blocks = {start_file!r}, []
    while not os.path.exists(start_file):
        time.sleep(0.02)
    os.unlink(start_file)
    while True:
        blocks.append(b"x" * (8 << 20))

if os.environ.get("RANK") == "1":
    threading.Thread(target=take_memory, daemon=True).start()
"""


@pytest.fixture(scope="module")
def faulted(
    cluster: Cluster, workspace: Workspace, reference: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Launch, Launch]:
    """A run whose launcher is killed; and the same run again, whose rank 1 is killed, then takes all of its host's
    memory, then has the host's other processes killed with it; it completes in the end.
    """
    folder = tmp_path_factory.mktemp("faulted")
    start_file = folder / "start"
    (folder / "sitecustomize.py").write_text(MEMORY_HOG.format(start_file=str(start_file)))
    first = Launch(cluster, workspace, "faulted", [1, 1], steps=LONG)
    first.wait_for(lambda: first.step() >= 15)
    first.process.kill()
    first.end(code=-signal.SIGKILL)
    saved = max(int(p.name[5:]) for p in workspace.checkpoints("faulted").glob("step-*"))
    assert saved == first.step(), "the ranks saved before they stopped"
    with cluster.memory_limit("node2", 3 << 29):
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        options = ("--max-restarts", "3", "--env", f"PYTHONPATH={path}")
        launch = Launch(cluster, workspace, "faulted", [1, 1], *options, steps=LONG)
        killed = launch.wait_for_rank_1(saved + 10, after=first.rank(1))
        os.kill(killed, signal.SIGKILL)
        restarted = launch.wait_for_rank_1(saved + 15, after=killed)
        start_file.touch()
        launch.wait_for_rank_1(saved + 20, after=restarted)
        for pid in cluster.pids("node2"):
            os.kill(pid, signal.SIGKILL)
        launch.end()
    return first, launch


def test_a_killed_launcher_leaves_a_saved_run_and_no_orphan(faulted: tuple[Launch, Launch]) -> None:
    """The next launch continues the run through all the faults below."""
    faulted[1].check_curve("long")


def test_a_killed_rank_is_named_and_the_run_continues(faulted: tuple[Launch, Launch]) -> None:
    output = faulted[1].text()
    assert "rank 1 on node2 was killed by SIGKILL, but not by the kernel's OOM killer" in output
    assert "recovered: " in output
    assert [(e["kind"], e["ranks"]) for e in faulted[1].history()][:2] == [("died", 2), ("died", 2)]


def test_a_rank_that_runs_out_of_memory_is_named(faulted: tuple[Launch, Launch]) -> None:
    """Rank 1 took memory, as fast as it could, until the kernel ended it at the limit of the host's cgroup."""
    output = faulted[1].text()
    assert "rank 1 on node2 ran out of memory, in " in output
    assert "at the limit of 1.50 GiB of the cgroup /sys/fs/cgroup/" in output
    assert re.search(r"Peak resident memory there: rank 1 [01]\.\d\d GiB\.", output)


def test_a_host_whose_processes_are_killed_is_used_again(faulted: tuple[Launch, Launch]) -> None:
    history = faulted[1].history()
    assert len(history) == 4
    assert (history[-1]["kind"], history[-1]["ranks"]) == ("finished", 2)
    assert "node2" in faulted[1].text()


def doctor(cluster: Cluster, workspace: Workspace, *options: str) -> tuple[int, dict[str, Any]]:
    words = [PACKSPEED, "doctor", str(workspace.run_file), "--hostfile", str(cluster.hostfile([1, 1, 1])), "--json"]
    done = subprocess.run(
        cluster.inside("node1", *words, *options), cwd=workspace.folder, capture_output=True, text=True, timeout=120
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_doctor_has_no_findings_on_healthy_hosts(cluster: Cluster, workspace: Workspace) -> None:
    code, report = doctor(cluster, workspace, "--torch")
    assert (code, report["findings"]) == (0, []), report["findings"]
    assert set(report["bandwidth_gbit_s"]) == {"node1", "node2", "node3", "all-reduce", "torch all-reduce"}
    assert all(speed > 0 for speed in report["bandwidth_gbit_s"].values())


def test_the_doctor_names_a_slow_link(cluster: Cluster, workspace: Workspace) -> None:
    """node2 sends at 20 Mbit/s: neither its neighbours nor the first host are blamed."""
    with cluster.slowed("node2", "20mbit"):
        code, report = doctor(cluster, workspace)
    assert code == 1
    assert [finding["host"] for finding in report["findings"]] == ["node2"], report
    assert "0.02 Gbit/s, but the median" in report["findings"][0]["what"]


def test_the_doctor_names_a_host_whose_ports_are_closed(cluster: Cluster, workspace: Workspace) -> None:
    """ssh works, and every other connection to node3 is dropped."""
    with cluster.only_ssh("node3"):
        code, report = doctor(cluster, workspace)
    assert code == 1
    assert "node3" in {finding["host"] for finding in report["findings"]} or cluster.address("node3") in str(report)


BREAKS = {  # what is wrong on node2 -> a shell line in its own mount namespace, and the words of the finding
    "python": ("sed -i 's|^SetEnv|& PYTHONPATH={folder}/other-python|' /etc/ssh/sshd_config", "python:"),
    "package": ("mount --bind {folder}/METADATA {numpy}", "versions:"),
    "clock": ("sed -i 's|^SetEnv|& LD_PRELOAD={faketime} FAKETIME=+30s|' /etc/ssh/sshd_config", "the clock here by +"),
    "dataset": ("mount --bind {folder}/broken-other {folder}/tokens", "differs from that of the other hosts"),
    "no dataset": ("mount -t tmpfs none {folder}/tokens", "dataset"),
    "run folder": ("mount -t tmpfs none {folder}/runs", "is not the same folder"),
    "key": (": > /etc/ssh/authorized", "refuses your key"),
}


@pytest.fixture(scope="module")
def props(workspace: Workspace) -> dict[str, Path]:
    """A different dataset, METADATA of a different version, and the paths that a break replaces."""
    import numpy

    from packspeed.data.prepare.prepare import prepare

    prepare([str(workspace.folder / "python.txt")], workspace.folder / "broken-other", "bytes", val_fraction=0.1)
    metadata = next(Path(numpy.__file__).parents[1].glob("numpy-*.dist-info")) / "METADATA"
    text = metadata.read_text().splitlines()
    number = next(n for n, line in enumerate(text) if line.startswith("Version:"))
    (workspace.folder / "METADATA").write_text("\n".join([*text[:number], "Version: 1.0.0", *text[number + 1 :]]))
    (workspace.folder / "runs").mkdir(exist_ok=True)
    other = workspace.folder / "other-python"  # a machine may have one Python only, so this one states another version
    other.mkdir()
    (other / "sitecustomize.py").write_text("import sys\nsys.version = '3.9.1' + sys.version.lstrip('0123456789.')\n")
    faketime = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return {
        "folder": workspace.folder, "numpy": metadata, "faketime": faketime,
    }  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_the_doctor_names_what_is_broken(
    cluster: Cluster, workspace: Workspace, props: dict[str, Path], what: str
) -> None:
    line, words = BREAKS[what]
    cluster.start_sshd("node2", line.format(**props))
    try:
        code, report = doctor(cluster, workspace, "--no-bandwidth")
    finally:
        cluster.start_sshd("node2")
    assert code == 1
    assert {finding["host"] for finding in report["findings"]} == {"node2"}, report["findings"]
    assert any(words in finding["what"] for finding in report["findings"]), report["findings"]
    assert all(finding["do"] for finding in report["findings"])
