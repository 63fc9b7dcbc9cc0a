"""Read metrics.jsonl and cut it at a step, even if a crash, a copy or a disk error has damaged it.

A resume keeps the lines up to its checkpoint, and moves the later lines to metrics.discarded.jsonl. Checkpoints record
the size of metrics.jsonl. So a resume usually reads only one line and cuts the file at that size. If the size does not
match, all lines are read. Unreadable and repeated lines are then moved too, and missing lines are reported.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from packspeed.data.storage.atomic import write_file
from packspeed.launch.config.json_types import JsonObject

DISCARDED = "metrics.discarded.jsonl"
MAX_LINE_BYTES = 1 << 20  # lines can be long, because those of a mixture contain the path of every source


def parse_object(line: bytes) -> JsonObject | None:
    """Return the JSON object on a line, or None if the line is incomplete, not UTF-8 or not an object."""
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_objects(path: Path) -> tuple[list[JsonObject], int]:
    """Read a file with one JSON object per line. Returns (the objects, the number of lines that are not an object).

    Empty lines are not counted. A missing file has no lines.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    objects = [parse_object(line) for line in lines if line.strip()]
    return [value for value in objects if value is not None], objects.count(None)


def step_of(record: JsonObject | None) -> int | None:
    """Return the step of a parsed metrics line, or None if it has none."""
    step = record.get("step") if record else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def line_start(path: Path, at: int) -> int:
    """Return the offset of the first line that begins at or after the byte `at` of a file."""
    if at <= 0:
        return 0
    with path.open("rb") as file:
        file.seek(at - 1)
        return at - 1 + len(file.readline(MAX_LINE_BYTES))


def last_line_with(path: Path, text: bytes, end: int) -> bytes | None:
    """Return the last complete line before the byte `end` that contains `text`, or None if there is none.

    Reads backwards in blocks of 1 MiB, so it usually reads only the end of the file.
    """
    with path.open("rb") as file:
        tail = b""  # the start of a line whose beginning is in the block before
        while end > 0:
            start = max(0, end - MAX_LINE_BYTES)
            file.seek(start)
            block = file.read(end - start) + tail
            at = block.rfind(text)
            begin = block.rfind(b"\n", 0, at) + 1
            if at >= 0 and (begin or start == 0):
                return block[begin : block.find(b"\n", at)] if b"\n" in block[at:] else block[begin:]
            tail, end = block[: block.find(b"\n") + 1], start
    return None


def discard_after(path: Path, step: int, expected_bytes: int | None = None) -> list[str]:
    """Move the lines of metrics.jsonl after `step` to metrics.discarded.jsonl. Returns notes about what was wrong.

    `expected_bytes` is the size of the file that the checkpoint of `step` has recorded. If the process is killed at any
    moment, every line is in one of the two files, and the next call completes the work without moving a line twice.
    """
    if not path.exists():
        return [f"note: {path} is missing, so the metrics before step {step + 1} are lost"] if step > 0 else []
    if expected_bytes is not None and ends_with_step(path, expected_bytes, step):
        with path.open("rb") as file:
            file.seek(expected_bytes)
            append_discarded(path.with_name(DISCARDED), file.read())
        os.truncate(path, expected_bytes)
        return []
    keep, drop, notes = sort_lines(path.read_bytes(), step)
    if drop:
        append_discarded(path.with_name(DISCARDED), b"".join(drop))
        write_file(path, b"".join(keep))
    return [f"note: {path}: {note}" for note in notes]


def ends_with_step(path: Path, size: int, step: int) -> bool:
    """Return whether the first `size` bytes of the file end with a complete line of `step`."""
    with path.open("rb") as file:
        start = max(0, size - MAX_LINE_BYTES)
        file.seek(start)
        end = file.read(size - start)
    if start + len(end) < size or not end.endswith(b"\n"):
        return False
    last_line = end[end.rfind(b"\n", 0, -1) + 1 :]
    return step_of(parse_object(last_line)) == step


def sort_lines(content: bytes, step: int) -> tuple[list[bytes], list[bytes], list[str]]:
    """Divide the lines of metrics.jsonl. Returns (lines to keep, lines to discard, notes about what was wrong).

    Kept are the steps up to `step` and their evaluations. If a step has several lines, the last one is kept, because it
    is the newest.
    """
    lines = [line + b"\n" for line in content.split(b"\n") if line.strip()]
    latest: dict[tuple[int, bool], int] = {}  # (step, is an evaluation) -> line number
    unreadable = doubled = 0
    for number, line in enumerate(lines):
        record = parse_object(line)
        line_step = step_of(record)
        if record is None or line_step is None:
            unreadable += 1
        elif line_step <= step:
            key = (line_step, "val_loss" in record)
            doubled += key in latest
            latest[key] = number
    kept_numbers = {number for _, number in sorted(latest.items())}
    keep = [lines[number] for _, number in sorted(latest.items())]
    drop = [line for number, line in enumerate(lines) if number not in kept_numbers]
    missing = step - sum(not is_evaluation for _, is_evaluation in latest)
    counts = ((unreadable, "could not be read"), (doubled, "repeat a step"))
    notes = [f"{count} line(s) {what} and were moved to {DISCARDED}" for count, what in counts if count]
    if missing > 0:
        notes.append(f"{missing} of the first {step} steps have no line")
    return keep, drop, notes


def append_discarded(path: Path, lines: bytes) -> None:
    """Append lines to metrics.discarded.jsonl (`path`), all or none.

    Does nothing if the file already ends with these lines, because an interrupted call has appended them.
    """
    before = path.read_bytes() if path.exists() else b""
    if not lines or before.endswith(lines):
        return
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_file(path, before + lines)
