"""BEiT against published code, with a tokenizer whose codes can be read by eye."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.config.beit import BEiTConfig
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.errors import BundleError
from mimray.trainers.methods.beit import BEiT
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.models.normalise import denormalise, normalise
from mimray.trainers.models.patches import patchify, unpatchify

NUM_CODES = 32
ENCODERS = {
    "vit": {
        "name": "vit",
        "width": 48,
        "depth": 2,
        "num_heads": 4,
        "patch_size": 8,
        "positions": "none",
        "rel_pos_bias": "shared",
        "layer_scale": 0.1,
        "init": "beit",
    },
    "swin": {  # of output stride 8 as well
        "name": "swin",
        "width": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "window_size": 4,
    },
}


def recipe_of(name: str = "vit", **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "encoder": ENCODERS[name],
        "method": {
            "name": "beit",
            "tokenizer_image_size": [16, 16],
            "vocab_size": NUM_CODES,
            "min_block_patches": 4,
        },
        "data": {"image_size": [32, 32]},
        "optim": {"batch_size": 8, "steps": 10},
    }
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys}
    return parse_recipe(tree)


class Shades(nn.Module):
    """A tokenizer of greys: a cell's code is its mean, shifted by the whole picture's.

    So a code depends on pixels far from its cell, as in a network with a wide field of view.
    """

    def __init__(self, stride: int = 4, far: float = 0.0) -> None:
        super().__init__()
        self.stride, self.far = stride, far
        self.recipe = parse_recipe(
            {
                "encoder": {"name": "conv", "widths": [8, 8]},
                "method": {"name": "dvae", "decoder_widths": [8, 8, 8]},
                "data": {"image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3},
                "optim": {"batch_size": 8, "steps": 10},
            }
        )
        self.scale = nn.Parameter(torch.tensor(NUM_CODES / 4.0))  # of values in -2 to 2
        self.eval()

    def codes(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        cells = F.avg_pool2d(images, self.stride).mean(dim=1)  # B h w
        shades = cells + 2 + self.far * images.mean(dim=(1, 2, 3))[:, None, None]
        return (shades * self.scale).long().clamp(0, NUM_CODES - 1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        greys = ((codes + 0.5) / self.scale - 2).unsqueeze(1).expand(-1, 3, -1, -1)
        return F.interpolate(greys, scale_factor=self.stride, mode="nearest")


def beit_of(recipe: Recipe, seed: int = 3, **tokenizer: Any) -> BEiT:
    """A method with a tokenizer, whose biases are no longer zero."""
    torch.manual_seed(seed)
    method = build_method(recipe)
    assert isinstance(method, BEiT)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    method.attach(Shades(**tokenizer))
    return method.eval()


def pixels_of(size: tuple[int, int], count: int = 4, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=rng) * 255
    return F.interpolate(coarse, size, mode="bicubic").clamp(0, 255).round().byte()


def masks(recipe: Recipe, count: int = 4) -> Tensor:
    draws = [BEiT.draw_mask(recipe, generator(0, Stream.MASK, 0, i)) for i in range(count)]
    return torch.from_numpy(np.stack(draws))


def inputs(recipe: Recipe, count: int = 4) -> dict[str, Tensor]:
    assert isinstance(recipe.method, BEiTConfig)
    data, size = recipe.data, recipe.method.tokenizer_image_size
    pixels, mask = pixels_of(data.image_size, count), masks(recipe, count)
    mask[1, mask[1].nonzero()[0]] = False  # the number hidden varies
    return {
        "images": normalise(pixels, data.mean, data.std),
        "mask": mask,
        "tokenizer_images": F.interpolate(pixels, size, mode="bilinear", antialias=True),
    }


def transformers_twin(method: BEiT) -> Any:
    """Their model with our weights."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    config = method.recipe.encoder
    theirs = BeitForMaskedImageModeling(
        BeitConfig(
            vocab_size=NUM_CODES,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=4 * config.width,
            image_size=method.recipe.data.image_size[0],
            patch_size=config.patch_size,
            use_mask_token=True,
            use_shared_relative_position_bias=True,
            layer_scale_init_value=config.layer_scale,
            layer_norm_eps=config.norm_eps,
        )
    )
    ours = {k.removeprefix("encoder."): v for k, v in method.state_dict().items()}
    block = {
        "lambda_1": "ls1.gamma",
        "lambda_2": "ls2.gamma",
        "attention.o_proj": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    whole = {
        "beit.embeddings.cls_token": "cls_token",
        "beit.embeddings.mask_token": "mask_token",
        "beit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "beit.shared_position_bias": "rel_pos_bias",
        "layernorm": "norm",
        "lm_head": "head",
    }
    state = {}
    for name in theirs.state_dict():
        parts = name.split(".")
        if name.startswith("beit.layers."):
            i, inner = parts[2], ".".join(parts[3:])
            if "_proj" in inner and "o_proj" not in inner:
                which = ["q_proj", "k_proj", "v_proj"].index(parts[-2])
                state[name] = ours[f"blocks.{i}.attn.qkv.{parts[-1]}"].chunk(3)[which]
                continue
            old = next(key for key in block if inner.startswith(key))
            state[name] = ours[f"blocks.{i}.{block[old]}{inner.removeprefix(old)}"]
        else:
            old = next(key for key in whole if name.startswith(key))
            state[name] = ours[whole[old] + name.removeprefix(old)]
    theirs.load_state_dict(state)
    return theirs.eval()


def test_beit__equals_transformers():
    recipe = recipe_of()
    method = beit_of(recipe)
    batch = inputs(recipe)

    ours = method(**batch)
    theirs = transformers_twin(method)(
        batch["images"], bool_masked_pos=batch["mask"], labels=ours.target
    )

    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    logits = theirs.logits[batch["mask"]]
    torch.testing.assert_close(ours.prediction, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "image_size", "tokenizer_size"),
    [("vit", (32, 32), (16, 16)), ("vit", (24, 48), (12, 24)), ("swin", (32, 64), (16, 32))],
)
def test_beit__scores_the_codes_of_hidden_tokens_alone(
    encoder: str, image_size: tuple[int, int], tokenizer_size: tuple[int, int]
):
    recipe = recipe_of(
        encoder,
        data={"image_size": image_size},
        method={"tokenizer_image_size": tokenizer_size},
    )
    method, batch = beit_of(recipe), inputs(recipe)

    out = method(**batch)

    counts = batch["mask"].sum(dim=1)
    assert len(set(counts.tolist())) > 1
    assert out.prediction.shape == (counts.sum(), NUM_CODES)
    # Row by row of the batch, cell by cell of the picture.
    cells = batch["tokenizer_images"].float().numpy() / 255
    k, (h, w) = 0, recipe.grid
    log_likelihood, hits = [], 0
    for b in range(len(cells)):
        for n in range(h * w):
            if not batch["mask"][b, n]:
                continue
            y, x = divmod(n, w)
            cell = cells[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean()
            code = min(int(((cell - 0.5) / 0.25 + 2) * 8 + 1e-4), NUM_CODES - 1)
            assert out.target[k] == code
            scores = out.prediction[k].detach().double().numpy()
            log_likelihood.append(scores[code] - np.log(np.exp(scores).sum()))
            hits += int(scores.argmax() == code)
            k += 1
    assert out.loss.item() == pytest.approx(-np.mean(log_likelihood), abs=1e-5)
    assert out.terms["accuracy"].item() == pytest.approx(hits / k)


def test_beit__every_part_learns():
    recipe = recipe_of()
    method = beit_of(recipe).train()

    method(**inputs(recipe)).loss.backward()

    idle = [n for n, p in method.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def hidden_swapped(images: Tensor, others: Tensor, mask: Tensor, patch: int) -> Tensor:
    grid = images.shape[2] // patch, images.shape[3] // patch
    hidden = mask.unsqueeze(-1)
    patches = torch.where(hidden, patchify(others, patch), patchify(images, patch))
    return unpatchify(patches, patch, grid)


@pytest.mark.parametrize("encoder", ["vit", "swin"])
def test_beit__hidden_pixels_reach_neither_prediction_nor_picture(encoder: str):
    recipe = recipe_of(encoder)
    method, batch = beit_of(recipe, far=0.5), inputs(recipe)
    other = normalise(pixels_of((32, 32), seed=9), recipe.data.mean, recipe.data.std)
    swapped = hidden_swapped(batch["images"], other, batch["mask"], 8)

    ours, theirs = method(batch["images"], batch["mask"]), method(swapped, batch["mask"])

    assert torch.equal(ours.prediction, theirs.prediction)
    assert not torch.equal(ours.target, theirs.target)
    drawn = [method.panels(x, o) for x, o in ((batch["images"], ours), (swapped, theirs))]
    names = [panel.title for panel in drawn[0]]
    assert names == ["original", "masked", "codes of the original", "prediction"]
    for mine, yours in zip(*drawn, strict=True):
        same = mine.title in ("masked", "prediction")
        assert np.array_equal(mine.pixels, yours.pixels) == same, mine.title


def test_beit__picture_holds_predicted_codes_where_hidden_and_true_ones_elsewhere():
    # At one size no resizing mixes neighbours, so what is right is exact.
    recipe = recipe_of(method={"tokenizer_image_size": [32, 32]})
    method, batch = beit_of(recipe, stride=8), inputs(recipe)
    out = method(batch["images"], batch["mask"])
    perfect = F.one_hot(out.target, NUM_CODES).float()

    wrong = method.reconstruct(batch["images"], out._replace(prediction=perfect.roll(9, 1)))
    right = method.reconstruct(batch["images"], out._replace(prediction=perfect))

    best, *_ = (p for p in method.panels(batch["images"], out) if p.title.startswith("codes"))
    assert np.array_equal(method.pixels(right), best.pixels)
    apart = (method.pixels(wrong) != best.pixels).any(axis=-1)  # B H W
    cells = apart.reshape(4, 4, 8, 4, 8).transpose(0, 1, 3, 2, 4).reshape(4, 16, 64)
    assert (cells.all(axis=-1) == batch["mask"].numpy()).all()
    assert (cells.any(axis=-1) == batch["mask"].numpy()).all()


def test_beit__tokenizer_is_no_part_of_it():
    method = beit_of(recipe_of())
    tokenizer = method.tokenizer

    assert not any(
        "token" in name and name != "mask_token"
        for name in method.state_dict()
        if not name.startswith("encoder.")
    )
    assert tokenizer not in list(method.modules())
    assert all(p is not tokenizer.scale for p in method.parameters())
    method.bfloat16().train()
    assert tokenizer.scale.dtype == torch.float32
    assert not tokenizer.training


def test_beit__trains_in_bf16_and_reduces_in_fp32():
    recipe = recipe_of()
    method, batch = beit_of(recipe).bfloat16().train(), inputs(recipe)

    out = method(batch["images"].bfloat16(), batch["mask"], batch["tokenizer_images"])
    out.loss.backward()

    assert out.loss.dtype == out.terms["accuracy"].dtype == torch.float32
    assert torch.equal(out.target, beit_of(recipe)(**batch).target)
    panels = method.panels(batch["images"], out)
    assert panels[3].pixels.shape == (4, 32, 32, 3)


def test_beit__without_a_second_view_makes_it_from_the_first():
    same_size = recipe_of(method={"tokenizer_image_size": [32, 32]})
    method, batch = beit_of(same_size, stride=8), inputs(same_size)
    pixels = denormalise(batch["images"], same_size.data.mean, same_size.data.std)

    made = method(batch["images"], batch["mask"])
    given = method(batch["images"], batch["mask"], pixels)

    assert torch.equal(made.target, given.target)
    assert torch.equal(made.loss, given.loss)

    # Resized it is close to what the loader makes.
    recipe = recipe_of()
    method, batch = beit_of(recipe), inputs(recipe)
    apart = method(batch["images"], batch["mask"]).target - method(**batch).target
    assert apart.abs().max() <= 1


def test_beit__without_a_tokenizer_says_so():
    method = build_method(recipe_of())

    with pytest.raises(BundleError, match="no tokenizer"):
        method(torch.zeros(1, 3, 32, 32))


def test_beit__initialisation_is_the_official_one():
    recipe = recipe_of(method={"vocab_size": 512}, encoder={"width": 192})
    torch.manual_seed(0)
    state = build_method(recipe).state_dict()

    # A normal of std .02 cut at one std has std .5396 x .02.
    for name in ("mask_token", "head.weight"):
        assert state[name].abs().max() <= 0.02
        assert state[name].std().item() == pytest.approx(0.5396 * 0.02, rel=0.15)
    assert not state["head.bias"].any()
    assert state["mask_token"].shape == (1, 1, 192)


def test_beit_vit_b__is_the_official_recipe():
    recipe = load_recipe("beit-vit-b")
    counts = masks(recipe, 200).sum(dim=1)

    assert recipe.grid == (14, 14)
    assert counts.max() == 75
    assert counts.float().mean().item() == pytest.approx(73, abs=2)
    assert recipe.optim.base_lr * 2048 / 256 == pytest.approx(1.5e-3)
