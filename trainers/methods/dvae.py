"""Discrete tokenizer (dVAE): pictures to grids of codes out of a vocabulary, and back.

Source: van den Oord et al. 2017, "Neural Discrete Representation Learning"; with Gumbel-softmax
Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation"; as BEiT's tokenizer Bao et al. 2022,
sec. 2.1, and Peng et al. 2022 (BEiT v2), sec. 3.1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.config.dvae import DVAEConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.errors import CodebookCollapseError
from mimray.trainers.methods.autoencoding import Autoencoding
from mimray.trainers.methods.base import Assessment
from mimray.trainers.models.quantizer import (
    GumbelQuantizer,
    Quantizer,
    VectorQuantizer,
    perplexity_of,
)
from mimray.trainers.types import MethodOutput, Panel

logger = logging.getLogger(__name__)

# Encodings of held-out pictures a code; were all used alike, 5e-5 of them would not be seen.
ENCODINGS_A_CODE = 10


class DVAE(Autoencoding):
    """Autoencoder whose latent at each place of the grid is one of K codes.

    `codes` and `decode_codes` are the tokenizer.
    """

    def __init__(self, recipe: Recipe) -> None:
        config = recipe.method
        assert isinstance(config, DVAEConfig)
        super().__init__(recipe, config.code_dim)
        self.config = config
        self._warned = False
        self.quantizer: Quantizer
        if config.quantizer == "gumbel":
            self.quantizer = GumbelQuantizer(config, self.encoder.width)
        else:
            rng = partial(generator, recipe.seed, Stream.CODEBOOK)
            self.quantizer = VectorQuantizer(config, self.encoder.width, rng)

    @property
    def vocab_size(self) -> int:
        """Number of codes K."""
        return self.config.codebook_size

    def forward(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None = None
    ) -> MethodOutput:
        """Mean squared error of the pixels plus the quantizer's loss.

        Source: van den Oord et al. 2017, eq. 3.
        """
        quantized = self.quantizer(self.encode(images))
        decoded = self.decode(quantized.latent)
        reconstruction = F.mse_loss(decoded.float(), images.float())
        terms = {"reconstruction": reconstruction, **quantized.terms}
        return self.output(images, decoded, reconstruction + quantized.loss, terms)

    def at_step(self, step: int, num_steps: int) -> None:
        """Anneal the temperature of a Gumbel-softmax quantizer."""
        self.quantizer.at_step(step, num_steps)

    def after_step(self, step: int) -> dict[str, float]:
        """Update the codebook; returns usage and perplexity over all ranks.

        Raises:
            CodebookCollapseError: fewer codes than `min_usage` were in use over the last window;
                raised on every rank.
        """
        figures = self.quantizer.after_step(step)
        usage, window = figures["codebook_usage"], self.config.usage_window_steps
        encodings = self.recipe.optim.batch_size * self._places
        low = self._low_perplexity(figures["codebook_perplexity"], encodings)
        if step % window == 0 and not self._warned and low:
            self._warned = True
            logger.warning("step %d: %s; %s", step, low, self._cures())
        if step >= window and usage < self.config.min_usage:
            error = CodebookCollapseError(
                f"step {step}: {round(usage * self.vocab_size)} of {self.vocab_size} codes "
                f"({usage:.2%}) were used over the last {window} steps, less than "
                f"method.min_usage {self.config.min_usage:.2%}",
                hint=self._cures(),
            )
            error.on_every_rank = True
            raise error
        return figures

    @property
    def pictures_to_assess(self) -> int:
        """As many as have enough places for every code to be used."""
        return math.ceil(ENCODINGS_A_CODE * self.vocab_size / self._places)

    @torch.no_grad()
    def assess(self, batches: Iterable[Float[Tensor, "B C H W"]]) -> Assessment:
        """Usage and perplexity of the codes of held-out pictures."""
        counts = torch.zeros(self.vocab_size)
        for images in batches:
            counts += torch.bincount(self.codes(images).flatten(), minlength=self.vocab_size)
        usage, perplexity = float((counts > 0).float().mean()), perplexity_of(counts)
        warnings = []
        encodings = int(counts.sum())
        reachable = self._reachable(encodings) / self.vocab_size
        if usage < self.config.warn_usage_below * reachable:
            warnings.append(
                f"{round(usage * self.vocab_size)} of {self.vocab_size} codes ({usage:.1%}) are "
                f"used, less than method.warn_usage_below "
                f"{self.config.warn_usage_below:.1%}; {self._cures()}"
            )
        if low := self._low_perplexity(perplexity, encodings):
            warnings.append(f"{low}; {self._cures()}")
        figures = {"codebook_usage": usage, "codebook_perplexity": perplexity}
        return Assessment(figures, tuple(warnings))

    @property
    def _places(self) -> int:
        """Encodings of one picture."""
        return self.recipe.grid[0] * self.recipe.grid[1]

    def _reachable(self, encodings: int) -> int:
        """Codes that so many encodings can use; their perplexity cannot be larger either."""
        return min(self.vocab_size, encodings)

    def _low_perplexity(self, perplexity: float, encodings: int) -> str:
        """A sentence on a perplexity that is too low for so many encodings; empty if it is not."""
        reachable, least = self._reachable(encodings), self.config.warn_perplexity_below
        if perplexity >= least * reachable:
            return ""
        return (
            f"the codes' perplexity is {perplexity:.4g} of {reachable} "
            f"({perplexity / reachable:.1%}), less than method.warn_perplexity_below {least:.1%}, "
            "so that a few codes stand for most places"
        )

    @torch.no_grad()
    def codes(self, images: Float[Tensor, "B C H W"]) -> Int64[Tensor, "B h w"]:
        """Codes of normalised pictures, deterministic in evaluation mode."""
        return self.quantizer.codes(self.encode(images))

    @torch.no_grad()
    def decode_codes(self, codes: Int64[Tensor, "B h w"]) -> Float[Tensor, "B C H W"]:
        """Normalised pictures decoded from codes."""
        return self.decode(self.quantizer.embed(codes))

    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """Originals, reconstructions, and the codes in false colours, alike for near codes."""
        codes = self.codes(images).cpu().numpy()  # B h w
        colours = false_colours(self.quantizer.table().detach())[codes]  # B h w 3
        stride = self.encoder.stride
        enlarged = colours.repeat(stride, axis=1).repeat(stride, axis=2)
        return [*super().panels(images, output, oracle=oracle), Panel("codes", enlarged)]

    def _cures(self) -> str:
        if self.config.quantizer == "gumbel":
            return (
                "start over with --fresh and a higher method.temperature, a method.kl_weight, "
                "a lower optim.base_lr or a smaller method.codebook_size"
            )
        config = self.config
        cures = {
            "method.ema_decay=0.99": config.ema_decay is None,
            "method.l2_normalize=true": not config.l2_normalize,
            "method.kmeans_init=true": not config.kmeans_init,
            "method.revive_below_share=0.4": not config.revive_below_share,
            "a higher method.revive_below_share": config.revive_below_share > 0,
            "a larger optim.batch_size": True,
        }
        named = ", ".join(cure for cure, applies in cures.items() if applies)
        return f"start over with --fresh and {named} or a smaller method.codebook_size"


def false_colours(table: Float[Tensor, "K D"]) -> np.ndarray:
    """Colours of codes, uint8 [K, 3]: ranks along the codes' first three principal axes."""
    centred = table.double().cpu() - table.double().mean(dim=0).cpu()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:]  # D 3, the first one last
    ranks = (centred @ axes).argsort(dim=0).argsort(dim=0)  # K 3
    colours: np.ndarray = (255 * ranks / (len(table) - 1)).round().byte().numpy()
    return colours
