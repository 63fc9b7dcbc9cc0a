"""docs/metrics.md lists every key of the files in a run folder and every TensorBoard tag, as the code has them."""

from __future__ import annotations

import types
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from packspeed.launch.observe.goodput import BUCKETS
from packspeed.launch.run_folder.formats import (
    AnomalyLine,
    EvaluationLine,
    Life,
    PlanResult,
    Sample,
    SamplesLine,
    SettingChange,
    Status,
    StepLine,
)
from packspeed.launch.training.tensorboard_board import LAYOUT, TAGS
from support import ROOT

PAGE = (ROOT / "docs" / "metrics.md").read_text()
JSON_NAMES = {
    int: "integer",
    float: "number",
    str: "string",
    types.NoneType: "null",
    dict: "object",
    list: "array",
    object: "any",
}


def json_type(annotation: Any) -> str:
    """`float | None` is "number or null"."""
    if isinstance(annotation, types.UnionType):
        return " or ".join(json_type(member) for member in get_args(annotation))
    return JSON_NAMES[get_origin(annotation) or annotation]


def table(line_type: Any) -> str:
    """The Markdown table of a TypedDict of formats.py."""
    rows = ["| key | type | unit | meaning |", "|---|---|---|---|"]
    for key, annotation in get_type_hints(line_type, include_extras=True).items():
        value, unit, meaning = get_args(annotation)
        rows.append(f"| `{key}` | {json_type(value)} | {unit} | {meaning} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize(
    "line_type", [StepLine, EvaluationLine, Life, SamplesLine, Sample, AnomalyLine, SettingChange, Status, PlanResult]
)
def test_the_page_has_the_table_of_every_format(line_type: Any) -> None:
    assert table(line_type) in PAGE


def test_the_page_has_every_tag_with_its_key() -> None:
    for key, tag in TAGS.items():
        assert f"| `{tag}` | `{key}` |" in PAGE


def test_the_page_has_every_chart_of_tensorboards_custom_scalars() -> None:
    for group, charts in LAYOUT.items():
        for title, (_, tags) in charts.items():
            assert f"| {group} | {title} | {', '.join(f'`{tag}`' for tag in tags)} |" in PAGE


def test_the_page_has_every_bucket_of_goodput() -> None:
    for bucket in BUCKETS:
        assert f"| `{bucket}` |" in PAGE
