"""A model's service out of its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mimray.serving.inference.predictor import Predictor, PredictorLimits
from mimray.serving.inference.preprocess import PictureLimits
from mimray.serving.operations.answer_cache import AnswerCache
from mimray.serving.operations.fetching import UrlPolicy, fetch
from mimray.serving.operations.metadata import Identity
from mimray.serving.operations.model_service import ModelService
from mimray.serving.operations.reconstruct import Reconstructor
from mimray.serving.telemetry.metrics import Metrics
from mimray.serving.telemetry.tracing import Tracer

if TYPE_CHECKING:
    from mimray.serving.deploy.replicas import ModelSettings

_MIB = 2**20


def build_service(settings: ModelSettings, *, num_threads: int) -> ModelService:
    """Load a bundle, warm it up, and put its answers together.

    Args:
        settings: of the model.
        num_threads: of the model on a CPU.

    Raises:
        BundleError: the bundle is missing or damaged.
    """
    from mimray.trainers.bundles import CARD, bundle_folder

    limits = settings.edge.limits
    bundle = bundle_folder(settings.bundle)
    metrics = Metrics(settings.name, settings.version)
    predictor = Predictor(
        bundle,
        device=settings.device,
        num_threads=num_threads,
        limits=PredictorLimits(
            max_batch_size=settings.max_batch_size,
            batch_wait_s=settings.batch_wait_ms / 1000,
            max_queue_size=settings.max_queue_size,
            max_wait_s=settings.max_wait_s,
            max_output_bytes=limits.answer_mib * _MIB,
            pictures=PictureLimits(
                max_pixels=limits.picture_pixels,
                max_frames=limits.picture_frames,
                max_input_pixels=limits.input_pixels,
            ),
        ),
        jpeg_draft=settings.jpeg_draft,
        compile=settings.compile,
        on_batch=metrics.batch,
    )
    predictor.warm_up()
    reconstructor = Reconstructor(bundle, max_pixels=limits.picture_pixels)
    identity = Identity(
        name=settings.name,
        version=settings.version,
        card=predictor.card,
        facts=predictor.facts,
        limits=predictor.limits,
        max_pictures=limits.pictures,
        can_reconstruct=reconstructor.available,
        created_s=int((bundle / CARD).stat().st_mtime),
    )
    urls = settings.urls
    policy = (
        UrlPolicy(
            allowed_hosts=urls.allowed_hosts,
            max_bytes=urls.max_mib * _MIB,
            timeout_s=urls.timeout_s,
        )
        if urls.allowed_hosts
        else None
    )

    async def fetched(url: str) -> bytes:
        return await fetch(url, policy)

    return ModelService(
        identity,
        predictor,
        reconstructor,
        fetch=fetched,
        metrics=metrics,
        cache=AnswerCache(settings.cache_mib * _MIB),
        tracer=Tracer(),
        timeout_s=limits.request_timeout_s,
    )
