"""The encoder of DALL-E's tokenizer, whose codes BEiT predicts; for imported weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mimray.trainers.config.model import DalleConfig
from mimray.trainers.models.encoder import Encoder
from mimray.trainers.types import Features


class DalleBlock(nn.Module):
    """A residual block of four convolutions, each after a ReLU, with a constant gain.

    Args:
        before: channels of the input.
        width: channels of the output.
        gain: factor of the residual branch.
    """

    def __init__(self, before: int, width: int, gain: float) -> None:
        super().__init__()
        hidden = width // 4
        self.gain = gain
        self.shortcut = nn.Conv2d(before, width, 1) if before != width else nn.Identity()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(before, hidden, 3, padding=1),
                nn.Conv2d(hidden, hidden, 3, padding=1),
                nn.Conv2d(hidden, hidden, 3, padding=1),
                nn.Conv2d(hidden, width, 1),
            ]
        )

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        """Transform a map to `width` channels, keeping its grid."""
        y = x
        for conv in self.convs:
            y = conv(torch.relu(y))
        out: Tensor = self.shortcut(x) + self.gain * y
        return out


class DalleEncoder(Encoder):
    """Groups of residual blocks, each on half the grid of the one before; a layer is a group.

    A ReLU follows the last map, as the 1x1 convolution to the codes' logits expects; there is no
    normalisation.

    Args:
        config: the encoder's widths and depth.
        image_size: (height, width) in pixels, multiples of the stride.
        in_chans: channels of the input, any number.

    Source: Ramesh et al. 2021, appendix A.1; github.com/openai/DALL-E `encoder.py`.
    """

    num_prefix_tokens = 0

    def __init__(self, config: DalleConfig, image_size: tuple[int, int], in_chans: int = 3) -> None:
        super().__init__()
        groups = range(config.num_groups)
        self.depth = config.num_groups
        self.widths = tuple(config.width * 2**i for i in groups)
        self.strides = tuple(2**i for i in groups)
        self.width = self.widths[-1]
        self.stride = self.strides[-1]
        self.in_chans = in_chans
        self.image_size = image_size

        self.grid = self._grid_of(image_size)
        self.stem = nn.Conv2d(in_chans, config.width, 7, padding=3)
        gain = 1 / (config.num_groups * config.depth) ** 2
        befores = (config.width, *self.widths)
        self.groups = nn.ModuleList(
            nn.Sequential(
                *(
                    DalleBlock(befores[i] if j == 0 else self.widths[i], self.widths[i], gain)
                    for j in range(config.depth)
                )
            )
            for i in groups
        )
        self.pool = nn.MaxPool2d(2)

    @property
    def embed_width(self) -> int:
        """Channels of the stem."""
        return self.widths[0]

    @property
    def last_decay_layer(self) -> int:
        """One more than there are groups."""
        return self.depth + 1

    def decay_layer(self, name: str) -> int:
        """0 for the stem, i + 1 for group i."""
        part, _, rest = name.partition(".")
        return 0 if part == "stem" else int(rest.partition(".")[0]) + 1

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
        x = self.features(images, [-1], norm)[0]  # B D h w
        tokens = x.flatten(2).transpose(1, 2)  # B N D
        return Features(tokens, tokens[:, :0], pooled=tokens.mean(dim=1), grid=grid)

    def features(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Maps after the given groups; groups past the last one asked for are not run."""
        wanted = self._wanted(layers)
        self._grid_of((images.shape[2], images.shape[3]))
        x = self.stem(self._cast(images))
        maps: dict[int, Tensor] = {}
        for i, group in enumerate(self.groups[: max(wanted) + 1]):
            x = self._run(group, self.pool(x) if i else x)
            maps[i] = torch.relu(x) if norm and i == self.depth - 1 else x
        return tuple(maps[i] for i in wanted)
