"""Tiny models of the libraries whose weights we read and write, and what ours must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from mimray.trainers import load_method
from mimray.trainers.methods.beit import BEiT

HF_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
HF_SWIN = {
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "encoder_stride": 4,
}
TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
TIMM = {
    "vit": ("vit_base_patch16_224", TIMM_VIT),
    "beit": ("beit_base_patch16_224", TIMM_VIT | {"use_rel_pos_bias": False}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 64, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
            "num_heads": [2, 4], "window_size": 4,
        },
    ),
}  # fmt: skip


class Codes:
    """Stands in for a tokenizer: the same codes whatever it is shown."""

    def __init__(self, recipe: Any, codes: Tensor) -> None:
        self.recipe, self._codes = recipe, codes

    def codes(self, images: Tensor) -> Tensor:
        return self._codes.unflatten(1, self.recipe.grid)

    def decode_codes(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def to(self, device: torch.device) -> Codes:
        return self


class Zoo:
    """Models of 32 pixels, patches of 8, width 32, 4 heads; swins of 64, patches of 2."""

    def trained_like(self, model: Any, seed: int = 3) -> Any:
        """A model in which no bias, norm, token or table is at the value it starts with."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    def generator(self, parameter: Tensor) -> torch.Generator:
        """A generator that depends on a parameter's size."""
        return torch.Generator().manual_seed(parameter.numel())

    def images(self, size: Any = 32, count: int = 3, channels: int = 3) -> Tensor:
        shape = (size, size) if isinstance(size, int) else size
        return torch.randn(count, channels, *shape, generator=torch.Generator().manual_seed(0))

    def mask(self, num_patches: int = 16) -> Tensor:
        rng = np.random.default_rng(0)
        return torch.from_numpy(np.stack([rng.permutation(num_patches) < 6 for _ in range(3)]))

    def close(self, ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    def timm(self, kind: str, **options: Any) -> Any:
        name, shape = TIMM[kind]
        return self.trained_like(timm.create_model(name, **shape | {"num_classes": 7} | options))

    def hf(self, kind: str, **options: Any) -> Any:
        """A model for pre-training of transformers: mae, beit, swin or vit."""
        import transformers as hf

        if kind == "mae":
            decoder = {
                "decoder_hidden_size": 16,
                "decoder_num_hidden_layers": 2,
                "decoder_num_attention_heads": 2,
                "decoder_intermediate_size": 64,
            }
            config = HF_VIT | decoder | {"norm_pix_loss": True, "mask_ratio": 6 / 16} | options
            model = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**config))
        elif kind == "beit":
            config = HF_VIT | {"use_mask_token": True, "vocab_size": 11}
            config |= options or {"use_shared_relative_position_bias": True}
            model = hf.BeitForMaskedImageModeling(hf.BeitConfig(**config))
        elif kind == "swin":
            model = hf.SwinForMaskedImageModeling(hf.SwinConfig(**HF_SWIN | options))
        else:
            config = HF_VIT | {"encoder_stride": 8} | options
            model = hf.ViTForMaskedImageModeling(hf.ViTConfig(**config))
        return self.trained_like(model)

    def same_loss(self, bundle: Path, kind: str, theirs: Any) -> None:
        """Hold a method's loss and prediction against a model for pre-training."""
        compare = {"mae": self._same_mae, "beit": self._same_beit}
        compare.get(kind, self._same_simmim)(load_method(bundle), theirs)

    def _same_mae(self, method: Any, theirs: Any) -> None:
        images, mask = self.images(), self.mask()
        ours = method(images, mask)
        reference = theirs(images, noise=mask.float() + torch.rand(mask.shape) / 2)
        assert torch.equal(reference.mask.bool(), mask)
        assert ours.loss.item() == pytest.approx(reference.loss.item(), abs=1e-5)
        self.close(ours.prediction, reference.logits)

    def _same_beit(self, method: Any, theirs: Any) -> None:
        images, mask = self.images(), self.mask()
        codes = torch.arange(3 * 16).reshape(3, 16) % 11
        assert isinstance(method, BEiT)
        method.attach(Codes(method.recipe, codes))
        ours = method(images, mask)
        reference = theirs(images, bool_masked_pos=mask, labels=codes[mask])
        assert ours.loss.item() == pytest.approx(reference.loss.item(), abs=1e-5)
        self.close(ours.prediction, reference.logits[mask])

    def _same_simmim(self, method: Any, theirs: Any) -> None:
        images = self.images(method.recipe.data.image_size)
        rows, columns = method.recipe.grid
        mask = self.mask(rows * columns)
        # Theirs is over patches of the first stage.
        times = method.encoder.stride // theirs.config.patch_size
        fine = mask.unflatten(1, (rows, columns))
        fine = fine.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1)
        ours = method(images, mask)
        reference = theirs(images, bool_masked_pos=fine)
        assert ours.loss.item() == pytest.approx(reference.loss.item(), abs=1e-5)
        self.close(method.reconstruct(images, ours), reference.reconstruction)


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    return Zoo()
