"""Features of a dataset, cut into parts: their description, and the making of one part.

A part is a Parquet file that says itself what it is of. Which pictures it holds follows from
its number, so parts can be made in any order, by any worker, and again after a kill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mimray.trainers.bundles import FrozenEncoder
from mimray.trainers.config.base import Config
from mimray.trainers.config.evaluation.extract import ExtractSpec
from mimray.trainers.data.decode import decode
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.data.selection import evenly_spread
from mimray.trainers.data.sources import Source
from mimray.trainers.data.transforms import (
    center_crop_view,
    inference_view,
    random_crop_box,
    to_array,
    view_of,
)
from mimray.trainers.errors import ConfigError, DataError, ImageError
from mimray.trainers.evaluation.features.encoders import EncoderRef, check_input
from mimray.trainers.models import build_encoder
from mimray.trainers.models.normalise import normalise

# In the schema metadata of every part.
EXTRACTION_KEY = b"mimray_extraction"
SKIPPED_KEY = b"mimray_skipped"

# Bounds what a worker and the driver hold of a part.
PART_BYTES = 32 << 20

CROP_RATIO = (3 / 4, 4 / 3)


class MapShape(Config):
    """The feature map of one layer: `width` channels over `grid`, `stride` pixels apart."""

    layer: int
    width: int
    stride: int
    grid: tuple[int, int]


class Extraction(Config):
    """All that determines the bytes of an extraction; where pictures and weights lie does not.

    Attributes:
        encoder: name of the encoder, for people.
        identity: digest of the encoder's weights and architecture.
        weights_sha256: digest of the file of weights; empty for an untrained encoder.
        data_fingerprint: fingerprint of the dataset.
        num_samples: pictures of the dataset.
        image_size: (height, width) that pictures are resized to, pixels.
        mean: mean of each channel, of pixels in [0, 1].
        std: standard deviation of each channel, likewise.
        interpolation: filter of the resize.
        channels: channels of the input.
        grid: (h, w) of the patch tokens.
        stride: pixels between neighbouring tokens.
        width: D of the tokens and of what is pooled from them.
        maps: shapes of the feature maps, in the order asked for.
    """

    encoder: str
    identity: str
    weights_sha256: str
    data_fingerprint: str
    num_samples: int
    spec: ExtractSpec
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    channels: int
    grid: tuple[int, int]
    stride: int
    width: int
    maps: tuple[MapShape, ...]

    @property
    def key(self) -> str:
        """Hex digest that two extractions share only where their features are equal."""
        text = json.dumps(self.model_dump(mode="json", exclude={"encoder"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the feature columns, by name."""
        height, width = self.grid
        tokens = {"tokens": (height * width, self.width)} if self.spec.tokens else {}
        return (
            dict.fromkeys(self.spec.pooled, (self.width,))
            | tokens
            | {f"layer_{m.layer}": (m.width, *m.grid) for m in self.maps}
        )

    @property
    def schema(self) -> pa.Schema:
        """Columns of a part."""
        kind = pa.from_numpy_dtype(np.dtype(self.spec.dtype))
        view = [("view", pa.int32())] if self.spec.num_views else []
        features = [(n, pa.fixed_shape_tensor(kind, s)) for n, s in self.tensors.items()]
        return pa.schema(
            [("id", pa.string()), ("index", pa.int64()), ("label", pa.int64()), *view, *features],
            metadata={EXTRACTION_KEY: self.model_dump_json()},
        )

    @property
    def indices(self) -> np.ndarray:
        """Indices of the pictures, int64, ascending."""
        return evenly_spread(self.num_samples, self.spec.limit)

    @property
    def pictures_per_part(self) -> int:
        """Number of pictures of each part but the last."""
        values = sum(int(np.prod(shape)) for shape in self.tensors.values())
        row_bytes = values * np.dtype(self.spec.dtype).itemsize * max(1, self.spec.num_views)
        return max(1, min(self.spec.part_pictures, PART_BYTES // row_bytes))

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return -(-len(self.indices) // self.pictures_per_part)

    def indices_of(self, part: int) -> np.ndarray:
        """Indices of the pictures of one part."""
        size = self.pictures_per_part
        return self.indices[part * size : (part + 1) * size]

    def file_of(self, part: int) -> str:
        """Name of a part's file."""
        return f"part-{part:05d}-of-{self.num_parts:05d}.parquet"


def describe(ref: EncoderRef, source: Source, spec: ExtractSpec) -> Extraction:
    """Describe the extraction of pictures by an encoder; loads no weights.

    Raises:
        ConfigError: a layer that does not exist, a class token where there is none, or an input
            size that the stride does not divide.
    """
    card = ref.card()
    with torch.device("meta"):  # its shape, without its weights
        encoder = FrozenEncoder(build_encoder(card.encoder, card.image_size, card.channels), card)
    height, width = spec.image_size or card.image_size
    check_input(encoder, (height, width), "image_size")
    if "cls" in spec.pooled and not card.has_class_token:
        raise ConfigError(f"{ref.text} has no class token", hint="pool by mean")
    depth = encoder.depth
    wrong = [layer for layer in spec.layers if not -depth <= layer < depth]
    if wrong:
        raise ConfigError(
            f"{ref.text} has no layer {wrong[0]}", hint=f"its layers are 0 to {depth - 1}"
        )
    layers = [layer % depth for layer in spec.layers]
    return Extraction(
        encoder=card.name,
        identity=ref.identity,
        weights_sha256="" if ref.untrained else card.weights_sha256,
        data_fingerprint=source.facts.fingerprint,
        num_samples=len(source),
        # As resolved, so that two ways of asking for the same are the same.
        spec=spec.model_copy(update={"image_size": (height, width), "layers": tuple(layers)}),
        image_size=(height, width),
        mean=card.mean,
        std=card.std,
        interpolation=card.interpolation,
        channels=card.channels,
        grid=(height // encoder.stride, width // encoder.stride),
        stride=encoder.stride,
        width=card.encoder.out_width,
        maps=tuple(
            MapShape(
                layer=layer,
                width=encoder.widths[layer],
                stride=encoder.strides[layer],
                grid=(height // encoder.strides[layer], width // encoder.strides[layer]),
            )
            for layer in layers
        ),
    )


class Skipped(Config):
    """A picture that was left out: its place, and the reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class _PreparedPicture:
    """One picture as the encoder sees it."""

    id: str
    index: int
    label: int | None
    pixels: np.ndarray  # V C H W


class PartEncoder:
    """Makes the parts of an extraction, one at a time; lives where the device is.

    Reading and decoding go on in threads while the batch before is encoded: Pillow gives the
    interpreter's lock back while it decodes and resizes.

    Args:
        ref: the encoder, which is loaded here.
        source: the pictures.
        extraction: the features to make of them.
        device: device of the encoder, as torch names it.
        batch_size: number of views encoded at once.
        num_threads: number of decoding threads.
    """

    def __init__(
        self,
        ref: EncoderRef,
        source: Source,
        extraction: Extraction,
        *,
        device: str,
        batch_size: int,
        num_threads: int,
    ) -> None:
        self._encoder = ref.load().to(device)
        self._source = source
        self._extraction = extraction
        self._device = device
        self._batch_pictures = max(1, batch_size // max(1, extraction.spec.num_views))
        # A source keeps what it has read without a lock, so one thread reads.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def __call__(self, part: int) -> bytes:
        """One part as a Parquet file.

        Raises:
            DataError: a picture cannot be decoded, or a feature does not fit the type.
        """
        extraction = self._extraction
        skipped: list[Skipped] = []
        rows: dict[str, list[object]] = {"id": [], "index": [], "label": [], "view": []}
        features: dict[str, list[np.ndarray]] = {name: [] for name in extraction.tensors}
        for prepared in self._prepared(extraction.indices_of(part)):
            skipped += [item for item in prepared if isinstance(item, Skipped)]
            views = [item for item in prepared if isinstance(item, _PreparedPicture)]
            if not views:
                continue
            for item in views:
                count = len(item.pixels)
                rows["id"] += [item.id] * count
                rows["index"] += [item.index] * count
                rows["label"] += [item.label] * count
                rows["view"] += range(count)
            pixels = torch.from_numpy(np.concatenate([item.pixels for item in views]))
            for name, values in self._encode(pixels).items():
                features[name].append(values)
        schema = extraction.schema
        columns = [
            _tensors(schema.field(name).type, features[name])
            if name in features
            else pa.array(rows[name], schema.field(name).type)
            for name in schema.names
        ]
        metadata = {**schema.metadata, SKIPPED_KEY: json.dumps([s.model_dump() for s in skipped])}
        sink = pa.BufferOutputStream()
        table = pa.table(columns, schema=schema.with_metadata(metadata))
        # Neither dictionaries nor compression gain anything on floats.
        pq.write_table(table, sink, use_dictionary=False, compression="none")
        return bytes(sink.getvalue())

    def _prepared(self, indices: np.ndarray) -> Iterator[list[_PreparedPicture | Skipped]]:
        """Batches of decoded pictures, one made ahead."""
        starts = range(0, len(indices), self._batch_pictures)
        batches = [indices[start : start + self._batch_pictures] for start in starts]
        ahead = self._reader.submit(self._prepare, batches[0])
        for following in batches[1:]:
            prepared, ahead = ahead.result(), self._reader.submit(self._prepare, following)
            yield prepared
        yield ahead.result()

    def _prepare(self, indices: np.ndarray) -> list[_PreparedPicture | Skipped]:
        futures = []
        for index in map(int, indices):
            record = self._source[index]
            label = None if record.label is None or record.label < 0 else record.label
            name = self._source.name(index)
            futures.append(self._decoders.submit(self._views, record.image, name, index, label))
        return [future.result() for future in futures]

    def _views(
        self, image: bytes, name: str, index: int, label: int | None
    ) -> _PreparedPicture | Skipped:
        spec, size = self._extraction.spec, self._extraction.image_size
        interpolation = self._extraction.interpolation
        try:
            # Decoded in full, without a draft: these are the features that are served.
            picture = decode(image).image
        except ImageError as error:
            if spec.skip_invalid:
                return Skipped(id=name, reason=str(error))
            raise DataError(
                f"{name}: {error}",
                hint="--skip-invalid leaves such pictures out, `mimray data ingest` sorts them out",
            ) from error
        if self._extraction.channels == 1:
            picture = picture.convert("L")
        if not spec.num_views:
            shown = center_crop_view if spec.view == "center_crop" else inference_view
            pixels = shown(picture, size, interpolation)
            return _PreparedPicture(name, index, label, pixels[None])
        views = []
        for view in range(spec.num_views):
            rng = generator(spec.seed, Stream.VIEW, view, index)
            box = random_crop_box(rng, picture.size, spec.crop_scale, CROP_RATIO)
            flip = bool(rng.random() < 0.5)
            views.append(to_array(view_of(picture, size, interpolation, box, flip)))
        return _PreparedPicture(name, index, label, np.stack(views))

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> dict[str, np.ndarray]:
        """Feature columns of views, uint8 [B, C, H, W]."""
        extraction = self._extraction
        images = normalise(pixels.to(self._device), extraction.mean, extraction.std)
        found: dict[str, torch.Tensor] = {}
        if extraction.spec.pooled or extraction.spec.tokens:
            features = self._encoder(images)
            found["mean"] = features.tokens.mean(dim=1)  # B D
            found["tokens"] = features.tokens  # B N D
            if "cls" in extraction.spec.pooled:
                found["cls"] = features.prefix[:, 0]  # B D
        if extraction.maps:
            layers = [m.layer for m in extraction.maps]
            maps = self._encoder.features(images, layers, extraction.spec.norm)
            found |= {f"layer_{i}": m for i, m in zip(layers, maps, strict=True)}  # B D h w
        return {name: self._stored(found[name]) for name in extraction.tensors}

    def _stored(self, values: torch.Tensor) -> np.ndarray:
        stored: np.ndarray = values.float().cpu().numpy().astype(self._extraction.spec.dtype)
        if not np.isfinite(stored).all():
            raise DataError(
                f"a feature of {self._extraction.encoder} is not finite as "
                f"{self._extraction.spec.dtype}",
                hint="--dtype float32" if stored.dtype == np.float16 else "",
            )
        return stored


def _tensors(kind: pa.FixedShapeTensorType, batches: list[np.ndarray]) -> pa.ExtensionArray:
    dtype = kind.value_type.to_pandas_dtype()
    flat = np.concatenate([batch.reshape(-1) for batch in batches] or [np.zeros(0, dtype)])
    size = int(np.prod(kind.shape))
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat), size)
    return pa.ExtensionArray.from_storage(kind, storage)
