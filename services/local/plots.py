"""Training curves of a run as a picture: losses, the family's tracked metrics, and every evaluation metric, by step."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genmodels import models
from genmodels.spec.sections import ModelSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
PANEL = (4.2, 2.8)  # inches
STEEP = 20.0  # ratio of the largest to the smallest value above which the scale is logarithmic

Rows = Sequence[Mapping[str, Any]]


def draw(spec: ModelSpec, rows: Rows) -> bytes | None:
    """Return a PNG file; None if no series has two points.

    Args:
        rows: the run's metrics, by step.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a cache folder it warns, and uses a temporary one
    from matplotlib.figure import (
        Figure,  # imported here: the import is slow; without pyplot, so that no display is needed
    )

    panels = [(title, lines) for title, names in _panels(spec, rows) if (lines := _lines(rows, names))]
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure((PANEL[0] * columns, PANEL[1] * height), layout="constrained")
    axes = list(figure.subplots(height, columns, squeeze=False).flat)
    for axis, (title, lines) in zip(axes, panels, strict=False):
        _draw_panel(axis, title, lines)
    for unused in axes[len(panels) :]:
        unused.set_visible(False)
    figure.suptitle(spec.name)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def _panels(spec: ModelSpec, rows: Rows) -> list[tuple[str, list[str]]]:
    """Return the title of each panel and the columns that it shows."""
    family = models.load(spec.family)
    losses = sorted({name for row in rows for name in row if name.endswith("loss")})
    tracked = [name for name in family.tracked_metrics if name not in family.metric_names]
    metrics: dict[str, list[str]] = {}
    for name in family.metric_names:
        if name not in losses:  # a floor is drawn with the metric that it is the floor of
            metrics.setdefault(name.removesuffix("_floor"), []).append(name)
    return [("loss", losses), ("tracked", tracked), *metrics.items()]


def _lines(rows: Rows, names: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    lines = {}
    for name in names:
        points = [(row["step"], float(row[name])) for row in rows if name in row]
        if len(points) > 1:
            steps, values = zip(*points, strict=True)
            lines[name] = list(steps), list(values)
    return lines


def _draw_panel(axis: Axes, title: str, lines: Mapping[str, tuple[list[int], list[float]]]) -> None:
    for name, (steps, values) in lines.items():
        axis.plot(steps, values, label=name, marker="." if len(steps) < COLUMNS * 10 else None)
    everything = [value for _, values in lines.values() for value in values]
    if min(everything) > 0 and max(everything) > STEEP * min(everything):
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.locator_params("x", nbins=5)
    axis.grid(alpha=0.3)
    if list(lines) == [title]:
        axis.set_title(title, fontsize="medium")
    else:
        axis.legend(fontsize="small")
