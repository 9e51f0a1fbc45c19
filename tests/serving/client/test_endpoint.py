"""Both clients and the whole endpoint, over a socket and without one."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from mimray.serving.client import AsyncFeatureClient
from mimray.serving.wire.errors import (
    ConflictError,
    InvalidRequestError,
    TooLargeError,
    UnknownModelError,
    UnusablePictureError,
)


@pytest.fixture(scope="module")
def url(application: Callable[..., Any], serve_application: Callable[[Any], Any]) -> Iterator[str]:
    with serve_application(application()) as url:
        yield url


@pytest.fixture
def ask(call: Any, url: str) -> Any:
    """Both clients, pointed at the endpoint."""
    return call.at(url)


def test_embed__any_picture_many_at_once(
    ask: Any, picture: Callable[..., bytes], reference: Any, tmp_path: Path
) -> None:
    data = [picture(seed) for seed in range(6)]
    (tmp_path / "one.png").write_bytes(data[1])
    pixels = np.asarray(Image.open(io.BytesIO(data[2])))
    mixed = [data[0], tmp_path / "one.png", pixels, data[3], str(tmp_path / "one.png"), *data[4:]]
    vectors = ask("embed", mixed, "alpha", options={"batch_size": 2})
    expected = np.stack([reference(data[i])[0] for i in (0, 1, 2, 3, 1, 4, 5)])
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
    assert ask("embed", [], "alpha").shape == (0, 64)
    assert np.abs(ask("embed", mixed[:1], "alpha", pooling="gem") - vectors[:1]).max() > 1e-3


def test_features__layers_pyramid_and_geometry(
    ask: Any, picture: Callable[..., bytes], reference: Any
) -> None:
    found = ask("features", picture(4), "alpha", layers=(-1, 0), pyramid=True)
    pooled, tokens = reference(picture(4))
    np.testing.assert_allclose(found.tokens, tokens, atol=1e-5)
    np.testing.assert_allclose(found.pooled, pooled, atol=1e-5)
    np.testing.assert_allclose(found.layers[2].reshape(64, -1).T, tokens, atol=1e-5)
    assert {i: maps.shape for i, maps in found.layers.items()} == {0: (64, 3, 4), 2: (64, 3, 4)}
    assert {s: maps.shape[1:] for s, maps in found.pyramid.items()} == {
        4: (12, 16), 8: (6, 8), 16: (3, 4), 32: (2, 2),
    }  # fmt: skip
    assert (found.grid, found.stride) == ((3, 4), (16, 16))
    assert (found.source_size, found.input_size) == ((70, 90), (48, 64))
    np.testing.assert_allclose(found.to_input(90, 70), (64, 48))
    np.testing.assert_array_equal(found.at(89, 69), found.tokens[-1])
    np.testing.assert_array_equal(found.at(0, 69), found.tokens[-4])
    assert found.model == "alpha"
    assert len(found.weights_sha256) == 64
    assert found.metadata["mean"] == [0.4, 0.5, 0.6]


def test_features__keeps_the_aspect(ask: Any, picture: Callable[..., bytes]) -> None:
    found = ask("features", picture(4, (80, 40)), "alpha", size="keep:64")
    assert (found.input_size, found.valid_region) == ((64, 64), (0, 0, 64, 32))
    np.testing.assert_allclose(found.to_source(64, 32), (80, 40))
    native = ask("features", picture(4, (80, 33)), "alpha", size="native")
    assert (native.grid, native.input_size) == ((2, 5), (32, 80))


@pytest.mark.parametrize(
    ("dtype", "error"), [("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 2e-2)]
)
def test_features__short_types_come_close(
    ask: Any, picture: Callable[..., bytes], dtype: str, error: float
) -> None:
    exact = ask("features", picture(1), "alpha", layers=(1,), pyramid=True)
    short = ask("features", picture(1), "alpha", layers=(1,), pyramid=True, dtype=dtype)
    for mine, theirs in (
        (short.pooled, exact.pooled),
        (short.tokens, exact.tokens),
        (short.layers[1], exact.layers[1]),
        (short.pyramid[4], exact.pyramid[4]),
    ):
        assert mine.dtype == (np.float16 if dtype == "float16" else np.float32)
        assert mine.shape == theirs.shape
        assert 0 < np.abs(mine - theirs).max() < error * np.abs(theirs).max()


def test_features_many__sizes_may_differ(ask: Any, picture: Callable[..., bytes]) -> None:
    sizes = [(32 + 16 * i, 48) for i in range(6)]
    found = ask("features_many", (picture(1, size) for size in sizes), "alpha", size="native")
    assert [(f.input_size[1], f.input_size[0]) for f in found] == sizes


def test_refusals__are_the_servers_exceptions(ask: Any, picture: Callable[..., bytes]) -> None:
    pictures = [picture(0)] * 5 + [b"text", picture(1, (1, 1))]
    with pytest.raises(UnusablePictureError, match="picture 5 cannot be used") as refused:
        ask("embed", pictures, "alpha", options={"batch_size": 4})
    assert [p["index"] for p in refused.value.details["pictures"]] == [5, 6]
    with pytest.raises(UnknownModelError, match="models here: alpha, beta"):
        ask("embed", [picture(0)], "gamma")
    with pytest.raises(InvalidRequestError, match="no layer 3"):
        ask("features", picture(0), "alpha", layers=(3,))
    with pytest.raises(InvalidRequestError, match="stride 16"):
        ask("features", picture(0), "alpha", size=(32, 90))
    with pytest.raises(TooLargeError):
        ask("features", picture(0), "alpha", size=(16000, 16000))
    with pytest.raises(ConflictError, match="decoder"):
        ask("reconstruct", picture(0), "alpha")


def test_descriptions(ask: Any) -> None:
    assert ask("models") == ["alpha", "beta"]
    assert ask("live")
    assert ask("ready")
    facts = ask("model", "beta")
    assert (facts["depth"], facts["patch_size"]) == (3, 16)
    assert ask("metadata", "beta")["inputs"][0]["name"] == "image"


def test_transport__an_application_in_this_process(
    application: Callable[..., Any], picture: Callable[..., bytes], reference: Any
) -> None:
    async def embed() -> Any:
        transport = httpx2.ASGITransport(application(("alpha",)))
        async with AsyncFeatureClient("http://here", transport=transport, batch_size=1) as client:
            return await client.embed([picture(0), picture(1)], "alpha")

    expected = np.stack([reference(picture(i))[0] for i in (0, 1)])
    np.testing.assert_allclose(asyncio.run(embed()), expected, atol=1e-5)


def test_remote_encoder__is_the_bundle(url: str, bundles: dict[str, Path]) -> None:
    import torch

    from mimray.service.commands.remote_encoder import RemoteEncoder
    from mimray.trainers.bundles import load_bundle
    from mimray.trainers.models.normalise import normalise

    near, far = load_bundle(bundles["alpha"]), RemoteEncoder(url, "alpha")
    pixels = torch.randint(0, 256, (5, 3, 64, 80), dtype=torch.uint8)
    images = normalise(pixels, near.card.mean, near.card.std)
    pairs = zip(far.features(images, (2, -3)), near.features(images, (2, -3)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(far(images).tokens, near(images).tokens, atol=1e-5, rtol=0)
    for name in ("depth", "stride", "strides", "widths"):
        assert getattr(far, name) == getattr(near, name)
