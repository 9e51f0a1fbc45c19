"""Configuration of the discrete tokenizer."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mimray.trainers.config.autoencoding import Autoencoder
from mimray.trainers.config.composition import check_decoder
from mimray.trainers.config.model import DalleConfig, EncoderConfig
from mimray.trainers.errors import ConfigError
from mimray.trainers.types import DatasetFacts

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


class DVAEConfig(Autoencoder):
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
