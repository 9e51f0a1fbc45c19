"""The guide to methods: by need, what was published, and what circulates wrongly.

The rows lie in `guide.yaml`.
"""

from __future__ import annotations

from importlib import resources

import yaml

from mimray.service.terminal.console import as_text
from mimray.service.terminal.guide import Guide, guide_view


def read_guide() -> Guide:
    """The guide's rows, by section: choices, profiles, figures, corrections."""
    text = resources.files(__package__).joinpath("guide.yaml").read_text(encoding="utf-8")
    guide: Guide = yaml.safe_load(text)
    return guide


def guide_text(guide: Guide) -> str:
    """The guide for people, as wide as the terminal."""
    return as_text(guide_view(guide))
