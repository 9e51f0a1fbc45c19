"""ViT and Swin held against timm and transformers on the same weights."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimray.trainers.config.model import SwinConfig, ViTConfig
from mimray.trainers.models import build_encoder
from mimray.trainers.models.encoder import Encoder

PATCH, WIDTH, HEADS, DEPTH = 8, 32, 4, 3
SWIN = {"patch_size": 2, "width": 16, "depths": (2, 2, 2), "num_heads": (2, 2, 4), "mlp_ratio": 2}
# As timm and transformers call it.
SWIN_ELSEWHERE: dict[str, Any] = {k if k != "width" else "embed_dim": v for k, v in SWIN.items()}


def vit(size: tuple[int, int] = (32, 48), in_chans: int = 3, **changes: Any) -> Encoder:
    shape = {"patch_size": PATCH, "width": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    config = ViTConfig.model_validate({"name": "vit", **shape, **changes})
    return built(config, size, in_chans)


def swin(size: tuple[int, int] = (24, 48), in_chans: int = 3, **changes: Any) -> Encoder:
    config = SwinConfig.model_validate({"name": "swin", **SWIN, "window_size": 3, **changes})
    return built(config, size, in_chans)


def built(config: Any, size: tuple[int, int], in_chans: int) -> Encoder:
    """An encoder of the same weights whatever ran before."""
    torch.manual_seed(0)
    return randomise(build_encoder(config, size, in_chans))


def randomise(module: Any) -> Any:
    """Move every trained parameter off its initial value, so that each one matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def pictures(size: tuple[int, int], in_chans: int = 3, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, in_chans, *size, generator=generator)


def hide(encoder: Encoder, size: tuple[int, int], batch: int = 2) -> Tensor:
    """A mask with another count in each row."""
    n = size[0] * size[1] // encoder.stride**2
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(2)) < 0.4


def mask_token(encoder: Encoder) -> Tensor:
    return torch.randn(1, 1, encoder.embed_width, generator=torch.Generator().manual_seed(3))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def whole(features: Any) -> Tensor:
    return torch.cat([features.prefix, features.tokens], dim=1)


ENCODERS = {
    "vit": vit,
    "vit-beit": lambda *a, **k: vit(
        *a, **k, positions="none", rel_pos_bias="shared", layer_scale=0.1
    ),
    "vit-per-block": lambda *a, **k: vit(*a, **k, positions="learned", rel_pos_bias="per_block"),
    "vit-dinov3": lambda *a, **k: vit(
        *a, **k, positions="none", rope="dinov3", num_registers=3, layer_scale=0.1, key_bias=False
    ),
    "vit-eva02": lambda *a, **k: vit(
        *a, **k, positions="learned", rope="eva02", mlp="swiglu", attn_norm=True, mlp_norm=True
    ),
    "vit-siglip": lambda *a, **k: vit(
        *a, **k, positions="learned", class_token=False, mlp="gelu_tanh", norm="rms", qk_norm=True
    ),
    "swin": swin,
}
each_encoder = pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS.keys())


# The same weights elsewhere ------------------------------------------------------------------


TIMM_VIT: dict[str, Any] = {
    "img_size": (32, 48),
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "num_classes": 0,
}


@pytest.mark.parametrize("layer_scale", [None, 0.1])
@pytest.mark.parametrize("size", [(32, 48), (64, 40)])
def test_vit__learned_positions_equal_timm_at_any_size(
    size: tuple[int, int], layer_scale: float | None
):
    ours = vit(positions="learned", layer_scale=layer_scale)
    theirs = VisionTransformer(**TIMM_VIT, init_values=layer_scale, dynamic_img_size=True).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)

    x = pictures(size)
    close(whole(ours(x)), theirs.forward_features(x))


def timm_beit(ours: Encoder, **kwargs: Any) -> Beit:
    theirs = Beit(**TIMM_VIT, global_pool="token", **kwargs).eval()
    state = {}
    for name, value in ours.state_dict().items():
        if name.endswith("qkv.bias"):
            # The key third has no place in BEiT: that ours is random here shows it does nothing.
            block = name.removesuffix("qkv.bias")
            state[f"{block}q_bias"], _, state[f"{block}v_bias"] = value.chunk(3)
        else:
            name = re.sub(r"ls(\d)\.gamma", r"gamma_\1", name)
            state[re.sub(r"(blocks\.\d+)\.rel_pos_bias", r"\1.attn", name)] = value
    theirs.load_state_dict(state, strict=True)
    return theirs


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("positions", ["none", "learned"])
def test_vit__relative_positions_equal_timms_beit(shared: bool, positions: str):
    ours = vit(
        rel_pos_bias="shared" if shared else "per_block", positions=positions, layer_scale=0.1
    )
    theirs = timm_beit(
        ours,
        use_abs_pos_emb=positions == "learned",
        use_shared_rel_pos_bias=shared,
        use_rel_pos_bias=not shared,
        init_values=0.1,
    )

    x = pictures((32, 48))
    close(whole(ours(x)), theirs.forward_features(x))

    # The same at a larger input, where tables and positions are resized.
    theirs.set_input_size((72, 88))
    x = pictures((72, 88))
    torch.testing.assert_close(whole(ours(x)), theirs.forward_features(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(24, 48), (24, 24), (48, 72), (32, 40)])
@pytest.mark.parametrize("window_size", [3, 4])
def test_swin__equals_timm_at_any_size(size: tuple[int, int], window_size: int):
    # Windows of 4 are wider than the last stage and do not divide the grids.
    ours = swin(window_size=window_size)
    shape = {"img_size": (24, 48), "window_size": window_size, "dynamic_img_size": True}
    theirs = SwinTransformer(**SWIN_ELSEWHERE, **shape, num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)

    x = pictures(size)
    features = ours(x)
    close(features.tokens, theirs.forward_features(x).flatten(1, 2))
    assert features.prefix.shape == (2, 0, 64)
    maps = theirs.forward_intermediates(x, norm=True, intermediates_only=True)
    for mine, other in zip(ours.features(x, (0, 1, 2)), maps, strict=True):
        close(mine, other)


def from_transformers(state: dict[str, Tensor], token: Tensor, heads: int) -> dict[str, Tensor]:
    """Our names to those of transformers, with q, k and v apart."""
    table = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "patch_embed.norm": "embeddings.norm",
        "rel_pos_bias.": "shared_position_bias.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.relative": "attention.relative_position_bias.relative",
        "attn.proj": "attention.o_proj",
        "attn.qkv": "attention.{}_proj",
        "ls1.gamma": "lambda_1",
        "ls2.gamma": "lambda_2",
    }
    renamed = {"embeddings.mask_token": token}
    for name, value in state.items():
        for ours, theirs in table.items():
            name = name.replace(ours, theirs)
        name = re.sub(r"^norm\.", "layernorm.", name)
        name = re.sub(r"^blocks\.", "layers.", name)
        # They merge patches at the end of a stage, timm at the start of the next.
        name = re.sub(r"^layers\.(\d)\.b", r"encoder.layers.\1.b", name)
        name = re.sub(r"^layers\.(\d)\.d", lambda m: f"encoder.layers.{int(m[1]) - 1}.d", name)
        for part, third in zip("qkv", value.chunk(3), strict=False):
            renamed[name.format(part)] = third if "{}" in name else value
    return renamed


VIT_KEYS = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "patch_size": PATCH,
    "layer_norm_eps": 1e-6,
}


def hf_beit(size: tuple[int, int]) -> nn.Module:
    config = transformers.BeitConfig(
        **VIT_KEYS,
        image_size=size,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.1,
        use_mean_pooling=False,
    )
    return transformers.BeitModel(config, add_pooling_layer=False)


def hf_vit(size: tuple[int, int]) -> nn.Module:
    config = transformers.ViTConfig(**VIT_KEYS, image_size=size)
    return transformers.ViTModel(config, add_pooling_layer=False, use_mask_token=True)


def hf_swin(size: tuple[int, int]) -> nn.Module:
    config = transformers.SwinConfig(**SWIN_ELSEWHERE, image_size=size, window_size=3)
    return transformers.SwinModel(config, add_pooling_layer=False, use_mask_token=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        # transformers' BEiT mixes up rows and columns of the table where they are not as many.
        (lambda: ENCODERS["vit-beit"]((32, 32)), hf_beit((32, 32))),
        (lambda: vit((32, 48), positions="learned"), hf_vit((32, 48))),
        (lambda: swin((48, 72)), hf_swin((48, 72))),
    ],
    ids=["beit", "vit", "swin"],
)
def test_encoder__equals_transformers_with_and_without_mask_token(
    make: Any, theirs: Any, masked: bool
):
    ours = make()
    token, x = mask_token(ours), pictures(ours.image_size)
    state = from_transformers(ours.state_dict(), token, HEADS)
    missing, unexpected = theirs.eval().load_state_dict(state, strict=False)
    assert not missing
    assert all(name.endswith("k_proj.bias") for name in unexpected)

    if masked:
        mask = hide(ours, ours.image_size)
        features = ours(x, mask, token)
        cells = 4 if isinstance(theirs, transformers.SwinModel) else 1
        mask = mask.unflatten(1, features.grid)
        mask = mask.repeat_interleave(cells, 1).repeat_interleave(cells, 2).flatten(1)
        close(whole(features), theirs(x, bool_masked_pos=mask).last_hidden_state)
    else:
        close(whole(ours(x)), theirs(x).last_hidden_state)


# What parts there are, and how they begin ----------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "trained"), [("sincos", False), ("learned", True), ("none", None)]
)
def test_vit__positions_are_frozen_trained_or_absent(positions: str, trained: bool | None):
    encoder = vit(positions=positions)
    found = dict(encoder.named_parameters()).get("pos_embed")
    assert (None if found is None else found.requires_grad) == trained
    if found is not None:
        assert found.shape == (1, 1 + 4 * 6, WIDTH)


def test_vit__norm_eps_reaches_every_norm():
    norms = [m for m in vit(norm_eps=1e-3).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * DEPTH + 1
    assert {m.eps for m in norms} == {1e-3}


@pytest.mark.parametrize("make", [vit, swin])
def test_encoder__drop_path_rises_linearly_over_all_blocks(make: Any):
    rates = [
        (block.drop_path1, block.drop_path2)
        for block in make(drop_path=0.5).modules()
        if hasattr(block, "drop_path1")
    ]
    found = [[getattr(path, "drop_prob", 0.0) for path in paths] for paths in rates]
    expected = np.linspace(0, 0.5, 3 if make is vit else 6)
    np.testing.assert_allclose(found, np.stack([expected, expected], axis=1))


def test_vit__key_bias_has_no_gradient():
    encoder = ENCODERS["vit-beit"]()
    encoder(pictures((32, 48))).tokens.square().sum().backward()
    for block in encoder.blocks:
        query, key, value = block.attn.qkv.bias.grad.chunk(3)
        assert key.abs().max() < 1e-5 * min(query.abs().max(), value.abs().max())


# What every encoder does ---------------------------------------------------------------------


@each_encoder
@pytest.mark.parametrize("size", [(24, 48), (48, 24), (72, 40)])
def test_encoder__maps_fit_strides_and_end_with_the_tokens(make: Any, size: tuple[int, int]):
    encoder, x = make((24, 48), 5), pictures(size, 5)

    features = encoder(x)
    maps = encoder.features(x, range(encoder.depth))

    for found, width, stride in zip(maps, encoder.widths, encoder.strides, strict=True):
        assert found.shape == (2, width, size[0] // stride, size[1] // stride)
    close(maps[-1].flatten(2).transpose(1, 2), features.tokens)
    close(features.tokens.mean(dim=1), features.pooled)
    assert features.grid == (size[0] // encoder.stride, size[1] // encoder.stride)
    bare = encoder.features(x, (-1, 0), norm=False)
    close(encoder.norm(bare[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), maps[-1])
    assert torch.equal(bare[1], maps[0]) == (make is swin)


@each_encoder
@pytest.mark.parametrize("size", [(24, 48), (48, 24)])
def test_encoder__mask_token_hides_exactly_the_pixels_of_hidden_tokens(
    make: Any, size: tuple[int, int]
):
    encoder = make((24, 48))
    mask = hide(encoder, size)
    token = mask_token(encoder).requires_grad_()
    x = pictures(size).requires_grad_()

    features = encoder(x, mask, token)
    features.tokens.square().sum().backward()

    s = encoder.stride
    seen = x.grad.abs().sum(dim=1) > 0  # B H W
    hidden = mask.unflatten(1, features.grid).repeat_interleave(s, 1).repeat_interleave(s, 2)
    assert torch.equal(seen, ~hidden)
    assert token.grad.abs().sum() > 0
    close(encoder(x, torch.zeros_like(mask), token).tokens, encoder(x).tokens)


@each_encoder
def test_encoder__checkpointing_gives_the_same_gradients(make: Any):
    encoder = make((24, 48), drop_path=0.5).train()
    x, token = pictures((24, 48), batch=4), mask_token(encoder)
    mask = hide(encoder, (24, 48), batch=4)

    def gradients(checkpointing: bool) -> list[Tensor]:
        encoder.activation_checkpointing = checkpointing
        encoder.zero_grad()
        torch.manual_seed(0)
        encoder(x, mask, token).tokens.square().sum().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.requires_grad]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        close(again, plain)


@each_encoder
@pytest.mark.parametrize("size", [(24, 48), (48, 24)])
def test_encoder__cast_to_bf16_stays_bf16(make: Any, size: tuple[int, int]):
    encoder, x = make((24, 48)), pictures(size)
    token, mask = mask_token(encoder), hide(encoder, size)
    exact = encoder(x, mask, token).tokens

    for parameter in encoder.parameters():  # buffers stay fp32, as DeepSpeed leaves them
        parameter.data = parameter.data.bfloat16()
    features = encoder(x.bfloat16(), mask, token)

    assert {t.dtype for t in (features.tokens, features.prefix, features.pooled)} == {
        torch.bfloat16
    }
    assert (features.tokens - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_swin__mask_without_token_is_refused():
    encoder = swin()
    with pytest.raises(AssertionError, match="every token"):
        encoder(pictures((24, 48)), hide(encoder, (24, 48)))


def test_swin__masks_of_the_built_size_are_made_once(monkeypatch: pytest.MonkeyPatch):
    encoder, made = swin(), []
    original = SwinTransformerBlock.get_attn_mask

    def counted(self: Any, *args: Any) -> Any:
        made.append(self)
        return original(self, *args)

    monkeypatch.setattr(SwinTransformerBlock, "get_attn_mask", counted)
    encoder(pictures((24, 48)))
    assert not made
    encoder(pictures((48, 48)))
    assert made
