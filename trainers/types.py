"""Values that pass between packages, and the axis legend of all shape comments.

B batch, C channels, H/W pixels, N patches (row-major over the grid), D width, h/w grid.
`mask` is bool [B, N] everywhere and True means hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Record(NamedTuple):
    """One stored picture: its encoded bytes, and its label if the dataset is labelled."""

    image: bytes
    label: int | None


class Notice(IntEnum):
    """A request from outside to a training at work; of several the largest counts.

    Attributes:
        NONE: go on.
        SAVE: write a checkpoint now and go on, as this node is about to be taken away.
        STOP: write a checkpoint now and end.
    """

    NONE = 0
    SAVE = 1
    STOP = 2


PARTNERS = "partners"
"""The input that holds, where pictures are combined in pairs, the row of each one's partner."""


@dataclass(frozen=True)
class Batch:
    """A micro batch of the loader, on the host.

    Attributes:
        inputs: tensors by the names that the method's `views` declare: pictures uint8
            [B, C, H, W], masks bool [B, N] with True = hidden, labels int64 [B]; with an axis
            for views or masks if there are several. Where pictures are combined in pairs,
            `partners`, int64 [B], is the row of each one's partner, and rows after the first B
            are there as partners alone.
        indices: int64 [B], sample indices in the dataset.
        epoch: int64 [B], the epoch of each sample.
        problems: reasons why pictures could not be used and were substituted.
        hidden: hidden patches of the worker's whole share of the global batch, by the name of their
            mean (`views.Masks`); with the first micro batch of a step, else empty.
    """

    inputs: dict[str, Tensor]
    indices: np.ndarray
    epoch: np.ndarray
    problems: tuple[str, ...] = ()
    hidden: dict[str, int] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Number of samples B, without those that are there as partners alone."""
        partners = self.inputs.get(PARTNERS)
        return len(self.indices) if partners is None else len(partners)

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory; torch's loader calls it by this name."""
        import torch

        pinned = {name: torch.as_tensor(value).pin_memory() for name, value in self.inputs.items()}
        return replace(self, inputs=pinned)


class Panel(NamedTuple):
    """One column of a sheet of pictures: a heading, and pictures uint8 [B, H, W, C]."""

    title: str
    pixels: np.ndarray


# Outputs of modules are named tuples: DeepSpeed's ZeRO-3 hooks look for tensors inside tuples
# and would not find those of a dataclass.
class MethodOutput(NamedTuple):
    """Loss, predictions and targets of a method for a batch.

    Attributes:
        loss: the loss, a scalar.
        prediction: [B, N, P] for patch targets; for codes the logits [M, K] of the M hidden
            tokens, in row-major order; for clusters the logits [B, M, K] of M predicted tokens of
            each picture; for classes the logits [B, K].
        target: targets of the prediction: [B, N, P], int64 [M], or probabilities, for clusters
            [B, M, K] and for classes [B, K].
        mask: bool [B, N], True = hidden (all True if the method hides nothing).
        terms: scalars to log beside the loss, by name.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    mask: Tensor
    terms: dict[str, Tensor] = {}


class Features(NamedTuple):
    """Features of a batch of pictures.

    Attributes:
        tokens: float [B, N, D], patch tokens after the final norm, row-major over the grid; under a
            mask only the visible ones.
        prefix: float [B, T, D], tokens without a place in the grid, such as the class token.
        pooled: float [B, D], mean of the patch tokens.
        grid: (rows, columns) of patches, (h, w); h * w == N if nothing is hidden.
        layers: float [B, T + N, D] each, all tokens after the layers that were asked for, the
            prefix first.
    """

    tokens: Tensor
    prefix: Tensor
    pooled: Tensor
    grid: tuple[int, int]
    layers: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset's description: place, size, fingerprint and classes.

    Attributes:
        uri: path or URI that the dataset was read from.
        num_samples: number of pictures.
        fingerprint: hex digest that changes when any picture, label or their order changes.
        class_names: names by label; empty when unlabelled.
        kind: `parquet` or `folder`.
    """

    uri: str
    num_samples: int
    fingerprint: str
    class_names: tuple[str, ...] = ()
    kind: str = "parquet"
