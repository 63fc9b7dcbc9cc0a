"""Run the `packspeed` command in this process."""

from __future__ import annotations

import contextlib
import io
import sys

import pytest

from packspeed.launch import cli


def runs_cli(arguments: list[str], code: int = 0) -> str:
    """Run `packspeed ARGUMENTS` in this process and check its exit code. Return stdout, or stderr if code is not 0."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["packspeed", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        sys.argv = before
    assert (end.value.code or 0) == code, err.getvalue()
    return err.getvalue() if code else out.getvalue()
