"""Rendered launches are run: an sbatch script under a real SLURM, a Job's pods and no_ssh's commands as processes here.

Instead of a cluster: SLURM's daemons on this machine, in a folder of their own, and 127.0.0.1 instead of the names that
a cluster's DNS would resolve. The Kubernetes documents are checked against its published JSON schemas.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from packspeed.launch.cluster import render
from packspeed.launch.cluster.hosts import Host, LaunchPlan, PlannedHost
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.ports import free_port
from support import ROOT, TRAIN
from support.ranks import forked
from support.workspace import Workspace

pytestmark = pytest.mark.timeout(900)

# Strings with a meaning for a shell, YAML, sbatch or Kubernetes.
NASTY = [
    "it's",
    'a "b" c',
    "$(touch x)",
    "`touch x`",
    "$(POD_NAME)",
    "$HOME",
    "a;touch x",
    "a\ntouch x",
    "{{x}}",
    "#",
    "é",
]
STEPS = "train.steps=25"
# A checkpoint after every step slows the run down, so that a signal arrives before it ends.
SLOWLY = (STEPS, "checkpoint.every_steps=1", "eval.every_steps=1000")
EXAMPLE: dict[str, Any] = {
    "run_file": "launch/configs/gpt2_124m.yaml",
    "overrides": [],
    "nodes": 2,
    "ranks_per_node": 8,
}


@pytest.fixture(scope="module")
def expected(workspace: Workspace) -> list[float]:
    """Losses of 2 ranks on this machine."""
    done = forked(TRAIN, *workspace.arguments("render-reference", STEPS), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace.losses("render-reference")


def together(commands: list[Callable[[], subprocess.Popen[str]]]) -> None:
    """Start all and wait for all; if one fails, show what they printed."""
    processes = [start() for start in commands]
    output = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(output)


def start(command: str | list[str], **env: str) -> Callable[[], subprocess.Popen[str]]:
    shell = isinstance(command, str)
    return lambda: subprocess.Popen(
        command, shell=shell, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **env}
    )


# --- one command per node ---------------------------------------------------------------------------------------------


def local_plan(env: dict[str, str]) -> LaunchPlan:
    hosts = [PlannedHost(Host(f"node-{i}", 1), i, "127.0.0.1", "lo") for i in range(2)]
    return LaunchPlan(hosts, free_port(), env)


@pytest.mark.launch
def test_no_ssh_commands_train_with_the_losses_of_one_launch(workspace: Workspace, expected: list[float]) -> None:
    text = render.no_ssh(
        local_plan({"OMP_NUM_THREADS": "1"}), workspace.arguments("no-ssh", STEPS), cwd=str(workspace.folder)
    )
    commands = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(commands) == 2
    together([start(command) for command in commands])
    assert workspace.losses("no-ssh") == pytest.approx(expected, abs=1e-5)


@pytest.mark.launch
def test_no_ssh_strings_stay_inert(tmp_path: Path) -> None:
    """The shell passes every string on unchanged, in a folder and with variables that are just as nasty."""
    folder = tmp_path / "a b'$(touch x)"
    folder.mkdir()
    show = [sys.executable, "-c", "import os, sys; print(repr((os.getcwd(), os.environ['V'], sys.argv[-11:])))"]
    plan = LaunchPlan([PlannedHost(Host("node-0", 1), 0, "127.0.0.1", "lo")], 1, {"V": NASTY[2]})
    text = render.no_ssh(plan, NASTY, cwd=str(folder))
    command = text.replace(shlex.join([sys.executable, "-m", "deepspeed.launcher.launch"]), shlex.join(show))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == repr((str(folder), NASTY[2], NASTY))
    assert list(folder.iterdir()) == []


# --- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_slurm_strings_stay_inert(tmp_path: Path) -> None:
    """Run with programs named srun and scontrol that pass the strings on as SLURM's do."""
    folder = tmp_path / "a b'$(touch x)"
    folder.mkdir()
    for name, body in (("scontrol", "echo node-0"), ("srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    show = tmp_path / "show.py"
    show.write_text("import os, sys; print(repr((os.getcwd(), os.environ['V'], os.environ['RANK'], sys.argv[1:])))")
    text = render.slurm(
        NASTY[2], NASTY, 1, 1, name="\n$(touch x)", env={"V": NASTY[1]}, cwd=str(folder), script=str(show)
    )
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    env = {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script)], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, **env, "SLURM_LOCALID": "0", "PATH": path},
    )  # fmt: skip
    assert done.stdout.strip() == repr((str(folder), NASTY[1], "0", render.train_arguments(NASTY[2], NASTY)))
    assert {p.name for p in tmp_path.iterdir()} == {"srun", "scontrol", "show.py", "job.sh", folder.name}
    assert list(folder.iterdir()) == []


@pytest.mark.launch
@pytest.mark.parametrize(
    "options",
    [
        {"options": ["--comment=a b"]}, {"options": ["--comment=$(touch x)"]}, {"options": ["-p gpu"]},
        {"options": ["--a=b\n#SBATCH --wrap=x"]}, {"time_limit": "1 day"}, {"nodes": 0}, {"cpus_per_rank": 0},
        {"env": {"A;touch x": "1"}},
    ],
)  # fmt: skip
def test_slurm_refuses_what_it_cannot_quote(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"option|time limit|at least 1|not a valid variable name"):
        render.slurm(**{**EXAMPLE, **options})


SLURM_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=localhost NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a user of a cluster of one machine: munged, slurmctld and slurmd, started for this file."""
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons for this test need root")
    programs = {
        name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("munged", "slurmctld", "slurmd")
    }
    assert all(programs.values()), f"run .ci/packages: {programs}"
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path is short
    for name in ("spool", "state"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(folder=folder, ports=[free_port(), free_port()]))
    files = {
        "key-file": "munge.key",
        "socket": "munge.sock",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "seed",
    }
    munge = [f"--{option}={folder / name}" for option, name in files.items()]
    env = {**os.environ, "SLURM_CONF": str(conf)}
    daemons = []
    try:
        for command in (["munged", "-F", "-f", *munge], ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "localhost"]):
            log = (folder / f"{command[0]}.out").open("w")
            daemons.append(
                subprocess.Popen([programs[command[0]] or "", *command[1:]], env=env, stdout=log, stderr=log)
            )
            log.close()
            if command[0] == "munged":
                until(lambda: (folder / "munge.sock").exists(), folder)
        until(lambda: "idle" in sh(["sinfo", "-h", "-o", "%T"], env), folder)
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(60)
        shutil.rmtree(folder)


def sh(command: list[str], env: dict[str, str], cwd: Path | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd).stdout


def until(true: Callable[[], bool], logs: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "\n".join(path.read_text()[-3000:] for path in logs.glob("*.out"))
        time.sleep(0.2)


def job(number: str, env: dict[str, str]) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", sh(["scontrol", "show", "job", number], env)))


def submit(text: str, folder: Path, env: dict[str, str]) -> str:
    folder.mkdir()
    (folder / "job.sh").write_text(text)
    done = subprocess.run(["sbatch", "--parsable", "job.sh"], capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.root
def test_slurm_trains_saves_at_its_warning_and_continues(
    workspace: Workspace, slurm: dict[str, str], tmp_path: Path, expected: list[float]
) -> None:
    """SLURM's own warning in mid-run; the job requeues itself and ends with the losses of one undisturbed launch."""
    folder = tmp_path / "it's a folder"
    sets = ["name=slurm", *SLOWLY, f"deepspeed={tmp_path}/it's.json"]
    (tmp_path / "it's.json").write_text('{"zero_optimization": {"stage": 1}}')
    text = render.slurm(str(workspace.run_file), sets, 1, 2, name="my run", gpus=False, cpus_per_rank=1)
    number = submit(text, folder, slurm)
    metrics = workspace.folder / "runs" / "slurm" / "metrics.jsonl"
    until(lambda: metrics.exists() and '"loss"' in metrics.read_text(), folder)
    sh(["scancel", "--signal=USR1", number], slurm)
    until(lambda: job(number, slurm).get("Restarts") == "1", folder)
    until(lambda: job(number, slurm).get("JobState") == "PENDING", folder)
    # SLURM waits two minutes after a requeue, and refuses a start in the second of the kill: "credential revoked".
    sh(["scontrol", "update", f"JobId={number}", "StartTime=now+5seconds"], slurm)
    until(lambda: job(number, slurm).get("JobState") in ("COMPLETED", "CANCELLED", "FAILED"), folder, 400)
    output = (folder / f"slurm-{number}.out").read_text()
    assert job(number, slurm)["JobState"] == "COMPLETED", output
    assert job(number, slurm)["Restarts"] == "1", output
    assert "SIGUSR1" in output
    assert "resuming from" in output
    assert workspace.losses("slurm") == pytest.approx(expected, abs=1e-5)


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def documents(**options: Any) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render.k8s(**{**EXAMPLE, "image": "registry.example/packspeed:1", **options})))


def expand(text: str, env: dict[str, str]) -> str:
    """Kubernetes' expansion of $(NAME): an unknown name stays, $$ is one $."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else env.get(m[1], m[0]), text)


@pytest.mark.launch
@pytest.mark.parametrize(
    "options", [{}, {"gpus": False, "env": {"A": "1", "WANDB_API_KEY": "hush"}}, {"name": "7B_Llama.v2"}]
)
def test_kubernetes_accepts_the_documents(options: dict[str, Any]) -> None:
    service, job = documents(**options)
    for version in ("1.31", "1.37"):
        for document in (service, job):
            kubernetes_validate.validate(document, version, strict=True)
    # What the schemas do not check.
    pod = job["spec"]["template"]
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    name = job["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,60}[a-z0-9])?", f"{name}-1")
    assert f"--master={name}-0.{service['metadata']['name']}" in pod["spec"]["containers"][0]["command"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2


@pytest.mark.launch
def test_the_schemas_would_notice_a_mistake() -> None:
    _, job = documents()
    job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["value"] = [75]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)


def test_kubernetes_strings_stay_inert() -> None:
    text = render.k8s(
        **{**EXAMPLE, "run_file": NASTY[2], "overrides": NASTY, "image": NASTY[2], "env": {"V": NASTY[4]}}
    )
    container = list(yaml.safe_load_all(text))[1]["spec"]["template"]["spec"]["containers"][0]
    env = {"POD_NAME": "expanded"}
    words = [expand(word, env) for word in container["command"]]
    assert words[words.index("--") + 1 :] == render.train_arguments(NASTY[2], NASTY)
    assert container["image"] == NASTY[2]
    assert expand(container["env"][0]["value"], env) == NASTY[4]


def pods(workspace: Workspace, name: str, *sets: str) -> list[Callable[[], subprocess.Popen[str]]]:
    """The two pods of a Job as processes here: the same command, 127.0.0.1 for pod 0's name, a port of their own."""
    run = [f"name={name}", *sets]
    _, job = documents(
        run_file=str(workspace.run_file), overrides=run, ranks_per_node=1, gpus=False, python=sys.executable
    )
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    swaps = {"--master=": "--master=127.0.0.1", "--port=": f"--port={free_port()}"}
    words = [next((new for old, new in swaps.items() if word.startswith(old)), expand(word, {})) for word in command]
    return [start(words, JOB_COMPLETION_INDEX=str(index)) for index in range(2)]


@pytest.mark.launch
def test_pods_train_with_the_losses_of_one_launch(workspace: Workspace, expected: list[float]) -> None:
    """An eviction first: one pod gets SIGTERM, both save and exit with 75, which counts as no failure of the Job."""
    processes = [start() for start in pods(workspace, "pods", *SLOWLY)]
    metrics = workspace.folder / "runs" / "pods" / "metrics.jsonl"
    until(lambda: metrics.exists() and '"loss"' in metrics.read_text(), workspace.folder)
    processes[1].send_signal(signal.SIGTERM)
    output = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], "\n".join(output)
    together(pods(workspace, "pods", *SLOWLY))
    assert workspace.losses("pods") == pytest.approx(expected, abs=1e-5)


@pytest.mark.launch
@pytest.mark.parametrize("index", ["", "2", "-1", "x"])
def test_a_pod_without_its_index_is_an_error(index: str) -> None:
    words = [
        sys.executable,
        "-m",
        "packspeed.launch.cluster.k8s_entry",
        "--nodes=2",
        "--ranks=1",
        "--master=x",
        "--port=1",
        "--",
        "--config",
        "x",
    ]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "JOB_COMPLETION_INDEX": index})
    assert done.returncode == 2
    assert "JOB_COMPLETION_INDEX" in done.stderr


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_secrets_are_not_written() -> None:
    env = {"WANDB_API_KEY": "hush", "NCCL_DEBUG": "INFO"}
    texts = [
        render.no_ssh(local_plan(env), []),
        render.slurm(**EXAMPLE, env=env),
        render.k8s(**EXAMPLE, image="i", env=env),
    ]
    for text in texts:
        assert "hush" not in text
        assert "WANDB_API_KEY" in text
        assert "INFO" in text


@pytest.mark.launch
def test_the_examples_are_what_is_rendered() -> None:
    """The templates are what the command prints for two nodes of eight GPUs."""
    cluster = ROOT / "launch" / "cluster" / "templates"
    shown = render.slurm(**EXAMPLE, name="gpt2-124m", python="python", script="launch/train.py")
    assert (cluster / "slurm.sh").read_text() == shown
    assert (cluster / "kubernetes.yaml").read_text() == render.k8s(**EXAMPLE, name="gpt2-124m", image="packspeed")


def test_the_container_file_copies_what_exists() -> None:
    lines = (ROOT / "launch" / "cluster" / "templates" / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert {"setup.py", "constraints.txt", "launch"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied), copied
