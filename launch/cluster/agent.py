"""What runs on every host of a launch: it answers what the host is like, or keeps its ranks and their launcher.

    python -m packspeed.launch.cluster.agent        JSON requests, one a line of stdin; answers on stdout

Requests: facts, time, ring, stacks, kill, run. Whatever a hostfile or a config says arrives in that JSON and never
meets a shell. `run`, the last, starts DeepSpeed's node launcher and stays: a line on stdin says that the other end is
alive, `term` asks the ranks to save and stop. Where the lines cease (a cut link) or stdin ends (a dead launcher), the
ranks are asked to save and stop, and killed after a grace period: no orphan is left, whoever dies. Lines that begin
with RECORD are for the supervisor, the others are what the ranks print.
"""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from packspeed.launch.cluster import cgroup
from packspeed.launch.cluster.local_launcher import is_rank
from packspeed.launch.cluster.render import node_command
from packspeed.launch.run_folder.folder import git_commit
from packspeed.launch.run_folder.heartbeat import LAUNCH_ID

RECORD = "@packspeed "


PACKAGES = ("packspeed", "torch", "deepspeed", "numpy")


POLL_S = 0.2  # DeepSpeed's launcher looks once a second and then ends the other ranks: we look before it does


GRACE_S = 60.0  # for saving, once the launcher is dead


CUT_OFF_S = 5.0  # where nothing is heard: ranks without their neighbours cannot save


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """What the doctor compares and the plan needs. Nothing is imported that takes long."""
    from packspeed.launch.cluster.hosts import address_of, local_route

    cwd = Path(request["cwd"])
    address, interface = local_route(address_of(request["peer"])) if request.get("peer") else ("127.0.0.1", "lo")
    found: dict[str, Any] = {
        "hostname": platform.node(), "address": address, "interface": interface, "cwd": cwd.is_dir(),
        "python": platform.python_version(), "versions": {name: _version(name) for name in PACKAGES},
        "commit": git_commit() or "", "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "accelerators": accelerators(), "ops": _ops(),
    }  # fmt: skip
    if found["cwd"]:
        os.chdir(cwd)
        if "datasets" in request:
            found["datasets"] = {path: _fingerprint(path) for path in request["datasets"]}
        if "run_folder" in request:
            found |= _folder_facts(Path(request["run_folder"]), request["token"])
    if "port" in request:
        found["port"] = _port(request["port"])
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def accelerators() -> list[str]:
    """Name and memory of every NVIDIA device; none without its driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _ops() -> list[str]:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    return sorted({file.stem for file in root.glob("**/*.so")})


def _fingerprint(path: str) -> str:
    """The dataset's fingerprint, or what is wrong with it."""
    from packspeed.data.dataset import open_dataset
    from packspeed.data.errors import DataError

    try:
        return str(open_dataset(path).fingerprint)
    except (DataError, OSError) as error:
        return f"error: {error}"


def _folder_facts(folder: Path, token: str) -> dict[str, Any]:
    """Free space, and whether the run folder can be written: we leave a mark, which on a shared one every host sees."""
    try:
        marks = folder / ".hosts"
        marks.mkdir(parents=True, exist_ok=True)
        (marks / f"{token}-{platform.node()}-{os.getpid()}").touch()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return {"writable": str(error), "free_gib": 0.0}
    return {"writable": True, "free_gib": round(free / 2**30, 1)}


def _port(wanted: int) -> int | str:
    """The wanted port, or any free one for 0; a sentence where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except OSError as error:
            return f"port {wanted}: {error.strerror}"
        return int(probe.getsockname()[1])


def processes(launch_id: str) -> list[psutil.Process]:
    """All processes of a launch on this host but ourselves."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(LAUNCH_ID) == launch_id:
                found.append(process)
        except psutil.Error:
            continue
    return found


def ranks(launch_id: str) -> dict[int, psutil.Process]:
    """The processes of a launch on this host that train, by rank."""
    found = {}
    for process in processes(launch_id):
        try:
            parent = process.parent()
            if is_rank(process) and not (parent and is_rank(parent)):  # nor a thing that a rank started
                found[int(process.environ()["RANK"])] = process
        except psutil.Error:
            continue
    return found


def kill(launch_id: str) -> list[int]:
    """End every process of a launch on this host; returns their pids."""
    victims = processes(launch_id)
    for process in victims:
        try:
            process.send_signal(signal.SIGCONT)
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(victims, timeout=5)
    return [process.pid for process in victims]


def stacks(request: dict[str, Any]) -> dict[str, Any]:
    """State of every rank here and, of those that can answer, where it is: faulthandler writes it on SIGUSR2."""
    answer: dict[str, Any] = {}
    logs = Path(request["logs"])
    for rank, process in ranks(request["id"]).items():
        state = process.status()
        answer[str(rank)] = {"state": state, "stack": ""}
        if state != psutil.STATUS_STOPPED:
            process.send_signal(signal.SIGUSR2)
    time.sleep(1)
    for name, entry in answer.items():
        path = logs / f"rank-{name}.stack"
        entry["stack"] = path.read_text(errors="replace") if path.exists() else ""
    return answer


class Keeper:
    """One host's part of one attempt."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.id = request["id"]
        self.silence_s = float(request["silence_s"])
        self.ranks = len(list(request["world_info"].values())[request["node_rank"]])
        self.cgroups = cgroup.groups()
        self.oom_before = cgroup.oom_kills(self.cgroups)
        self.peak: dict[int, int] = {}  # bytes resident, by rank
        self.seen: dict[int, psutil.Process] = {}
        self.dead: set[int] = set()
        self.looked = 0.0
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
        os.chdir(request["cwd"])
        command = node_command(
            request["world_info"], request["node_rank"], request["master"], request["port"], request["arguments"],
            script=request["script"],
        )  # fmt: skip
        env = {**os.environ, **request["env"], LAUNCH_ID: self.id}
        self.launcher = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)

    def keep(self) -> int:
        """Stay until the launcher ends; returns its exit code."""
        heard, deadline, buffer = time.monotonic(), float("inf"), b""
        stdin_open = True
        while (code := self.launcher.poll()) is None:
            ready, _, _ = select.select([0] if stdin_open else [], [], [], POLL_S)
            if ready:
                data = os.read(0, 4096)
                stdin_open, heard = bool(data), time.monotonic()
                *lines, buffer = (buffer + data).split(b"\n")
                if b"term" in lines:
                    self.ask_to_stop()
            silent = time.monotonic() - heard > self.silence_s
            if (silent or not stdin_open) and deadline == float("inf"):
                deadline = time.monotonic() + (GRACE_S if not stdin_open else CUT_OFF_S)
                self.ask_to_stop()
            if time.monotonic() > deadline:
                break
            self.look()
        self.look()
        kill(self.id)
        return code if code is not None else self.launcher.wait()

    def ask_to_stop(self) -> None:
        """SIGTERM to the ranks alone: they save and exit with 75, which comes back through the launcher."""
        for process in ranks(self.id).values():
            try:
                process.send_signal(signal.SIGCONT)
                process.terminate()
            except psutil.Error:
                continue

    def look(self) -> None:
        """Note the ranks' memory, and tell of those that died, before the launcher ends the others."""
        if len(self.seen) < self.ranks and time.monotonic() - self.looked > 1:  # looking takes long on a busy host
            self.seen |= ranks(self.id)
            self.looked = time.monotonic()
        for rank, process in self.seen.items():
            if rank in self.dead:
                continue
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    self.peak[rank] = max(self.peak.get(rank, 0), process.memory_info().rss)
                    continue
                status = _wait_status(process.pid)
            except psutil.Error:
                status = None
            self.dead.add(rank)
            tell({"died": rank, "status": status, "at": time.time(), "peak_bytes": self.peak,
                  "oom_kills": cgroup.oom_kills(self.cgroups) - self.oom_before,
                  "limit": cgroup.limit(self.cgroups)})  # fmt: skip


def _wait_status(pid: int) -> int | None:
    """Exit code of a zombie, negative for a signal, before its parent has fetched it."""
    try:
        status = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[-1])
    except (OSError, ValueError, IndexError):
        return None
    return os.waitstatus_to_exitcode(status)


def tell(record: dict[str, Any]) -> None:
    """One line for the supervisor."""
    os.write(1, f"{RECORD}{json.dumps(record)}\n".encode())


def ring(request: dict[str, Any]) -> dict[str, Any]:
    """This host's part of the doctor's all-reduce; `error` says who cannot be reached."""
    from packspeed.launch.cluster.socket_allreduce import RingError, take_part

    try:
        return take_part(*(request[key] for key in ("rank", "world", "address", "master", "port")))
    except (RingError, OSError, ValueError) as error:
        return {"error": str(error)}


def main() -> int:
    """Answer requests until there are no more."""
    while line := _read_line():
        request = json.loads(line)
        match request["do"]:
            case "facts":
                tell(facts(request))
            case "time":
                tell({"time": time.time()})
            case "ring":
                tell(ring(request))
            case "kill":
                tell({"killed": kill(request["id"])})
            case "stacks":
                tell(stacks(request))
            case "run":
                return Keeper(request).keep() & 0xFF
    return 0


def _read_line() -> bytes:
    """Unbuffered: `run` goes on reading the descriptor."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


if __name__ == "__main__":
    sys.exit(main())
