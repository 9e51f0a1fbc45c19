"""Small encoders and a small section of every method, of which tests make recipes of 16 pixels."""

from __future__ import annotations

from typing import Any

VIT = {"name": "vit", "width": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
SWIN = {"name": "swin", "width": 8, "depths": [2, 1], "num_heads": [1, 2], "patch_size": 2,
        "window_size": 2}  # fmt: skip
CONV = {"name": "conv", "widths": [8, 12], "depth": 1}

BLOCKS = {"min_block_patches": 2, "mask_ratio": 0.5}
DECODER = {"decoder_widths": [12, 8, 8]}
METHODS: dict[str, dict[str, Any]] = {
    "mae": {"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "simmim": {"mask_unit_px": 8},
    "maskfeat": {"hog_cell_px": 4, **BLOCKS},
    "beit": {"tokenizer_image_size": 16, **BLOCKS},
    "ae": {"latent_dim": 4, **DECODER},
    "vae": {"latent_dim": 4, **DECODER},
    "dvae": {"codebook_size": 16, "code_dim": 4, "decoder_blocks": 1, "min_usage": 0, **DECODER},
    "distill": {"teacher_image_size": 16, **BLOCKS},
    "ibot": {"num_local": 1, "local_px": 8, "head_width": 16, "bottleneck_width": 8,
             "num_prototypes": 8},
    "finetune": {"num_classes": 2},
}  # fmt: skip
METHODS = {name: {"name": name, **section} for name, section in METHODS.items()}
