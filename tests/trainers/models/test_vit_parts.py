"""Parts of newer vits: registers, rotary positions, keys without bias; and what learns on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from timm.layers.pos_embed_sincos import apply_keep_indices_nlc
from torch import Tensor

from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.run import Recipe, essential, parse_recipe
from mimray.trainers.convert.names import split_qkv
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.beit import BEiT
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.models import build_encoder
from mimray.trainers.models.mlp import SwiGLU

VIT: dict[str, Any] = {"name": "vit", "width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
DINOV3 = VIT | {
    "positions": "none", "rope": "dinov3", "num_registers": 3, "layer_scale": 0.1,
    "key_bias": False, "norm_eps": 1e-5,
}  # fmt: skip
EVA02 = VIT | {"positions": "learned", "rope": "eva02", "mlp": "swiglu", "mlp_norm": True}
REGISTERS = VIT | {"positions": "learned", "num_registers": 4}
SIGLIP = VIT | {"positions": "learned", "class_token": False, "mlp": "gelu_tanh"}
ENCODERS = {"dinov3": DINOV3, "eva02": EVA02, "registers": REGISTERS, "siglip": SIGLIP}


def moved(module: Any) -> Any:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=rng)
    return module.eval()


def encoder_of(tree: dict[str, Any], size: tuple[int, int] = (32, 48)) -> Any:
    return moved(build_encoder(ViTConfig.model_validate(tree), size))


def pictures(size: tuple[int, int] = (32, 48), count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def test_rope__visible_patches_keep_their_places():
    """Patches are left out as timm's Eva leaves them out."""
    ours = encoder_of(DINOV3)
    theirs = timm.create_model(
        "vit_small_patch16_dinov3_qkvb", embed_dim=32, depth=2, num_heads=2, patch_size=8,
        img_size=(32, 48), num_reg_tokens=3, num_classes=0, dynamic_img_size=False,
    )  # fmt: skip
    state = {k.replace("ls1.gamma", "gamma_1"): v for k, v in split_qkv(ours.state_dict()).items()}
    state = {k.replace("ls2.gamma", "gamma_2"): v for k, v in state.items()}
    for i in range(2):
        attn = f"blocks.{i}.attn"
        weights = [state.pop(f"{attn}.{name}.weight") for name in "qkv"]
        state[f"{attn}.qkv.weight"] = torch.cat(weights)
        del state[f"{attn}.k.bias"]  # no number there counts
        for name in "qv":
            state[f"{attn}.{name}_bias"] = state.pop(f"{attn}.{name}.bias")
    theirs.eval().load_state_dict(state)
    mask = torch.from_numpy(
        np.stack([np.random.default_rng(i).permutation(24) < 15 for i in (1, 2)])
    )
    keep = torch.stack([torch.nonzero(~row).flatten() for row in mask])

    x, rope = theirs._pos_embed(theirs.patch_embed(pictures()))
    patches = x[:, 4:].gather(1, keep.unsqueeze(-1).expand(-1, -1, 32))
    rope = apply_keep_indices_nlc(x, rope, keep).unsqueeze(1)
    x = torch.cat([x[:, :4], patches], dim=1)
    for block in theirs.blocks:
        x = block(x, rope=rope)
    wanted = theirs.norm(x)

    found = ours(pictures(), mask)
    torch.testing.assert_close(found.prefix, wanted[:, :4], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.tokens, wanted[:, 4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tree", [DINOV3, EVA02 | {"positions": "none"}], ids=["dinov3", "eva02"])
def test_rope__alone_tells_places_apart(tree: dict[str, Any]):
    """Without rotary positions a vit without others would not see that patches change places."""
    x = pictures()
    mirrored = x.unflatten(3, (6, 8)).flip(3).flatten(3, 4)  # columns of patches, not their pixels
    placed, placeless = encoder_of(tree), encoder_of(tree | {"rope": "none"})
    back = [
        f(mirrored).tokens.unflatten(1, (4, 6)).flip(2).flatten(1, 2) for f in (placed, placeless)
    ]
    torch.testing.assert_close(placeless(x).tokens, back[1], rtol=0, atol=1e-5)
    assert (placed(x).tokens - back[0]).abs().max() > 0.05


def test_keys__without_bias_have_none_whatever_is_stored():
    encoder = encoder_of(DINOV3)
    before = encoder(pictures()).tokens
    before.square().sum().backward()
    for block in encoder.blocks:
        queries, keys, values = block.attn.qkv.bias.grad.chunk(3)
        assert not keys.any()
        assert queries.any()
        assert values.any()
        block.attn.qkv.bias.data[32:64] = 5.0
    torch.testing.assert_close(encoder(pictures()).tokens, before, rtol=0, atol=0)


def test_swiglu__is_its_formula():
    mlp = moved(SwiGLU(4, 6, norm_layer=torch.nn.LayerNorm))
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    w, b = mlp.fc1.weight, mlp.fc1.bias
    gate, value = x @ w[:6].T + b[:6], x @ w[6:].T + b[6:]
    product = gate / (1 + torch.exp(-gate)) * value
    centred = product - product.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    wanted = (normal * mlp.norm.weight + mlp.norm.bias) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tree", ENCODERS.values(), ids=ENCODERS)
def test_vit__prefix_maps_and_layers_of_decay(tree: dict[str, Any]):
    encoder, x = encoder_of(tree), pictures((40, 24))
    features, maps = encoder.forward_intermediates(x, (0, 1))
    assert features.prefix.shape == (2, encoder.num_prefix_tokens, 32)
    assert features.tokens.shape == (2, 15, 32)
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), features.tokens)
    torch.testing.assert_close(features.tokens, encoder(x).tokens)
    first = {n for n, _ in encoder.named_parameters() if encoder.decay_layer(n) == 0}
    wanted = {
        "cls_token",
        "reg_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    assert first == wanted & set(dict(encoder.named_parameters()))


class Codes:
    """Stands in for a tokenizer."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def codes(self, images: Tensor) -> Tensor:
        return torch.arange(len(images) * 16).view(-1, 4, 4) % 11

    def decode_codes(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def to(self, device: torch.device) -> Codes:
        return self


METHODS: dict[str, dict[str, Any]] = {
    "mae": {"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "simmim": {"mask_unit_px": None},
    "maskfeat": {"min_block_patches": 4},
    "maskfeat ": {
        "min_block_patches": 4, "masking": "random", "decoder_depth": 1, "decoder_width": 16,
        "decoder_num_heads": 2,
    },
    "beit": {"vocab_size": 11, "min_block_patches": 4, "tokenizer_image_size": 32},
}  # fmt: skip


def recipe_of(tree: dict[str, Any], method: str, **options: Any) -> Recipe:
    return parse_recipe(
        {
            "encoder": tree,
            "method": {"name": method.strip(), **METHODS.get(method, {}), **options},
            "data": {"image_size": 32},
            "optim": {"batch_size": 4, "steps": 3},
        }
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tree", ENCODERS.values(), ids=ENCODERS)
def test_method__learns_on_every_encoder(tree: dict[str, Any], method: str):
    recipe = recipe_of(tree, method)
    torch.manual_seed(0)
    built = build_method(recipe).train()
    if isinstance(built, BEiT):
        built.attach(Codes(recipe))
    masks = [built.draw_mask(recipe, generator(0, Stream.MASK, 0, i)) for i in range(2)]
    images, mask = pictures((32, 32)), torch.from_numpy(np.stack(masks))
    optimiser = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        output = built(images, mask)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    idle = [n for n, p in built.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle  # every rank reduces the same gradients
    if tree.get("num_registers"):
        assert built.encoder.reg_token.grad.abs().sum() > 0


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("tree", [DINOV3, EVA02, REGISTERS], ids=["dinov3", "eva02", "registers"])
def test_finetune__head_reads_patches_or_the_class_token(tree: dict[str, Any], pooling: str):
    method = moved(build_method(recipe_of(tree, "finetune", num_classes=3, pooling=pooling)))
    images = pictures((32, 32))
    found = method.logits(images)
    bare, normed = method.encoder(images, norm=False), method.encoder(images)
    mean = method.encoder.norm(bare.tokens.mean(dim=1))
    wanted = method.head(mean if pooling == "mean" else normed.prefix[:, 0])
    torch.testing.assert_close(found, wanted)


def test_finetune__no_class_token_no_pooling_by_it():
    with pytest.raises(ConfigError, match="encoder vit has no class token"):
        recipe_of(SIGLIP | {"num_registers": 2}, "finetune", num_classes=3, pooling="cls")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": "dinov3", "num_heads": 16}, "heads whose width is a multiple of 4, not 2"),
        ({"rope": "dinov3", "rope_grid": [2, 2]}, "rope_grid goes with rope eva02"),
        ({"rope_temperature": 10.0}, "rope_temperature goes with rope"),
        ({"rel_pos_bias": "shared", "num_registers": 1}, "needs the class token alone"),
        ({"rel_pos_bias": "per_block", "rope": "eva02"}, "needs the class token alone"),
        ({"num_registers": -1}, "greater than or equal to 0"),
    ],
)
def test_config__refuses_what_does_not_go_together(change: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        ViTConfig.model_validate(VIT | change)


def test_recipe__neutral_keys_are_in_no_digest():
    plain = recipe_of(VIT | {"positions": "learned"}, "mae")
    assert set(essential(plain)["encoder"]) == {
        "name", "width", "depth", "num_heads", "patch_size", "mlp_ratio", "drop_path",
        "positions", "rel_pos_bias", "layer_scale", "init", "norm_eps",
    }  # fmt: skip
    assert essential(recipe_of(REGISTERS, "mae"))["encoder"]["num_registers"] == 4
