"""Replace an attribute of another library's object, or raise an error if the attribute does not exist.

    original = replace(optimizer, "scaled_global_norm", scaled_global_norm)

A plain assignment would create the attribute. If DeepSpeed had renamed the method, a patch by assignment would
silently do nothing; `replace` raises an error instead.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from packspeed.launch.config.errors import UserError

# Versions with which the complete test suite has passed. A run with another version prints a note.
TESTED = {"deepspeed": ("0.19.8",), "torch": ("2.13.0",)}

# Import name -> the name that messages use.
TITLES = {"deepspeed": "DeepSpeed", "torch": "torch", "cpuinfo": "py-cpuinfo"}


def replace(owner: object, name: str, replacement: Any) -> Any:
    """Set owner.name to `replacement` and return the original value.

    Raises UserError if the owner has no such attribute.
    """
    original = require(owner, name)
    setattr(owner, name, replacement)
    return original


def require(owner: object, name: str) -> Any:
    """Return owner.name. Raises UserError if the owner has no such attribute."""
    if not hasattr(owner, name):
        described = owner if isinstance(owner, type) else type(owner)
        module = getattr(owner, "__name__", "") if described.__name__ == "module" else ""
        raise missing([f"{module or described.__qualname__}.{name}"], (module or described.__module__).split(".")[0])
    return getattr(owner, name)


def missing(names: list[str], package: str) -> UserError:
    """Return (not raise) the error for internal names that the installed version of a package lacks.

    `names` are shown as they are; `package` is the import name.
    """
    title, advice = TITLES.get(package, package), "install the version that constraints.txt names"
    if package in TESTED:
        newest = TESTED[package][-1]
        advice = f"Packspeed was tested with {title} {', '.join(TESTED[package])}: pip install {package}=={newest}"
    return UserError(
        f"{title} {installed_version(package)} lacks internals that Packspeed replaces, calls or reads: "
        f"{'; '.join(names)}. {advice[0].upper()}{advice[1:]}, or adapt packspeed/launch/engine/patches to the new "
        "version (registry.py there says which file uses each name, and why)."
    )


def installed_version(package: str) -> str:
    """Return the installed version of a package without its local part, for example 2.13.0 for 2.13.0+cpu."""
    try:
        return metadata.version(TITLES.get(package, package)).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "(unknown version)"


def version_notes() -> list[str]:
    """Return one note for each package whose installed version Packspeed was not tested with."""
    notes = []
    for package, versions in TESTED.items():
        version = installed_version(package)
        if version not in versions:
            notes.append(
                f"note: {TITLES[package]} {version} is installed; Packspeed was tested with {', '.join(versions)}. "
                f"All internal names of {TITLES[package]} that Packspeed uses exist in this version."
            )
    return notes
