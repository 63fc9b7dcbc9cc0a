"""The environment variables that the ranks get from the shell that launches them.

    this shell                   variables whose names match the pattern FORWARDED, such as NCCL_... and PYTHONPATH
    .deepspeed_env               NAME=VALUE lines in DeepSpeed's format, in the home folder and in the current folder;
                                 DS_ENV_FILE gives another file name
    --env NAME[=VALUE]           one variable; without a value, the value in this shell

If a variable comes from several of these sources, the last one counts. Values are passed unchanged: no shell expands
them.
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

# These names match FORWARDED, but their values are valid on this host or in this process only.
NOT_FORWARDED = ("CUDA_VISIBLE_DEVICES", "PACKSPEED_LAUNCH_ID", "PACKSPEED_LAUNCHER", "PACKSPEED_OWN_NETWORK")

VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)

MAX_BYTES = 2**17  # longest variable (Linux's limit for one string), and largest .deepspeed_env


def forwarded_environment(extra: list[str], files: bool = True) -> dict[str, str]:
    """Return the environment variables that the ranks on every host get: {name: value}.

    `extra` has the values of the --env options; if `files` is False, .deepspeed_env files are ignored. Raises
    ConfigError for an invalid name or a value that is too long.
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
                f"environment variable {name}: its value is longer than 128 KiB, the limit of Linux. Shorten or unset "
                f"it."
            )
    return chosen


def deepspeed_env_files() -> list[Path]:
    """Return the .deepspeed_env files that exist, in DeepSpeed's order: in the home folder, then in the current
    folder.
    """
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = [Path(os.path.expanduser("~"), name), Path(name)]
    return [path for path in dict.fromkeys(path.absolute() for path in paths) if path.is_file()]


def report_env_files() -> None:
    """Print to stderr which .deepspeed_env files are used."""
    for path in deepspeed_env_files():
        print(f"variables for all hosts are read from {path}", file=sys.stderr, flush=True)


def read_deepspeed_env(path: Path) -> dict[str, str]:
    """Return the variables in a .deepspeed_env file.

    Raises ConfigError with the line number if a line is not NAME=VALUE.
    """
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
            raise ConfigError(f"{path}, line {number}: write NAME=VALUE, with a valid variable name.")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        elif re.search(r"\$[A-Za-z_{(]|`", value):
            raise ConfigError(
                f"{path}, line {number}: the value of {name} contains $ or a backquote, but no shell expands this "
                f"file. "
                "Write the expanded value. If the characters are meant literally, put the value in quotes."
            )
        variables[name] = value
    return variables
