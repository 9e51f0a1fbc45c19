"""Configurations of methods, a recipe's `method` section: their base, and most of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mimray.trainers.config.base import Config
from mimray.trainers.config.composition import (
    check_block,
    check_decoder,
    check_drops_hidden,
    check_masking,
    check_ratio,
    check_units,
)
from mimray.trainers.config.model import DalleConfig, EncoderConfig, ViTConfig
from mimray.trainers.errors import ConfigError
from mimray.trainers.types import DatasetFacts

Size = tuple[int, int]


class MethodConfig(Config):
    """The base of all methods' configurations, a recipe's `method` section.

    Attributes:
        implementation: module and class of the method, `package.module:Class`; imported when a
            run needs it.
        learns_classes: True if the method is given the class of each picture. It then has the keys
            `num_classes` and `class_names`, which are filled in from the data.
        places: keys that hold the path or URI of a bundle the method needs (`Method.needs`). Beside
            each there is a key `…_sha256`, the digest of its weights, filled in by the plan.
        init_key: the key that names the weights to begin with.
        begins_with_rest: True if the method begins with its own head or decoder, too, where the
            weights to begin with are of the same method and have it.
        trains_positions: True if the encoder of the weights to begin with is trained with its
            positions, although they were fixed.
        name: the method's name in a recipe; each class declares its own as a `Literal`.
    """

    implementation: ClassVar[str]
    learns_classes: ClassVar[bool] = False
    places: ClassVar[tuple[str, ...]] = ()
    init_key: ClassVar[str] = "init"
    begins_with_rest: ClassVar[bool] = True
    trains_positions: ClassVar[bool] = False

    if TYPE_CHECKING:
        name: str

    init: str = Field(
        default="",
        description="weights to begin with, the same as --init: a bundle, run, registered name or "
        "checkpoint of another library; empty: fresh weights",
    )
    init_sha256: str = Field(
        default="", description="digest of the weights to begin with; filled in by the plan"
    )
    init_partial: bool = Field(
        default=False,
        description="the same as --partial: begin with those of the weights that fit; the rest is "
        "fresh",
    )

    @model_validator(mode="after")
    def _check_partial(self) -> Self:
        if self.init_partial and not getattr(self, self.init_key):
            raise ValueError(
                "method.init_partial (--partial) takes a part of weights to begin with, and "
                f"method.{self.init_key} (--init) names none"
            )
        return self

    @property
    def bundle_keys(self) -> tuple[str, ...]:
        """The keys that hold the place of a bundle, that of the weights to begin with first."""
        return (self.init_key, *self.places)

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Refuse an encoder that the method cannot work with at any picture size.

        Args:
            encoder: the encoder's architecture.

        Raises:
            ValueError: they do not go together; the message names what does.
        """

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Refuse a picture size, or keys that do not fit it.

        Args:
            encoder: the encoder's architecture, which fits the size.
            image_size: (height, width) in pixels.

        Raises:
            ValueError: they do not go together; the message names what does.
        """

    def check_data(self, facts: DatasetFacts, num_places: int, global_batch: int) -> None:
        """Refuse data that the method cannot learn from.

        Args:
            facts: the dataset's description.
            num_places: the encoder's output tokens of one picture.
            global_batch: pictures in one global batch.

        Raises:
            ConfigError: the dataset or a batch is too small for the method.
        """

    def advice(self, num_places: int, global_batch: int) -> list[str]:
        """Warnings about settings that pass every check and are still unlikely to train well.

        Args:
            num_places: the encoder's output tokens of one picture.
            global_batch: pictures in one global batch.
        """
        return []

    @property
    def drops_hidden(self) -> bool:
        """True if hidden patches are left out of the encoder."""
        return False

    @property
    def assignment_pictures(self) -> int:
        """Pictures over which targets are normalised together, by position in the global batch.

        1 if each picture is by itself. The micro batches of all workers together hold a whole
        number of such groups, so that results depend neither on workers nor on accumulation.
        """
        return 1

    @property
    def pairs(self) -> bool:
        """True if pictures are combined in pairs, of neighbouring positions of the global batch.

        Micro batches are then completed by partners, and `forward` gets `partners` (`types.Batch`).
        """
        return False

    @property
    def pooled_by(self) -> Literal["mean", "cls"]:
        """Pooling that the exported bundle uses for a whole picture: patch mean or class token."""
        return "mean"


def num_patches_of(encoder: EncoderConfig, image_size: Size) -> int:
    """The encoder's output tokens of one picture, given (height, width) in pixels."""
    return (image_size[0] // encoder.stride) * (image_size[1] // encoder.stride)


class _TransformerDecoder(MethodConfig):
    """A light transformer behind the encoder; the exported encoder goes without it."""

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

    implementation = "mimray.trainers.methods.mae:MAE"

    name: Literal["mae"]
    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="share of patches hidden")
    decoder_depth: PositiveInt = Field(default=8, description="decoder blocks")
    norm_pix_loss: bool = Field(
        default=False, description="targets normalised by each patch's own mean and variance"
    )

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require an encoder that can leave patches out."""
        check_masking(self.name, encoder)
        check_drops_hidden(self.name, encoder)

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require patches both hidden and visible."""
        check_ratio(self.mask_ratio, num_patches_of(encoder, image_size))

    @property
    def drops_hidden(self) -> bool:
        """True: the encoder sees visible patches only."""
        return True


class SimMIMConfig(MethodConfig):
    """SimMIM (Xie et al. 2022): mask tokens through the encoder, one linear head, pixels."""

    implementation = "mimray.trainers.methods.simmim:SimMIM"

    name: Literal["simmim"]
    mask_ratio: float = Field(default=0.6, gt=0, lt=1, description="share of mask units hidden")
    mask_unit_px: PositiveInt | None = Field(
        default=32,
        description="side of a mask unit, a multiple of the encoder's stride; null: one token",
    )
    loss: Literal["l1", "l2"] = Field(default="l1", description="l1 as in the paper")

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require an encoder with tokens to hide."""
        check_masking(self.name, encoder)

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require mask units that are whole tokens, divide the picture, and leave one visible."""
        check_units(self.mask_ratio, self.mask_unit_px, encoder, image_size)


class BlockMasking(MethodConfig):
    """Block-wise masking (Bao et al. 2022, Algorithm 1)."""

    mask_ratio: float = Field(
        default=0.4, gt=0, lt=1, description="most of the patches hidden: int(N x mask_ratio)"
    )
    min_block_patches: PositiveInt = Field(default=16, description="patches of the least block")
    min_block_aspect: float = Field(
        default=0.3, gt=0, le=1, description="least aspect of a block; the largest is its inverse"
    )

    def check_block(self, num_patches: int) -> None:
        """Refuse a least block that has more patches than may be hidden."""
        check_block(self.mask_ratio, self.min_block_patches, num_patches)


class MaskFeatConfig(BlockMasking, _TransformerDecoder):
    """MaskFeat (Wei et al. 2022): histograms of oriented gradients of hidden patches.

    With `decoder_depth` 0 (the paper) hidden patches go through the encoder as mask tokens and
    a linear head predicts; with more the encoder sees visible patches only, as in MAE.
    """

    implementation = "mimray.trainers.methods.maskfeat:MaskFeat"

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

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require tokens to hide, and cells that divide one; with a decoder, as for MAE."""
        check_masking(self.name, encoder)
        if self.drops_hidden:
            check_drops_hidden(self.name, encoder)
        if encoder.stride % self.hog_cell_px:
            raise ValueError(
                f"method.hog_cell_px {self.hog_cell_px} does not divide the encoder's stride "
                f"{encoder.stride}"
            )

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require patches both hidden and visible, and a least block that may be hidden."""
        num_patches = num_patches_of(encoder, image_size)
        check_ratio(self.mask_ratio, num_patches)
        if self.masking == "block":
            self.check_block(num_patches)

    @property
    def drops_hidden(self) -> bool:
        """True if there is a decoder."""
        return self.decoder_depth > 0


class BEiTConfig(BlockMasking):
    """BEiT (Bao et al. 2022): the tokenizer's codes of hidden patches."""

    implementation = "mimray.trainers.methods.beit:BEiT"
    places = ("tokenizer",)

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

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require an encoder with tokens to hide."""
        check_masking(self.name, encoder)

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require patches both hidden and visible, and a least block that may be hidden."""
        num_patches = num_patches_of(encoder, image_size)
        check_ratio(self.mask_ratio, num_patches)
        self.check_block(num_patches)


class _Autoencoder(MethodConfig):
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


class AEConfig(_Autoencoder):
    """Autoencoder: the whole picture through a bottleneck and back, mean squared error."""

    implementation = "mimray.trainers.methods.ae:AE"

    name: Literal["ae"]
    latent_dim: PositiveInt = Field(default=64, description="channels of the latent a place")


class VAEConfig(_Autoencoder):
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


# Keys that only one of a dvae's quantizers reads.
_VQ_KEYS = (
    "beta",
    "ema_decay",
    "l2_normalize",
    "kmeans_init",
    "revive_below_share",
    "revive_until_share",
)
# Encodings a code and step from which moving averages are published: EnCodec has 64 x 75 / 1024 =
# 4.7 (Defossez et al. 2022), BEiT v2 1024 x 196 / 8192 = 24.5, DALL-E 512 x 1024 / 8192 = 64.
FEWEST_ENCODINGS_A_CODE = 4
_GUMBEL_KEYS = ("temperature", "min_temperature", "temperature_steps", "kl_weight")


class DVAEConfig(_Autoencoder):
    """Discrete tokenizer: VQ-VAE (van den Oord et al. 2017), or Gumbel-softmax (Ramesh 2021)."""

    implementation = "mimray.trainers.methods.dvae:DVAE"

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
        default=False,
        description="vq: codebook from k-means over the encodings of the first "
        "global batch, which itself is not quantized",
    )
    revive_below_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="vq: a code is replaced by an encoding of the batch where its uses (moving "
        "average) fall below this share of the mean over all codes, e.g. 0.4; 0 never",
    )
    revive_until_share: float = Field(
        default=0.75,
        ge=0,
        le=1,
        description="vq: share of the run's steps after which no code is replaced",
    )
    min_usage: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of codes in use below which the run stops; 0 never",
    )
    warn_usage_below: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of codes used on held-out pictures below which the run warns",
    )
    warn_perplexity_below: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="perplexity of the codes over codebook_size, or over the number of encodings "
        "where these are fewer, below which the run warns",
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

    @model_validator(mode="before")
    @classmethod
    def _refuse_absolute_threshold(cls, values: Any) -> Any:
        if isinstance(values, dict) and "revive_below" in values:
            raise ValueError(
                "method.revive_below, uses a step whatever the batch, is no longer a key: take "
                "method.revive_below_share, a share of the mean uses of a code, e.g. 0.4"
            )
        return values

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

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require a fitting decoder, save of a dalle tokenizer, imported for its codes alone."""
        if self.decoder_widths or not isinstance(encoder, DalleConfig):
            check_decoder(self.decoder_widths, encoder)

    def check_data(self, facts: DatasetFacts, num_places: int, global_batch: int) -> None:
        """Require a decoder, and at least as many places to code as codes.

        With k-means a global batch must hold as many places, too.
        """
        if not self.decoder_widths:
            raise ConfigError(
                "method.decoder_widths names no stage: without a decoder there is nothing to learn",
                hint="an imported tokenizer is for method.tokenizer of beit",
            )
        places, codes = facts.num_samples * num_places, self.codebook_size
        if places < codes:
            raise ConfigError(
                f"method.codebook_size {codes} is more than the {facts.num_samples} pictures x "
                f"{num_places} places = {places} of {facts.uri}",
                hint="fewer codes, or more pictures",
            )
        if self.kmeans_init and global_batch * num_places < codes:
            raise ConfigError(
                f"k-means cannot make method.codebook_size {codes} codes of the first "
                f"{global_batch} pictures x {num_places} places = {global_batch * num_places} "
                "encodings",
                hint="a larger optim.batch_size, fewer codes, or method.kmeans_init=false",
            )

    def advice(self, num_places: int, global_batch: int) -> list[str]:
        """Warn of batches that are too small for the codebook."""
        encodings, fewest = global_batch * num_places, FEWEST_ENCODINGS_A_CODE
        if self.quantizer != "vq" or encodings >= fewest * self.codebook_size:
            return []
        return [
            f"a step has optim.batch_size {global_batch} x {num_places} places / "
            f"method.codebook_size {self.codebook_size} = {encodings / self.codebook_size:.2g} "
            f"encodings a code, fewer than {fewest}; published codebooks see 5 to 64, and with "
            "fewer the codes follow chance: "
            f"--set optim.batch_size={math.ceil(fewest * self.codebook_size / num_places)}, or "
            f"--set method.codebook_size={max(2, encodings // fewest)}"
        ]


class FinetuneConfig(MethodConfig):
    """Fine-tuning: classification with the encoder trained end to end (He et al. 2022, A.1)."""

    implementation = "mimray.trainers.methods.finetune:Finetune"
    learns_classes = True
    init_key = "bundle"
    begins_with_rest = False
    trains_positions = True

    name: Literal["finetune"]
    bundle: str = Field(
        default="",
        description="bundle or run whose encoder to begin from, the same as --init; path or URI "
        "every node sees; empty: a fresh encoder",
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
        default=1.0, ge=0, le=1, description="probability that a picture is mixed"
    )
    mixup_switch_prob: float = Field(
        default=0.5, ge=0, le=1, description="probability of cutmix where both are on"
    )

    @model_validator(mode="before")
    @classmethod
    def _init_is_bundle(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("init"):
            return values
        if values.get("bundle"):
            raise ValueError("method.init and method.bundle of finetune are the same; give one")
        return {**values, "bundle": values["init"], "init": ""}

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require an encoder with the pooling that the head uses."""
        if isinstance(encoder, DalleConfig):
            raise ValueError("encoder dalle makes codes of pictures; it is not for fine-tuning")
        if self.pooling == "cls" and not (isinstance(encoder, ViTConfig) and encoder.class_token):
            raise ValueError(
                f"encoder {encoder.name} has no class token; method.pooling mean goes with it"
            )

    @property
    def pairs(self) -> bool:
        """True if pictures are mixed."""
        return bool((self.mixup or self.cutmix) and self.mixup_prob)

    @property
    def pooled_by(self) -> Literal["mean", "cls"]:
        """The pooling that the head was trained on."""
        return self.pooling
