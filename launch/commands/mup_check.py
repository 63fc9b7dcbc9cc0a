"""`packspeed mup-check`: check whether the size of a model's activations depends on the model's width."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packspeed.launch.commands.options import Json, Overrides, RunFileArgument, show
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.engine.quiet import DeepSpeedLogFilter
from packspeed.launch.observe.charts import COLORS, SCRIPT, STYLE, Chart, Series, line_chart
from packspeed.launch.observe.report import write_output
from packspeed.launch.run_folder.folder import aligned

if TYPE_CHECKING:
    from packspeed.launch.trials.mup_check import LayerResult, WidthCheck


def mup_check(
    run_file: RunFileArgument,
    overrides: Overrides = None,
    widths: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTH,WIDTH",
            help="Values of d_model to compare. Default: 1, 2, 4 and 8 times a base width, which is "
            "model.mup.base_width, or a quarter of d_model if the run does not use muP.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training before the activations are measured.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 4,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds for the initial weights; the results are averaged over them.")
    ] = 3,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0, max=10.0, help="Activations grow as width^e. Largest e that counts as independent of the width."
        ),
    ] = 0.25,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write an HTML page with plots over the width.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Check that activations and their changes do not depend on the width (muP).

    Trains the model for a few steps at each width, in this process and on the CPU. Exit code 1: they depend on
    the width.
    """
    try:
        chosen = [int(text) for text in widths.split(",")] if widths is not None else None
    except ValueError:
        raise ConfigError(f"--widths {widths}: give whole numbers, such as --widths 64,128,256.") from None
    with DeepSpeedLogFilter():  # the import loads torch and DeepSpeed, which takes seconds
        from packspeed.launch.trials.mup_check import mup_check as check

        result = check(run_file, overrides or [], chosen, steps, rows, seeds, tolerance)
    if out is not None:
        write_output(out, page(result).encode(), "--out FILE")
    layers = [{key: _number(value) for key, value in dataclasses.asdict(x).items()} for x in result.layers]
    facts = {"flat": result.flat, "widths": result.widths, "layers": layers}
    show(facts, [*table(result), *([f"wrote {out}"] if out else [])], json_output)
    raise typer.Exit(0 if result.flat else 1)


def _number(value: object) -> object:
    """Return a value for JSON: NaN and infinity, also those in lists, become None."""
    if isinstance(value, (tuple, list)):
        return [_number(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(result: WidthCheck) -> list[str]:
    """Return the result as lines of text.

    For each layer: the mean change of its activations at every width, and the exponents with which this change and the
    activations grow with the width.
    """
    lines = [["mean |change| at width", *map(str, result.widths), "exponent", "of |activation|", ""]]
    for layer in result.layers:
        exponents = [f"{layer.change_exponent:+.2f}", f"{layer.size_exponent:+.2f}"]
        lines.append([layer.layer, *(f"{x:.3g}" for x in layer.change), *exponents, "" if layer.flat else "not flat"])
    return [
        *aligned(lines),
        "flat: nothing depends on the width." if result.flat else "NOT flat: the width changes activations.",
    ]


def page(result: WidthCheck) -> str:
    """Return an HTML page with two plots over the width, mean |change| and mean |activation|, one curve per layer."""

    def chart(title: str, values: list[tuple[LayerResult, tuple[float, ...]]]) -> str:
        x = [math.log2(width) for width in result.widths]
        curves = []
        for n, (layer, numbers) in enumerate(values):
            y = [math.log2(v) if math.isfinite(v) and v > 0 else math.nan for v in numbers]
            curves.append(Series(layer.layer, x, y, COLORS[n % len(COLORS)], dots=True))
        return line_chart(Chart(title, curves, "log2, over log2 of the width"))

    charts = [
        chart("mean |change|", [(layer, layer.change) for layer in result.layers]),
        chart("mean |activation|", [(layer, layer.size) for layer in result.layers]),
    ]
    legend = "".join(
        f'<span><i style="background:{COLORS[n % len(COLORS)]}"></i>{layer.layer} '
        f"<b>{layer.change_exponent:+.2f}</b></span>"
        for n, layer in enumerate(result.layers)
    )
    verdict = "flat" if result.flat else "not flat"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>packspeed mup-check</title>'
        f"<style>{STYLE}</style></head><body><header><h1>Coordinate check: {verdict}</h1></header>"
        f'<section><div class="charts">{"".join(charts)}</div><div class="legend">{legend}</div></section>'
        f"<script>{SCRIPT}</script></body></html>"
    )
