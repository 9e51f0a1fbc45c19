"""The nearest-neighbour probe of patches: pictures labelled by the most similar labelled patches.

Source: the evaluation of Balažević et al. 2023, "Towards In-Context Scene Understanding"
    (Hummingbird), and its open form, github.com/vpariza/open-hummingbird-eval: soft shares of a
    patch's pixels, 30 neighbours of temperature 0.02, posteriors enlarged bilinearly, as many
    patches of each picture. All patches of a bank are compared here, none by an approximate index;
    patches are drawn evenly, and void is left out. CAPI (Darcet et al. 2025,
    `eval_segmentation.py`) differs: features standardised, k of 1 to 30 chosen on a tenth of the
    pictures, a vote without weights for each pixel of a patch, scored at 224 x 224 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.config.evaluation.dense_knn import DenseKnnConfig
from mimray.trainers.data.geometry import Size
from mimray.trainers.data.rng import Stream, generator, permutation
from mimray.trainers.errors import BundleError, DataError
from mimray.trainers.evaluation.annotations.base import InvalidLabels, SegmentationSet
from mimray.trainers.evaluation.annotations.segmentation import open_segmentation_splits
from mimray.trainers.evaluation.features.encoders import (
    FeatureEncoder,
    MakeEncoder,
    check_input,
    chosen_layers,
)
from mimray.trainers.evaluation.score import Progress, Score, Setting
from mimray.trainers.evaluation.segmentation.heads import side_by_side
from mimray.trainers.evaluation.segmentation.inference import default_size, predict, window_views
from mimray.trainers.evaluation.segmentation.metrics import PixelCounts, scores
from mimray.trainers.evaluation.segmentation.patch_bank import PatchBank, patch_shares
from mimray.trainers.evaluation.segmentation.pictures import Shown, class_chart, sheet
from mimray.trainers.evaluation.segmentation.scoring import missing_classes, score_pictures
from mimray.trainers.evaluation.uncertainty import by_bootstrap
from mimray.trainers.models.normalise import normalise


@dataclass(frozen=True)
class DenseKnn:
    """The outcome of the probe.

    Attributes:
        by_picture: pixels counted by picture, from which `scores` makes every figure.
        shown: a few pictures with labels and prediction.
        num_patches: patches that were retrieved from.
        input_size: (height, width) of the encoder's input, pixels.
        layers: layers whose maps describe a patch.
    """

    by_picture: PixelCounts
    shown: list[Shown]
    num_patches: int
    input_size: Size
    layers: tuple[int, ...]

    def figures(self, class_names: Sequence[str]) -> dict[str, Any]:
        """`mIoU` and the other figures of `metrics.scores`, ready for JSON."""
        return scores(self.by_picture.confusion, class_names)


def evaluate(make_encoder: MakeEncoder, setting: Setting, config: DenseKnnConfig) -> Score:
    """Label the patches of the validation pictures by those of the training pictures.

    Args:
        make_encoder: function that makes the encoder.
        setting: data, device, seed.
        config: neighbours, layers, size of the input and of the bank.

    Returns:
        The mean IoU and what goes with it, and pictures.

    Raises:
        DataError: labels that are wrong or missing.
        ConfigError: an input size that the encoder's stride does not divide, or a layer it lacks.
        BundleError: the encoder gives features that are not finite.
    """
    invalid_labels = InvalidLabels(setting.skip_invalid)
    train, val, hold_out, notes = open_segmentation_splits(setting, config, invalid_labels)
    found = dense_knn(
        make_encoder(),
        train,
        val,
        config,
        seed=setting.seed,
        device=setting.device,
        progress=setting.progress,
    )
    metrics = found.figures(train.class_names)
    confusion = found.by_picture.confusion
    return Score(
        metric="mIoU",
        headline=metrics["mIoU"],
        metrics={
            **metrics,
            "k": min(config.k, found.num_patches),
            "bank_patches": found.num_patches,
            "confusion": confusion.tolist(),
            "class_names": list(train.class_names),
            "image_size": list(found.input_size),
            "layers": list(found.layers),
            "labels": invalid_labels.as_json(),
        },
        data_fingerprint=train.fingerprint,
        val_fingerprint=val.fingerprint,
        num_train=len(train),
        num_val=len(val),
        evidence=by_bootstrap(found.by_picture.miou, val.fingerprint, len(val)),
        notes=(*missing_classes(confusion, train, val), *notes, *invalid_labels.notes()),
        pictures={
            "dense-knn.png": sheet(found.shown, train.class_names),
            "dense-knn_classes.png": class_chart(metrics["IoU"]),
        },
        hold_out=hold_out,
    )


def dense_knn(
    encoder: FeatureEncoder,
    train: SegmentationSet,
    val: SegmentationSet,
    config: DenseKnnConfig,
    *,
    seed: int,
    device: str,
    progress: Progress,
) -> DenseKnn:
    """Score an encoder at hand on labelled pictures, in this process and without Ray.

    Args:
        encoder: source of the maps, in evaluation mode and on the device.
        train: pictures whose patches are retrieved.
        val: pictures to label; their classes are those of `train`.
        config: neighbours, layers, size of the input and of the bank.
        seed: seed of the draw of patches.
        device: the encoder's and the bank's device, as torch names it.
        progress: called with the number of pictures done.

    Raises:
        DataError: no patch has labels enough.
        ConfigError: an input size that the encoder's stride does not divide, or a layer it lacks.
        BundleError: the encoder gives features that are not finite.
    """
    input_size = config.image_size or default_size(train, encoder.stride)
    check_input(encoder, input_size, "image_size")
    layers = sorted(chosen_layers(encoder, config.layers), key=lambda n: encoder.strides[n])
    view = _PatchView(encoder, tuple(layers), input_size, config, device)
    bank = _bank(view, train, seed, progress)

    def posteriors(inputs: Tensor) -> Tensor:
        maps = view.maps(inputs)  # B D h w
        queries = maps.flatten(2).transpose(1, 2).flatten(0, 1)  # B h w, D
        found = bank.posteriors(queries, k=config.k, temperature=config.temperature)
        batch, _, rows, columns = maps.shape
        return found.view(batch, rows, columns, -1).permute(0, 3, 1, 2)

    def segment(pictures: Sequence[Image.Image], batch_size: int) -> list[np.ndarray]:
        return list(
            predict(
                [view.prepared(picture) for picture in pictures],
                posteriors,
                input_size=input_size,
                scale=config.scale,
                overlap=config.window_overlap,
                batch_size=batch_size,
                interpolation=encoder.card.interpolation,
                fill=encoder.card.mean,
            )
        )

    by_picture, shown = score_pictures(segment, val, config.batch_size, progress)
    return DenseKnn(by_picture, shown, len(bank), input_size, view.layers)


@dataclass(frozen=True)
class _PatchView:
    """The way from pictures to patches.

    Attributes:
        encoder: source of the maps.
        layers: layers whose maps describe a patch, the finest map first.
        input_size: (height, width) of a window, pixels.
        config: the task's options.
        device: device of the encoder.
    """

    encoder: FeatureEncoder
    layers: tuple[int, ...]
    input_size: Size
    config: DenseKnnConfig
    device: str

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches in a window: those of the finest map."""
        stride = self.encoder.strides[self.layers[0]]
        return self.input_size[0] // stride, self.input_size[1] // stride

    def prepared(self, picture: Image.Image) -> Image.Image:
        """A picture with as many channels as the encoder takes."""
        return picture.convert("L") if self.encoder.card.channels == 1 else picture

    @torch.no_grad()
    def maps(self, inputs: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Features of unit length of each patch; layers side by side, each of equal weight.

        Raises:
            BundleError: one is not finite.
        """
        card = self.encoder.card
        images = normalise(inputs.to(self.device), card.mean, card.std)
        maps = self.encoder.features(images, self.layers, norm=True)
        joined = side_by_side([F.normalize(level.float(), dim=1) for level in maps])
        if not joined.isfinite().all():
            raise BundleError(
                f"{card.name} gives features that are not finite in layers {list(self.layers)}",
                hint="its weights are damaged, or its features larger than float16 holds",
            )
        return F.normalize(joined, dim=1)

    def labelled(
        self, picture: Image.Image, mask: np.ndarray, num_classes: int, ignore_index: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A picture's windows, uint8 [W, C, H, W], and its labelled patches as of `patch_shares`.

        Places of patches are counted on from window to window.
        """
        card, config = self.encoder.card, self.config
        picture = self.prepared(picture)
        inputs, places, shares = [], [], []
        laid = window_views(mask.shape, self.input_size, config.scale, config.window_overlap)
        for number, (view, _) in enumerate(laid):
            inputs.append(view.image(picture, card.interpolation, card.mean))
            kept, found = patch_shares(
                view.mask(mask, ignore_index),
                self.grid,
                num_classes,
                ignore_index,
                config.min_labelled,
            )
            places.append(kept + number * self.grid[0] * self.grid[1])
            shares.append(found)
        return np.stack(inputs), np.concatenate(places), np.concatenate(shares)


def _bank(view: _PatchView, train: SegmentationSet, seed: int, progress: Progress) -> PatchBank:
    """The labelled patches, as many of each picture as the bank's size leaves it.

    Raises:
        DataError: no patch has labels enough.
    """
    config, num_classes = view.config, len(train.class_names)
    room = np.diff(np.arange(len(train) + 1) * config.bank_size // len(train))  # of each picture
    features, labels = [], []
    for start in range(0, len(train), config.batch_size):
        stop = min(start + config.batch_size, len(train))
        windows, rows, before = [], [], 0
        for index in [index for index in range(start, stop) if room[index]]:
            picture, mask = train[index]
            inputs, places, shares = view.labelled(picture, mask, num_classes, train.ignore_index)
            drawn = _drawn(len(places), int(room[index]), seed, index)
            windows.append(inputs)
            rows.append(before + places[drawn])
            labels.append(torch.from_numpy(shares[drawn]))
            before += len(inputs) * view.grid[0] * view.grid[1]
        if windows:
            encoded = [
                view.maps(part).permute(0, 2, 3, 1).flatten(0, 2)  # B h w, D
                for part in torch.split(
                    torch.from_numpy(np.concatenate(windows)), config.batch_size
                )
            ]
            chosen = torch.from_numpy(np.concatenate(rows)).to(encoded[0].device)
            features.append(torch.cat(encoded)[chosen].cpu())
        progress("patches to retrieve from", stop, len(train))
    if not sum(map(len, labels)):
        raise DataError(
            f"no patch of {train.uri} has labels on {config.min_labelled:.0%} of its pixels",
            hint="ask for less of each patch with --set min_labelled=0",
        )
    bank = torch.cat(labels)
    if config.patch_labels == "majority":
        bank = F.one_hot(bank.argmax(dim=1), num_classes).float()
    return PatchBank(torch.cat(features).to(view.device), bank.to(view.device))


def _drawn(count: int, most: int, seed: int, index: int) -> np.ndarray:
    """Places of `most` of `count` patches of a picture, or of all, int64, ascending."""
    order = permutation(generator(seed, Stream.PATCHES, index), count)
    return np.sort(order[:most])
