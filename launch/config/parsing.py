"""Parse a run file (YAML 1.1) or a DeepSpeed JSON (JSON or HJSON) with size limits, and find the line of every key.

    data, lines = parse_yaml(read_text(path, "run file"), path)        # lines: ("train", "optimizer", "lr") -> 7

No file can keep a parser busy for long or fill the memory, because the limits below are checked before or during the
parsing. Both parsers raise ConfigError with one paragraph: file, line and what is wrong. The slowest file within the
limits takes 1 to 2 s. A run file of 40 lines takes 20 ms.

    limit        refuses                                               why
    MAX_BYTES    a large file, or /dev/zero                            PyYAML reads only 100 KB/s
    MAX_DEPTH    deeply nested brackets or blocks                      both parsers are recursive
    MAX_VALUES   long lists; aliases (*name) of lists of aliases       10 lines can expand to 10**9 values
    MAX_DIGITS   numbers beyond 64-bit integers and doubles            Python's conversion takes quadratic time
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from packspeed.launch.config.errors import ConfigError

KeyPath = tuple[str | int, ...]  # ('train', 'optimizer', 'lr'); items of lists by their index

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
MAX_VALUES = 10_000
MAX_DIGITS = 40

BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_text(path: Path, what: str, hint: str = ".") -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raises ConfigError if it cannot be read, is larger than MAX_BYTES or is not UTF-8. The message starts with `what`,
    such as "run file". If the file cannot be opened, it ends with `hint`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{what} {path}: {reason}{hint}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{what} {path}: larger than {MAX_BYTES // 1024} KiB. Is it the right file?")
    if encoding := BYTE_ORDER_MARKS.get(content[:2]):
        raise ConfigError(f"{what} {path}: its encoding is {encoding}. Save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{what} {path}:{line}: byte {error.start} (0x{content[error.start]:02x}) is not UTF-8. Save it as UTF-8."
        ) from None


def unusable_character(text: str) -> str | None:
    """Return the name (such as U+0000) of the first null or surrogate character of the text, or None if it has none.

    A path cannot contain such a character, and a terminal cannot print it.
    """
    match = re.search("[\0\ud800-\udfff]", text)
    return f"U+{ord(match[0]):04X}" if match else None


# ---- YAML ----
TOO_MUCH = "more than {:,} values, or blocks that nest deeper than {} levels"


class _Loader(yaml.SafeLoader):
    """A yaml.SafeLoader that limits nesting (MAX_DEPTH), the number of values (MAX_VALUES) and digits (MAX_DIGITS).

    It raises a YAMLError that contains the line if a limit is exceeded or a value cannot be converted.
    """

    depth = count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH or self.count > MAX_VALUES:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # its stub has no types
            raise yaml.composer.ComposerError(None, None, TOO_MUCH.format(MAX_VALUES, MAX_DEPTH), mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        tag = node.tag.rpartition(":")[2]
        try:
            if tag in ("int", "float") and len(node.value) > MAX_DIGITS:
                raise ValueError
            value = super().construct_object(node, deep)
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError
            if isinstance(value, str) and unusable_character(value):
                raise ValueError
        # SafeConstructor raises these for 2024-13-45, 0x_, !!bool x, !!timestamp x and the empty !!int.
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
            kind = {"int": "64-bit integer", "float": "number", "timestamp": "date", "str": "text"}.get(tag, tag)
            raise yaml.constructor.ConstructorError(
                None, None, f"{shortened(node.value)} is not a valid {kind}", node.start_mark
            ) from None
        return value


def parse_yaml(text: str, place: Path | str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse YAML 1.1. Returns the data and, for every key path, the line number in the file, from 1.

    `place` is the file for messages. Raises ConfigError for invalid YAML, duplicate keys, keys that are not words, and
    anything beyond MAX_DEPTH, MAX_VALUES and MAX_DIGITS.
    """
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None, {}
            lines = _key_lines(root, place)
            return loader.construct_document(root), lines
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{place}:{line}: character U+{ord(text[error.position]):04X} is not valid YAML. Remove it."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line_of_error = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{place}{line_of_error}: this is not valid YAML: {problem}.") from None


def _key_lines(root: yaml.Node, place: Path | str) -> dict[KeyPath, int]:
    """Return {key path: line in the file, from 1} for a parsed YAML document, with aliases expanded.

    Raises ConfigError for duplicate keys, aliases that contain themselves, and too many values.
    """
    lines: dict[KeyPath, int] = {}
    count = 0

    def walk(node: yaml.Node, key_path: KeyPath, above: tuple[yaml.Node, ...]) -> None:
        nonlocal count
        count += 1
        line = node.start_mark.line + 1
        if node in above:
            raise ConfigError(
                f"{place}:{line}: {dotted(key_path) or 'the file'} contains itself by an alias (*name). Remove it."
            )
        if count > MAX_VALUES or len(above) > MAX_DEPTH:
            raise ConfigError(f"{place}:{line}: {TOO_MUCH.format(MAX_VALUES, MAX_DEPTH)}, made by aliases (*name).")
        lines.setdefault(key_path, line)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                walk(value, _key_path(key, key_path, lines, place), (*above, node))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*key_path, index), (*above, node))

    walk(root, (), ())
    return lines


def _key_path(key: yaml.Node, parent: KeyPath, lines: dict[KeyPath, int], place: Path | str) -> KeyPath:
    """Return the path of a key below `parent`, and add its line to `lines`.

    Raises ConfigError if the key is not a string, or if its block has the same key already.
    """
    line = key.start_mark.line + 1
    if not isinstance(key, yaml.ScalarNode) or key.tag.rpartition(":")[2] not in ("str", "merge"):
        name = f"{shortened(key.value)} " if isinstance(key, yaml.ScalarNode) else ""
        raise ConfigError(
            f"{place}:{line}: the key {name}is not a string. Correct or quote it: docs/run_file.md lists the keys."
        )
    path = (*parent, key.value)
    if path in lines:
        raise ConfigError(f"{place}:{line}: {dotted(path)} is given twice (first on line {lines[path]}). Remove one.")
    lines[path] = line
    return path


# ---- JSON and HJSON ----
COMMENT_KEY = re.compile(r"_|//|#|(comments?|\$schema)$")


class _Pairs(list[tuple[str, Any]]):
    """The (key, value) pairs of a JSON object, including duplicate keys."""


def parse_json(text: str, place: Path | str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse JSON, or HJSON (with comments and trailing commas) as DeepSpeed does.

    Returns the data and the line of every key path. At any depth, keys that serve as comments are left out: those that
    start with an underscore, // or #, and "comment", "comments" and "$schema". `place` is the file for messages. Raises
    ConfigError for invalid text, duplicate keys and anything beyond the limits.
    """
    if not text.strip():  # HJSON's empty object
        raise ConfigError(f"{place}:1: the file is empty. Write at least {{}}.")
    if (line := _too_deep(text)) is not None:
        raise ConfigError(f"{place}:{line}: brackets nest deeper than {MAX_DEPTH} levels.")
    try:
        raw = json.loads(text, object_pairs_hook=_Pairs, parse_int=_integer, parse_float=_float)
    except json.JSONDecodeError as error:
        raw = _parse_hjson(text, place, error)
    except OverflowError as error:
        raise ConfigError(f"{place}: {error}.") from None
    lines: dict[KeyPath, int] = {(): 1}
    return _plain(raw, (), lines, _KeysOfText(text), place), lines


def _parse_hjson(text: str, place: Path | str, json_error: json.JSONDecodeError) -> Any:
    """Parse text as HJSON, after the JSON parser has failed with `json_error`.

    If this fails too, raises a ConfigError that quotes both errors.
    """
    import hjson  # only here: most files are JSON

    try:
        return hjson.loads(text, object_pairs_hook=_Pairs, parse_int=_integer, parse_float=_float)
    except OverflowError as error:
        raise ConfigError(f"{place}: {error}.") from None
    except Exception as error:  # HjsonDecodeError, and IndexError at the end of some texts
        line = getattr(error, "lineno", text.count("\n") + 1)
        raise ConfigError(
            f"{place}:{json_error.lineno}: this is not valid JSON: {json_error.msg}. It is not valid HJSON (JSON with "
            f"comments) either: line {line}: {getattr(error, 'msg', error)}."
        ) from None


def _integer(digits: str) -> int:
    """Return the integer with these digits. Raises OverflowError if it does not fit into 64 bits."""
    if len(digits) > MAX_DIGITS or abs(int(digits)) >= 2**63:
        raise OverflowError(f"{shortened(digits)} is not a 64-bit integer")
    return int(digits)


def _float(digits: str) -> float:
    """Return the float with these digits. Raises OverflowError if there are more than MAX_DIGITS characters."""
    if len(digits) > MAX_DIGITS:
        raise OverflowError(f"{shortened(digits)} has more than {MAX_DIGITS} digits")
    return float(digits)


def _too_deep(text: str) -> int | None:
    """Return the number of the first line that nests brackets deeper than MAX_DEPTH in a JSON text, or None.

    Brackets in quotes do not count.
    """
    depth = 0
    for match in re.finditer(r'"(?:[^"\\\n]|\\.)*"?|[\[{}\]]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            return text.count("\n", 0, match.start()) + 1
    return None


class _KeysOfText:
    """Finds the line of each key of a JSON or HJSON text, because the parsers do not report lines.

    Call next_line for the keys in the order in which they are in the text.
    """

    TOKEN = re.compile(
        r"#[^\n]*|//[^\n]*|/\*.*?(?:\*/|\Z)"  # comments of HJSON
        r'|"(?P<quoted>(?:[^"\\\n]|\\.)*)"?(?P<colon>\s*:)?|(?P<bare>[^\s,:\[\]{}"]+)(?P<bare_colon>\s*:)?',
        re.DOTALL,
    )
    LOOKAHEAD = 50  # limits the search for a key that the pattern did not recognise, such as one with escapes

    def __init__(self, text: str) -> None:
        self.keys: list[tuple[str, int]] = []
        self.position = 0
        line, last = 1, 0
        for match in self.TOKEN.finditer(text):
            if match["colon"] or match["bare_colon"]:
                line, last = line + text.count("\n", last, match.start()), match.start()
                self.keys.append((match["quoted"] if match["colon"] else match["bare"].strip("'"), line))

    def next_line(self, key: str) -> int | None:
        """Return the line, from 1, of the next occurrence of `key` in the text.

        Returns None if `key` is not among the next 50 keys (LOOKAHEAD).
        """
        for position in range(self.position, min(self.position + self.LOOKAHEAD, len(self.keys))):
            name, line = self.keys[position]
            if name == key:
                self.position = position + 1
                return line
        return None


def _plain(raw: Any, path: KeyPath, lines: dict[KeyPath, int], keys: _KeysOfText, place: Path | str) -> Any:
    """Return parsed JSON with dicts instead of _Pairs and without comment keys. Adds the line of every key to `lines`.

    `path` is the key path of `raw`. Raises ConfigError for duplicate keys and unusable characters.
    """
    if isinstance(raw, list) and not isinstance(raw, _Pairs):
        return [_plain(item, (*path, index), lines, keys, place) for index, item in enumerate(raw)]
    if isinstance(raw, str) and (character := unusable_character(raw)):
        raise ConfigError(f"{place}: {dotted(path) or 'the file'} contains the character {character}. Remove it.")
    if not isinstance(raw, _Pairs):
        return raw
    block = {}
    for key, value in raw:
        child = (*path, key)
        line = keys.next_line(key) or lines.get(path, 1)
        if child in lines:
            raise ConfigError(
                f"{place}:{line}: {dotted(child)} is given twice (first on line {lines[child]}). Remove one."
            )
        lines[child] = line
        plain = _plain(value, child, lines, keys, place)
        if not COMMENT_KEY.match(key):
            block[key] = plain
    return block


def dotted(path: KeyPath) -> str:
    """Return a key path as users write it: "train.optimizer.lr"."""
    return printable(".".join(map(str, path)))


def printable(text: str) -> str:
    """Return the text on one line, with Python's escapes for characters that cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(value: object, limit: int = 40) -> str:
    """Return a value as Python code, cut to about `limit` characters for a message."""
    written = repr(value)
    return written if len(written) <= limit else f"{written[: limit - 10]}... ({len(written):,} characters)"
