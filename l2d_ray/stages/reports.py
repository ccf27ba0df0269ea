"""Reports for people: the table and the plots of an evaluation, and the losses of a training."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from l2d_ray.stages.finetuning import Training
from l2d_ray.stages.summary import CUTOFFS, GROUPS, Row

if TYPE_CHECKING:  # matplotlib is imported with the first plot: many processes that draw none import this module
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from l2d_ray.stages.findings import Report

SMALLEST_MARK, LARGEST_MARK = 4.0, 20.0
"""Diameter of the mark of a recommender, in points: without training, and with the longest."""


def table(rows: Sequence[Row]) -> str:
    """Return one line per recommender: metrics in percent, Recall@20 with its interval and by group, and the cost."""
    columns = [*(f"recall@{k}" for k in CUTOFFS), *(f"ndcg@{k}" for k in CUTOFFS)]
    groups = [f"{group}@20" for group in GROUPS]
    head = ["recommender", *columns, "95% of recall@20", *groups, "coverage", "users", "s/user", "tokens/user"]
    return aligned([head, *(_cells(row, columns) for row in rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as text: the first column starts at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for name, *cells in lines
    )


def plot(report: "Report") -> "Figure":
    """Draw accuracy against cost, Recall@20 against M and against the size of the memory, and the calibration if any.

    The area of a mark in the first one grows with the hours of training.
    """
    panels = 4 if report.calibrations else 3
    figure = _figure(width=5 * panels)
    cost, neighbours, size, *calibrated = figure.subplots(1, panels)
    _accuracy_against_cost(cost, report)
    cost.legend(fontsize=7, markerscale=0.5)
    by_m = [
        (trial.row.recommender, trial.values["top_m"], trial.row.metrics.means["recall@20"])
        for trial in report.validation.trials
        if trial.values.get("top_m")
    ]
    by_size = [(share.name, share.fraction, row.metrics.means["recall@20"]) for share, row in report.shares]
    _curves(neighbours, by_m, "M, rows averaged", "values of M, validation data")
    _curves(size, by_size, "share of the memory", "size of the memory, test data")
    neighbours.set_xscale("log")
    for axes in calibrated:
        _reliability(axes, report)
    return figure


def plot_costs(report: "Report") -> "Figure":
    """Draw accuracy against cost alone, with room for many recommenders."""
    from matplotlib import colormaps

    figure = _figure(width=11)
    axes = figure.subplots()
    axes.set_prop_cycle(color=list(colormaps["tab20"](range(20))))
    _accuracy_against_cost(axes, report)
    figure.legend(loc="outside right upper", fontsize=8, markerscale=0.5, title="mark: hours of training")
    return figure


def plot_training(training: Training) -> "Figure":
    """Draw the loss of each batch, and after each epoch the loss on training and validation samples."""
    figure = _figure(width=7)
    axes = figure.subplots()
    axes.plot([p["step"] for p in training.curve], [p["loss"] for p in training.curve], alpha=0.4, label="batch")
    for name in ("train_loss", "valid_loss"):
        steps, losses = ([epoch[key] for epoch in training.losses] for key in ("step", name))
        axes.plot(steps, losses, marker="o", label=name)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("cross-entropy of a title's token")
    axes.legend(fontsize=8)
    return figure


def png(figure: "Figure") -> bytes:
    """Return the content of a PNG file of a figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    low, high = row.metrics.intervals["recall@20"]
    recalls = [metrics.means.get("recall@20") for metrics in row.groups.values()]
    return [
        row.recommender,
        *(percent(row.metrics.means[column]) for column in columns),
        f"{percent(low)}-{percent(high)}",
        *("" if recall is None else percent(recall) for recall in recalls),
        percent(row.coverage),
        str(row.metrics.users),
        f"{row.seconds_per_user:.4f}",
        f"{row.tokens_per_user:.0f}",
    ]


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.2f}"


def _figure(width: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _accuracy_against_cost(axes: "Axes", report: "Report") -> None:
    hours = {name: cost.training_seconds / 3600 for name, cost in report.costs.items()}
    longest = max(hours.values(), default=0.0) or 1.0
    for row in report.results:
        low, high = row.metrics.intervals["recall@20"]
        value = row.metrics.means["recall@20"]
        error = [[max(value - low, 0)], [max(high - value, 0)]]
        hours_of_row = hours.get(row.recommender, 0.0)
        label = f"{row.recommender} ({row.metrics.users} users, {hours_of_row:.2g} h)"
        diameter = SMALLEST_MARK + (LARGEST_MARK - SMALLEST_MARK) * math.sqrt(hours_of_row / longest)
        axes.errorbar(
            [row.seconds_per_user], [value], yerr=error, fmt="o", capsize=3, label=label, markersize=diameter, alpha=0.7
        )
    axes.set_xscale("log")
    axes.set_xlabel("seconds a user")
    axes.set_ylabel("Recall@20")
    axes.set_title("accuracy against cost, test data", fontsize=10)


def _reliability(axes: "Axes", report: "Report") -> None:
    """Draw the share that came next against the probability, for the items of the first 20 places."""
    for name, one in report.calibrations.items():
        label = f"{name}, expected calibration error {percent(one.listed.error)}%"
        axes.plot(one.listed.predicted_B, one.listed.observed_B, marker="o", label=label)
    predicted_B = np.concatenate([one.listed.predicted_B for one in report.calibrations.values()])
    if predicted_B.size:  # else every list is empty, and no axis can be logarithmic
        ends = [predicted_B.min(), predicted_B.max()]
        axes.plot(ends, ends, color="gray", linewidth=0.8, label="perfect")
        axes.set_xscale("log")
        axes.set_yscale("log", nonpositive="clip")
    axes.set_xlabel("probability of an item among the first 20")
    axes.set_ylabel("share of these items that came next")
    axes.set_title("reliability of probabilities, test data", fontsize=10)
    axes.legend(fontsize=7)


def _curves(axes: "Axes", points: Sequence[tuple[str, float, float]], label: str, title: str) -> None:
    """Draw one curve for each name of the points (name, x, Recall@20)."""
    for name in dict.fromkeys(name for name, _, _ in points):
        axes.plot(*zip(*((x, y) for of, x, y in points if of == name), strict=True), marker="o", label=name)
    axes.set_xlabel(label)
    axes.set_ylabel("Recall@20")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(bottom=0)
    if points:
        axes.legend(fontsize=8)
