"""A launch as text, for schedulers that start processes themselves: an sbatch script, a Kubernetes Job, plain commands.

    slurm     one srun task per rank; train.py reads its place from RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_*
    k8s       an Indexed Job, one pod per node (pod.py), and the headless Service that gives pod 0 its name
    no_ssh    DeepSpeed's node launcher, one command per node, to start by hand or by another tool

Pure functions of their arguments. Every string of the user is quoted for what reads it: the shell (shlex), YAML, and
Kubernetes' own $(NAME). Values that look like secrets are never written: only where they are to come from.
Exit code 75 (saved and stopped, start me again) puts the job back into the queue in both schedulers.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from packspeed.launch.cluster.hosts import SECRET, Plan
from packspeed.launch.cluster.local_launcher import TRAIN
from packspeed.launch.config.errors import EXIT_STOPPED, ConfigError

STOPPED, USAGE = EXIT_STOPPED, ConfigError.exit_code


WARNING_S = 120  # SLURM's signal comes this long before the time limit


PORT = 29500  # a pod has its ports for itself


VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}", re.ASCII)


# What `#SBATCH` lines may hold: nothing in them can be quoted reliably.
SBATCH_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=[A-Za-z0-9_.,:;@/+%\[\]-]+)?")


# USR1 is ignored until train.py listens to it: a rank that is still importing would die of it.
TASK = 'trap "" USR1; RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"'


SLURM = """\
#!/usr/bin/env bash
{directives}
# {warning_s} s before the time limit all ranks get USR1, save and exit with {stopped}: the job goes back into the queue
# and continues from there. Anything else that goes wrong ends the job; submit it again to continue.
set -uo pipefail
{setup}MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * {ranks})) LOCAL_SIZE={ranks}
code=0
# One task per rank. A rank that saved must not take down the others (kill-on-bad-exit), a dead one may not hang them
# for long (wait). srun does not inherit --cpus-per-task.
srun --ntasks-per-node={ranks} --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait=300 \\
    bash -c {task} rank \\
    {command} || code=$?
if [ "$code" -eq {stopped} ]; then
    # The requeue ends this script. Exiting before that would race with it, and the job could end as failed.
    scontrol requeue "$SLURM_JOB_ID" && sleep 300
fi
exit "$code"
"""


K8S = f"""\
# kubectl apply -f FILE
# kubectl logs -f -l app=NAME,batch.kubernetes.io/job-completion-index=0     the lines of rank 0
# The dataset and the run folder are on the volume claim, which all pods mount (ReadWriteMany). Pods that exit with
# {STOPPED} (saved and stopped) or are evicted are replaced and do not count; {USAGE} (a wrong config) fails the Job.
"""


def train_arguments(run_file: str, overrides: Sequence[str], fresh: bool = False) -> list[str]:
    """Arguments of train.py; a run file whose name begins with a dash stays a file."""
    path = f"./{run_file}" if run_file.startswith("-") else run_file
    sets = [part for text in overrides for part in ("--set", text)]
    return ["--config", path, *sets, *(["--fresh"] if fresh else [])]


def slurm(
    run_file: str,
    overrides: Sequence[str],
    nodes: int,
    ranks_per_node: int,
    *,
    name: str = "packspeed",
    env: Mapping[str, str] | None = None,
    cwd: str = "",
    cpus_per_rank: int = 8,
    gpus: bool = True,
    time_limit: str = "24:00:00",
    options: Sequence[str] = (),
    python: str = sys.executable,
    script: str = str(TRAIN),
) -> str:
    """The text of an sbatch script.

    cwd: where it runs, else where it is submitted. options: further sbatch options, such as `--partition=gpu`.
    Raises ConfigError for what a `#SBATCH` line cannot hold.
    """
    _at_least_one(nodes=nodes, ranks_per_node=ranks_per_node, cpus_per_rank=cpus_per_rank)
    if not TIME.fullmatch(time_limit):
        raise ConfigError(f"time limit {time_limit!r}: SLURM takes minutes, HH:MM:SS or DAYS-HH:MM:SS.")
    for option in options:
        if not SBATCH_OPTION.fullmatch(option):
            raise ConfigError(f"sbatch option {option!r}: it reads --name or --name=value, without spaces and quotes.")
    directives = [
        f"--job-name={re.sub(r'[^A-Za-z0-9._-]', '-', name)}", f"--nodes={nodes}",
        f"--ntasks-per-node={ranks_per_node}", f"--cpus-per-task={cpus_per_rank}",
        *([f"--gpus-per-node={ranks_per_node}"] if gpus else []), f"--time={time_limit}",
        f"--signal=USR1@{WARNING_S}", "--requeue", "--open-mode=append", *options,
    ]  # fmt: skip
    plain, secret = _split(env or {})
    setup = [f"export {shlex.quote(f'{key}={value}')}" for key, value in plain.items()]
    setup += [f"# {key} is a secret and comes from the shell that submits" for key in secret]
    setup += [f"cd -- {shlex.quote(cwd)} || exit {USAGE}"] if cwd else []
    return SLURM.format(
        directives="\n".join(f"#SBATCH {directive}" for directive in directives),
        setup="".join(f"{line}\n" for line in setup),
        ranks=ranks_per_node, cpus=cpus_per_rank, warning_s=WARNING_S, stopped=STOPPED, task=shlex.quote(TASK),
        command=shlex.join([python, script, *train_arguments(run_file, overrides)]),
    )  # fmt: skip


def k8s(
    run_file: str,
    overrides: Sequence[str],
    nodes: int,
    ranks_per_node: int,
    *,
    image: str,
    name: str = "packspeed",
    env: Mapping[str, str] | None = None,
    claim: str = "packspeed",
    mount: str = "/workspace",
    gpus: bool = True,
    max_restarts: int = 3,
    python: str = "python3",
) -> str:
    """The YAML of a headless Service and an Indexed Job; run file and dataset are below `mount`, the volume of `claim`.

    max_restarts: how often the whole run may crash; a crash of one pod ends the pods of all nodes.
    """
    _at_least_one(nodes=nodes, ranks_per_node=ranks_per_node)
    label = _dns_label(name)
    metadata = {"name": label, "labels": {"app": label}}
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        # Ranks look for pod 0 before any pod is ready.
        "spec": {"clusterIP": "None", "selector": {"app": label}, "publishNotReadyAddresses": True},
    }  # fmt: skip
    rules = [
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [STOPPED]}},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [USAGE]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    command = [
        python, "-m", "packspeed.launch.cluster.k8s_entry", f"--nodes={nodes}", f"--ranks={ranks_per_node}",
        f"--master={label}-0.{label}", f"--port={PORT}", "--", *train_arguments(run_file, overrides),
    ]  # fmt: skip
    container: dict[str, Any] = {
        "name": "ranks", "image": image, "command": [_literal(word) for word in command], "workingDir": mount,
        "env": _k8s_env(env or {}, label),
        "volumeMounts": [{"name": "workspace", "mountPath": mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }  # fmt: skip
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": ranks_per_node}}
    pod = {
        "subdomain": label, "restartPolicy": "Never", "terminationGracePeriodSeconds": WARNING_S,
        "containers": [container],
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # NCCL and gloo want more than the usual 64 MB
        ],
    }  # fmt: skip
    job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": metadata,
        "spec": {
            "completionMode": "Indexed", "completions": nodes, "parallelism": nodes,
            "backoffLimit": max_restarts * nodes, "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": rules},
            "template": {"metadata": {"labels": {"app": label}}, "spec": pod},
        },
    }  # fmt: skip
    return K8S + yaml.dump_all([service, job], Dumper=_Plain, sort_keys=False, width=10**6)


def no_ssh(
    plan: Plan, arguments: Sequence[str], *, cwd: str = "", python: str = sys.executable, script: str = str(TRAIN)
) -> str:
    """One command per node of a plan, each below a comment that names the node. Start all of them, in any order."""
    plain, secret = _split(plan.env)
    lines = [f"# {key} is a secret: set it on every host yourself" for key in secret]
    for index, seat in enumerate(plan.seats):
        interface = {f"{lib}_SOCKET_IFNAME": seat.interface for lib in ("GLOO", "NCCL") if seat.interface}
        env = [f"{key}={value}" for key, value in {**interface, **plain}.items()]
        command = node_command(plan.world_info, index, plan.master, plan.port, arguments, python, script)
        words = shlex.join([*(["env", *env] if env else []), *command])
        last = seat.first_rank + seat.host.slots - 1
        lines.append(f"# {seat.host.name}: ranks {seat.first_rank} to {last}")
        lines.append(f"cd -- {shlex.quote(cwd)} && {words}" if cwd else words)
    return "\n".join(lines) + "\n"


def node_command(
    world_info: Mapping[str, Sequence[int]],
    node_rank: int,
    master: str,
    port: int,
    arguments: Sequence[str],
    python: str = sys.executable,
    script: str = str(TRAIN),
) -> list[str]:
    """DeepSpeed's launcher of one node's ranks. world_info: node -> its slots, nodes in the order of their ranks."""
    info = base64.urlsafe_b64encode(json.dumps(world_info).encode()).decode()
    return [
        python, "-m", "deepspeed.launcher.launch", f"--world_info={info}", f"--node_rank={node_rank}",
        f"--master_addr={master}", f"--master_port={port}", "--log_level=warning", script, *arguments,
    ]  # fmt: skip


class _Plain(yaml.SafeDumper):
    """YAML without anchors: both documents share parts."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _literal(text: str) -> str:
    """A string that Kubernetes' $(NAME) expansion leaves as it is."""
    return text.replace("$", "$$")


def _k8s_env(env: Mapping[str, str], label: str) -> list[dict[str, Any]]:
    plain, secret = _split(env)
    return [{"name": key, "value": _literal(value)} for key, value in plain.items()] + [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": f"{label}-secrets", "key": key}}} for key in secret
    ]


def _split(env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """(variables to write down, names of those that hold secrets)."""
    for name in env:
        if not VARIABLE.fullmatch(name):
            raise ConfigError(f"environment variable {name!r}: this is no name of a variable.")
    plain = {name: value for name, value in sorted(env.items()) if not SECRET.search(name)}
    return plain, sorted(env.keys() - plain.keys())


def _dns_label(name: str) -> str:
    """A run's name as Kubernetes takes it: a Service begins with a letter, a pod's index is appended, 63 in all."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"run-{label}"
    return label[:50].strip("-")


def _at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name.replace('_', ' ')}: {value}. At least 1 is needed.")
