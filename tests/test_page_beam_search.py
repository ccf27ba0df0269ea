"""Constrained beam search on the page, in a real browser, over the real application."""

from playwright.sync_api import Page, expect
from support.chromium import needs_chromium
from support.page_actions import (
    LISTS,
    Console,
    articles,
    beam_search,
    button,
    expect_beam_list,
    expect_lists,
    hold,
    open_with_beams,
    set_results,
    take,
)
from support.running_endpoint import ask
from support.small_endpoint import LocalEngine

from l2d_ray.serve.engine import UnavailableError

pytest_plugins = ["support.page_fixtures"]
pytestmark = needs_chromium


def seconds_in(text: str) -> float:
    return float(text.partition(" s")[0])


def test_l2d_does_not_wait_for_beam_search(page: Page, beams_url: str, page_engine: LocalEngine) -> None:
    open_with_beams(page, page_engine, beams_url)
    expect(beam_search(page)).to_be_hidden()
    progress, clock = beam_search(page).get_by_role("status"), beam_search(page).get_by_role("timer")
    with hold(page, "**/v1/beam_search"):
        take(page, "title 3")
        expect_lists(page, beams_url, ["i3"])
        expect(progress).to_have_text("generating titles …")
        expect(beam_search(page).get_by_role("listitem")).to_have_count(0)
        expect(clock).to_have_attribute("aria-live", "off")
        early = seconds_in(clock.inner_text())
        expect(clock).not_to_have_text(f"{early:.1f} s")
        late = seconds_in(clock.inner_text())
        assert early < late
        expect(progress).to_have_text("generating titles …")  # screen readers are not told what the clock shows
    expect_beam_list(page, beams_url, ["i3"])
    expect(clock).to_be_empty()
    seconds, factor = seconds_in(progress.inner_text()), float(progress.inner_text().split()[2])
    durations = articles(page).nth(1).locator(".hint").inner_text()
    l2d_ms = float(durations.partition("(in this browser ")[2].removesuffix(" ms)"))
    assert seconds >= late
    shown_to = 0.05 if factor < 10 else 0.5
    least, most = 1000 * (seconds - 0.05) / (l2d_ms + 0.5), 1000 * (seconds + 0.05) / (l2d_ms - 0.5)
    assert least - shown_to <= factor <= most + shown_to
    set_results(page, 3)
    expect(articles(page).get_by_role("listitem")).to_have_count(3 * len([*LISTS, "beam search"]))


def test_a_new_history_aborts_the_running_search(page: Page, beams_url: str, page_engine: LocalEngine) -> None:
    aborted: list[str] = []
    page.on("requestfailed", lambda request: aborted.append(request.url))
    open_with_beams(page, page_engine, beams_url)
    progress = beam_search(page).get_by_role("status")
    page_engine.beam_delay = 60
    take(page, "title 10")
    expect(progress).to_have_text("generating titles …")
    page.wait_for_timeout(300)
    page_engine.beam_delay = 0.0
    with page.expect_event("requestfailed", lambda request: request.url == f"{beams_url}/v1/beam_search"):
        take(page, "title 11")
    expect_lists(page, beams_url, ["i10", "i11"])
    expect_beam_list(page, beams_url, ["i10", "i11"])
    expect(beam_search(page).get_by_role("timer")).to_be_empty()
    assert [url for url in aborted if "/v1/items" not in url] == [f"{beams_url}/v1/beam_search"]
    page_engine.beam_delay = 1.5
    button(page, "Remove Title 10 of the year").click()
    expect(progress).to_have_text("generating titles …")
    button(page, "Clear all").click()
    expect(articles(page)).to_have_count(0)
    page.wait_for_timeout(1500)
    expect(articles(page)).to_have_count(0)


def test_a_failed_beam_search_leaves_the_lists_of_l2d(
    page: Page, beams_url: str, page_engine: LocalEngine, console: Console
) -> None:
    console.expects_failed_requests = True
    alert = page.get_by_role("alert")
    open_with_beams(page, page_engine, beams_url)
    page_engine.beam_failure = UnavailableError("it is unavailable; try again later")
    take(page, "title 3")
    expect(alert).to_contain_text("Constrained beam search: it is unavailable; try again later")
    expect_lists(page, beams_url, ["i3"])
    expect(beam_search(page)).to_be_hidden()
    page_engine.beam_failure = None
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url.rpartition("/")[2]))
    button(page, "Try again").click()
    expect_beam_list(page, beams_url, ["i3"])
    expect(alert).to_be_hidden()
    assert requested == ["beam_search"]
    page_engine.failure = UnavailableError("the model is unavailable; try again later")
    take(page, "title 4")
    expect(alert).to_contain_text("the model is unavailable")
    expect(articles(page)).to_have_count(0)


def test_the_lists_start_as_soon_as_the_server_has_told_its_aggregations(
    page: Page, beams_url: str, page_engine: LocalEngine
) -> None:
    page_engine.beams = 4
    with hold(page, "**/v1/status"):
        page.goto(beams_url)
        take(page, "title 3")
        page.wait_for_timeout(300)
        expect(articles(page)).to_have_count(0)
    expect_lists(page, beams_url, ["i3"])
    expect_beam_list(page, beams_url, ["i3"])


def test_beam_search_is_not_requested_if_it_is_not_offered(page: Page, url: str, page_engine: LocalEngine) -> None:
    take(page, "title 3")
    expect_lists(page, url, ["i3"])
    page.wait_for_timeout(300)
    expect(articles(page)).to_have_count(len(LISTS))
    assert page_engine.beam_searches == 0
    assert ask(url, "/v1/beam_search", {"history": ["i3"]})[0] == 404
