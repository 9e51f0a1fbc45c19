"""AE and VAE against NumPy, torch.distributions and the definitions of their losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.ae import AE
from mimray.trainers.methods.autoencoding import Autoencoding
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.vae import VAE, gaussian_kl
from mimray.trainers.models.patches import patchify

CONV = {"name": "conv", "widths": [8, 16, 16], "depth": 1}
VIT = {"name": "vit", "width": 32, "depth": 2, "num_heads": 4, "patch_size": 8}
SWIN = {"name": "swin", "width": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
ENCODERS = pytest.mark.parametrize("encoder", [CONV, VIT, SWIN], ids=["conv", "vit", "swin"])
NAMES = pytest.mark.parametrize("name", ["ae", "vae"])


def recipe_of(name: str, encoder: dict[str, Any] = CONV, **options: Any) -> Recipe:
    data = {key: options.pop(key) for key in ("image_size", "channels") if key in options}
    return parse_recipe(
        {
            "encoder": encoder,
            "method": {
                "name": name, "latent_dim": 4, "decoder_widths": [16, 8], "decoder_blocks": 1,
                **options,
            },
            "data": {"image_size": [32, 32], **data},
            "optim": {"batch_size": 8, "steps": 10},
        }
    )  # fmt: skip


def method_of(recipe: Recipe) -> Autoencoding:
    """Nothing is at the value it starts with; in evaluation mode."""
    torch.manual_seed(3)
    method = build_method(recipe)
    assert isinstance(method, Autoencoding)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return method.eval()


def vae_of(**options: Any) -> VAE:
    method = method_of(recipe_of("vae", **options))
    assert isinstance(method, VAE)
    return method


def pictures(recipe: Recipe, count: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(count, recipe.data.channels, *recipe.data.image_size, generator=rng)


def moments(count: int = 5) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, 3, 2, generator=rng), torch.randn(count, 4, 3, 2, generator=rng)


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@NAMES
@ENCODERS
@pytest.mark.parametrize(("size", "channels"), [((32, 32), 3), ((32, 64), 1)])
def test_output__is_every_pixel_and_nothing_is_hidden(
    name: str, encoder: dict[str, Any], size: tuple[int, int], channels: int
) -> None:
    recipe = recipe_of(name, encoder, image_size=size, channels=channels)
    method = method_of(recipe)
    images = pictures(recipe)
    output = method(images)

    assert output.prediction.shape == (3, math.prod(recipe.grid), 64 * channels)
    assert torch.equal(output.target, patchify(images, 8))
    assert output.mask.shape == (3, math.prod(recipe.grid))
    assert output.mask.all()
    assert method.draw_mask(recipe, np.random.default_rng(0)) is None
    decoded = method.reconstruct(images, output)
    assert decoded.shape == images.shape
    assert torch.equal(patchify(decoded, 8), output.prediction)


@ENCODERS
def test_encode__is_the_tokens_laid_out(encoder: dict[str, Any]) -> None:
    recipe = recipe_of("ae", encoder, image_size=(32, 64))
    method = method_of(recipe)
    images = pictures(recipe)
    laid_out, tokens = method.encode(images), method.encoder(images).tokens
    assert laid_out.shape == (3, method.encoder.width, 4, 8)
    assert torch.equal(laid_out[:, :, 2, 5], tokens[:, 2 * 8 + 5])


def test_ae__is_the_mean_squared_error_of_what_the_latent_gives_back() -> None:
    recipe = recipe_of("ae")
    method = method_of(recipe)
    assert isinstance(method, AE)
    images = pictures(recipe)
    latent = method.to_latent(method.encode(images))
    assert latent.shape == (3, 4, 4, 4)
    decoded = method.decode(latent)
    output = method(images)
    assert output.loss.item() == pytest.approx(((array(decoded) - array(images)) ** 2).mean())
    torch.testing.assert_close(method.reconstruct(images, output), decoded)
    assert output.terms == {}


def test_ae__gets_the_picture_through_the_latent_alone() -> None:
    recipe = recipe_of("ae")
    method = method_of(recipe)
    method.to_latent.register_forward_hook(lambda _, __, latent: torch.zeros_like(latent))
    decoded = method(pictures(recipe)).prediction
    torch.testing.assert_close(decoded[0], decoded[1])


def test_kl__is_the_closed_formula() -> None:
    mean, log_variance = moments()
    m, lv = array(mean), array(log_variance)
    wanted = -0.5 * (1 + lv - m**2 - np.exp(lv)).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(gaussian_kl(mean, log_variance), wanted, rtol=1e-5)


def test_kl__is_that_of_torch() -> None:
    mean, log_variance = moments()
    posterior = Independent(Normal(mean, (0.5 * log_variance).exp()), 3)
    prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 3)
    wanted = kl_divergence(posterior, prior)
    torch.testing.assert_close(gaussian_kl(mean, log_variance), wanted, atol=1e-5, rtol=1e-5)


def test_kl__is_nothing_for_the_prior_itself_and_an_expectation_elsewhere() -> None:
    zeros = torch.zeros(2, 4, 3, 2)
    assert not gaussian_kl(zeros, zeros).any()
    mean, log_variance = (x[:1, :1, :1, :1] for x in moments())
    posterior = Normal(mean, (0.5 * log_variance).exp())
    torch.manual_seed(0)
    z = posterior.sample((200_000,))
    drawn = (posterior.log_prob(z) - Normal(0.0, 1.0).log_prob(z)).mean()
    assert gaussian_kl(mean, log_variance).item() == pytest.approx(drawn.item(), abs=0.02)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("training", [True, False])
def test_vae__is_the_evidence_lower_bound(reduction: str, training: bool) -> None:
    method = vae_of(beta=0.7, reduction=reduction).train(training)
    images = pictures(method.recipe)
    mean, log_variance = method.posterior(images)
    torch.manual_seed(5)
    output = method(images)
    torch.manual_seed(5)
    noise = training * array(torch.randn_like(mean))
    latent = array(mean) + np.exp(array(log_variance) / 2) * noise
    error = (array(method.decode(torch.from_numpy(latent).float())) - array(images)) ** 2
    reconstruction = {"sum": error.sum() / 2 / len(images), "mean": error.mean()}[reduction]
    kl = 0.5 * (array(mean) ** 2 + np.exp(array(log_variance)) - 1 - array(log_variance))

    terms = {name: value.item() for name, value in output.terms.items()}
    assert terms == {
        "reconstruction": pytest.approx(reconstruction, rel=1e-5),
        "kl": pytest.approx(kl.sum() / len(images), rel=1e-5),
        "beta": pytest.approx(0.7),
    }
    assert output.loss.item() == pytest.approx(
        terms["reconstruction"] + terms["beta"] * terms["kl"], rel=1e-6
    )


def test_vae__scores_as_the_unit_gaussian_does() -> None:
    method = vae_of(reduction="sum")
    images = pictures(method.recipe)
    decoded = torch.randn_like(images)
    likelihood = Independent(Normal(decoded, torch.ones_like(decoded)), 3).log_prob(images)
    constant = 0.5 * math.log(2 * math.pi) * images[0].numel()
    found = method.reconstruction_error(decoded, images)
    torch.testing.assert_close(found, -likelihood - constant, rtol=1e-4, atol=1e-2)


def test_vae__means_the_same_by_either_reduction() -> None:
    """With beta scaled along, so that neither hides another weight."""
    values = 3 * 32 * 32
    whole, mean = vae_of(reduction="sum"), vae_of(reduction="mean", beta=2 / values)
    images = pictures(whole.recipe)
    assert whole(images).loss.item() * 2 / values == pytest.approx(mean(images).loss.item())


def test_vae__draws_its_latent_while_training_only() -> None:
    method = vae_of()
    images = pictures(method.recipe)
    torch.manual_seed(0)
    still = [method(images).prediction for _ in range(2)]
    method.train()
    torch.manual_seed(0)
    drawn = [method(images).prediction for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(still[0], still[1])
    assert not torch.allclose(drawn[0], drawn[1])
    assert torch.equal(method(images).prediction, drawn[0])


def test_vae__raises_beta_linearly() -> None:
    method = vae_of(beta=0.5, beta_warmup_steps=4)
    images = pictures(method.recipe)
    assert method(images).terms["beta"].item() == 0.5  # outside of a run
    seen = []
    for step in range(7):
        method.at_step(step, 10)
        output = method(images)
        seen.append(output.terms["beta"].item())
        terms = output.terms
        expected = terms["reconstruction"] + seen[-1] * terms["kl"]
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert seen == [0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_vae__weighs_from_the_first_step_without_warmup() -> None:
    method = vae_of(beta=0.5)
    method.at_step(0, 10)
    assert method.beta == 0.5


@pytest.mark.parametrize("width", [16, 256])
def test_vae__starts_near_its_prior(width: int) -> None:
    torch.manual_seed(0)
    method = build_method(recipe_of("vae", {**CONV, "widths": [8, 16, width]})).eval()
    kl = method(pictures(method.recipe)).terms["kl"].item()
    assert 0 < kl / (4 * 4 * 4) < 1  # nats a latent


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("channel", ["mean", "log_variance"])
def test_vae__lets_an_infinite_kl_reach_the_loss(beta: float, channel: str) -> None:
    """The loop then refuses the update and names every term that is not finite."""
    method = vae_of(beta=beta)
    images = pictures(method.recipe)
    bias = method.to_moments.bias
    assert bias is not None
    with torch.no_grad():
        bias[{"mean": 0, "log_variance": 4}[channel]] = {"mean": 1e20, "log_variance": 100}[channel]
    output = method(images)
    assert not output.loss.isfinite()
    assert output.terms["kl"].isinf()
    assert output.terms["beta"].isfinite()
    if channel == "log_variance":  # the mean alone is decoded here, and it is as ever
        assert output.terms["reconstruction"].isfinite()


@NAMES
@ENCODERS
def test_gradient__reaches_all_that_is_learnt(name: str, encoder: dict[str, Any]) -> None:
    recipe = recipe_of(name, encoder)
    method = method_of(recipe).train()
    method(pictures(recipe)).loss.backward()
    without = {n for n, p in method.named_parameters() if p.requires_grad and p.grad is None}
    still = {
        n for n, p in method.named_parameters() if p.grad is not None and not p.grad.abs().sum()
    }
    assert not without
    assert not still


@NAMES
def test_method__learns(name: str) -> None:
    recipe = recipe_of(name, beta=0.01) if name == "vae" else recipe_of(name)
    torch.manual_seed(0)
    method = build_method(recipe).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 1, 1, generator=rng).expand(4, 3, 32, 32).contiguous()
    losses = []
    for _ in range(60):
        loss = method(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.2 * losses[0]


@NAMES
def test_method__computes_in_bf16_and_reduces_in_fp32(name: str) -> None:
    recipe = recipe_of(name)
    method, images = method_of(recipe), pictures(recipe)
    wanted = method(images).loss.item()
    output = method.bfloat16()(images.bfloat16())
    assert output.prediction.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(wanted, rel=0.05)
    assert len(method.panels(images, output)) == {"ae": 2, "vae": 3}[name]


@pytest.mark.parametrize("channels", [1, 3])
def test_panels__show_what_came_back(channels: int) -> None:
    recipe = recipe_of("ae", channels=channels, image_size=(32, 64))
    method, images = method_of(recipe), pictures(recipe)
    output = method(images)
    original, drawn = method.panels(images, output)
    assert (original.title, drawn.title) == ("original", "reconstruction")
    assert original.pixels.shape == drawn.pixels.shape == (3, 32, 64, channels)
    np.testing.assert_array_equal(drawn.pixels, method.pixels(method.reconstruct(images, output)))


def test_panels__show_samples_of_the_prior() -> None:
    method = vae_of(image_size=(32, 64))
    images = pictures(method.recipe)
    with torch.no_grad():
        output = method(images)
        torch.manual_seed(7)
        panels = method.panels(images, output)
        torch.manual_seed(7)
        wanted = method.pixels(method.decode(torch.randn(3, 4, 4, 8)))
        again = method.panels(images, output)
        other = method.panels(images + 1, method(images + 1))
    assert [p.title for p in panels] == ["original", "reconstruction", "sample from the prior"]
    np.testing.assert_array_equal(panels[2].pixels, wanted)
    np.testing.assert_array_equal(panels[1].pixels, again[1].pixels)
    assert (panels[2].pixels != again[2].pixels).any()
    assert other[2].pixels.shape == (3, 32, 64, 3)


@pytest.mark.parametrize(
    ("encoder", "widths"),
    [({**VIT, "patch_size": 16}, [16, 8, 8]), ({**VIT, "patch_size": 14}, [16, 8]), (SWIN, [16])],
)
def test_decoder__reaches_any_stride(encoder: dict[str, Any], widths: list[int]) -> None:
    stride = encoder.get("patch_size", 8)
    recipe = recipe_of("ae", encoder, image_size=(4 * stride, 8 * stride), decoder_widths=widths)
    images = pictures(recipe)
    method = method_of(recipe)
    assert method.reconstruct(images, method(images)).shape == images.shape


def test_recipe__refuses_a_decoder_that_overshoots_the_stride() -> None:
    with pytest.raises(ConfigError, match=r"decoder_widths names 5 stages.*16 times.*stride is 8"):
        recipe_of("ae", decoder_widths=[8] * 5)


@pytest.mark.parametrize("name", ["ae-tiny", "ae-vit-tiny", "vae-tiny"])
def test_tiny_recipe__builds(name: str) -> None:
    recipe = load_recipe(name)
    method = build_method(recipe)
    assert sum(p.numel() for p in method.parameters()) < 1.5e6
    assert method(pictures(recipe)).loss.isfinite()
