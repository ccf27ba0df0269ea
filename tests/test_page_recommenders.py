"""The comparison of L2D with another recommender on the page, in a real browser, over the real application."""

from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect
from support.chromium import needs_chromium
from support.page_actions import (
    LISTS,
    READ_LISTS,
    Console,
    articles,
    button,
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


def choice(page: Page) -> Locator:
    return page.get_by_role("combobox", name="Compare with")


def expect_comparison(page: Page, url: str, items: list[Any], name: str) -> None:
    """Expect the lists of L2D, and then the one of another recommender."""
    expected = []
    lists = [(heading, {"aggregation": aggregation}) for heading, aggregation in LISTS]
    for heading, chosen in [*lists, (name[:5], {"recommender": name})]:
        status, answer = ask(url, "/v1/recommend", {"history": items, "k": 10, **chosen})
        assert status == 200
        expected.append([heading, scored_titles(answer)])
    expect_equal(page, lambda: page.locator("#lists article").evaluate_all(READ_LISTS), expected)


def test_there_is_no_choice_where_l2d_is_alone(page: Page, url: str) -> None:
    take(page, "title 3")
    expect_lists(page, url, ["i3"])
    expect(choice(page)).to_be_hidden()


def test_the_keyboard_chooses_what_is_compared(offered: Page, url: str) -> None:
    page = offered
    take(page, "title 3")
    expect_comparison(page, url, ["i3"], "transitions")
    expect(page.locator("#shown")).to_have_text("10 recommendations in each list.")
    expect(articles(page).last.locator(".hint")).to_contain_text("total ")
    expect(articles(page).last.locator(".hint")).not_to_contain_text("model ")
    button(page, "Clear all").focus()
    page.keyboard.press("Tab")
    expect_focus(choice(page))
    page.keyboard.press("ArrowDown")
    expect_comparison(page, url, ["i3"], "most-popular")
    expect_focus(choice(page))
    take(page, "title 4")
    expect_comparison(page, url, ["i3", "i4"], "most-popular")
    choice(page).select_option("nothing")
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
