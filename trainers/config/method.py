"""Objectives a recipe may name. One class a method, told apart by `name`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mimray.trainers.config.base import Config


class _TransformerDecoder(Config):
    """A light transformer behind the encoder, thrown away after pre-training."""

    decoder_width: PositiveInt = Field(default=512, description="decoder token width")
    decoder_depth: NonNegativeInt = Field(default=8, description="decoder blocks")
    decoder_num_heads: PositiveInt = Field(default=16, description="decoder attention heads")

    @model_validator(mode="after")
    def _check_decoder(self) -> _TransformerDecoder:
        if self.decoder_width % self.decoder_num_heads or self.decoder_width % 4:
            raise ValueError(
                f"method.decoder_width {self.decoder_width} must be a multiple of 4 and of "
                f"method.decoder_num_heads {self.decoder_num_heads}"
            )
        return self


class MAEConfig(_TransformerDecoder):
    """Masked autoencoder (He et al. 2022): visible tokens only, light decoder, pixel targets."""

    name: Literal["mae"]
    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="share of patches hidden")
    decoder_depth: PositiveInt = Field(default=8, description="decoder blocks")
    norm_pix_loss: bool = Field(
        default=False, description="targets normalised by each patch's own mean and variance"
    )


class SimMIMConfig(Config):
    """SimMIM (Xie et al. 2022): mask tokens through the encoder, one linear head, pixels."""

    name: Literal["simmim"]
    mask_ratio: float = Field(default=0.6, gt=0, lt=1, description="share of mask units hidden")
    mask_unit_px: PositiveInt | None = Field(
        default=32,
        description="side of a mask unit, a multiple of the encoder's stride; null: one token",
    )
    loss: Literal["l1", "l2"] = Field(default="l1", description="l1 as in the paper")


class BlockMasking(Config):
    """Block-wise masks (Bao et al. 2022, Algorithm 1)."""

    mask_ratio: float = Field(
        default=0.4, gt=0, lt=1, description="most of the patches hidden: int(N x mask_ratio)"
    )
    min_block_patches: PositiveInt = Field(default=16, description="patches of the least block")
    min_block_aspect: float = Field(
        default=0.3, gt=0, le=1, description="least aspect of a block; the largest is its inverse"
    )


class MaskFeatConfig(BlockMasking, _TransformerDecoder):
    """MaskFeat (Wei et al. 2022): histograms of oriented gradients of what is hidden.

    With `decoder_depth` 0 (the paper) hidden patches go through the encoder as mask tokens and
    a linear head predicts; with more the encoder sees visible patches only, as in MAE.
    """

    name: Literal["maskfeat"]
    masking: Literal["block", "random"] = Field(default="block", description="shape of the mask")
    min_block_patches: PositiveInt = Field(default=15, description="patches of the least block")
    decoder_depth: NonNegativeInt = Field(default=0, description="decoder blocks; 0: linear head")
    hog_bins: PositiveInt = Field(default=9, description="unsigned orientations over 180 degrees")
    hog_cell_px: PositiveInt = Field(default=8, description="side of a histogram's cell, pixels")

    @model_validator(mode="after")
    def _check_masking(self) -> MaskFeatConfig:
        if self.decoder_depth and self.masking == "block":
            raise ValueError(
                "method.masking block hides another number of patches in each picture, which an "
                "encoder of visible patches cannot batch; with method.decoder_depth take random"
            )
        return self


class BEiTConfig(BlockMasking):
    """BEiT (Bao et al. 2022): the tokenizer's codes of what is hidden."""

    name: Literal["beit"]
    # int(196 x 0.385) = 75, the official code's number at 224 pixels.
    mask_ratio: float = Field(
        default=0.385, gt=0, lt=1, description="most of the patches hidden: int(N x mask_ratio)"
    )
    tokenizer: str = Field(
        default="", description="bundle or run of method dvae; path or URI every node sees"
    )
    tokenizer_image_size: tuple[PositiveInt, PositiveInt] = Field(
        default=(112, 112),
        description="height and width the tokenizer sees; gives it the encoder's grid",
    )
    tokenizer_sha256: str = Field(
        default="", description="digest of the tokenizer's weights; filled in by the plan"
    )
    vocab_size: PositiveInt = Field(default=8192, description="codes of the tokenizer")

    @field_validator("tokenizer_image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value


class _Autoencoder(Config):
    """A convolutional decoder behind a latent of a few channels a place."""

    decoder_widths: tuple[PositiveInt, ...] = Field(
        default=(256, 128, 64, 64),
        description="channels of the decoder's stages, from the latent to the picture; none: a "
        "tokenizer imported for its codes",
    )
    decoder_blocks: PositiveInt = Field(default=2, description="residual blocks a decoder stage")


class AEConfig(_Autoencoder):
    """Autoencoder: the whole picture through a bottleneck and back, mean squared error."""

    name: Literal["ae"]
    latent_dim: PositiveInt = Field(default=64, description="channels of the latent a place")


class VAEConfig(_Autoencoder):
    """Variational autoencoder (Kingma & Welling 2014): a Gaussian latent, the ELBO."""

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


# What only one of the quantizers of a dvae looks at.
_VQ_KEYS = ("beta", "ema_decay", "l2_normalize", "kmeans_init", "revive_below")
_GUMBEL_KEYS = ("temperature", "min_temperature", "temperature_steps", "kl_weight")


class DVAEConfig(_Autoencoder):
    """Discrete tokenizer: VQ-VAE (van den Oord et al. 2017), or Gumbel-softmax (Ramesh 2021)."""

    name: Literal["dvae"]
    quantizer: Literal["vq", "gumbel"] = "vq"
    codebook_size: int = Field(default=8192, ge=2, description="codes K")
    code_dim: PositiveInt = Field(default=32, description="width of a code")
    beta: float = Field(default=0.25, ge=0, description="vq: weight of the commitment term")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="vq: moving averages in place of the codebook term, e.g. 0.99",
    )
    l2_normalize: bool = Field(default=False, description="vq: codes on the unit sphere")
    kmeans_init: bool = Field(
        default=False, description="vq: codebook from k-means over the first batch of all workers"
    )
    revive_below: float = Field(
        default=0.0,
        ge=0,
        description="vq: a code used less often than this a step (moving average) is replaced "
        "by an encoding of the batch; 0 never",
    )
    min_usage: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of codes in use below which the run stops; 0 never",
    )
    usage_window_steps: PositiveInt = Field(
        default=100, description="steps over which usage is counted"
    )
    temperature: PositiveFloat = Field(default=1.0, description="gumbel: at the start")
    min_temperature: PositiveFloat = Field(default=0.0625, description="gumbel: at the end")
    temperature_steps: NonNegativeInt = Field(
        default=0, description="gumbel: steps of the cosine from one to the other; 0: the run"
    )
    kl_weight: float = Field(
        default=0.0, ge=0, description="gumbel: weight of KL(codes | uniform), nats a place"
    )

    @model_validator(mode="after")
    def _check_quantizer(self) -> DVAEConfig:
        keys = _GUMBEL_KEYS if self.quantizer == "vq" else _VQ_KEYS
        fields = type(self).model_fields
        foreign = [f"method.{k}" for k in keys if getattr(self, k) != fields[k].default]
        if foreign:
            raise ValueError(f"{', '.join(foreign)}: of no use to quantizer {self.quantizer}")
        if self.min_temperature > self.temperature:
            raise ValueError(
                f"method.min_temperature {self.min_temperature} is above "
                f"method.temperature {self.temperature}"
            )
        return self


class FinetuneConfig(Config):
    """Classes of labelled pictures, the whole encoder trained end to end (He et al. 2022, A.1)."""

    name: Literal["finetune"]
    bundle: str = Field(
        default="",
        description="bundle or run whose encoder to begin from; path or URI every node sees; "
        "empty: a fresh encoder",
    )
    bundle_sha256: str = Field(
        default="", description="digest of the encoder's weights; filled in by the plan"
    )
    num_classes: NonNegativeInt = Field(
        default=0, description="0: as many as the data has; filled in by the plan"
    )
    class_names: tuple[str, ...] = Field(
        default=(), description="by class, where the data names them; filled in by the plan"
    )
    pooling: Literal["mean", "cls"] = Field(
        default="mean", description="what the head sees: the mean of the patches, or class token"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of a target spread evenly over all classes"
    )
    mixup: float = Field(
        default=0.0, ge=0, description="alpha of mixup: the share is of Beta(alpha, alpha); 0 never"
    )
    cutmix: float = Field(default=0.0, ge=0, description="alpha of cutmix; 0 never")
    mixup_prob: float = Field(
        default=1.0, ge=0, le=1, description="probability that a micro batch is mixed"
    )
    mixup_switch_prob: float = Field(
        default=0.5, ge=0, le=1, description="probability of cutmix where both are on"
    )


AutoencoderConfig = AEConfig | VAEConfig | DVAEConfig
MethodConfig = Annotated[
    MAEConfig
    | SimMIMConfig
    | MaskFeatConfig
    | BEiTConfig
    | AEConfig
    | VAEConfig
    | DVAEConfig
    | FinetuneConfig,
    Field(discriminator="name"),
]
