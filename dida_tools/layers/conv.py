"""
Convolution layers: convolution, normalization, activation, dropout, in this order.

Normalizing before the activation lets deployment tools fold it into the convolution. A layer that normalizes
has no bias: the normalization would subtract it again, and it would never get a gradient.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _checked_call(init: Any) -> Any:
    """Have a layer refuse arguments that it does not have, such as those of 2021, by showing those it has."""

    @functools.wraps(init)
    def checked(self: nn.Module, *arguments: Any, **options: Any) -> None:
        try:
            inspect.signature(init).bind(self, *arguments, **options)
        except TypeError as error:
            names = ", ".join([*inspect.signature(init).parameters][1:]).replace("ch_out,", "ch_out, *,")
            raise TypeError(f"{type(self).__name__}: {error}. It takes ({names}).") from None
        init(self, *arguments, **options)

    return checked


class ConvLayer(nn.Module):
    """A convolution that keeps height and width (halves them, rounding up, with stride 2)."""

    @_checked_call
    def __init__(
        self,
        ch_in: int,
        ch_out: int,
        *,
        k_size: int = 3,
        stride: int = 1,
        dropout: float | None = 0.0,
        activ: Callable[[], nn.Module] = nn.ELU,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    ) -> None:
        """
        :param ch_in: input channels
        :param ch_out: output channels
        :param k_size: size of the kernel in pixels, odd
        :param stride: step of the kernel in pixels
        :param dropout: probability that a whole channel is zeroed in training
        :param activ: class of the activation
        :param norm: makes the normalization of so many channels, such as partial(nn.GroupNorm, 8), or None
        """
        super().__init__()
        self.conv = nn.Conv2d(ch_in, ch_out, k_size, stride, padding=_padding(k_size), bias=norm is None)
        self.norm = nn.Identity() if norm is None else norm(ch_out)
        self.activ = activ()
        self.dropout = nn.Dropout2d(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, ch_in, H, W) to (N, ch_out, H, W)."""
        return self.dropout(self.activ(self.norm(self.conv(x))))


class TransConvLayer(nn.Module):
    """A transposed convolution that doubles height and width."""

    @_checked_call
    def __init__(
        self,
        ch_in: int,
        ch_out: int,
        *,
        dropout: float | None = 0.0,
        activ: Callable[[], nn.Module] = nn.ELU,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    ) -> None:
        """See ConvLayer. The kernel is as large as the stride, so that no output pixel is written twice."""
        super().__init__()
        self.conv = nn.ConvTranspose2d(ch_in, ch_out, kernel_size=2, stride=2, bias=norm is None)
        self.norm = nn.Identity() if norm is None else norm(ch_out)
        self.activ = activ()
        self.dropout = nn.Dropout2d(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, ch_in, H, W) to (N, ch_out, 2H, 2W)."""
        return self.dropout(self.activ(self.norm(self.conv(x))))


class DeconvLayer(nn.Module):
    """
    A sub-pixel convolution (https://arxiv.org/abs/1609.05158) that doubles height and width.

    It starts as nearest-neighbor upsampling (ICNR, https://arxiv.org/abs/1707.02937), without a checkerboard.
    """

    @_checked_call
    def __init__(
        self,
        ch_in: int,
        ch_out: int,
        *,
        k_size: int = 3,
        dropout: float | None = 0.0,
        activ: Callable[[], nn.Module] = nn.ELU,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    ) -> None:
        """See ConvLayer."""
        super().__init__()
        self.conv = nn.Conv2d(ch_in, 4 * ch_out, k_size, padding=_padding(k_size), bias=norm is None)
        self.shuffle = nn.PixelShuffle(2)
        self.norm = nn.Identity() if norm is None else norm(ch_out)  # one scale for the four pixels of a cell
        self.activ = activ()
        self.dropout = nn.Dropout2d(dropout) if dropout else nn.Identity()
        with torch.no_grad():
            for parameter in self.conv.parameters():  # ICNR
                parameter.copy_(parameter[::4].repeat_interleave(4, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, ch_in, H, W) to (N, ch_out, 2H, 2W)."""
        return self.dropout(self.activ(self.norm(self.shuffle(self.conv(x)))))


def _padding(k_size: int) -> int:
    if k_size % 2 == 0:
        raise ValueError(f"k_size is {k_size}: choose an odd one, which can keep height and width.")
    return k_size // 2
