"""The page for every eye, hand and screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Opened = Callable[..., Any]

# Each run of text with its colour and the first opaque colour beneath it.
_CONTRASTS = """() => {
  const parts = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (element.closest('option, noscript, .skip, .sr-only')) continue;
    let under = element, back = [];
    for (; under; under = under.parentElement) {
      back = parts(getComputedStyle(under).backgroundColor);
      if (back.length === 3 || back[3] === 1) break;
    }
    const [a, b] = [light(parts(getComputedStyle(element).color)), light(back)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    found.push([element.textContent.trim().slice(0, 30), ratio]);
  }
  return found; }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280, 1920])
def test_layout__never_scrolls_sideways(site: str, visit: Opened, scheme: str, width: int) -> None:
    seen = visit(site, width=width, scheme=scheme)
    measure = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
    assert seen.page.evaluate(measure) <= width
    seen.choose()
    assert seen.page.evaluate(measure) <= width
    seen.page.evaluate("location.hash = '#with=painter'")
    seen.ready(2)
    assert seen.page.evaluate(measure) <= width
    assert seen.wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast__is_enough_for_every_text(site: str, visit: Opened, scheme: str) -> None:
    seen = visit(site, scheme=scheme, fragment="#model=painter&with=beta")
    first = seen.page.evaluate(_CONTRASTS)
    seen.choose(columns=2)
    seen.page.wait_for_selector(".reconstructed img")
    seen.page.wait_for_selector(".findings figure")
    seen.page.mouse.move(5, 5)
    found = first + seen.page.evaluate(_CONTRASTS)
    assert len(found) > 60
    assert [entry for entry in found if entry[1] < 4.5] == []


def test_names__everything_has_one(site: str, visit: Opened) -> None:
    seen = visit(site, fragment="#model=painter&with=beta")
    seen.choose(columns=2)
    nameless = seen.page.evaluate(
        """() => [...document.querySelectorAll(
             'button, input, select, a, [role=grid], [role=group], [role=tablist], dialog,'
             + 'section')]
           .filter(e => !(e.getAttribute('aria-label')
             || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent.trim()
             || [...e.labels ?? []].some(label => label.textContent.trim())
             || (['BUTTON', 'A'].includes(e.tagName) && e.textContent.trim())))
           .map(e => e.outerHTML.slice(0, 100))"""
    )
    assert nameless == []
    ids = seen.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(ids)) == len(ids)
    assert seen.page.locator("img:not([alt])").count() == 0
    assert seen.page.evaluate("document.documentElement.lang") == "en"
    assert seen.page.locator("h1").count() == 1
    assert seen.page.locator("main").count() == 1
    assert seen.page.locator("[aria-live=polite]").count() == 1


def test_theme__follows_the_system_unless_told(site: str, visit: Opened) -> None:
    page = visit(site, scheme="dark").page
    back = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(back)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(back)
    assert light != dark
    page.locator("#theme").click()
    assert page.inner_text("#theme") == "Theme: light"
    page.locator("#theme").click()
    assert page.evaluate(back) == dark
    page.reload()
    assert page.evaluate(back) == dark
    assert page.inner_text("#theme") == "Theme: dark"


def test_motion__rests_where_it_is_not_wanted(site: str, visit: Opened) -> None:
    moving = """() => [...document.querySelectorAll('*')].filter(e => {
        const style = getComputedStyle(e);
        return style.animationName !== 'none' || parseFloat(style.transitionDuration) > 0;
      }).length"""
    assert visit(site).page.evaluate(moving) > 0
    assert visit(site, reduced_motion="reduce").page.evaluate(moving) == 0


def test_phone__a_tap_chooses_and_settings_fold(site: str, visit: Opened) -> None:
    seen = visit(site, width=360)
    assert not seen.page.locator("#model-a").is_visible()
    seen.page.locator("summary").tap()
    assert seen.page.locator("#model-a").is_visible()
    seen.page.locator(".gallery [data-sample=cells]").tap()
    seen.ready()
    frame = seen.page.locator(".model .frame").first
    box = frame.bounding_box()
    assert box["width"] >= 320
    frame.tap(position={"x": box["width"] * 0.9, "y": box["height"] * 0.9})
    assert seen.page.inner_text("#patch-name") == "row 3, column 4"
