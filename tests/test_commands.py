"""The table of commands: its help equals the docstrings, and help and usage errors load no torch."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from packspeed.launch.cli import COMMANDS, Target, app


def load(target: Target) -> object:
    module, _, function = target.function.partition(":")
    return getattr(importlib.import_module(f"packspeed.launch.commands.{module}"), function)


@pytest.mark.parametrize("words", COMMANDS)
def test_the_line_of_help_is_the_first_paragraph_of_the_docstring(words: str) -> None:
    first_paragraph = (inspect.getdoc(load(COMMANDS[words])) or "").split("\n\n")[0]
    assert COMMANDS[words].help == first_paragraph.replace("\n", " ")


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_prints_its_help_and_describes_every_option(words: str) -> None:
    result = CliRunner().invoke(app, [*words.split(), "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    parameters = inspect.signature(load(COMMANDS[words])).parameters.values()  # type: ignore[arg-type]
    for parameter in parameters:
        (option,) = [m for m in _metadata(load(COMMANDS[words]), parameter.name) if hasattr(m, "help")]
        assert option.help, f"{words}: {parameter.name} has no help"


def _metadata(function: object, name: str) -> list[object]:
    import typing

    annotation = typing.get_type_hints(function, include_extras=True)[name]
    if typing.get_origin(annotation) is typing.Union:  # Python 3.10 adds None to the type if it is the default
        annotation = typing.get_args(annotation)[0]
    return list(annotation.__metadata__)


@pytest.mark.launch
def test_the_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; sys.argv = ['packspeed', '--help']\nfrom packspeed.launch.cli import main\n"
        "try: main()\n"
        "finally: print([n for n in sys.modules if n.startswith('packspeed.launch.commands.') or n == 'pydantic'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for words in COMMANDS:
        assert f" {words.split()[0]} " in done.stdout


@pytest.mark.launch
def test_no_command_module_loads_torch() -> None:
    """So --help and usage errors answer within a fraction of a second."""
    modules = sorted({f"packspeed.launch.commands.{target.function.split(':')[0]}" for target in COMMANDS.values()})
    code = (
        f"import sys, {', '.join(modules)}; sys.exit(bool({{'torch', 'deepspeed', 'transformers'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_unknown_commands_name_the_nearest() -> None:
    result = CliRunner().invoke(app, ["trian"])
    assert result.exit_code == 2
    assert "'train'" in result.output
