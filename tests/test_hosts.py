"""Hostfiles and their errors, what reaches a shell, which rank is named in a hang, ranks for the remaining hosts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packspeed.launch.cluster import attempt, cgroup
from packspeed.launch.cluster.attempt import LaunchOptions
from packspeed.launch.cluster.diagnosis import blocking_ranks, death_report, describe_exit, hang_report
from packspeed.launch.cluster.environment import forwarded_environment
from packspeed.launch.cluster.hostfile import read_hostfile, select_hosts
from packspeed.launch.cluster.hosts import Host, LaunchPlan, PlannedHost
from packspeed.launch.cluster.local_launcher import TRAIN
from packspeed.launch.cluster.messages import FactsRequest, HostFacts, RankDeath, RankState
from packspeed.launch.cluster.remote_launcher import (
    launcher_command,
    launcher_files,
    launcher_variables,
)
from packspeed.launch.cluster.ssh import CLOSE_S, AgentConnection, AgentPool, agent_command, ask_hosts
from packspeed.launch.cluster.supervisor import fit_slots
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.run_folder import heartbeat
from packspeed.launch.run_folder.heartbeat import (
    LAUNCH_ID,
    Beat,
    Heartbeat,
    last_beat,
    read_beats,
    remove_local_beats,
)
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


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node-1 slots = 2", [Host("node-1", 2)]),
        ("node-1\tslots\t=2\t", [Host("node-1", 2)]),
        ("node-1 slots=2 max_slots=8", [Host("node-1", 2)]),
        ("node-1 max-slots=8 slots=8", [Host("node-1", 8)]),
        ("node-1 slots=02", [Host("node-1", 2)]),
        ("\ufeffnode-1 slots=2\r\nnode_2.x slots=1 # last\r\n", [Host("node-1", 2), Host("node_2.x", 1)]),
        ("a slots=1\rb slots=2", [Host("a", 1), Host("b", 2)]),
        ("  # only this\n   a   slots=1#c", [Host("a", 1)]),
        ("2001:db8::7 slots=2", [Host("2001:db8::7", 2)]),
        ("[2001:DB8:0::7] slots=2\nfe80::1%eth0 slots=1", [Host("2001:db8::7", 2), Host("fe80::1%eth0", 1)]),
        ("::1 slots=2", [Host("::1", 2)]),
    ],
)
def test_forms_of_a_hostfile(tmp_path: Path, text: str, hosts: list[Host]) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(text.encode())
    assert read_hostfile(path) == hosts


@pytest.mark.slow
@given(
    content=st.one_of(
        st.binary(max_size=200), st.from_regex(r"([\w:.%\[\]-]* *(max_)?slots *= *\w*\s){1,4}").map(str.encode)
    )
)
def test_any_hostfile_gives_hosts_or_one_error(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed-hosts"
    path.write_bytes(content)
    hosts: list[Host] = []
    with contextlib.suppress(ConfigError):
        hosts = read_hostfile(path)
    if not hosts:
        with pytest.raises(ConfigError, match="fuzzed-hosts") as caught:
            read_hostfile(path)
        assert len(str(caught.value)) < 1000
    assert all(shlex.quote(host.name) == host.name or ":" in host.name for host in hosts)


@pytest.mark.parametrize(
    ("option", "text", "chosen"),
    [
        ("include", "b", "b=0,1"),
        ("include", "c@a", "a=0,1,2,3 c=0"),
        ("include", "a:2,0@b", "a=0,2 b=0,1"),
        ("include", "a@a:1", "a=1"),
        ("include", "a:1@a:3,1", "a=1,3"),
        ("exclude", "a", "b=0,1 c=0"),
        ("exclude", "a:0,1@b:1", "a=2,3 b=0 c=0"),
        ("exclude", "c:0", "a=0,1,2,3 b=0,1"),
    ],
)
def test_include_and_exclude_mean_what_they_mean_to_deepspeed(option: str, text: str, chosen: str) -> None:
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    hosts = [Host("a", 4), Host("b", 2), Host("c", 1)]
    selected = {host.name: list(host.device_ids) for host in select_hosts(hosts, **{option: text})}
    assert " ".join(f"{name}={','.join(map(str, ids))}" for name, ids in selected.items()) == chosen
    filters = {"inclusion": "", "exclusion": ""} | {f"{option.removesuffix('de')}sion": text}
    assert selected == parse_inclusion_exclusion({host.name: host.slots for host in hosts}, **filters)


def test_hosts_are_selected_by_ipv6_address() -> None:
    hosts = [Host("2001:db8::7", 2), Host("b", 1)]
    assert select_hosts(hosts, include="2001:db8:0::7") == hosts[:1]
    assert select_hosts(hosts, include="[2001:db8::7]:1@b") == [Host("2001:db8::7", 1, (1,)), hosts[1]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": "a", "exclude": "b"}, "Give only one of them"),
        ({"include": "x"}, "there is no host 'x'; the hosts are a, b"),
        ({"include": "a@"}, "there is no host ''"),
        ({"exclude": "a:2"}, "a has no slot '2'; it has 0 to 1"),
        ({"include": "a:"}, "a has no slot ''"),
        ({"include": "a:0:1"}, "a has no slot '0:1'"),
        ({"include": "a:-1"}, "a has no slot '-1'"),
        ({"exclude": "a@b"}, "no host is left"),
    ],
)
def test_a_selection_that_is_wrong_is_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=r"--(in|ex)clude") as caught:
        select_hosts([Host("a", 2), Host("b", 1)], **options)
    assert words in str(caught.value)


def divides(samples: int) -> Callable[[int], bool]:
    return lambda ranks: samples % ranks == 0


def test_chosen_devices_stay_those_when_ranks_are_taken_away() -> None:
    assert fit_slots([Host("a", 2, (1, 3)), Host("b", 2, (4, 6))], divides(3)) == [
        Host("a", 2, (1, 3)),
        Host("b", 1, (4,)),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=2\nb slots=2\na slots=4", "line 3: a is already in line 1"),
        ("node-a slots=2\n\n# c\r\nNODE-A slots=2", "line 4: NODE-A is already in line 1"),
        ("::1 slots=2\n[0:0::1] slots=1", "line 2: ::1 is already in line 1"),
        ("a slots=0", "line 1: slots=0 is not a number of ranks (1 to 1024). Remove hosts without ranks."),
        ("a slots=", "line 1: slots= is not a number"),
        ("a slots=-1", "line 1: slots=-1"),
        ("a slots=1.5", "line 1: slots=1.5"),
        ("a slots=1025", "line 1: slots=1025"),
        ("a slots=" + "9" * 5000, "9... is not a number of ranks"),
        ("a slots=\uff12", "line 1: slots=\uff12"),
        ("a slots=2 slots=2", "line 1: 'a slots=2 slots=2' sets slots twice"),
        ("a slots=4 max_slots=2", "line 1: slots=4 is more than max_slots=2"),
        ("a slots=2 max_slots=two", "line 1: max_slots=two"),
        ("a max_slots=2", "slots=N is missing"),
        ("a slots=2 gpus=2", "'gpus=2' is not a known setting"),
        ("a slots=2 and more", "'and' is not a known setting"),
        ("a slots=2x", "slots=2x is not a number"),
        ("a slots=2,b slots=2", "line 1: slots=2,b is not a number"),
        ("a:2", "is not a host"),
        ("a SLOTS=2", "'SLOTS=2' is not a known setting"),
        ("slots=2", "is not a host"),
        ("slots=2 a", "is not a host"),
        ("a;slots=2", "is not a host"),
        ("a\0 slots=2", "not a valid host name"),
        ("\u0430 slots=2", "not a valid host name"),
        ("2001:db8::7::1 slots=1", "not a valid host name"),
        ("[2001:db8::7 slots=1", "not a valid host name"),
        ("fe80::1%eth0;x slots=1", "not a valid host name"),
        ("10.0.0.1:22 slots=1", "not a valid host name"),
        ("b" * 300 + " slots=1", "b... is not a valid host name"),
        ("#" * (2**20 + 1), "larger than 1 MiB"),
        ("a slots=two", "line 1: slots=two"),
        ("a slot=2", "line 1: 'a slot=2' is not a host: 'slot=2' is not a known setting"),
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


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder; the current folder is tmp_path."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    return tmp_path / "home"


def test_deepspeed_env_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    (home / ".deepspeed_env").write_text("A=home\nB=home\nNCCL_DEBUG=WARN\n")
    Path(".deepspeed_env").write_bytes(b"\xef\xbb\xbf# ours\r\n\r\nB = here=1\r\nC='a $b'\r\nD=\r\n")
    got = forwarded_environment(["A=option"])
    assert {name: got[name] for name in ("A", "B", "C", "D", "NCCL_DEBUG")} == {
        "A": "option", "B": "here=1", "C": "a $b", "D": "", "NCCL_DEBUG": "WARN",
    }  # fmt: skip
    Path("other").write_text("E=1")
    monkeypatch.setenv("DS_ENV_FILE", "other")
    got = forwarded_environment([])
    assert got["E"] == "1"
    assert "B" not in got
    assert "E" not in forwarded_environment([], files=False)


@pytest.mark.parametrize(
    "line", [b"A", b"1A=2", b"A B=1", b"=1", b"A=$X/y", b"A=`x`", b"A=\xff", b"\xd0\xb0=1", b"A=\0"]
)
def test_a_bad_line_of_deepspeed_env_is_named(home: Path, line: bytes) -> None:
    Path(".deepspeed_env").write_bytes(b"GOOD=1\n" + line + b"\n")
    with pytest.raises(ConfigError, match=r"deepspeed_env(, line 2|: cannot be read)"):
        forwarded_environment([])


# --- DeepSpeed's own launchers ----------------------------------------------------------------------------------------

# What a shell, pdsh or DeepSpeed might change. Everything that could run is harmless.
UNUSUAL = [
    "plain", "a b", "$HOME", "a $HOME b", "$(echo x)", "a $(echo x)", "`echo x`", 'a "b" c', "a 'b' c", "it's", 'q"q',
    "a;echo x", "a && echo x", "a|cat", "a>b", "*", "~", "#x", "a #x", "\\", "a \\ b\\", '\\" a', "%h", "a %n %%", "!x",
    "{a,b}", "[a-z]", "train.optimizer={name: adamw, lr: 1e-3}", "\u00e9 \u2028", "(a)", "a\tb",
]  # fmt: skip


def plan_of(env: dict[str, str]) -> LaunchPlan:
    return LaunchPlan([PlannedHost(Host("node-1", 2), 0, "127.0.0.1", "lo")], 1, env)


# As ssh does, it gives the remote shell all words after the host's name, joined by spaces.
FAKE_SSH = """#!/bin/sh
while [ "$1" != node-1 ]; do shift; done
shift
case "$*" in *deepspeed.launcher.launch*) exec sh -c "$*";; esac
"""


@pytest.mark.launch
def test_pdsh_changes_no_argument_and_no_variable(tmp_path: Path) -> None:
    """Through DeepSpeed's runner, the real pdsh and a shell in place of ssh and the remote host."""
    ssh = tmp_path / "ssh"
    ssh.write_text(FAKE_SSH)
    ssh.chmod(0o755)
    # In place of deepspeed.launcher.launch on the remote host: print what arrived.
    shown = tmp_path / "python"
    shown.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if k[:2] == 'V_' or k == 'PYTHONX'}]))\n"
    )
    shown.chmod(0o755)
    draw = random.Random(1)
    texts = UNUSUAL + ["".join(draw.choices(" $`\"'\\%(){};x\u00e9", k=draw.randint(1, 12))) for _ in range(200)]
    env = {f"V_{number}": text for number, text in enumerate(texts) if text == text.strip()}
    plan = plan_of({**env, "V_KEY": "s$cret"})
    script = f"""
import sys
from deepspeed.launcher import runner
words = {launcher_command(plan, "pdsh", Path("HOSTFILE"), texts)!r}[3:]
words[words.index("HOSTFILE")] = {str(tmp_path / "hosts")!r}
runner.sys.executable = {str(shown)!r}
runner.main(words)
"""
    (tmp_path / "hosts").write_text("node-1 slots=2\n")
    variables = launcher_variables(plan, "pdsh", {"PYTHONX": "$(echo x) `y`"})
    (tmp_path / "variables").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DS_ENV_FILE": str(tmp_path / "variables"),
        "PYTHONX": "$(echo x) `y`",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("node-1: [")]
    assert len(lines) == 1, done.stdout + done.stderr
    arguments, variables = json.loads(lines[0].removeprefix("node-1: "))
    assert arguments[arguments.index(str(TRAIN)) + 1 :] == texts
    assert variables == {**plan.env, "PYTHONX": "$(echo x) `y`"}


@pytest.mark.parametrize("value", ["two\nlines", " a", "a\r"])
def test_what_a_launcher_cannot_pass_on_is_refused(value: str) -> None:
    for launcher in ("pdsh", "openmpi"):
        with pytest.raises(ConfigError, match="value of V"):
            launcher_variables(plan_of({"V": value}), launcher, {})
    with pytest.raises(ConfigError, match="become part of it"):
        launcher_variables(plan_of({"V": "a b"}), "openmpi", {})
    chosen = LaunchPlan([PlannedHost(Host("a", 1, (3,)), 0, "127.0.0.1", "lo")], 1, {})
    assert "a:3" in launcher_command(chosen, "pdsh", Path("h"), [])
    with pytest.raises(ConfigError, match="cannot use only some devices"):
        launcher_command(chosen, "openmpi", Path("h"), [])
    with pytest.raises(ConfigError, match="does not accept IPv6"):
        launcher_command(LaunchPlan([PlannedHost(Host("::2", 1), 0, "::2", "lo")], 1, {}), "pdsh", Path("h"), [])


def test_a_folder_that_a_shell_would_change_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a $b").mkdir()
    monkeypatch.chdir(tmp_path / "a $b")
    with pytest.raises(ConfigError, match="without quotes"):
        launcher_command(plan_of({}), "pdsh", Path("h"), [])


def test_secrets_are_for_the_owner_alone_and_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with launcher_files(plan_of({"WANDB_API_KEY": "s3cret"}), "pdsh") as (hosts, variables):
        assert "WANDB_API_KEY=s3cret" in variables.read_text()
        assert hosts.read_text() == "node-1 slots=2\n"
        assert variables.stat().st_mode & 0o777 == 0o600
        assert variables.parent.stat().st_mode & 0o777 == 0o700
    assert not variables.parent.exists()
    assert list(tmp_path.iterdir()) == []


def beat(rank: int, phase: str, collective: str = "", step: int = 411) -> Beat:
    return Beat(rank, 1, f"node-{rank // 2}", phase, collective, step, 9, 1000.0)


def test_the_rank_that_is_not_in_the_collective_is_named() -> None:
    beats = {rank: beat(rank, "communication", "reduce_scatter") for rank in range(3)} | {3: beat(3, "data")}
    hosts = {rank: f"node-{rank // 2}" for rank in range(4)}
    assert blocking_ranks(beats, {}, {}, hosts) == [3]
    lines = hang_report(beats, {}, {}, hosts, 1094.0)
    assert lines[0].startswith("rank 3 on node-1 is still in data of step 412, 94 s")
    assert lines[-1] == "3 other rank(s) wait in reduce_scatter of step 412"
    beats[3] = beat(3, "communication", "all_gather")
    assert blocking_ranks(beats, {}, {}, hosts) == [3], "another collective than the others"
    beats[3] = beats[0]
    assert blocking_ranks(beats, {}, {}, hosts) == []
    states: dict[int, RankState] = {0: {"state": "sleeping", "stack": ""}, 1: {"state": "stopped", "stack": ""}}
    assert blocking_ranks(beats, states, {"node-1": "no answer"}, hosts) == [1, 2, 3]


def test_ranks_in_different_collectives_are_not_blamed_on_the_network() -> None:
    beats = {0: beat(0, "communication", "all_reduce"), 1: beat(1, "communication", "all_gather")}
    lines = hang_report(beats, {}, {}, {0: "node-0", 1: "node-0"}, 1094.0)
    assert lines[0] == "1 rank(s) wait in all_reduce of step 412"
    assert "different places" in lines[-1]
    assert "network" not in lines[-1]
    lines = hang_report({0: beats[0], 1: beat(1, "communication", "all_reduce")}, {}, {}, {0: "a", 1: "b"}, 1094.0)
    assert "check the network" in lines[-1]


def test_a_rank_that_still_verifies_is_named() -> None:
    beats = {rank: beat(rank, "communication", "verifying", 0) for rank in range(3)} | {3: beat(3, "verifying", step=0)}
    lines = hang_report(beats, {}, {}, {rank: f"node-{rank // 2}" for rank in range(4)}, 1094.0)
    assert lines[0].startswith("rank 3 on node-1 is still in the phase 'verifying', 94 s")
    assert lines[-1] == "3 other rank(s) wait in the phase 'verifying'"


@pytest.mark.parametrize(
    ("hang_s", "beats", "ends_at"),
    [
        (600.0, [], 900),  # no rank beats: START_S
        (2000.0, [], 2000),  # a longer --hang-seconds counts at the start too
        (600.0, [(100, "importing"), (5000, "verifying")], 5000 + 900),  # longer than START_S, but it beats
        (600.0, [(100, "importing"), (800, "loading"), (900, "forward")], 900 + 600),
        (600.0, [(100, "forward"), (400, "verifying")], 400 + 900),  # a rewind
    ],
)
def test_a_start_ends_only_if_no_rank_makes_progress(
    monkeypatch: pytest.MonkeyPatch, hang_s: float, beats: list[tuple[int, str]], ends_at: int
) -> None:
    """A clock of our own: (time, phase) are beats of rank 0, which repeats the last one every 500 s until the next."""
    now = [0.0]

    def read(logs: Path) -> dict[int, Beat]:
        begun = [(at, phase) for at, phase in beats if at <= now[0]]
        if not begun:
            return {}
        (at, phase), last = begun[-1], len(begun) == len(beats)
        count = len(begun) * 1000 + (0 if last else int(now[0] - at) // 500)
        return {0: dataclasses.replace(beat(0, phase), count=count), 1: beat(1, "data")}

    made = object.__new__(attempt.Attempt)
    made.options = LaunchOptions([], {}, Path(), hang_s=hang_s)
    made.started, made.logs, made.deaths = 0.0, Path(), []
    made.host_of, made.pool, made.prepare = {0: "a", 1: "a"}, AgentPool(), False
    monkeypatch.setattr(attempt, "read_beats", read)
    monkeypatch.setattr(attempt, "time", SimpleNamespace(
        time=lambda: now[0], monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + 5)
    ))  # fmt: skip
    monkeypatch.setattr(made, "send", lambda word: None)
    monkeypatch.setattr(made, "_hang", lambda since: attempt.Outcome("hung", 1, [], now[0]))
    made.agents = {"a": SimpleNamespace(poll=lambda: None)}  # type: ignore[dict-item]  # an agent that runs
    assert made.watch().at == pytest.approx(ends_at, abs=20)


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
    death: RankDeath = {
        "died": 3,
        "beat": None,
        "status": -9,
        "at": 1.0,
        "peak_bytes": peaks,
        "oom_kills": 1,
        "limit": limit,
    }
    hosts = {3: "node-1"}
    output = death_report(death, hosts, {3: beat(3, "backward")})
    assert output.startswith("rank 3 on node-1 ran out of memory, in backward of step 412: the kernel's OOM killer")
    assert "the limit of 2.00 GiB of the cgroup /sys/fs/cgroup/job, of which 2.00 GiB were used at most" in output
    assert "rank 2 0.50 GiB, rank 3 1.00 GiB" in output
    assert "the machine had no memory left" in death_report({**death, "limit": None, "status": None}, hosts, {})
    assert "not by the kernel's OOM killer" in death_report({**death, "limit": None, "oom_kills": 0}, hosts, {})


def test_an_agents_exit_code_is_put_into_words() -> None:
    assert describe_exit(-9 & 0xFF) == "was killed by SIGKILL"
    assert describe_exit(1) == "ended with exit code 1"


def test_beats_survive_being_read_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest beat is in the memory of the host at once, and in the run folder within a second."""
    launch = f"test-{os.getpid()}"
    monkeypatch.setenv(LAUNCH_ID, launch)
    monkeypatch.setattr(heartbeat, "SHARED_S", 0.05)
    writer = Heartbeat(tmp_path, 7, "node-9", 4)
    for _ in range(100):
        writer("forward")
    writer("communication", "all_reduce")
    newest = last_beat(launch, 7)
    assert newest is not None
    (tmp_path / "rank-8.beat").write_text('{"rank": 8, "pi')
    deadline = time.monotonic() + 10
    while (beats := read_beats(tmp_path)) != {7: Beat(**newest)} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (beats[7].phase, beats[7].collective, beats[7].step) == ("communication", "all_reduce", 4)
    assert beats[7].count == 101
    assert last_beat(launch, 8) is None
    remove_local_beats(launch)
    assert last_beat(launch, 7) is None


def test_the_first_phase_of_training_is_in_the_run_folder_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that freezes in its first second of training must not seem to start still."""
    monkeypatch.setenv(LAUNCH_ID, f"test-{os.getpid()}")
    monkeypatch.setattr(heartbeat, "SHARED_S", 1000)
    writer = Heartbeat(tmp_path, 7, "node-9", 0)
    writer("building")
    deadline = time.monotonic() + 10
    while not read_beats(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)  # the thread writes the first beat, and then sleeps
    assert read_beats(tmp_path)[7].starting
    writer("other", "building")
    assert read_beats(tmp_path)[7].phase == "building", "it waits for a rank that builds"
    writer("forward")
    writer("backward")
    assert read_beats(tmp_path)[7].phase == "forward", "only the first is written at once"
    remove_local_beats(f"test-{os.getpid()}")


def test_what_hosts_have_in_common_is_found_in_linear_time() -> None:
    hosts = [Host(f"node-{i}", 8) for i in range(1024)]
    plan = LaunchPlan([PlannedHost(host, 8 * i, "10.0.0.1", "eth0") for i, host in enumerate(hosts)], 29500, {})
    assert plan.device_groups == [(1024, list(range(8)))]
    mixed = LaunchPlan([*plan.hosts[:2], PlannedHost(Host("x", 2, (3, 5)), 16, "", "")], 1, {})
    assert mixed.device_groups == [(2, list(range(8))), (1, [3, 5])]


class RecordedConnection(AgentConnection):
    """Notes how long `close` may wait."""

    waits: ClassVar[list[float]] = []

    def close(self, timeout_s: float = CLOSE_S) -> None:
        self.waits.append(timeout_s)
        super().close(timeout_s)


@pytest.mark.launch
def test_agents_that_do_not_exit_are_closed_together() -> None:
    """They share one deadline. Before, each was killed after a second of its own."""
    command = [sys.executable, "-S", "-c", "import time; time.sleep(1000)"]
    with AgentPool(lambda host: command) as pool:
        for i in range(20):
            pool.connections[f"node-{i}"] = RecordedConnection(command)
    assert all(connection.process.returncode == -9 for connection in pool.connections.values())
    assert RecordedConnection.waits[0] > 0
    assert RecordedConnection.waits[1:] == [0.0] * 19


@pytest.mark.parametrize("hang_s", [10.0, attempt.ENDING_S])
def test_launchers_get_their_time_after_all_ranks_have_ended(
    hang_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank answers any more: the attempt has failed only after hang_s and ENDING_S, also if both are equal."""

    class Clock:
        now = 1000.0

        def time(self) -> float:
            return self.now

        monotonic = time

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    class Running:
        def poll(self) -> None:
            return None

    clock = Clock()
    monkeypatch.setattr(attempt, "time", clock)
    beat = {"rank": 0, "pid": 1, "host": "a", "phase": "step", "collective": "", "step": 3, "count": 9, "time": 1000.0}
    (tmp_path / "rank-0.beat").write_text(json.dumps(beat))
    watched: Any = object.__new__(attempt.Attempt)
    watched.started, watched.agents, watched.deaths, watched.logs = clock.now, {"a": Running()}, [], tmp_path
    watched.options, watched.host_of = attempt.LaunchOptions([], {}, tmp_path, hang_s=hang_s), {0: "a"}
    watched.send, watched.pool, watched.prepare = lambda word: None, AgentPool(), False
    asked: list[float] = []
    watched._hang = lambda since: asked.append(clock.now) or attempt.Outcome("failed", 1, [], since)
    assert watched.watch().kind == "failed"
    assert len(asked) == 2
    assert asked[1] - asked[0] == pytest.approx(attempt.ENDING_S, abs=1)


def test_ranks_of_the_remaining_hosts_divide_the_batch() -> None:
    hosts = [Host("a", 2), Host("b", 2), Host("c", 1)]
    assert fit_slots(hosts, divides(10)) == hosts
    assert fit_slots(hosts, divides(8)) == [Host("a", 2), Host("b", 2)]
    assert fit_slots(hosts, divides(9)) == [Host("a", 2), Host("b", 1)]
    assert fit_slots(hosts, divides(7)) == [Host("a", 1)]


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
