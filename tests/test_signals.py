"""A signal, or the death of the launcher, at any time before training: nothing goes on, and no process is left."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from packspeed.launch.cluster import supervisor as supervising
from packspeed.launch.cluster.attempt import LaunchOptions, Outcome
from packspeed.launch.cluster.hosts import Host
from packspeed.launch.cluster.ssh import Replies
from packspeed.launch.config.errors import EXIT_STOPPED, ConfigError, UserError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.run_folder import folder as run_folder
from packspeed.launch.run_folder.heartbeat import LAUNCHER
from packspeed.launch.training import signals
from support import ROOT, TRAIN
from support.workspace import Workspace

PACKSPEED = str(Path(sys.executable).with_name("packspeed"))

# --- without processes ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def restored_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class FakeAttempt:
    """An attempt without agents, which ends as `outcome` says."""

    outcome = Outcome("died", 1, ["rank 0 was killed"], 0.0)
    sent: list[str]

    def __init__(
        self, plan: Any, options: Any, logs: Path, script: Path, arguments: Any, pool: Any, prepare: bool
    ) -> None:
        self.logs, self.started, self.sent = logs, time.time(), []

    def send(self, word: str) -> None:
        self.sent.append(word)

    def watch(self) -> Outcome:
        return Outcome("stopped", EXIT_STOPPED, [], 0.0) if self.sent else self.outcome

    def end(self, log: Any) -> None: ...

    def running(self) -> bool:
        return False


Made = Callable[..., supervising.Supervisor]


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr(supervising, "Attempt", FakeAttempt)

    def make(plan: Callable[[], None] = lambda: None, **options: Any) -> supervising.Supervisor:
        run = load_run_file(ROOT / "launch/configs/quickstart.yaml", [f"runs_dir={tmp_path}"])
        run.folder.mkdir(parents=True)
        made = supervising.Supervisor(
            run, LaunchOptions([Host("localhost", 1)], {}, tmp_path, **options), [], lambda line: None
        )

        class Plan:
            hosts: tuple[()] = ()
            world = 1

            def lines(self) -> list[str]:
                return []

        def planned(first: bool) -> Any:
            plan()
            return Plan()

        monkeypatch.setattr(made, "plan", planned)
        return made

    return make


def signal_soon(number: signal.Signals) -> None:
    main = threading.main_thread().ident
    threading.Timer(0.2, signal.pthread_kill, (main, number)).start()


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_ends_the_wait_for_a_restart(supervisor: Made, number: signal.Signals) -> None:
    made = supervisor(max_restarts=9)
    start = time.monotonic()
    signal_soon(number)
    assert made.supervise() == EXIT_STOPPED
    assert time.monotonic() - start < 0.9, "the first pause takes 1 s"


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_ends_the_questions_to_hosts(supervisor: Made, number: signal.Signals) -> None:
    made = supervisor(plan=lambda: time.sleep(30))
    signal_soon(number)
    assert made.supervise() == EXIT_STOPPED
    assert made.attempt is None


def test_a_signal_while_agents_start_reaches_them(supervisor: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(FakeAttempt):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(supervising, "Attempt", Interrupted)
    assert supervisor().supervise() == EXIT_STOPPED


def test_a_restart_waits_for_hosts_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure of the network, the hosts may be back soon. After hang_s seconds the launch gives up."""
    monkeypatch.setattr(supervising, "ASK_AGAIN_S", 0.01)
    run = load_run_file(ROOT / "launch/configs/quickstart.yaml", [f"runs_dir={tmp_path}"])
    lines: list[str] = []
    options = LaunchOptions([Host("far", 2)], {}, tmp_path, hang_s=0.05)
    made = supervising.Supervisor(run, options, [], lines.append)
    asked: list[int] = []

    def ask(hosts: list[Host], pool: Any = None) -> Any:
        asked.append(1)
        return Replies({}, {"far": "no route to host"})

    monkeypatch.setattr(made, "ask_facts", ask)
    with pytest.raises(UserError, match=r"none of the hosts can be used: far: .*no route to host"):
        made.plan(first=False)
    assert len(asked) > 2
    assert made.hosts == [Host("far", 2)]
    with pytest.raises(ConfigError, match="these hosts cannot be used"):
        made.plan(first=True)


def test_a_refused_launch_changes_nothing(supervisor: Made) -> None:
    def refuse() -> None:
        raise ConfigError("these hosts cannot take part")

    called: list[str] = []
    with pytest.raises(ConfigError):
        supervisor(plan=refuse).supervise(lambda: called.append("started"))
    assert called == []


def test_a_launch_waits_for_the_runs_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0.0)
    folder = tmp_path / "runs" / "r"
    run_folder.prepare_for_launch(folder, fresh=False)
    (folder / "logs" / "rank-0.beat").write_text("x")
    with run_folder._lock(folder):
        for fresh in (False, True):
            with pytest.raises(UserError, match="still trains in it"):
                run_folder.prepare_for_launch(folder, fresh)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["r"]
    run_folder.prepare_for_launch(folder, fresh=True)
    assert not (folder / "logs" / "rank-0.beat").exists()
    assert len(list(folder.parent.glob("r.old-*"))) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Choose another folder"):
        run_folder.prepare_for_launch(tmp_path / "file" / "r", fresh=False)


def test_the_launcher_is_found_and_its_end_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    signals.launcher_processes.cache_clear()
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))
    assert [process.pid for process in signals.launcher_processes() or []] == [os.getppid()]
    assert not signals.launcher_ended()
    signals.launcher_processes.cache_clear()
    monkeypatch.setenv(LAUNCHER, "4194305")  # above the largest pid: it cannot be an ancestor
    assert signals.launcher_ended()
    signals.launcher_processes.cache_clear()


# --- with processes ---------------------------------------------------------------------------------------------------


def processes_of(run_file: Path) -> list[psutil.Process]:
    """Processes with the run file on their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(run_file) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "RANK" in process.environ() and "--local_rank" in " ".join(process.cmdline())
    return False


def until(true: Callable[[], Any], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


PHASES: dict[str, Callable[[Path], bool]] = {
    "launcher imports": lambda file: len(processes_of(file)) > 1,
    "ranks import": lambda file: sum(map(is_rank, processes_of(file))) == 2,
}


@pytest.mark.launch
@pytest.mark.parametrize("command", ["train", "launch"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_of_a_start_that_was_ended(
    workspace: Workspace, tmp_path: Path, command: str, phase: str, number: signal.Signals
) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(workspace.run_file.read_text().replace("steps: 10", "steps: 100000"))
    words = [PACKSPEED, command, str(run_file), "--ranks", "2", "--set", f"runs_dir={tmp_path}"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    until(lambda: PHASES[phase](run_file))
    process.send_signal(number)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == (-number if number == signal.SIGKILL else EXIT_STOPPED), output
    until(lambda: not processes_of(run_file), 60)
    assert not (tmp_path / "base" / "metrics.jsonl").exists()


COMMANDS = {
    "train.py": [sys.executable, str(TRAIN), "--config"],
    "packspeed": [PACKSPEED, "train"],
}


@pytest.mark.launch
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_whose_terminal_closes_is_saved(workspace: Workspace, tmp_path: Path, command: str) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(workspace.run_file.read_text().replace("steps: 10", "steps: 100000"))
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    process = subprocess.Popen(
        [*COMMANDS[command], str(run_file), f"--set=runs_dir={tmp_path}"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)
    output = b""
    while b"| loss " not in output:
        output += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(90) == EXIT_STOPPED
    assert json.loads((tmp_path / "base" / "status.json").read_text())["state"] == "stopped"
    assert list((tmp_path / "base" / "checkpoints").glob("step-*"))
    until(lambda: not processes_of(run_file), 60)


@pytest.mark.launch
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_whose_output_nobody_reads_goes_on(workspace: Workspace, tmp_path: Path, command: str) -> None:
    words = [*COMMANDS[command], str(workspace.run_file), f"--set=runs_dir={tmp_path}"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(90) == 0
    assert json.loads((tmp_path / "base" / "status.json").read_text())["state"] == "finished"


@pytest.mark.launch
@pytest.mark.parametrize("number", [signal.SIG_DFL, signal.SIG_IGN])
def test_nohup_is_respected(number: signal.Handlers) -> None:
    code = "import signal; from packspeed.launch.config.unattended import SIGNALS; print(signal.SIGHUP in SIGNALS)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, number),
    )
    assert done.stdout.strip() == str(number == signal.SIG_DFL), done.stderr
