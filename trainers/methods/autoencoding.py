"""The base of the autoencoders: pictures to a map of latents, and back."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mimray.trainers.config.ae import AEConfig
from mimray.trainers.config.dvae import DVAEConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.config.vae import VAEConfig
from mimray.trainers.errors import BundleError
from mimray.trainers.methods.base import Method
from mimray.trainers.models import build_encoder
from mimray.trainers.models.conv import ConvDecoder
from mimray.trainers.models.patches import patchify
from mimray.trainers.types import MethodOutput


class Autoencoding(Method):
    """An encoder and a convolutional decoder; subclasses add the bottleneck between them.

    Args:
        recipe: the checked recipe.
        latent_dim: channels of the decoder's input, the latent.
    """

    def __init__(self, recipe: Recipe, latent_dim: int) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, AEConfig | VAEConfig | DVAEConfig)
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.decoder: ConvDecoder | None = None  # none in a tokenizer imported for its codes alone
        if config.decoder_widths:
            self.decoder = ConvDecoder(
                latent_dim,
                config.decoder_widths,
                config.decoder_blocks,
                stride=self.encoder.stride,
                out_chans=data.channels,
            )

    def encode(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """The encoder's tokens of whole pictures, as a map."""
        features = self.encoder(images)
        return torch.unflatten(features.tokens.transpose(1, 2), 2, features.grid)

    def decode(self, latent: Float[Tensor, "B L h w"]) -> Float[Tensor, "B C H W"]:
        """Decode latents into normalised pictures.

        Raises:
            BundleError: the method has no decoder.
        """
        if self.decoder is None:
            raise BundleError(
                "this tokenizer was imported without a decoder", hint="its codes cannot be drawn"
            )
        weights = next(self.decoder.parameters())  # latents may be kept in fp32
        images: Tensor = self.decoder(latent.to(weights.dtype))
        return images

    def output(
        self,
        images: Float[Tensor, "B C H W"],
        decoded: Float[Tensor, "B C H W"],
        loss: Float[Tensor, ""],
        terms: dict[str, Tensor] | None = None,
    ) -> MethodOutput:
        """The result of `forward`: pictures as patches of the encoder's stride, all scored.

        Args:
            images: normalised pictures that were encoded.
            decoded: their reconstructions.
            loss: the loss, a scalar.
            terms: further scalars to log, by name.
        """
        prediction = patchify(decoded, self.encoder.stride)  # B N P
        target = patchify(images, self.encoder.stride)  # B N P
        mask = torch.ones(prediction.shape[:2], dtype=torch.bool, device=images.device)
        return MethodOutput(loss, prediction, target, mask, terms or {})
