"""Configuration of MAE."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from mimray.trainers.config.composition import check_drops_hidden, check_masking, check_ratio
from mimray.trainers.config.method import Size, TransformerDecoder, num_patches_of
from mimray.trainers.config.model import EncoderConfig, ViTConfig


class MAEConfig(TransformerDecoder):
    """Masked autoencoder (He et al. 2022): visible tokens only, light decoder, pixel targets.

    With `decoder` cross it is CrossMAE (Fu et al. 2024): hidden patches are decoded each by itself,
    and so a share of them may be.
    """

    implementation = "mimray.trainers.methods.mae:MAE"

    name: Literal["mae"]
    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="share of patches hidden")
    decoder_depth: PositiveInt = Field(default=8, description="decoder blocks")
    norm_pix_loss: bool = Field(
        default=False, description="targets normalised by each patch's own mean and variance"
    )
    decoder: Literal["self", "cross"] = Field(
        default="self",
        description="self: all patches attend to one another; cross: each hidden patch attends to "
        "the visible ones alone (CrossMAE)",
    )
    decode_ratio: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="decoder cross: share of the hidden patches that a step decodes and scores",
    )
    encoder_layers: tuple[int, ...] = Field(
        default=(),
        description="decoder cross: layers of the encoder that each decoder block weighs, from 0; "
        "negative from the end; none: the last alone",
    )

    @model_validator(mode="after")
    def _check_cross(self) -> MAEConfig:
        if self.decoder == "self" and self.decode_ratio < 1:
            raise ValueError(
                f"method.decode_ratio {self.decode_ratio} goes with method.decoder cross; in self "
                "all patches attend to one another, so all are decoded"
            )
        if self.decoder == "self" and self.encoder_layers:
            raise ValueError(
                f"method.encoder_layers {list(self.encoder_layers)} goes with method.decoder cross"
            )
        return self

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require an encoder that can leave patches out."""
        check_masking(self.name, encoder)
        check_drops_hidden(self.name, encoder)
        assert isinstance(encoder, ViTConfig)
        if self.decoder == "cross" and encoder.positions == "none":
            raise ValueError(
                "method.decoder cross finds patches by the positions in the encoder's tokens, and "
                "encoder.positions none adds none; take sincos or learned, or method.decoder self"
            )
        self.chosen_layers(encoder.depth)

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require patches both hidden and visible, and one at least that is decoded."""
        num_patches = num_patches_of(encoder, image_size)
        check_ratio(self.mask_ratio, num_patches)
        num_hidden = num_patches - int(num_patches * (1 - self.mask_ratio))
        if not self.num_decoded(num_hidden):
            raise ValueError(
                f"method.decode_ratio {self.decode_ratio} of {num_hidden} hidden patches is "
                f"{self.decode_ratio * num_hidden:.2g}, which rounds to none; "
                f"{1 / num_hidden:.2g} decodes one"
            )

    def num_decoded(self, num_hidden: int) -> int:
        """The number of hidden patches that a step of training decodes in each picture."""
        return round(self.decode_ratio * num_hidden)

    def chosen_layers(self, depth: int) -> tuple[int, ...]:
        """The encoder's layers that the decoder weighs, counted from 0; none for the last alone.

        Args:
            depth: number of the encoder's layers.

        Raises:
            ValueError: there is no such layer, one is named twice, or the last is not among them.
        """
        named = f"method.encoder_layers {list(self.encoder_layers)}"
        chosen = tuple(layer + depth if layer < 0 else layer for layer in self.encoder_layers)
        if any(not 0 <= layer < depth for layer in chosen):
            raise ValueError(
                f"{named} must lie in {-depth}..{depth - 1}, since the encoder has {depth} layers"
            )
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"{named} names a layer twice")
        if chosen and depth - 1 not in chosen:
            raise ValueError(
                f"{named} lacks the last layer, {depth - 1}; those behind layer {max(chosen)} "
                "would learn nothing"
            )
        return tuple(sorted(chosen))

    @property
    def in_full(self) -> MAEConfig | None:
        """The same with the decoder that decodes every patch."""
        if self.decoder == "self":
            return None
        plain = {"decoder": "self", "decode_ratio": 1.0, "encoder_layers": ()}
        return self.model_copy(update=plain)

    @property
    def drops_hidden(self) -> bool:
        """True: the encoder sees visible patches only."""
        return True
