from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainers.methods.initial_cases import write_donors


@pytest.fixture(scope="module")
def donors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of two classes, and a bundle of every method to begin with."""
    return write_donors(tmp_path_factory.mktemp("donors"))
