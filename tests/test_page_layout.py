"""Layout and contrast of the page, in a real browser."""

import pytest
from playwright.sync_api import Page, expect
from support.chromium import needs_chromium
from support.page_actions import LISTS, articles, choice, found, open_with_beams, search_field, take
from support.small_endpoint import LocalEngine

pytest_plugins = ["support.page_fixtures"]
pytestmark = needs_chromium
READ_COLOURS = """control => {
  const style = getComputedStyle(control), probe = document.body.appendChild(document.createElement("canvas"));
  probe.style.background = "Canvas";
  const page = getComputedStyle(probe).backgroundColor, context = probe.getContext("2d", { willReadFrequently: true });
  probe.remove();
  return [[page], [page, style.backgroundColor, style.borderTopColor]].map((layers) => {
    for (const layer of layers) { context.fillStyle = layer; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  });
}"""
"""Script that reads the colour of the page, and the colour of a control's border on it."""


def luminance(colour: list[int]) -> float:
    """Return the relative luminance as WCAG 2.2 defines it."""
    shares = [value / 255 for value in colour]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page", [1280, 360], ids=["desktop", "phone"], indirect=True)
def test_every_control_fits_the_width_and_has_a_name(page: Page, beams_url: str, page_engine: LocalEngine) -> None:
    page_engine.offer("most-popular")
    open_with_beams(page, page_engine, beams_url)
    take(page, "title 1")
    expect(articles(page)).to_have_count(len([*LISTS, "beam search", "most-popular"]))
    search_field(page).fill("title")
    expect(found(page)).to_have_count(9)
    width = page.viewport_size["width"] if page.viewport_size else 0
    for control in page.locator("a, input:visible, select:visible, button:visible, article").all():
        box = control.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        if control.evaluate("control => control.matches('button')"):
            assert min(box["width"], box["height"]) >= 24
        control.scroll_into_view_if_needed()
    names = page.locator("input, select, button").evaluate_all(
        "controls => controls.map(control => control.ariaLabel || control.labels[0]?.innerText || control.innerText)"
    )
    assert all(name.strip() for name in names)


def test_fields_contrast_with_the_page(page: Page, url: str, page_engine: LocalEngine) -> None:
    page_engine.offer("most-popular")
    page.goto(url)
    expect(choice(page, "most-popular")).to_be_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for field in page.locator("input:visible, select:visible").all():
            darker, lighter = sorted(map(luminance, field.evaluate(READ_COLOURS)))
            assert (lighter + 0.05) / (darker + 0.05) >= 3, scheme
