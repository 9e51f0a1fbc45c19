"""Autoencoder: reconstruction of whole pictures through a bottleneck.

Source: Hinton & Salakhutdinov 2006, "Reducing the Dimensionality of Data with Neural Networks".
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.config.ae import AEConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.methods.autoencoding import Autoencoding
from mimray.trainers.types import MethodOutput


class AE(Autoencoding):
    """Autoencoder whose bottleneck is a few channels per place of the grid."""

    def __init__(self, recipe: Recipe) -> None:
        config = recipe.method
        assert isinstance(config, AEConfig)
        super().__init__(recipe, config.latent_dim)
        self.to_latent = nn.Conv2d(self.encoder.width, config.latent_dim, kernel_size=1)

    def forward(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None = None
    ) -> MethodOutput:
        """Mean squared error over all values of all pictures."""
        decoded = self.decode(self.to_latent(self.encode(images)))
        loss = F.mse_loss(decoded.float(), images.float())
        return self.output(images, decoded, loss)
