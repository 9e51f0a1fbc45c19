from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

IMAGE_SIZE = (48, 64)  # height, width: not square, to catch swapped sides
WIDTH, DEPTH, GRID = 64, 3, (3, 4)


def _save(folder: Path, seed: int) -> Path:
    import torch

    from mimray.trainers.bundles import BundleCard, save_bundle
    from mimray.trainers.config.model import ViTConfig
    from mimray.trainers.models import build_encoder

    torch.manual_seed(seed)
    config = ViTConfig(name="vit", width=WIDTH, depth=DEPTH, num_heads=4, patch_size=16)
    encoder = build_encoder(config, IMAGE_SIZE, 3)
    card = BundleCard(
        name=folder.name,
        encoder=config,
        image_size=IMAGE_SIZE,
        channels=3,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        layers=(0, 2),
    )
    save_bundle(folder, card, encoder.state_dict())
    return folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two small untrained encoders."""
    folder = tmp_path_factory.mktemp("bundles")
    return {name: _save(folder / name, seed) for seed, name in enumerate(("alpha", "beta"))}


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """Makes an encoded picture; the seed says which."""

    def make(seed: int, size: tuple[int, int] = (90, 70), format: str = "PNG") -> bytes:
        rng = np.random.default_rng(seed)
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, format)
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def reference(bundles: dict[str, Path]) -> Callable[[bytes], tuple[np.ndarray, np.ndarray]]:
    """Pooled and tokens of one picture by model `alpha`, straight from torch, alone."""
    import torch

    from mimray.trainers.bundles import load_bundle

    encoder = load_bundle(bundles["alpha"])

    def compute(data: bytes) -> tuple[np.ndarray, np.ndarray]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image = image.resize(IMAGE_SIZE[::-1], Image.Resampling.BICUBIC)
        pixels = np.asarray(image, np.float32) / 255
        pixels = (pixels - encoder.card.mean) / encoder.card.std
        batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32))
        features = encoder(batch)
        return features.pooled[0].numpy(), features.tokens[0].numpy()

    return compute


@pytest.fixture(scope="session")
def application(bundles: dict[str, Path]) -> Callable[..., Any]:
    """Makes the whole endpoint as one ASGI application, without Ray."""

    def make(
        names: tuple[str, ...] = ("alpha", "beta"),
        *,
        gateway: Mapping[str, Any] | None = None,
        ready: Mapping[str, bool] | None = None,
        heads: Mapping[str, Mapping[str, Path]] | None = None,
        **settings: Any,
    ) -> Any:
        from mimray.serving.api.routes import root_app
        from mimray.serving.deploy.build_service import build_service
        from mimray.serving.deploy.replicas import gateway_parts
        from mimray.serving.deploy.settings import GatewaySettings, ModelSettings
        from mimray.serving.operations.calls import Call, Reply

        shared = GatewaySettings(**{"needs_key": False, "access_log": None, **(gateway or {})})
        services = {
            name: build_service(
                ModelSettings(
                    name=name,
                    bundle=str(bundles[name]),
                    device="cpu",
                    gateway=shared,
                    heads={key: str(place) for key, place in (heads or {}).get(name, {}).items()},
                    **settings,
                ),
                num_threads=1,
            )
            for name in names
        }

        async def models() -> dict[str, bool]:
            return {**dict.fromkeys(names, True), **(ready or {})}

        async def ask(name: str, call: Call) -> Reply:
            return await services[name].answer(call)

        async def metrics() -> str:
            return ""

        return root_app(models, ask, gateway_parts(shared), version="9", metrics=metrics)

    return make


@pytest.fixture(scope="session")
def serve_application() -> Callable[[Any], Any]:
    """Runs an ASGI application behind a real socket in a thread; a context manager of its URL."""
    from contextlib import contextmanager

    import uvicorn

    @contextmanager
    def run(application: Any) -> Iterator[str]:
        config = uvicorn.Config(application, port=0, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 120
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(timeout=120)
        assert not thread.is_alive()

    return run
