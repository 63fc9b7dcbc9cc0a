"""Compare registry.py, the list of internal names, with the installed packages before a run builds anything.

    check_sources()     before DeepSpeed is imported: search the source files for every name, without executing them
    check_loaded()      after the import: check that the classes and modules in memory have the methods as well

Source files also show names that exist only in a running engine: attributes that __init__ sets, arguments of C++
functions, keys of checkpoint files. Reading them needs no import, which a missing name could break. The search uses
regular expressions, because parsing the same 35 files to syntax trees takes ten times as long.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path

from packspeed.launch.engine.patches.registry import MODULE, REGISTRY, TENSORS, TEXT, Internal
from packspeed.launch.engine.patches.replace import missing

_TOP_LEVEL = re.compile(r"^[A-Za-z@_]", re.M)  # a line without indentation: the class above it has ended
_MODULE_NAME = re.compile(r"^(?:async +)?(?:def|class) +(\w+)|^(\w+) *(?::|=(?!=))", re.M)
_CLASS_NAME = re.compile(r"^    (?:async +)?(?:def +(\w+)|(\w+) *=(?!=))", re.M)
_FIELD = re.compile(r"^    (\w+) *:", re.M)  # a dataclass field; without a default it is not in the class's vars()
# self.name = ..., self.name: type = ... and self.__dict__["name"] = ...
_ON_SELF = re.compile(r"self\.(?:(\w+)(?: *: *[\w.\[\], |]+)?|__dict__\[['\"](\w+)['\"]\]) *=(?!=)")
_ON_OBJECTS = re.compile(r"\.(\w+) *=(?!=)")


@functools.cache
def check_sources() -> None:
    """Raise UserError if the installed packages lack a name that registry.py lists, or a function's parameters differ.

    The error lists all such names of one package, the first in which there are any.
    """
    absent = [(internal, found) for internal in REGISTRY if (found := problem(internal)) is not None]
    if absent:
        package = absent[0][0].package
        raise missing([found for internal, found in absent if internal.package == package], package)


def check_loaded() -> None:
    """Raise UserError if an already imported class or module lacks a method or function that registry.py lists."""
    for internal in REGISTRY:
        module = sys.modules.get(internal.file.removesuffix(".py").replace("/", "."))
        if module is None or internal.where in (TENSORS, TEXT):
            continue
        name = identifier(internal)
        owner = module if internal.where == MODULE else getattr(module, internal.where, None)
        # A class must have the name itself: torch.nn.Module, which engines inherit, has a forward and a compile too.
        # A module need not: torch's config modules compute their attributes.
        present = name in vars(owner) if isinstance(owner, type) else hasattr(owner, name)
        if name in _names_of(internal.file, internal.where)[0] and not present:
            raise missing([internal.label], internal.package)


def problem(internal: Internal) -> str | None:
    """Return how the installed sources differ from one entry of the registry, or None if they agree.

    The name can be absent, or the function can have other parameters than the registry says.
    """
    if internal.where == TEXT:
        source, text = _collapsed_source(internal.file), _collapsed(internal.name)
        # A single name must stand alone: a longer one that contains it is another name.
        present = re.search(rf"\b{text}\b", source) if text.isidentifier() else text in source
        return None if present else internal.label
    if not any(identifier(internal) in names for names in _names_of(internal.file, internal.where)):
        return internal.label
    if "(" in internal.name:
        found = _signature(_scope(internal.file, internal.where), identifier(internal))
        if found not in (internal.name, None):
            return f"{internal.label}, which is now {found}"
    return None


def identifier(internal: Internal) -> str:
    """Return the name in a registry entry without its parameters: `step` for the entry `step(closure)`."""
    return internal.name.partition("(")[0]


@functools.cache
def read_source(file: str) -> str:
    """Return the text of a file below site-packages without comment lines, or "" if the file does not exist.

    `file` starts with the package, as in "deepspeed/runtime/engine.py". The package is not imported.
    """
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, rest)
        if path.is_file():
            comment = "#" if path.suffix in (".py", ".pyi") else "//"
            return re.sub(rf"^[ \t]*{comment}.*", "", path.read_text(encoding="utf-8"), flags=re.M)
    return ""


@functools.cache
def _names_of(file: str, where: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return (names that the module or class defines, names that are set on instances), as found in a source file.

    `where` is the name of a class, MODULE (the module itself) or TENSORS (attributes that the file sets on other
    objects).
    """
    scope = _scope(file, where)
    if where == MODULE:
        return _matches(_MODULE_NAME, scope), frozenset()
    if where == TENSORS:
        return frozenset(), _matches(_ON_OBJECTS, scope)
    return _matches(_CLASS_NAME, scope), _matches(_ON_SELF, scope) | _matches(_FIELD, scope)


def _matches(pattern: re.Pattern[str], source: str) -> frozenset[str]:
    """Return the names that a pattern finds in source text."""
    return frozenset("".join(match.groups("")) for match in pattern.finditer(source))


@functools.cache
def _scope(file: str, where: str) -> str:
    """Return the part of a source file that an entry of the registry refers to.

    `where` is the name of a class, which gives the lines of the class ("" if there is none), or MODULE, TENSORS or
    TEXT, which give the complete file.
    """
    source = read_source(file)
    if where in (MODULE, TENSORS, TEXT):
        return source
    begin = re.search(rf"^class {where}\b", source, re.M)
    if begin is None:
        return ""
    end = _TOP_LEVEL.search(source, begin.end())
    return source[begin.start() : end.start() if end else len(source)]


def _signature(scope: str, name: str) -> str | None:
    """Return `name(a, b)` as the source defines the function, without self, annotations and defaults.

    Returns None if `scope`, a piece of source text, defines no such function.
    """
    found = re.search(rf"def {name}\((.*?)\)(?: *->[^\n]*)?:\n", scope, re.S)
    if found is None:
        return None
    parameters = [re.split(r"[:=]", parameter)[0].strip() for parameter in found[1].split(",")]
    return f"{name}({', '.join(parameter for parameter in parameters if parameter not in ('', 'self'))})"


@functools.cache
def _collapsed_source(file: str) -> str:
    """Return the source of a file below site-packages without white space and with double quotes only."""
    return _collapsed(read_source(file))


def _collapsed(text: str) -> str:
    """Return the text without white space and with double quotes only, because formatters change both."""
    return "".join(text.split()).replace("'", '"')
