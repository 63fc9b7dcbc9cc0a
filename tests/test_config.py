"""The run file: what it refuses, and with which words."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from packspeed.launch.config import parsing
from packspeed.launch.config.batch import divisors_of, plan_batch, solve_batch
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.layout import Layout
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.config.schedule import learning_rate

CONFIGS = Path(__file__).resolve().parents[1] / "launch" / "configs"

MINIMAL = """\
name: t
model: {n_layer: 2, n_head: 2, d_model: 32}
data: {path: tokens/x, seq_len: 16}
train:
  steps: 10
  global_batch_tokens: 64
  optimizer: {lr: 1e-3}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_run_files_load_and_their_batch_divides(path: Path) -> None:
    run = load_run_file(path)
    assert run.global_batch * run.data.seq_len == run.train.global_batch_tokens
    for rows in (1, 2, 4)[: run.global_batch]:
        assert plan_batch(run, rows * run.parallel.sequence).layout.rows == rows
    assert run.gpt_config(257).padded_vocab_size % 128 == 0


@pytest.mark.parametrize(
    ("line", "key", "suggestion"),
    [
        ("nmae: u", "nmae", "name"),
        ("deepsped: zero1", "deepsped", "deepspeed"),
        ("eval: {every_step: 5}", "eval.every_step", "every_steps"),
        ("checkpoint: {evry_steps: 5}", "checkpoint.evry_steps", "every_steps"),
        ("monitor: {log_every_step: 5}", "monitor.log_every_step", "log_every_steps"),
    ],
)
def test_unknown_keys_are_named_with_line_and_nearest(tmp_path: Path, line: str, key: str, suggestion: str) -> None:
    path = write(tmp_path, MINIMAL + line + "\n")
    with pytest.raises(ConfigError, match=f"run.yaml:8: unknown key '{key}'; did you mean '{suggestion}'"):
        load_run_file(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_layer: 2", "n_layers: 2", r"run.yaml:2: unknown key 'model.n_layers'; did you mean 'n_layer'"),
        ("seq_len: 16", "seqlen: 16", r"run.yaml:3: unknown key 'data.seqlen'; did you mean 'seq_len'"),
        ("lr: 1e-3", "lr: 1e-3, wieght_decay: 0", r"run.yaml:7: unknown key 'train.optimizer.wieght_decay'; did you m"),
        ("lr: 1e-3", "lr: fast", r"run.yaml:7: train.optimizer.lr: .*number.*'fast'"),
        ("steps: 10", "steps: 10\n  tokens: 5", r"exactly one of train.steps and train.tokens"),
        ("steps: 10\n", "\n", r"exactly one of train.steps and train.tokens"),
        (
            "global_batch_tokens: 64",
            "global_batch_tokens: 70",
            r"70 is not a multiple of data.seq_len = 16; .* 64 and 80",
        ),
        ("steps: 10", "steps: 10\n  steps: 11", r"run.yaml:6: train.steps is given twice \(first on line 5\)"),
        ("name: t", "name: ../t", r"run.yaml:1: name: .*pattern"),
        ("name: t", "name: [", r"not valid YAML"),
        ("steps: 10", "steps: 10\n  micro_batch: many", r"run.yaml:6: train.micro_batch: .*'many'"),
        ("steps: 10", "steps: 10\n  schedule: {warmup_steps: 10}", r"warmup_steps = 10 leaves no step"),
    ],
)
def test_bad_values_are_refused_where_they_stand(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_file(write(tmp_path, MINIMAL.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 10", "steps: 2024-13-45", r"run.yaml:5: .*'2024-13-45' is not a valid date"),
        ("steps: 10", "steps: 0x_", r"run.yaml:5: .*'0x_' is not a valid 64-bit integer"),
        ("steps: 10", "steps: " + "9" * 5000, r"run.yaml:5: .*\(5,002 characters\) is not a valid 64-bit integer"),
        ("steps: 10", "steps: 9223372036854775808", r"run.yaml:5: .* is not a valid 64-bit integer"),
        ("steps: 10", "steps: 1." + "0" * 5000, r"run.yaml:5: .* is not a valid number"),
        ("steps: 10", "steps: !!bool x", r"run.yaml:5: .*'x' is not a valid bool"),
        ("steps: 10", "steps: !!timestamp x", r"run.yaml:5: .*'x' is not a valid date"),
        ("steps: 10", "steps: !!python/name:os.system x", r"run.yaml:5: .*could not determine a constructor"),
        ("steps: 10", "steps: 2024-01-01", r"run.yaml:5: train.steps: .*valid integer"),
        ("name: t", "name: &a [*a]", r"run.yaml:1: name.0 contains itself by an alias"),
        ("name: t", "name: &a {b: *a}", r"run.yaml:1: name.b contains itself by an alias"),
        ("name: t", "name: {b: [c, {d: [[[[[[1]]]]]]}]}", r"run.yaml:1: .*nest deeper than 8 levels"),
        ("name: t", "name: " + "- " * 9 + "1", r"run.yaml:1: .*"),
        ("name: t", "name: t\nx:\n" + "- " * 9 + "1", r"run.yaml:3: .*nest deeper than 8 levels"),
        ("name: t", f"name: [{'1,' * 70}]", r"run.yaml:1: .*more than 60 values"),
        (
            "name: t",
            "a: &a [1, 1, 1]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: [*c, *c, *c]\nname: t",
            r"run.yaml:2: more than 60 values, .*by aliases",
        ),
        ("name: t", "name: t\na: &a {x: 1}\nb: {<<: *a, y: 2}", r"unknown key 'a'.*\n.*unknown key 'b'"),
        ("name: t", "1: t", r"run.yaml:1: the key '1' is not a string"),
        ("name: t", "on: t", r"run.yaml:1: the key 'on' is not a string"),
        ("name: t", "? [a, b]\n: t", r"run.yaml:1: the key is not a string"),
        ("name: t", 'name: "a\\0b"', r"run.yaml:1: .* is not a valid text"),
        ("name: t", 'name: "\\ud800"', r"run.yaml:1: .* is not a valid text"),
        ("name: t", "name: \x07", r"run.yaml:1: character U\+0007 is not valid YAML"),
        ("name: t", f"name: {'x' * 500}!", r"run.yaml:1: name: .*pattern.*\.\.\. \(503 characters\)"),
    ],
)
def test_odd_yaml_gets_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    """With low limits, so that none of these is large."""
    monkeypatch.setattr(parsing, "MAX_DEPTH", 8)
    monkeypatch.setattr(parsing, "MAX_VALUES", 60)
    with pytest.raises(ConfigError, match=message):
        load_run_file(write(tmp_path, MINIMAL.replace(old, new)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MINIMAL.encode("utf-16"), r"its encoding is UTF-16. Save it as UTF-8"),
        (b"name: t\nruns_dir: \xe9\n", r"run.yaml:2: byte 18 \(0xe9\) is not UTF-8"),
        (b"#" * 2000, r"larger than 1 KiB"),
        (b"", r"run.yaml:1: the top level of a run file must be a mapping"),
        (b"- 1", r"run.yaml:1: the top level of a run file must be a mapping"),
        (b"--- 1\n--- 2", r"run.yaml:2: this is not valid YAML: but found another document"),
    ],
)
def test_odd_files_get_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr(parsing, "MAX_BYTES", 1024)
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_run_file(tmp_path / "run.yaml")
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_aliases_are_fine(tmp_path: Path) -> None:
    text = MINIMAL.replace("{n_layer: 2, n_head: 2,", "{n_layer: &two 2, n_head: *two,")
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_run_file(tmp_path / "run.yaml").gpt_config(257).n_head == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=[", r"--set train.steps=\[:1: this is not valid YAML"),
        ("train.steps=0x_", r"'0x_' is not a valid 64-bit integer"),
        ("name=&a [*a]", r"contains itself"),
        ("data.sources.0.path=x", r"--set data.sources.0.path=x: data: .*valid list"),
        ("name.x=1", r"--set name.x=1: name is a value, not a section"),
        ("name=\udcff", r"--set name=\\udcff:1: character U\+DCFF is not valid YAML"),
    ],
)
def test_odd_overrides_get_one_paragraph(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_file(write(tmp_path, MINIMAL), [override])


def test_huge_batches_are_solved_or_refused_without_delay(tmp_path: Path) -> None:
    assert solve_batch(2**36, 16, Layout(8), "auto").micro_batch == 1024
    with pytest.raises(ConfigError, match=r"train.global_batch_tokens: .*less than"):
        load_run_file(write(tmp_path, MINIMAL), [f"train.global_batch_tokens={2**62}"])
    for number in (1, 2, 36, 97, 1024):
        assert divisors_of(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_set_overrides_the_file_and_names_itself_in_errors(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    run = load_run_file(path, ["train.optimizer.lr=3e-4", "train.tokens=1e3", "name=other"])
    assert (run.train.optimizer.lr, run.train.total_steps, run.name) == (3e-4, 16, "other")
    with pytest.raises(ConfigError, match=r"--set train.optimizr.lr=1: unknown key 'train.optimizr'.*'optimizer'"):
        load_run_file(path, ["train.optimizr.lr=1"])
    with pytest.raises(ConfigError, match=r"write it as --set key.path=value"):
        load_run_file(path, ["train.steps"])


def test_missing_file_and_missing_sections(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope.yaml: No such file"):
        load_run_file(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match=r"run.yaml:1: .*required"):
        load_run_file(write(tmp_path, "name: t\n"))


def test_run_file_is_frozen(tmp_path: Path) -> None:
    run = load_run_file(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        run.name = "u"  # type: ignore[misc]


def test_model_section_presets_and_mistakes(tmp_path: Path) -> None:
    model = "{n_layer: 2, n_head: 2, d_model: 32}"
    run = load_run_file(write(tmp_path, MINIMAL.replace(model, "{preset: gpt2-124m, n_layer: 3}")))
    config = run.gpt_config(50257)
    assert (config.n_layer, config.d_model, config.vocab_size) == (3, 768, 50257)
    run = load_run_file(write(tmp_path, MINIMAL.replace(model, "{preset: gpt2-124}")))
    with pytest.raises(ConfigError, match="did you mean 'gpt2-124m'"):
        run.gpt_config(50257)
    run = load_run_file(write(tmp_path, MINIMAL.replace(model, "{n_layer: 2}")))
    with pytest.raises(ConfigError, match="missing keys: n_head, d_model"):
        run.gpt_config(257)
    run = load_run_file(write(tmp_path, MINIMAL.replace(model, "{preset: gpt2-124m, vocab_size: 300}")))
    with pytest.raises(ConfigError, match=r"model.vocab_size = 300 is smaller than the dataset's vocabulary of 50257"):
        run.gpt_config(50257)


def test_fp8_names_the_sizes_that_do_not_fit(tmp_path: Path) -> None:
    def config(*overrides: str) -> None:
        load_run_file(write(tmp_path, MINIMAL), ["train.precision=fp8", "model.n_layer=3", *overrides]).gpt_config(257)

    config()
    config("model.n_layer=1", "train.fp8_skip_blocks=0")
    for overrides, message in (
        (["model.n_layer=2"], r"all 2 blocks stay in bf16 with train\.fp8_skip_blocks = 1 .* at most 0"),
        (["train.fp8_skip_blocks=2"], r"all 3 blocks stay in bf16 .* at most 1"),
        (["model.d_model=40"], r"model\.d_model = 40, .*query heads \(n_head x head_dim\) = 40, .* = 120\."),
        (["model.d_ff=100"], r"all sizes are multiples of 16, but the MLP's width \(model\.d_ff\) = 100\. Change"),
        (["model.max_seq_len=64", "data.seq_len=4"], r"but data\.seq_len = 4\."),
    ):
        with pytest.raises(ConfigError, match=message):
            config(*overrides)


def test_batch_solving_lists_the_nearest_choices() -> None:
    plan = solve_batch(480, 1024, Layout(8), "auto", max_micro_tokens=16384)
    assert (plan.micro_batch, plan.accumulation) == (15, 4)
    assert solve_batch(480, 1024, Layout(8), 12).accumulation == 5
    with pytest.raises(
        ConfigError, match=r"micro_batch = 7 does not divide the 60 samples .*nearest that do: 4, 5, 6, 10;"
    ):
        solve_batch(480, 1024, Layout(8), 7)
    with pytest.raises(
        ConfigError,
        match=r"7 data-parallel ranks cannot share equally. Possible numbers of ranks: 4, 5, 6, 8; or with 7 ranks",
    ):
        solve_batch(480, 1024, Layout(7), "auto")


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_schedules_warm_up_peak_and_end(tmp_path: Path, name: str) -> None:
    text = MINIMAL.replace("steps: 10", f"steps: 100\n  schedule: {{name: {name}, warmup_steps: 10, min_lr: 1e-4}}")
    train = load_run_file(write(tmp_path, text)).train
    rates = [learning_rate(step, train) for step in range(101)]
    assert rates[0] == pytest.approx(1e-3 / 11)
    assert rates[10] == pytest.approx(1e-3)
    assert rates[100] == pytest.approx(1e-3 if name == "constant" else 1e-4)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    if name == "wsd":
        assert rates[79] == pytest.approx(1e-3)
        assert rates[81] < 1e-3


def test_wsd_decays_linearly_or_by_the_root(tmp_path: Path) -> None:
    for shape, at_a_quarter in (("linear", 0.75), ("sqrt", 0.5)):
        schedule = f"{{name: wsd, decay_steps: 40, decay: {shape}}}"
        train = load_run_file(
            write(tmp_path, MINIMAL.replace("steps: 10", f"steps: 100\n  schedule: {schedule}"))
        ).train
        rates = [learning_rate(step, train) for step in (0, 60, 70, 100)]
        assert rates == pytest.approx([1e-3, 1e-3, at_a_quarter * 1e-3, 0.0])


def test_schedule_equals_nanogpts_formula(tmp_path: Path) -> None:
    import math

    text = MINIMAL.replace("steps: 10", "steps: 2000\n  schedule: {warmup_steps: 100, min_lr: 1e-4}")
    train = load_run_file(write(tmp_path, text)).train
    for step in (0, 50, 99, 100, 1000, 1999):
        warm = 1e-3 * (step + 1) / 101
        ratio = (step - 100) / 1900
        expected = warm if step < 100 else 1e-4 + 0.5 * (1 + math.cos(math.pi * ratio)) * 9e-4
        assert learning_rate(step, train) == pytest.approx(expected, rel=1e-12)


def test_schema_is_a_json_schema_that_forbids_unknown_keys() -> None:
    schema = RunFile.model_json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert "n_layer" in schema["$defs"]["ModelSection"]["properties"]


@pytest.mark.launch
def test_checking_a_run_file_loads_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys, packspeed.launch.config.deepspeed_json; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
