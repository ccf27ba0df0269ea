"""Probabilities and their reasons on the page, in a real browser, over the real application."""

from playwright.sync_api import Locator, Page, expect
from support.chromium import needs_chromium
from support.page_actions import Console, articles, button, expect_focus, expect_lists, take
from support.running_endpoint import ask
from support.small_endpoint import LocalEngine

from l2d_ray.serve.engine import UnavailableError

pytest_plugins = ["support.page_fixtures"]
pytestmark = needs_chromium
READ_WIDTHS = (
    "bars => bars.map(bar => bar.getBoundingClientRect().width / bar.parentElement.getBoundingClientRect().width)"
)
"""Script that reads the filled shares of bars."""


def items(page: Page) -> Locator:
    """Return the items of the list with probabilities."""
    return articles(page).first.locator(".items > li")


def reasons(page: Page) -> Locator:
    return page.locator(".reasons")


def test_probabilities_are_bars_of_their_length(page: Page, url: str) -> None:
    take(page, "title 3")
    expect(items(page)).to_have_count(10)
    widths = items(page).locator(".bar span").evaluate_all(READ_WIDTHS)
    answer = ask(url, "/v1/recommend", {"history": ["i3"], "k": 10, "aggregation": "posterior"})[1]
    probabilities = [item["probability"] for item in answer["items"]]
    for width, probability in zip(widths, probabilities, strict=True):
        assert abs(width - probability / probabilities[0]) < 0.02
    expect(articles(page).nth(1).locator(".bar")).to_have_count(0)  # 1 / distance is no probability


def test_the_keyboard_opens_and_closes_the_reasons_for_an_item(page: Page, url: str) -> None:
    for title in ("title 20", "title 21"):
        take(page, title)
    expect_lists(page, url, ["i20", "i21"])
    title = items(page).first.locator("bdi").inner_text()
    why = button(page, f"Why {title}?")
    why.focus()
    page.keyboard.press("Enter")
    expect_focus(why)
    expect(why).to_have_attribute("aria-expanded", "true")
    expect(reasons(page).get_by_role("heading")).to_have_text(
        [
            f"Why {title}?",
            "It often came after items of this history",
            "The most similar sequences of the training data",
        ]
    )
    history = ["i20", "i21"]
    answer = ask(url, "/v1/recommend", {"history": history, "k": 1, "aggregation": "posterior", "explain": True})[1]
    explanation = answer["items"][0]["explanation"]
    for sequence in explanation["sequences"]:
        expect(reasons(page)).to_contain_text(" → ".join([*sequence, title]))
    expect(reasons(page)).to_contain_text(f"after {explanation['after'][0]['title']}, ")
    expect(reasons(page).locator("dd.total")).to_have_text(items(page).first.locator(".score").inner_text())
    for key in ("Enter", "Escape"):
        page.keyboard.press(key)
        expect(reasons(page)).to_have_count(0)
        expect(why).to_have_attribute("aria-expanded", "false")
        expect_focus(why)
        page.keyboard.press("Enter")
        expect(reasons(page)).to_have_count(1)


def test_reasons_close_when_others_open_and_when_the_history_changes(page: Page, url: str) -> None:
    take(page, "title 20")
    expect_lists(page, url, ["i20"])
    first, second = (items(page).nth(number).locator(".why") for number in (0, 1))
    first.click()
    expect(items(page).nth(0).locator(".reasons dl")).to_be_visible()
    second.click()
    expect(items(page).nth(1).locator(".reasons dl")).to_be_visible()
    expect(reasons(page)).to_have_count(1)
    expect(first).to_have_attribute("aria-expanded", "false")
    take(page, "title 21")
    expect(reasons(page)).to_have_count(0)


def test_reasons_that_fail_are_asked_for_again(page: Page, page_engine: LocalEngine, console: Console) -> None:
    console.expects_failed_requests = True
    take(page, "title 20")
    expect(items(page)).to_have_count(10)
    page_engine.failure = UnavailableError("the model is unavailable; try again later")
    items(page).first.locator(".why").click()
    expect(page.get_by_role("alert")).to_contain_text("the model is unavailable")
    expect(items(page)).to_have_count(10)
    page_engine.failure = None
    button(page, "Try again").click()
    expect(reasons(page).locator("dl")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_an_item_is_marked_in_every_list(page: Page) -> None:
    take(page, "title 20")
    expect(items(page)).to_have_count(10)
    items(page).first.locator(".why").focus()
    title = items(page).first.locator("bdi").inner_text()
    others = page.locator(".items > li.same bdi").all_inner_texts()
    assert set(others) <= {title}
    assert len(others) == page.locator(".items > li", has_text=title).count() - 1
