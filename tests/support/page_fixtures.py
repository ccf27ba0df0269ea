"""Fixtures of the page tests: the page in a real browser, over the real application. Loaded as a pytest plugin."""

import copy
from collections.abc import Iterator

import pyarrow as pa
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from l2d_ray.serve.catalogue import ItemCatalogue
from l2d_ray.serve.explanations import Explainer
from l2d_ray.workspace import Workspace
from support.chromium import CHROMIUM
from support.live_endpoint import LIMITS, application, listening
from support.page_actions import MILLISECONDS, ODD_TITLES, Console
from support.small_endpoint import LocalEngine


@pytest.fixture(scope="session")
def page_engine(engine: LocalEngine) -> LocalEngine:
    """Return the engine with some odd titles."""
    titles = [ODD_TITLES.get(number, title) for number, title in enumerate(engine.catalogue.titles)]
    odd = copy.copy(engine)
    odd.catalogue = ItemCatalogue(pa.table({"item_id": engine.catalogue.ids, "title": titles}))
    odd.explainer = Explainer(Workspace.open(engine.config.workspace), engine.dataset, odd.catalogue.ids, titles)
    return odd


@pytest.fixture(scope="session")
def url(page_engine: LocalEngine) -> Iterator[str]:
    """Yield the URL of an endpoint without beam search."""
    with listening(application(page_engine)) as url:
        yield url


@pytest.fixture(scope="session")
def beams_url(page_engine: LocalEngine) -> Iterator[str]:
    """Yield the URL of an endpoint that offers beam search while `page_engine.beams` is set."""
    with listening(application(page_engine, LIMITS.model_copy(update={"beams": 4}))) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield a browser. Playwright keeps an event loop running in this thread, so it must end before other modules."""
    expect.set_options(timeout=MILLISECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def console() -> Console:
    return Console()


@pytest.fixture(params=[pytest.param(1280, id="desktop"), pytest.param(360, id="phone", marks=pytest.mark.slow)])
def page(
    browser: Browser, url: str, page_engine: LocalEngine, console: Console, request: pytest.FixtureRequest
) -> Iterator[Page]:
    """Yield the page, freshly opened, in two widths. A test must not scroll it sideways or leave an error."""
    page_engine.reset()
    context = browser.new_context(viewport={"width": request.param, "height": 740})
    context.set_default_timeout(MILLISECONDS)
    page = context.new_page()
    page.on("console", console.add)
    page.on("pageerror", lambda error: console.messages.append(str(error)))
    page.goto(url)
    expect(page.locator("#served")).to_contain_text("30 items")
    yield page
    page.unroute_all(behavior="ignoreErrors")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert console.unexpected() == []
    context.close()
