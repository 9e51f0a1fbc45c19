"""Importing: what is refused, what is told, the command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimray.service.cli.main import cli
from mimray.trainers import load_bundle
from mimray.trainers.bundles import METHOD, read_card
from mimray.trainers.convert import Imported, import_weights
from mimray.trainers.errors import BundleError, ConfigError


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["MIMRAY_EXPLOIT"],)


@pytest.mark.parametrize("kind", ["pickle", "object in a state", "text", "cut off", "a list"])
def test_import__refuses_what_is_not_plain_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setenv("MIMRAY_EXPLOIT", str(tmp_path / "owned"))
    file = tmp_path / "evil.pth"
    content = {"model": {"x": torch.zeros(3)}}
    if kind == "pickle":
        torch.save(Exploit(), file)
    elif kind == "object in a state":
        torch.save(content | {"args": Exploit()}, file)
    elif kind == "text":
        file.write_text("<html>404</html>")
    elif kind == "cut off":
        torch.save(content, file)
        file.write_bytes(file.read_bytes()[:-200])
    else:
        torch.save([torch.zeros(3)], file)

    result = CliRunner().invoke(cli, ["import", str(file), str(tmp_path / "b")])

    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {file}")
    assert len(result.stderr.splitlines()) == 1
    if kind in ("pickle", "object in a state"):
        assert "pickle that is not plain tensors" in result.stderr
    if kind == "text":
        assert "is no checkpoint" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pth"]


def test_import__damaged_safetensors_are_refused(tmp_path: Path):
    save_file({"x": torch.zeros(100)}, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[:-50])

    with pytest.raises(BundleError, match=r"w\.safetensors cannot be read"):
        import_weights(str(tmp_path / "w.safetensors"), tmp_path / "b")


@pytest.fixture
def vit_state(zoo: Any) -> dict[str, Tensor]:
    return dict(zoo.timm("vit", num_classes=0).state_dict())


def attempt(state: dict[str, Tensor], tmp_path: Path, **options: Any) -> Imported:
    torch.save({"model": state}, tmp_path / "w.pth")
    overrides = ["encoder.num_heads=4", *options.pop("overrides", [])]
    return import_weights(str(tmp_path / "w.pth"), tmp_path / "b", overrides=overrides, **options)


def test_import__lists_keys_that_do_not_fit(tmp_path: Path, vit_state: dict[str, Tensor]):
    del vit_state["blocks.1.norm2.bias"]
    vit_state["blocks.0.mystery"] = torch.zeros(1)
    vit_state["norm.weight"] = torch.zeros(5)

    with pytest.raises(BundleError) as caught:
        attempt(vit_state, tmp_path)

    for part in (
        "missing blocks.1.norm2.bias",
        "unexpected blocks.0.mystery",
        "norm.weight is (5,), wanted (32,)",
        "--partial",
    ):
        assert part in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]

    partial = attempt(vit_state, tmp_path, partial=True)

    assert set(partial.left_out) == {"blocks.0.mystery", "norm.weight"}
    assert set(partial.initialised) == {"blocks.1.norm2.bias", "norm.weight"}
    kept = load_file(tmp_path / "b/encoder.safetensors")
    assert torch.equal(kept["blocks.0.attn.qkv.weight"], vit_state["blocks.0.attn.qkv.weight"])
    assert torch.equal(kept["norm.weight"], torch.ones(32))
    load_bundle(tmp_path / "b")


def test_import__an_incomplete_head_is_refused_or_left_out(tmp_path: Path, zoo: Any):
    zoo.hf("beit").save_pretrained(tmp_path / "hf")
    state = load_file(tmp_path / "hf/model.safetensors")
    del state["lm_head.bias"]
    save_file(state, tmp_path / "hf/model.safetensors")

    with pytest.raises(BundleError, match=r"missing head\.bias"):
        import_weights(str(tmp_path / "hf"), tmp_path / "b")
    partial = import_weights(str(tmp_path / "hf"), tmp_path / "b", partial=True)

    assert not partial.complete
    assert set(partial.left_out) == {"mask_token", "head.weight"}
    assert partial.card.method == "beit"
    assert not (tmp_path / "b" / METHOD).exists()


def test_import__a_bias_that_one_block_lacks_is_missed(
    tmp_path: Path, vit_state: dict[str, Tensor]
):
    del vit_state["blocks.1.attn.qkv.bias"]

    with pytest.raises(BundleError, match=r"missing blocks\.1\.attn\.qkv\.bias"):
        attempt(vit_state, tmp_path)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("dist_token", (1, 1, 32), "a distillation token"),
        ("blocks.0.attn.gate.weight", (32, 32), "gates inside attention"),
        ("norm_pre.weight", (32,), "a norm before the first block"),
        ("patch_embed.backbone.stem.weight", (3,), "a convolutional stem"),
        ("blocks.0.attn.rel_pos_h", (7, 8), "relative positions of another kind"),
        ("pos_embed_spatial", (1, 16, 32), "positions in space and time"),
        ("patch_embed.proj.weight", (32, 3, 2, 8, 8), "our encoders have squares"),
        ("patch_embed.proj.weight", (32, 3, 8, 4), "our encoders have squares"),
        ("patch_embed.proj.weight", (32, 4, 8, 8), "'data.channels' is 4"),
        ("pos_embed", (1, 19, 32), "do not show the size of their input"),
    ],
)
def test_import__refuses_what_our_encoders_are_not(
    tmp_path: Path,
    vit_state: dict[str, Tensor],
    key: str,
    shape: tuple[int, ...],
    message: str,
):
    vit_state[key] = torch.zeros(shape)

    with pytest.raises((BundleError, ConfigError), match=message):
        attempt(vit_state, tmp_path, partial=True)
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


def test_import__refuses_other_models(tmp_path: Path, vit_state: dict[str, Tensor]):
    with pytest.raises(BundleError, match="neither a vit nor a swin"):
        attempt({"conv1.weight": torch.zeros(3)}, tmp_path)
    with pytest.raises(BundleError, match="holds no tensors by name"):
        attempt({}, tmp_path)
    placed = {k: v for k, v in vit_state.items() if k != "cls_token"}
    with pytest.raises(BundleError, match="do not show the size of their input"):
        attempt(placed, tmp_path, partial=True)
    with pytest.raises(BundleError, match=r"pos_embed is \(1, 17, 32\), wanted \(1, 16, 32\)"):
        attempt(placed, tmp_path, overrides=["data.image_size=32"])
    with pytest.raises(BundleError, match="no checkpoint at"):
        import_weights(str(tmp_path / "nowhere"), tmp_path / "b")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BundleError, match="is no model's folder"):
        import_weights(str(tmp_path / "folder"), tmp_path / "b")
    save_file(vit_state, tmp_path / "folder/model.safetensors")
    (tmp_path / "folder/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BundleError, match="'bert' of transformers is not one of"):
        import_weights(str(tmp_path / "folder"), tmp_path / "b")
    (tmp_path / "folder/config.json").write_text('{"model_type": "vit", "hidden_act": "relu"}')
    with pytest.raises(BundleError, match="activation is 'relu'"):
        import_weights(str(tmp_path / "folder"), tmp_path / "b")


def test_import__heads_and_sizes_that_weights_do_not_show(
    tmp_path: Path, vit_state: dict[str, Tensor]
):
    torch.save(vit_state, tmp_path / "w.pth")

    with pytest.raises(BundleError, match=r"--set encoder\.num_heads"):
        import_weights(str(tmp_path / "w.pth"), tmp_path / "b")

    sized = ["data.image_size=[16,64]", "data.mean=[0.1,0.2,0.3]"]
    wide = attempt(vit_state, tmp_path, overrides=sized).card
    assert (wide.image_size, wide.mean) == ((16, 64), (0.1, 0.2, 0.3))
    for wrong, message in (
        ("data.mena=1", "unknown key 'data.mena', did you mean 'data.mean'"),
        ("data.image_size=24x48", "'data.image_size' is '24x48'"),
        ("encoder.num_heads=five", "'encoder.num_heads' is 'five'"),
        ("method.mask_ratio=0.5", "says nothing of these weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            attempt(vit_state, tmp_path, overrides=[wrong])


def test_import__command_line(tmp_path: Path, vit_state: dict[str, Tensor]):
    torch.save(vit_state, tmp_path / "w.pth")
    arguments = ["import", str(tmp_path / "w.pth"), str(tmp_path / "b")]
    known = ["--set", "encoder.num_heads=4"]

    result = CliRunner().invoke(
        cli, [*arguments, *known, "--image-size", "48x40", "--name", "mine", "--json"]
    )

    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["image_size"], told["complete"]) == ([48, 40], False)
    assert "at 48x40, method not known, the encoder alone" in result.stderr
    assert "note: positions interpolated from 32x32 to 48x40 pixels" in result.stderr
    card = read_card(tmp_path / "b")
    assert (card.name, card.source) == ("mine", told["source"])
    wrong = CliRunner().invoke(cli, [*arguments, *known, "--image-size", "48*40"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "neither a side nor HEIGHTxWIDTH" in wrong.stderr
    odd = CliRunner().invoke(cli, [*arguments, *known, "--image-size", "50"])
    assert odd.exit_code == 2
    assert "does not divide data.image_size height 50" in odd.stderr
