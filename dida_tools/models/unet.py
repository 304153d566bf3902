"""UNET, a recursive U-Net (https://arxiv.org/abs/1505.04597)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..layers.conv import ConvLayer, DeconvLayer, TransConvLayer


class UNETRecursion(nn.Module):
    """One level of the U: halve the size, double the channels, go deeper, come back, join with the input."""

    def __init__(
        self,
        ch: int,
        n_recursions: int,
        use_shuffle: bool,
        dropout: float | None,
        activ: Callable[[], nn.Module],
        use_pooling: bool,
        norm: Callable[[int], nn.Module] | None,
    ) -> None:
        """
        :param ch: channels that come in and go out; the level below has twice as many
        :param n_recursions: levels from here on down, at least 1
        """
        super().__init__()
        style: dict[str, Any] = {"activ": activ, "norm": norm}
        self.down = nn.MaxPool2d(2) if use_pooling else ConvLayer(ch, ch, stride=2, **style)
        last = style | {"dropout": dropout}
        self.encode = nn.Sequential(ConvLayer(ch, 2 * ch, **style), ConvLayer(2 * ch, 2 * ch, **last))
        self.deeper: nn.Module = nn.Identity()
        if n_recursions > 1:
            self.deeper = UNETRecursion(
                2 * ch, n_recursions - 1, use_shuffle, dropout, activ, use_pooling, norm
            )
        if use_shuffle:
            self.up: nn.Module = DeconvLayer(2 * ch, ch, k_size=1, **style)
        else:
            self.up = TransConvLayer(2 * ch, ch, **style)
        self.decode = nn.Sequential(ConvLayer(2 * ch, ch, **style), ConvLayer(ch, ch, **last))

    def forward(self, x: Tensor) -> Tensor:
        """(N, ch, H, W) to (N, ch, H, W), H and W divisible by 2 ** n_recursions."""
        below = self.up(self.deeper(self.encode(self.down(x))))
        return self.decode(torch.cat([x, below], dim=1))


class UNET(nn.Module):
    """
    A U-Net that calls itself for the part below.

    Images of any height and width work: they are padded at the bottom and right to a multiple of 2 **
    n_recursions with copies of the outermost pixels, and the output is cropped back. Training needs more than
    one value per channel on the lowest level, as BatchNorm does everywhere.
    """

    def __init__(
        self,
        ch_in: int,
        ch_out: int,
        bulk_ch: int = 32,
        n_recursions: int = 4,
        use_shuffle: bool = True,
        dropout: float | None = 0.0,
        activ: Callable[[], nn.Module] = nn.ELU,
        use_pooling: bool = True,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    ) -> None:
        """
        :param ch_in: channels of the image
        :param ch_out: channels of the output (logits), as many as there are classes
        :param bulk_ch: channels at full size; each level below has twice as many
        :param n_recursions: number of levels below, at least 1; each halves the size
        :param use_shuffle: upsample with pixel shuffle, otherwise with transposed convolutions
        :param dropout: probability that a channel is zeroed, after each pair of convolutions but the first
        :param activ: class of the activation
        :param use_pooling: downsample with max pooling, otherwise with strided convolutions
        :param norm: makes the normalization for a number of channels, or None
        """
        super().__init__()
        if n_recursions < 1:
            raise ValueError(f"n_recursions is {n_recursions}: a U-Net needs at least 1 level.")
        self.n_recursions = n_recursions
        style: dict[str, Any] = {"activ": activ, "norm": norm}
        self.encode = nn.Sequential(ConvLayer(ch_in, bulk_ch, **style), ConvLayer(bulk_ch, bulk_ch, **style))
        self.below = UNETRecursion(bulk_ch, n_recursions, use_shuffle, dropout, activ, use_pooling, norm)
        self.head = nn.Conv2d(bulk_ch, ch_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ch_in, H, W) images to (N, ch_out, H, W) logits."""
        height, width = x.shape[-2:]
        multiple = 2**self.n_recursions
        # With // and pads even by 0 instead of %, branches and slices, torch.export keeps batch, height and
        # width dynamic, sizes from multiple + 1 on: it takes size 1 on the lowest level for a special case.
        bottom = (height + multiple - 1) // multiple * multiple - height
        right = (width + multiple - 1) // multiple * multiple - width
        x = functional.pad(x, (0, right, 0, bottom), mode="replicate")
        return functional.pad(self.head(self.below(self.encode(x))), (0, -right, 0, -bottom))
