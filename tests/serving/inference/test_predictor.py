"""Pictures to features without a protocol: the numbers, the company they came in, the limits."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimray.serving.config import Limits, ReplicaConfig
from mimray.serving.inference.options import Options
from mimray.serving.inference.placement import Sizing
from mimray.serving.inference.predictor import Prediction, Predictor, output_bytes
from mimray.serving.inference.timeline import Timeline
from mimray.serving.wire.errors import OverloadedError, TooLargeError, UnusablePictureError

CONFIG = ReplicaConfig(device="cpu", max_batch_size=8, batch_wait_ms=10)


@pytest.fixture
def predictor(bundles: dict[str, Path]) -> Predictor:
    return Predictor(bundles["alpha"], CONFIG, Limits())


def _predict(
    bundle: Path,
    data: list[Any],
    options: Options,
    limits: Limits | None = None,
    **config: Any,
) -> list[Any]:
    """Each picture as a request of its own, all at once."""

    async def main() -> list[Any]:
        settings = {"max_batch_size": 8, "batch_wait_ms": 20, **config}
        predictor = Predictor(bundle, ReplicaConfig(device="cpu", **settings), limits or Limits())
        try:
            jobs = (predictor.predict([picture], options) for picture in data)
            return await asyncio.gather(*jobs, return_exceptions=True)
        finally:
            await predictor.close()

    return asyncio.run(main())


def test_predict__same_numbers_whatever_the_company(
    bundles: dict[str, Path], picture: Callable[..., bytes], reference: Callable[..., Any]
) -> None:
    pictures = [picture(seed, (60 + seed, 80)) for seed in range(11)]
    found = _predict(bundles["alpha"], [*pictures, b"broken"], Options(tokens=True))
    assert isinstance(found.pop(), UnusablePictureError)
    for data, (result,) in zip(pictures, found, strict=True):
        pooled, tokens = reference(data)
        np.testing.assert_allclose(result.outputs["pooled"], pooled, rtol=0, atol=1e-5)
        np.testing.assert_allclose(result.outputs["tokens"], tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [Sizing("keep"), Sizing("native"), Sizing("stretch", (32, 80))])
def test_predict__batched_or_alone_at_any_size(
    bundles: dict[str, Path], picture: Callable[..., bytes], size: Sizing
) -> None:
    shapes = [(90, 70), (70, 90), (64, 64), (90, 70), (90, 70)]
    pictures = [picture(seed, shape) for seed, shape in enumerate(shapes)]
    options = Options(tokens=True, layers=(0, 2), pyramid=2, sizing=size)
    together = _predict(bundles["alpha"], pictures, options)
    alone = [r for p in pictures for r in _predict(bundles["alpha"], [p], options)]
    for (one,), (other,) in zip(together, alone, strict=True):
        assert one.placement == other.placement
        assert one.outputs.keys() == other.outputs.keys() == set(options.names)
        for name, values in one.outputs.items():
            np.testing.assert_allclose(values, other.outputs[name], rtol=0, atol=1e-5)


def test_predict__padding_does_not_enter_the_pooled_vector(
    bundles: dict[str, Path], picture: Callable[..., bytes]
) -> None:
    data = picture(3, (30, 120))  # wide: 48 x 64 shows it on 48 x 12
    ((tall,),) = _predict(
        bundles["alpha"], [picture(3, (30, 120))], Options(tokens=True, sizing=Sizing("keep"))
    )
    assert tall.placement.shown_size == (48, 12)
    tokens = tall.outputs["tokens"].reshape(3, 4, 64)
    np.testing.assert_allclose(tall.outputs["pooled"], tokens[:, 0].mean(0), atol=1e-5)
    # The padding is the mean colour, which is nothing once normalised.
    predictor = Predictor(bundles["alpha"], CONFIG, Limits())
    pixels = predictor._preparer.prepare(data, Sizing("keep")).pixels
    assert pixels[:, :, 12:].reshape(3, -1).std(axis=1).max() == 0
    np.testing.assert_allclose(pixels[:, 0, -1] / 255, (0.4, 0.5, 0.6), atol=0.5 / 255)


def test_predict__pixels_and_normalised_inputs(
    bundles: dict[str, Path], picture: Callable[..., bytes], reference: Callable[..., Any]
) -> None:
    data = picture(5)
    pooled, _ = reference(data)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    resized = Image.open(io.BytesIO(data)).resize((64, 48), Image.Resampling.BICUBIC)
    mean, std = np.array((0.4, 0.5, 0.6)), np.array((0.2, 0.25, 0.3))
    normalised = ((np.asarray(resized) / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)
    found = _predict(bundles["alpha"], [data, pixels, normalised], Options())
    for (result,) in found:
        np.testing.assert_allclose(result.outputs["pooled"], pooled, rtol=0, atol=1e-5)
    bad = normalised.copy()
    bad[0, 0, 0] = np.nan
    (refused,) = _predict(bundles["alpha"], [bad], Options())
    assert refused.details["pictures"][0]["reason"] == "not_finite"


@pytest.mark.parametrize(("dtype", "rtol"), [("float16", 1e-3), ("bfloat16", 8e-3), ("int8", 1.0)])
def test_predict__narrow_types(
    bundles: dict[str, Path], picture: Callable[..., bytes], dtype: Any, rtol: float
) -> None:
    data = picture(6)
    ((wide,),) = _predict(bundles["alpha"], [data], Options(tokens=True, layers=(1,)))
    ((narrow,),) = _predict(
        bundles["alpha"], [data], Options(tokens=True, layers=(1,), dtype=dtype)
    )
    for name in ("pooled", "tokens", "layer_1"):
        values = narrow.outputs[name]
        if dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        if dtype == "int8":
            scale = narrow.outputs[f"{name}_scale"]
            assert (np.abs(values * scale - wide.outputs[name]) <= scale * 0.501).all()
        else:
            np.testing.assert_allclose(values, wide.outputs[name], rtol=rtol, atol=1e-3)


def test_predict__refuses_what_would_be_too_much(
    bundles: dict[str, Path], picture: Callable[..., bytes]
) -> None:
    large = Options(tokens=True, sizing=Sizing("stretch", (1024, 1024)))
    (too_large,) = _predict(bundles["alpha"], [picture(1)], large, Limits(answer_mib=1))
    assert isinstance(too_large, TooLargeError)
    frames = [Image.new("RGB", (20, 20), (i, 0, 0)) for i in range(5)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    limits = Limits(picture_frames=3)
    (animated,) = _predict(bundles["alpha"], [file.getvalue()], Options(), limits)
    assert animated.details["pictures"][0]["reason"] == "too_many_frames"
    found = _predict(bundles["alpha"], [picture(i) for i in range(9)], Options(),
                     max_queue_size=4)  # fmt: skip
    refused = [r for r in found if isinstance(r, OverloadedError)]
    assert len(refused) == 5
    assert all(r.retry_after_s >= 1 for r in refused)


def test_predict__a_slow_model_is_not_queued_for_longer_than_allowed(
    bundles: dict[str, Path], picture: Callable[..., bytes]
) -> None:
    async def main() -> None:
        config = ReplicaConfig(device="cpu", max_wait_s=1.0)
        predictor = Predictor(bundles["alpha"], config, Limits())
        predictor._seconds_per_picture = 0.4
        first = asyncio.gather(*(predictor.predict([picture(i)], Options()) for i in range(3)))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as refused:
            await predictor.predict([picture(9)], Options())
        assert refused.value.retry_after_s == 1
        await first
        assert predictor.waiting == 0
        await predictor.predict([picture(9)], Options())
        await predictor.close()

    asyncio.run(main())


def test_timeline__covers_the_phases(predictor: Predictor, picture: Callable[..., bytes]) -> None:
    async def main() -> Timeline:
        timeline = Timeline()
        await predictor.predict([picture(1), picture(2)], Options(), timeline)
        return timeline

    timeline = asyncio.run(main())
    assert {name for name, _, _ in timeline.spans} == {"queue", "decode", "batch_wait", "model"}
    assert all(start <= end for _, start, end in timeline.spans)
    assert timeline.seconds("model") > 0
    assert timeline.seconds("nothing") == 0


def test_output_bytes__is_what_comes_out(
    predictor: Predictor, picture: Callable[..., bytes]
) -> None:
    options = Options(tokens=True, layers=(0, 2), pyramid=2, dtype="float16")

    async def main() -> Prediction:
        return (await predictor.predict([picture(1)], options))[0]

    found = asyncio.run(main())
    size = sum(values.nbytes for values in found.outputs.values())
    # Levels of odd grids are kept whole, so a little more than the arithmetic.
    assert size * 0.97 <= output_bytes(predictor.info, found.placement, options) <= size


def test_compile__where_it_pays_and_never_at_the_price_of_an_answer(
    bundles: dict[str, Path],
    picture: Callable[..., bytes],
    reference: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import torch

    from mimray.serving.inference.devices import compile_encoder, pack_linears, what_pays

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [what_pays("auto", cpu), what_pays("auto", cuda)] == [pack_linears, compile_encoder]
    assert [what_pays(True, cpu), what_pays(False, cuda)] == [compile_encoder, None]
    calls = []

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def compiled(*arguments: Any) -> Any:
            calls.append(options)
            if len(calls) == 1:
                raise RuntimeError("no compiler\nand a long story")
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)

    async def pooled() -> Any:
        predictor = Predictor(bundles["alpha"], ReplicaConfig(device="cpu", compile=True), Limits())
        predictor.warm_up()
        (found,) = await predictor.predict([picture(1)], Options())
        await predictor.close()
        return found.outputs["pooled"]

    expected = reference(picture(1))[0]
    np.testing.assert_allclose(asyncio.run(pooled()), expected, atol=1e-5)
    assert "not compiled: no compiler" in caplog.text
    assert len(calls) == 1
    np.testing.assert_allclose(asyncio.run(pooled()), expected, atol=1e-5)
    assert len(calls) > 2


@pytest.mark.parametrize(
    "tree",
    [
        {"name": "vit", "width": 64, "depth": 2, "num_heads": 4, "patch_size": 16},
        {"name": "vit", "width": 64, "depth": 2, "num_heads": 4, "rel_pos_bias": "per_block"},
        {"name": "swin", "width": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ],
)
def test_pack_linears__same_numbers_from_other_kernels(tree: dict[str, Any]) -> None:
    import torch
    from pydantic import TypeAdapter

    from mimray.serving.inference.devices import pack_linears
    from mimray.trainers.bundles import BundleCard, FrozenEncoder
    from mimray.trainers.config.model import EncoderConfig
    from mimray.trainers.models import build_encoder

    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("this torch has no oneDNN")
    torch.manual_seed(0)
    config = TypeAdapter(EncoderConfig).validate_python(tree)
    card = BundleCard(
        name="m", encoder=config, image_size=(64, 64), channels=3, mean=(0.5,) * 3,
        std=(0.5,) * 3, layers=(0, 1),
    )  # fmt: skip
    encoder = FrozenEncoder(build_encoder(config, (64, 64), 3), card)
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        plain = encoder(images).tokens
        linears = [module for module in encoder.modules() if type(module) is torch.nn.Linear]
        pack_linears(encoder)
        packed = encoder(images).tokens
        alone = encoder(images[:1]).tokens
    assert len(linears) >= 8  # four a block
    assert all("forward" in vars(linear) for linear in linears)  # or nothing was replaced
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, packed[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "parts",
    [
        {"rope": "dinov3", "positions": "none", "num_registers": 4, "key_bias": False},
        {"rope": "eva02", "mlp": "swiglu", "mlp_norm": True, "attn_norm": True},
        {"class_token": False, "mlp": "gelu_tanh", "num_registers": 1},
    ],
    ids=str,
)
def test_predict__encoders_with_other_parts(
    tmp_path: Path, picture: Callable[..., bytes], parts: dict[str, Any]
) -> None:
    """Tokens are those of the patches, and the class token is no register."""
    import torch

    from mimray.trainers.bundles import BundleCard, load_bundle, save_bundle
    from mimray.trainers.config.model import ViTConfig
    from mimray.trainers.models import build_encoder

    shape = {"width": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "positions": "learned"}
    config = ViTConfig.model_validate({"name": "vit", **shape, **parts})
    torch.manual_seed(0)
    encoder = build_encoder(config, (32, 48))
    card = BundleCard(
        name="parts", encoder=config, image_size=(32, 48), channels=3, mean=(0.5,) * 3,
        std=(0.5,) * 3, layers=(1,), pooling="cls" if config.class_token else "mean",
    )  # fmt: skip
    save_bundle(tmp_path / "b", card, encoder.state_dict())
    data = picture(1, (48, 32))
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 127.5 - 1
    wanted = load_bundle(tmp_path / "b")(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()))

    ((found,),) = _predict(tmp_path / "b", [data], Options(tokens=True, pooling=card.pooling))

    assert found.outputs["tokens"].shape == (24, 32)
    np.testing.assert_allclose(found.outputs["tokens"], wanted.tokens[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.outputs["pooled"], wanted.pooled[0], rtol=0, atol=1e-4)
    info = Predictor(tmp_path / "b", CONFIG, Limits()).info
    assert info.has_class_token == config.class_token
