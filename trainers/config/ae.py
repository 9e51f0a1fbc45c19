"""Configuration of the autoencoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from mimray.trainers.config.autoencoding import Autoencoder


class AEConfig(Autoencoder):
    """Autoencoder: the whole picture through a bottleneck and back, mean squared error."""

    implementation = "mimray.trainers.methods.ae:AE"

    name: Literal["ae"]
    latent_dim: PositiveInt = Field(default=64, description="channels of the latent a place")
