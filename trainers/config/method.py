"""Configurations of methods, a recipe's `method` section: what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from mimray.trainers.config.base import Config
from mimray.trainers.config.composition import (
    check_block,
)
from mimray.trainers.config.model import EncoderConfig
from mimray.trainers.config.schedule import Schedule
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
    def in_full(self) -> MethodConfig | None:
        """The configuration without what spares computation, for costs to be held against.

        None if nothing is spared.
        """
        return None

    @property
    def assignment_pictures(self) -> int:
        """Pictures over which targets are normalised together, by position in the global batch.

        1 if each picture is by itself. The micro batches of all workers together hold a whole
        number of such groups, so that results depend neither on workers nor on accumulation.
        """
        return 1

    @property
    def exported_momentum(self) -> Schedule | None:
        """Momentum of the moving average that is exported, the key `momentum`; None without one."""
        return None

    @property
    def pairs(self) -> bool:
        """True if pictures are combined in pairs, of neighbouring positions of the global batch.

        Micro batches are then completed by partners, and `forward` gets `partners` (`types.Batch`).
        """
        return False

    @property
    def holds_start(self) -> bool:
        """True if the loss calls the encoder as it began, frozen (`Method.start`).

        There must then be weights to begin with.
        """
        return False

    @property
    def pooled_by(self) -> Literal["mean", "cls"]:
        """Pooling that the exported bundle uses for a whole picture: patch mean or class token."""
        return "mean"


def num_patches_of(encoder: EncoderConfig, image_size: Size) -> int:
    """The encoder's output tokens of one picture, given (height, width) in pixels."""
    return (image_size[0] // encoder.stride) * (image_size[1] // encoder.stride)


class GramToStart(MethodConfig):
    """A Gram loss to the weights to begin with, which stay beside the method, frozen."""

    gram_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the Gram loss, by which patches keep the similarities to each other "
        "that the weights to begin with give them; 0: none",
    )

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if self.gram_weight and self.init_partial:
            raise ValueError(
                f"method.gram_weight {self.gram_weight:g} holds on to whole weights to begin with, "
                "and method.init_partial (--partial) takes a part of them; set "
                "method.gram_weight 0, or take weights that fit"
            )
        return self

    @property
    def holds_start(self) -> bool:
        """True where the Gram loss counts."""
        return self.gram_weight > 0


class TransformerDecoder(MethodConfig):
    """A light transformer behind the encoder; the exported encoder goes without it."""

    decoder_width: PositiveInt = Field(default=512, description="decoder token width")
    decoder_depth: NonNegativeInt = Field(default=8, description="decoder blocks")
    decoder_num_heads: PositiveInt = Field(default=16, description="decoder attention heads")

    @model_validator(mode="after")
    def _check_decoder(self) -> TransformerDecoder:
        if self.decoder_width % self.decoder_num_heads or self.decoder_width % 4:
            raise ValueError(
                f"method.decoder_width {self.decoder_width} must be a multiple of 4 and of "
                f"method.decoder_num_heads {self.decoder_num_heads}"
            )
        return self


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


class CollapseGuard(MethodConfig):
    """Bounds at which a method that learns from its own teacher stops as collapsed."""

    min_entropy_share: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="entropy of the mean assignment over that of equal use, log of the number of "
        "prototypes, below which the run stops as collapsed; 0 never",
    )
    min_std_share: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="standard deviation of the teacher's normalised outputs over that of random "
        "directions, 1 / sqrt(width), below which the run stops as collapsed; 0 never",
    )
    collapse_steps: PositiveInt = Field(
        default=100, description="updates in a row below either bound after which the run stops"
    )
