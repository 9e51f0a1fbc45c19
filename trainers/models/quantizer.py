"""Quantizers: a map of features to one of K codes per place, and codes to their vectors.

State that is not learnt by gradient (moving averages, last uses) is gathered by `forward` over the
micro batches of a step and updated once, by `after_step`, over all ranks. So it does not depend on
the number of ranks or micro batches, and is the same on every rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.config.dvae import DVAEConfig
from mimray.trainers.errors import ConfigError
from mimray.trainers.models.codebook import Codebook, Fp32Buffers
from mimray.trainers.models.full_precision import full_precision
from mimray.trainers.models.kmeans import cluster, kmeans, nearest_codes
from mimray.trainers.models.noise import Noise

# Laplace smoothing of the moving counts, as in the code of van den Oord et al. (Sonnet).
SMOOTHING = 1e-5
# Decay of the moving average of uses if there is no `ema_decay`.
USES_DECAY = 0.99


class Quantized(NamedTuple):
    """A quantized map of features.

    Attributes:
        latent: float [B, D, h, w], the decoder's input; its gradient reaches the features.
        codes: int64 [B, h, w], the code of each place.
        loss: fp32 scalar, the quantizer's part of the loss, beside the reconstruction's.
        terms: scalars to log, by name, such as unweighted parts of the loss.
    """

    latent: Tensor
    codes: Tensor
    loss: Tensor
    terms: dict[str, Tensor]


class Quantizer(Fp32Buffers, ABC):
    """The base of all quantizers: a codebook, and a record of the codes in use.

    Args:
        config: the method's configuration, with the number of codes and the window of usage.
        codebook: the codes' vectors.

    Attributes:
        counts: float [K], uses of each code since the last `after_step` on this rank.
        last_used: float [K], the last step that used each code, 0 for none; fp32 is exact to 2^24.
    """

    counts: Tensor
    last_used: Tensor

    def __init__(self, config: DVAEConfig, codebook: Codebook) -> None:
        super().__init__()
        self.config = config
        self.codebook = codebook
        self.register_buffer("counts", torch.zeros(config.codebook_size), persistent=False)
        self.register_buffer("last_used", torch.zeros(config.codebook_size))

    @abstractmethod
    def forward(self, features: Float[Tensor, "B W h w"]) -> Quantized:
        """Quantize a map; in training, also gather the state that `after_step` needs."""

    @abstractmethod
    def codes(self, features: Float[Tensor, "B W h w"]) -> Int64[Tensor, "B h w"]:
        """The code of each place."""

    def table(self) -> Float[Tensor, "K D"]:
        """The vectors of all codes, in fp32."""
        vectors: Tensor = self.codebook()
        return vectors

    def embed(self, codes: Int64[Tensor, "B h w"]) -> Float[Tensor, "B D h w"]:
        """The vectors of a map of codes, in fp32."""
        return F.embedding(codes, self.table()).movedim(3, 1)

    def at_step(self, step: int, num_steps: int) -> None:
        """Called before each update; see `Method.at_step`."""

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """Update the codebook and its usage after a step; collective, the same on every rank.

        Args:
            step: updates made, this one included.

        Returns:
            `codebook_usage`, the share of codes used over the window; `codebook_perplexity`, that
            of the step's codes; and figures of the quantizer's own.
        """
        counts = _over_ranks(self.counts)
        figures = self._settle(step, counts)
        self.last_used.masked_fill_(counts > 0, step)
        window_start = max(0, step - self.config.usage_window_steps)
        usage = (self.last_used > window_start).float().mean()
        perplexity = perplexity_of(counts)
        counts.zero_()
        return {"codebook_usage": float(usage), "codebook_perplexity": perplexity, **figures}

    def _settle(self, step: int, counts: Float[Tensor, " K"]) -> dict[str, float]:
        """Update the codebook from the counts of all ranks, or these if they are made only now."""
        return {}

    def _count(self, codes: Int64[Tensor, "B h w"]) -> None:
        self.counts += torch.bincount(codes.flatten(), minlength=len(self.counts))


class VectorQuantizer(Quantizer):
    """Vector quantization: the nearest code of each place, with straight-through gradients.

    Args:
        config: the method's configuration, with codes, weights and options.
        width: width of the features W.
        rng: makes the generator of a counter, the same on every rank: 0 for k-means, then the step.

    Attributes:
        moving: True if codes follow moving averages in place of gradients.
        revives: True while codes are replaced that have gone out of use.
        uses: float [K], moving average of the uses of each code per step. Where codes are revived
            it begins at the mean, so that none counts as idle before its average has faded.
        sums: float [K, D], sums of each code's encodings since the last `after_step` on this rank.
        moving_sums: float [K, D], moving average of the sums over all ranks.
        ready: 0 until k-means has made the codebook, else 1. It is made of the encodings of a whole
            step, so that it depends on neither ranks nor micro batches; the step itself has no
            codes yet and hands its encodings on as they are.

    Source: van den Oord et al. 2017, sec. 3.2; moving averages: appendix A.1; narrow codes on
        the unit sphere: Yu et al. 2022 (ViT-VQGAN), sec. 3.2; revival: Zeghidour et al. 2021
        (SoundStream), sec. III-C, and Dhariwal et al. 2020 (Jukebox), sec. 3.1, whose
        thresholds are counts; ours is relative to the mean count, so that it suits any batch.
    """

    uses: Tensor
    sums: Tensor
    moving_sums: Tensor
    ready: Tensor

    def __init__(
        self, config: DVAEConfig, width: int, rng: Callable[[int], np.random.Generator]
    ) -> None:
        size, dim = config.codebook_size, config.code_dim
        moving = config.ema_decay is not None
        # Near the origin the nearest code depends on direction alone, so that every code is used.
        # On the sphere it always does, and a longer vector turns less in an optimiser's step.
        std = 1.0 if config.l2_normalize else 1 / size
        super().__init__(config, Codebook(size, dim, std=std, learnt=not moving))
        self.moving = moving
        self.revives = config.revive_below_share > 0
        self.rng = rng
        self.project = nn.Conv2d(width, dim, kernel_size=1)
        self.register_buffer("uses", torch.ones(size))
        if moving:
            self.register_buffer("moving_sums", self.table().clone())
            self.register_buffer("sums", torch.zeros(size, dim), persistent=False)
        self.register_buffer("ready", torch.tensor(float(not config.kmeans_init)))
        self._seen: list[Tensor] = []

    def at_step(self, step: int, num_steps: int) -> None:
        """End revival in the last part of a run, in which codes settle."""
        config = self.config
        self.revives = (
            config.revive_below_share > 0 and step < config.revive_until_share * num_steps
        )

    def forward(self, features: Float[Tensor, "B W h w"]) -> Quantized:
        """Quantize; the loss is codebook term (without moving averages) + beta * commitment.

        Both terms are means over values.
        """
        vectors = self._vectors(features)  # B h w D
        table = self.table()
        codes = self._nearest(vectors, table)
        if self.training:
            self._remember(vectors.detach(), codes)
        chosen = F.embedding(codes, table)  # B h w D
        if self.training and not self.ready:
            chosen = vectors + 0 * chosen  # with gradients of 0 for the codebook, as ZeRO wants
        commitment = F.mse_loss(vectors, chosen.detach())
        loss, terms = self.config.beta * commitment, {"commitment": commitment}
        if not self.moving:
            terms["codebook"] = F.mse_loss(chosen, vectors.detach())
            loss = loss + terms["codebook"]
        latent = vectors + (chosen - vectors).detach()
        return Quantized(latent.movedim(3, 1).to(features.dtype), codes, loss, terms)

    def codes(self, features: Float[Tensor, "B W h w"]) -> Int64[Tensor, "B h w"]:
        """The nearest code of each place."""
        return self._nearest(self._vectors(features), self.table())

    def table(self) -> Float[Tensor, "K D"]:
        """The vectors of all codes, in fp32."""
        return self._on_sphere(super().table())

    def _vectors(self, features: Tensor) -> Float[Tensor, "B h w D"]:
        return self._on_sphere(self.project(features).float().movedim(1, 3))

    def _on_sphere(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.config.l2_normalize else vectors

    def _nearest(self, vectors: Tensor, table: Tensor) -> Int64[Tensor, "B h w"]:
        flat = nearest_codes(vectors.detach().flatten(0, 2), table.detach())
        return flat.view(vectors.shape[:3])

    @torch.no_grad()
    def _start(self) -> Float[Tensor, " K"]:
        """Initialise the codebook by k-means over the step's encodings of all ranks; collective.

        Returns:
            Uses of each code by these encodings.
        """
        mine = torch.cat(self._seen)
        everyone = _gather(mine)
        size = len(self.uses)
        if len(everyone) < size:
            error = ConfigError(
                f"k-means cannot make method.codebook_size {size} codes of the {len(everyone)} "
                "encodings of the first batch",
                hint="a larger optim.batch_size, fewer codes, or method.kmeans_init=false",
            )
            error.on_every_rank = True
            raise error
        # The first K of a permutation; argsort of uniform draws, which numpy keeps stable.
        picked = np.argsort(self.rng(0).random(len(everyone)), kind="stable")[:size]
        means = everyone[torch.from_numpy(picked).to(everyone.device)]
        if _rank_of_ranks()[0] == 0:
            means = kmeans(everyone, means, spherical=self.config.l2_normalize)
        if dist.is_initialized():
            dist.broadcast(means, 0)
        # All codes weigh the same: uses by a single step are mostly chance.
        self._replace(self._all_codes(), means, len(everyone) / size)
        self.ready.fill_(1)
        codes = nearest_codes(mine, self.table())
        return _over_ranks(torch.bincount(codes, minlength=size).float())

    @torch.no_grad()
    def _remember(self, vectors: Float[Tensor, "B h w D"], codes: Int64[Tensor, "B h w"]) -> None:
        self._count(codes)
        flat = vectors.flatten(0, 2)
        if self.moving:
            self.sums += cluster(flat, codes.flatten(), len(self.sums)).sums
        if self.revives or not self.ready:
            self._seen.append(flat)

    def _settle(self, step: int, counts: Float[Tensor, " K"]) -> dict[str, float]:
        revived = 0
        if not self.ready:
            counts.copy_(self._start())
        else:
            mean = float(counts.sum()) / len(counts)
            if step == 1 and self.revives:
                self._weigh(self._all_codes(), self.table(), mean)
            self._follow(counts)
            if self.revives:
                revived = self._revive(step, mean)
        self._seen.clear()
        if self.moving:
            self.sums.zero_()
        return {"codes_revived": float(revived)}

    def _follow(self, counts: Float[Tensor, " K"]) -> None:
        """Move the averages, and the codes with them, by the counts of all ranks; collective."""
        decay = self.config.ema_decay or USES_DECAY
        self.uses.lerp_(counts, 1 - decay)
        if self.moving:
            self.moving_sums.lerp_(_over_ranks(self.sums), 1 - decay)
            total = self.uses.sum()
            smoothed = (self.uses + SMOOTHING) / (total + len(counts) * SMOOTHING) * total  # K
            # A code without uses keeps its place: only the smoothing would move it.
            used = counts > 0
            self.codebook.replace(used, (self.moving_sums / smoothed.unsqueeze(1))[used])

    def _revive(self, step: int, mean: float) -> int:
        """Replace codes that are hardly used by encodings of the step; collective.

        Args:
            step: updates made, this one included.
            mean: uses a code in this step, the mean over all codes.

        Returns:
            The number of codes replaced.
        """
        rare = self.uses < self.config.revive_below_share * mean
        if count := int(rare.sum()):
            self._replace(rare, self._draw(count, self.rng(step)), mean)
        return count

    def _draw(self, count: int, rng: np.random.Generator) -> Float[Tensor, "n D"]:
        """Draw encodings of the step, from any rank; collective."""
        mine = torch.cat(self._seen)  # M D
        rank, ranks = _rank_of_ranks()
        drawn_at = (rng.random(count) * ranks * len(mine)).astype(np.int64)
        places = torch.from_numpy(drawn_at).to(mine.device) - rank * len(mine)
        here = (places >= 0) & (places < len(mine))
        drawn = mine.new_zeros(count, mine.shape[1])
        drawn[here] = mine[places[here]]
        return _over_ranks(drawn)

    def _replace(self, chosen: Bool[Tensor, " K"], vectors: Tensor, uses: float) -> None:
        """Replace codes, and set their moving averages as after `uses` uses per step."""
        self.codebook.replace(chosen, vectors)
        self._weigh(chosen, vectors, uses)

    def _all_codes(self) -> Bool[Tensor, " K"]:
        return torch.ones_like(self.uses, dtype=torch.bool)

    def _weigh(self, chosen: Bool[Tensor, " K"], vectors: Tensor, uses: float) -> None:
        """Set the moving averages of codes as after `uses` uses per step."""
        self.uses[chosen] = uses
        if self.moving:
            self.moving_sums[chosen] = uses * vectors


class GumbelQuantizer(Quantizer):
    """Gumbel-softmax: a random mixture of codes at each place; outside training, one code.

    Args:
        config: the method's configuration, with codes, temperatures and the KL term's weight.
        width: width of the features W.

    Attributes:
        temperature: temperature at the current step.

    Source: Jang et al. 2017; Ramesh et al. 2021 (DALL-E), sec. 2.1 and appendix A.2.
    """

    def __init__(self, config: DVAEConfig, width: int) -> None:
        size = config.codebook_size
        super().__init__(config, Codebook(size, config.code_dim, std=1.0, learnt=True))
        self.to_logits = nn.Conv2d(width, size, kernel_size=1)
        self.noise = Noise()
        self.temperature = config.temperature

    def at_step(self, step: int, num_steps: int) -> None:
        """Set the temperature, which falls by a half-cosine."""
        config = self.config
        progress = min(1.0, step / (config.temperature_steps or num_steps))
        above = 0.5 * (1 + math.cos(math.pi * progress))
        self.temperature = (
            config.min_temperature + (config.temperature - config.min_temperature) * above
        )

    def forward(self, features: Float[Tensor, "B W h w"]) -> Quantized:
        """Quantize; the loss is kl_weight * KL(codes | uniform), in nats, averaged over places."""
        logits = self.to_logits(features).float().movedim(1, 3)  # B h w K
        codes = logits.detach().argmax(dim=-1)
        if self.training:
            self._count(codes)
            gumbels = -self.noise.exponential(logits.detach()).log()
            soft = ((logits + gumbels) / self.temperature).softmax(dim=-1)  # B h w K
            with full_precision(soft):
                latent = (soft @ self.table()).movedim(3, 1)
        else:
            latent = self.embed(codes)
        kl = kl_from_uniform(logits).mean()
        terms = {"kl": kl, "temperature": torch.tensor(self.temperature, device=kl.device)}
        return Quantized(latent.to(features.dtype), codes, self.config.kl_weight * kl, terms)

    def codes(self, features: Float[Tensor, "B W h w"]) -> Int64[Tensor, "B h w"]:
        """The likeliest code of each place."""
        logits: Tensor = self.to_logits(features)
        return logits.float().argmax(dim=1)


def perplexity_of(counts: Float[Tensor, " K"]) -> float:
    """Perplexity of the codes, from the uses of each: K if all are used alike, 1 for a single."""
    return float(torch.special.entr(counts / counts.sum()).sum().exp())


def kl_from_uniform(logits: Float[Tensor, "*P K"]) -> Float[Tensor, "*P"]:
    """KL divergence of categorical distributions from the uniform one, in nats."""
    log_q = logits.log_softmax(dim=-1)
    return (log_q.exp() * log_q).sum(dim=-1) + math.log(logits.shape[-1])


def _rank_of_ranks() -> tuple[int, int]:
    """This rank, and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _over_ranks(values: Tensor) -> Tensor:
    """Sum in place over ranks; collective."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def _gather(values: Float[Tensor, "M D"]) -> Float[Tensor, "_ D"]:
    """The rows of all ranks, in the order of ranks; collective."""
    if not dist.is_initialized():
        return values
    shares = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, values.contiguous())
    return torch.cat(shares)
