"""Steps of a stage without Ray."""

from collections.abc import Callable
from typing import Any


def run_here(label: str, step: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """Run the calls of a step one after the other, as `distributed.tasks.run_tasks` does on Ray."""
    return [step(*call) for call in calls]
