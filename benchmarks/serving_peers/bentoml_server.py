"""BentoML with the bare model: `bentoml serve bentoml_server:Front`.

BentoML batches the calls of one service to another, so there are two: one that decodes, one with
the model. The environment variable BUNDLE names the bundle.
"""

import asyncio
import os
from pathlib import Path
from typing import Annotated, Any

import bentoml
import numpy as np
from bare import Bare
from bentoml.validators import ContentType
from systems import MAX_BATCH

OPTIONS: dict[str, Any] = {
    "workers": 1,
    "traffic": {"timeout": 120},
    "logging": {"access": {"enabled": False}},
    # By default the connection between the two services is closed after 100 requests, and those
    # that are in it then fail (1.4.40).
    "runner_connection": {"max_requests": 10**9, "max_age": 1e6},
}


@bentoml.service(**OPTIONS)
class Model:
    """The bare model, in batches."""

    def __init__(self) -> None:
        self.bare = Bare(os.environ["BUNDLE"])

    # BentoML adapts the wait for a batch itself; max_latency_ms is when it gives up.
    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=60_000)
    def tokens(self, pictures: np.ndarray) -> np.ndarray:
        """Tokens, float16 [B, N, D], of pictures, uint8 [B, C, H, W]."""
        return self.bare.tokens(list(pictures))


@bentoml.service(**OPTIONS)
class Front:
    """JPEG in as the raw body, float16 tokens out as raw bytes."""

    model = bentoml.depends(Model)

    def __init__(self) -> None:
        from mimray.trainers.bundles import read_card

        self.card = read_card(os.environ["BUNDLE"])

    @bentoml.api(route="/tokens")
    async def tokens(self, image: Annotated[Path, ContentType("image/jpeg")], /) -> bytes:
        """Decode in a thread, and call the model."""
        view = await asyncio.to_thread(self._prepare, image)
        tokens: np.ndarray = await self.model.to_async.tokens(view[None])
        return tokens.tobytes()

    def _prepare(self, image: Path) -> np.ndarray:
        from mimray.trainers.data.decode import decode_rgb
        from mimray.trainers.data.transforms import inference_view

        return inference_view(
            decode_rgb(image.read_bytes()), self.card.image_size, self.card.interpolation
        )
