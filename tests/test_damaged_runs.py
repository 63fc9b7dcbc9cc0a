"""`packspeed report`, `watch` and `goodput` on run folders that a crash, a copy, a disk or an editor has damaged.

More than the test's cases, by hand: python tests/test_damaged_runs.py 3000
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from packspeed.launch.cli import app
from packspeed.launch.config.errors import UserError
from packspeed.launch.observe import report as reporting
from packspeed.launch.observe.console import panel
from packspeed.launch.observe.goodput import account, table
from packspeed.launch.observe.watch import Follower
from packspeed.launch.run_folder.formats import Environment, Status
from packspeed.launch.run_folder.reading import read_metrics, read_object, read_tree
from support.run_folder import life, make_run, step_line, write_lines

pytestmark = pytest.mark.slow  # more than `make check` has time for

FUZZ_CASES = 150
JSON_LINES = ("metrics.jsonl", "metrics.discarded.jsonl", "goodput.jsonl", "samples.jsonl", "anomalies.jsonl")
OBJECTS = ("config.yaml", "status.json", "ds_config.json", "environment.json")
FILES = (*JSON_LINES, *OBJECTS, "checkpoints/latest")
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 10**400, -(10**30), 1e308, -1e308, 5e-324, float("nan"), float("inf"), "", "x", "\ud800",
    "[/red]", "<b>", "\x00\x1b[2J", "9" * 5000, [], {}, [[]], [None], {"a": []}, {"": 1}, {"\ud800": 1}, 2**63, 1e17,
]  # fmt: skip
ODD_TEXTS = [
    b"", b"\n\n", b"null", b"[]", b"{}", b"3", b'"x"', b"\xff\xfe x", b"\xef\xbb\xbf{}", b"\0" * 700, b"{" * 3000,
    b"[" * 50, b'{"step":' * 900, b"9" * 5000, b"name: 2026-13-45", b"name: 0x_", b"a: &a [*a]", b"? [1, 2]\n: 3",
    b"name: &n {<<: *n}", b"- " * 3000, b"name: !!python/object:os.system x", b"name: !!int ''", b"1: 2\ntrue: 3",
    b"train: {steps: 0x" + b"f" * 5000 + b"}", b"name: 2026-01-01", b"name: !!binary aGk=", b"train: !!set {steps}",
    b"a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c]\n"
    b"e: &e [*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e]",
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value inside nested data."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in items] + [place for _, item in items for place in places(item)]


def with_odd_values(content: bytes, choose: random.Random) -> bytes:
    """Replace, remove or rename some values of the JSON lines of a file."""
    lines = content.splitlines() or [b"{}"]
    for _ in range(choose.randint(1, 3)):
        number = choose.randrange(len(lines))
        try:
            value = json.loads(lines[number])
        except ValueError:
            continue
        inside = places(value)
        if not inside:
            value = choose.choice(ODD_VALUES)
        else:
            container, key = choose.choice(inside)
            action = choose.randrange(4)
            if action == 0 and isinstance(container, dict):
                del container[key]
            elif action == 1 and isinstance(container, dict):
                container[key + "_"] = container.pop(key)
            else:
                container[key] = choose.choice(ODD_VALUES)
        lines[number] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


def with_odd_bytes(content: bytes, choose: random.Random) -> bytes:
    """Flip, insert, cut out, repeat or cut off bytes."""
    at, end = sorted(choose.randrange(len(content) + 1) for _ in range(2))
    return choose.choice([
        content[:at] + choose.randbytes(choose.randint(1, 20)) + content[at:],
        content[:at] + content[end:],
        content[:at],
        content[:end] + content[at:],
        content[:at] + bytes(choose.randrange(256) for _ in content[at : at + 3]) + content[at + 3 :],
        content[:at] + b"\0" * (end - at) + content[end:],
    ])  # fmt: skip


def with_odd_lines(content: bytes, choose: random.Random) -> bytes:
    """Repeat, shuffle or interleave lines."""
    lines = content.splitlines(keepends=True)
    lines += choose.choices(lines or [b""], k=choose.randint(0, 5))
    lines.insert(choose.randrange(len(lines) + 1), choose.choice(ODD_TEXTS) + b"\n")
    if choose.random() < 0.5:
        choose.shuffle(lines)
    return b"".join(lines)


def replace_by_something_else(path: Path, choose: random.Random) -> None:
    """A folder, a pipe, a device or a link where the file was."""
    path.unlink()
    kind = choose.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind < 5:
        path.symlink_to(("/dev/zero", path.name, "/nowhere/at/all")[kind - 2])


def damage(folder: Path, choose: random.Random) -> list[str]:
    """Damage one to three files of a run folder. Returns their names."""
    names = choose.sample(FILES, choose.choice((1, 1, 2, 3)))
    for name in names:
        path = folder / name
        action = choose.randrange(8)
        if action == 0:
            replace_by_something_else(path, choose)
        elif action == 1:
            path.write_bytes(choose.choice(ODD_TEXTS))
        elif action == 2:
            path.write_bytes(with_odd_lines(path.read_bytes(), choose))
        elif action < 5 and path.suffix != ".yaml":
            path.write_bytes(with_odd_values(path.read_bytes(), choose))
        else:
            path.write_bytes(with_odd_bytes(path.read_bytes(), choose))
    return names


def show_everything(folder: Path, out: Path) -> int:
    """What the three commands do. Returns how many of them could show something."""
    shown = 0
    try:
        runs, _ = reporting.report([folder], out)
        json.dumps(reporting.differences([runs[0], runs[0]]), allow_nan=False)
        reporting.page(runs * 2).encode("utf-8", "backslashreplace")
        shown += 1
    except UserError:
        pass
    try:
        follower = Follower(folder)
        for _ in range(2):
            follower.update()
        follower.progress.line()
        Console(file=io.StringIO(), force_terminal=True, width=80).print(panel(follower.progress))
        shown += 1
    except UserError:
        pass
    total = account(folder, [])
    if total is not None:
        assert min(total.seconds.values()) >= 0
        assert sum(total.seconds.values()) == pytest.approx(total.wall_s)
        json.dumps(total.as_dict(), allow_nan=False)
        table(total)
        shown += 1
    return shown


def fuzz(folder: Path, cases: range) -> int:
    """Damage a run folder, show it, restore it. Returns how many commands showed something."""
    shown = 0
    for seed in cases:
        run = make_run(folder / "r")
        names = damage(run, random.Random(seed))
        try:
            shown += show_everything(run, folder / "report.html")
        except Exception as error:
            raise AssertionError(f"seed {seed} ({names}): {error!r}") from error
        shutil.rmtree(run)
    return shown


@pytest.mark.timeout(120)
def test_damaged_files_are_shown_or_refused_with_words(tmp_path: Path) -> None:
    assert fuzz(tmp_path, range(FUZZ_CASES)) > 2.5 * FUZZ_CASES, "what is left of a run is shown"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "r")


def call(*arguments: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command; the text of an expected error is its stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is None or isinstance(result.exception, SystemExit):
        return result.exit_code, result.stdout, result.stderr
    assert isinstance(result.exception, UserError), result.exception
    return result.exception.exit_code, result.stdout, str(result.exception)


def call_all(run: Path, tmp_path: Path) -> str:
    """What the three commands print together; each must be able to show something."""
    printed = ""
    for command in (["report", run, "--out", tmp_path / "o.html"], ["watch", run, "--once"], ["goodput", run]):
        code, out, err = call(*command)
        assert code == 0, (command, err)
        printed += out + err
    return printed


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("content", [b"\xff\xfe x", b"[]", b"null", b'{"a": 1'])
def test_a_damaged_file_is_named_and_the_rest_is_shown(run: Path, tmp_path: Path, name: str, content: bytes) -> None:
    path = run / name
    path.write_bytes(content if name in OBJECTS else path.read_bytes() + content + b"\n")
    printed = call_all(run, tmp_path)
    assert f"note: {path}: " in printed
    assert ("1 line(s)" if name in JSON_LINES else "the file is ignored") in printed
    page = (tmp_path / "o.html").read_text()
    assert f"{path}: " in page, "the page names it, too"
    assert page.count("<svg") == 8, "all curves are drawn"


def test_an_undamaged_run_has_no_notes(run: Path, tmp_path: Path) -> None:
    assert "note" not in call_all(run, tmp_path)
    assert "Damaged files" not in (tmp_path / "o.html").read_text()


def test_lines_with_wrong_values_are_counted(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for changes in ({"loss": "x"}, {"loss": float("nan")}, {"lr": 1e60}, {"tokens": -1}, {"step": True}):
            file.write(json.dumps(step_line(21, **changes)) + "\n")
        file.write('{"step": 3}\n')
    notes: list[str] = []
    steps, _ = read_metrics(run, notes)
    assert len(steps) == 20
    assert notes == [f"{run / 'metrics.jsonl'}: 6 line(s) could not be read and are left out."]


def test_of_a_doubled_step_the_last_line_counts(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_line(3, loss=1.25)) + "\n")
    notes: list[str] = []
    steps, evaluations = read_metrics(run, notes)
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert steps[2]["loss"] == 1.25
    assert len(evaluations) == 1
    assert "1 line(s) repeat a step" in notes[0]
    assert "1 line(s) repeat" in call("watch", run, "--once")[2]


def test_lines_of_older_versions_are_valid(tmp_path: Path) -> None:
    """The first versions wrote neither data_hash nor memory_gib."""
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "lr": 1}])
    write_lines(tmp_path / "goodput.jsonl", [{"started_at": 1.7e9, "seconds": {"compute": 3.0, "waiting": 1.0}}])
    notes: list[str] = []
    assert len(read_metrics(tmp_path, notes)[0]) == 2
    total = account(tmp_path, notes)
    assert total is not None
    assert total.seconds["other"] == 1.0, "a bucket of another version"
    assert notes == []
    assert "step 2" in call("watch", tmp_path, "--once")[1], "without a config.yaml the length is unknown"


def test_values_become_json_values(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "config.yaml").write_text("day: 2026-01-02\nlimit: .inf\nname: r\n")
    assert read_tree(tmp_path / "config.yaml", notes) == {"day": "2026-01-02", "limit": "inf", "name": "r"}
    (tmp_path / "ds_config.json").write_text('{"a": NaN, "b": "\\ud800", "c": 1' + "0" * 60 + "}")
    assert read_tree(tmp_path / "ds_config.json", notes) == {"a": "nan", "b": "\\ud800", "c": "1" + "0" * 60}
    assert notes == []


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: " + "x" * 2**18, "a: 0x_", "[a", "a: 1\na: 2"])
def test_refused_yaml_is_named_with_its_reason(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    notes: list[str] = []
    assert read_tree(path, notes) == {}
    assert len(notes) == 1
    assert notes[0].startswith(f"{path}: the file is ignored: ")


def test_wrong_types_in_an_object_are_named(run: Path) -> None:
    notes: list[str] = []
    assert read_object(run / "status.json", Status, notes) is not None
    (run / "environment.json").write_text('{"versions": [1]}')
    assert read_object(run / "environment.json", Environment, notes) is None
    assert "environment.json" in notes[0]


@pytest.mark.parametrize("command", ["report", "watch", "goodput"])
def test_what_is_no_run_is_an_error(tmp_path: Path, run: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    arguments = [
        run / "config.yaml",
        tmp_path / "empty",
        tmp_path / "nothing",
        "/dev/null",
        tmp_path / "pipe",
        "x" * 5000,
    ]
    for argument in arguments:
        extra = {"report": ["--out", tmp_path / "o.html"], "watch": ["--once"]}.get(command, [])
        code, _, error = call(command, argument, *extra)
        assert code == 1, argument
        assert str(argument) in error
        assert "\n" not in error.strip()
    assert not (tmp_path / "o.html").exists()


def test_report_shows_the_runs_that_it_can_read(run: Path, tmp_path: Path) -> None:
    code, _, error = call("report", run, tmp_path / "nothing", "--out", tmp_path / "o.html")
    assert code == 0
    assert f"{tmp_path / 'nothing'} is not a run folder" in error
    assert str(tmp_path / "nothing") in (tmp_path / "o.html").read_text()


def test_output_that_cannot_be_written_is_an_error(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path, "", "/", tmp_path / "file" / "o.html", "/dev/full", tmp_path / "pipe", "/proc/o.html"):
        code, _, error = call("report", run, "--out", out)
        assert code == 1, out
        assert "cannot be written" in error
    code, _, error = call("report", run, "--out", tmp_path / "o.html", "--png", tmp_path / "file")
    assert code == 1
    assert "--png DIR" in error
    assert (tmp_path / "file").read_text() == "kept"
    assert call("report", run, "--out", "/dev/null")[0] == 0
    assert not Path("/dev/null").is_file(), "a device is written to, not replaced"


def test_a_full_disk_keeps_the_older_report(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "o.html"
    out.write_text("older")

    def full(stream: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("packspeed.data.storage.atomic.sync_stream", full)
    code, _, error = call("report", run, "--out", out)
    assert code == 1
    assert "No space left" in error
    assert out.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.html", "r"]


def test_goodput_survives_a_clock_that_is_set(run: Path) -> None:
    """Between lives: back by an hour, ahead by an hour. Within a life: ahead by an hour, which the life recorded."""
    start = 1.7e9
    lives = [
        life(start), life(start - 3600), life(start + 3600, clock_step_s=3600.0), life(start + 7240 + 10),
        life(start + 7240 + 60, clock_step_s=-7200.0), life(start + 160),
    ]  # fmt: skip
    write_lines(run / "goodput.jsonl", lives)
    (run / "metrics.discarded.jsonl").unlink()
    notes: list[str] = []
    total = account(run, notes)
    assert total is not None
    assert min(total.seconds.values()) >= 0
    assert total.wall_s == pytest.approx(sum(total.seconds.values()))
    assert total.seconds["idle"] == pytest.approx(7160 + 10 + 10 + 20), "only the hours between two lives are unknown"
    assert sum(seconds for name, seconds in total.seconds.items() if name != "idle") == pytest.approx(6 * 40)
    assert "1 process(es) started up to 1:00:40 before the previous one ended" in notes[0]


if __name__ == "__main__":
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{count} damaged folders, {fuzz(Path(scratch), range(count))} of {3 * count} commands showed something")
