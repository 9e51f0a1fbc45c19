"""Make `kuberay-schemas.json.gz`, what KubeRay's definitions of resources allow below `spec`.

`python tests/deploy/kuberay_schemas.py FOLDER` reads `ray.io_rayjobs.yaml` and
`ray.io_rayservices.yaml` of a KubeRay release (ray-operator/config/crd/bases of its repository,
https://github.com/ray-project/kuberay, Apache License 2.0). The file there is of KubeRay 1.7.0.
Descriptions are left out.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).with_name("kuberay-schemas.json.gz")


def load_schemas() -> dict[str, Any]:
    """The structural schema of `spec`, by kind of resource."""
    found: dict[str, Any] = json.loads(gzip.decompress(SCHEMAS.read_bytes()))
    return found


def read_definition(file: Path) -> tuple[str, dict[str, Any]]:
    """The kind that a definition is of, and the schema of its `spec` in version v1."""
    definition = yaml.safe_load(file.read_text())
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return definition["spec"]["names"]["kind"], _without_descriptions(schema)


def _without_descriptions(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_descriptions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "description"}
    fields = kept.pop("properties", None)
    found = {key: _without_descriptions(value) for key, value in kept.items()}
    if fields is not None:  # a field may be named description
        found["properties"] = {name: _without_descriptions(field) for name, field in fields.items()}
    return found


def main(folder: Path) -> None:
    files = [folder / f"ray.io_{plural}.yaml" for plural in ("rayjobs", "rayservices")]
    text = json.dumps(dict(map(read_definition, files)), sort_keys=True, separators=(",", ":"))
    SCHEMAS.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
