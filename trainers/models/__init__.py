"""Networks: the encoder protocol, its implementations, decoders and quantizers.

In order: `resize` fits weights to another size of input; `averages` follow modules; `vit`, `swin`,
`conv` and `dalle` are encoders, `encoder` is their protocol; `decoders` and `predictor`, on
`cross_attention`, predict hidden patches; `quantizer`, on `codebook` and `kmeans`, makes codes;
`hog` makes MaskFeat's targets; `prototypes` score vectors for self-distillation and `sinkhorn`
balances their assignments; `gram` holds patches to the similarities of others; `colours` shows
tokens; `rel_pos`, `positions`, `patches` and `normalise` serve them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimray.trainers.config.model import EncoderConfig
    from mimray.trainers.models.encoder import Encoder


def build_encoder(config: EncoderConfig, image_size: tuple[int, int], in_chans: int = 3) -> Encoder:
    """Build a freshly initialised encoder.

    Args:
        config: the encoder's architecture.
        image_size: (height, width) in pixels.
        in_chans: channels of the input.
    """
    from mimray.trainers.config.model import ConvConfig, DalleConfig, SwinConfig

    if isinstance(config, SwinConfig):
        from mimray.trainers.models.swin import Swin

        return Swin(config, image_size, in_chans)
    if isinstance(config, ConvConfig):
        from mimray.trainers.models.conv import ConvEncoder

        return ConvEncoder(config, image_size, in_chans)
    if isinstance(config, DalleConfig):
        from mimray.trainers.models.dalle import DalleEncoder

        return DalleEncoder(config, image_size, in_chans)
    from mimray.trainers.models.vit import ViT

    return ViT(config, image_size, in_chans)
