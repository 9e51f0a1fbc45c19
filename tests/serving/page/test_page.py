"""The page in a real browser, on a real endpoint: everything it offers, by hand and by key."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Opened = Callable[..., Any]

PAINTER = "painter"

# Colours of a canvas, a number a patch: enough to see that it was drawn, and changed.
_COLOURS = """selector => {
  const canvas = document.querySelector(selector);
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d');
  copy.drawImage(canvas, 0, 0);
  const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
  return [...new Uint32Array(data.buffer)];
}"""
_COMPONENTS = ".model .cell:nth-of-type(1) canvas.map"
_HEAT = ".model .cell:nth-of-type(2) canvas.map"
_FRAMES = ".model .frame"


def _colours(visit: Any, selector: str) -> list[int]:
    found: list[int] = visit.page.evaluate(_COLOURS, selector)
    return found


def _click(visit: Any, frame: Any, row: int, column: int, grid: tuple[int, int]) -> None:
    box = frame.bounding_box()
    x = box["width"] * (column + 0.5) / grid[1]
    y = box["height"] * (row + 0.5) / grid[0]
    frame.click(position={"x": x, "y": y})


def _announced(visit: Any) -> str:
    text: str = visit.page.inner_text("#status")
    return text


def test_page__asks_nothing_of_others_and_complains_of_nothing(site: str, visit: Opened) -> None:
    seen = visit(site)
    seen.page.wait_for_load_state("networkidle")
    assert seen.page.inner_text("h1") == "See what your encoder sees"
    assert seen.page.evaluate(
        "[...document.images].every(image => !image.src || image.naturalWidth > 0)"
    )
    assert "GET /v1/models" in seen.asked
    assert not seen.features()  # looking costs the endpoint nothing
    seen.choose()
    assert seen.wrong == []


def test_page__policy_lets_nothing_in(site: str, visit: Opened) -> None:
    seen = visit(site)
    seen.page.evaluate(
        """() => { const inline = document.createElement('script');
             inline.textContent = 'window.evil = 1'; document.head.append(inline);
             const image = new Image(); image.src = 'http://127.0.0.1:9/x.png';
             document.body.append(image); }"""
    )
    seen.page.wait_for_timeout(100)
    assert seen.page.evaluate("window.evil") is None
    assert len(seen.wrong) >= 2


def test_sample__draws_both_maps(site: str, visit: Opened) -> None:
    seen = visit(site)
    seen.choose()
    assert seen.features() == ["model=alpha&layers=2&dtype=float16"]
    components, heat = _colours(seen, _COMPONENTS), _colours(seen, _HEAT)
    assert len(components) == len(heat) == 12
    assert len(set(components)) > 8
    assert len(set(heat)) > 8
    facts = seen.page.inner_text(".model .facts")
    for words in ("grid 3 × 4", "stride 16 px", "input 48 × 64 px", "channels 64", "ms"):
        assert words in facts
    assert seen.page.inner_text("#source-facts") == "480 × 640 pixels"


def test_click__shows_what_is_similar(site: str, visit: Opened) -> None:
    seen = visit(site)
    seen.choose("cells")
    before = _colours(seen, _HEAT)
    frame = seen.page.locator(_FRAMES).nth(1)
    _click(seen, frame, 1, 3, (3, 4))
    assert _colours(seen, _HEAT) != before
    assert seen.page.inner_text("#patch-name") == "row 2, column 4"
    assert "row 2, column 4 chosen" in _announced(seen)
    cell = frame.locator("[role=gridcell]")
    # The pointer is still there, so the patch speaks, and so does the legend.
    assert cell.get_attribute("aria-label") == "row 2, column 4, similarity 1.00"
    assert seen.page.inner_text(".legend .numbers") in ("here 1.00", "here 1.000")
    near = seen.page.locator(".near").all_inner_texts()
    values = [float(text) for text in near]
    assert values
    assert values == sorted(values, reverse=True)
    assert max(values) <= 1


def test_similarity__is_what_numpy_says(site: str, visit: Opened) -> None:
    seen = visit(site)
    with seen.page.expect_response(lambda response: "/v1/features" in response.url) as caught:
        seen.choose()
    from safetensors.numpy import load

    features = load(caught.value.body())["layer_2"][0].astype(np.float64).reshape(64, 12)
    unit = features / np.linalg.norm(features, axis=0)
    frame = seen.page.locator(_FRAMES).nth(1)
    _click(seen, frame, 0, 1, (3, 4))
    for row, column in ((0, 0), (1, 2), (2, 3)):
        box = frame.bounding_box()
        frame.hover(
            position={
                "x": box["width"] * (column + 0.5) / 4,
                "y": box["height"] * (row + 0.5) / 3,
            }
        )
        wanted = unit[:, 1] @ unit[:, row * 4 + column]
        said = float(seen.page.inner_text(".legend .numbers strong"))
        assert said == pytest.approx(wanted, abs=0.006)


def test_keys__do_what_the_pointer_does(site: str, visit: Opened) -> None:
    seen = visit(site)
    page = seen.page
    page.locator(".gallery [data-sample=valley]").focus()
    page.keyboard.press("Enter")
    seen.ready()
    # The button is gone, and the keys are where the patches are.
    assert page.evaluate("document.activeElement.getAttribute('role')") == "grid"
    page.locator(_FRAMES).nth(1).focus()
    for key in ("Control+Home", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    cell = page.locator(_FRAMES).nth(1).locator("[role=gridcell]")
    assert cell.get_attribute("aria-rowindex") == "2"
    assert cell.get_attribute("aria-colindex") == "2"
    assert cell.get_attribute("aria-selected") == "false"
    assert page.locator(_FRAMES).nth(1).get_attribute("aria-activedescendant") == (
        cell.get_attribute("id")
    )
    assert page.inner_text("#patch-name") == "row 2, column 3"  # the middle, as it begins
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.inner_text("#patch-name") == "row 3, column 2"
    assert cell.get_attribute("aria-label") == "row 3, column 2, similarity 1.00"
    assert cell.get_attribute("aria-selected") == "true"
    assert page.evaluate(
        """() => { const style = getComputedStyle(document.activeElement);
             return style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2; }"""
    )


def test_tab__reaches_everything(site: str, visit: Opened) -> None:
    seen = visit(site)
    seen.choose()
    seen.page.locator(".skip").focus()
    reached = set()
    for _ in range(60):
        seen.page.keyboard.press("Tab")
        reached.add(
            seen.page.evaluate(
                """() => { const e = document.activeElement;
                     return e.id || e.dataset.sample || e.dataset.format
                       || e.getAttribute('aria-label') || e.textContent; }"""
            )
        )
    wanted = {"theme", "file", "model-a", "model-b", "size", "norm", "smooth", "over", "cells"}
    wanted |= {"Layer", "dtype", "tab-curl", "code", "Copy", "npz", "npy", "safetensors"}
    wanted |= {"Picture: patches", "Principal components: patches"}
    assert wanted <= reached


def test_options__change_the_request(site: str, visit: Opened) -> None:
    seen = visit(site)
    page = seen.page
    seen.choose()
    page.get_by_role("button", name="Layer 0").click()
    page.wait_for_function("() => document.querySelector('.tag').textContent === 'layer 0'")
    seen.ready()
    page.locator("#norm").uncheck()
    page.wait_for_function("() => location.hash.includes('norm=false')")
    page.locator("#size").select_option("keep")
    page.wait_for_function(
        "() => document.querySelector('#request .line').textContent.includes('size=keep')"
    )
    seen.ready()
    page.locator("#dtype").select_option("float32")
    page.wait_for_function(
        "() => !document.querySelector('#request .line').textContent.includes('dtype')"
    )
    seen.ready()
    assert seen.features()[-1] == "model=alpha&layers=0&norm=false&size=keep"
    assert "model=alpha&layers=0&dtype=float16" in seen.features()
    # What was seen before comes from the page's own memory.
    count = len(seen.features())
    page.locator("#dtype").select_option("float16")
    page.locator("#size").select_option("")
    page.locator("#norm").check()
    page.wait_for_function(
        """() => document.querySelector('#request .line')
             .textContent.endsWith('layers=0&dtype=float16')"""
    )
    seen.ready()
    assert len(seen.features()) <= count + 2
    assert seen.wrong == []


def test_link__shows_the_same_again(site: str, visit: Opened) -> None:
    first = visit(site, fragment="#model=beta&layer=1&size=96&norm=false&at=0.9,0.1")
    first.choose()
    assert first.features() == ["model=beta&layers=1&norm=false&size=96&dtype=float16"]
    assert first.page.inner_text("#patch-name") == "row 1, column 6"
    again = visit(site, fragment=first.page.evaluate("location.hash"))
    again.choose()
    assert again.features() == first.features()
    assert "still-life" not in first.page.url


def test_link__that_makes_no_sense_is_harmless(site: str, visit: Opened) -> None:
    seen = visit(site, fragment="#model=nobody&with=<b>&layer=99&size=%3Cscript%3E&at=7,x")
    seen.choose()
    assert seen.features() == ["model=alpha&layers=2&dtype=float16"]
    assert seen.wrong == []


def test_compare__two_columns_one_place(site: str, visit: Opened) -> None:
    seen = visit(site)
    seen.choose()
    seen.page.locator("#model-b").select_option(PAINTER)
    seen.ready(2)
    names = seen.page.locator(".model h2").all_inner_texts()
    assert [name.split("layer")[0].strip() for name in names] == ["alpha", PAINTER]
    frames = seen.page.locator(_FRAMES)
    assert frames.count() == 4
    _click(seen, frames.nth(1), 2, 0, (3, 4))
    marks = seen.page.locator(".model .mark")
    tops = marks.evaluate_all("all => all.map(one => parseFloat(one.style.top))")
    # Each marks its own patch at the place chosen: the third of three, the seventh of eight.
    assert tops == pytest.approx([66.7, 66.7, 75, 75], abs=0.1)
    assert seen.page.locator(".nearest").count() == 2
    columns = seen.page.locator(".model").evaluate_all("all => all.map(one => one.offsetLeft)")
    assert columns[0] < columns[1]
    seen.page.locator("#model-b").select_option("")
    seen.ready(1)
    assert seen.wrong == []


def test_padding__is_left_out(site: str, visit: Opened) -> None:
    seen = visit(site, fragment="#model=painter&size=keep")
    seen.choose()
    frame = seen.page.locator(_FRAMES).first
    # 640 x 480 in 64 x 64 leaves a quarter below empty.
    assert frame.get_attribute("aria-rowcount") == "6"
    assert frame.get_attribute("aria-colcount") == "8"
    assert len(_colours(seen, _COMPONENTS)) == 48


def test_file__own_picture_by_choosing_dropping_and_pasting(
    site: str, visit: Opened, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    seen = visit(site)
    file = tmp_path / "it's mine.png"
    file.write_bytes(picture(3))
    seen.page.set_input_files("#file", file)
    seen.ready()
    assert seen.page.inner_text("#source-title") == "it's mine.png"
    assert seen.page.inner_text("#source-facts") == "70 × 90 pixels"
    assert "@it'\\''s mine.png" in seen.page.inner_text("#code")
    put = """([type, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], `by-${type}.png`, {type: 'image/png'}));
      const event = type === 'drop'
        ? new DragEvent('drop', {dataTransfer: data, cancelable: true})
        : new ClipboardEvent('paste', {clipboardData: data});
      window.dispatchEvent(event); }"""
    for seed, kind in enumerate(("drop", "paste")):
        seen.page.evaluate(put, [kind, list(picture(seed))])
        seen.page.wait_for_function(
            "name => document.querySelector('#source-title').textContent === name",
            arg=f"by-{kind}.png",
        )
        seen.ready()
    assert seen.wrong == []


def test_reconstruction__follows_the_slider(site: str, visit: Opened) -> None:
    seen = visit(site)
    seen.choose()
    assert not seen.page.locator("#reconstruction").is_visible()
    seen.page.locator("#model-a").select_option(PAINTER)
    told = "#reconstruction .facts"
    seen.page.wait_for_function(
        "selector => document.querySelector(selector).textContent.includes('48 of 64')", arg=told
    )
    seen.page.locator("#ratio").fill("25")
    seen.page.wait_for_function(
        "selector => document.querySelector(selector).textContent.includes('16 of 64')", arg=told
    )
    images = seen.page.locator(".reconstructed img")
    assert images.count() == 3
    sources = images.evaluate_all("all => all.map(one => one.src)")
    assert len(set(sources)) == 3
    seen.page.get_by_role("button", name="Another mask").click()
    seen.page.wait_for_function(
        "old => document.querySelector('.reconstructed img').src !== old", arg=sources[0]
    )
    asked = [line for line in seen.asked if "/v1/reconstruct" in line]
    assert asked[0].endswith("?model=painter&seed=0")
    assert asked[-1].endswith("?model=painter&seed=1&mask_ratio=0.25")
    assert seen.wrong == []


def test_answers__of_each_kind_of_head(site: str, visit: Opened) -> None:
    seen = visit(site)
    seen.choose()
    assert not seen.page.locator("#findings").is_visible()
    seen.page.locator("#model-a").select_option(PAINTER)
    seen.page.wait_for_selector(".findings figure:nth-child(3)")
    assert seen.page.locator(".findings figcaption").all_inner_texts() == [
        "scenes segmentation", "objects detection", "kind classification",
    ]  # fmt: skip
    shares = seen.page.locator(".findings figure:nth-child(1) li b").all_inner_texts()
    assert sum(float(text.removesuffix(" %")) for text in shares) == pytest.approx(100, abs=0.5)
    painted = """n => { const canvas = document.querySelectorAll('.findings canvas')[n];
      return canvas.toDataURL().length; }"""
    assert seen.page.evaluate(painted, 0) > 1000
    things = seen.page.locator(".findings figure:nth-child(2) .classes")
    seen.page.locator("#least").fill("0")
    assert "best 0." in things.inner_text()
    seen.page.locator("#least").fill("95")
    assert "reaches this score" in things.inner_text()
    kinds = seen.page.locator(".findings figure:nth-child(3) li b").all_inner_texts()
    assert sum(map(float, kinds)) == pytest.approx(1, abs=0.01)
    assert [line for line in seen.asked if "/v1/predict" in line] == [
        "POST /v1/predict?model=painter"
    ]
    assert seen.wrong == []


@pytest.mark.parametrize("format", ["npz", "npy", "safetensors"])
def test_download__opens(site: str, visit: Opened, tmp_path: Path, format: str) -> None:
    seen = visit(site, fragment="#layer=1")
    seen.choose()
    with seen.page.expect_download() as caught:
        seen.page.get_by_role("button", name=f"Download as {format}").click()
    download = caught.value
    assert download.suggested_filename == f"alpha-layer_1.{format}"
    file = tmp_path / download.suggested_filename
    download.save_as(file)
    if format == "npy":
        array = np.load(file)
    elif format == "npz":
        with np.load(file) as found:
            array = found["layer_1"]
            assert json.loads(str(found["metadata"]))["model"] == "alpha"
    else:
        from safetensors.numpy import load_file

        array = load_file(file)["layer_1"]
    assert array.shape == (1, 64, 3, 4)
    assert array.dtype == np.float16
    assert seen.page.inner_text(".told").startswith(download.suggested_filename)


def test_png_with_rotation__lies_upright(site: str, visit: Opened, tmp_path: Path) -> None:
    # The endpoint turns a picture as its EXIF data says, and so must the page.
    image = Image.new("RGB", (80, 40), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    (tmp_path / "turned.jpg").write_bytes(file.getvalue())
    seen = visit(site)
    seen.page.set_input_files("#file", tmp_path / "turned.jpg")
    seen.ready()
    assert seen.page.inner_text("#source-facts") == "80 × 40 pixels"
    box = seen.page.locator(_FRAMES).first.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(0.5, abs=0.02)
