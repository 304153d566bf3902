"""
Sliding windows: predict an image of any size in overlapping windows, and blend the results.

The image is processed in bands of rows, as high as one window. Memory grows with width x window x classes,
and never with the height. The next rows are read while the current ones are computed.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ..data.contract import DataContract
from ..data.images import DataError, ImageReader, Window, has_data
from ..training.signals import raise_if_stop_requested


class ArrayImage:
    """An image in memory, (H, W, C) or (H, W), read by windows as a file is."""

    nodata: float | None = None
    block_rows = 1

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        self.shape, self.dtype = self.pixels.shape, pixels.dtype.name

    def read(self, window: Window) -> np.ndarray:
        """Return a window (H, W, C)."""
        top, left, height, width = window
        return np.array(self.pixels[top : top + height, left : left + width])

    def read_masked(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Return the same, and which pixels hold data, (H, W) bool: all."""
        return self.read(window), np.ones(window[2:], bool)


class OwnImage(ArrayImage):
    """An image as the `read` of a custom dataset gives it, which lies where its files say."""

    lacks_data = False

    def __init__(self, dataset: Any, files: Sequence[Path]) -> None:
        """:raises DataError: if it cannot be read, or comes in another size than its files have"""
        name = f"{files[0]}: {dataset.__name__}.read"
        try:
            super().__init__(np.moveaxis(np.asarray(dataset.read(*files), np.float32), -3, -1))
        except Exception as error:
            wanted = "it must be a staticmethod of a file that returns (C, H, W), as in samples"
            raise DataError([f"{name} fails ({type(error).__name__}: {error}): {wanted}"]) from error
        with ImageReader(*files) as image:
            self.grid, self.place = image.grid, image.place
            if image.shape[:2] != self.shape[:2]:
                sizes = "{} x {} pixels, the file {} x {}".format(*self.shape[:2], *image.shape[:2])
                raise DataError([f"{name} gives {sizes}: no map would fit"])

    def sample(self, size: int = 64) -> np.ndarray:
        """Return some pixels (N, C)."""
        step = 1 + max(self.shape[:2]) // (3 * size)
        return self.pixels[::step, ::step].reshape(-1, self.shape[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


Image = ImageReader | ArrayImage


def open_image(files: Sequence[Path], dataset: Any = None) -> Any:
    """Open an image as its files have it, or as the `read` of a dataset's class gives it."""
    return ImageReader(*files) if dataset is None else OwnImage(dataset, files)


Rows = tuple[np.ndarray, np.ndarray]  # (rows, W, C), and where there is data, (rows, W)
PredictBatch = Callable[[Tensor], np.ndarray]  # (N, C, H, W) inputs to (N, K, H, W) probabilities

_READ_ROWS = 64  # at least, so that files whose blocks are single rows are not read row by row
_MAX_READ_ROWS = 1024  # some files are one block


class Tiling(NamedTuple):
    """How an image is cut."""

    tile: int  # size of the windows in pixels; smaller images are one window of their own size
    overlap: float  # fraction of a window that the next one shares with it, from 0 to below 1
    batch_size: int  # windows that are computed at once


class Band(NamedTuple):
    """Finished rows of an image."""

    top: int
    probabilities: np.ndarray  # (K, rows, W) in float32
    valid: np.ndarray  # (rows, W): where there is data


def window_starts(length: int, size: int, overlap: float) -> list[int]:
    """Return where windows begin so that they cover a length; the last one ends with it."""
    step = max(1, round(size * (1 - overlap)))
    return [*range(0, max(0, length - size), step), max(0, length - size)]


def blending_weights(height: int, width: int) -> np.ndarray:
    """Return the weight of each pixel of a window in float32: a Gaussian, as in Isensee et al. 2021."""

    def along(size: int) -> np.ndarray:
        return np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (size / 8)) ** 2)

    weights = along(height)[:, None] * along(width)
    return np.maximum(weights / weights.max(), 1e-3).astype(np.float32)  # corners must not vanish


def predict_bands(
    predict_batch: PredictBatch, image: Image, contract: DataContract, tiling: Tiling
) -> Generator[Band, None, None]:
    """
    Predict an image from top to bottom.

    Windows without data are skipped. Overlapping windows are averaged in float32, weighted with a Gaussian.

    :param contract: how the image is prepared
    :return: bands that join one another from the first row to the last
    :raises DataError: if the image holds what the contract does not allow, such as NaN
    :raises Preempted: if a signal has asked to end
    """
    height, width, _ = image.shape
    rows, columns = min(tiling.tile, height), min(tiling.tile, width)
    tops, lefts = window_starts(height, rows, tiling.overlap), window_starts(width, columns, tiling.overlap)
    weights = blending_weights(rows, columns)
    if len(tops) == len(lefts) == 1:
        weights[:] = 1  # nothing to blend: a single window's values stay as they are, to the last bit
    num_batches = -(-len(lefts) // tiling.batch_size)
    batch_size = -(-len(lefts) // num_batches)  # the same for all, so that few windows are computed in vain
    sums = np.zeros((contract.outputs, rows, width), np.float32)
    norms = np.zeros((rows, width), np.float32)
    with closing(_read_ahead(image, contract)) as parts:
        pixels, valid = next(parts)  # the rows from top on
        for top, next_top in zip(tops, [*tops[1:], height], strict=True):
            strip = [(pixels, valid)]
            while sum(len(part[1]) for part in strip) < rows:
                strip.append(next(parts))
            pixels, valid = (np.concatenate(arrays) for arrays in zip(*strip, strict=True))
            windows = [slice(left, left + columns) for left in lefts]
            windows = [window for window in windows if valid[:rows, window].any()]
            inputs = (contract.prepare(pixels[:rows, part], valid[:rows, part])[0] for part in windows)
            for window, result in zip(windows, _in_batches(predict_batch, inputs, batch_size), strict=True):
                sums[:, :, window] += result * weights
                norms[:, window] += weights
            done = next_top - top
            yield Band(top, sums[:, :done] / np.where(norms > 0, norms, 1)[:done], valid[:done])
            pixels, valid = pixels[done:], valid[done:]
            for array in (sums, norms):
                array[..., : rows - done, :] = array[..., done:, :]
                array[..., rows - done :, :] = 0


def _in_batches(predict: PredictBatch, inputs: Iterable[Tensor], batch_size: int) -> Iterator[np.ndarray]:
    """Predict windows in batches that all have one shape."""
    rest = iter(inputs)
    while batch := list(itertools.islice(rest, batch_size)):
        raise_if_stop_requested()
        filled = [*batch, *[torch.zeros_like(batch[0])] * (batch_size - len(batch))]
        yield from predict(torch.stack(filled))[: len(batch)]


def _read_ahead(image: Image, contract: DataContract) -> Generator[Rows, None, None]:
    """Read every row once, the next ones ahead of time."""
    height, width, _ = image.shape
    step = min(max(_READ_ROWS, image.block_rows), _MAX_READ_ROWS)

    def read(top: int) -> Rows:
        bottom = min(top + step, height)
        pixels, valid = image.read_masked(Window(top, 0, bottom - top, width))
        if problems := contract.problems(pixels, valid):
            raise DataError([f"rows {top} to {bottom - 1}: {problem}" for problem in problems])
        return pixels, valid & has_data(pixels, contract.nodata)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, 0)
        for next_top in range(step, height + step, step):
            part = ahead.result()
            if next_top < height:
                ahead = pool.submit(read, next_top)
            yield part
