"""Calibration files: what a type of GPU can do at best, and how much slower training is. `load_machine("h100-80gb")`.

A file is YAML, one per type, in launch/planner/machines/ or in a folder of your own (`--calibration`). Units: bytes,
bytes per second, seconds. `factors` give the time of each part of a step, divided by its ideal time: 1.2 for
products of matrices means 83% of the peak. docs/planner.md describes every key; every file names the source of its
numbers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from packspeed.launch.config.errors import ConfigError, nearest
from packspeed.launch.config.parsing import dotted, parse_yaml, read_text, shortened
from packspeed.launch.config.peaks import datasheet_peak

FOLDER = Path(__file__).parent / "machines"
GIB = 2**30

Positive = Annotated[float, Field(gt=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, strict=True)]
FILE = ConfigDict(extra="forbid", allow_inf_nan=False)  # of what a calibration file may contain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factors:
    """How many times longer each part of a step takes than the device's peak FLOP/s and bandwidth allow (1: ideal).

    Measured, or taken from published runs: the calibration file names its sources.
    """

    __pydantic_config__ = FILE

    products: NotNegative  # products of matrices, against the data sheet's peak
    products_fp8: NotNegative  # products in fp8, against the peak of bf16
    attention: NotNegative  # attention's products of the causal half, against the peak
    memory: NotNegative  # activations read and written, against the memory's bandwidth
    head: NotNegative  # logits read and written, against the memory's bandwidth
    link: NotNegative  # what collectives send inside a host and cannot hide
    network: NotNegative  # what collectives send between hosts and cannot hide
    stragglers: NotNegative  # added to the products for each doubling of the number of hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Error:
    """Errors of predictions compared with measurements, as fractions: half are below `median`, 90% below `p90`."""

    __pydantic_config__ = FILE

    median: NotNegative
    p90: NotNegative


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Capacities and speeds of one type of GPU, or of this CPU, and of a host with `per_host` of them."""

    __pydantic_config__ = FILE

    name: str
    device: str  # as torch names it; the peaks are looked up with it
    memory: Positive
    bandwidth: Positive  # of the memory
    link: Positive  # of one GPU to the others of its host, one direction
    network: Positive  # of one host to the others, one direction
    per_host: Annotated[int, Field(ge=1, strict=True)]
    host_memory: Positive  # of a host
    host_link: Positive  # between a GPU and its host's memory
    disk: Positive  # of one rank's writes to the run folder
    context: NotNegative  # CUDA context and libraries, of the GPU's memory
    margin: NotNegative  # share of the memory that the allocator loses to fragments
    kernel: NotNegative  # seconds that the host needs to start a kernel
    factors: Factors
    time_error: Error
    memory_error: Error
    source: str
    peaks: dict[str, Positive] = dataclasses.field(default_factory=dict)  # FLOP/s by precision, beside the data sheets

    @property
    def is_cpu(self) -> bool:
        """Return whether ranks compute on CPUs."""
        return self.name == "cpu"

    def on_host(self, ranks: int) -> int:
        """Return how many of a run's ranks share the memory of one host."""
        return min(self.per_host, ranks)

    def peak(self, precision: str) -> float:
        """Return the peak FLOP/s in a precision ("fp32", "bf16", "fp16"). For "fp8", that of bf16.

        Raises ConfigError if it is neither in the file nor in the data sheets that Packspeed knows.
        """
        wanted = "bf16" if precision == "fp8" else precision
        found = self.peaks.get(wanted) or datasheet_peak(self.device, wanted)
        if not found > 0:
            raise ConfigError(
                f"{self.name}: the peak FLOP/s in {wanted} of {self.device} is not known. Add "
                f"`peaks: {{{wanted}: FLOP/s}}` to its calibration file."
            )
        return found


def machine_names(folder: Path | None = None) -> list[str]:
    """Return the names of all calibration files, those in `folder` first."""
    paths = [*(folder.glob("*.yaml") if folder and folder.is_dir() else ()), *FOLDER.glob("*.yaml")]
    return sorted({path.stem for path in paths})


def load_machine(name: str, calibration: Path | None = None) -> Machine:
    """Read the calibration of a machine.

    calibration: a file, which is used even if its name differs from `name`, or a folder that is searched first. Raises
    ConfigError if there is no such machine, or if a key is unknown, missing or not a number.
    """
    return read_machine(find_file(name, calibration))


def find_file(name: str, calibration: Path | None) -> Path:
    """Return the path of a machine's calibration file. Raises ConfigError if there is none."""
    if calibration is not None and calibration.is_file():
        return calibration
    if calibration is not None and not calibration.is_dir():
        raise ConfigError(f"--calibration {calibration}: neither a file nor a folder. Give one that exists.")
    for folder in (*([calibration] if calibration else []), FOLDER):
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    names = machine_names(calibration)
    raise ConfigError(
        f"no calibration file is called {name!r}{nearest(name, names)} There are: {', '.join(names)}; "
        "cpu means this machine's CPU. Write your own as docs/planner.md describes, and give it with --calibration."
    )


def read_machine(path: Path) -> Machine:
    """Read one calibration file. Raises ConfigError that names the file and the key if a value cannot be used.

    A file with `like: NAME` takes every key that it lacks from NAME.yaml in the same folder, or else in
    Packspeed's own.
    """
    data = _read(path)
    data.setdefault("name", path.stem)
    try:
        return TypeAdapter(Machine).validate_python(data)
    except ValidationError as error:
        problems = "; ".join(map(_problem, error.errors()))
        raise ConfigError(f"{path}: {problems}. docs/planner.md lists the keys.") from None


def _read(path: Path, *above: Path) -> dict[str, Any]:
    """Return a file's keys and values. Keys that it lacks are taken from the file that `like` names.

    above: the files that take keys from this one.
    """
    from packspeed.launch.config.loading import parse_numbers

    parsed, _ = parse_yaml(read_text(path, "calibration file"), path)
    data = parse_numbers(parsed)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level of a calibration file must be a mapping (device: ..., memory: ...).")
    base = data.pop("like", None)
    if base is None:
        return data
    chain = (*above, path)
    places = [folder / f"{base}.yaml" for folder in (path.parent, FOLDER)]
    found = next((place for place in places if place.is_file() and not any(map(place.samefile, chain))), None)
    if found is None:
        raise ConfigError(
            f"{path}: like: {shortened(str(base))} names no other calibration file. Give the name of one in "
            f"the same folder or of one of Packspeed's own ({', '.join(machine_names())}), but not one that takes its "
            "own keys from this file."
        )
    inherited = _read(found, *chain)
    inherited.pop("name", None)
    return {**inherited, **data}


PROBLEMS = {
    "extra_forbidden": "unknown key",
    "missing": "this key is missing",
    "float_type": "give a number, such as 1.5e+12",
    "dataclass_type": "give a mapping of names to numbers",
    "dict_type": "give a mapping of names to numbers",
}


def _problem(error: ErrorDetails) -> str:
    """Return an error of pydantic as text: the key, and what is wrong with its value."""
    message = error["msg"]
    return f"{dotted(error['loc'])}: {PROBLEMS.get(error['type'], message[0].lower() + message[1:])}"
