"""The page when the endpoint refuses: keys, waiting, problems, silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Opened = Callable[..., Any]

KEY = "open-sesame"


def test_key__is_asked_for_and_stays_out_of_urls(locked_site: str, visit: Opened) -> None:
    seen = visit(locked_site)
    page = seen.page
    page.wait_for_selector("#key-dialog[open]")
    assert page.evaluate("document.activeElement.id") == "key-input"
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.querySelector('#key-title').textContent === 'That key was refused'"
    )
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    page.wait_for_function("() => !document.querySelector('#model-a').disabled")
    seen.choose()
    assert KEY not in page.url
    assert not any(KEY in line for line in seen.asked)
    assert page.evaluate("Object.values(sessionStorage)") == [KEY]
    assert page.evaluate("Object.values(localStorage)") == []
    assert "$MIMRAY_API_KEY" in page.inner_text("#code")
    assert KEY not in page.content()
    page.reload()
    page.wait_for_function("() => !document.querySelector('#model-a').disabled")
    page.get_by_role("button", name="Forget key").click()
    assert page.evaluate("sessionStorage.length") == 0
    # Chromium itself writes of each 401 on the console; nothing else went wrong.
    assert all("401" in line for line in seen.wrong)


def test_key__not_given_is_no_dead_end(locked_site: str, visit: Opened) -> None:
    page = visit(locked_site).page
    page.wait_for_selector("#key-dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#notice:visible")
    page.locator("#notice").get_by_role("button", name="Try again").click()
    page.wait_for_selector("#key-dialog[open]")


def test_busy__waits_as_long_as_it_is_told(site: str, visit: Opened) -> None:
    seen = visit(site)
    refusals = [503, 429]

    def busy(route: Any) -> None:
        if refusals:
            headers = {"Retry-After": "1", "Content-Type": "application/problem+json"}
            route.fulfill(status=refusals.pop(), headers=headers, body='{"detail": "queue full"}')
        else:
            route.continue_()

    seen.page.route("**/v1/features?*", busy)
    seen.page.locator(".gallery [data-sample=fields]").click()
    seen.page.wait_for_function(
        """() => document.querySelector('.model .facts')?.textContent ===
             'The server is busy; trying again in 1 s'"""
    )
    seen.ready()
    assert not refusals
    assert len(seen.features()) == 3


def test_problem__is_told_in_the_endpoints_words(
    site: str, visit: Opened, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    seen = visit(site)
    page = seen.page
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture(1)[:60])
    page.set_input_files("#file", broken)
    alert = page.locator(".model [role=alert]")
    alert.wait_for(state="visible")
    assert "Try another picture" in alert.inner_text()
    assert page.locator(".model").get_attribute("data-state") == "failed"
    seen.choose()  # and a good one mends it
    assert not alert.is_visible()
    page.evaluate("location.hash = '#size=17'")
    alert.wait_for(state="visible")
    assert "multiple of" in alert.inner_text()
    assert "16" in alert.inner_text()


def test_file__that_is_no_picture_is_not_sent(site: str, visit: Opened, tmp_path: Path) -> None:
    seen = visit(site)
    note = tmp_path / "note.txt"
    note.write_text("hello")
    seen.page.set_input_files("#file", note)
    seen.page.wait_for_selector("#notice:visible")
    assert "note.txt is not a picture" in seen.page.inner_text("#notice")
    assert not seen.features()


def test_silence__can_be_tried_again(site: str, visit: Opened) -> None:
    seen = visit(site)
    seen.page.wait_for_function("() => !document.querySelector('#model-a').disabled")
    seen.page.route("**/v1/features?*", lambda route: route.abort())
    seen.page.locator(".gallery [data-sample=fields]").click()
    alert = seen.page.locator(".model [role=alert]")
    alert.wait_for(state="visible")
    assert "did not answer" in alert.inner_text()
    seen.page.unroute("**/v1/features?*")
    alert.get_by_role("button", name="Try again").click()
    seen.ready()


def test_answers__that_come_late_are_not_shown(site: str, visit: Opened) -> None:
    seen = visit(site)
    held: list[Any] = []
    seen.page.route("**/v1/features?*layers=2*", lambda route: held.append(route))
    seen.page.locator(".gallery [data-sample=fields]").click()
    seen.page.wait_for_function(
        "() => document.querySelector('.model')?.dataset.state === 'waiting'"
    )
    seen.page.get_by_role("button", name="Layer 0").click()
    seen.page.wait_for_function("() => document.querySelector('.tag')?.textContent === 'layer 0'")
    seen.ready()
    assert len(held) == 1  # given up by the page
    assert seen.page.locator(".model .tag").inner_text() == "layer 0"


def test_model__that_is_not_ready_yet(site: str, visit: Opened) -> None:
    seen = visit(site)
    entry = '{"id": "late", "object": "model", "created": 0, "owned_by": "mimray", "ready": false}'
    seen.page.route(
        "**/v1/models", lambda route: route.fulfill(body=f'{{"object": "list", "data": [{entry}]}}')
    )
    seen.page.reload()
    seen.page.wait_for_function("() => !document.querySelector('#model-a').disabled")
    assert seen.page.locator("#model-a").inner_text() == "late (not ready)"
    seen.page.locator(".gallery [data-sample=fields]").click()
    seen.page.unroute("**/v1/models")
    seen.page.wait_for_function("() => document.querySelector('#model-a').value === 'alpha'")
    seen.ready()
    assert seen.wrong == []
