"""The agent: the process that a launch starts on every host.

    python -m packspeed.launch.cluster.agent        requests on stdin, answers on stdout (messages.py)

ssh.py starts it, over ssh, or directly if the host is this machine. The agent answers short requests: describe the
host, kill a launch, report the stacks of its ranks. After `prepare` it keeps a process with all imports done
(warm_start.py). The last request is `run`. The agent then starts DeepSpeed's node launcher, from that process if there
is one, and stays until the ranks have ended (LocalRanks). All strings from a hostfile or a run file arrive inside the
JSON of a request, so none of them ever reaches a shell.

The ranks never outlive the launch. If stdin closes (the supervisor has died) or nothing arrives on it for `silence_s`
(the network is cut), the agent asks its ranks to save and stop. It kills those that still run 60 s later (GRACE_S,
stdin closed) or 5 s later (CUT_OFF_S, silence).
"""

from __future__ import annotations

import contextlib
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

import psutil

from packspeed.launch.cluster import cgroup
from packspeed.launch.cluster.local_launcher import is_rank, node_launcher_command
from packspeed.launch.cluster.messages import (
    BEAT,
    TERM,
    FactsRequest,
    HostFacts,
    PrepareRequest,
    RankDeath,
    RankState,
    Request,
    RingRequest,
    RunRequest,
    ShortRequest,
    StacksRequest,
    send_record,
)
from packspeed.launch.cluster.warm_start import ForkedProcess, WarmProcess
from packspeed.launch.config.errors import EXIT_STOPPED
from packspeed.launch.config.unattended import SIGNALS
from packspeed.launch.run_folder.folder import git_commit
from packspeed.launch.run_folder.heartbeat import LAUNCH_ID, LAUNCHER, last_beat, remove_local_beats

PACKAGES = ("packspeed", "torch", "deepspeed", "numpy")


POLL_S = 0.2  # DeepSpeed's launcher checks once a second and then kills all ranks; a death must be seen before that


GRACE_S = 60.0  # how long ranks may take to save after the supervisor has died


CUT_OFF_S = 5.0  # the same if the network is cut; it is short, because ranks without a network cannot save


def main() -> int:
    """Answer the supervisor's requests until stdin closes or a `run` request has been carried out.

    Returns the exit code of DeepSpeed's launcher, or 0 if there was no `run` request.
    """
    warm: WarmProcess | None = None
    silence_s: float | None = None
    try:
        while (line := _read_line(silence_s)).endswith(b"\n"):  # else the supervisor has died or is not reachable
            if line.strip() == BEAT.encode():
                continue
            request: Request = json.loads(line)
            if request["do"] == "prepare":
                hold_signals()
                silence_s = request["silence_s"]
                with contextlib.suppress(OSError):  # then the ranks are started as new processes
                    os.chdir(request["cwd"])
                    warm = WarmProcess(*launcher_of(request))
            elif request["do"] == "run":
                return LocalRanks(request, warm).run() & 0xFF  # diagnosis.describe_exit explains codes of signals
            else:
                answer(request)
    finally:
        if warm is not None:
            warm.close()
    return 0


def answer(request: ShortRequest) -> None:
    """Carry out a request that starts no ranks (facts, time, ring, stacks or kill), and send the answer."""
    if request["do"] == "facts":
        send_record(host_facts(request))
    elif request["do"] == "time":
        send_record({"time": time.time()})
    elif request["do"] == "ring":
        send_record(join_ring(request))
    elif request["do"] == "kill":
        send_record({"killed": kill_launch(request["id"])})
    else:
        send_record(rank_states(request))


def _read_line(timeout_s: float | None) -> bytes:
    """Read a line from stdin, without a buffer because LocalRanks reads the same file descriptor later.

    At the end of the file the result has no newline. It is empty if no line begins within `timeout_s` seconds.
    """
    if not select.select([0], [], [], timeout_s)[0]:
        return b""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def hold_signals() -> None:
    """Block the signals that ask a rank to stop.

    Schedulers signal every process of a job, but only the supervisor decides when the ranks stop. The launcher and the
    ranks inherit the block; the ranks lift it themselves (training/signals.py).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _devices(request: RunRequest | PrepareRequest) -> list[list[int]]:
    """Return the device numbers of every host, in the order of ranks."""
    return [devices for count, devices in request["hosts"] for _ in range(count)]


def launcher_of(request: RunRequest | PrepareRequest) -> tuple[list[str], dict[str, str]]:
    """Return (command line of DeepSpeed's node launcher on this host, environment variables for it).

    The variables do not include PACKSPEED_LAUNCH_ID, which is different in each attempt.
    """
    # DeepSpeed's launcher only counts the hosts and their devices, so their names are not sent.
    world_info = {f"host-{number}": ids for number, ids in enumerate(_devices(request))}
    command = node_launcher_command(
        world_info, request["node_rank"], request["master"], request["port"], request["arguments"],
        script=request["script"],
    )  # fmt: skip
    return command, {**os.environ, **request["env"]}


# --- the ranks of this host -------------------------------------------------------------------------------------------


class LocalRanks:
    """The ranks of this host in one attempt. Starts DeepSpeed's node launcher, and reports ranks that have ended.

    The supervisor's side is attempt.Attempt: it sends the word BEAT every 2 s, and receives a RankDeath for every rank
    that ends.
    """

    def __init__(self, request: RunRequest, warm: WarmProcess | None = None) -> None:
        """Start the launcher: from `warm`, if that process is usable, else as a new process."""
        self.launch_id = request["id"]
        self.silence_s = request["silence_s"]
        self.rank_count = len(_devices(request)[request["node_rank"]])
        self.cgroups = cgroup.groups()
        self.oom_kills_before = cgroup.oom_kills(self.cgroups)
        self.peak_bytes: dict[int, int] = {}  # rank -> peak resident memory
        self.processes: dict[int, psutil.Process] = {}  # the ranks that have been seen so far
        self.ended: set[int] = set()
        self.searched_at = 0.0
        hold_signals()
        os.chdir(request["cwd"])
        command, env = launcher_of(request)
        env |= {LAUNCH_ID: self.launch_id, LAUNCHER: str(os.getpid())}
        self.launcher: ForkedProcess | subprocess.Popen[bytes] = (
            warm and warm.start_launcher(command, env)
        ) or subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)

    def run(self) -> int:
        """Watch until DeepSpeed's node launcher ends, then kill the processes that are left.

        Returns the launcher's exit code, or 75 (EXIT_STOPPED) if the ranks were asked to stop before any of them had
        started.
        """
        heard_at, kill_at, buffer = time.monotonic(), float("inf"), b""
        stdin_open = True
        while (code := self.launcher.poll()) is None:
            # Any line means that the supervisor is alive; TERM also asks the ranks to save and stop.
            ready, _, _ = select.select([0] if stdin_open else [], [], [], POLL_S)
            if ready:
                data = os.read(0, 4096)
                stdin_open, heard_at = bool(data), time.monotonic()
                *lines, buffer = (buffer + data).split(b"\n")
                if TERM.encode() in lines and not self.ask_to_save():
                    code = EXIT_STOPPED
                    break
            # The supervisor is dead or unreachable: stop now, kill later.
            silent = time.monotonic() - heard_at > self.silence_s
            if (silent or not stdin_open) and kill_at == float("inf"):
                kill_at = time.monotonic() + (GRACE_S if not stdin_open else CUT_OFF_S)
                if not self.ask_to_save():
                    break
            if time.monotonic() > kill_at:
                break
            self.report_deaths()
        self.report_deaths()
        kill_launch(self.launch_id)
        remove_local_beats(self.launch_id)
        return code if code is not None else self.launcher.wait()

    def ask_to_save(self) -> bool:
        """Send SIGTERM to this host's ranks, but not to DeepSpeed's launcher. The ranks save and exit with code 75,
        then the launcher exits with code 75 too. training/signals.py handles the signal in the ranks.

        Returns False if the launcher has not started any rank yet, so that there is no process to ask.
        """
        ranks = launch_ranks(self.launch_id)
        for process in ranks.values():
            try:
                process.send_signal(signal.SIGCONT)  # a process stopped by SIGSTOP cannot react to SIGTERM
                process.terminate()
            except psutil.Error:
                continue
        return bool(ranks or self.processes)

    def report_deaths(self) -> None:
        """Send the supervisor a RankDeath for every rank of this host that has ended since the last call.

        Also updates the peak memory of the ranks that still run.
        """
        # Search until every rank has been seen, and not longer, because a search is slow on a busy host.
        if len(self.processes) < self.rank_count and time.monotonic() - self.searched_at > 1:
            self.processes |= launch_ranks(self.launch_id)
            self.searched_at = time.monotonic()
        for rank, process in self.processes.items():
            if rank in self.ended:
                continue
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    self.peak_bytes[rank] = max(self.peak_bytes.get(rank, 0), process.memory_info().rss)
                    continue
                status = _zombie_status(process.pid)
            except psutil.Error:
                status = None  # the process is gone: the launcher has collected its exit status already
            self.ended.add(rank)
            record: RankDeath = {
                "died": rank, "beat": last_beat(self.launch_id, rank), "status": status, "at": time.time(),
                "peak_bytes": {str(r): peak for r, peak in self.peak_bytes.items()},
                "oom_kills": cgroup.oom_kills(self.cgroups) - self.oom_kills_before,
                "limit": cgroup.limit(self.cgroups),
            }  # fmt: skip
            send_record(record)


def _zombie_status(pid: int) -> int | None:
    """Return the exit code of a zombie process, negative for a signal; None if its parent has collected the status."""
    try:
        status = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[-1])
    except (OSError, ValueError, IndexError):
        return None
    return os.waitstatus_to_exitcode(status)


def launch_processes(launch_id: str) -> list[psutil.Process]:
    """Return all processes on this host that have this launch id in their environment, except the current one.

    The variable is PACKSPEED_LAUNCH_ID.
    """
    processes = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(LAUNCH_ID) == launch_id:
                processes.append(process)
        except psutil.Error:
            continue
    return processes


def launch_ranks(launch_id: str) -> dict[int, psutil.Process]:
    """Return {rank: process} for the ranks on this host that have this launch id in their environment."""
    ranks = {}
    for process in launch_processes(launch_id):
        try:
            parent = process.parent()
            if is_rank(process) and not (parent and is_rank(parent)):  # children of a rank have the same command line
                ranks[int(process.environ()["RANK"])] = process
        except psutil.Error:
            continue
    return ranks


# --- short requests ---------------------------------------------------------------------------------------------------


def kill_launch(launch_id: str) -> list[int]:
    """Kill every process on this host that has this launch id in its environment, and return the process ids."""
    victims = launch_processes(launch_id)
    for process in victims:
        try:
            process.send_signal(signal.SIGCONT)
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(victims, timeout=5)
    return [process.pid for process in victims]


def rank_states(request: StacksRequest) -> dict[str, RankState]:
    """Return {rank as text: its state and stack} for every rank of a launch on this host. Takes 1 s.

    SIGUSR2 makes faulthandler in each rank write the rank's stack to <logs>/rank-N.stack.
    """
    states: dict[str, RankState] = {}
    for rank, process in launch_ranks(request["id"]).items():
        state = process.status()
        states[str(rank)] = {"state": state, "stack": ""}
        if state != psutil.STATUS_STOPPED:
            process.send_signal(signal.SIGUSR2)
    time.sleep(1)
    for rank_text, entry in states.items():
        path = Path(request["logs"]) / f"rank-{rank_text}.stack"
        entry["stack"] = path.read_text(errors="replace") if path.exists() else ""
    return states


def join_ring(request: RingRequest) -> dict[str, object]:
    """Take part in the all-reduce of `packspeed doctor`. Returns a RingAnswer, or {"error": text}.

    If another host cannot be reached, the text names it.
    """
    from packspeed.launch.cluster.socket_allreduce import RingError, run_ring

    try:
        return dict(run_ring(request["rank"], request["world"], request["address"], request["master"], request["port"]))
    except (RingError, OSError, ValueError) as error:
        return {"error": str(error)}


def host_facts(request: FactsRequest) -> HostFacts:
    """Return what the launch plan and `packspeed doctor` need to know about this host. Takes 0.4 s of one core."""
    from packspeed.launch.cluster.hosts import address_of, local_route

    cwd, peer = Path(request["cwd"]), request.get("peer")
    address, interface = local_route(address_of(peer)) if peer else ("127.0.0.1", "lo")
    facts: HostFacts = {
        "hostname": platform.node(), "address": address, "interface": interface, "cwd": cwd.is_dir(),
        "python": platform.python_version(), "versions": {name: _version(name) for name in PACKAGES},
        "commit": git_commit() or "", "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "accelerators": accelerators(), "ops": _compiled_ops(),
    }  # fmt: skip
    if facts["cwd"]:
        os.chdir(cwd)  # paths of a run file are relative to it
        if "datasets" in request:
            facts["datasets"] = {path: _fingerprint(path) for path in request["datasets"]}
        if "run_folder" in request:
            facts["writable"], facts["free_gib"] = _check_run_folder(Path(request["run_folder"]), request["token"])
    if "port" in request:
        facts["port"] = _check_port(request["port"])
    return facts


def _version(package: str) -> str:
    """Return the installed version of a package, or "missing"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def accelerators() -> list[str]:
    """Return name and memory of every NVIDIA device, or an empty list if nvidia-smi is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _compiled_ops() -> list[str]:
    """Return the names of DeepSpeed's ops that torch has compiled on this host: its .so files in the cache."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    return sorted({file.stem for file in root.glob("**/*.so")})


def _fingerprint(path: str) -> str:
    """Return the fingerprint of a dataset, or "error: " followed by what is wrong with it."""
    from packspeed.data.errors import DataError
    from packspeed.data.remote import open_dataset

    try:
        return str(open_dataset(path).fingerprint)
    except (DataError, OSError) as error:
        return f"error: {error}"


def _check_run_folder(folder: Path, token: str) -> tuple[bool | str, float]:
    """Return (True or the reason why the folder cannot be written, free space in GiB).

    Also creates a file named after `token` in <folder>/.hosts. The doctor looks for these files to find out whether all
    hosts share the folder, and deletes them.
    """
    try:
        marks = folder / ".hosts"
        marks.mkdir(parents=True, exist_ok=True)
        (marks / f"{token}-{platform.node()}-{os.getpid()}").touch()
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        return str(error), 0.0
    return True, round(free_bytes / 2**30, 1)


def _check_port(requested: int) -> int | str:
    """Return the requested TCP port, or a free one if it is 0.

    If the port is in use, return a sentence with the reason.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", requested))
        except OSError as error:
            return f"port {requested}: {error.strerror}"
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
