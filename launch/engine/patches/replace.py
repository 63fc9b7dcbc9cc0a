"""Replace one attribute of somebody else's object, loudly.

    original = replace(optimizer, "scaled_global_norm", scaled_global_norm)

Python creates an attribute that does not exist. A patch of a method that DeepSpeed has renamed would then do nothing,
without an error: `replace` raises instead.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from packspeed.launch.config.errors import UserError

# The versions that the whole test suite has passed with. Others may work; a run with one prints a note.
TESTED = {"deepspeed": ("0.19.8",), "torch": ("2.13.0",)}

# How messages name a package, which PyPI's names do not tell apart by case.
TITLES = {"deepspeed": "DeepSpeed", "torch": "torch", "cpuinfo": "py-cpuinfo"}


def replace(owner: object, name: str, replacement: Any) -> Any:
    """Set owner.name to `replacement`; returns the original. UserError if the owner has no such attribute."""
    original = require(owner, name)
    setattr(owner, name, replacement)
    return original


def require(owner: object, name: str) -> Any:
    """Return owner.name; UserError if there is none."""
    if not hasattr(owner, name):
        described = owner if isinstance(owner, type) else type(owner)
        module = getattr(owner, "__name__", "") if described.__name__ == "module" else ""
        raise missing([f"{module or described.__qualname__}.{name}"], (module or described.__module__).split(".")[0])
    return getattr(owner, name)


def missing(names: list[str], package: str) -> UserError:
    """The error for internal names that the installed version of a package lacks."""
    title, advice = TITLES.get(package, package), "install the version that constraints.txt names"
    if package in TESTED:
        newest = TESTED[package][-1]
        advice = f"Packspeed was tested with {title} {', '.join(TESTED[package])}: pip install {package}=={newest}"
    return UserError(
        f"{title} {installed_version(package)} lacks internals that Packspeed replaces, calls or reads: "
        f"{'; '.join(names)}. {advice[0].upper()}{advice[1:]}, or adapt packspeed/launch/engine/patches to the new "
        "version (registry.py says who needs what, and why)."
    )


def installed_version(package: str) -> str:
    """The installed version of a package without its local part: 2.13.0 for 2.13.0+cpu."""
    try:
        return metadata.version(TITLES.get(package, package)).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "(unknown version)"


def version_notes() -> list[str]:
    """One note for each package that is installed in a version Packspeed was not tested with."""
    notes = []
    for package, versions in TESTED.items():
        version = installed_version(package)
        if version not in versions:
            notes.append(
                f"note: {TITLES[package]} {version} is installed; Packspeed was tested with {', '.join(versions)}. "
                "All the internal names it relies on are there."
            )
    return notes
