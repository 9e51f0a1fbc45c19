"""MAE's decoder of cross-attention, its share of decoded patches and its weighted layers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.config.mae import MAEConfig
from mimray.trainers.config.run import Recipe, essential, parse_recipe, resolve
from mimray.trainers.data.views import make_inputs
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.catalogue import build_method, inputs_of
from mimray.trainers.methods.draws import draw_order
from mimray.trainers.methods.losses import masked_mean
from mimray.trainers.methods.mae import MAE, normalise_patches
from mimray.trainers.methods.reconstruction import reconstruct
from mimray.trainers.models.cross_attention import CrossBlock
from mimray.trainers.models.decoders import CrossDecoder
from mimray.trainers.models.patches import patchify, take_tokens, visible_indices
from mimray.trainers.pictures import HIDDEN_GREY
from mimray.trainers.types import DatasetFacts

VIT = {"name": "vit", "width": 48, "depth": 3, "num_heads": 4, "patch_size": 8}
MAE_KEYS = {"name": "mae", "decoder_width": 32, "decoder_depth": 2, "decoder_num_heads": 2}
CROSS = {**MAE_KEYS, "decoder": "cross"}
LAYERS = [0, -1, 1]
SIZE = (32, 48)  # 24 patches, 18 of them hidden


def recipe_of(method: dict[str, Any], encoder: dict[str, Any] | None = None, **data: Any) -> Recipe:
    return parse_recipe(
        {
            "encoder": VIT | (encoder or {}),
            "method": method,
            "data": {"image_size": list(SIZE), **data},
            "optim": {"batch_size": 8, "steps": 10},
        }
    )


def method_of(**keys: Any) -> MAE:
    """Weights, biases, norms and weights of layers are no longer at the values they start with."""
    torch.manual_seed(3)
    method = build_method(recipe_of({**CROSS, **keys}))
    assert isinstance(method, MAE)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def inputs(count: int = 2) -> tuple[Tensor, Tensor]:
    """Pictures and masks."""
    rng = np.random.default_rng(4)
    images = torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    mask = [MAE.draw_mask(recipe_of(CROSS), rng) for _ in range(count)]
    return images, torch.from_numpy(np.stack(mask))


# The decoder


def attention(block: CrossBlock, queries: Tensor, context: Tensor) -> Tensor:
    """torch's own attention with a block's weights."""
    ours, width = block.attn, queries.shape[-1]
    theirs = nn.MultiheadAttention(
        width, ours.num_heads, kdim=context.shape[-1], vdim=context.shape[-1], batch_first=True
    )
    keys, values = ours.kv.weight.chunk(2)
    theirs.load_state_dict(
        {
            "q_proj_weight": ours.q.weight, "k_proj_weight": keys, "v_proj_weight": values,
            "in_proj_bias": torch.cat([ours.q.bias, ours.kv.bias]),
            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias,
        }
    )  # fmt: skip
    attended: Tensor = theirs.eval()(queries, context, context)[0]
    return attended


def written_out(decoder: CrossDecoder, layers: tuple[Tensor, ...], places: Tensor) -> Tensor:
    """The decoder as the paper describes it."""
    x = torch.stack(
        [decoder.mask_token[0, 0] + decoder.pos_embed[0, p] for p in places.flatten()]
    ).unflatten(0, places.shape)
    for number, block in enumerate(decoder.blocks):
        context = layers[0]
        if decoder.weighted is not None:
            weights = decoder.weighted.weights[number]
            scaled = [w * layer for w, layer in zip(weights, layers, strict=True)]
            context = decoder.weighted.norms[number](torch.stack(scaled).sum(dim=0))
        x = x + attention(block, block.norm1(x), context)
        hidden = F.gelu(F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias))
        x = x + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    return F.linear(decoder.norm(x), decoder.pred.weight, decoder.pred.bias)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[], LAYERS], ids=["last", "weighted"])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss__equals_the_paper_written_out(layers: list[int], norm_pix_loss: bool):
    method = method_of(
        encoder_layers=layers, norm_pix_loss=norm_pix_loss, decode_ratio=1 / 3
    ).train()
    (images, mask), order = inputs(), torch.randn(2, 24)

    output = method(images, mask, order)

    encoder = method.encoder
    after = encoder(images, mask, layers=[0, 1, 2]).layers
    if not layers:
        after = after[2:]
    taken, targets = [], []
    patches = patchify(images, 8).double()
    for row in range(2):
        hidden = [place for place in range(24) if mask[row, place]]
        taken.append(sorted(hidden, key=lambda p: float(order[row, p]))[:6])
        for place in taken[row]:
            pixels = patches[row, place]
            if norm_pix_loss:
                pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            targets.append(pixels)
    assert isinstance(method.decoder, CrossDecoder)
    expected = written_out(method.decoder, after, torch.tensor(taken))
    torch.testing.assert_close(output.prediction, expected, rtol=0, atol=1e-5)
    error = (expected.double() - torch.stack(targets).unflatten(0, (2, 6))).square().mean()
    assert float(output.loss) == pytest.approx(float(error), abs=1e-5)
    assert torch.equal(output.mask, mask)


@torch.no_grad()
def test_layers__are_the_tokens_after_the_blocks_with_the_final_norm():
    method = method_of().eval()
    images, mask = inputs()
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda *a: seen.append(a[2])) for block in method.encoder.blocks
    ]
    found = method.encoder(images, mask, layers=[2, 0, -2])
    for handle in handles:
        handle.remove()

    for tokens, block in zip(found.layers, (2, 0, 1), strict=True):
        assert torch.equal(tokens, method.encoder.get_submodule("norm")(seen[block]))
    assert torch.equal(found.layers[0], torch.cat([found.prefix, found.tokens], dim=1))
    plain = method.encoder(images, mask)
    assert plain.layers == ()
    assert torch.equal(plain.tokens, found.tokens)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[], LAYERS], ids=["last", "weighted"])
def test_a_patch__is_predicted_alike_whatever_else_is_decoded(layers: list[int]):
    method = method_of(encoder_layers=layers, decode_ratio=0.5)
    (images, mask), order = inputs(), torch.randn(2, 24)
    places = method.train().decoded(mask, order)
    some = method(images, mask, order).prediction
    every = method.eval()(images, mask, order).prediction

    assert some.shape == (2, 9, 192)
    assert every.shape == (2, 24, 192)
    torch.testing.assert_close(take_tokens(every, places), some, rtol=0, atol=1e-5)
    alone = method.train()
    for kept in range(3):
        one = order.scatter(1, places[:, kept : kept + 1], -100.0)
        first = alone(images, mask, one).prediction[:, 0]
        torch.testing.assert_close(first, some[:, kept], rtol=0, atol=1e-5)


@torch.no_grad()
def test_hidden_pixels__change_no_prediction():
    method = method_of(encoder_layers=LAYERS).eval()
    images, mask = inputs()
    before = method(images, mask).prediction
    hidden = mask.unflatten(1, (4, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    changed = torch.where(hidden.unsqueeze(1), torch.randn_like(images), images)
    assert torch.equal(method(changed, mask).prediction, before)


@pytest.mark.parametrize("layers", [[], LAYERS], ids=["last", "weighted"])
def test_every_parameter__learns(layers: list[int]):
    method = method_of(encoder_layers=layers, decode_ratio=0.3).train()
    method(*inputs()).loss.backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 1e-7, name


@torch.no_grad()
def test_weights_of_layers__choose_among_them():
    method = method_of(encoder_layers=LAYERS).eval()
    assert isinstance(method.decoder, CrossDecoder)
    assert method.decoder.weighted is not None
    weighted = method.decoder.weighted
    layers = [torch.randn(2, 7, 48) for _ in range(3)]
    weighted.weights.copy_(torch.tensor([[0.0, 1, 0], [0, 0, 2]]))
    first, second = weighted(layers)
    torch.testing.assert_close(first, weighted.norms[0](layers[1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(second, weighted.norms[1](2 * layers[2]), rtol=0, atol=1e-6)


# Which patches are decoded


@given(
    grid=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    mask_ratio=st.floats(0.05, 0.95),
    decode_ratio=st.floats(0.02, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_decoded__counts_are_exact_and_each_is_hidden(
    grid: tuple[int, int], mask_ratio: float, decode_ratio: float, seed: int
):
    keys = {**CROSS, "mask_ratio": mask_ratio, "decode_ratio": decode_ratio}
    size = [8 * side for side in grid]
    num_patches = grid[0] * grid[1]
    num_visible = int(num_patches * (1 - mask_ratio))
    num_hidden = num_patches - num_visible
    wanted = round(decode_ratio * num_hidden)
    refused = not 0 < num_visible < num_patches or not wanted
    if refused:
        with pytest.raises(ConfigError, match=r"method\.(mask|decode)_ratio"):
            recipe_of(keys, image_size=size)
        return
    recipe = recipe_of(keys, image_size=size)
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(np.stack([MAE.draw_mask(recipe, rng) for _ in range(3)]))
    orders = np.stack([draw_order(rng, num_patches) for _ in range(3)])
    order = torch.from_numpy(orders.astype(np.float32))
    method = bare(recipe)

    places = method.decoded(mask, order)

    assert places.shape == (3, wanted)
    for row in range(3):
        assert len(set(places[row].tolist())) == wanted
        assert mask[row, places[row]].all()
        left = mask[row].clone()
        left[places[row]] = False
        if wanted < num_hidden and decode_ratio < 1:
            assert order[row, places[row]].max() < order[row, left].min()
    method.training = False
    assert torch.equal(method.decoded(mask, order), visible_indices(~mask))


def bare(recipe: Recipe) -> MAE:
    """A method without networks, which decides what is decoded."""
    method = MAE.__new__(MAE)
    nn.Module.__init__(method)
    assert isinstance(recipe.method, MAEConfig)
    method.config = recipe.method
    return method


class Upright:
    """A decoded picture, as `make_inputs` asks for one."""

    size = (70, 60)
    label = None

    def decoded(self, enough: tuple[int, int], needed: tuple[int, int] | None) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)


def test_order__is_the_samples_own_and_no_matter_of_the_mask():
    recipe = recipe_of({**CROSS, "decode_ratio": 0.5})
    plain = recipe_of(CROSS)

    def made(of: Recipe, epoch: int, index: int) -> dict[str, np.ndarray]:
        shown: Any = Upright()
        return make_inputs(inputs_of(of), shown, seed=1, epoch=epoch, index=index, channels=3)

    one = made(recipe, 0, 0)
    assert sorted(one["order"].tolist()) == list(range(24))
    for key, value in made(recipe, 0, 0).items():
        assert np.array_equal(value, one[key])
    for other in (made(recipe, 0, 1), made(recipe, 1, 0)):
        assert not np.array_equal(other["order"], one["order"])
    # The views and masks of a run are those of MAE with the same seed.
    without = made(plain, 0, 0)
    assert without.keys() == {"images", "mask"}
    assert all(np.array_equal(one[key], value) for key, value in without.items())


# The decoder of self-attention is what it was


@torch.no_grad()
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_self__is_mae_to_the_bit(norm_pix_loss: bool):
    recipe = recipe_of({**MAE_KEYS, "norm_pix_loss": norm_pix_loss})
    torch.manual_seed(0)
    method = build_method(recipe).train()
    assert isinstance(method, MAE)
    images, mask = inputs()

    output = method(images, mask)

    visible = method.encoder(images, mask)
    prediction = method.decoder(visible.tokens, visible.prefix, mask)
    target = patchify(images, 8)
    if norm_pix_loss:
        target = normalise_patches(target)
    error = (prediction.float() - target.float()).square().mean(dim=-1)
    assert torch.equal(output.loss, masked_mean(error, mask))
    assert torch.equal(output.prediction, prediction)
    assert [view.name for view in inputs_of(recipe)] == ["images"]


def test_hash__of_self_has_none_of_the_keys():
    facts = DatasetFacts("here", 100, "f")
    tree = essential(recipe_of(MAE_KEYS))["method"]
    assert not {"decoder", "decode_ratio", "encoder_layers"} & tree.keys()
    hashes = {
        resolve(recipe_of(keys), facts, 1).hash
        for keys in (
            MAE_KEYS, CROSS, {**CROSS, "decode_ratio": 0.5}, {**CROSS, "encoder_layers": LAYERS}
        )
    }  # fmt: skip
    assert len(hashes) == 4


# Pictures


def test_panels__show_every_hidden_patch_and_grey_for_the_others():
    method = method_of(decode_ratio=0.2, norm_pix_loss=True).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    found = reconstruct(method, [Image.fromarray(pixels)], mask_ratio=0.5)

    titles = [panel.title for panel in found.panels]
    assert titles == ["original", "masked", "reconstruction", "prediction alone"]
    shown = {panel.title: panel.pixels for panel in found.panels}
    assert found.mask is not None
    assert found.mask.sum() == 12
    hidden = found.mask.reshape(1, 4, 6).repeat(8, 1).repeat(8, 2)
    alone, pasted = shown["prediction alone"], shown["reconstruction"]
    assert (alone[~hidden] == HIDDEN_GREY).all()
    assert np.array_equal(alone[hidden], pasted[hidden])
    assert np.array_equal(pasted[~hidden], shown["original"][~hidden])
    for place in np.flatnonzero(found.mask):
        row, column = divmod(place, 6)
        patch = alone[0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert patch.std() > 0  # predicted, not filled


# What is refused


@pytest.mark.parametrize(
    ("method", "encoder", "message"),
    [
        ({"decode_ratio": 0.5, "decoder": "self"}, {}, "decode_ratio 0.5 goes with .* cross"),
        ({"encoder_layers": [0, 2], "decoder": "self"}, {},
         "encoder_layers [0, 2] goes with method.decoder cross"),
        ({"decode_ratio": 0.02}, {},
         "decode_ratio 0.02 of 18 hidden patches is 0.36, which rounds to none; 0.056 decodes one"),
        ({"decode_ratio": 0}, {}, "decode_ratio"),
        ({"decode_ratio": 1.5}, {}, "decode_ratio"),
        ({"encoder_layers": [0, 3]}, {}, "[0, 3] must lie in -3..2, since the encoder has 3 la"),
        ({"encoder_layers": [-4, 2]}, {}, "[-4, 2] must lie in -3..2"),
        ({"encoder_layers": [2, -1]}, {}, "[2, -1] names a layer twice"),
        ({"encoder_layers": [0, 1]}, {},
         "[0, 1] lacks the last layer, 2; those behind layer 1 would learn nothing"),
        ({"decoder_num_heads": 5}, {},
         "decoder_width 32 must be a multiple of 4 and of method.decoder_num_heads 5"),
        ({}, {"positions": "none", "rope": "dinov3"}, "take sincos or learned"),
        ({"decoder": "both"}, {}, "method.decoder"),
    ],
)  # fmt: skip
def test_refused__with_the_key_and_the_arithmetic(
    method: dict[str, Any], encoder: dict[str, Any], message: str
):
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ConfigError, match=pattern):
        recipe_of({**CROSS, **method}, encoder)


def test_one_patch__may_be_decoded():
    recipe = recipe_of({**CROSS, "decode_ratio": 0.056})
    method = build_method(recipe).train()
    assert method(*inputs()).prediction.shape == (2, 1, 192)
