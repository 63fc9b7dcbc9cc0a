"""Restarts from a warm process: they give the same run as new processes, and when new processes are started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from packspeed.launch import warm
from packspeed.launch.cluster import attempt
from packspeed.launch.cluster.hosts import Host
from packspeed.launch.cluster.local_launcher import TRAIN
from packspeed.launch.cluster.messages import KillAnswer
from packspeed.launch.cluster.ssh import AgentPool
from packspeed.launch.cluster.warm_start import ROOM, WarmProcess
from packspeed.launch.run_folder.heartbeat import read_beats
from support.ranks import run_many
from support.workspace import Workspace

AGENT = [sys.executable, "-m", "packspeed.launch.cluster.agent"]


def wait_for(condition: Callable[[], Any], seconds: float = 200) -> Any:
    """Wait until the condition is true, and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def stack_start(pid: int) -> int:
    """Address of a process's command line. Only processes forked from one another have the same one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[45])


# --- a complete restart -----------------------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_a_warm_restart_gives_the_same_metrics(workspace: Workspace, request: pytest.FixtureRequest) -> None:
    """Rank 1 is killed when a warm process waits: the next ranks are forks, and the run is that without a failure."""
    sets = ("train.steps=100", "checkpoint={every_steps: 20}", "eval.every_steps=0", "model.dropout=0.1")
    codes, output = run_many(workspace.folder / "never_killed", [workspace.arguments("never_killed", *sets)])
    assert codes == [0], output
    run, text = workspace.folder / "runs" / "warm_restart", workspace.folder / "warm_restart.output"
    command = [sys.executable, "-c", "from packspeed.launch.cli import main; main()", "launch", str(workspace.run_file)]
    command += [f"--set={text}" for text in ("name=warm_restart", *sets)] + ["--ranks", "2", "--max-restarts", "1"]
    with text.open("wb") as file:
        launch = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    request.addfinalizer(launch.wait)
    request.addfinalizer(launch.kill)  # called first: a test that fails must leave no launch behind

    def ranks(step: int, *former: psutil.Process) -> list[psutil.Process]:
        """Both ranks, once they have done a step and are others than the former ones; until then an empty list."""
        assert launch.poll() is None, text.read_text()
        beats = read_beats(run / "logs").values()
        pids = [beat.pid for beat in sorted(beats, key=lambda beat: beat.rank) if beat.step >= step]
        new = len(pids) == 2 and not {*pids} & {process.pid for process in former}
        return [psutil.Process(pid) for pid in pids] if new else []

    def waiting() -> bool:
        """Whether a warm process has imported everything."""
        for process in psutil.Process(launch.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it may have ended
                if process.cmdline()[3:4] == ["waiting"]:
                    return True
        return False

    first = wait_for(lambda: ranks(1))
    first[0].suspend()  # the run must not be finished before the warm process is ready
    wait_for(waiting)
    first[0].resume()
    first[1].kill()
    second = wait_for(lambda: ranks(0, *first))
    for process in second:
        process.suspend()
    [launcher] = {process.ppid() for process in second}
    assert len({stack_start(pid) for pid in (launcher, *(process.pid for process in second))}) == 1, "forked"
    assert "deepspeed.launcher.launch" in psutil.Process(launcher).cmdline()
    for number, process in enumerate(second):
        assert process.cmdline()[1:4] == ["-u", str(TRAIN), f"--local_rank={number}"]
        environ = process.environ()
        assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == (str(number), str(number), "2")
        assert int(environ[warm.LAUNCHER]) == psutil.Process(launcher).ppid(), "the agent has adopted the launcher"
        assert ROOM not in environ
    for process in second:
        process.resume()
    assert launch.wait(400) == 0, text.read_text()
    output = text.read_text()
    assert "restart 1 of 1 in 0 s" in output
    assert warm.COLD not in output
    assert workspace.curve("warm_restart") == workspace.curve("never_killed")


# --- the warm process and its agent -----------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.parametrize(("silence_s", "code"), [(1000.0, -signal.SIGKILL), (0.5, 0)])
def test_a_warm_process_ends_with_its_agent(tmp_path: Path, silence_s: float, code: int) -> None:
    """Also if the agent is killed, or ends because it hears nothing from its supervisor."""
    request = {
        "do": "prepare", "id": "x", "cwd": str(tmp_path), "env": {}, "hosts": [(1, [0])], "node_rank": 0,
        "master": "127.0.0.1", "port": 1, "script": str(TRAIN), "arguments": [], "silence_s": silence_s,
    }  # fmt: skip
    with subprocess.Popen(AGENT, stdin=subprocess.PIPE) as agent:
        assert agent.stdin is not None
        agent.stdin.write(json.dumps(request).encode() + b"\n")
        agent.stdin.flush()
        if code:
            [process] = wait_for(lambda: psutil.Process(agent.pid).children())
            wait_for(lambda: "importing" in process.cmdline())
            agent.kill()
            wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 20)
        assert agent.wait(60) == code


@pytest.mark.launch
def test_without_a_usable_warm_process_there_is_no_launcher(tmp_path: Path) -> None:
    """The agent then starts the launcher as a new process. One is killed, the other must not be forked."""
    killed = WarmProcess(["x"], os.environ)
    killed.process.kill()
    assert killed.start_launcher(["x"], os.environ) is None
    (tmp_path / "sitecustomize.py").write_text("import os; rank = os.environ.get('RANK')")
    foreign = WarmProcess(["x"], {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    assert foreign.start_launcher(["x"], os.environ) is None


@pytest.mark.launch
def test_a_process_with_threads_must_not_be_forked() -> None:
    code = """
import threading
from packspeed.launch.engine.preload import why_not_forkable
event = threading.Event()
print(repr(why_not_forkable()))
threading.Thread(target=event.wait).start()
print(repr(why_not_forkable()))
event.set()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["''", "'2 threads are running'"], done.stderr


@pytest.mark.launch
def test_an_agent_that_has_ended_is_started_again() -> None:
    """The pool of a supervisor keeps agents between attempts. If one was killed, a new one answers."""
    with AgentPool(lambda host: AGENT, again=True) as pool:
        for _ in range(2):
            replies = pool.ask([Host("localhost", 1)], lambda host: {"do": "kill", "id": "none"}, KillAnswer)
            assert replies.answers == {"localhost": {"killed": []}}
            pool.connections["localhost"].process.kill()


# --- when a rank is started as a new process --------------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path: Path) -> warm.Warm:
    """A warm process's knowledge of what it was started with, and of one file that it has loaded."""
    made = object.__new__(warm.Warm)
    file = tmp_path / "module.py"
    file.write_text("x = 1")
    made.env, made.files = {"OMP_NUM_THREADS": "2", "HOME": "/root"}, {str(file): warm.stamp(str(file))}
    return made


RANK = [sys.executable, "-u", str(TRAIN), "--local_rank=0"]


def test_a_rank_is_forked_if_nothing_has_changed(loaded: warm.Warm) -> None:
    names = ("RANK", "MASTER_PORT", "CROSS_RANK", "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", warm.LAUNCH_ID)
    assert loaded.why_cold(RANK, {**loaded.env, **dict.fromkeys(names, "new")}) == ""


@pytest.mark.parametrize(
    "change", [{"OMP_NUM_THREADS": "1"}, {"LD_PRELOAD": "x.so"}, {"PYTHONPATH": "/x"}, {"NCCL_DEBUG": "INFO"}]
)
def test_a_changed_variable_needs_a_new_process(loaded: warm.Warm, change: dict[str, str]) -> None:
    [name] = change
    assert loaded.why_cold(RANK, {**loaded.env, **change}) == f"{name} changed since the last start"


def test_a_missing_variable_needs_a_new_process(loaded: warm.Warm) -> None:
    assert loaded.why_cold(RANK, {"OMP_NUM_THREADS": "2"}) == "HOME changed since the last start"


def test_changed_and_missing_sources_need_a_new_process(loaded: warm.Warm) -> None:
    [file] = loaded.files
    Path(file).write_text("x = 2 ")
    assert loaded.why_cold(RANK, loaded.env) == f"{file} changed since the last start"
    Path(file).unlink()
    assert loaded.why_cold(RANK, loaded.env) == f"{file} changed since the last start"


@pytest.mark.parametrize("command", [["numactl", "-C", "0", *RANK], [sys.executable, TRAIN], [*RANK[:2], "-m", "x"]])
def test_another_command_needs_a_new_process(loaded: warm.Warm, command: list[str]) -> None:
    assert loaded.why_cold([str(word) for word in command], loaded.env).startswith("its command starts with ")


def test_the_files_of_packspeed_and_of_each_package_are_watched() -> None:
    files = warm.loaded_files()
    assert {warm.__file__, attempt.__file__, psutil.__file__, pytest.__file__} <= set(files)
    assert psutil._pslinux.__file__ not in files


# --- the supervisor's waits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "waits"), [(-9, False), (1, True)])
def test_only_a_rank_that_failed_by_itself_is_given_time(
    status: int, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed rank is the cause. After an exception, the report of a killed rank may still come."""
    slept: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(attempt, "time", SimpleNamespace(time=lambda: 0.0, monotonic=lambda: now[0], sleep=sleep))
    made: Any = object.__new__(attempt.Attempt)
    made.deaths = [
        {"died": 1, "beat": None, "status": status, "at": 1.0, "peak_bytes": {}, "oom_kills": 0, "limit": None}
    ]
    made.agents = {"a": SimpleNamespace(poll=lambda: None)}
    made.logs, made.host_of = tmp_path, {0: "a", 1: "a"}
    assert made._verdict().kind == "died"
    assert sum(slept) == pytest.approx(attempt.SETTLE_S if waits else 0.0, abs=0.1)
