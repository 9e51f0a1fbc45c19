"""LitServe with the bare model: `python litserve_server.py BUNDLE PORT`."""

import sys
from typing import Annotated, Any

import litserve
from bare import Bare
from fastapi import Body, Response
from systems import MAX_BATCH, WAIT_S


class Tokens(litserve.LitAPI):
    """JPEG in as the raw body, float16 tokens out as raw bytes."""

    def setup(self, device: str) -> None:
        """Load the model in the worker."""
        self.bare = Bare(sys.argv[1])

    def decode_request(self, request: Annotated[bytes, Body()]) -> Any:
        """Decode and resize a picture."""
        return self.bare.prepare(request)

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Return the pictures as they are; the bare model stacks them."""
        return list(inputs)

    def predict(self, batch: list[Any]) -> Any:
        """Tokens of a batch of pictures."""
        return self.bare.tokens(batch)

    def unbatch(self, output: Any) -> list[Any]:
        """Split tokens by picture."""
        return list(output)

    def encode_response(self, output: Any) -> Response:
        """Answer with raw bytes."""
        return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    api = Tokens(max_batch_size=MAX_BATCH, batch_timeout=WAIT_S, api_path="/tokens")
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning"
    )
