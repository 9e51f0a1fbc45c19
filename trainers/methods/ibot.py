"""iBOT: a teacher that follows its student, for whole views and for hidden patches.

Source: Zhou et al. 2022, "iBOT: Image BERT Pre-Training with Online Tokenizer", and its official
code; views, head, centre and momentum are DINO's (Caron et al. 2021).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.config.ibot import IBOTConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.data.colours import blur, gray, jitter, solarise
from mimray.trainers.data.views import Inputs, Masks, View, training_view
from mimray.trainers.methods.assignment import grouped, own_rows
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.collapse import CollapseWatch
from mimray.trainers.methods.draws import ibot_mask
from mimray.trainers.models import build_encoder
from mimray.trainers.models.averages import MovingAverages
from mimray.trainers.models.codebook import Fp32Buffers
from mimray.trainers.models.colours import enlarged, principal_colours
from mimray.trainers.models.full_precision import full_precision
from mimray.trainers.models.gram import gram_loss
from mimray.trainers.models.prototypes import Prototypes
from mimray.trainers.models.sinkhorn import sinkhorn
from mimray.trainers.pictures import hide_patches
from mimray.trainers.types import Features, MethodOutput, Panel

NUM_GLOBAL = 2


class Scores(NamedTuple):
    """Scores against the prototypes.

    Attributes:
        views: [R, K], of whole views.
        patches: [M, K], of patches.
    """

    views: Tensor
    patches: Tensor


class Targets(NamedTuple):
    """Assignments by the teacher, fp32; rows sum to one.

    Attributes:
        views: [B, 2, K], of the global views.
        patches: [M, K], of the hidden patches, row-major over pictures, views and places.
        tokens: [B x 2, N, D], the teacher's tokens, of which the assignments are made.
    """

    views: Tensor
    patches: Tensor
    tokens: Tensor


class Predictions(NamedTuple):
    """The student's scores over its temperature, as log-probabilities, fp32.

    Attributes:
        views: [B, 2 + L, K], of the global views, then of the small ones.
        patches: [M, K], of the hidden patches.
        tokens: [B x 2, N, D], the student's tokens of the masked global views.
    """

    views: Tensor
    patches: Tensor
    tokens: Tensor


class Head(nn.Module):
    """Three linear layers, and prototypes; whole views and patches share all but perhaps the last.

    Args:
        width: width of the encoder's tokens.
        config: the recipe's `method` section.
    """

    def __init__(self, width: int, config: IBOTConfig) -> None:
        super().__init__()
        hidden, bottleneck = config.head_width, config.bottleneck_width
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        prototypes = partial(
            Prototypes, bottleneck, config.num_prototypes, trains_gain=config.trains_gain
        )
        self.last = prototypes()
        self.patch_last = None if config.shared_head else prototypes()

    def forward(self, views: Float[Tensor, "R D"], patches: Float[Tensor, "M D"]) -> Scores:
        """Score vectors of whole views and of patches."""
        patch_last = self.last if self.patch_last is None else self.patch_last
        return Scores(self.last(self.mlp(views)), patch_last(self.mlp(patches)))


class Centre(Fp32Buffers):
    """A moving mean of the teacher's scores, moved once a step by those of all workers.

    Args:
        num_prototypes: number of prototypes K.

    Attributes:
        value: float [K], the mean.

    Source: Caron et al. 2021 (DINO), eq. 4.
    """

    value: Tensor
    sums: Tensor

    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(num_prototypes))
        self.register_buffer("sums", torch.zeros(num_prototypes + 1), persistent=False)

    @torch.no_grad()
    def add(self, scores: Float[Tensor, "*B K"]) -> None:
        """Add the scores of a micro batch of this rank."""
        self.sums[:-1] += scores.float().flatten(0, -2).sum(dim=0)
        self.sums[-1] += scores[..., 0].numel()

    @torch.no_grad()
    def settle(self, momentum: float) -> None:
        """Move the mean by the scores since the last call; collective."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        self.value.lerp_(self.sums[:-1] / self.sums[-1], 1 - momentum)
        self.sums.zero_()


class IBOT(Method):
    """Predicts what a moving average of itself says of other views, and of hidden patches.

    The student sees two global views, masked, and small ones; the teacher the global views as they
    are. Its assignments of a view are predicted from each of the student's other views, those of a
    hidden patch from the same place of the masked view.

    Attributes:
        config: the recipe's `method` section.
        mask_token: the token in the place of hidden patches.
        temperatures: the teacher's, of whole views and of patches, at the current step.
    """

    result: ClassVar[str] = "averages.encoder"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, IBOTConfig)
        self.config = config
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        # Begins at zero, as published.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.encoder.embed_width))
        self.head = Head(self.encoder.width, config)
        self.centre = Centre(config.num_prototypes)
        self.patch_centre = Centre(config.num_prototypes)
        self.watch = CollapseWatch(config, config.num_prototypes, self.encoder.width, _CURES)
        self.averages = MovingAverages(
            {"encoder": self.encoder, "head": self.head}, config.momentum
        )
        self.temperatures = config.temperature.start, config.patch_temperature.start

    @classmethod
    def views(cls, recipe: Recipe) -> Inputs:
        """Two masked global views, each with its colours, and small ones."""
        config = recipe.method
        assert isinstance(config, IBOTConfig)
        draw: Any = partial(cls.draw_mask, recipe)  # never None here
        first = training_view(recipe, masks=Masks(draw))
        second = training_view(recipe, "second_images", masks=Masks(draw, name="second_mask"))
        inputs = [
            _coloured(first, config, config.blur_share[0]),
            _coloured(second, config, config.blur_share[1], config.solarise_share),
        ]
        if config.num_local:
            local = replace(
                training_view(recipe, "local_images"),
                size=(config.local_px, config.local_px),
                count=config.num_local,
                crop_scale=config.local_scale,
            )
            inputs.append(_coloured(local, config, config.blur_share[2]))
        return inputs

    draw_mask = staticmethod(ibot_mask)

    def at_step(self, step: int, num_steps: int) -> None:
        """Set the teacher's temperatures."""
        config = self.config
        self.temperatures = (
            config.temperature.at(step, num_steps),
            config.patch_temperature.at(step, num_steps),
        )

    def after_step(self, step: int) -> dict[str, float]:
        """Move the centres; returns the temperatures, and the figures of collapse.

        Raises:
            CollapseError: the teacher has said the same of every picture for some time; raised on
                every rank.
        """
        if self.config.centring == "mean":
            self.centre.settle(self.config.centre_momentum)
            self.patch_centre.settle(self.config.centre_momentum)
        temperatures = dict(
            zip(("temperature", "patch_temperature"), self.temperatures, strict=True)
        )
        return {**temperatures, **self.watch.settle(step)}

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        second_images: Float[Tensor, "B C H W"] | None = None,
        second_mask: Bool[Tensor, "B N"] | None = None,
        local_images: Float[Tensor, "B *L C h w"] | None = None,
    ) -> MethodOutput:
        """The loss of whole views, and those of hidden patches and to the start by their weights.

        Args:
            images: first global views, normalised.
            mask: the mask of the first views, True = hidden; by default drawn from torch's
                generator.
            second_images: second global views; by default the first ones again.
            second_mask: the mask of the second views; by default drawn.
            local_images: small views; none by default.

        Returns:
            As prediction and target the tokens of the first views, the student's and the teacher's;
            the terms `view_loss` and `patch_loss`, and `gram_loss` where the start is held on to.
        """
        first, second = (self.draw_masks(images) if m is None else m for m in (mask, second_mask))
        pairs = torch.stack([images, images if second_images is None else second_images], dim=1)
        views, hidden = pairs.flatten(0, 1), torch.stack([first, second], dim=1).flatten(0, 1)
        targets = self.teach(views, hidden)
        predictions = self.predict(views, hidden, local_images)
        view_loss = loss_of_views(targets.views, predictions.views)
        patch_loss = loss_of_patches(targets.patches, predictions.patches, hidden)
        loss = view_loss + self.config.patch_weight * patch_loss
        terms = {"view_loss": view_loss, "patch_loss": patch_loss}
        if self.start is not None:
            terms["gram_loss"] = gram_loss(predictions.tokens, self.at_start(views).tokens)
            loss = loss + self.config.gram_weight * terms["gram_loss"]
        return MethodOutput(
            loss, predictions.tokens[::NUM_GLOBAL], targets.tokens[::NUM_GLOBAL], first, terms
        )

    @torch.no_grad()
    def teach(self, views: Float[Tensor, "R C H W"], hidden: Bool[Tensor, "R N"]) -> Targets:
        """The teacher's assignments of global views, and of the patches that are hidden.

        In training its scores count for the centres and for the watch over collapse.

        Args:
            views: two global views of each picture, one after the other, R = 2 B.
            hidden: their masks, which the teacher does not see.
        """
        assert self.averages is not None
        features: Features = self.averages("encoder", views)
        whole = self._whole(features)
        scores: Scores = self.averages("head", whole, features.tokens.flatten(0, 1))
        of_views = scores.views.float()  # R K
        of_patches = torch.unflatten(scores.patches, 0, hidden.shape)  # R N K
        temperature, patch_temperature = self.temperatures
        if self.config.centring == "sinkhorn":
            assigned = self._balanced(of_views, temperature)
            patches = self._balanced(of_patches, patch_temperature)[hidden]
        else:
            assigned = ((of_views - self.centre.value) / temperature).softmax(dim=-1)
            centred = of_patches[hidden].float() - self.patch_centre.value  # M K
            patches = (centred / patch_temperature).softmax(dim=-1)
        if self.training:
            self.centre.add(of_views)
            self.patch_centre.add(of_patches)
            self.watch.add(assigned, whole)
        return Targets(torch.unflatten(assigned, 0, (-1, NUM_GLOBAL)), patches, features.tokens)

    def predict(
        self,
        views: Float[Tensor, "R C H W"],
        hidden: Bool[Tensor, "R N"],
        local_images: Float[Tensor, "B *L C h w"] | None = None,
    ) -> Predictions:
        """The student's predictions from masked global views and from small ones.

        Args:
            views: two global views of each picture, one after the other, R = 2 B.
            hidden: their masks.
            local_images: small views; None for none.
        """
        num_pictures = len(views) // NUM_GLOBAL
        features: Features = self.encoder(views, hidden, self.mask_token)
        whole = [torch.unflatten(self._whole(features), 0, (num_pictures, NUM_GLOBAL))]
        if local_images is not None:
            local = self._whole(self.encoder(local_images.flatten(0, -4)))
            whole.append(torch.unflatten(local, 0, (num_pictures, -1)))
        seen = torch.cat(whole, dim=1)  # B 2+L D
        scores: Scores = self.head(seen.flatten(0, 1), features.tokens[hidden])
        of_views, of_patches = (
            F.log_softmax(s.float() / self.config.student_temperature, dim=-1) for s in scores
        )
        return Predictions(
            torch.unflatten(of_views, 0, seen.shape[:2]), of_patches, features.tokens
        )

    def _whole(self, features: Features) -> Float[Tensor, "R D"]:
        """The vector that stands for a whole view."""
        return features.prefix[:, 0] if self.config.pooling == "cls" else features.pooled

    def _balanced(self, scores: Float[Tensor, "R *N K"], temperature: float) -> Tensor:
        """Sinkhorn's assignments over the vectors of a group's pictures, of all workers."""
        num_pictures = len(scores) // NUM_GLOBAL
        by_picture = torch.unflatten(scores, 0, (num_pictures, NUM_GLOBAL)).flatten(1, -2)  # B V K
        groups = grouped(by_picture, self.config.assignment_pictures)  # G P V K
        assigned = sinkhorn(groups.flatten(1, 2), temperature, self.config.sinkhorn_rounds)
        own = own_rows(torch.unflatten(assigned, 1, groups.shape[1:3]), num_pictures)  # B V K
        return own.reshape(scores.shape)

    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> Float[Tensor, "B C H W"]:
        """Raise NotImplementedError: assignments give no pixels."""
        raise NotImplementedError("ibot predicts no pixels")

    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """Originals, what the student sees, and the teacher's and student's tokens in colours.

        Both are coloured by the same principal components, the teacher's.
        """
        original, stride = self.pixels(images), self.encoder.stride
        theirs, ours = (
            enlarged(tokens, self.recipe.grid, stride)
            for tokens in principal_colours(output.target, output.prediction)
        )
        return [
            Panel("original", original),
            Panel("masked", hide_patches(original, output.mask.cpu().numpy(), stride)),
            Panel("teacher's tokens", theirs),
            Panel("student's tokens", ours),
        ]


_CURES = (
    "a longer warm-up of method.temperature or a higher one where one prototype stands for most, a "
    "lower one where all outputs are alike; a method.momentum nearer to 1; a lower optim.base_lr; "
    "or method.centring=sinkhorn"
)


def loss_of_views(
    targets: Float[Tensor, "B G K"], predictions: Float[Tensor, "B V K"]
) -> Float[Tensor, ""]:
    """Cross-entropy of each global view's assignment against each other view, mean over pairs.

    Args:
        targets: the teacher's assignments of the global views.
        predictions: the student's log-probabilities, those of the global views first.

    Source: Caron et al. 2021 (DINO), eq. 3.
    """
    num_global, num_views = targets.shape[1], predictions.shape[1]
    with full_precision(targets):
        entropies = -targets @ predictions.transpose(1, 2)  # B G V
    other = ~torch.eye(num_global, num_views, dtype=torch.bool, device=targets.device)
    return (entropies * other).sum() / (len(targets) * num_global * (num_views - 1))


def loss_of_patches(
    targets: Float[Tensor, "M K"], predictions: Float[Tensor, "M K"], hidden: Bool[Tensor, "R N"]
) -> Float[Tensor, ""]:
    """Cross-entropy of hidden patches: mean over those of a view, then over all views.

    Views that hide nothing count as zero.

    Args:
        targets: the teacher's assignments of the hidden patches.
        predictions: the student's log-probabilities of the same.
        hidden: the masks of the views, True = hidden.

    Source: Zhou et al. 2022, eq. 2; the means are the official code's.
    """
    entropies = -(targets * predictions).sum(dim=-1)  # M
    share = hidden.float() / hidden.sum(dim=1, keepdim=True).clamp_min(1)  # R N
    return (entropies * share[hidden]).sum() / len(hidden)


def _coloured(
    view: View, config: IBOTConfig, blur_share: float, solarise_share: float = 0.0
) -> View:
    """The view with the method's changes of colour, before those of the recipe's data section."""
    changes = (
        partial(jitter, strengths=config.jitter, probability=config.jitter_share),
        partial(gray, probability=config.gray_share),
        partial(blur, probability=blur_share, radius_px=config.blur_px),
        partial(solarise, probability=solarise_share),
    )
    return replace(view, after=(*changes, *view.after))
