"""`packspeed explain RUNFILE`: every effective setting of a run, who set it, and every finding.

    explanation = explain("launch/configs/quickstart.yaml", ["train.steps=10"], ranks=2)

lenient.py reads both files even if they contain errors, values.py lists the settings, and the rules (lint.py,
deepspeed_rules.py, run_rules.py) find problems. A finding of the kind "refused" is one that keeps training from
starting. Takes 0.3 s and imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packspeed.data.errors import DataError
from packspeed.data.remote import open_dataset
from packspeed.launch.cluster.local_launcher import default_ranks, local_accelerators
from packspeed.launch.config.batch import BatchPlan, solve_batch
from packspeed.launch.config.deepspeed_json import OWNED, resolve_ds_config
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.fp8 import engine_precision
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.layout import Layout, run_layout
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.explain import deepspeed_rules, run_rules  # noqa: F401  importing them fills RULES
from packspeed.launch.explain.lenient import read_deepspeed_json, read_written, validate_leniently
from packspeed.launch.explain.lint import KINDS, RULES, Case, Finding
from packspeed.launch.explain.values import Value, deepspeed_values, memory_values, run_file_values, solved_values
from packspeed.model.config import GPTConfig


@dataclasses.dataclass
class Explanation:
    """The settings of a run and what is wrong with them."""

    run_file: str
    values: list[Value]
    deepspeed: list[Value]
    findings: list[Finding]

    def as_dict(self) -> JsonObject:
        """Return the output of `packspeed explain --json`. There, the key of the findings is "problems"."""
        facts = dataclasses.asdict(self)
        facts["problems"] = facts.pop("findings")
        return facts


def explain(run_file: str | Path, overrides: Sequence[str] = (), ranks: int | None = None) -> Explanation:
    """List the settings of a run file and its DeepSpeed JSON, and everything that is wrong with them.

    `ranks` is the number of ranks; None means as many as `packspeed train` starts on this machine by default. Raises
    ConfigError only if the run file cannot be read as YAML or lacks a required section; other errors become findings.
    """
    written = read_written(Path(run_file), overrides)
    findings: list[Finding] = []
    run = validate_leniently(written, copy.deepcopy(written.data), findings)
    raw, ds_lines = read_deepspeed_json(run.deepspeed, findings)
    count = ranks if ranks is not None else default_ranks(run)
    plans = _plan_stages(run, count, findings)
    plan = plans[run.global_batch]
    precision, why = guess_precision(run.train.precision)
    tokens, vocab_size = _inspect_dataset(run, findings)
    model = _gpt_config(run, vocab_size, findings)
    of_engine = engine_precision(precision)
    final = _resolve_ds_config(run, raw, plan, of_engine, model, findings)
    case = Case(
        run, written.given, raw, of_engine, count, plan.accumulation, plan.micro_batch, local_accelerators() > 0, model,
        tokens.get("train"), tokens.get("val"),
    )  # fmt: skip
    findings += [Finding(r.name, r.kind, message, r.source) for r in RULES for message in r.check(case)]
    values = run_file_values(run, written, model, vocab_size is not None)
    values += solved_values(run, plans, precision, why, model)
    values += memory_values(case)
    return Explanation(str(run_file), values, deepspeed_values(run, raw, final, ds_lines), _worst_first(findings))


def _plan_stages(run: RunFile, ranks: int, findings: list[Finding]) -> dict[int, BatchPlan]:
    """Return {samples of a step: how the ranks divide them} for each batch size of the run.

    Unlike plan_stages, it adds a finding for an error and returns an approximation: data parallelism only, if the ranks
    cannot be divided as the section `parallel` says; micro batches of one sample, if the ranks cannot divide a batch.
    """
    layout = Layout(ranks)
    try:
        layout = run_layout(run, ranks)
    except ConfigError as error:
        findings.append(Finding("layout-does-not-fit", "refused", str(error), "arXiv:2309.14509"))
    plans: dict[int, BatchPlan] = {}
    for samples in run.batches.sizes:
        key = run.train.key_of_batch(samples * run.data.seq_len)
        try:
            plans[samples] = solve_batch(samples, run.data.seq_len, layout, run.train.micro_batch, key=key)
        except ConfigError as error:
            findings.append(Finding("batch-does-not-divide", "refused", str(error), "DeepSpeed#17, #3228, #3982"))
            plans[samples] = BatchPlan(1, max(1, samples // layout.rows), layout)
    return plans


def guess_precision(wanted: str) -> tuple[str, str]:
    """Return (the precision that `wanted`, train.precision, means on this machine, the reason).

    torch is not imported, so for "auto" it is assumed that every GPU supports bf16.
    """
    if wanted != "auto":
        return wanted, "given"
    if local_accelerators():
        return "bf16", "solved: this machine has a GPU"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    native = bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags))  # the last is Arm's
    return ("bf16", "solved: this CPU has bf16") if native else ("fp32", "solved: no GPU, and this CPU has no bf16")


def _inspect_dataset(run: RunFile, findings: list[Finding]) -> tuple[dict[str, int], int | None]:
    """Return ({split: number of tokens}, vocabulary size) of the run's dataset if it is on this machine.

    Returns ({}, None) for mixtures and URLs, and if the dataset cannot be opened, which also adds a finding.
    """
    if run.data.path is None or "://" in run.data.path:
        return {}, None
    try:
        dataset = open_dataset(run.data.path)
        return {split: dataset.tokens(split) for split in ("train", "val")}, dataset.vocab_size
    except (DataError, OSError) as error:
        findings.append(Finding("no-dataset", "refused", f"data.path: {error}"))
        return {}, None


def _gpt_config(run: RunFile, vocab_size: int | None, findings: list[Finding]) -> GPTConfig | None:
    """Return the configuration of the model. If it is invalid, add a finding and return None."""
    try:
        return run.gpt_config(vocab_size or run.model.vocab_size or 1)  # type: ignore[attr-defined]
    except ConfigError as error:
        findings.append(Finding("model-does-not-fit", "refused", str(error)))
        return None


def _resolve_ds_config(
    run: RunFile, raw: JsonObject, plan: BatchPlan, precision: str, model: GPTConfig | None, findings: list[Finding]
) -> JsonObject:
    """Return the DeepSpeed configuration that training would pass to the engine; `raw` is the JSON.

    If the JSON contradicts the run file, add findings and use the run file's values.
    """
    for _ in range(2):
        try:
            return resolve_ds_config(run, raw, plan, precision, model)
        except ConfigError as error:
            name = "fp16-stage0" if "fp16 with ZeRO-0" in str(error) else "contradiction"
            findings += [Finding(name, "refused", line, "DeepSpeed#17, #7303") for line in str(error).split("\n")]
            if name == "fp16-stage0":
                return dict(raw)
            raw = {key: value for key, value in raw.items() if key not in OWNED}
    return dict(raw)


def _worst_first(findings: list[Finding]) -> list[Finding]:
    """Return the findings without duplicates, in the order of KINDS, which begins with errors that prevent a start."""
    unique = {(finding.rule, finding.message): finding for finding in findings}
    return sorted(unique.values(), key=lambda finding: list(KINDS).index(finding.kind))


def text(explanation: Explanation) -> str:
    """Return the explanation for a terminal: findings, then settings.

    A star marks settings that differ from their default.
    """
    lines = [f"{len(explanation.findings)} finding(s) in {explanation.run_file}"]
    for finding in explanation.findings:
        source = f" ({finding.source})" if finding.source else ""
        lines.append(f"  [{finding.kind}] {finding.rule}: {finding.message}{source}")
    for title, values in (
        ("run file", explanation.values),
        ("DeepSpeed configuration, as passed to the engine", explanation.deepspeed),
    ):
        width = max((len(value.key) for value in values), default=0)
        lines += ["", title]
        for v in values:
            star, default = (" ", "") if v.value == v.default else ("*", f"   default {_short(v.default)}")
            lines.append(f" {star} {v.key:<{width}}  {_short(v.value):<24} {v.set_by}{default}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    """Return a value as text of at most 60 characters; "-" for None."""
    written = "-" if value is None else json.dumps(value) if isinstance(value, (list, dict, bool)) else str(value)
    return written if len(written) < 60 else written[:57] + "..."
