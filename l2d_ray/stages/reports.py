"""An evaluation as a person reads it: a table, and three plots."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from l2d_ray.stages.evaluation import CUTOFFS, GROUPS
from l2d_ray.stages.finetuning import Training

if TYPE_CHECKING:  # imported with the first plot: many processes that draw none read this module
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]


def table(rows: Rows) -> str:
    """The results, a line each: metrics in percent, Recall@20 with its interval and by group, and what a user costs."""
    columns = [*(f"recall@{k}" for k in CUTOFFS), *(f"ndcg@{k}" for k in CUTOFFS)]
    head = [
        "recommender",
        *columns,
        "95% of recall@20",
        *(f"{group}@20" for group in GROUPS),
        "users",
        "s/user",
        "tokens/user",
    ]
    lines = [
        [
            row["recommender"],
            *(f"{100 * row[column]:.2f}" for column in columns),
            "{:.2f}-{:.2f}".format(*(100 * bound for bound in row["intervals"]["recall@20"])),
            *("" if "recall@20" not in own else f"{100 * own['recall@20']:.2f}" for own in row["groups"].values()),
            str(row["users"]),
            f"{row['seconds_per_user']:.4f}",
            f"{row['tokens_per_user']:.0f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *lines]
    )


def plot(report: dict[str, Any]) -> "Figure":
    """Three plots: accuracy against cost, Recall against M, Recall against the share of the memory."""
    figure = _figure(width=15)
    cost, neighbours, share = figure.subplots(1, 3)
    _accuracy_against_cost(cost, report["results"])
    local = [row for row in report["validation"]["results"] if row["top_m"]]
    _curves(neighbours, local, "top_m", "M, rows averaged", "L2D-L on validation data")
    _curves(share, report["fractions"], "fraction", "share of the memory", "size of the memory, test data")
    neighbours.set_xscale("log")
    return figure


def plot_training(training: Training) -> "Figure":
    """The loss along the way, and after each epoch on training and validation samples."""
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
    """The figure as a file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _figure(width: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _accuracy_against_cost(axes: "Axes", rows: Rows) -> None:
    for row in rows:
        low, high = row["intervals"]["recall@20"]
        value = row["recall@20"]
        error = [[max(value - low, 0)], [max(high - value, 0)]]
        label = f"{row['recommender']} ({row['users']} users)"
        axes.errorbar([row["seconds_per_user"]], [value], yerr=error, fmt="o", capsize=3, label=label)
    axes.set_xscale("log")
    axes.legend(fontsize=7)
    axes.set_xlabel("seconds a user")
    axes.set_ylabel("Recall@20")
    axes.set_title("accuracy against cost, test data", fontsize=10)


def _curves(axes: "Axes", rows: Rows, along: str, label: str, title: str) -> None:
    for name in dict.fromkeys(row["recommender"] for row in rows):
        own = [row for row in rows if row["recommender"] == name]
        axes.plot([row[along] for row in own], [row["recall@20"] for row in own], marker="o", label=name)
    axes.set_xlabel(label)
    axes.set_ylabel("Recall@20")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(bottom=0)
    if rows:
        axes.legend(fontsize=8)
