"""Makes `mimray_client` of the modules of mimray that its client consists of, when it is built.

They import each other as parts of `mimray`; here their imports are written anew, so that both can
be installed side by side. A source distribution holds what was made.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

PACKAGE = "mimray_client"
# Of the repository, and the module of the package that each becomes.
PARTS = {
    "serving/client": "",
    "serving/wire": "wire",
    "trainers/errors.py": "errors",
    "trainers/redaction.py": "redaction",
    "trainers/environment/network.py": "network",
}
_VERSION = re.compile(r'^__version__ = "(.+)"$', re.M)


def files(repository: Path) -> dict[str, str]:
    """The package's files by their paths in it.

    Args:
        repository: root of mimray's checkout.
    """
    found = {}
    for place, module in PARTS.items():
        source = repository / place
        if source.is_file():
            found[f"{module}.py"] = _rewritten(source.read_text(encoding="utf-8"))
            continue
        for file in sorted(source.iterdir()):
            if file.suffix in (".py", ".json"):
                name = f"{module}/{file.name}".lstrip("/")
                found[name] = _rewritten(file.read_text(encoding="utf-8"))
    found["py.typed"] = ""
    found["__init__.py"] += f'\n__version__ = "{version_of(repository)}"\n'
    return found


def version_of(repository: Path) -> str:
    """Mimray's version: both go together."""
    match = _VERSION.search((repository / "mimray/__init__.py").read_text(encoding="utf-8"))
    assert match is not None
    return match[1]


def _rewritten(text: str) -> str:
    """Text in which the parts have their names in the package."""
    for place, module in PARTS.items():
        old = "mimray." + place.removesuffix(".py").replace("/", ".")
        text = re.sub(rf"\b{re.escape(old)}\b", f"{PACKAGE}.{module}".rstrip("."), text)
    return text


class CustomMetadataHook(MetadataHookInterface):
    """Gives the version; a source distribution has it in its metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the version."""
        made = Path(self.root) / PACKAGE / "__init__.py"
        if made.is_file():
            found = _VERSION.search(made.read_text(encoding="utf-8"))
            assert found is not None
            metadata["version"] = found[1]
        else:
            metadata["version"] = version_of(Path(self.root).parents[1])


class CustomBuildHook(BuildHookInterface[Any]):
    """Adds the package to what is built."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the files where they are not there, as in a source distribution."""
        made = Path(self.root) / PACKAGE
        if made.is_dir() and self.target_name == "wheel":
            return  # the builder finds it by itself
        if not made.is_dir():
            self._made = tempfile.TemporaryDirectory()
            made = Path(self._made.name) / PACKAGE
            repository = Path(self.root).parents[1]
            for name, text in files(repository).items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                (made / name).write_text(text, encoding="utf-8")
            shutil.copy(repository / "LICENSE", made)
        build_data["force_include"][str(made)] = PACKAGE

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was written for the build."""
        if hasattr(self, "_made"):
            self._made.cleanup()
