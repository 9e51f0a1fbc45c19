"""A real endpoint: Ray Serve, HAProxy where there is one, and clients that are not ours."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from timm.models import save_for_hf
from tritonclient.utils import InferenceServerException

from mimray.serving.client import FeatureClient
from mimray.serving.deploy.endpoint import Endpoint, serve_bundles
from mimray.serving.deploy.haproxy import HAProxyState, haproxy_available
from mimray.serving.wire.errors import (
    InvalidRequestError,
    OverloadedError,
    TooLargeError,
    UnauthorizedError,
    UnknownModelError,
    UnusablePictureError,
)
from mimray.trainers.convert import import_weights
from mimray.trainers.errors import BundleError, ServingError
from tests.trainers.convert.small_timm import small_timm

KEY = "correct-horse"


@pytest.fixture(scope="module")
def served(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of our own encoders, and as `beta` a DINOv3: registers and rotary positions."""
    folder = tmp_path_factory.mktemp("served")
    theirs = small_timm("dinov3", embed_dim=64)
    save_for_hf(theirs, str(folder / "timm"), safe_serialization=True)
    import_weights(str(folder / "timm"), folder / "beta")
    return {"alpha": bundles["alpha"], "beta": folder / "beta"}


@pytest.fixture(scope="module")
def endpoint(
    served: dict[str, Path], ray_session: str, free_port: Callable[[], int]
) -> Iterator[Endpoint]:
    import ray

    port = free_port()
    with serve_bundles(served, port=port, device="cpu", num_cpus=0.5, api_key=KEY) as endpoint:
        yield endpoint
    assert not HAProxyState(port).processes()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(endpoint.url)
    assert ray.is_initialized()  # it was the caller's, so it stays


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[FeatureClient]:
    with FeatureClient(endpoint.url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def triton_client(endpoint: Endpoint) -> Iterator[Any]:
    client = triton.InferenceServerClient(endpoint.url.removeprefix("http://"))
    client.register_plugin(_Key())
    yield client
    client.close()


class _Key(triton.InferenceServerClientPlugin):  # type: ignore[misc]
    def __call__(self, request: Any) -> None:
        request.headers["X-API-Key"] = KEY


def _triton_input(pictures: list[bytes], *, binary: bool = True) -> Any:
    tensor = triton.InferInput("image", [len(pictures)], "BYTES")
    tensor.set_data_from_numpy(np.array(pictures, dtype=np.object_), binary_data=binary)
    return tensor


@pytest.mark.skipif(not haproxy_available(), reason="no HAProxy on this platform")
def test_endpoint__haproxy_and_replicas_open_no_port_to_other_machines(
    client: FeatureClient, endpoint: Endpoint, picture: Callable[..., bytes]
) -> None:
    import psutil

    client.embed([picture(0)], model="alpha")  # of which something might be told to somebody
    port = int(endpoint.url.rsplit(":", 1)[1])
    proxies = {process.pid for process in HAProxyState(port).processes()}
    replicas = {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "ray::ServeReplica" in " ".join(process.info["cmdline"] or ())
    }
    assert proxies
    assert len(replicas) > 1
    opened = [
        (c.laddr.ip, c.laddr.port, c.pid)
        for c in psutil.net_connections("inet")
        if c.pid in proxies | replicas and (c.status == psutil.CONN_LISTEN or not c.raddr)
    ]
    assert port in {number for _, number, pid in opened if pid in proxies}
    assert any(30000 <= number < 31000 for _, number, pid in opened if pid in replicas)
    to_others = Counter(pid for ip, _, pid in opened if ip in ("::", "0.0.0.0"))
    # One of each replica is Ray's own, which the session's Ray opens thus, and asks for the token.
    assert to_others == dict.fromkeys(replicas, 1)


def test_endpoint__writes_no_key_down(
    client: FeatureClient, endpoint: Endpoint, picture: Callable[..., bytes]
) -> None:
    import ray

    client.embed([picture(0)], model="alpha")
    with (
        FeatureClient(endpoint.url, api_key="wrong-horse", max_retries=0) as stranger,
        pytest.raises(UnauthorizedError) as refused,
    ):
        stranger.embed([picture(0)], model="alpha")
    assert "wrong-horse" not in str(refused.value)
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    written = [file for file in session.rglob("*") if file.is_file()]
    assert any("serve" in file.parts for file in written)
    for key in (KEY, "wrong-horse"):
        assert [file for file in written if key.encode() in file.read_bytes()] == []
        for path in ("/v1/models", "/v2", "/openapi.json", "/metrics"):
            assert key not in httpx2.get(endpoint.url + path, headers={"X-API-Key": KEY}).text


def test_tritonclient__health_and_metadata(triton_client: Any) -> None:
    assert triton_client.is_server_live()
    assert triton_client.is_server_ready()
    assert triton_client.is_model_ready("alpha")
    assert triton_client.is_model_ready("alpha", "1")
    assert not triton_client.is_model_ready("gamma")
    assert "binary_tensor_data" in triton_client.get_server_metadata()["extensions"]
    metadata = triton_client.get_model_metadata("beta")
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert metadata["outputs"][1] == {"name": "tokens", "datatype": "FP32", "shape": [-1, -1, 64]}
    index = triton_client.get_model_repository_index()
    assert [(m["name"], m["state"]) for m in index] == [("alpha", "READY"), ("beta", "READY")]


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient__infer(
    triton_client: Any, picture: Callable[..., bytes], reference: Any, binary: bool
) -> None:
    pictures = [picture(seed, format=f) for seed, f in enumerate(("PNG", "BMP", "TIFF"))]
    outputs = [triton.InferRequestedOutput(n, binary_data=binary) for n in ("tokens", "pooled")]
    # Raw bytes do not fit JSON, so the input is binary either way.
    result = triton_client.infer(
        "alpha", [_triton_input(pictures)], outputs=outputs, request_id="42"
    )
    assert result.get_response()["id"] == "42"
    assert result.get_response()["parameters"]["grid"] == "3,4"
    for index, data in enumerate(pictures):
        pooled, tokens = reference(data)
        np.testing.assert_allclose(result.as_numpy("pooled")[index], pooled, atol=1e-5)
        np.testing.assert_allclose(result.as_numpy("tokens")[index], tokens, atol=1e-5)


def test_tritonclient__defaults_half_precision_and_compression(
    triton_client: Any, picture: Callable[..., bytes], reference: Any
) -> None:
    result = triton_client.infer(
        "alpha",
        [_triton_input([picture(5)])],
        parameters={"dtype": "FP16"},
        request_compression_algorithm="gzip",
    )
    tokens = result.as_numpy("tokens")
    assert tokens.dtype == np.float16
    np.testing.assert_allclose(tokens[0], reference(picture(5))[1], atol=5e-3)


def test_tritonclient__errors_are_readable(triton_client: Any) -> None:
    with pytest.raises(InferenceServerException, match="picture 0 cannot be used") as refused:
        triton_client.infer("alpha", [_triton_input([b"text"])])
    assert refused.value.status() == "422"
    with pytest.raises(InferenceServerException, match="there is no model 'gamma'"):
        triton_client.infer("gamma", [_triton_input([b"text"])])
    wrong = triton.InferInput("image", [1, 2], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 2), np.float32))
    with pytest.raises(InferenceServerException, match="send BYTES"):
        triton_client.infer("alpha", [wrong])


def test_client__embed_takes_bytes_paths_and_arrays(
    client: FeatureClient, picture: Callable[..., bytes], reference: Any, tmp_path: Path
) -> None:
    data = [picture(seed) for seed in range(3)]
    (tmp_path / "one.png").write_bytes(data[1])
    pixels = np.asarray(Image.open(io.BytesIO(data[2])))
    mixed = [data[0], tmp_path / "one.png", pixels, data[0], str(tmp_path / "one.png")]
    vectors = client.embed(mixed, model="alpha")
    assert vectors.shape == (5, 64)
    assert vectors.dtype == np.float32
    expected = np.stack([reference(data[i])[0] for i in (0, 1, 2, 0, 1)])
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
    assert client.embed([], model="alpha").shape == (0, 64)
    assert np.abs(client.embed(data[:1], model="beta") - vectors[:1]).max() > 1e-3


def test_client__features_map_back_to_the_picture(
    client: FeatureClient, picture: Callable[..., bytes], reference: Any
) -> None:
    features = client.features(picture(4, (90, 70)), model="alpha", layers=(2, 0))
    np.testing.assert_allclose(features.tokens, reference(picture(4, (90, 70)))[1], atol=1e-5)
    assert features.grid == (3, 4)
    assert features.stride == (16, 16)
    assert features.source_size == (70, 90)
    assert features.input_size == (48, 64)
    assert {layer: maps.shape for layer, maps in features.layers.items()} == {
        2: (64, 3, 4),
        0: (64, 3, 4),
    }
    corner = features.transform @ [90, 70, 1]
    np.testing.assert_allclose(corner, [64, 48, 1])
    assert features.valid_region == (0, 0, 64, 48)


def test_client__bad_pictures_fail_alone_under_load(
    client: FeatureClient, endpoint: Endpoint, picture: Callable[..., bytes], reference: Any
) -> None:
    bad = [picture(1, format="JPEG")[:300], picture(1, (1, 1)), b"text"]
    with pytest.raises(UnusablePictureError) as refused:
        client.embed([picture(0)] * 17 + bad, model="alpha")
    assert [p["index"] for p in refused.value.details["pictures"]] == [17, 18, 19]

    outcomes: dict[int, Any] = {}

    def call(index: int) -> None:
        data = bad[index % 3] if index % 4 == 3 else picture(index)
        with FeatureClient(endpoint.url, api_key=KEY) as own:
            try:
                outcomes[index] = own.embed([data], model="alpha")[0]
            except UnusablePictureError as error:
                outcomes[index] = error

    threads = [threading.Thread(target=call, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    for index in range(16):
        if index % 4 == 3:
            assert isinstance(outcomes[index], UnusablePictureError)
        else:
            expected = reference(picture(index))[0]
            np.testing.assert_allclose(outcomes[index], expected, rtol=0, atol=1e-5)


def test_client__refusals_become_exceptions(
    client: FeatureClient, endpoint: Endpoint, picture: Callable[..., bytes]
) -> None:
    with pytest.raises(UnknownModelError, match="models here: alpha, beta"):
        client.embed([picture(0)], model="gamma")
    with pytest.raises(InvalidRequestError, match="no layer 3"):
        client.features(picture(0), model="alpha", layers=(3,))
    with pytest.raises(TooLargeError):
        client.embed([bytes(64 * 2**20)], model="alpha")
    with pytest.raises(ServingError, match=r"uint8 \[H, W, C\]"):
        client.embed([np.zeros((4, 4, 3), np.float32)], model="alpha")
    with FeatureClient(endpoint.url) as keyless, pytest.raises(UnauthorizedError):
        keyless.models()
    assert client.models() == ["alpha", "beta"]
    assert client.ready()


def test_client__nobody_there(free_port: Callable[[], int]) -> None:
    with FeatureClient(f"http://127.0.0.1:{free_port()}", max_retries=1) as client:
        assert not client.ready()
        with pytest.raises(OverloadedError, match="does not answer"):
            client.models()


def test_client__imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, mimray.serving.client; "
        "print(sorted({'torch', 'ray', 'timm', 'PIL'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_serve_bundles__refuses_before_anything_starts(
    bundles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_port: Callable[[], int],
) -> None:
    monkeypatch.delenv("MIMRAY_API_KEY", raising=False)
    with pytest.raises(ServingError, match="no API key"):
        serve_bundles(bundles, host="0.0.0.0")
    with pytest.raises(ServingError, match="model's name"):
        serve_bundles({"a/b": bundles["alpha"]})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"port {port} .* is taken .*--port"):
            serve_bundles(bundles, port=port)
    with pytest.raises(BundleError, match="no bundle"):
        serve_bundles({"a": tmp_path / "nowhere"}, port=free_port())
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in bundles["alpha"].iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError):
        serve_bundles({"a": damaged}, port=free_port())


def test_size__inputs_of_other_sizes(client: FeatureClient, picture: Callable[..., bytes]) -> None:
    found = client.features(picture(3), "alpha", layers=(1,), size=(32, 96))
    assert (found.grid, found.input_size, found.stride) == ((2, 6), (32, 96), (16.0, 16.0))
    assert (found.tokens.shape, found.layers[1].shape) == ((12, 64), (64, 2, 6))
    with pytest.raises(InvalidRequestError, match="stride 16"):
        client.features(picture(3), "alpha", size=(32, 90))
    with pytest.raises(TooLargeError, match="more than the allowed"):
        client.features(picture(3), "alpha", size=(16000, 16000))


# Maps of beta before its last norm are large: 1e-5 is next to their rounding.
@pytest.mark.parametrize(("name", "norm"), [("alpha", False), ("beta", True)])
def test_remote_encoder__is_the_bundle(
    name: str, norm: bool, endpoint: Endpoint, served: dict[str, Path]
) -> None:
    import torch

    from mimray.service.commands.remote_encoder import RemoteEncoder
    from mimray.trainers.bundles import load_bundle
    from mimray.trainers.models.normalise import normalise

    near, far = load_bundle(served[name]), RemoteEncoder(endpoint.url, name, KEY)
    pixels = torch.randint(0, 256, (5, 3, 64, 80), dtype=torch.uint8)
    images = normalise(pixels, near.card.mean, near.card.std)
    for mine, theirs in zip(
        far.features(images, (2, -3), norm=norm), near.features(images, (2, -3), norm=norm),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(far(images).tokens, near(images).tokens, atol=1e-5, rtol=0)
    assert far(images).grid == near(images).grid == (64 // near.stride, 80 // near.stride)
    for fact in ("depth", "stride", "strides", "widths"):
        assert getattr(far, fact) == getattr(near, fact)
    kept = {"encoder", "image_size", "mean", "std", "layers", "weights_sha256"}
    assert far.card.model_dump(include=kept) == near.card.model_dump(include=kept)


def test_remote_encoder__unknown_model(endpoint: Endpoint) -> None:
    from mimray.service.commands.remote_encoder import RemoteEncoder

    with pytest.raises(UnknownModelError):
        RemoteEncoder(endpoint.url, "gamma", KEY)
