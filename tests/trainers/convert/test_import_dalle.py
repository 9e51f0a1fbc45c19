"""DALL-E's tokenizer, imported: its codes are those of the published code, and BEiT takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mimray.trainers import load_bundle, load_method
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import parse_recipe, resolve
from mimray.trainers.convert import import_weights
from mimray.trainers.errors import BundleError, ConfigError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.needs import supply, with_needs
from mimray.trainers.models.normalise import normalise
from mimray.trainers.types import DatasetFacts

VOCABULARY = 16


@pytest.fixture
def codebook() -> Any:
    """DALL-E's encoder as transformers has it, small, with weights that spread its codes."""
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    torch.manual_seed(0)
    config = FlavaImageCodebookConfig(hidden_size=8, vocab_size=VOCABULARY, num_blocks_per_group=2)
    model = FlavaImageCodebook(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def openai_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as OpenAI's package names them."""
    found = {}
    for key, value in state.items():
        name = key.replace(".group.", ".").replace(".path.", ".")
        found[name.removesuffix("eight").removesuffix("ias")] = value
    return found


@pytest.mark.parametrize("layout", ["transformers", "openai"])
def test_dalle__codes_are_theirs(tmp_path: Path, codebook: Any, layout: str) -> None:
    if layout == "transformers":
        codebook.save_pretrained(tmp_path / "source")
    else:
        torch.save(openai_names(codebook.state_dict()), tmp_path / "source")
    pixels = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)

    imported = import_weights(str(tmp_path / "source"), tmp_path / "b", image_size=(32, 48))

    tokenizer = load_method(tmp_path / "b")
    data = tokenizer.recipe.data
    images = normalise(pixels, data.mean, data.std)
    mapped = 0.8 * pixels / 255 + 0.1  # DALL-E's map_pixels
    torch.testing.assert_close(images, mapped)
    logits = codebook(mapped)
    features = load_bundle(tmp_path / "b").features(images, layers=(3,))[0]
    torch.testing.assert_close(
        tokenizer.quantizer.to_logits(features), logits, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(tokenizer.codes(images), codebook.get_codebook_indices(mapped))
    assert logits.argmax(1).unique().numel() > 2
    assert imported.card.image_size == (32, 48)
    assert "without its decoder" in imported.notes[0]


def beit_on(tokenizer: Path, **changes: Any) -> Any:
    tree = load_recipe("beit-tiny").model_dump(mode="json")
    tree["encoder"] |= {"depth": 1}
    tree["method"] |= {"tokenizer": str(tokenizer), "vocab_size": VOCABULARY, **changes}
    return parse_recipe(tree)


def test_dalle__beit_learns_from_it_and_draws_where_it_was_wrong(
    tmp_path: Path, codebook: Any
) -> None:
    codebook.save_pretrained(tmp_path / "source")
    import_weights(str(tmp_path / "source"), tmp_path / "b", image_size=(64, 64))
    recipe = with_needs(beit_on(tmp_path / "b", tokenizer_image_size=[64, 64]))
    method = build_method(recipe)
    supply(method, "tokenizer", tmp_path / "b")
    images = torch.randn(2, 3, 64, 64)

    output = method(images)
    output.loss.backward()

    assert output.prediction.shape == (int(output.mask.sum()), VOCABULARY)
    assert output.target.max() < VOCABULARY
    assert [p.title for p in method.panels(images, output)] == ["original", "masked", "wrong codes"]


def test_dalle__another_size_or_vocabulary_is_refused(tmp_path: Path, codebook: Any) -> None:
    codebook.save_pretrained(tmp_path / "source")
    import_weights(str(tmp_path / "source"), tmp_path / "b")  # 112 pixels, as BEiT has it

    with pytest.raises(ConfigError, match="112"):
        with_needs(beit_on(tmp_path / "b", tokenizer_image_size=[64, 64]))


def test_dalle__is_not_trained_or_drawn(tmp_path: Path, codebook: Any) -> None:
    codebook.save_pretrained(tmp_path / "source")
    import_weights(str(tmp_path / "source"), tmp_path / "b")
    tokenizer = load_method(tmp_path / "b")

    with pytest.raises(BundleError, match="without a decoder"):
        tokenizer.decode_codes(torch.zeros(1, 14, 14, dtype=torch.long))
    with pytest.raises(ConfigError, match="without a decoder there is nothing to learn"):
        resolve(tokenizer.recipe, DatasetFacts("here", 10_000, "f1"), 1)


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_dalle__other_keys_are_listed_and_refused(
    tmp_path: Path, codebook: Any, damage: str
) -> None:
    state = codebook.state_dict()
    if damage == "missing":
        state.pop("blocks.group_2.group.block_1.res_path.path.conv_2.weight")
    else:
        state["blocks.group_9.elsewhere"] = torch.zeros(1)
    torch.save(state, tmp_path / "source.pth")

    with pytest.raises(BundleError, match=damage):
        import_weights(str(tmp_path / "source.pth"), tmp_path / "b")
    assert not (tmp_path / "b").exists()
