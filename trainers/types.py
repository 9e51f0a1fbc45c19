"""Values that pass between the rooms, and the axis legend used in all shape comments.

B batch, C channels, H/W pixels, N patches (row-major over the grid), D width, h/w grid.
`mask` is bool [B, N] everywhere and True means hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Record(NamedTuple):
    """One stored picture: its encoded bytes and, when the dataset is labelled, its label."""

    image: bytes
    label: int | None


@dataclass(frozen=True)
class Batch:
    """Samples as the loader hands them to the loop, on the host.

    Attributes:
        inputs: tensors by the names that the method's `views` declare: pictures uint8
            [B, C, H, W], masks bool [B, N] with True = hidden, labels int64 [B]; with an axis
            for views or masks where there are several.
        indices: int64 [B], sample indices in the dataset.
        epoch: epoch of every sample, int64 [B].
        problems: what was wrong with pictures that others stand in for.
    """

    inputs: dict[str, Tensor]
    indices: np.ndarray
    epoch: np.ndarray
    problems: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's loader asks for it by this name."""
        pinned = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return replace(self, inputs=pinned)


class Panel(NamedTuple):
    """One column of a sheet of pictures: a heading and uint8 [B, H, W, C]."""

    title: str
    pixels: np.ndarray


# Outputs of modules are named tuples: DeepSpeed's ZeRO-3 hooks look for tensors inside tuples
# and would not find those of a dataclass.
class MethodOutput(NamedTuple):
    """What a method computes from a batch.

    Attributes:
        loss: scalar.
        prediction: [B, N, P] for patch targets; for codes the logits [M, K] of the M hidden
            tokens, in row-major order; for classes the logits [B, K].
        target: what the prediction is held against: [B, N, P], int64 [M], or for classes
            probabilities [B, K].
        mask: bool [B, N], True = hidden (all True where the method hides nothing).
        terms: scalars worth a curve of their own beside the loss, by name.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    mask: Tensor
    terms: dict[str, Tensor] = {}


class Features(NamedTuple):
    """What an encoder says about a batch of pictures.

    Attributes:
        tokens: [B, N, D], patch tokens after the final norm, row-major over the grid; under a
            mask only the visible ones.
        prefix: [B, T, D], tokens that stand for no place, such as the class token.
        pooled: [B, D], mean of the patch tokens.
        grid: (h, w); h * w == N where nothing is hidden.
    """

    tokens: Tensor
    prefix: Tensor
    pooled: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class DatasetFacts:
    """What a dataset is, independent of where it lies.

    Attributes:
        uri: where it was read from.
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
