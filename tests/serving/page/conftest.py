from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.serving.heads import save_each

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
KEY = "open-sesame"
PAINTER = "painter"
"""A model that comes with its decoder."""


@pytest.fixture(scope="session")
def painter(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Adds a small untrained masked autoencoder, decoder and all, to what can be served."""
    import torch

    from mimray.trainers.bundles import BundleCard, save_bundle
    from mimray.trainers.config.run import parse_recipe
    from mimray.trainers.methods.catalogue import build_method

    torch.manual_seed(7)
    recipe = parse_recipe(
        {
            "encoder": {"name": "vit", "width": 64, "depth": 2, "num_heads": 4, "patch_size": 8},
            "method": {"name": "mae", "decoder_width": 32, "decoder_depth": 1},
            "data": {"image_size": 64},
            "optim": {"base_lr": 1e-3, "batch_size": 8, "steps": 1},
        }
    )
    state = build_method(recipe).state_dict()
    card = BundleCard(
        name=PAINTER,
        encoder=recipe.encoder,
        image_size=recipe.data.image_size,
        channels=3,
        mean=recipe.data.mean,
        std=recipe.data.std,
        layers=(0, 1),
        method="mae",
        recipe=recipe.model_dump(mode="json"),
    )
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    rest = {k: v for k, v in state.items() if not k.startswith("encoder.")}
    bundles[PAINTER] = tmp_path_factory.mktemp("painter") / PAINTER
    save_bundle(bundles[PAINTER], card, encoder, rest)
    return PAINTER


@pytest.fixture(scope="session")
def painters_heads(
    painter: str, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A head of each kind on the model with the decoder."""
    from mimray.trainers import load_bundle

    return save_each(tmp_path_factory.mktemp("painters-heads"), load_bundle(bundles[painter]))


@pytest.fixture(scope="session")
def site(
    painter: str,
    painters_heads: dict[str, Path],
    application: Callable[..., Any],
    serve_application: Callable[[Any], Any],
) -> Iterator[str]:
    """The URL of an endpoint with three models, one of which has trained heads."""
    made = application(("alpha", "beta", painter), heads={painter: painters_heads})
    with serve_application(made) as url:
        yield url


@pytest.fixture(scope="session")
def locked_site(
    application: Callable[..., Any], serve_application: Callable[[Any], Any]
) -> Iterator[str]:
    """The URL of an endpoint that asks for `KEY`."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    with serve_application(application(("alpha",), gateway={"key_sha256": digest})) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if shutil.which(CHROMIUM) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{CHROMIUM} is missing; .ci/run installs it")
        pytest.skip(f"{CHROMIUM} is missing; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """A page that is open, and what went on behind it.

    Attributes:
        page: playwright's.
        wrong: errors, words on the console, and requests to elsewhere.
        asked: requests to the endpoint, `METHOD path?query`.
    """

    page: Any
    wrong: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def choose(self, sample: str = "still-life", columns: int = 1) -> None:
        """Choose a sample and wait until so many columns show it."""
        self.page.locator(f"[data-sample={sample}]:visible").click()
        self.ready(columns)

    def ready(self, columns: int = 1) -> None:
        """Wait until so many columns show an answer."""
        self.page.wait_for_function(
            """n => { const all = [...document.querySelectorAll('.model')];
               return all.length === n && all.every(one =>
                 one.dataset.state === 'ready' && one.getAttribute('aria-busy') === 'false'); }""",
            arg=columns,
        )

    def features(self) -> list[str]:
        """Queries of the requests for features so far."""
        return [line.partition("?")[2] for line in self.asked if "/v1/features?" in line]


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Opens the page of a site."""
    contexts = []

    def opened(
        url: str, *, width: int = 1280, scheme: str = "light", fragment: str = "", **options: Any
    ) -> Visit:
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            is_mobile=width < 600,
            has_touch=width < 600,
            permissions=["clipboard-read", "clipboard-write"],
            **options,
        )
        contexts.append(context)
        found = Visit(context.new_page())

        def note(request: Any) -> None:
            if request.url.startswith(url):
                found.asked.append(f"{request.method} {request.url.removeprefix(url)}")
            elif not request.url.startswith(("data:", "blob:")):
                found.wrong.append(f"a request to {request.url}")

        found.page.on("pageerror", lambda error: found.wrong.append(str(error)))
        found.page.on("console", lambda message: found.wrong.append(message.text))
        found.page.on("request", note)
        found.page.goto(f"{url}/{fragment}")
        return found

    yield opened
    for context in contexts:
        context.close()
