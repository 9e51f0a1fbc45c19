"""A model's service, built from its settings."""

from __future__ import annotations

from mimray.serving.config import MIB
from mimray.serving.deploy.settings import ModelSettings
from mimray.serving.inference.predictor import Predictor
from mimray.serving.inference.reconstructor import Reconstructor
from mimray.serving.operations.answer_cache import AnswerCache
from mimray.serving.operations.model_service import ModelService
from mimray.serving.operations.operation import Model
from mimray.serving.telemetry.metrics import Metrics
from mimray.serving.telemetry.tracing import Tracer


def build_service(settings: ModelSettings, *, num_threads: int) -> ModelService:
    """Load a bundle, warm the model up, and build its service.

    Args:
        settings: the replica's settings.
        num_threads: CPU threads of the model.

    Raises:
        BundleError: the bundle is missing or damaged.
    """
    from mimray.trainers.bundles import CARD, fetch_bundle

    limits = settings.gateway.limits
    bundle = fetch_bundle(settings.bundle)
    metrics = Metrics(settings.name, settings.version)
    predictor = Predictor(bundle, settings, limits, num_threads=num_threads, on_batch=metrics.batch)
    predictor.warm_up()
    model = Model(
        name=settings.name,
        version=settings.version,
        versions=(settings.version,),
        predictor=predictor,
        reconstructor=Reconstructor(bundle),
        limits=limits,
        urls=settings.urls,
        created_s=int((bundle / CARD).stat().st_mtime),
    )
    return ModelService(
        model, metrics=metrics, cache=AnswerCache(settings.cache_mib * MIB), tracer=Tracer()
    )
