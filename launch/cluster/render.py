"""Write a launch as text for schedulers that start processes themselves.

    slurm     an sbatch script. srun starts one task per rank, and train.py gets its rank from the variables RANK,
              WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE and MASTER_*
    k8s       a Kubernetes Indexed Job with one pod per node (k8s_entry.py), and a headless Service that gives pod 0 its
              name
    no_ssh    one command of DeepSpeed's node launcher per node, to start by hand or with another tool

The functions only build text. Every string of the user is quoted for what reads it: the shell (shlex), YAML, or the
$(NAME) expansion of Kubernetes. The value of a variable that may be a secret is never written, only the place from
which to take it. In both schedulers, a job that exits with 75 (saved and stopped) is put back into the queue.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence

import yaml

from packspeed.launch.cluster.hosts import SECRET, LaunchPlan
from packspeed.launch.cluster.local_launcher import TRAIN, node_launcher_command
from packspeed.launch.config.errors import EXIT_STOPPED, ConfigError

STOPPED, USAGE = EXIT_STOPPED, ConfigError.exit_code


WARNING_S = 120  # SLURM sends its signal this long before the time limit; Kubernetes lets a pod save for this long


PORT = 29500  # can be fixed, because every pod has its own network


VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}", re.ASCII)


# The options that an `#SBATCH` line may contain. Others would need quotes, and quoting is not reliable in such lines.
SBATCH_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=[A-Za-z0-9_.,:;@/+%\[\]-]+)?")


# Ignore USR1 until train.py installs its handler. Otherwise the signal would kill a rank that is still importing.
TASK = 'trap "" USR1; RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"'


SLURM = """\
#!/usr/bin/env bash
{directives}
# {warning_s} s before the time limit, all ranks get USR1, save and exit with {stopped}. The job is then put back into
# the queue and continues from there. After any other failure the job ends. To continue, submit it again.
set -uo pipefail
{setup}MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$((SLURM_JOB_NUM_NODES * {ranks})) LOCAL_SIZE={ranks}
code=0
# One task per rank. --kill-on-bad-exit=0: a rank that has saved must not kill the others. --wait: if a rank dies, the
# others are killed after this many seconds. srun does not inherit --cpus-per-task.
srun --ntasks-per-node={ranks} --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait=300 \\
    bash -c {task} rank \\
    {command} || code=$?
if [ "$code" -eq {stopped} ]; then
    # The requeue ends this script. If the script exited before that, the job could be marked as failed.
    scontrol requeue "$SLURM_JOB_ID" && sleep 300
fi
exit "$code"
"""


K8S = f"""\
# kubectl apply -f FILE
# kubectl logs -f -l app=NAME,batch.kubernetes.io/job-completion-index=0     the lines of rank 0
# The dataset and the run folder are on the volume claim, which all pods mount (ReadWriteMany). A pod that is evicted or
# exits with {STOPPED} (saved and stopped) is replaced and does not count as failed. Exit code {USAGE} (wrong config)
# fails the Job.
"""


def train_arguments(run_file: str, overrides: Sequence[str], fresh: bool = False) -> list[str]:
    """Return the command-line arguments of launch/train.py: the run file, one --set for each of `overrides`
    ("KEY.PATH=VALUE"), and --fresh if `fresh` is True.
    """
    path = f"./{run_file}" if run_file.startswith("-") else run_file
    # Without "./", argparse would take a path that starts with a dash for an option.
    sets = [word for text in overrides for word in ("--set", text)]
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
    """Return the text of an sbatch script that trains a run file with one task per rank.

    The job runs in the folder `cwd`, by default the one from which it is submitted. The script exports the variables in
    `env`, except secrets. `options` are further sbatch options, such as "--partition=gpu". Raises ConfigError for a
    value that an `#SBATCH` line cannot contain.
    """
    _at_least_one(nodes=nodes, ranks_per_node=ranks_per_node, cpus_per_rank=cpus_per_rank)
    if not TIME.fullmatch(time_limit):
        raise ConfigError(f"time limit {time_limit!r}: write minutes, HH:MM:SS or DAYS-HH:MM:SS, as SLURM does.")
    for option in options:
        if not SBATCH_OPTION.fullmatch(option):
            raise ConfigError(f"sbatch option {option!r}: write --name or --name=value, without spaces or quotes.")
    directives = [
        f"--job-name={re.sub(r'[^A-Za-z0-9._-]', '-', name)}", f"--nodes={nodes}",
        f"--ntasks-per-node={ranks_per_node}", f"--cpus-per-task={cpus_per_rank}",
        *([f"--gpus-per-node={ranks_per_node}"] if gpus else []), f"--time={time_limit}",
        f"--signal=USR1@{WARNING_S}", "--requeue", "--open-mode=append", *options,
    ]  # fmt: skip
    plain, secret = _split(env or {})
    setup = [f"export {shlex.quote(f'{key}={value}')}" for key, value in plain.items()]
    setup += [f"# {key} is a secret: set it in the shell that submits the job" for key in secret]
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
    """Return the YAML of a headless Service and an Indexed Job that train a run file, with one pod per node.

    `claim` is the volume claim with the run file and the dataset, which is mounted at `mount`. `max_restarts` limits
    how often the complete run may crash; a crash of one pod ends the pods of all nodes.
    """
    _at_least_one(nodes=nodes, ranks_per_node=ranks_per_node)
    label = _dns_label(name)
    command = [
        python, "-m", "packspeed.launch.cluster.k8s_entry", f"--nodes={nodes}", f"--ranks={ranks_per_node}",
        f"--master={label}-0.{label}", f"--port={PORT}", "--", *train_arguments(run_file, overrides),
    ]  # fmt: skip
    container: dict[str, object] = {
        "name": "ranks", "image": image, "command": [_literal(word) for word in command], "workingDir": mount,
        "env": _k8s_env(env or {}, label),
        "volumeMounts": [{"name": "workspace", "mountPath": mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }  # fmt: skip
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": ranks_per_node}}
    documents = [_service(label), _job(label, nodes, max_restarts, _pod(label, container, claim))]
    return K8S + yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=10**6)


def _service(label: str) -> dict[str, object]:
    """Return the headless Service, called `label`, that gives pod 0 the host name at which all ranks connect."""
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": label, "labels": {"app": label}},
        # The name must resolve before pod 0 is ready, because the ranks connect to it while they start.
        "spec": {"clusterIP": "None", "selector": {"app": label}, "publishNotReadyAddresses": True},
    }  # fmt: skip


def _pod(label: str, container: dict[str, object], claim: str) -> dict[str, object]:
    """Return the specification of the pod that runs the ranks of one node: its container, and the volume `claim`."""
    return {
        "subdomain": label, "restartPolicy": "Never", "terminationGracePeriodSeconds": WARNING_S,
        "containers": [container],
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # NCCL and gloo need more than the default 64 MB
        ],
    }  # fmt: skip


def _job(label: str, nodes: int, max_restarts: int, pod: dict[str, object]) -> dict[str, object]:
    """Return an Indexed Job with one pod per node.

    A pod that is evicted, or exits with 75 (saved and stopped), is replaced and does not count as failed. Exit code 2
    (wrong config) fails the Job. The run as a whole may crash `max_restarts` times; the next crash fails the Job.
    """
    rules = [
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [STOPPED]}},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [USAGE]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    return {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": label, "labels": {"app": label}},
        "spec": {
            "completionMode": "Indexed", "completions": nodes, "parallelism": nodes,
            "backoffLimit": max_restarts * nodes, "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": rules},
            "template": {"metadata": {"labels": {"app": label}}, "spec": pod},
        },
    }  # fmt: skip


def no_ssh(
    plan: LaunchPlan, arguments: Sequence[str], *, cwd: str = "", python: str = sys.executable, script: str = str(TRAIN)
) -> str:
    """Return shell commands as text: one per host of a plan, under a comment that names the host.

    Each starts the ranks of its host, in the folder `cwd`. The user starts all of them by hand, in any order.
    """
    plain, secret = _split(plan.env)
    lines = [f"# {key} is a secret: set it on every host yourself" for key in secret]
    for index, planned in enumerate(plan.hosts):
        env = [f"{key}={value}" for key, value in {**planned.network_env, **plain}.items()]
        command = node_launcher_command(plan.world_info, index, plan.master, plan.port, arguments, python, script)
        words = shlex.join([*(["env", *env] if env else []), *command])
        lines.append(f"# {planned.host.name}: ranks {planned.first_rank} to {planned.last_rank}")
        lines.append(f"cd -- {shlex.quote(cwd)} && {words}" if cwd else words)
    return "\n".join(lines) + "\n"


class _Plain(yaml.SafeDumper):
    """A YAML dumper that writes no anchors, although the Service and the Job share objects."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _literal(text: str) -> str:
    """Escape a string so that Kubernetes' $(NAME) expansion does not change it."""
    return text.replace("$", "$$")


def _k8s_env(env: Mapping[str, str], label: str) -> list[dict[str, object]]:
    """Return the `env` entries of a container, one per variable.

    A variable whose name looks like that of a secret refers to the Kubernetes Secret <label>-secrets, without its
    value.
    """
    plain, secret = _split(env)
    entries: list[dict[str, object]] = [{"name": key, "value": _literal(value)} for key, value in plain.items()]
    for key in secret:
        entries.append({"name": key, "valueFrom": {"secretKeyRef": {"name": f"{label}-secrets", "key": key}}})
    return entries


def _split(env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return (variables that may be written into a file, names of the variables that may be secrets).

    Raises ConfigError for an invalid name.
    """
    for name in env:
        if not VARIABLE.fullmatch(name):
            raise ConfigError(f"environment variable {name!r}: this is not a valid variable name.")
    plain = {name: value for name, value in sorted(env.items()) if not SECRET.search(name)}
    return plain, sorted(env.keys() - plain.keys())


def _dns_label(name: str) -> str:
    """Return a run's name as a valid Kubernetes name of at most 50 characters, which leaves room for the index of a
    pod.
    """
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"run-{label}"
    return label[:50].strip("-")


def _at_least_one(**numbers: int) -> None:
    """Raise ConfigError if one of the numbers is below 1. The names of the arguments are for the message."""
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name.replace('_', ' ')}: {value}. It must be at least 1.")
