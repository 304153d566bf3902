"""
Contains how images and masks are read, by the ending of their file: ``.npy`` (memory-mapped), ``.npz``, PNG, JPEG, TIFF
and GeoTIFF.

An image is (H, W, C) here, channels last, in the dtype of its file. Windows of ``.npy`` and TIFF files are read without
the rest of the image.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...config.errors import UserError

ENDINGS = (".npy", ".npz", ".png", ".jpg", ".jpeg", ".tif", ".tiff")  # <- your formats here, and in the two functions


class DataError(UserError):
    """Data that cannot be used. Its message lists every problem."""

    def __init__(self, problems: Sequence[str], max_listed: int = 50) -> None:
        self.problems = list(problems)
        listed = [f"  - {problem}" for problem in self.problems[:max_listed]]
        if len(self.problems) > max_listed:
            listed.append(f"  - and {len(self.problems) - max_listed} more")
        count = f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
        super().__init__(f"the data has {count}:\n" + "\n".join(listed))


class Window(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class ImageInfo:
    """What is known of an image without reading its pixels."""

    shape: tuple[int, int, int]  # (H, W, C)
    dtype: str
    nodata: float | None = None  # as a GeoTIFF states it


def list_images(folder: str | Path) -> list[Path]:
    """The image files of a folder, sorted by name. Hidden files are left out."""
    files = Path(folder).iterdir()
    return sorted(file for file in files if file.suffix.lower() in ENDINGS and not file.name.startswith("."))


def image_info(path: Path) -> ImageInfo:
    """
    Reads size, dtype and nodata value of an image.

    :raises DataError: if the file cannot be read as an image
    """
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            with _open_raster(path) as raster:
                if len(set(raster.dtypes)) > 1:
                    raise ValueError(f"its bands have several dtypes ({', '.join(sorted(set(raster.dtypes)))})")
                return ImageInfo((raster.height, raster.width, raster.count), raster.dtypes[0], raster.nodata)
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            array = _read_whole(path)
        return ImageInfo(_three_dimensions(array).shape, str(array.dtype))
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError([f"{path}: cannot be read as an image ({_one_line(error)})"]) from error


def read_image(path: Path, window: Window | None = None) -> np.ndarray:
    """
    Reads an image, or a window of it.

    :return: (H, W, C) in the dtype of the file
    :raises DataError: if the file cannot be read as an image
    """
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            with _open_raster(path) as raster:
                part = None if window is None else ((window.top, window.top + window.height), _columns(window))
                return np.moveaxis(raster.read(window=part), 0, -1)
        if path.suffix.lower() == ".npy":
            array = _three_dimensions(np.load(path, mmap_mode="r", allow_pickle=False))
        else:
            array = _three_dimensions(_read_whole(path))
        if window is not None:
            array = array[window.top : window.top + window.height, slice(*_columns(window))]
        return np.array(array)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError([f"{path}: cannot be read as an image ({_one_line(error)})"]) from error


def _columns(window: Window) -> tuple[int, int]:
    return window.left, window.left + window.width


def _read_whole(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                raise ValueError(f"it holds {len(arrays.files)} arrays instead of one")
            return arrays[arrays.files[0]]
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"its ending is none of {', '.join(ENDINGS)}")
    with Image.open(path) as image:
        array = np.asarray(image)  # of palette images, the numbers
    return array.astype(np.uint8) if array.dtype == bool else array


def _open_raster(path: Path):
    import rasterio  # imported where used: the file formats of most projects do not need it
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # plain TIFFs are welcome
        return rasterio.open(path)


def _three_dimensions(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"its shape is {array.shape}, an image has (H, W) or (H, W, C)")
    if array.dtype.kind not in "buif":
        raise ValueError(f"its dtype is {array.dtype}, an image holds numbers")
    return array


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
