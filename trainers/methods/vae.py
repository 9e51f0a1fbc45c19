"""Variational autoencoder (VAE): a Gaussian latent, the evidence lower bound.

Source: Kingma & Welling 2014, "Auto-Encoding Variational Bayes".
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mimray.trainers.config.run import Recipe
from mimray.trainers.config.vae import VAEConfig
from mimray.trainers.methods.autoencoding import Autoencoding
from mimray.trainers.models.noise import Noise
from mimray.trainers.types import MethodOutput, Panel


class VAE(Autoencoding):
    """Autoencoder whose latent is a diagonal Gaussian at each place, with a KL term to N(0, I).

    Attributes:
        beta: weight of the KL term at the current step.
    """

    def __init__(self, recipe: Recipe) -> None:
        config = recipe.method
        assert isinstance(config, VAEConfig)
        super().__init__(recipe, config.latent_dim)
        self.config = config
        self.to_moments = nn.Conv2d(self.encoder.width, 2 * config.latent_dim, kernel_size=1)
        self.noise = Noise()
        self.beta = config.beta

    def at_step(self, step: int, num_steps: int) -> None:
        """Set beta, which rises linearly from 0 (Bowman et al. 2016, sec. 3.1)."""
        if self.config.beta_warmup_steps:
            self.beta = self.config.beta * min(1.0, step / self.config.beta_warmup_steps)

    def forward(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None = None
    ) -> MethodOutput:
        """Reconstruction error + beta * KL, averaged over pictures.

        The latent is sampled in training, and is the mean otherwise.

        Source: Kingma & Welling 2014, eq. 10; beta by Higgins et al. 2017, eq. 4.
        """
        mean, log_variance = self.posterior(images)
        latent = mean
        if self.training:
            latent = mean + (0.5 * log_variance).exp() * self.noise.normal(mean.detach())
        decoded = self.decode(latent)
        reconstruction = self.reconstruction_error(decoded, images).mean()
        kl = gaussian_kl(mean, log_variance).mean()
        loss = reconstruction + self.beta * kl
        beta = torch.tensor(self.beta, device=loss.device)
        terms = {"reconstruction": reconstruction, "kl": kl, "beta": beta}
        return self.output(images, decoded, loss, terms)

    def posterior(
        self, images: Float[Tensor, "B C H W"]
    ) -> tuple[Float[Tensor, "B L h w"], Float[Tensor, "B L h w"]]:
        """Mean and log variance of the latents of pictures, in fp32."""
        moments = self.to_moments(self.encode(images)).float()  # B 2L h w
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    def reconstruction_error(
        self, decoded: Float[Tensor, "B C H W"], images: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, " B"]:
        """Reconstruction error of each picture.

        Reduction `sum` is the negative log-likelihood under unit Gaussians around `decoded`, but
        for the constant; `mean`, the mean squared error, is 2 / (C H W) of it.
        """
        error = (decoded.float() - images.float()).square().flatten(1)  # B (C H W)
        return 0.5 * error.sum(dim=1) if self.config.reduction == "sum" else error.mean(dim=1)

    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """Originals, reconstructions from the latents' means, and samples from the prior."""
        b, _, height, width = images.shape
        stride = self.encoder.stride
        noise = torch.randn(
            (b, self.config.latent_dim, height // stride, width // stride), device=images.device
        )
        invented = self.decode(noise).float()
        columns = super().panels(images, output, oracle=oracle)
        return [*columns, Panel("sample from the prior", self.pixels(invented))]


def gaussian_kl(
    mean: Float[Tensor, "B L h w"], log_variance: Float[Tensor, "B L h w"]
) -> Float[Tensor, " B"]:
    """KL divergence of diagonal Gaussians from N(0, I), summed over a picture's latents.

    Infinities are kept: a run whose KL is infinite has diverged, and must fail.

    Returns:
        Nats.

    Source: Kingma & Welling 2014, appendix B.
    """
    each = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return each.flatten(1).sum(dim=1)
