"""The report of a comparison in Markdown: every table of an evaluation, for people, and its short form for a screen."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from l2d_ray.config import Config
from l2d_ray.core.statistics import Ratio
from l2d_ray.recommenders.registry import find
from l2d_ray.stages.allowances import SEED, Allowance
from l2d_ray.stages.findings import Report
from l2d_ray.stages.reports import aligned, percent
from l2d_ray.stages.summary import CUTOFFS, GROUPS, PairedRatio, Row

METRICS = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in CUTOFFS]
NAMES = {metric: metric.replace("recall", "Recall").replace("ndcg", "NDCG") for metric in METRICS}


def document(report: Report, figure: str) -> str:
    """Return the Markdown file of a report. `figure` is the path of the plot that it shows, from its folder."""
    sections = [
        ("Accuracy", _accuracy(report.results)),
        ("Accuracy on the same samples", _accuracy(report.same_users) if report.same_users else ""),
        ("Groups of targets, and coverage", _groups(report.results)),
        ("Cost", f"{_costs(report)}\n\n![Recall@20 against seconds a user]({figure})"),
        ("Paired ratios", _ratios(report)),
        ("Allowed search", _allowances(report.allowances)),
        ("Seeds", _seeds(report.results)),
        ("Fusions", _fusions(report)),
        ("Calibration", _calibrations(report)),
    ]
    texts = [f"## {title}\n\n{text}" for title, text in sections if text]
    return "\n\n".join([f"# {report.plan.config.evaluate.name}", _about(report), *texts]) + "\n"


def short_table(report: Report) -> str:
    """Return one line per recommender: Recall@20, its ratio to that of the reference, and the cost."""
    ratios = {one.recommender: _ratio_text(one.ratio) for one in report.ratios}
    reference = report.plan.reference
    head = ["recommender", "recall@20", "95%", f"{reference.name} / it" if reference else "ratio"]
    lines = [[*head, "hours", "MB", "s/user"]]
    for row in report.results:
        low, high = row.metrics.intervals["recall@20"]
        found = [row.recommender, percent(row.metrics.means["recall@20"]), f"{percent(low)}-{percent(high)}"]
        lines.append([*found, ratios.get(row.recommender, ""), *_cost(report, row)])
    return aligned(lines)


def by_seed(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each recommender that was trained with several seeds, by its name without a seed."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(SEED.sub("", row.recommender), []).append(row)
    return {name: of_name for name, of_name in found.items() if len(of_name) > 1}


def names_by_seed(name: str, config: Config) -> dict[str, int]:
    """Return the seed of each training of a recommender, by its name: the first of `compare.seeds` has the name itself.

    A recommender that is not trained, or whose names have no room for a seed, has one name.
    """
    declared = find(name, config, "evaluate.recommenders").declaration
    first, *others = config.compare.seeds
    seeds = {f"{name}-seed{seed}": seed for seed in others if declared.trainer}
    return {name: first} | {other: seed for other, seed in seeds.items() if re.fullmatch(declared.pattern, other)}


def _about(report: Report) -> str:
    plan, users = report.plan, len({sample.user_hash for sample in report.plan.test})
    seen = "left out" if plan.config.recommend.exclude_seen else "kept"
    fresh = " What is older than a query is known to all." if plan.config.evaluate.memory == "fresh" else ""
    return (
        f"{len(plan.test):,} test samples of {users:,} users, {plan.frequencies.counts_I.size:,} items. Recall and NDCG"
        " are in percent, over the full catalogue. Items already seen are"
        f" {seen}. The 95% intervals are bootstraps over users.{fresh}"
    )


def _accuracy(rows: Sequence[Row]) -> str:
    head = ["recommender", *NAMES.values(), "samples"]
    return _table(head, ([row.recommender, *_metrics(row), f"{row.metrics.users:,}"] for row in rows))


def _metrics(row: Row) -> Iterator[str]:
    for metric in METRICS:
        low, high = row.metrics.intervals[metric]
        yield f"{percent(row.metrics.means[metric])} ({percent(low)}-{percent(high)})"


def _groups(rows: Sequence[Row]) -> str:
    largest = max(rows, key=lambda row: row.metrics.users)
    sizes = [f"{group} ({largest.groups[group].users:,})" for group in GROUPS]
    lines = []
    for row in rows:
        recalls = (row.groups[group].means.get("recall@20") for group in GROUPS)
        shares = ["" if recall is None else percent(recall) for recall in recalls]
        lines.append([row.recommender, *shares, percent(row.coverage)])
    return (
        "Recall@20 in percent. A cold target is that of no training sample; the others are dense or sparse, above the"
        " median number of training samples or not. The head of the catalogue is the fewest items with half of the"
        " training samples. Coverage is the share of the catalogue in the first 20 of any sample.\n\n"
        + _table(["recommender", *sizes, "coverage"], lines)
    )


def _costs(report: Report) -> str:
    head = ["recommender", "training hours", "MB on the disk", "seconds a user", "tokens a user"]
    lines = [[row.recommender, *_cost(report, row), f"{row.tokens_per_user:.0f}"] for row in report.results]
    return (
        "Training hours are those that the stages recorded. Those of L2D are fine-tuning, the memory and the index."
        " Counts are fitted within seconds.\n\n" + _table(head, lines)
    )


def _ratios(report: Report) -> str:
    reference = report.plan.reference
    if reference is None:
        return "There is no L2D among the recommenders, and no evaluate.reference, to divide by the others."
    head = ["recommender", "ratio", "above 1", "samples"]
    lines = [[one.recommender, _ratio_text(one.ratio), _verdict(one), f"{one.samples:,}"] for one in report.ratios]
    return (
        f"Recall@20 of {reference.name} divided by that of another recommender on the same samples, with its 95%"
        " interval: 10,000 paired resamples of users.\n\n" + _table(head, lines)
    )


def _ratio_text(ratio: Ratio) -> str:
    if ratio.value is None:
        return "undefined: no hit"
    if ratio.low is None:
        return f"{ratio.value:.2f} (one user: no interval)"
    end = f"-{ratio.high:.2f}" if ratio.high is not None else " or more"
    return f"{ratio.value:.2f} ({ratio.low:.2f}{end})"


def _verdict(one: PairedRatio) -> str:
    return {True: "yes", False: "no", None: ""}[one.ratio.above]


def _allowances(allowances: Sequence[Allowance]) -> str:
    head = ["recommender", "configurations", "settings", "validation samples", "chosen by", "hours of training for it"]
    lines = []
    for one in allowances:
        count = "not known" if one.configurations is None else str(one.configurations)
        samples = f"{one.samples:,}" if one.settings else ""
        hours = _hours(one.seconds) if one.seconds else ""
        lines.append([one.recommender, count, ", ".join(one.settings), samples, one.measure, hours])
    return "Configurations that were compared on validation samples before the test.\n\n" + _table(head, lines)


def _seeds(rows: Sequence[Row]) -> str:
    """Return the mean and the values of Recall@20 of what was trained with several seeds; "" if nothing was."""
    lines = []
    for name, of_name in by_seed(rows).items():
        values = [row.metrics.means["recall@20"] for row in of_name]
        lines.append([name, percent(float(np.mean(values))), ", ".join(map(percent, values))])
    if not lines:
        return ""
    head = ["recommender", "mean Recall@20", "by seed"]
    return "Trained with several seeds. The language model is fine-tuned with one.\n\n" + _table(head, lines)


def _fusions(report: Report) -> str:
    """Return the weights of each fusion; "" if there is none."""
    if not report.fusions:
        return ""
    head = ["recommender", "weights of the parts", "factor of items already seen", "nats", "validation samples"]
    lines = []
    for name, record in report.fusions.items():
        weights = ", ".join(f"{part} {weight:g}" for part, weight in record.parts.items())
        nats = "" if record.nats is None else f"{record.nats:.3f}"
        lines.append([name, weights, f"{math.exp(record.log_repeat):.3g}", nats, f"{record.samples:,}"])
    return (
        "The log-probabilities of the parts are added with these weights, which were fitted on validation samples. Nats"
        " are the mean of -log p(target) there.\n\n" + _table(head, lines)
    )


def _calibrations(report: Report) -> str:
    """Return how far the probabilities are from the shares that came next; "" if there are no probabilities."""
    if not report.calibrations:
        return ""
    head = ["recommender", "first 20 items", "first item", "mean probability of the first item", "share that came next"]
    lines = []
    for name, one in report.calibrations.items():
        lines.append([name, *map(percent, (one.listed.error, one.first.error, *one.first.means))])
    return (
        "Expected calibration error in percent: the difference between the probability of an item and the share of such"
        " items that came next, in ten bins of equal size.\n\n" + _table(head, lines)
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _cost(report: Report, row: Row) -> list[str]:
    """Return hours of training, megabytes, and seconds a user. Of another system only the last is known, if at all."""
    cost = report.costs.get(row.recommender)
    prepared = [_hours(cost.training_seconds), f"{cost.bytes / 1e6:,.1f}"] if cost else ["", ""]
    return [*prepared, f"{row.seconds_per_user:.4f}"]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3f}" if seconds else "0"
