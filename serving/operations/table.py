"""The table of all operations: routes, dispatch, metrics and the OpenAPI document follow it."""

from __future__ import annotations

from mimray.serving.operations.embeddings import EMBEDDINGS
from mimray.serving.operations.features import FEATURES
from mimray.serving.operations.metadata import DESCRIBE
from mimray.serving.operations.oip import CONFIG, INFER, METADATA, READY, STATS
from mimray.serving.operations.operation import Computation, Description
from mimray.serving.operations.predict import PREDICT
from mimray.serving.operations.reconstruct import RECONSTRUCT

OPERATIONS: dict[str, Description | Computation] = {
    operation.name: operation
    for operation in (
        DESCRIBE,
        FEATURES,
        EMBEDDINGS,
        PREDICT,
        RECONSTRUCT,
        METADATA,
        READY,
        CONFIG,
        STATS,
        INFER,
    )
}
"""Every operation by its name."""
