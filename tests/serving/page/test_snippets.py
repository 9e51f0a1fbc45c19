"""The code that the page shows is run, and gives what the page shows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Opened = Callable[..., Any]

KEY = "open-sesame"


def _copied(seen: Any, tab: str) -> str:
    """Code as the clipboard has it after pressing Copy."""
    seen.page.get_by_role("tab", name=tab).click()
    seen.page.get_by_role("button", name="Copy").click()
    seen.page.get_by_role("button", name="Copied").wait_for()
    assert seen.page.inner_text("#status") == "Copied."
    text: str = seen.page.evaluate("navigator.clipboard.readText()")
    seen.page.get_by_role("button", name="Copy", exact=True).wait_for()
    return text


def _run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "MIMRAY_API_KEY": KEY, "no_proxy": "*"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("locked", [False, True])
def test_code__runs(
    locked: bool, site: str, locked_site: str, visit: Opened, tmp_path: Path
) -> None:
    fragment = "#model=alpha&layer=1&norm=false&size=keep:96,128"
    seen = visit(locked_site if locked else site, fragment=fragment)
    if locked:
        seen.page.wait_for_selector("#key-dialog[open]")
        seen.page.locator("#key-input").fill(KEY)
        seen.page.keyboard.press("Enter")
        seen.page.wait_for_function("() => !document.querySelector('#model-a').disabled")
    seen.choose("valley")

    _run(["bash", "-c", _copied(seen, "curl")], tmp_path)
    with np.load(tmp_path / "features.npz") as found:
        assert found["layer_1"].shape == (1, 64, 6, 8)
        assert found["layer_1"].dtype == np.float16
    assert (tmp_path / "valley.jpg").is_file()  # the first line fetches the sample

    python, triton = _copied(seen, "Python"), _copied(seen, "tritonclient")
    assert "(64, 6, 8) (6, 8)" in _run([sys.executable, "-c", python], tmp_path)
    assert "(1, 64, 6, 8)" in _run([sys.executable, "-c", triton], tmp_path)
    assert KEY not in python + triton


def test_code__is_of_the_column_asked_for(site: str, visit: Opened) -> None:
    seen = visit(site, fragment="#model=alpha&with=beta&with_layer=0")
    seen.choose(columns=2)
    seen.page.locator("#which").select_option("1")
    assert seen.page.inner_text("#request .line") == (
        "/v1/features?model=beta&layers=0&dtype=float16"
    )
    assert "model=beta&layers=0" in seen.page.inner_text("#code")
    seen.page.get_by_role("tab", name="curl").focus()
    seen.page.keyboard.press("ArrowRight")
    assert seen.page.evaluate("document.activeElement.textContent") == "Python"
    assert 'client.features("still-life.jpg", "beta", layers=[0]' in seen.page.inner_text("#code")


def test_code__without_a_clipboard_is_selected(site: str, visit: Opened) -> None:
    seen = visit(site)
    seen.choose()
    # As on http:// anywhere but on the own machine.
    seen.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    seen.page.get_by_role("button", name="Copy").click()
    assert "Selected" in seen.page.inner_text(".told")
    assert seen.page.evaluate("String(getSelection())").strip() == (
        seen.page.inner_text("#code").strip()
    )
