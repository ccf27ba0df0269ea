"""The comparison of L2D with another recommender on the page, in a real browser, over the real application."""

from typing import Any

import pytest
from playwright.sync_api import Page, expect
from support.chromium import needs_chromium
from support.page_actions import (
    LISTS,
    READ_LISTS,
    Console,
    articles,
    button,
    choice,
    expect_equal,
    expect_focus,
    expect_lists,
    scored_titles,
    take,
)
from support.running_endpoint import ask
from support.small_endpoint import LocalEngine

from l2d_ray.serve.engine import UnavailableError

pytest_plugins = ["support.page_fixtures"]
pytestmark = needs_chromium
NAMES = ["transitions", "most-popular"]


@pytest.fixture
def offered(page: Page, page_engine: LocalEngine, url: str) -> Page:
    """Open the page of an endpoint with others next to L2D."""
    page_engine.offer(*NAMES)
    page.goto(url)
    expect(page.locator("#served")).to_contain_text("30 items")
    return page


def expect_comparison(page: Page, url: str, items: list[Any], name: str) -> None:
    """Expect the lists of L2D, and then the one of another recommender."""
    expected = []
    lists = [(heading, {"aggregation": aggregation}) for heading, aggregation in LISTS]
    for heading, chosen in [*lists, (name[:5], {"recommender": name})]:
        status, answer = ask(url, "/v1/recommend", {"history": items, "k": 10, **chosen})
        assert status == 200
        expected.append([heading, scored_titles(answer)])
    expect_equal(page, lambda: page.locator("#lists article").evaluate_all(READ_LISTS), expected)


def test_lists_of_l2d_are_hidden_and_shown(page: Page, url: str) -> None:
    take(page, "title 3")
    expect_lists(page, url, ["i3"])
    choice(page, "L2D-G").uncheck()
    expect(articles(page)).to_have_count(len(LISTS) - 1)
    expect(articles(page).get_by_role("heading", name="L2D-G")).to_have_count(0)
    choice(page, "L2D with transitions").uncheck()
    choice(page, "L2D-L").uncheck()
    expect(page.get_by_text("Choose a list to see recommendations.")).to_be_visible()
    for name in ("L2D-G", "L2D with transitions", "L2D-L"):
        choice(page, name).check()
    expect_lists(page, url, ["i3"])


def test_the_keyboard_chooses_what_is_compared(offered: Page, url: str) -> None:
    page = offered
    take(page, "title 3")
    expect_comparison(page, url, ["i3"], "transitions")
    expect(page.locator("#shown")).to_have_text("10 recommendations in each list.")
    expect(articles(page).last.locator(".hint")).to_contain_text("total ")
    expect(articles(page).last.locator(".hint")).not_to_contain_text("model ")
    choice(page, "L2D-L").focus()
    page.keyboard.press("Tab")
    expect_focus(choice(page, "transitions"))
    page.keyboard.press("Space")
    expect_lists(page, url, ["i3"])
    page.keyboard.press("Tab")
    expect_focus(choice(page, "most-popular"))
    page.keyboard.press("Space")
    expect_comparison(page, url, ["i3"], "most-popular")
    take(page, "title 4")
    expect_comparison(page, url, ["i3", "i4"], "most-popular")
    choice(page, "most-popular").uncheck()
    expect_lists(page, url, ["i3", "i4"])


def test_a_list_that_fails_leaves_the_others(
    offered: Page, url: str, page_engine: LocalEngine, console: Console
) -> None:
    console.expects_failed_requests = True
    page, alert = offered, offered.get_by_role("alert")
    page_engine.failure = UnavailableError("the model is unavailable; try again later")
    take(page, "title 3")
    expect(alert).to_contain_text("the model is unavailable")
    expect(articles(page).get_by_role("heading")).to_have_text(["transitions"])
    page_engine.failure = None
    button(page, "Try again").click()
    expect_comparison(page, url, ["i3"], "transitions")
    expect(alert).to_be_hidden()
