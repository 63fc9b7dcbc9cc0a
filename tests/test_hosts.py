"""Hostfiles and their errors, what reaches a shell, which rank is named in a hang, ranks for the remaining hosts."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packspeed.launch.cluster import cgroup
from packspeed.launch.cluster.diagnosis import blocking_ranks, death_report, describe_exit, hang_report
from packspeed.launch.cluster.hosts import Host, forwarded_environment, read_hostfile
from packspeed.launch.cluster.messages import FactsRequest, HostFacts, RankDeath, RankState
from packspeed.launch.cluster.ssh import agent_command, ask_hosts
from packspeed.launch.cluster.supervisor import fit_slots
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.run_folder.heartbeat import Beat, Heartbeat, read_beats
from packspeed.launch.trials.rehearse import Fault, parse_fault
from support.workspace import Workspace

PACKSPEED = str(Path(sys.executable).with_name("packspeed"))


def hostfile(folder: Path, text: str) -> list[Host]:
    path = folder / "hosts"
    path.write_text(text)
    return read_hostfile(path)


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    text = "# two\nnode-1 slots=2\n\n10.0.0.2 slots=4   # the other\n"
    hosts = hostfile(tmp_path, text)
    assert {host.name: host.slots for host in hosts} == dict(fetch_hostfile(str(tmp_path / "hosts")))
    assert hostfile(tmp_path, "node-1 slots = 2") == [Host("node-1", 2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=2\nb slots=2\na slots=4", "line 3: a is already in line 1"),
        ("a slots=0", "line 1: slots=0"),
        ("a slots=two", "line 1: slots=two"),
        ("a slot=2", "line 1: 'a slot=2' is not a host"),
        ("a", "is not a host"),
        ("a;touch${IFS}x slots=2", "not a valid host name"),
        ("$(touch x) slots=1", "is not a host"),
        ("-oProxyCommand=x slots=1", "not a valid host name"),
        ("me@a slots=1", "~/.ssh/config"),
        ("localhost slots=1\nb slots=1", "called localhost"),
        ("# nothing\n", "lists no hosts"),
    ],
)
def test_every_error_is_reported_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        hostfile(tmp_path, text)
    assert words in str(caught.value)


@pytest.mark.launch
def test_a_missing_hostfile_is_an_error_and_trains_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [PACKSPEED, "launch", "launch/configs/quickstart.yaml", "--hostfile", str(tmp_path / "no")],
        capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    assert done.returncode == 2
    assert "cannot be read" in done.stderr
    assert "Nothing was started" in done.stderr


@given(python=st.text(min_size=1).filter(lambda text: "\0" not in text and max(text) < "\ud800"))
def test_nothing_reaches_the_remote_shell_unquoted(python: str) -> None:
    words = agent_command(Host("node-1", 1), python)
    assert words[-3:-1] == ["--", "node-1"]
    assert shlex.split(words[-1]) == [python, "-m", "packspeed.launch.cluster.agent"]


def test_ssh_checks_host_keys_and_asks_nothing() -> None:
    words = " ".join(agent_command(Host("node-1", 1)))
    assert "BatchMode=yes" in words
    assert "StrictHostKeyChecking" not in words


@pytest.mark.launch
def test_the_agent_answers_without_a_shell(tmp_path: Path) -> None:
    request: FactsRequest = {
        "do": "facts",
        "cwd": str(tmp_path),
        "port": 0,
        "run_folder": str(tmp_path / "a $(b); c"),
        "token": "t",
    }
    answer = ask_hosts([Host("localhost", 1)], lambda host: request, HostFacts).answers["localhost"]
    assert isinstance(answer["port"], int)
    assert answer["writable"] is True
    assert answer["port"] > 0
    assert answer["versions"]["torch"].startswith("2.")
    assert len(list((tmp_path / "a $(b); c" / ".hosts").iterdir())) == 1


def test_only_listed_variables_leave_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MY_SECRET", "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert forwarded_environment([]).get("NCCL_DEBUG") == "INFO"
    assert {"MY_SECRET", "CUDA_VISIBLE_DEVICES"}.isdisjoint(forwarded_environment([]))
    assert {"MY_SECRET": "x", "A": "b=c"}.items() <= forwarded_environment(["MY_SECRET", "A=b=c"]).items()
    with pytest.raises(ConfigError, match="not set here"):
        forwarded_environment(["NOT_THERE"])
    with pytest.raises(ConfigError, match="not a valid variable name"):
        forwarded_environment(["a b=c"])


def beat(rank: int, phase: str, collective: str = "", step: int = 411) -> Beat:
    return Beat(rank, 1, f"node-{rank // 2}", phase, collective, step, 9, 1000.0)


def test_the_rank_that_is_not_in_the_collective_is_named() -> None:
    beats = {rank: beat(rank, "communication", "reduce_scatter") for rank in range(3)} | {3: beat(3, "data")}
    hosts = {rank: f"node-{rank // 2}" for rank in range(4)}
    assert blocking_ranks(beats, {}, {}, hosts) == [3]
    lines = hang_report(beats, {}, {}, hosts, 1094.0)
    assert lines[0].startswith("rank 3 on node-1 is still in data of step 412, 94 s")
    assert lines[-1] == "3 other(s) wait in reduce_scatter of step 412"
    beats[3] = beat(3, "communication", "all_gather")
    assert blocking_ranks(beats, {}, {}, hosts) == [3], "another collective than the others"
    beats[3] = beats[0]
    assert blocking_ranks(beats, {}, {}, hosts) == []
    states: dict[int, RankState] = {0: {"state": "sleeping", "stack": ""}, 1: {"state": "stopped", "stack": ""}}
    assert blocking_ranks(beats, states, {"node-1": "no answer"}, hosts) == [1, 2, 3]


@pytest.mark.parametrize("version", [1, 2])
def test_limits_and_kills_of_both_cgroup_versions_are_read(tmp_path: Path, version: int) -> None:
    """The files as the kernel writes them: a job with a limit inside a slice with a wider one."""
    root, own, vmstat = tmp_path / "cgroup", tmp_path / "own", tmp_path / "vmstat"
    inner = root / ("memory/slice/job" if version == 1 else "slice/job")
    inner.mkdir(parents=True)
    vmstat.write_text("nr_free_pages 7\noom_kill 5\n")
    if version == 1:
        own.write_text("4:memory:/slice/job\n1:name=systemd:/\n0::/\n")
        (inner / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
        for folder, limit in ((inner, 2**30), (inner.parent, 2**31), (root / "memory", 9223372036854771712)):
            (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (inner / "memory.max_usage_in_bytes").write_text("1000\n")
    else:
        own.write_text("0::/slice/job\n")
        (root / "cgroup.controllers").write_text("cpu memory\n")
        (inner / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n")
        for folder, text in ((inner, f"{2**30}\n"), (inner.parent, "max\n")):
            (folder / "memory.max").write_text(text)
        (inner / "memory.peak").write_text("1000\n")
    folders = cgroup.groups(root, own)
    assert folders[0] == inner
    assert cgroup.limit(folders) == (2**30, 1000, str(inner))
    assert cgroup.oom_kills(folders, vmstat) == 2
    own.write_text("4:memory:/not/seen/from/here\n0::/not/seen/from/here\n")
    folders = cgroup.groups(root, own)
    assert cgroup.limit(folders) is None
    assert cgroup.oom_kills(folders, vmstat) == 5, "the machine's count if our cgroup has none"


def test_a_rank_killed_for_memory_is_distinguished_from_a_killed_one() -> None:
    limit = (2**31, 2**31, "/sys/fs/cgroup/job")
    peaks = {"2": 2**29, "3": 2**30}
    death: RankDeath = {"died": 3, "status": -9, "at": 1.0, "peak_bytes": peaks, "oom_kills": 1, "limit": limit}
    hosts = {3: "node-1"}
    output = death_report(death, hosts, {3: beat(3, "backward")})
    assert output.startswith("rank 3 on node-1 ran out of memory, in backward of step 412: the kernel's OOM killer")
    assert "the limit of 2.00 GiB of the cgroup /sys/fs/cgroup/job, of which 2.00 GiB were used at most" in output
    assert "rank 2 0.50 GiB, rank 3 1.00 GiB" in output
    assert "the machine had no memory left" in death_report({**death, "limit": None, "status": None}, hosts, {})
    assert "not by the OOM killer" in death_report({**death, "limit": None, "oom_kills": 0}, hosts, {})


def test_an_agents_exit_code_is_put_into_words() -> None:
    assert describe_exit(-9 & 0xFF) == "was killed by SIGKILL"
    assert describe_exit(1) == "ended with exit code 1"


def test_beats_survive_being_read_at_any_time(tmp_path: Path) -> None:
    writer = Heartbeat(tmp_path, 7, "node-9", 4)
    writer("forward")
    writer("communication", "all_reduce")
    (tmp_path / "rank-8.beat").write_text('{"rank": 8, "pi')
    beats = read_beats(tmp_path)
    assert list(beats) == [7]
    assert (beats[7].phase, beats[7].collective, beats[7].step, beats[7].count) == ("communication", "all_reduce", 4, 2)


def test_ranks_of_the_remaining_hosts_divide_the_batch() -> None:
    hosts = [Host("a", 2), Host("b", 2), Host("c", 1)]
    assert fit_slots(hosts, 10) == hosts
    assert fit_slots(hosts, 8) == [Host("a", 2), Host("b", 2)]
    assert fit_slots(hosts, 9) == [Host("a", 2), Host("b", 1)]
    assert fit_slots(hosts, 7) == [Host("a", 1)]


@pytest.mark.launch
@pytest.mark.timeout(1100)
def test_a_rehearsal_survives_its_faults(workspace: Workspace) -> None:
    """Two pretended hosts: slow network, frozen rank, lost host; the curve is that of an undisturbed rehearsal."""
    words = [PACKSPEED, "rehearse", str(workspace.run_file), "--slots", "1", "--hang-seconds", "5", "--steps", "18"]
    faults = ["--fault", "slow:200@3", "--fault", "freeze:1@5", "--fault", "cut:host2@10"]
    folder = workspace.folder / "runs" / ".rehearse-base" / "base"
    losses, output = [], ""
    for options in ([], faults):
        done = subprocess.run([*words, *options], cwd=workspace.folder, capture_output=True, text=True, timeout=500)
        output = done.stdout
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(losses[1]) == 18
    assert "rank 1 on host2 is still in" in output
    kinds = [json.loads(line)["kind"] for line in (folder / "launches.jsonl").read_text().splitlines()]
    assert kinds[0] == "hung"
    assert kinds[-1] == "finished"
    assert len(kinds) == 3


def test_a_fault_that_cannot_happen_is_refused() -> None:
    hosts = [Host("host1", 2), Host("host2", 2)]
    assert parse_fault("kill:3@7", hosts) == Fault("kill", "3", 7)
    for text in ("kill:4@7", "cut:host3@1", "melt:1@2", "kill:1", "fill:x@1", "delay:0@3"):
        with pytest.raises(ConfigError, match="--fault"):
            parse_fault(text, hosts)
