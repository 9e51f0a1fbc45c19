"""Configuration of what autoencoders share."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from mimray.trainers.config.composition import check_decoder
from mimray.trainers.config.method import MethodConfig
from mimray.trainers.config.model import EncoderConfig


class Autoencoder(MethodConfig):
    """A convolutional decoder behind a latent of a few channels per place of the grid."""

    decoder_widths: tuple[PositiveInt, ...] = Field(
        default=(256, 128, 64, 64),
        description="channels of the decoder's stages, from the latent to the picture; none: a "
        "tokenizer imported for its codes",
    )
    decoder_blocks: PositiveInt = Field(default=2, description="residual blocks a decoder stage")

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require decoder stages that enlarge to the encoder's stride."""
        check_decoder(self.decoder_widths, encoder)
