"""A residual convolutional encoder, and a decoder for autoencoders."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mimray.trainers.config.model import ConvConfig
from mimray.trainers.models.encoder import Encoder
from mimray.trainers.types import Features

CHANNELS_PER_GROUP = 16


class ResidualBlock(nn.Module):
    """A pre-activation residual block: twice norm, activation and 3x3 convolution.

    The last convolution starts at zero, so that a fresh block changes nothing.

    Args:
        width: channels in and out.

    Source: pre-activation by He et al. 2016 ("Identity Mappings"), Fig. 1b; zero start by Goyal
        et al. 2017, sec. 5.1.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = group_norm(width)
        self.conv1 = conv3x3(width, width)
        self.norm2 = group_norm(width)
        self.conv2 = conv3x3(width, width)
        self.act = nn.SiLU()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """Transform a map, keeping its shape."""
        y = self.conv1(self.act(self.norm1(x)))
        y = self.conv2(self.act(self.norm2(y)))
        return x + y  # type: ignore[no-any-return]


class ConvEncoder(Encoder):
    """Stages of a strided convolution and residual blocks; a layer is a stage.

    Only the last stage's map is normalised, over its channels.

    Args:
        config: the encoder's widths and depth.
        image_size: (height, width) in pixels, multiples of the stride.
        in_chans: channels of the input, any number.
    """

    num_prefix_tokens = 0

    def __init__(self, config: ConvConfig, image_size: tuple[int, int], in_chans: int = 3) -> None:
        super().__init__()
        self.depth = len(config.widths)
        self.widths = config.widths
        self.strides = tuple(2 ** (i + 1) for i in range(self.depth))
        self.width = self.widths[-1]
        self.stride = self.strides[-1]
        self.in_chans = in_chans
        self.image_size = image_size

        self.grid = self._grid_of(image_size)
        self.stem = nn.Sequential(conv3x3(in_chans, self.widths[0]), nn.SiLU())
        befores = (self.widths[0], *self.widths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                conv3x3(before, width, stride=2),
                *(ResidualBlock(width) for _ in range(config.depth)),
            )
            for before, width in zip(befores, self.widths, strict=False)
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-6)

    @property
    def embed_width(self) -> int:
        """Channels of the stem."""
        return self.widths[0]

    @property
    def last_decay_layer(self) -> int:
        """One more than there are stages."""
        return self.depth + 1

    def decay_layer(self, name: str) -> int:
        """0 for the stem, i + 1 for stage i, `last_decay_layer` for the norm."""
        part, _, rest = name.partition(".")
        if part == "stem":
            return 0
        return int(rest.partition(".")[0]) + 1 if part == "stages" else self.last_decay_layer

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        mask_token: Float[Tensor, "1 1 D"] | None = None,
        norm: bool = True,
    ) -> Features:
        """Encode whole pictures; a mask is not allowed, since convolutions cannot hide any part."""
        assert mask is None, "a convolution sees every pixel"
        grid = self._grid_of((images.shape[2], images.shape[3]))
        x = self.stem(self._cast(images))
        for stage in self.stages:
            x = self._run(stage, x)
        tokens = x.flatten(2).transpose(1, 2)  # B N D
        if norm:
            tokens = self.norm(tokens)
        return Features(tokens, tokens[:, :0], pooled=tokens.mean(dim=1), grid=grid)

    def features(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Maps after the given stages; stages past the last one asked for are not run."""
        wanted = self._wanted(layers)
        self._grid_of((images.shape[2], images.shape[3]))
        x = self.stem(self._cast(images))
        maps: dict[int, Tensor] = {}
        for i, stage in enumerate(self.stages[: max(wanted) + 1]):
            x = self._run(stage, x)
            maps[i] = x
            if norm and i == self.depth - 1:
                maps[i] = self.norm(x.movedim(1, 3)).movedim(3, 1)  # B D h w
        return tuple(maps[i] for i in wanted)


class ConvDecoder(nn.Module):
    """Stages of residual blocks, with enlargement by 2 between them.

    A pixel shuffle at the end enlarges by the rest of the stride.

    Args:
        in_dim: channels of the latent.
        widths: channels of each stage, from the latent to the picture.
        blocks: residual blocks per stage.
        stride: pixels per place of the latent, a multiple of 2^(stages - 1).
        out_chans: channels of the pictures.

    Source: nearest-neighbour enlargement by Odena et al. 2016, pixel shuffle by Shi et al. 2016,
        its initialisation by Aitken et al. 2017, sec. 3.
    """

    def __init__(
        self, in_dim: int, widths: Sequence[int], blocks: int, *, stride: int, out_chans: int
    ) -> None:
        super().__init__()
        shuffle, rest = divmod(stride, 2 ** (len(widths) - 1))
        assert not rest
        self.project = conv3x3(in_dim, widths[0])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(blocks))) for width in widths
        )
        self.enlarge = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2), conv3x3(before, after))
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        last = conv3x3(widths[-1], out_chans * shuffle**2)
        self.to_pixels = nn.Sequential(
            group_norm(widths[-1]), nn.SiLU(), last, nn.PixelShuffle(shuffle)
        )
        with torch.no_grad():
            # The pixels of one shuffle start equal, which avoids a checkerboard.
            kept = last.weight[:: shuffle**2].repeat_interleave(shuffle**2, dim=0)
            last.weight.copy_(kept)

    def forward(self, latent: Float[Tensor, "B L h w"]) -> Float[Tensor, "B C H W"]:
        """Decode latents into pictures, `stride` times as large."""
        x = self.stages[0](self.project(latent))
        for enlarge, stage in zip(self.enlarge, self.stages[1:], strict=True):
            x = stage(enlarge(x))
        pixels: Tensor = self.to_pixels(x)
        return pixels


def conv3x3(in_chans: int, out_chans: int, *, stride: int = 1) -> nn.Conv2d:
    """A padded 3x3 convolution with He initialisation.

    Source: He et al. 2015 ("Delving Deep into Rectifiers"), eq. 10; zero bias.
    """
    conv = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def group_norm(width: int) -> nn.GroupNorm:
    """Group norm of about 16 channels a group; groups of one channel would lose all brightness.

    Source: Wu & He 2018, Table 3.
    """
    return nn.GroupNorm(math.gcd(width, max(1, width // CHANNELS_PER_GROUP)), width)
