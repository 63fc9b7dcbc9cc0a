"""Manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packspeed.data.storage.hashing import hash_file
from packspeed.launch.config.errors import UserError

MANIFEST = "packspeed.json"


UNIVERSAL = "universal"  # the folder inside a checkpoint that elastic.py makes; it has a manifest of its own


FORMAT_VERSION = 1


def step_folder(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read packspeed.json of a checkpoint. Raises UserError where it is missing or not what we write."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder / MANIFEST}: format version {manifest['format_version']}; "
                f"this Packspeed reads {FORMAT_VERSION}."
            )
        return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no readable {MANIFEST} ({error}); the save did not finish.") from None


def find_damage(folder: Path) -> list[str]:
    """Everything that keeps a checkpoint from being whole: missing, truncated, changed or unexpected files."""
    try:
        files: dict[str, Any] = read_manifest(folder)["files"]
    except UserError as error:
        return [str(error)]
    found = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            found.append(f"{path} has {path.stat().st_size:,} bytes, packspeed.json says {expected['bytes']:,}")
        elif hash_file(path) != expected:
            found.append(f"{path} has another hash than packspeed.json says: its bytes were changed")
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    there = {name for name in there if not name.startswith((f"{UNIVERSAL}/", f".{UNIVERSAL}"))}
    found += [f"{folder / name} is not listed in packspeed.json" for name in sorted(there - set(files) - {MANIFEST})]
    return found


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints under <run>/checkpoints, newest first; temporary and foreign folders do not count."""
    return sorted(
        (p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()), key=lambda p: -int(p.name[5:])
    )


def newest_complete(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that verifies; says why it passed over the others."""
    for path in list_checkpoints(folder):
        found = find_damage(path)
        if not found:
            return path
        say(f"passing over checkpoint {path.name}: {'; '.join(found)}")
    return None
