"""Actions of the page tests and their expectations. Every expectation waits until it is met."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import ConsoleMessage, Locator, Page, Route, expect

from support.running_endpoint import ask
from support.small_endpoint import LocalEngine

SCRIPT = "<img src=x onerror=\"document.title='owned'\">"
ODD_TITLES = {7: SCRIPT, 8: "W" * 150, 9: "Film\u202eback"}
"""Titles that a page could display wrongly, by item."""
MILLISECONDS = 30_000
"""Patience of every expectation."""
LISTS = (("L2D w", "posterior"), ("L2D-G", "global"), ("L2D-L", "local"))
"""The lists of L2D: the beginning of each heading, and the aggregation."""
READ_LISTS = """lists => lists.map((list) => [
  list.querySelector("h3").textContent.slice(0, 5),
  [...list.querySelectorAll(".items > li")].map((item) => [
    item.querySelector("bdi").textContent, parseFloat(item.querySelector(".score").textContent),
  ]),
])"""
"""Script that reads all lists at one moment: the beginning of each heading, titles, and scores or percentages."""


@dataclass
class Console:
    """Errors and warnings in the browser's console."""

    messages: list[str] = field(default_factory=list)
    expects_failed_requests: bool = False
    """Whether the test makes requests fail, which the browser reports."""

    def add(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.messages.append(message.text)

    def unexpected(self) -> list[str]:
        """Return the messages that no test expects."""
        failed = "Failed to load resource" if self.expects_failed_requests else None
        return [text for text in self.messages if failed is None or not text.startswith(failed)]


def search_field(page: Page) -> Locator:
    return page.get_by_label("Search titles")


def found(page: Page) -> Locator:
    return page.get_by_role("list", name="Titles found").get_by_role("listitem")


def history(page: Page) -> Locator:
    return page.get_by_role("list", name="Items in time order").locator("bdi")


def articles(page: Page) -> Locator:
    return page.get_by_role("article")


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name)


def take(page: Page, text: str) -> None:
    """Type a text and add the first title found, or the text itself."""
    search_field(page).fill(text)
    search_field(page).press("Enter")
    expect(search_field(page)).to_have_value("")


def set_results(page: Page, count: int) -> None:
    """Set the number of results."""
    page.get_by_label("Results").fill(str(count))
    page.get_by_label("Results").press("Enter")


@contextlib.contextmanager
def hold(page: Page, pattern: str) -> Iterator[None]:
    """Hold the requests to a URL while the block runs."""
    held: list[Route] = []
    page.route(pattern, lambda route: held.append(route))
    yield
    for route in held:
        route.continue_()
    page.unroute(pattern)


def expect_focus(control: Locator) -> None:
    """Expect that a control has the focus and shows it."""
    expect(control).to_be_focused()
    expect(control).to_have_css("outline-style", "solid")


def expect_equal(page: Page, read: Callable[[], Any], expected: Any) -> None:
    """Expect that `read` returns a value at some moment."""
    deadline = time.monotonic() + MILLISECONDS / 1000
    while (value := read()) != expected and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert value == expected


def expect_lists(page: Page, url: str, items: list[Any], k: int = 10) -> None:
    """Expect the lists of L2D that the endpoint answers for a history."""
    expected = []
    for name, aggregation in LISTS:
        status, answer = ask(url, "/v1/recommend", {"history": items, "k": k, "aggregation": aggregation})
        assert status == 200
        expected.append([name, scored_titles(answer)])
    expect_equal(page, lambda: page.locator("#lists article").evaluate_all(READ_LISTS), expected)
    expect(page.locator("#lists[aria-busy]")).to_have_count(0)


def expect_beam_list(page: Page, beams_url: str, items: list[Any]) -> None:
    """Expect the list of beam search that the endpoint answers for a history."""
    expect(beam_search(page).get_by_role("status")).to_contain_text("the time of L2D-G; scores are log-probabilities")
    status, answer = ask(beams_url, "/v1/beam_search", {"history": items, "k": 10})
    assert status == 200
    assert len(answer["items"]) == 4
    assert all(item["score"] < 0 for item in answer["items"])
    read = beam_search(page).evaluate_all
    expect_equal(page, lambda: read(READ_LISTS), [["Const", scored_titles(answer)]])


def scored_titles(answer: dict[str, Any]) -> list[list[Any]]:
    """Return titles and scores of a response; the page shows four digits, and of probabilities three, in percent."""
    shown = [100 * item["probability"] if "probability" in item else item["score"] for item in answer["items"]]
    return [[item["title"], pytest.approx(value, rel=6e-3)] for item, value in zip(answer["items"], shown, strict=True)]


def beam_search(page: Page) -> Locator:
    """Return the article of beam search."""
    return page.get_by_role("article", name="Constrained beam search, 4 beams")


def open_with_beams(page: Page, engine: LocalEngine, beams_url: str) -> None:
    """Open the page of an endpoint that offers beam search."""
    engine.beams = 4
    page.goto(beams_url)
    expect(page.locator("#served")).to_contain_text("30 items")


def choice(page: Page, name: str) -> Locator:
    """Return the box that puts a list next to the others."""
    return page.get_by_role("group", name="Side by side").get_by_role("checkbox", name=name, exact=True)
