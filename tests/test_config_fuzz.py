"""Run files and DeepSpeed JSONs with a few random mistakes: always an answer, never a traceback.

A larger run by hand: FUZZ_INPUTS=10000 FUZZ_SEED=7 python -m pytest tests/test_config_fuzz.py --timeout 0
"""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from packspeed.launch.config.batch import plan_batch
from packspeed.launch.config.deepspeed_json import DS_CONFIGS, load_ds_config, resolve_ds_config
from packspeed.launch.config.deepspeed_keys import KEYS
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.explain.explain import explain, text
from packspeed.launch.explain.reference import keys_of, sections
from support import ROOT

INPUTS, SEED = int(os.environ.get("FUZZ_INPUTS", "100")), int(os.environ.get("FUZZ_SEED", "1"))
SLOW_S = 5.0  # on a busy machine; an input takes 8 ms

RUN_FILES = [path.read_text() for path in sorted((ROOT / "launch" / "configs").glob("*.yaml"))]
DS_FILES = [path.read_text() for path in sorted(DS_CONFIGS.glob("*.json"))]
RUN_KEYS = [key.name.replace("[]", "") for _, section, prefix in sections() for key in keys_of(section, prefix)]

VALUES: list[Any] = [
    "auto", None, True, False, 0, 1, -1, 2, "2", 2.0, 7, 0.5, 1e308, 1e-320, float("inf"), float("nan"), 10**25, 2**63,
    -(2**63) - 1, "", "x", "3e-4", "1e999", "none", "cpu", "nvme", "sum", "bf16", "é", "a" * 300, "\0", "two\nlines",
    [], {}, [[]], [1, 2], {"a": 1}, {"enabled": True}, {"enabled": "auto"}, {"stage": "2"}, {"params": [1]},
    {"type": "Adam", "params": {"lr": "auto"}}, {"device": "cpu"}, {"device": 5}, {"device": []},
]  # fmt: skip
TOKENS = [
    *"[]{}:,-?!&*#|>'\"%@`\\\n\t \r\0é", "&a ", "*a ", "<<: *a", "!!int ", "!!float x", "!!timestamp x", "!!binary ",
    "!!set ", "0x_", "0b_", "0o7", "010", "1:30:99", "2024-13-45", "2024-01-01", ".inf", "-.inf", ".nan", "~", "null",
    "yes", "on", "1e400", "9" * 50, "0x" + "f" * 50, "- " * 9, "[" * 9, "{" * 9, "---\n", "...\n", "%YAML 1.1\n", "3e",
    "=", "<<", "auto", "-1", "0", "1e18", "1e308", "// x\n", "/* ", "'''",
]  # fmt: skip


def ds_keys(tree: dict[str, Any], parent: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, entry in tree.items():
        yield (*parent, key)
        if isinstance(entry, dict) and "*" not in entry:
            yield from ds_keys(entry, (*parent, key))


DS_KEYS = list(ds_keys(KEYS))


def with_mistakes(content: str, rng: random.Random) -> str:
    """Insert, delete, repeat or replace a few characters, or give a key another value."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.randrange(1, 30))
        action = rng.choice(["insert", "delete", "repeat", "value"])
        if action == "insert":
            content = content[:start] + rng.choice(TOKENS) + content[start:]
        elif action == "delete":
            content = content[:start] + content[end:]
        elif action == "repeat":
            content = content[:end] + content[start:end] + content[end:]
        else:
            lines = content.split("\n")
            number = rng.randrange(len(lines))
            lines[number] = lines[number].split(":")[0] + ": " + rng.choice(TOKENS)
            content = "\n".join(lines)
    return content


def with_values(data: Any, keys: list[tuple[str, ...]], rng: random.Random) -> Any:
    """Give a few valid keys odd values."""
    for _ in range(rng.randrange(1, 4)):
        *parents, last = rng.choice(keys)
        node = data
        for key in parents:
            node = node[key] if isinstance(node.get(key), dict) else node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        else:
            node[last] = copy.deepcopy(rng.choice(VALUES))
    return data


def random_files(rng: random.Random) -> tuple[str, str]:
    """A run file and a DeepSpeed JSON, one or both with mistakes."""
    run, ds = rng.choice(RUN_FILES), rng.choice(DS_FILES)
    if rng.random() < 0.6:
        keys = [tuple(key.split(".")) for key in RUN_KEYS]
        odd_values = yaml.safe_dump(with_values(yaml.safe_load(run), keys, rng), allow_unicode=True)
        run = with_mistakes(run, rng) if rng.random() < 0.5 else odd_values
    odd_values = json.dumps(with_values(json.loads(ds), DS_KEYS, rng), ensure_ascii=rng.random() < 0.5)
    return run, with_mistakes(ds, rng) if rng.random() < 0.5 else odd_values


NO_REFUSAL = "none"


def check_and_resolve(run_file: Path, overrides: list[str], ranks: int) -> None:
    """What training does with both files before it imports torch."""
    run = load_run_file(run_file, overrides)
    raw = load_ds_config(run.deepspeed)
    plan = plan_batch(run, ranks)
    run.gpt_config(50257)
    assert '"auto"' not in json.dumps(resolve_ds_config(run, raw, plan, "bf16"))


def explain_in_both_forms(run_file: Path, overrides: list[str], ranks: int) -> None:
    explanation = explain(run_file, overrides, ranks)
    assert text(explanation).encode()
    assert json.dumps(explanation.as_dict())


def refusal_of(action: Callable[[Path, list[str], int], None], run_file: Path, overrides: list[str], ranks: int) -> str:
    """The message of the action's ConfigError, which the command line prints before it exits with 2."""
    try:
        action(run_file, overrides, ranks)
    except ConfigError as error:
        return str(error)
    return NO_REFUSAL


@pytest.mark.timeout(0 if INPUTS > 1000 else 120)
def test_files_with_mistakes_are_answered(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    run_file, ds_file = tmp_path / "run.yaml", tmp_path / "ds.json"
    answered = 0
    for _ in range(INPUTS):
        run, ds = random_files(rng)
        run_file.write_bytes(run.encode(rng.choice(["utf-8"] * 8 + ["utf-8-sig", "latin-1", "utf-16"]), "replace"))
        ds_file.write_bytes(ds.encode(rng.choice(["utf-8"] * 8 + ["utf-8-sig", "latin-1", "utf-16"]), "replace"))
        overrides, ranks = [f"deepspeed={ds_file}"], rng.choice([1, 2, 8])
        if rng.random() < 0.2:
            overrides.append(f"{rng.choice(RUN_KEYS)}={rng.choice(TOKENS)}")
        start = time.monotonic()
        refusal = refusal_of(check_and_resolve, run_file, overrides, ranks)
        assert all(line.strip() for line in refusal.split("\n")), "paragraphs, one for each problem"
        explained = refusal_of(explain_in_both_forms, run_file, overrides, ranks) == NO_REFUSAL
        answered += explained
        assert time.monotonic() - start < SLOW_S, (run, ds, overrides)
    assert answered > INPUTS / 5, "most mistakes must not stop explain, or this test would show little"
