"""The licence of weights to begin with, which goes with what is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mimray.service.commands.serve import resolve as resolve_served
from mimray.trainers.bundles import read_card
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.needs import (
    keep_needs,
    with_needs,
)
from mimray.trainers.storage import RunDir
from tests.trainers.methods.initial_cases import donate, plan_of, recipe_of


def test_begin__the_licence_of_the_weights_goes_into_the_bundle(
    donors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    donate("mae", donors, "mae-licensed")
    card = donors / "mae-licensed" / "bundle" / "bundle.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"license": "CC-BY-NC-4.0"}))
    recipe = with_needs(recipe_of("simmim", donors, init=str(donors / "mae-licensed")))
    plan, run = plan_of(recipe, donors), RunDir(str(tmp_path / "run"))
    keep_needs(recipe, run)

    made = write_bundle(run, plan, build_method(recipe).state_dict(), step=1, name="a", command="")

    assert (made.license, made.for_research_only) == ("CC-BY-NC-4.0", True)
    resolve_served(str(tmp_path / "run" / "bundle"))
    assert "is under the licence CC-BY-NC-4.0, which forbids" in capsys.readouterr().err


@pytest.mark.parametrize(
    "free", ["", "apache-2.0", "MIT", "DINOv3 License (https://x)", "nclicense"]
)
def test_card__licences_that_allow_a_service(donors: Path, free: str):
    donate("mae", donors, "mae-free")
    card = read_card(donors / "mae-free" / "bundle")

    assert not card.model_copy(update={"license": free}).for_research_only
    for forbidding in ("cc-by-nc-sa-4.0 and MIT", "Non-Commercial Research"):
        assert card.model_copy(update={"license": forbidding}).for_research_only
