"""`packspeed launch --launcher pdsh|openmpi`: run DeepSpeed's own launcher for all hosts, without supervision.

With pdsh, DeepSpeed builds one command line for the remote shell and quotes little in it. It puts double quotes around
an argument that contains a space and around the value of a variable with an unusual character, but it escapes neither $
nor backquotes. So this module escapes arguments and values such that the remote shell produces the original text
(pdsh_argument, pdsh_value). What cannot be escaped, such as a folder with a space in its name, is refused. OpenMPI uses
no shell, but there DeepSpeed's double quotes become part of the value, so values that would be quoted are refused.

The variables are passed in a file, which may contain secrets. Only its owner can read it, and it is removed at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from packspeed.launch.cluster.hosts import LaunchPlan
from packspeed.launch.cluster.local_launcher import TRAIN
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.unattended import SIGNALS
from packspeed.launch.run_folder.heartbeat import LAUNCHER

PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")  # characters that the shell, pdsh and DeepSpeed's quoting leave unchanged

PR_SET_PDEATHSIG = 1  # prctl(2)

# DeepSpeed itself passes on all variables with these prefixes, without escapes. Values in the file replace them.
PASSED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


def run_remote_launcher(plan: LaunchPlan, launcher: str, train_args: Sequence[str]) -> int:
    """Train on all hosts of a plan with `launcher` ("pdsh" or "openmpi"), and return the exit code.

    A signal is passed on to the launcher, which ends its ranks. Raises ConfigError if the launcher cannot pass on an
    argument, a variable or a host name.
    """
    with launcher_files(plan, launcher) as (hostfile, variables):
        command = launcher_command(plan, launcher, hostfile, train_args)
        env = {**os.environ, "DS_ENV_FILE": str(variables), LAUNCHER: str(os.getpid())}
        # If this process is killed, DeepSpeed's runner gets SIGTERM. With pdsh, the runner then ends the ranks on all
        # hosts. With OpenMPI, the ranks on this machine notice that the process in LAUNCHER has ended, and mpirun ends
        # the other ranks.
        process = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=_terminate_with_parent)

        def forward(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

        for number in SIGNALS:
            signal.signal(number, forward)
        code = process.wait()
    return code if code >= 0 else 128 - code


def _terminate_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launcher_command(plan: LaunchPlan, launcher: str, hostfile: Path, train_args: Sequence[str]) -> list[str]:
    """Return the command that starts the ranks on all hosts of a plan with DeepSpeed's launcher.

    `launcher` is "pdsh" or "openmpi". Raises ConfigError if it cannot pass on an argument, a path or a host name.
    """
    arguments, selection = list(train_args), []
    if any(":" in planned.host.name for planned in plan.hosts):
        raise ConfigError(
            f"--launcher {launcher}: DeepSpeed does not accept IPv6 addresses. Use host names from /etc/hosts or DNS."
        )
    if launcher == "pdsh":
        for path in (os.getcwd(), sys.executable, str(TRAIN)):
            if not PLAIN.fullmatch(path):
                raise ConfigError(
                    f"--launcher pdsh: DeepSpeed passes {path!r} to a remote shell without quotes. Use a path of "
                    "letters, digits, dots, dashes and underscores, or --launcher ssh."
                )
        arguments = [pdsh_argument(argument) for argument in arguments]
        hosts = (f"{planned.host.name}:{','.join(map(str, planned.host.device_ids))}" for planned in plan.hosts)
        selection = ["--include", "@".join(hosts)]
    elif any(planned.host.devices for planned in plan.hosts):
        raise ConfigError(
            "--launcher openmpi: it cannot use only some devices of a host. Exclude complete hosts, or use --launcher "
            "ssh."
        )
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), *selection,
        "--launcher", launcher, "--master_addr", plan.master, "--master_port", str(plan.port), "--force_multi",
        "--log_level", "warning", str(TRAIN), *arguments,
    ]  # fmt: skip


@contextlib.contextmanager
def launcher_files(plan: LaunchPlan, launcher: str) -> Iterator[tuple[Path, Path]]:
    """Write two temporary files for DeepSpeed's launcher, and yield their paths: (hostfile, variables).

    The second has a line NAME=VALUE for each variable of the ranks. Both are removed at the end of the `with` block.
    """
    hosts = [f"{planned.host.name} slots={max(planned.host.device_ids) + 1}\n" for planned in plan.hosts]
    lines = [f"{name}={value}\n" for name, value in launcher_variables(plan, launcher, os.environ).items()]
    with tempfile.TemporaryDirectory(prefix="packspeed-launch-") as folder:  # mode 0700
        hostfile, variables = Path(folder, "hostfile"), Path(folder, "deepspeed_env")
        for path, content in ((hostfile, hosts), (variables, lines)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(content)
        yield hostfile, variables


def launcher_variables(plan: LaunchPlan, launcher: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that every host gets, with values escaped for DeepSpeed's launcher.

    `environ` is this process's environment. Raises ConfigError for a value that cannot be passed on.
    """
    interfaces = {planned.interface for planned in plan.hosts if planned.interface}
    # These launchers give every host the same variables, so the network interface is set only if it has the same name
    # on all hosts.
    variables = {"GLOO_SOCKET_IFNAME": interfaces.pop()} if len(interfaces) == 1 else {}
    if launcher == "openmpi":
        variables |= {"MASTER_ADDR": plan.master, "MASTER_PORT": str(plan.port)}
    variables |= {k: v for k, v in environ.items() if k.startswith(PASSED_BY_DEEPSPEED) and k != "PYTHONPATH"}
    variables |= plan.env
    for name, value in variables.items():
        if "\n" in value or "\r" in value or value != value.strip():
            raise ConfigError(
                f"--launcher {launcher}: the value of {name} contains a line break, or starts or ends with a space. "
                "DeepSpeed cannot pass on such a value. Change the variable, or use --launcher ssh."
            )
        if launcher == "openmpi" and value and not PLAIN.fullmatch(value.replace("%", "")):
            raise ConfigError(
                f"--launcher openmpi: DeepSpeed would put quotes around the value of {name}, which become part of it. "
                "Use --launcher ssh, or unset the variable."
            )
    return {name: pdsh_value(value) for name, value in variables.items()} if launcher == "pdsh" else variables


def pdsh_argument(text: str) -> str:
    """Escape an argument so that after DeepSpeed, pdsh and the remote shell have processed it, it is `text` again."""
    # DeepSpeed puts double quotes around an argument with a space and escapes double quotes in it, but nothing else.
    quoted = re.sub(r"[\\$`]", r"\\\g<0>", text) if " " in text else shlex.quote(text)
    return quoted.replace("%", "%%")  # pdsh replaces %h, %u and %n


def pdsh_value(text: str) -> str:
    """Escape the value of a variable so that DeepSpeed, pdsh and the remote shell reproduce `text`.

    DeepSpeed puts a value with special characters in double quotes, but escapes nothing in it.
    """
    return re.sub(r"[\\$`\"]", r"\\\g<0>", text).replace("%", "%%")
