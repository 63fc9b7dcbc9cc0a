"""The data commands as a user runs them: output, exit codes, one JSON object, no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from packspeed.data.errors import DataError, UsageError
from packspeed.data.text.tokenizer import load_from_dataset
from packspeed.launch.cli import app


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": f"Document {i}. " * 5}) + "\n" for i in range(200)))
    return path


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    assert run("prepare", source, "--out", out, "--text-key", "body", "--val-fraction", "0.1").exit_code == 0
    return out


def test_prepare_says_what_it_made(source: Path, tmp_path: Path) -> None:
    facts = run_json("prepare", source, "--out", tmp_path / "out", "--text-key", "body", "--tokenizer", "bytes")
    assert facts["source"]["documents"] == 200
    assert facts["tokenizer"]["vocab_size"] == 257
    assert facts == run_json("inspect", tmp_path / "out")
    (tmp_path / "one.txt").write_text("some text " * 100)
    text = run("prepare", tmp_path / "one.txt", "--out", tmp_path / "two", "--val-fraction", "0.2").stdout
    assert "validation the last 20% of the tokens (fewer than 100 documents)" in text
    text = run("prepare", source, "--out", tmp_path / "three", "--text-key", "body", "--val-fraction", "1e-9").stdout
    assert "validation EMPTY" in text
    text = run("prepare", source, "--out", tmp_path / "four", "--text-key", "body", "--val-fraction", "0").stdout
    assert "validation none" in text


def test_prepare_lists_what_it_passed_over(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for name in ("a.jsonl", "val.jsonl"):
        (tmp_path / "c" / name).write_text('{"a": "x", "b": {"c": "y"}}\n{"a": null, "b": null}\n')
    for i in range(25):
        (tmp_path / f"c/{i}.bin").write_bytes(b"")
    choice = ["--text-key", "a", "--text-key", "b.c", "--val", tmp_path / "c/val.jsonl", "--tokenizer", "bytes"]
    text = run("prepare", tmp_path / "c", *choice, "--out", tmp_path / "one").stdout
    assert f"passed over {tmp_path}/c/0.bin: its name reveals no known format" in text
    assert "passed over 5 more files" in text
    assert "2 null documents skipped" in text
    assert "validation from separate sources" in text
    facts = run_json("prepare", tmp_path / "c", *choice, "--out", tmp_path / "two")
    assert len(facts["source"]["passed_over"]) == 25
    assert facts["splits"]["val"]["tokens"] == facts["splits"]["train"]["tokens"] == 5
    done = run_json(
        "tokenizer", "train", tmp_path / "c", *choice[:4], "--vocab-size", "257", "--out", tmp_path / "t.json"
    )
    assert len(done["passed_over"]) == 25


def test_inspect_speaks_to_people_too(folder: Path) -> None:
    text = run("inspect", folder).stdout
    assert "gpt2, 50,257 tokens, EOT 50256" in text
    assert "10% of the documents, selected by hash" in text


def test_verify_fails_with_one(folder: Path) -> None:
    assert run("verify", folder).exit_code == 0
    assert run_json("verify", folder)["ok"] is True
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[::-1])
    result = run("verify", folder)
    assert result.exit_code == 1
    assert "train-00000.bin has changed" in result.stdout
    found = run_json("verify", folder)
    assert found["ok"] is False
    assert f"problem: {found['problems'][0]}" in result.stdout


@pytest.mark.slow
def test_a_trained_tokenizer_prepares(tmp_path: Path) -> None:
    library = Path(os.__file__).parent
    choice = [library, "--include", "a*.py", "--exclude", "*test*"]
    facts = run_json("tokenizer", "train", *choice, "--vocab-size", "600", "--out", tmp_path / "t.json")
    assert (facts["vocab_size"], facts["eot_id"]) == (600, 599)
    assert facts["documents"] > 5
    assert run("prepare", *choice, "--tokenizer", tmp_path / "t.json", "--out", tmp_path / "out").exit_code == 0
    assert load_from_dataset(tmp_path / "out").sha256 == facts["sha256"]
    assert run("prepare", *choice, "--tokenizer", tmp_path / "t.tiktoken", "--out", tmp_path / "out2").exit_code == 0
    shards = [(tmp_path / name / "train-00000.bin").read_bytes() for name in ("out", "out2")]
    assert shards[0] == shards[1]


def test_errors_carry_their_exit_codes(source: Path, folder: Path, tmp_path: Path) -> None:
    wrong = [("prepare", "none.txt", "--out", tmp_path / "x"), ("prepare", source, "--out", folder)]
    wrong += [("inspect", tmp_path), ("prepare", source, "--out", tmp_path / "x", "--tokenizer", "gpt-2")]
    for arguments in wrong:
        error = run(*arguments).exception
        assert isinstance(error, UsageError)
        assert error.exit_code == 2
    assert run("prepare", source).exit_code == 2  # no --out
    error = run("prepare", source, "--out", tmp_path / "x").exception  # no key "text"
    assert isinstance(error, DataError)
    assert error.exit_code == 1
    assert "\n" not in str(error)


@pytest.mark.launch
def test_inspect_loads_no_heavy_library(folder: Path) -> None:
    code = (
        "import sys\nfrom packspeed.launch.cli import main\n"
        f"sys.argv = ['packspeed', 'inspect', {str(folder)!r}, '--json']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'deepspeed', 'tiktoken', 'tokenizers', 'datasets', 'pyarrow', 'transformers'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["path"] == str(folder)
