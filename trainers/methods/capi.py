"""CAPI: clusters of a moving-average teacher's patches, predicted at hidden places.

Source: Darcet et al. 2025, "Cluster and Predict Latent Patches for Improved Masked Image Modeling".
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.config.capi import CAPIConfig
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.data.views import Inputs, Masks, Numbers, training_view
from mimray.trainers.methods.assignment import SharedPlaces
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.collapse import CollapseWatch
from mimray.trainers.methods.draws import capi_mask, draw_priority
from mimray.trainers.models import build_encoder
from mimray.trainers.models.averages import MovingAverages
from mimray.trainers.models.colours import enlarged, principal_colours
from mimray.trainers.models.predictor import PlacePredictor
from mimray.trainers.models.prototypes import Prototypes
from mimray.trainers.models.sinkhorn import sinkhorn
from mimray.trainers.pictures import hide_patches
from mimray.trainers.types import MethodOutput, Panel


class Clustered(NamedTuple):
    """Teacher's tokens sorted into clusters, by group and place.

    Attributes:
        assigned: balanced shares of the clusters, float [G, n, P, K], without gradients.
        error: cross-entropy of the clusters' own scores, float [G, n, P].
        entropy: entropy of the shares, nats, float [G, n, P].
    """

    assigned: Tensor
    error: Tensor
    entropy: Tensor


class Clusters(nn.Module):
    """Scores of directions against K clusters.

    Args:
        width: width of the vectors D.
        num_clusters: number of clusters K.
    """

    def __init__(self, width: int, num_clusters: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_clusters)
        nn.init.normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vectors: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """Score vectors of any length."""
        directions = F.normalize(vectors.float(), dim=-1)
        scores: Tensor = self.linear(directions.to(self.linear.weight.dtype))
        return scores


class CAPI(Method):
    """Predicts clusters of hidden patches, which are learnt at the same time.

    The student sees the visible patches; a predictor asks its tokens, place by place, for the
    clusters of some hidden ones. The teacher, its moving average, sees the whole picture. A linear
    layer sorts the teacher's tokens into clusters and learns from its own assignments, balanced at
    each place over a group of pictures, so that no cluster can stand for a place. Neither loss has
    gradients in common with the other.

    Attributes:
        config: the recipe's `method` section.
        decoder: the predictor.
        head: scores of what is predicted.
        clusters: scores of the teacher's tokens.
    """

    result: ClassVar[str] = "averages.encoder"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, CAPIConfig)
        assert isinstance(recipe.encoder, ViTConfig)
        self.config = config
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.decoder = PlacePredictor(
            encoder_width=self.encoder.width,
            width=config.decoder_width,
            depth=config.decoder_depth,
            num_heads=config.decoder_num_heads,
            grid=recipe.grid,
            norm_eps=recipe.encoder.norm_eps,
        )
        self.head = Prototypes(config.decoder_width, config.num_clusters, trains_gain=True)
        self.clusters = Clusters(self.encoder.width, config.num_clusters)
        self.averages = MovingAverages({"encoder": self.encoder}, config.momentum)
        self.watch = CollapseWatch(
            config,
            config.num_clusters,
            self.encoder.width,
            "a lower optim.base_lr, a longer warm-up, a larger method.assignment_group or fewer "
            "method.num_clusters",
        )

    @classmethod
    def views(cls, recipe: Recipe) -> Inputs:
        """A masked view, and a number for each place; those of the largest are predicted."""
        masks = Masks(partial(cls.draw_mask, recipe))
        draw = partial(draw_priority, num_places=recipe.grid[0] * recipe.grid[1])
        return training_view(recipe, masks=masks), Numbers(draw, "priority")

    def parts(self) -> dict[str, list[nn.Module]]:
        """The parts of the base class, and the clusters."""
        return {**super().parts(), "clusters": [self.clusters]}

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        priority: Float[Tensor, "B N"] | None = None,
    ) -> MethodOutput:
        """Cross-entropy of the predictions plus that of the clustering.

        Args:
            images: normalised pictures.
            mask: True = hidden, as many in each picture; drawn from torch's generator by default.
            priority: the hidden places with the largest numbers are predicted; drawn from torch's
                generator by default. Without effect in evaluation mode, where all hidden places
                are.

        Returns:
            Logits and assignments of the predicted places, [B, M, K], in ascending order in
            evaluation mode; the terms `prediction_loss`, `clustering_loss` and `target_entropy`,
            that of an assignment over log K: 1 if the teacher tells no patches apart.

        Source: Darcet et al. 2025, sec. 3.1 and 3.2.
        """
        if mask is None:
            mask = self.draw_masks(images)
        assert self.averages is not None
        places = self.places(mask, priority)
        teacher = self.averages("encoder", images)
        shared = SharedPlaces(mask.shape[1], self.config.assignment_group)
        clustered = self.cluster(shared.own(teacher.tokens))
        target = shared.at(clustered.assigned, places)  # B M K
        visible = self.encoder(images, mask)
        logits = self.head(self.decoder(visible.tokens, visible.prefix, mask, places))  # B M K
        if self.training:
            self.watch.add(clustered.assigned, teacher.pooled)
        prediction = _cross_entropy(logits, target, self.config.prediction_temperature).mean()
        clustering = shared.mean(clustered.error)
        terms = {
            "prediction_loss": prediction,
            "clustering_loss": clustering,
            "target_entropy": shared.mean(clustered.entropy) / math.log(self.config.num_clusters),
        }
        return MethodOutput(prediction + clustering, logits, target, mask, terms)

    def cluster(self, tokens: Float[Tensor, "G n P D"]) -> Clustered:
        """Sort the teacher's tokens of groups of pictures into clusters, each place by itself."""
        scores = self.clusters(tokens)  # G n P K
        assigned = sinkhorn(
            scores.detach(), self.config.assignment_temperature, self.config.sinkhorn_rounds
        )
        error = _cross_entropy(scores, assigned, self.config.prediction_temperature)
        return Clustered(assigned, error, torch.special.entr(assigned).sum(dim=-1))

    def places(
        self, mask: Bool[Tensor, "B N"], priority: Float[Tensor, "B N"] | None
    ) -> Int[Tensor, "B M"]:
        """The hidden places that are predicted; all of them in evaluation mode."""
        num_hidden = int(mask[0].sum())
        if not self.training:
            order, count = mask.to(torch.float32), num_hidden
        else:
            drawn = torch.rand(mask.shape, device=mask.device) if priority is None else priority
            order, count = drawn.masked_fill(~mask, -1.0), self.config.num_predicted(num_hidden)
        return order.argsort(dim=1, descending=True, stable=True)[:, :count]

    def after_step(self, step: int) -> dict[str, float]:
        """Figures of collapse over all workers.

        Raises:
            CollapseError: the teacher says the same of every picture.
        """
        return self.watch.settle(step)

    draw_mask = staticmethod(capi_mask)

    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> Float[Tensor, "B C H W"]:
        """Raise NotImplementedError: clusters give no pixels."""
        raise NotImplementedError("capi predicts no pixels")

    @torch.no_grad()
    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """Originals, visible patches, the teacher's tokens and clusters, predicted clusters.

        Tokens are coloured by their first principal components, a cluster as its tokens in these
        pictures on average. Predicted is the likeliest of the clusters that occur in them; visible
        patches show the teacher's.
        """
        assert self.averages is not None
        original, stride = self.pixels(images), self.encoder.stride
        tokens = self.averages("encoder", images).tokens  # B N D
        clusters = self.clusters(tokens).argmax(dim=-1)  # B N
        occurring, index = clusters.unique(return_inverse=True)  # U, B N
        shades = torch.from_numpy(principal_colours(F.normalize(tokens.float(), dim=-1))[0])
        palette = _means(shades.double(), index.cpu(), len(occurring))  # U 3
        predicted = index.clone()
        predicted[output.mask] = output.prediction[..., occurring].argmax(dim=-1).flatten()
        colours = (shades, *(palette[at.cpu()].byte() for at in (index, predicted)))
        drawn = [enlarged(colour.numpy(), self.recipe.grid, stride) for colour in colours]
        return [
            Panel("original", original),
            Panel("masked", hide_patches(original, output.mask.cpu().numpy(), stride)),
            Panel("teacher's tokens", drawn[0]),
            Panel("teacher's clusters", drawn[1]),
            Panel("predicted clusters", drawn[2]),
        ]


def _cross_entropy(
    scores: Float[Tensor, "*B K"], target: Float[Tensor, "*B K"], temperature: float
) -> Float[Tensor, "*B"]:
    """Cross-entropy with soft targets, in fp32, nats."""
    return -(target * F.log_softmax(scores.float() / temperature, dim=-1)).sum(dim=-1)


def _means(
    values: Float[Tensor, "B N D"], index: Int[Tensor, "B N"], count: int
) -> Float[Tensor, "U D"]:
    """Means of the values of each index, 0 to count - 1; each occurs."""
    flat, index = values.flatten(0, 1), index.flatten()
    sums = flat.new_zeros(count, flat.shape[1]).index_add_(0, index, flat)
    return sums / index.bincount(minlength=count).unsqueeze(1)
