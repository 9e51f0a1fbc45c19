"""Configuration of the VAE."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mimray.trainers.config.autoencoding import Autoencoder


class VAEConfig(Autoencoder):
    """Variational autoencoder (Kingma & Welling 2014): a Gaussian latent, the ELBO."""

    implementation = "mimray.trainers.methods.vae:VAE"

    name: Literal["vae"]
    latent_dim: PositiveInt = Field(default=32, description="channels of the latent a place")
    beta: float = Field(default=1.0, ge=0, description="weight of the KL term")
    beta_warmup_steps: NonNegativeInt = Field(
        default=0, description="steps over which beta rises linearly from 0"
    )
    reduction: Literal["sum", "mean"] = Field(
        default="sum",
        description="reconstruction a picture; sum: half the squared error over all values, "
        "the ELBO of a unit Gaussian; mean: mean squared error. KL is always summed over latents",
    )
