"""The variables that the ranks get from the shell that launches them: an allow-list, `.deepspeed_env`, and --env.

    FORWARDED                    variables set here whose names match
    ~/.deepspeed_env, ./...      NAME=VALUE lines, in DeepSpeed's format; DS_ENV_FILE names another file, as there
    --env NAME[=VALUE]           one variable

A later one replaces an earlier one. Values are passed as they are: no shell expands them.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from packspeed.launch.config.errors import ConfigError

FORWARDED = re.compile(
    r"(NCCL|GLOO|CUDA|TORCH|OMP|MKL|KMP|UCX|FI|HF|HUGGINGFACE|WANDB|COMET|AWS|GOOGLE|PACKSPEED|DS)_\w+|PYTHONPATH",
    re.ASCII,
)

# They match, but belong to this host or process.
NOT_FORWARDED = ("CUDA_VISIBLE_DEVICES", "PACKSPEED_LAUNCH_ID", "PACKSPEED_LAUNCHER", "PACKSPEED_OWN_NETWORK")

VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)

MAX_BYTES = 2**17  # of a variable (Linux's limit for one string) and of a .deepspeed_env


def forwarded_environment(extra: list[str], files: bool = True) -> dict[str, str]:
    """The variables that every host gets. extra: --env options. Raises ConfigError for a name or value that is wrong.

    files: also read .deepspeed_env.
    """
    chosen = {k: v for k, v in os.environ.items() if FORWARDED.fullmatch(k) and k not in NOT_FORWARDED}
    for path in deepspeed_env_files() if files else []:
        chosen |= read_deepspeed_env(path)
    for item in extra:
        name, equals, value = item.partition("=")
        if not VARIABLE.fullmatch(name):
            raise ConfigError(f"--env {item}: {name!r} is not a valid variable name.")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: the variable is not set here. Write --env {name}=value.")
        chosen[name] = value if equals else os.environ[name]
    for name, value in chosen.items():
        if len(value.encode(errors="surrogateescape")) >= MAX_BYTES:
            raise ConfigError(
                f"environment variable {name}: its value is longer than 128 KiB, which no process can get."
            )
    return chosen


def deepspeed_env_files() -> list[Path]:
    """The files that DeepSpeed would read, in its order: in the home folder, then in this folder."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = [Path(os.path.expanduser("~"), name), Path(name)]
    return [path for path in dict.fromkeys(path.absolute() for path in paths) if path.is_file()]


def report_env_files() -> None:
    """Say on stderr which .deepspeed_env files are used."""
    for path in deepspeed_env_files():
        print(f"variables for all hosts are read from {path}", file=sys.stderr, flush=True)


def read_deepspeed_env(path: Path) -> dict[str, str]:
    """The variables of a .deepspeed_env. Raises ConfigError with the line number for a line that is not NAME=VALUE."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}. Nothing was started.") from error
    variables = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not VARIABLE.fullmatch(name) or "\0" in value:
            raise ConfigError(f"{path}, line {number}: this is not NAME=VALUE, with a valid name of a variable.")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        elif re.search(r"\$[A-Za-z_{(]|`", value):
            raise ConfigError(
                f"{path}, line {number}: {name} holds a $ or a backquote, which no shell would expand. "
                "Write the value out; if it is meant literally, put it in quotes."
            )
        variables[name] = value
    return variables
