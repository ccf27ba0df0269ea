"""The page in a real browser, over the real application, as a user has it."""

import shutil
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright
from support.live_endpoint import LIMITS, application, listening
from support.running_endpoint import ask
from support.small_endpoint import LocalEngine

from l2d_ray.serve.catalogue import Catalogue
from l2d_ray.serve.engine import UnavailableError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCRIPT = "<img src=x onerror=\"document.title='owned'\">"
ODD = {7: SCRIPT, 8: "W" * 150, 9: "Film\u202eback"}
KEY = "s3crét七"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def url(engine: LocalEngine) -> Iterator[str]:
    """The address of an endpoint some of whose titles are odd."""
    titles = [ODD.get(number, title) for number, title in enumerate(engine.catalogue.titles)]
    engine.catalogue = Catalogue(pa.table({"item_id": engine.catalogue.ids, "title": titles}))
    with listening(application(engine)) as address:
        yield address


@pytest.fixture(scope="module")
def beams_url(url: str, engine: LocalEngine) -> Iterator[str]:
    """The same endpoint with constrained beam search beside it; `with_beams` has the engine say so."""
    with listening(application(engine, LIMITS.model_copy(update={"beams": 4}))) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser's console said that is not info, apart from statuses: a test empties it where it expects any."""
    return []


@pytest.fixture(params=[1280, 360], ids=["desktop", "phone"])
def page(
    browser: Browser, url: str, engine: LocalEngine, complaints: list[str], request: pytest.FixtureRequest
) -> Iterator[Page]:
    """The page, freshly opened, in two widths; no test may leave an error in the console or scroll sideways."""
    engine.failure, engine.delay = None, 0.0
    engine.beams, engine.beam_failure, engine.beam_delay, engine.searches = None, None, 0.0, 0
    context = browser.new_context(viewport={"width": request.param, "height": 740})
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    expect(page.locator("#served")).to_contain_text("30 items")
    yield page
    page.unroute_all(behavior="ignoreErrors")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert complaints == []
    context.close()


def search(page: Page) -> Locator:
    return page.get_by_label("Search titles")


def found(page: Page) -> Locator:
    return page.get_by_role("list", name="Titles found").get_by_role("listitem")


def history(page: Page) -> Locator:
    return page.get_by_role("list", name="Items in time order").locator("bdi")


def take(page: Page, text: str) -> None:
    search(page).fill(text)
    search(page).press("Enter")
    expect(search(page)).to_have_value("")


def focused(page: Page) -> str:
    """The accessible name or the id of what has the focus, which is visible."""
    name, style = page.evaluate(
        "[document.activeElement.ariaLabel || document.activeElement.id, getComputedStyle(document.activeElement)"
        ".outlineStyle]"
    )
    assert style == "solid", f"{name} does not show that it has the focus"
    return str(name)


def lines(card: Locator) -> list[tuple[str, str]]:
    """Titles and scores of one list."""
    return [
        (line.locator("bdi").inner_text(), line.locator(".score").inner_text())
        for line in card.get_by_role("listitem").all()
    ]


def lists(page: Page) -> dict[str, list[tuple[str, str]]]:
    """Titles and scores of L2D under each heading."""
    return {
        card.get_by_role("heading").inner_text()[:5]: lines(card)
        for card in page.locator("#lists").get_by_role("article").all()
    }


def expected(url: str, items: list[Any], k: int = 10) -> dict[str, list[tuple[str, str]]]:
    """The same from the interface."""
    answers = {}
    for name, aggregation in (("L2D-L", "local"), ("L2D-G", "global")):
        request = {"history": items, "k": k, "aggregation": aggregation}
        status, answer = ask(url, "/v1/recommend", request)
        assert status == 200
        answers[name] = [(item["title"], pytest.approx(item["score"], rel=1e-3)) for item in answer["items"]]
    return answers


def expect_lists(page: Page, url: str, items: list[Any], k: int = 10) -> None:
    expect(page.locator("#lists").get_by_role("article")).to_have_count(2)
    expect(page.locator("#lists[aria-busy]")).to_have_count(0)
    shown = {name: [(title, float(score)) for title, score in lines] for name, lines in lists(page).items()}
    assert shown == expected(url, items, k)


def test_titles_are_found_chosen_and_removed_by_the_keyboard_alone(page: Page, url: str) -> None:
    page.keyboard.press("Tab")  # the link to the interface
    page.keyboard.press("Tab")
    assert focused(page) == "search"
    page.keyboard.type("title 2")
    expect(found(page)).to_have_count(9)
    expect(found(page).first).to_have_text("Title 2 of the year")
    expect(found(page).last).to_have_text("“title 2” as it is")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert focused(page) == "Add Title 20 of the year"
    page.keyboard.press("Enter")
    expect(history(page)).to_have_text(["Title 20 of the year"])
    assert focused(page) == "search"
    page.keyboard.type("TÍTLE 5")
    expect(found(page).first).to_have_text("Title 5 of the year")
    page.keyboard.press("ArrowDown")
    assert focused(page) == "Add Title 5 of the year"
    page.keyboard.press("ArrowUp")
    assert focused(page) == "search"
    page.keyboard.press("Enter")
    expect(history(page)).to_have_text(["Title 20 of the year", "Title 5 of the year"])
    expect(found(page)).to_have_count(0)
    expect_lists(page, url, ["i20", "i5"])
    page.keyboard.press("Tab")
    assert focused(page) == "Remove Title 20 of the year"
    page.keyboard.press("Enter")
    expect(history(page)).to_have_text(["Title 5 of the year"])
    expect_lists(page, url, ["i5"])
    assert focused(page) == "Remove Title 5 of the year"
    page.keyboard.press("Enter")
    expect(page.get_by_role("article")).to_have_count(0)
    assert focused(page) == "search"


def test_the_focus_stays_where_it_was_when_what_had_it_is_gone(
    page: Page, engine: LocalEngine, complaints: list[str]
) -> None:
    search(page).fill("title 2")
    expect(found(page)).to_have_count(9)
    search(page).press_sequentially("9")
    page.keyboard.press("ArrowDown")  # before the new titles are there
    assert focused(page) == "Add Title 2 of the year"
    expect(found(page)).to_have_count(2)
    assert focused(page) == "Add Title 29 of the year"
    page.keyboard.press("ArrowUp")
    assert focused(page) == "search"
    engine.failure = UnavailableError("the model is away; come again later")
    page.keyboard.press("Enter")
    again = page.get_by_role("button", name="Try again")
    again.focus()
    engine.failure = None
    page.keyboard.press("Enter")
    expect(again).to_be_hidden()
    assert focused(page) == "search"
    complaints.clear()


def test_an_answer_that_breaks_off_is_none(page: Page, url: str) -> None:
    take(page, "title 3")
    expect_lists(page, url, ["i3"])
    page.route("**/v1/recommend", lambda route: route.fulfill(status=200, body='{"items": ['))
    take(page, "title 4")
    expect(page.get_by_role("alert")).to_contain_text("The server's answer broke off.")
    expect(page.get_by_role("article")).to_have_count(0)
    page.unroute("**/v1/recommend")
    page.get_by_role("button", name="Try again").click()
    expect_lists(page, url, ["i3", "i4"])


def test_titles_are_chosen_and_removed_by_the_mouse(page: Page, url: str) -> None:
    for text, choice in (("title 11", "Add Title 11 of the year"), ("12", "Add Title 12 of the year")):
        search(page).press_sequentially(text)
        page.get_by_role("button", name=choice).click()
    expect(history(page)).to_have_text(["Title 11 of the year", "Title 12 of the year"])
    expect_lists(page, url, ["i11", "i12"])
    page.get_by_label("Results").fill("3")
    page.get_by_label("Results").press("Enter")
    expect(page.get_by_role("article").get_by_role("listitem")).to_have_count(6)
    expect_lists(page, url, ["i11", "i12"], k=3)
    for hint in page.get_by_role("article").locator(".hint").all():
        assert hint.inner_text().startswith("model ")
        assert "ms (here" in hint.inner_text()
    page.get_by_role("button", name="Remove Title 11 of the year").click()
    expect_lists(page, url, ["i12"], k=3)
    page.get_by_role("button", name="Clear all").click()
    expect(history(page)).to_have_count(0)
    expect(page.get_by_text("They appear here once")).to_be_visible()


def test_a_title_that_is_not_found_is_taken_as_text(page: Page, url: str) -> None:
    take(page, "A film of tomorrow")
    expect(history(page)).to_have_text(["A film of tomorrow"])
    expect_lists(page, url, [{"title": "A film of tomorrow"}])
    search(page).press_sequentially("year")  # is in many titles, and may still be meant as it is
    page.get_by_role("button", name="Add “year” as it is").click()
    expect_lists(page, url, [{"title": "A film of tomorrow"}, {"title": "year"}])


def test_a_title_that_is_chosen_while_enter_searches_is_added_alone(page: Page) -> None:
    search(page).fill("title 2")
    expect(found(page)).to_have_count(9)
    held: list[Route] = []
    page.route("**/v1/items*", lambda route: held.append(route))
    with page.expect_request("**/v1/items*"):
        search(page).press("Enter")
    page.get_by_role("button", name="Add Title 20 of the year").click()
    held.pop().continue_()
    page.wait_for_timeout(500)
    expect(history(page)).to_have_text(["Title 20 of the year"])
    expect(found(page)).to_have_count(0)


def test_titles_are_text_whatever_they_hold(page: Page, url: str) -> None:
    for text, title in (("onerror", SCRIPT), ("WWW", ODD[8]), ("film", ODD[9])):
        search(page).fill(text)
        expect(found(page).first).to_have_text(title)
        take(page, text)
    take(page, "<script>document.title='owned'</script>")
    expect(history(page)).to_have_count(4)
    page.get_by_label("Results").fill("100")
    page.get_by_label("Results").press("Enter")
    expect_lists(page, url, ["i7", "i8", "i9", {"title": "<script>document.title='owned'</script>"}], k=100)
    take(page, "title 1")
    page.get_by_role("button", name="Remove <img").click()
    expect(history(page)).to_have_count(4)
    expect(page.get_by_role("article").get_by_text(SCRIPT)).to_have_count(2)
    assert page.title() == "l2d_ray"
    assert page.locator("img, main script").count() == 0


def test_an_error_is_told_and_the_page_goes_on(
    page: Page, url: str, engine: LocalEngine, complaints: list[str]
) -> None:
    take(page, "title 3")
    expect_lists(page, url, ["i3"])
    engine.failure = UnavailableError("the model is away; come again later")
    take(page, "title 4")
    expect(page.get_by_role("alert")).to_contain_text("the model is away; come again later")
    expect(page.get_by_role("article")).to_have_count(0)
    engine.failure = None
    page.get_by_role("button", name="Try again").click()
    expect_lists(page, url, ["i3", "i4"])
    expect(page.get_by_role("alert")).to_be_hidden()
    page.context.set_offline(True)
    take_nothing = search(page)
    take_nothing.fill("title 5")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    page.context.set_offline(False)
    take(page, "title 6")
    expect_lists(page, url, ["i3", "i4", "i6"])
    expect(page.get_by_role("alert")).to_be_hidden()
    assert all(complaint.startswith("Failed to load resource") for complaint in complaints)
    complaints.clear()


def test_a_bad_request_is_told(page: Page, complaints: list[str]) -> None:
    search(page).fill("x" * (LIMITS.max_title_chars + 1))
    expect(page.get_by_role("alert")).to_contain_text("at most 200 characters")
    take(page, "title 5")
    expect(page.get_by_role("alert")).to_be_hidden()
    complaints.clear()


def test_another_release_is_told_with_its_first_answer(
    page: Page, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(page, "title 10")
    expect(page.locator("#shown")).to_have_text("10 recommendations each.")
    expect(page.locator("#served")).to_contain_text("version v,")
    monkeypatch.setattr(engine, "version", "w")
    take(page, "title 11")
    expect(page.locator("#served")).to_contain_text("version w,")


def test_only_the_newest_answer_is_shown(page: Page, url: str, engine: LocalEngine) -> None:
    engine.delay = 1.5
    take(page, "title 10")
    expect(page.locator("#lists")).to_have_attribute("aria-busy", "true")
    page.wait_for_timeout(300)
    engine.delay = 0.0
    take(page, "title 11")
    expect_lists(page, url, ["i10", "i11"])
    page.wait_for_timeout(2000)
    expect_lists(page, url, ["i10", "i11"])


def with_beams(page: Page, engine: LocalEngine, beams_url: str, delay: float = 0.0) -> Locator:
    """Open the page where beam search is offered; gives its list."""
    engine.beams, engine.beam_delay = 4, delay
    page.goto(beams_url)
    expect(page.locator("#served")).to_contain_text("30 items")
    return page.get_by_role("article", name="Constrained beam search, 4 beams")


def seconds_of(text: str) -> float:
    return float(text.partition(" s")[0])


def expect_written(written: Locator, beams_url: str, items: list[Any]) -> None:
    """The list is there, and is that of the interface."""
    expect(written.get_by_role("status")).to_contain_text("the time of L2D-G; scores are log-probabilities")
    status, answer = ask(beams_url, "/v1/beam_search", {"history": items, "k": 10})
    assert status == 200
    assert len(answer["items"]) == 4
    expected = [(item["title"], pytest.approx(item["score"], rel=1e-3)) for item in answer["items"]]
    assert [(title, float(score)) for title, score in lines(written)] == expected
    assert all(item["score"] < 0 for item in answer["items"])


def test_beam_search_writes_beside_l2d_which_does_not_wait_for_it(
    page: Page, beams_url: str, engine: LocalEngine
) -> None:
    delay = 4  # a busy machine takes its time to look
    written = with_beams(page, engine, beams_url, delay=delay)
    expect(written).to_be_hidden()
    take(page, "title 3")
    expect_lists(page, beams_url, ["i3"])
    progress, clock = written.get_by_role("status"), written.get_by_role("timer")
    expect(progress).to_have_text("writing titles …")
    expect(written.get_by_role("listitem")).to_have_count(0)
    expect(clock).to_have_attribute("aria-live", "off")
    early = seconds_of(clock.inner_text())
    page.wait_for_timeout(400)
    assert early < seconds_of(clock.inner_text()) < delay
    expect(progress).to_have_text("writing titles …")  # what ticks is not announced
    expect_written(written, beams_url, ["i3"])
    expect(clock).to_be_empty()
    seconds, times = seconds_of(progress.inner_text()), float(progress.inner_text().split()[2])
    hint = page.get_by_role("article").first.locator(".hint").inner_text()
    assert delay <= seconds < 10
    assert times == pytest.approx(1000 * seconds / float(hint.partition("(here ")[2].removesuffix(" ms)")), rel=0.1)
    engine.beam_delay = 0.0
    page.get_by_label("Results").fill("3")
    page.get_by_label("Results").press("Enter")
    expect(page.get_by_role("article").get_by_role("listitem")).to_have_count(9)


def test_a_newer_history_drops_what_is_being_written(page: Page, beams_url: str, engine: LocalEngine) -> None:
    dropped: list[str] = []
    page.on("requestfailed", lambda request: dropped.append(request.url))
    written = with_beams(page, engine, beams_url, delay=60)
    take(page, "title 10")
    expect(written.get_by_role("status")).to_have_text("writing titles …")
    page.wait_for_timeout(300)
    engine.beam_delay = 0.0
    take(page, "title 11")
    expect_lists(page, beams_url, ["i10", "i11"])
    expect_written(written, beams_url, ["i10", "i11"])
    expect(written.get_by_role("timer")).to_be_empty()
    assert [url for url in dropped if "/v1/items" not in url] == [f"{beams_url}/v1/beam_search"]
    engine.beam_delay = 1.5
    page.get_by_role("button", name="Remove Title 10 of the year").click()
    expect(written.get_by_role("status")).to_have_text("writing titles …")
    page.get_by_role("button", name="Clear all").click()
    expect(page.get_by_role("article")).to_have_count(0)
    page.wait_for_timeout(1500)
    expect(page.get_by_role("article")).to_have_count(0)


def test_beam_search_that_fails_takes_no_list_of_l2d_along(
    page: Page, beams_url: str, engine: LocalEngine, complaints: list[str]
) -> None:
    written = with_beams(page, engine, beams_url)
    engine.beam_failure = UnavailableError("it is away; come again later")
    take(page, "title 3")
    expect(page.get_by_role("alert")).to_contain_text("Constrained beam search: it is away; come again later")
    expect_lists(page, beams_url, ["i3"])
    expect(written).to_be_hidden()
    engine.beam_failure = None
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    page.get_by_role("button", name="Try again").click()
    expect_written(written, beams_url, ["i3"])
    expect(page.get_by_role("alert")).to_be_hidden()
    assert asked == ["beam_search"]
    engine.failure = UnavailableError("the model is away; come again later")
    take(page, "title 4")
    expect(page.get_by_role("alert")).to_contain_text("the model is away")
    expect(page.get_by_role("article")).to_have_count(0)
    assert all(complaint.startswith("Failed to load resource") for complaint in complaints)
    complaints.clear()


def test_beam_search_is_asked_for_once_it_is_known_to_be_offered(
    page: Page, beams_url: str, engine: LocalEngine
) -> None:
    engine.beams, held = 4, list[Route]()
    page.route("**/v1/status", lambda route: held.append(route))
    page.goto(beams_url)
    take(page, "title 3")
    expect_lists(page, beams_url, ["i3"])
    expect(page.get_by_role("article")).to_have_count(2)
    held.pop().continue_()
    written = page.get_by_role("article", name="Constrained beam search, 4 beams")
    expect_written(written, beams_url, ["i3"])
    expect_lists(page, beams_url, ["i3"])


def test_beam_search_is_not_asked_for_where_it_is_not_offered(page: Page, url: str, engine: LocalEngine) -> None:
    take(page, "title 3")
    expect_lists(page, url, ["i3"])
    page.wait_for_timeout(300)
    expect(page.get_by_role("article")).to_have_count(2)
    assert engine.searches == 0
    assert ask(url, "/v1/beam_search", {"history": ["i3"]})[0] == 404


def test_everything_is_reachable_on_either_width(page: Page, beams_url: str, engine: LocalEngine) -> None:
    with_beams(page, engine, beams_url)
    take(page, "title 1")
    expect(page.get_by_role("article")).to_have_count(3)
    search(page).fill("title")
    expect(found(page)).to_have_count(9)
    width = page.viewport_size["width"] if page.viewport_size else 0
    for control in page.locator("a, input:visible, button:visible, article").all():
        box = control.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        if control.evaluate("control => control.matches('button')"):
            assert min(box["width"], box["height"]) >= 24
        control.scroll_into_view_if_needed()
    names = page.locator("input, button").evaluate_all(
        "controls => controls.map(control => control.ariaLabel || control.labels[0]?.innerText || control.innerText)"
    )
    assert all(name.strip() for name in names)


CONTROL = """control => {
  const style = getComputedStyle(control), probe = document.body.appendChild(document.createElement("canvas"));
  probe.style.background = "Canvas";
  const page = getComputedStyle(probe).backgroundColor, context = probe.getContext("2d", { willReadFrequently: true });
  probe.remove();
  return [[page], [page, style.backgroundColor, style.borderTopColor]].map((layers) => {
    for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  });
}"""
"""The colour of the page, and that of a control's border on it."""


def luminance(colour: list[int]) -> float:
    """As WCAG 2.2 defines it."""
    shares = [value / 255 for value in colour]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_fields_stand_out(page: Page) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for field in page.locator("input:visible").all():
            darker, lighter = sorted(map(luminance, field.evaluate(CONTROL)))
            assert (lighter + 0.05) / (darker + 0.05) >= 3, scheme


def test_the_interface_is_described_without_another_server(page: Page, url: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.get_by_role("link", name="Interface").click()
    expect(page.locator("#operations-recommend-recommend_batch_v1_recommend_batch_post")).to_be_visible()
    assert [one for one in asked if not one.startswith((url, "data:"))] == []
    page.goto(url)


def test_a_key_is_asked_for_and_used(
    page: Page, engine: LocalEngine, complaints: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(page.get_by_label("Key", exact=True)).to_be_hidden()
    monkeypatch.setenv("PAGE_KEYS", KEY)
    with listening(application(engine, keys="PAGE_KEYS")) as guarded:
        page.goto(guarded)
        key = page.get_by_label("Key", exact=True)
        expect(page.get_by_role("alert")).to_contain_text("A key is needed here")
        key.fill("wrong")
        key.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("This key is not accepted.")
        key.fill(KEY)
        page.get_by_role("button", name="Use").click()
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.locator("#served")).to_contain_text("30 items")
        take(page, "title 5")
        expect(page.get_by_role("article")).to_have_count(2)
        page.goto("about:blank")
    complaints.clear()
