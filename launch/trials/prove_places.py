"""Where `packspeed prove` trains: on this machine or on the hosts of a hostfile. How to start and kill ranks there.

On this machine the ranks are found among the descendants of the launcher. On other hosts, the process id of each rank
is in its heartbeat, in the run folder. One shell per host waits from the start, over ssh, for the ids of the processes
to kill: connecting only then would take longer than some steps. The same shell then waits until all ranks have ended,
because a run must not be resumed while a rank still writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from packspeed.launch.cluster import local_launcher as launcher
from packspeed.launch.cluster.hosts import Host
from packspeed.launch.cluster.ssh import host_command
from packspeed.launch.cluster.supervisor import fit_slots
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.run_folder.heartbeat import Beat, read_beats

VICTIMS = ("one rank", "all ranks", "the launcher")
END_TIMEOUT_S = 600.0  # how long the launcher and the ranks may take to end after the kill

# Reads a line with the processes to kill, and a line with those to wait for. Both lines may be empty.
WATCH = (
    'read -r victims; [ -z "$victims" ] || kill -9 $victims; read -r ranks; '
    "for rank in $ranks; do while kill -0 $rank 2>/dev/null; do sleep 0.2; done; done"
)


class Victims(Protocol):
    """The processes of one launch. `packspeed prove` kills one rank, all ranks or the launcher."""

    def find(self) -> None:
        """Look for ranks that have started since the last call. `kill` and `wait` know only those found so far."""

    def kill(self, victim: str) -> None:
        """Kill `victim` ("one rank", "all ranks" or "the launcher") with SIGKILL."""

    def wait(self) -> None:
        """Wait until the launcher and all ranks have ended: at most 600 s for the launcher and for each host."""


class Place(Protocol):
    """Where the runs of a kill-and-resume test are trained: on this machine, or on the hosts of a hostfile."""

    def command(self, ranks: int, arguments: Sequence[str], folder: Path) -> list[str]:
        """Return the command that trains with `ranks` ranks until the run ends. `arguments` are those of train.py.

        `folder` is the folder of the test, for files that the command needs.
        """

    def victims(
        self, process: psutil.Popen, ranks: int, run_folder: Path
    ) -> contextlib.AbstractContextManager[Victims]:
        """Context manager for the processes that the trial may kill, on all hosts.

        These are the launcher, `process`, and the `ranks` ranks that it has started.
        """


class ThisMachine:
    """Ranks that DeepSpeed's launcher starts on this machine."""

    def command(self, ranks: int, arguments: Sequence[str], folder: Path) -> list[str]:
        """Return the command of DeepSpeed's launcher. `folder` is not used."""
        return launcher.launcher_command(ranks, arguments)

    @contextlib.contextmanager
    def victims(self, process: psutil.Popen, ranks: int, run_folder: Path) -> Iterator[Victims]:
        """Return a context with the descendants of the launcher."""
        yield _LocalVictims(process, ranks)


class _LocalVictims:
    """A launcher on this machine and its descendants, among them the ranks."""

    def __init__(self, process: psutil.Popen, count: int) -> None:
        self.process, self.count = process, count
        self.tree: list[psutil.Process] = []
        self.ranks: list[psutil.Process] = []

    def find(self) -> None:
        # Only while ranks start: later the search would take longer than a few steps.
        if len(self.ranks) < self.count:
            self.tree, self.ranks = launcher.process_tree(self.process), launcher.ranks_below(self.process.pid)

    def kill(self, victim: str) -> None:
        chosen = {
            "one rank": self.ranks[-1:],
            "all ranks": self.ranks,
            "the launcher": [process for process in self.tree if process not in self.ranks],
        }
        for process in chosen[victim]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def wait(self) -> None:
        psutil.wait_procs(self.tree, timeout=END_TIMEOUT_S)


@dataclasses.dataclass(frozen=True)
class OverHosts:
    """Ranks that `packspeed launch` starts on the hosts of a hostfile.

    If a run needs fewer ranks than the hosts have slots, the last slots and hosts are unused. `python` is the
    interpreter on the hosts. `ssh_config` is the file that ssh reads instead of ~/.ssh/config.
    """

    hosts: list[Host]
    python: str = sys.executable
    ssh_config: Path | None = None

    @property
    def slots(self) -> int:
        """The number of ranks on all hosts."""
        return sum(host.slots for host in self.hosts)

    def first(self, ranks: int) -> list[Host]:
        """Return the hosts of the first `ranks` ranks. Raises ConfigError if there are fewer slots."""
        if ranks > self.slots:
            raise ConfigError(
                f"the hostfile has {self.slots} slots, too few for {ranks} ranks. Lower --ranks or --other-ranks."
            )
        return fit_slots(self.hosts, lambda number: number <= ranks)

    def command(self, ranks: int, arguments: Sequence[str], folder: Path) -> list[str]:
        """Return the command of `packspeed launch` without restarts. Writes its hostfile into `folder`."""
        hostfile = folder / f"hosts-{ranks}"
        hostfile.write_text("".join(f"{host.name} slots={host.slots}\n" for host in self.first(ranks)))
        _, run_file, *sets = arguments  # --config FILE --set=...
        return [
            *launcher.PACKSPEED, "launch", run_file, *sets,
            "--hostfile", str(hostfile), "--python", self.python, "--no-warm-start",
            *(["--ssh-config", str(self.ssh_config)] if self.ssh_config else []),
        ]  # fmt: skip

    @contextlib.contextmanager
    def victims(self, process: psutil.Popen, ranks: int, run_folder: Path) -> Iterator[Victims]:
        """Return a context with the launcher and the ranks on all hosts. At its end, the shells on the hosts are
        ended.
        """
        hosts = self.first(ranks)
        shells = {
            host.name: subprocess.Popen(
                host_command(host, ["sh", "-c", WATCH], self.ssh_config), stdin=subprocess.PIPE, text=True
            )
            for host in hosts
        }
        names = [host.name for host in hosts for _ in range(host.slots)]
        try:
            yield _RemoteVictims(process, names, shells, run_folder / "logs")
        finally:
            for shell in shells.values():
                shell.kill()
                shell.wait()


class _RemoteVictims:
    """The launcher on this machine and its ranks on hosts. `names`: the host name of each rank."""

    def __init__(
        self, process: psutil.Popen, names: list[str], shells: Mapping[str, subprocess.Popen[str]], logs: Path
    ) -> None:
        self.process, self.names, self.shells, self.logs = process, names, shells, logs
        self.beats: dict[int, Beat] = {}

    def find(self) -> None:
        if len(self.beats) < len(self.names):
            self.beats = read_beats(self.logs)

    def kill(self, victim: str) -> None:
        chosen = {"one rank": [len(self.names) - 1], "all ranks": list(range(len(self.names))), "the launcher": []}
        self._send(chosen[victim])
        if victim == "the launcher":
            self.process.kill()

    def wait(self) -> None:
        psutil.wait_procs([self.process], timeout=END_TIMEOUT_S)
        self._send(range(len(self.names)))
        for name, shell in self.shells.items():
            try:
                code = shell.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise UserError(
                    f"{name}: ranks are still running on this host {END_TIMEOUT_S:.0f} s after the kill. "
                    "End them before you repeat the command."
                ) from None
            if code:
                raise UserError(
                    f"{name}: the shell that kills ranks there ended with code {code}. Check that `ssh {name}` works."
                )

    def _send(self, ranks: Sequence[int]) -> None:
        """Send the shell of each host a line with the process ids of these ranks on it."""
        for name, shell in self.shells.items():
            pids = [str(self.beats[rank].pid) for rank in ranks if self.names[rank] == name and rank in self.beats]
            assert shell.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # `wait` reports that the shell has ended
                shell.stdin.write(" ".join(pids) + "\n")
                shell.stdin.flush()
