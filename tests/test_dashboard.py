"""The Grafana dashboard names only metrics that exist."""

import importlib.util
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from l2d_ray.distributed import serving

ROOT = Path(__file__).parents[1]
OUR_METRICS = re.compile(r"\"(l2d_ray_\w+)\"")
RAY_METRICS = re.compile(r"\"(serve_[\w{}]+)\"")
SUFFIXES = re.compile(r"_(bucket|sum|count|total)$")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    return parsed


@pytest.fixture(scope="module")
def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def named(expressions: list[str], prefix: str) -> set[str]:
    """Return the metrics in the expressions whose names begin with `prefix`, as they are named in Python."""
    found = re.findall(rf"\bray_({prefix}\w+)", " ".join(expressions))
    return {SUFFIXES.sub("", name) for name in found}


def defined(pattern: re.Pattern[str], folder: Path) -> set[str]:
    """Return the names in string literals of the sources in a folder."""
    return {SUFFIXES.sub("", name) for file in folder.rglob("*.py") for name in pattern.findall(file.read_text())}


def test_panels_have_distinct_ids_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert dashboard["schemaVersion"] >= 39
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "application"]
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"],
            one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"],
        )
        assert any(apart), f"{one} and {other} overlap"


def test_every_panel_queries_the_chosen_source_and_application(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            selectors = re.findall(r"ray_\w+(\{[^}]*\})?", target["expr"])
            assert selectors, panel["title"]
            assert all('application=~"$application"' in selector for selector in selectors)


def test_the_dashboard_shows_every_metric_of_ours_and_no_other(expressions: list[str]) -> None:
    (folder,) = serving.__path__
    assert named(expressions, "l2d_ray_") == defined(OUR_METRICS, Path(folder))


def test_the_metrics_of_ray_serve_exist_in_this_ray(expressions: list[str]) -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    templates = defined(RAY_METRICS, Path(spec.origin).parent / "serve")
    patterns = [re.compile(re.sub(r"\{\w+\}", "http", template)) for template in templates]
    missing = {name for name in named(expressions, "serve_") if not any(one.fullmatch(name) for one in patterns)}
    assert not missing
    assert named(expressions, "serve_") >= {"serve_num_http_requests", "serve_num_http_error_requests"}
