"""The bare model: the reference that servers are measured against, and that peers serve.

As a program, `python bare.py BUNDLE`: answers each JSON line on standard input with one.
`{"batch": 16, "passes": 1, "seconds": 5}` gives pictures a second of the forward pass alone;
`{"picture": FILE, "size": 224, "layers": []}` the seconds that decoding and the model take.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mimray.trainers.bundles import load_bundle
from mimray.trainers.data.decode import decode_rgb
from mimray.trainers.data.transforms import inference_view

THREADS = 2


class Bare:
    """An encoder, with its resizing and normalisation of pictures."""

    def __init__(self, bundle: str) -> None:
        torch.set_num_threads(THREADS)
        self.encoder = load_bundle(bundle)
        self.card = self.encoder.card
        self._mean, self._std = (
            torch.tensor(values).view(1, -1, 1, 1) for values in (self.card.mean, self.card.std)
        )

    def prepare(self, data: bytes, size: int | None = None) -> np.ndarray[Any, Any]:
        """Decode and resize a picture, uint8 [C, H, W]."""
        wanted = (size, size) if size else self.card.image_size
        return inference_view(decode_rgb(data), wanted, self.card.interpolation)

    @torch.inference_mode()
    def tokens(self, pictures: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Tokens of pictures, float16 [B, N, D]."""
        tokens = self.encoder(self._images(pictures)).tokens
        return tokens.half().numpy()

    @torch.inference_mode()
    def maps(self, picture: np.ndarray[Any, Any], layers: tuple[int, ...]) -> None:
        """Compute maps of some layers, and drop them."""
        self.encoder.features(self._images([picture]), layers)

    def _images(self, pictures: list[np.ndarray[Any, Any]]) -> torch.Tensor:
        batch = torch.from_numpy(np.stack(pictures))
        return (batch.float().div_(255) - self._mean) / self._std

    def rate(self, batch: int, passes: int, seconds: float) -> dict[str, float]:
        """Pictures per second and CPU time of the forward pass, with `passes` batches at once."""
        done: list[int] = []
        cpu = time.process_time()
        stop = time.perf_counter() + seconds

        def work() -> None:
            torch.set_num_threads(THREADS // passes)
            images = torch.randn(batch, self.card.channels, *self.card.image_size)
            with torch.inference_mode():
                while time.perf_counter() < stop:
                    self.encoder(images)
                    done.append(batch)

        began = time.perf_counter()
        threads = [threading.Thread(target=work) for _ in range(passes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "pictures_per_s": sum(done) / (time.perf_counter() - began),
            "pictures": sum(done),
            "cpu_s": time.process_time() - cpu,
        }

    def once(self, file: str, size: int, layers: tuple[int, ...]) -> dict[str, float]:
        """Seconds of decoding one picture, and of the model."""
        data = Path(file).read_bytes()
        began = time.perf_counter()
        picture = self.prepare(data, size)
        decoded = time.perf_counter()
        if layers:
            self.maps(picture, layers)
        else:
            self.tokens([picture])
        return {"decode_s": decoded - began, "model_s": time.perf_counter() - decoded}


def main() -> None:
    bare = Bare(sys.argv[1])
    bare.rate(1, 1, 0.5)
    print("{}", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        if "picture" in ask:
            answer: object = bare.once(ask["picture"], ask["size"], tuple(ask["layers"]))
        else:
            answer = bare.rate(**ask)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
