"""What TensorBoard gets: read back through its own API, and its server looked at with a browser; the report."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor
from rich.console import Console

from packspeed.launch.config.ports import free_port
from packspeed.launch.observe.charts import COLORS, Chart, Series, lay_out, smoothed
from packspeed.launch.observe.console import panel
from packspeed.launch.observe.png import draw_png
from packspeed.launch.observe.watch import Follower
from support.browser import browse
from support.ranks import run_many
from support.workspace import Workspace

pytestmark = pytest.mark.timeout(900)
STAGES = ("zero0", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def watched(workspace: Workspace) -> Workspace:
    """Four runs of 4 steps, one for each ZeRO stage, with everything that can be watched; csv at stage 1."""
    folder = workspace.folder
    (folder / "csv.json").write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": 1},
                "csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": "x"},
            }
        )
    )
    runs = []
    for stage in STAGES:
        ds = f"{folder}/csv.json" if stage == "zero1" else stage
        runs.append(
            workspace.arguments(
                f"tb-{stage}", "train.steps=4", "eval.every_steps=2", "checkpoint.every_steps=0", f"deepspeed={ds}",
                "monitor.log_every_steps=1", "monitor.histograms_every_steps=2", 'monitor.sample_prompts=["def "]',
                "monitor.sample_tokens=8",
            )
        )  # fmt: skip
    codes, output = run_many(folder / "tb", runs)
    assert codes == [0, 0, 0, 0], output[-4000:]
    return workspace


def events(workspace: Workspace, stage: str = "zero1") -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(
        str(workspace.folder / "runs" / f"tb-{stage}" / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0}
    )
    accumulator.Reload()
    return accumulator


def scalars(found: Any, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in found.Scalars(tag)}


@pytest.mark.launch
def test_scalars_are_those_of_metrics_jsonl(watched: Workspace) -> None:
    found, lines = events(watched), watched.metrics("tb-zero1")
    steps = {line["step"]: line for line in lines if "loss" in line}
    for tag, key in (("train/loss", "loss"), ("train/lr", "lr"), ("memory/rank0_gib", "memory_gib")):
        assert scalars(found, tag) == pytest.approx({step: line[key] for step, line in steps.items()}, rel=1e-6), tag
    val = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert scalars(found, "eval/loss") == pytest.approx(val, rel=1e-6)
    shares = [scalars(found, tag)[4] for tag in found.Tags()["scalars"] if tag.startswith("goodput/")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.launch
def test_layout_puts_training_speed_memory_and_goodput_on_own_pages(watched: Workspace) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    found = events(watched)
    layout = Layout()
    layout.ParseFromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["training", "speed", "memory", "goodput"]
    tags = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    assert {tag for tag in tags if "*" not in tag} <= set(found.Tags()["scalars"])


@pytest.mark.launch
def test_texts_and_hparams(watched: Workspace) -> None:
    found = events(watched)
    texts = {
        tag: [each.tensor_proto.string_val[0].decode() for each in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
        if "text_summary" in tag
    }
    assert "global_batch_tokens: 256" in texts["config.yaml/text_summary"][0]
    assert '"stage": 1' in texts["ds_config.json/text_summary"][0]
    assert len(texts["samples/text_summary"]) == 2, "one at each evaluation"
    assert "def " in texts["samples/text_summary"][0]
    plugin = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"train.optimizer.lr" in plugin


@pytest.mark.launch
def test_histograms_of_norms_are_the_same_at_every_stage(watched: Workspace) -> None:
    """The gradients' norms together are grad_norm of metrics.jsonl, which knows nothing of them."""
    by_stage = {}
    for stage in STAGES:
        found = events(watched, stage)
        tags = found.Tags()["histograms"]
        assert {"gradient_norms/blocks.00", "gradient_norms/blocks.01", "gradient_norms/embed", "weight_norms/all"} <= {
            *tags
        }
        line = next(line for line in watched.metrics(f"tb-{stage}") if line["step"] == 2)
        values = {event.step: event.histogram_value for event in found.Histograms("gradient_norms/all")}
        assert set(values) == {2, 4}
        assert values[2].sum_squares ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-4), stage
        weights = found.Histograms("weight_norms/all")[0].histogram_value
        by_stage[stage] = (values[2].sum, values[2].num, weights.sum)
    for stage in STAGES[1:]:
        assert by_stage[stage] == pytest.approx(by_stage["zero0"], rel=1e-4), stage


@pytest.mark.launch
def test_samples_are_the_same_at_every_stage_and_change_nothing(watched: Workspace) -> None:
    texts = {(watched.folder / "runs" / f"tb-{stage}" / "samples.jsonl").read_text() for stage in STAGES}
    assert len(texts) == 1
    line = json.loads(next(iter(texts)).splitlines()[0])
    assert line["step"] == 2
    assert line["samples"][0]["prompt"] == "def "
    losses = watched.losses("tb-zero0")
    for stage in STAGES[1:]:
        assert watched.losses(f"tb-{stage}") == pytest.approx(losses, abs=1e-5)


@pytest.mark.launch
def test_csv_monitor_gets_the_same_events(watched: Workspace) -> None:
    text = (watched.folder / "csv" / "x" / "train_loss.csv").read_text()
    rows = list(csv.reader(text.splitlines()))
    assert [(int(step), float(loss)) for step, loss in rows[1:]] == [
        (line["step"], pytest.approx(line["loss"])) for line in watched.metrics("tb-zero1") if "loss" in line
    ]


@pytest.fixture(scope="module")
def server(watched: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard's own server over the four runs."""
    logs = tmp_path_factory.mktemp("logs")
    for stage in STAGES:
        (logs / stage).symlink_to(watched.folder / "runs" / f"tb-{stage}" / "tensorboard")
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logs),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    process = subprocess.Popen([*command, "--load_fast", "false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{url}/data/runs", 120)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str, seconds: float) -> Any:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = json.loads(answer.read())
            if found:
                return found
        except OSError:
            pass
        assert time.monotonic() < end, f"{url} did not answer"
        time.sleep(0.5)


@pytest.mark.launch
@pytest.mark.browser
def test_the_browser_shows_the_curves(server: str, watched: Workspace, tmp_path: Path) -> None:
    """The first two groups are open on the page, validation loss among them: its last value stands there per run."""
    page = browse(f"{server}/#timeseries", tmp_path / "profile", "--virtual-time-budget=20000", "--dump-dom")
    assert page.count("<line-chart") >= 2, "curves are drawn"
    words = re.sub(r"<[^>]+>", " ", page).split()
    assert {"train", "eval", "speed", "memory", "goodput", "gradient_norms", "weight_norms"} <= set(words)
    for stage in STAGES:
        val = next(line["val_loss"] for line in reversed(watched.metrics(f"tb-{stage}")) if "val_loss" in line)
        assert stage in words
        assert f"{val:.4f}" in words


@pytest.mark.launch
@pytest.mark.browser
def test_report_lays_runs_over_each_other_and_says_what_differs(watched: Workspace, tmp_path: Path) -> None:
    folders = [str(watched.folder / "runs" / name) for name in ("tb-zero0", "tb-zero3")]
    command = [sys.executable, "-c", "from packspeed.launch.cli import main; main()", "report", *folders]
    options = ["--out", "page.html", "--png", "plots", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["png"]) == 8
    for name in found["png"]:
        colors = _colors(tmp_path / name)
        assert ImageColor.getrgb(COLORS[1]) in colors, f"{name}: the second run's curve, or its name below"
    assert found["can_change_the_loss"] == []
    assert ["ds_config.zero_optimization.stage", [0, 3]] in found["only_speed"]
    page = (tmp_path / "page.html").read_text()
    assert "http" not in page
    assert page.count("<svg") == 8
    for line in watched.metrics("tb-zero3"):
        assert "loss" not in line or str(line["loss"]) in page


def _colors(path: Path) -> set[Any]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        found = image.getcolors(image.width * image.height)
    assert found is not None
    return {color for _, color in found}


def test_a_png_has_its_curves_where_their_values_are() -> None:
    x = list(range(1, 101))
    falling, flat = Series("falling", x, [6 - 0.05 * step for step in x], COLORS[0]), [2.5] * 100
    chart = Chart("loss", [falling, Series("flat", x, flat, COLORS[3])], "nats")
    picture = draw_png(chart)
    assert picture is not None
    plot = lay_out(chart)
    assert plot is not None
    with Image.open(io.BytesIO(picture)) as image:
        for series, _ in plot.curves:
            for step in (1, 17, 50, 66, 99):
                across, down = plot.to_pixels(step, series.y[step - 1])
                pixel = (round(2 * across), round(2 * down))
                assert image.getpixel(pixel) == ImageColor.getrgb(series.color), (series.label, step)
                assert image.getpixel((pixel[0], pixel[1] - 12)) != ImageColor.getrgb(series.color)
        # The last label of the x axis, 100, is complete: nothing is drawn at the right edge.
        edge = image.crop((image.width - 8, 0, image.width, image.height))
        assert edge.getcolors() == [(edge.width * edge.height, (255, 255, 255))]
    assert draw_png(Chart("nothing", [Series("none", [], [])])) is None


def test_smoothing_does_not_hold_a_falling_curve_up() -> None:
    line = [10.0 - step for step in range(9)]
    assert smoothed(line, 4) == pytest.approx(line)
    assert smoothed([0.0, 3.0, 0.0, 3.0, 0.0], 3) == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0])


@pytest.mark.launch
def test_watch_shows_a_run_from_its_files(watched: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(watched.folder / "runs" / "tb-zero3", folder)
    follower = Follower(folder)
    assert [line["step"] for line in follower.update()] == [line["step"] for line in watched.metrics("tb-zero3")]
    screen = Console(width=100, file=io.StringIO())
    screen.print(panel(follower.progress))
    shown = screen.file.getvalue()
    for label, value in follower.progress.facts():
        assert label in shown
        assert value in shown, label
    assert f"{watched.losses('tb-zero3')[-1]:.4f}" in shown
    assert "4/4 (100.0%)" in shown
    assert "finished" in shown
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line being written
    assert follower.update() == []
