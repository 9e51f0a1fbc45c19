"""The document against the application, the file in the repository, and a fuzzer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from mimray.serving.api.openapi import document
from mimray.serving.inference.options import NAMES
from mimray.serving.operations.operation import Computation
from mimray.serving.operations.response_formats import WRITERS
from mimray.serving.operations.table import OPERATIONS
from mimray.trainers import load_bundle
from tests.serving.heads import save_each

EXAMPLES = 20

FILE = Path(__file__).parents[3] / "docs" / "openapi.json"


def test_document__is_what_the_repository_holds() -> None:
    wanted = json.dumps(document(), indent=1) + "\n"
    assert FILE.read_text() == wanted, (
        "docs/openapi.json is not what serving/api/openapi.py says; write it with "
        "`python -m mimray.serving.api.openapi > docs/openapi.json`"
    )


def test_document__describes_every_route_and_no_other(application: Callable[..., Any]) -> None:
    app = application(("alpha",))
    served = {
        (route.path.replace("{path:path}", "{path}"), method.lower())
        for route in app.routes
        for method in route.methods - {"HEAD"}
    }
    described = {
        (path, method)
        for path, item in document()["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert described == served


def test_document__says_what_each_computation_takes() -> None:
    described = {path: item["post"] for path, item in document()["paths"].items() if "post" in item}
    for operation in OPERATIONS.values():
        if isinstance(operation, Computation):
            assert all("requestBody" in described[path] for path in operation.paths)


def test_document__knows_every_option_and_format() -> None:
    features = document()["paths"]["/v1/features"]["post"]
    assert {p["name"] for p in features["parameters"]} == {"model", "version", "outputs", *NAMES}
    assert features["responses"]["200"]["content"].keys() == WRITERS.keys()
    codes = document()["components"]["responses"]
    for path in document()["paths"].values():
        for method, operation in path.items():
            if method != "parameters":
                refused = [s for s in operation["responses"] if s >= "400"]
                assert set(refused) <= codes.keys()


@pytest.fixture(scope="module")
def url(
    application: Callable[..., Any],
    serve_application: Callable[..., Any],
    bundles: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    limits = {"body_mib": 1, "pictures": 8, "input_pixels": 448 * 448}
    heads = save_each(tmp_path_factory.mktemp("heads"), load_bundle(bundles["alpha"]))
    made = application(gateway={"limits": limits}, heads={"alpha": heads})
    with serve_application(made) as url:
        yield url


@pytest.mark.parametrize("operation", sorted(
    f"{method.upper()} {path}"
    for path, item in document()["paths"].items()
    for method in item
    if method != "parameters"
))  # fmt: skip
def test_endpoint__a_fuzzer_finds_nothing(url: str, operation: str) -> None:
    """Answers are described, refusals are problems, and nothing is a 500."""
    method, path = operation.split(" ")
    tree = document()
    # Names that exist, or hardly any request would come further than 404.
    for item in tree["paths"].values():
        for parameter in item.get("parameters", []):
            values = {"name": ["alpha", "gamma"], "version": ["1", "2"]}[parameter["name"]]
            parameter["schema"] = {"enum": values}
        for verb, details in item.items():
            for parameter in details.get("parameters", []) if verb != "parameters" else []:
                if parameter["name"] == "model":
                    parameter["schema"] = {"enum": ["alpha", "gamma"]}
    tree_operation = tree["paths"][path][method.lower()]
    schema = schemathesis.openapi.from_dict(tree)
    # A request that is wrong may be too large as well, and is refused for that first.
    rejection = schema.config.checks.negative_data_rejection
    rejection.expected_statuses = [*rejection.expected_statuses, "413"]
    for mode in GenerationMode:

        @given(case=schema[path][method].as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            # No schema can say what bytes are a picture, so not every body it allows is one.
            excluded = [positive_data_acceptance] if "requestBody" in tree_operation else []
            case.call_and_validate(base_url=url, timeout=120, excluded_checks=excluded)

        try:
            check()
        except Unsatisfiable:  # nothing can be wrong with a request that has no parts
            assert mode == GenerationMode.NEGATIVE
