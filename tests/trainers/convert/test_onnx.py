"""Encoders as ONNX graphs: torch's numbers, whatever the batch, and refused where they are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mimray.service.cli.main import cli
from mimray.trainers import load_bundle
from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.model import ConvConfig, EncoderConfig, SwinConfig, ViTConfig
from mimray.trainers.convert import export_onnx
from mimray.trainers.convert.onnx_encoder import load_onnx
from mimray.trainers.errors import BundleError, ConfigError
from mimray.trainers.models import build_encoder

SHAPE = {"name": "vit", "width": 48, "depth": 2, "num_heads": 4, "patch_size": 16}
VIT = ViTConfig.model_validate(SHAPE)


def bundle(folder: Path, shape: EncoderConfig, size: tuple[int, int], **more: Any) -> Path:
    torch.manual_seed(0)
    encoder = build_encoder(shape, size, 3)
    for parameter in encoder.parameters():  # zeros at the start would hide what is lost
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    card = BundleCard(
        name="b", encoder=shape, image_size=size, channels=3, mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3), layers=(0, 1), **more,
    )  # fmt: skip
    save_bundle(folder, card, encoder.state_dict())
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle, and its graph."""
    folder = tmp_path_factory.mktemp("onnx")
    made = bundle(folder / "vit", VIT, (64, 96))
    export_onnx(made, folder / "out")
    return made, folder / "out"


def outputs_of(made: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    """What the bundle gives, by the graph's names."""
    frozen = load_bundle(made)
    features = frozen(images)
    maps = zip(frozen.card.layers, frozen.features(images), strict=True)
    return {
        "pooled": features.pooled.numpy(),
        "tokens": features.tokens.numpy(),
        **{f"layer_{layer}": values.numpy() for layer, values in maps},
    }


def test_graph__gives_the_bundles_numbers_for_batches_of_any_number(
    exported: tuple[Path, Path],
) -> None:
    made, out = exported
    encoder = load_onnx(out)
    for count in (1, 3, 17):
        images = torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(count))
        found = encoder(images.numpy())
        expected = outputs_of(made, images)
        assert list(found) == ["pooled", "tokens", "layer_0", "layer_1"] == list(expected)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=0, atol=2e-5)


def test_graph__sees_pictures_as_the_endpoint_does(exported: tuple[Path, Path]) -> None:
    from mimray.trainers.data.transforms import inference_view
    from mimray.trainers.models.normalise import normalise

    made, out = exported
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (70, 50, 3), dtype=np.uint8))
    view = torch.from_numpy(inference_view(picture, (64, 96), "bicubic")[None])
    expected = outputs_of(made, normalise(view, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    found = load_onnx(out).embed([picture])
    np.testing.assert_allclose(found["pooled"], expected["pooled"], rtol=0, atol=2e-5)


def test_folder__says_how_close_it_is_and_how_to_feed_it(exported: tuple[Path, Path]) -> None:
    import onnx

    made, out = exported
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["weights_sha256"] == load_bundle(made).card.weights_sha256
    ((row),) = certificate["parity"]
    assert (row["image_size"], row["dtype"]) == ([64, 96], "float32")
    for told in row["outputs"].values():
        assert 0 < told["mean_difference"] <= told["max_difference"] < 1e-4
    model = onnx.load(out / "1/model.onnx")
    onnx.checker.check_model(model)
    facts = {p.key: json.loads(p.value) for p in model.metadata_props if p.key[:7] == "mimray."}
    assert facts["mimray.mean"] == [0.4, 0.5, 0.6]
    assert facts["mimray.interpolation"] == "bicubic"
    text = (out / "config.pbtxt").read_text()
    assert 'name: "images", data_type: TYPE_FP32, dims: [3, 64, 96]' in text
    assert 'name: "tokens", data_type: TYPE_FP32, dims: [24, 48]' in text
    assert 'name: "layer_1", data_type: TYPE_FP32, dims: [48, 4, 6]' in text


def test_load__refuses_another_graph_and_other_numbers(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    import onnx
    from onnx import numpy_helper

    _, out = exported
    with pytest.raises(BundleError, match="holds no exported ONNX"):
        load_onnx(tmp_path)
    changed = tmp_path / "changed"
    (changed / "1").mkdir(parents=True)
    for name in ("certificate.json", "check.safetensors", "1/model.onnx"):
        (changed / name).write_bytes((out / name).read_bytes())
    load_onnx(changed)
    model = onnx.load(changed / "1/model.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    values = numpy_helper.to_array(weight) * 1.1
    weight.CopyFrom(numpy_helper.from_array(values.astype(np.float32), weight.name))
    onnx.save(model, changed / "1/model.onnx")
    with pytest.raises(BundleError, match="differs from the certificate's"):
        load_onnx(changed)
    (changed / "1/model.onnx").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="cannot be read"):
        load_onnx(changed)


def test_export__by_the_command_at_another_size(exported: tuple[Path, Path], tmp_path: Path):
    made, out = exported
    run = CliRunner().invoke
    arguments = ["export", str(made), str(tmp_path / "out"), "--format", "onnx"]
    done = run(cli, [*arguments, "--image-size", "48x32", "--layers", "-1"])
    assert done.exit_code == 0, done.output
    assert "48x32 pixels; within" in done.stdout
    images = torch.randn(2, 3, 48, 32)
    found = load_onnx(tmp_path / "out")(images.numpy())
    assert list(found) == ["pooled", "tokens", "layer_1"]
    # Positions are those that torch interpolates for this size.
    np.testing.assert_allclose(found["tokens"], outputs_of(made, images)["tokens"], atol=2e-5)
    for wrong, said in (
        (["--image-size", "50"], "multiple of the stride 16"),
        (["--layers", "2"], "there are 0 to 1"),
    ):
        refused = run(cli, [*arguments[:2], str(tmp_path / "no"), *arguments[3:], *wrong])
        assert (refused.exit_code, said in refused.output) == (2, True), refused.output
    there = run(cli, [*arguments[:2], str(out), "--format", "onnx"])
    assert (there.exit_code, "is not empty" in there.output) == (2, True)
    other = run(cli, [*arguments[:3], "--layers", "1"])
    assert (other.exit_code, "go with --format onnx" in other.output) == (2, True)


def test_conv__takes_pictures_of_any_size(tmp_path: Path) -> None:
    shape = ConvConfig.model_validate({"name": "conv", "widths": (8, 16)})
    made = bundle(tmp_path / "conv", shape, (32, 32))
    # In a process of its own: the checks of shapes here take no sizes that are left open.
    command = [sys.executable, "-m", "mimray", "export", str(made), str(tmp_path / "out")]
    done = subprocess.run([*command, "--format", "onnx"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "any size; within" in done.stdout
    certificate = json.loads((tmp_path / "out/certificate.json").read_text())
    assert [row["image_size"] for row in certificate["parity"]] == [[32, 32], [36, 40], [16, 16]]
    images = torch.randn(2, 3, 40, 56)
    found = load_onnx(tmp_path / "out")(images.numpy())
    np.testing.assert_allclose(found["pooled"], outputs_of(made, images)["pooled"], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"positions": "learned", "num_registers": 4}, (48, 48)),
        ({"rel_pos_bias": "shared", "layer_scale": 0.1}, (48, 64)),
        ({"positions": "none", "rope": "dinov3"}, (48, 64)),
        ({"mlp": "swiglu", "qk_norm": True}, (48, 64)),
        (None, (64, 64)),
    ],
    ids=["registers", "relative", "rotary", "swiglu", "swin"],
)
def test_graph__of_every_kind_of_encoder(
    tmp_path: Path, changes: dict[str, Any] | None, size: tuple[int, int]
) -> None:
    shape: EncoderConfig = SwinConfig.model_validate({"name": "swin_tiny", "width": 24})
    if changes is not None:
        shape = ViTConfig.model_validate({**SHAPE, **changes})
    pooling = "cls" if isinstance(shape, ViTConfig) else "mean"
    made = bundle(tmp_path / "b", shape, size, pooling=pooling)
    export_onnx(made, tmp_path / "out")
    images = torch.randn(3, 3, *size)
    found, expected = load_onnx(tmp_path / "out")(images.numpy()), outputs_of(made, images)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=5e-5)


def test_export__without_the_packages_says_what_to_install(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnx" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"mimray\[onnx\]"):
        export_onnx(exported[0], tmp_path / "out")
