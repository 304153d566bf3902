"""
Contains how images and masks are read, by the ending of their file: ``.npy`` (memory-mapped), ``.npz``, PNG, JPEG, TIFF
and GeoTIFF.

An image is (H, W, C) here, channels last, in the dtype of its file. Windows of ``.npy`` and TIFF files are read without
the rest of the image.
"""

import contextlib
import mmap
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...config.errors import UserError

ENDINGS = (".npy", ".npz", ".png", ".jpg", ".jpeg", ".tif", ".tiff")  # <- your formats here, and below
_RASTERS = (".tif", ".tiff")
_WARNINGS = threading.Lock()  # threads share their filters


# numpy reads a header as Python text, and Python 3.11 cannot parse in two threads at once: now and then it raises
# "AST constructor recursion depth mismatch".
_NUMPY_HEADERS = threading.Lock()


class DataError(UserError):
    """Data that cannot be used. Its message lists every problem."""

    def __init__(self, problems: Sequence[str], max_listed: int = 50) -> None:
        # A single string is what DataLoader passes on from its workers.
        self.problems = [problems] if isinstance(problems, str) else list(problems)
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
    with _named(path):
        if path.suffix.lower() in _RASTERS:
            with _open_raster(path) as raster:
                return ImageInfo((raster.height, raster.width, raster.count), raster.dtypes[0], raster.nodata)
        array = _open_array(path)
        return ImageInfo(array.shape, array.dtype.name)


def raster_grid(path: Path) -> dict[str, Any] | None:
    """
    Where a GeoTIFF lies: {"crs": WKT or "", "corners": four [x, y], in order}; None for what is not georeferenced.

    :raises DataError: if the file cannot be read as an image
    """
    if path.suffix.lower() not in _RASTERS:
        return None
    with _named(path), _open_raster(path) as raster:
        to_map = raster.transform
        if to_map.is_identity:
            return None
        ends = ((0, 0), (raster.width, 0), (raster.width, raster.height), (0, raster.height))
        corners = [
            [to_map.a * x + to_map.b * y + to_map.c, to_map.d * x + to_map.e * y + to_map.f] for x, y in ends
        ]
        return {"crs": raster.crs.to_wkt() if raster.crs else "", "corners": corners}


def read_image(path: Path, window: Window | None = None) -> np.ndarray:
    """
    Reads an image, or a window of it.

    :return: (H, W, C) in the dtype of the file
    :raises DataError: if the file cannot be read as an image
    """
    with _named(path):
        if path.suffix.lower() in _RASTERS:
            with _open_raster(path) as raster:
                part = None if window is None else (_rows(window), _columns(window))
                return np.moveaxis(raster.read(window=part), 0, -1)
        array = _open_array(path)
        return np.array(array if window is None else array[slice(*_rows(window)), slice(*_columns(window))])


class Grid(NamedTuple):
    """Where the pixels of a raster lie."""

    crs: str  # as WKT, or ""
    transform: tuple[float, ...] | None  # GDAL's six numbers
    nodata: float | None = None


class ImageReader:
    """
    An open image, read by windows; of formats without windows (.npz, PNG, JPEG) the whole image is kept.

    Several files of one size and dtype are the channels of one image, in their order.
    """

    def __init__(self, *paths: Path) -> None:
        """
        :raises DataError: if a file cannot be read, or does not fit to the first
        """
        self.paths, self._stack = paths, contextlib.ExitStack()
        self._sources: list[Any] = []
        try:
            infos = [self._open(path) for path in paths]
            problems = [
                f"{path}: it has {info.shape[0]} x {info.shape[1]} pixels in {info.dtype}, {paths[0].name} has "
                f"{infos[0].shape[0]} x {infos[0].shape[1]} in {infos[0].dtype}: bring all bands onto one grid"
                for path, info in zip(paths, infos, strict=True)
                if (*info.shape[:2], info.dtype) != (*infos[0].shape[:2], infos[0].dtype)
            ]
            if problems:
                raise DataError(problems)
        except BaseException:
            self._stack.close()
            raise
        self.shape = (*infos[0].shape[:2], sum(info.shape[2] for info in infos))
        self.dtype, self.nodata = infos[0].dtype, infos[0].nodata

    def _open(self, path: Path) -> ImageInfo:
        with _named(path):
            if path.suffix.lower() in _RASTERS:
                raster = self._stack.enter_context(_open_raster(path))
                self._sources.append(raster)
                return ImageInfo((raster.height, raster.width, raster.count), raster.dtypes[0], raster.nodata)
            array = _open_array(path)
            self._sources.append(array)
            return ImageInfo(array.shape, array.dtype.name)

    @property
    def block_rows(self) -> int:
        """Rows of the blocks in which the first file is stored: reading fewer decodes them again and again."""
        return self._sources[0].block_shapes[0][0] if self.paths[0].suffix.lower() in _RASTERS else 1

    @property
    def grid(self) -> Grid | None:
        """Where on the earth the pixels lie, if the first file tells."""
        if self.paths[0].suffix.lower() not in _RASTERS:
            return None
        raster = self._sources[0]
        transform = None if raster.transform.is_identity else tuple(map(float, raster.transform.to_gdal()))
        return Grid(raster.crs.to_wkt() if raster.crs else "", transform, raster.nodata)

    def read(self, window: Window) -> np.ndarray:
        """
        Reads a window.

        :return: (H, W, C) in the dtype of the files
        """
        rows, columns = _rows(window), _columns(window)
        parts = []
        for path, source in zip(self.paths, self._sources, strict=True):
            with _named(path):
                if isinstance(source, np.ndarray):
                    parts.append(np.array(source[slice(*rows), slice(*columns)]))
                    _forget(source)
                else:
                    parts.append(np.moveaxis(source.read(window=(rows, columns)), 0, -1))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def sample(self, edge: int = 64) -> np.ndarray:
        """Some pixels (N, C) from nine places all over the image, read without the rest."""
        height, width, channels = self.shape
        parts = [
            self.read(Window(top, left, min(edge, height), min(edge, width)))
            for top in sorted({(height - min(edge, height)) * part // 2 for part in range(3)})
            for left in sorted({(width - min(edge, width)) * part // 2 for part in range(3)})
        ]
        return np.concatenate([part.reshape(-1, channels) for part in parts])

    def __enter__(self) -> "ImageReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _forget(array: np.ndarray) -> None:
    """What was read of a memory-mapped file would count as memory of this process."""
    mapped = getattr(array.base if array.base is not None else array, "_mmap", None) or getattr(
        array, "_mmap", None
    )
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def read_bands(path: Path, max_values: int) -> Iterator[np.ndarray]:
    """
    Reads an image from top to bottom, in bands of whole rows that hold at most max_values, but at least one row.

    :return: (rows, W, C) each, in the dtype of the file
    :raises DataError: if the file cannot be read as an image
    """
    with (
        _named(path),
        contextlib.ExitStack() as stack,
    ):  # opened once: formats without windows are decoded once
        is_raster = path.suffix.lower() in _RASTERS
        source: Any = stack.enter_context(_open_raster(path)) if is_raster else _open_array(path)
        height, width, channels = (source.height, source.width, source.count) if is_raster else source.shape
        rows = max(1, max_values // (width * channels))
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            if is_raster:
                yield np.moveaxis(source.read(window=((top, bottom), (0, width))), 0, -1)
            else:
                yield source[top:bottom]


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors become a DataError with the file's name."""
    try:
        yield
    except Exception as error:  # damaged files make decoders raise all kinds
        raise DataError([f"{path}: cannot be read as an image ({_one_line(error)})"]) from error


def _rows(window: Window) -> tuple[int, int]:
    return window.top, window.top + window.height


def _columns(window: Window) -> tuple[int, int]:
    return window.left, window.left + window.width


def _open_array(path: Path) -> np.ndarray:
    """(H, W, C); of .npy files, nothing is read yet."""
    if path.suffix.lower() == ".npy":
        with _NUMPY_HEADERS:
            return _three_dimensions(np.load(path, mmap_mode="r", allow_pickle=False))
    return _three_dimensions(_read_whole(path))


def _read_whole(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npz":
        with _NUMPY_HEADERS, np.load(path, allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                raise ValueError(f"it holds {len(arrays.files)} arrays instead of one")
            return arrays[arrays.files[0]]
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"its ending is none of {', '.join(ENDINGS)}")
    with open(path, "rb") as stream:
        header = stream.read(26)
    if header.startswith(b"\x89PNG") and header[24:25] == b"\x10" and header[25:] != b"\x00":
        with _open_raster(path) as raster:  # Pillow takes 16-bit colors for 8-bit ones
            return np.moveaxis(raster.read(), 0, -1)
    with Image.open(path) as image:
        array = np.asarray(image)  # of palette images, the numbers
    return array.astype(np.uint8) if array.dtype == bool else array


def _open_raster(path: Path):
    import rasterio  # imported where used: the file formats of most projects do not need it
    from rasterio.errors import NotGeoreferencedWarning

    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # plain TIFFs are welcome
        raster = rasterio.open(path)
    if raster.subdatasets:
        problem = f"it holds {len(raster.subdatasets)} images instead of one"
    elif len(set(raster.dtypes)) > 1:
        problem = f"its bands have several dtypes ({', '.join(sorted(set(raster.dtypes)))})"
    elif np.dtype(raster.dtypes[0]).kind not in "buif":
        problem = f"its dtype is {raster.dtypes[0]}, an image holds real numbers"
    else:
        return raster
    raster.close()
    raise ValueError(problem)


def _three_dimensions(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"its shape is {array.shape}, an image has (H, W) or (H, W, C)")
    if array.dtype.kind not in "buif":
        raise ValueError(f"its dtype is {array.dtype}, an image holds real numbers")
    return array


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
