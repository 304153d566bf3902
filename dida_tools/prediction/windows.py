"""
Contains sliding windows: an image of any size is predicted in overlapping windows, whose answers are blended.

The image goes through in bands of rows, as high as one window. Memory grows with width x window x classes, and never
with the height. The next rows are read while the current ones are computed.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..utils.data.contract import DataContract
from ..utils.data.facts import has_data
from ..utils.data.images import DataError, Window
from ..utils.signals import raise_if_stop_requested

PredictBatch = Callable[
    [Tensor], np.ndarray
]  # (N, C, H, W) prepared inputs to (N, K, H, W) probabilities in float32

_READ_ROWS = 64  # at least, so that files whose blocks are single rows are not read row by row
_MOST_READ_ROWS = 1024  # some files are one block
_SMALLEST_WEIGHT = 1e-3  # of the largest one: a corner's weight must not vanish


class Image(Protocol):
    """What is predicted: an ImageReader, or anything else that gives windows."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)"""

    def read(self, window: Window) -> np.ndarray:
        """(H, W, C) in the dtype of the file."""


@dataclass(frozen=True)
class Tiling:
    """
    How an image is cut.

    :param tile: edge of the windows in pixels; smaller images are one window of their own size
    :param overlap: part of a window that the next one shares with it, from 0 to below 1
    :param batch_size: windows that are computed at once
    """

    tile: int
    overlap: float
    batch_size: int


class Band(NamedTuple):
    """Rows of an image that are done."""

    top: int
    probabilities: np.ndarray  # (K, rows, W) in float32
    valid: np.ndarray  # (rows, W): where there is data


def window_starts(length: int, size: int, overlap: float) -> list[int]:
    """Where windows begin so that they cover a length; the last one ends with it."""
    step = max(1, round(size * (1 - overlap)))
    return [*range(0, max(0, length - size), step), max(0, length - size)]


def blending_weights(height: int, width: int) -> np.ndarray:
    """How much each pixel of a window counts, (height, width) in float32: a Gaussian, as in Isensee et al. 2021."""

    def along(size: int) -> np.ndarray:
        return np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (size / 8)) ** 2)

    weights = along(height)[:, None] * along(width)
    return np.maximum(weights / weights.max(), _SMALLEST_WEIGHT).astype(np.float32)


def predict_bands(
    predict_batch: PredictBatch, image: Image, contract: DataContract, tiling: Tiling, first_row: int = 0
) -> Iterator[Band]:
    """
    Predicts an image from top to bottom.

    Windows without data are skipped. Overlapping answers are averaged in float32, weighted with a Gaussian.

    :param image: as its file has it
    :param contract: how it is prepared
    :param first_row: rows above are done already; one at which a band began
    :return: bands that join one another from first_row to the last row
    :raises DataError: if the image holds what the contract does not allow, such as NaN
    :raises Preempted: if a signal has asked to end
    """
    height, width, _ = image.shape
    size = (min(tiling.tile, height), min(tiling.tile, width))
    tops, lefts = (
        window_starts(one, edge, tiling.overlap) for one, edge in zip((height, width), size, strict=True)
    )
    weights = blending_weights(*size)
    num_batches = -(-len(lefts) // tiling.batch_size)
    batch_size = -(-len(lefts) // num_batches)  # the same for all, so that no window is computed for nothing
    sums = np.zeros((contract.outputs, size[0], width), np.float32)
    norms = np.zeros((size[0], width), np.float32)
    to_do = [top for top in tops if top + size[0] > first_row]
    with ThreadPoolExecutor(1) as pool:
        rows = _RowBuffer(image, contract, pool, to_do[0])
        for top, next_top in zip(to_do, [*to_do[1:], height], strict=True):
            strip, valid = rows.take(top, top + size[0])
            windows = [slice(left, left + size[1]) for left in lefts]
            windows = [window for window in windows if valid[:, window].any()]
            inputs = (contract.prepare(strip[:, window])[0] for window in windows)
            for window, answer in zip(windows, _in_batches(predict_batch, inputs, batch_size), strict=True):
                sums[:, :, window] += answer * weights
                norms[:, window] += weights
            done = next_top - top
            if next_top > first_row:
                skip = max(0, first_row - top)
                norm = norms[skip:done]
                probabilities = sums[:, skip:done] / np.where(norm > 0, norm, 1)
                yield Band(top + skip, probabilities, valid[skip:done])
            for array in (sums, norms):
                array[..., : size[0] - done, :] = array[..., done:, :]
                array[..., size[0] - done :, :] = 0


def _in_batches(
    predict_batch: PredictBatch, inputs: Iterable[Tensor], batch_size: int
) -> Iterator[np.ndarray]:
    """The answers to windows; all batches have one shape."""
    rest = iter(inputs)
    while batch := list(itertools.islice(rest, batch_size)):
        raise_if_stop_requested()
        filled = [*batch, *[torch.zeros_like(batch[0])] * (batch_size - len(batch))]
        yield from predict_batch(torch.stack(filled))[: len(batch)]


class _RowBuffer:
    """Gives strips of an image that overlap, and reads every row once, the next ones ahead of time."""

    def __init__(
        self, image: Image, contract: DataContract, pool: ThreadPoolExecutor, first_row: int
    ) -> None:
        self._image, self._contract, self._pool = image, contract, pool
        self._rows_at_once = min(max(_READ_ROWS, getattr(image, "block_rows", 1)), _MOST_READ_ROWS)
        self._top = self._read_to = first_row - first_row % self._rows_at_once
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []  # from self._top to self._read_to
        self._ahead: Any = None

    def take(self, top: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (bottom - top, W, C), and where they hold data; rows above are forgotten."""
        while self._read_to < bottom:
            part = self._read(self._read_to) if self._ahead is None else self._ahead.result()
            self._parts.append(part)
            self._read_to += len(part[0])
            self._ahead = (
                self._pool.submit(self._read, self._read_to) if self._read_to < self._image.shape[0] else None
            )
        if len(self._parts) > 1:
            self._parts = [
                (
                    np.concatenate([part[0] for part in self._parts]),
                    np.concatenate([part[1] for part in self._parts]),
                )
            ]
        pixels, valid = (array[top - self._top :] for array in self._parts[0])
        self._parts, self._top = [(pixels, valid)], top
        return pixels[: bottom - top], valid[: bottom - top]

    def _read(self, top: int) -> tuple[np.ndarray, np.ndarray]:
        height, width, _ = self._image.shape
        bottom = min(top + self._rows_at_once, height)
        pixels = self._image.read(Window(top, 0, bottom - top, width))
        problems = self._contract.problems(pixels)
        if problems:
            raise DataError([f"rows {top} to {bottom - 1}: {problem}" for problem in problems])
        return pixels, has_data(pixels, self._contract.nodata)
