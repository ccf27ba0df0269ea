"""The page in a real browser, over the real application, as a user sees it."""

import pytest
from playwright.sync_api import Page, expect
from support.chromium import needs_chromium
from support.live_endpoint import LIMITS, application, listening
from support.page_actions import (
    LISTS,
    ODD_TITLES,
    SCRIPT,
    Console,
    articles,
    button,
    expect_focus,
    expect_lists,
    found,
    history,
    hold,
    search_field,
    set_results,
    take,
)
from support.small_endpoint import LocalEngine

from l2d_ray.serve.engine import UnavailableError

pytest_plugins = ["support.page_fixtures"]
pytestmark = needs_chromium
KEY = "s3crét七"
UNAVAILABLE = UnavailableError("the model is unavailable; try again later")


def test_the_keyboard_alone_finds_adds_and_removes_titles(page: Page, url: str) -> None:
    page.keyboard.press("Tab")  # the link to the documentation
    page.keyboard.press("Tab")
    expect_focus(search_field(page))
    page.keyboard.type("title 2")
    expect(found(page)).to_have_count(9)
    expect(found(page).first).to_have_text("Title 2 of the year")
    expect(found(page).last).to_have_text("“title 2” as text")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect_focus(button(page, "Add Title 20 of the year"))
    page.keyboard.press("Enter")
    expect(history(page)).to_have_text(["Title 20 of the year"])
    expect_focus(search_field(page))
    page.keyboard.type("TÍTLE 5")
    expect(found(page).first).to_have_text("Title 5 of the year")
    page.keyboard.press("ArrowDown")
    expect_focus(button(page, "Add Title 5 of the year"))
    page.keyboard.press("ArrowUp")
    expect_focus(search_field(page))
    page.keyboard.press("Enter")
    expect(history(page)).to_have_text(["Title 20 of the year", "Title 5 of the year"])
    expect(found(page)).to_have_count(0)
    expect_lists(page, url, ["i20", "i5"])
    page.keyboard.press("Tab")
    expect_focus(button(page, "Remove Title 20 of the year"))
    page.keyboard.press("Enter")
    expect(history(page)).to_have_text(["Title 5 of the year"])
    expect_lists(page, url, ["i5"])
    expect_focus(button(page, "Remove Title 5 of the year"))
    page.keyboard.press("Enter")
    expect(articles(page)).to_have_count(0)
    expect_focus(search_field(page))


def test_the_focus_moves_to_a_neighbour_when_its_control_disappears(
    page: Page, page_engine: LocalEngine, console: Console
) -> None:
    console.expects_failed_requests = True
    search_field(page).fill("title 2")
    expect(found(page)).to_have_count(9)
    with hold(page, "**/v1/items*"):
        with page.expect_request("**/v1/items*"):
            search_field(page).press_sequentially("9")
        page.keyboard.press("ArrowDown")  # before the new titles have arrived
        expect_focus(button(page, "Add Title 2 of the year"))
    expect(found(page)).to_have_count(2)
    expect_focus(button(page, "Add Title 29 of the year"))
    page.keyboard.press("ArrowUp")
    expect_focus(search_field(page))
    page_engine.failure = UNAVAILABLE
    page.keyboard.press("Enter")
    again = button(page, "Try again")
    again.focus()
    page_engine.failure = None
    page.keyboard.press("Enter")
    expect(again).to_be_hidden()
    expect_focus(search_field(page))


def test_a_response_that_is_cut_off_is_reported(page: Page, url: str) -> None:
    take(page, "title 3")
    expect_lists(page, url, ["i3"])
    page.route("**/v1/recommend", lambda route: route.fulfill(status=200, body='{"items": ['))
    take(page, "title 4")
    expect(page.get_by_role("alert")).to_contain_text("The server's response was cut off.")
    expect(articles(page)).to_have_count(0)
    page.unroute("**/v1/recommend")
    button(page, "Try again").click()
    expect_lists(page, url, ["i3", "i4"])


def test_the_mouse_adds_and_removes_titles(page: Page, url: str) -> None:
    for text, choice in (("title 11", "Add Title 11 of the year"), ("12", "Add Title 12 of the year")):
        search_field(page).press_sequentially(text)
        button(page, choice).click()
    expect(history(page)).to_have_text(["Title 11 of the year", "Title 12 of the year"])
    expect_lists(page, url, ["i11", "i12"])
    set_results(page, 3)
    expect(articles(page).get_by_role("listitem")).to_have_count(3 * len(LISTS))
    expect_lists(page, url, ["i11", "i12"], k=3)
    durations = articles(page).locator(".hint")
    expect(durations).to_have_count(len(LISTS))
    for number in range(len(LISTS)):
        expect(durations.nth(number)).to_contain_text("model ")
        expect(durations.nth(number)).to_contain_text("ms (in this browser ")
    button(page, "Remove Title 11 of the year").click()
    expect_lists(page, url, ["i12"], k=3)
    button(page, "Clear all").click()
    expect(history(page)).to_have_count(0)
    expect(page.get_by_text("Add an item to the history")).to_be_visible()


def test_a_title_that_is_not_found_is_added_as_text(page: Page, url: str) -> None:
    take(page, "A film of tomorrow")
    expect(history(page)).to_have_text(["A film of tomorrow"])
    expect_lists(page, url, [{"title": "A film of tomorrow"}])
    search_field(page).press_sequentially("year")  # a word of many titles may be added as text, too
    button(page, "Add “year” as text").click()
    expect_lists(page, url, [{"title": "A film of tomorrow"}, {"title": "year"}])


def test_a_title_clicked_while_enter_searches_is_added_alone(page: Page) -> None:
    search_field(page).fill("title 2")
    expect(found(page)).to_have_count(9)
    with hold(page, "**/v1/items*"):
        with page.expect_request("**/v1/items*"):
            search_field(page).press("Enter")
        button(page, "Add Title 20 of the year").click()
    page.wait_for_timeout(500)
    expect(history(page)).to_have_text(["Title 20 of the year"])
    expect(found(page)).to_have_count(0)


def test_markup_and_control_characters_in_titles_are_shown_as_text(page: Page, url: str) -> None:
    for text, title in (("onerror", SCRIPT), ("WWW", ODD_TITLES[8]), ("film", ODD_TITLES[9])):
        search_field(page).fill(text)
        expect(found(page).first).to_have_text(title)
        take(page, text)
    take(page, "<script>document.title='owned'</script>")
    expect(history(page)).to_have_count(4)
    set_results(page, 100)
    expect_lists(page, url, ["i7", "i8", "i9", {"title": "<script>document.title='owned'</script>"}], k=100)
    take(page, "title 1")
    button(page, "Remove <img").click()
    expect(history(page)).to_have_count(4)
    expect(articles(page).get_by_text(SCRIPT)).to_have_count(len(LISTS))
    expect(page.locator("img, main script")).to_have_count(0)
    expect(page).to_have_title("l2d_ray")


def test_an_error_is_reported_and_the_page_recovers(
    page: Page, url: str, page_engine: LocalEngine, console: Console
) -> None:
    console.expects_failed_requests = True
    alert = page.get_by_role("alert")
    take(page, "title 3")
    expect_lists(page, url, ["i3"])
    page_engine.failure = UNAVAILABLE
    take(page, "title 4")
    expect(alert).to_contain_text(str(UNAVAILABLE))
    expect(articles(page)).to_have_count(0)
    page_engine.failure = None
    button(page, "Try again").click()
    expect_lists(page, url, ["i3", "i4"])
    expect(alert).to_be_hidden()
    page.context.set_offline(True)
    search_field(page).fill("title 5")
    expect(alert).to_contain_text("Cannot reach the server.")
    page.context.set_offline(False)
    take(page, "title 6")
    expect_lists(page, url, ["i3", "i4", "i6"])
    expect(alert).to_be_hidden()


def test_an_invalid_request_is_reported(page: Page, console: Console) -> None:
    console.expects_failed_requests = True
    search_field(page).fill("x" * (LIMITS.max_title_chars + 1))
    expect(page.get_by_role("alert")).to_contain_text("at most 200 characters")
    take(page, "title 5")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_footer_names_a_new_release_after_its_first_answer(
    page: Page, page_engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(page, "title 10")
    expect(page.locator("#shown")).to_have_text("10 recommendations in each list.")
    expect(page.locator("#served")).to_contain_text("version v,")
    monkeypatch.setattr(page_engine, "version", "w")
    take(page, "title 11")
    expect(page.locator("#served")).to_contain_text("version w,")


def test_only_the_newest_answer_is_shown(page: Page, url: str, page_engine: LocalEngine) -> None:
    page_engine.delay = 1.5
    take(page, "title 10")
    expect(page.locator("#lists")).to_have_attribute("aria-busy", "true")
    page.wait_for_timeout(300)
    page_engine.delay = 0.0
    take(page, "title 11")
    expect_lists(page, url, ["i10", "i11"])
    page.wait_for_timeout(2000)
    expect_lists(page, url, ["i10", "i11"])


def test_a_key_is_requested_and_used(
    page: Page, page_engine: LocalEngine, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    console.expects_failed_requests = True
    key, alert = page.get_by_label("Key", exact=True), page.get_by_role("alert")
    expect(key).to_be_hidden()
    monkeypatch.setenv("PAGE_KEYS", KEY)
    with listening(application(page_engine, keys="PAGE_KEYS")) as guarded:
        page.goto(guarded)
        expect(alert).to_contain_text("This server requires a key.")
        key.fill("wrong")
        key.press("Enter")
        expect(alert).to_contain_text("The server does not accept this key.")
        key.fill(KEY)
        button(page, "Use key").click()
        expect(alert).to_be_hidden()
        expect(page.locator("#served")).to_contain_text("30 items")
        take(page, "title 5")
        expect(articles(page)).to_have_count(len(LISTS))
        page.goto("about:blank")


def test_the_documentation_needs_no_other_server(page: Page, url: str) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.get_by_role("link", name="API documentation").click()
    expect(page.locator("#operations-recommend-recommend_batch_v1_recommend_batch_post")).to_be_visible()
    assert [one for one in requested if not one.startswith((url, "data:"))] == []
    page.goto(url)
