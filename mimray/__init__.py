"""Pre-train an image encoder on pictures of one's own, search how, and serve it.

run = mimray.pretrain("mae-tiny", "pictures", steps=500)
score = mimray.evaluate(run.bundle, "knn", "labelled")
with mimray.serve({"photos": run.bundle}) as endpoint:
    mimray.FeatureClient(endpoint.url).embed(["a.jpg"], model="photos")

The names below are loaded at their first use, so that importing this costs next to nothing.

The four packages lie beside this one at the top of the repository and are imported through it
alone (`mimray.trainers`), by links that wheels, editors and Ray's uploads follow: names as common
as theirs would otherwise meet other people's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimray.service.library import Evaluation as Evaluation
    from mimray.service.library import Run as Run
    from mimray.service.library import Sweep as Sweep
    from mimray.service.library import evaluate as evaluate
    from mimray.service.library import extract as extract
    from mimray.service.library import pretrain as pretrain
    from mimray.service.library import serve as serve
    from mimray.service.library import tune as tune
    from mimray.serving.client import AsyncFeatureClient as AsyncFeatureClient
    from mimray.serving.client import FeatureClient as FeatureClient
    from mimray.trainers import load_bundle as load_bundle
    from mimray.trainers import load_head as load_head
    from mimray.trainers import load_method as load_method
    from mimray.trainers.errors import MimrayError as MimrayError

__version__ = "0.1.0"

_PLACES = {
    **dict.fromkeys(
        ("Evaluation", "Run", "Sweep", "evaluate", "extract", "pretrain", "serve", "tune"),
        "mimray.service.library",
    ),
    **dict.fromkeys(("AsyncFeatureClient", "FeatureClient"), "mimray.serving.client"),
    **dict.fromkeys(("load_bundle", "load_head", "load_method"), "mimray.trainers"),
    "MimrayError": "mimray.trainers.errors",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
