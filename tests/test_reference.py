"""The generated pages of docs/ are those that the code makes, and describe everything."""

from __future__ import annotations

import dataclasses

import pytest
from typer.testing import CliRunner

from packspeed.launch.cli import app
from packspeed.launch.config.run_file import MODEL_KEYS, RunFile
from packspeed.launch.explain.reference import MODEL_LIMITS, PAGES, keys_of, sections
from packspeed.model.config import GPTConfig
from support import ROOT


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_up_to_date(name: str) -> None:
    """If not: python -m packspeed.launch.explain.reference docs."""
    assert (ROOT / "docs" / name).read_text() == PAGES[name]() + "\n"


def test_the_command_prints_the_reference() -> None:
    assert CliRunner().invoke(app, ["schema", "--markdown"]).stdout == (ROOT / "docs" / "run_file.md").read_text()


def test_every_key_of_the_schema_has_a_description() -> None:
    schema = RunFile.model_json_schema()
    for block in (schema, *schema["$defs"].values()):
        for name, entry in block["properties"].items():
            assert entry.get("description"), f"{block['title']}.{name}"
    assert set(MODEL_KEYS) == {field.name for field in dataclasses.fields(GPTConfig)}


def test_the_reference_has_every_key_once() -> None:
    names = [key.name for _, section, prefix in sections() for key in keys_of(section, prefix)]
    assert len(names) == len(set(names)) > 60
    assert all(key.description for _, section, prefix in sections() for key in keys_of(section, prefix))


@pytest.mark.parametrize(("name", "limit"), MODEL_LIMITS.items())
def test_the_models_limits_are_those_it_checks(name: str, limit: str) -> None:
    valid = {"n_layer": 2, "n_head": 2, "d_model": 32, "vocab_size": 100, "max_seq_len": 16}
    outside = 0 if limit.startswith((">= 1", ">= 2", "> 0", "none")) else -0.1
    with pytest.raises(ValueError, match=name):
        GPTConfig(**{**valid, name: outside})  # type: ignore[arg-type]
