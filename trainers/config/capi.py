"""Configuration of `capi`: clusters of a teacher's patches, predicted at hidden places."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mimray.trainers.config.composition import check_drops_hidden, check_masking
from mimray.trainers.config.method import (
    CollapseGuard,
    Size,
    TransformerDecoder,
    num_patches_of,
)
from mimray.trainers.config.model import EncoderConfig
from mimray.trainers.config.schedule import Schedule, Scheduled
from mimray.trainers.errors import ConfigError
from mimray.trainers.types import DatasetFacts

# Clusters a vector of a place is shared out among, at least, where all of them are used alike. It
# is 1 as published, 16,384 clusters over as many pictures.
MOST_CLUSTERS_A_PICTURE = 16


class CAPIConfig(TransformerDecoder, CollapseGuard):
    """Clusters of a moving-average teacher, predicted at hidden places (Darcet et al. 2025)."""

    implementation = "mimray.trainers.methods.capi:CAPI"

    name: Literal["capi"]
    mask_ratio: float = Field(
        default=0.65, gt=0, lt=1, description="share of patches hidden: int(N x mask_ratio)"
    )
    min_block_aspect: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="least aspect of the visible rectangle; the largest is its inverse",
    )
    predict_ratio: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="share of the hidden patches that are predicted: int(hidden x predict_ratio), "
        "one at least",
    )
    decoder_width: PositiveInt = Field(default=1024, description="predictor token width")
    decoder_depth: PositiveInt = Field(
        default=12, description="predictor blocks, of cross-attention alone"
    )
    decoder_num_heads: PositiveInt = Field(default=16, description="predictor attention heads")
    num_clusters: int = Field(
        default=16384, ge=2, description="clusters K; 2048 to 4096 for one GPU"
    )
    assignment_group: int = Field(
        default=1024,
        ge=2,
        description="pictures over which clusters are balanced at each place; the micro batches of "
        "all workers hold a whole number of such groups",
    )
    sinkhorn_rounds: PositiveInt = Field(
        default=3, description="rounds of the Sinkhorn algorithm that balances the clusters"
    )
    assignment_temperature: PositiveFloat = Field(
        default=0.06, description="temperature of the teacher's assignments"
    )
    prediction_temperature: PositiveFloat = Field(
        default=0.12, description="temperature of the predictions, and of the clustering's own loss"
    )
    momentum: Scheduled = Field(
        default=Schedule(start=0.999, end=1.0),
        description="momentum of the teacher, a number or a schedule; as published "
        "{warmup_start: 1.0, warmup_steps: …, start: 0.999, end: 1.0}, with the warm-up of the "
        "learning rate",
    )

    @model_validator(mode="after")
    def _check_momentum(self) -> CAPIConfig:
        schedule = self.momentum
        values = [schedule.start, schedule.end, schedule.warmup_start]
        if not all(0 <= value <= 1 for value in values if value is not None):
            raise ValueError(
                f"method.momentum {', '.join(f'{v:g}' for v in values if v is not None)}: a "
                "momentum lies between 0 and 1"
            )
        if schedule.start == 1 and schedule.end in (None, 1):
            raise ValueError(
                "method.momentum 1 keeps the teacher at its start for ever; 0.999 and a schedule "
                "to 1 is published"
            )
        return self

    def check_encoder(self, encoder: EncoderConfig) -> None:
        """Require an encoder that can leave patches out."""
        check_masking(self.name, encoder)
        check_drops_hidden(self.name, encoder)

    def check(self, encoder: EncoderConfig, image_size: Size) -> None:
        """Require patches both hidden and visible."""
        num_patches = num_patches_of(encoder, image_size)
        hidden = self.num_hidden(num_patches)
        if not 0 < hidden < num_patches:
            raise ValueError(
                f"method.mask_ratio {self.mask_ratio} hides int({num_patches} x "
                f"{self.mask_ratio}) = {hidden} of the {num_patches} patches at this image and "
                "patch size, and there must be both hidden and visible ones"
            )

    def check_data(self, facts: DatasetFacts, num_places: int, global_batch: int) -> None:
        """Require groups of pictures that have at least as many patches as there are clusters."""
        vectors = self.assignment_group * num_places
        if vectors < self.num_clusters:
            raise ConfigError(
                f"method.num_clusters {self.num_clusters} is more than the patches over which they "
                f"are balanced: method.assignment_group {self.assignment_group} pictures x "
                f"{num_places} places = {vectors}",
                hint=f"--set method.num_clusters={vectors} or fewer, or a larger "
                "method.assignment_group",
            )

    def advice(self, num_places: int, global_batch: int) -> list[str]:
        """Warn of more clusters than the pictures of a group can tell apart."""
        shared = self.num_clusters / self.assignment_group
        if shared <= MOST_CLUSTERS_A_PICTURE:
            return []
        return [
            f"at each place method.assignment_group {self.assignment_group} pictures are balanced "
            f"over method.num_clusters {self.num_clusters}, so that a patch is shared out among "
            f"{shared:.3g} clusters or more; published is 1: fewer clusters, "
            f"--set method.num_clusters={MOST_CLUSTERS_A_PICTURE * self.assignment_group}, or "
            "larger groups"
        ]

    @property
    def drops_hidden(self) -> bool:
        """True: the encoder sees visible patches only."""
        return True

    @property
    def exported_momentum(self) -> Schedule:
        """The teacher's momentum."""
        return self.momentum

    @property
    def assignment_pictures(self) -> int:
        """Pictures over which clusters are balanced."""
        return self.assignment_group

    def num_hidden(self, num_patches: int) -> int:
        """Hidden patches of a picture, the same number in each.

        Args:
            num_patches: the encoder's output tokens of one picture.
        """
        return int(num_patches * self.mask_ratio)

    def num_predicted(self, num_hidden: int) -> int:
        """Predicted patches of a picture, the same number in each.

        Args:
            num_hidden: its hidden patches.
        """
        return max(1, int(num_hidden * self.predict_ratio))
