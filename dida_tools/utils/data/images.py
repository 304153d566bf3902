"""
Read images and masks by the ending of their file: NumPy (.npy, .npz), PNG, JPEG, TIFF and GeoTIFF.

An image is (H, W, C), channels last, in the dtype of its file. Windows of .npy (which is memory-mapped) and
TIFF are read without the rest of the image. For a further format, add its ending, and a line to open_image.
"""

import contextlib
import mmap
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from ...config.errors import Problems

ENDINGS = (".npy", ".npz", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
_WARNINGS = threading.Lock()  # threads share their filters
# numpy parses a header as Python text. Python 3.11 cannot parse in two threads at once: now and then it
# raises "AST constructor recursion depth mismatch".
_NUMPY_HEADERS = threading.Lock()


class DataError(Problems):
    """Data that cannot be used."""

    about = "the data"


class Window(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class ImageInfo:
    """Size, dtype and nodata of an image, known without reading its pixels."""

    shape: tuple[int, int, int]  # (H, W, C)
    dtype: str
    nodata: float | None = None  # as a GeoTIFF states it


class Grid(NamedTuple):
    """Where the pixels of a raster lie."""

    crs: str  # as WKT, or ""
    transform: tuple[float, ...] | None  # GDAL's six numbers
    nodata: float | None = None


class Source:
    """An open image file, read by windows. Close it, or use it in a ``with`` statement."""

    nodata: float | None = None
    block_rows = 1  # rows of a block: reading fewer decodes it again and again

    def __init__(self, path: Path, pixels: Any) -> None:
        """:param pixels: an array, in memory or mapped into it, or an open dataset of rasterio"""
        self.path, self._pixels, self._is_raster = path, pixels, not isinstance(pixels, np.ndarray)
        if self._is_raster:
            self.shape, dtype = (pixels.height, pixels.width, pixels.count), np.dtype(pixels.dtypes[0])
            self.nodata, self.block_rows = pixels.nodata, pixels.block_shapes[0][0]
        else:
            self._pixels = pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
            self.shape, dtype = pixels.shape, pixels.dtype
        if len(self.shape) != 3 or 0 in self.shape:
            raise ValueError(f"its shape is {self.shape}, an image has (H, W) or (H, W, C)")
        if dtype.kind not in "buif":
            raise ValueError(f"its dtype is {dtype}, an image holds real numbers")
        self.dtype = dtype.name

    @property
    def grid(self) -> Grid | None:
        """Where on the earth the pixels lie; None for what is no TIFF."""
        if not self._is_raster:
            return None
        to_map, crs = self._pixels.transform, self._pixels.crs
        transform = None if to_map.is_identity else tuple(map(float, to_map.to_gdal()))
        return Grid(crs.to_wkt() if crs else "", transform, self.nodata)

    def read(self, window: Window | None = None) -> np.ndarray:
        """
        Return a window, or the entire image: (H, W, C) in the dtype of the file.

        :raises DataError: if it cannot be read
        """
        top, left, height, width = window or (0, 0, *self.shape[:2])
        rows, columns = (top, top + height), (left, left + width)
        with _named(self.path):
            if self._is_raster:
                return np.moveaxis(self._pixels.read(window=(rows, columns)), 0, -1)
            pixels = np.array(self._pixels[slice(*rows), slice(*columns)])
            mapped = getattr(self._pixels, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)  # else what was read counts as memory of this process
            return pixels

    def close(self) -> None:
        """Close the file."""
        if self._is_raster:
            self._pixels.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_image(path: Path) -> Source:
    """
    Open an image. Of formats without windows (.npz, PNG, JPEG), all pixels are read now.

    :raises DataError: if the file cannot be read as an image
    """
    ending = path.suffix.lower()
    with _named(path):
        if ending in (".tif", ".tiff"):
            return Source(path, _open_raster(path))
        if ending == ".npy":
            with _NUMPY_HEADERS:
                return Source(path, np.load(path, mmap_mode="r", allow_pickle=False))
        if ending == ".npz":
            return Source(path, _load_archive(path))
        if ending in ENDINGS:
            return Source(path, _load_picture(path))
        raise ValueError(f"its ending is none of {', '.join(ENDINGS)}")


def _open_raster(path: Path) -> Any:
    import rasterio  # imported where used: the file formats of most projects do not need it
    from rasterio.errors import NotGeoreferencedWarning

    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # plain TIFFs are welcome
        raster = rasterio.open(path)
    if raster.subdatasets:
        raise ValueError(f"it holds {len(raster.subdatasets)} images instead of one")
    if len(set(raster.dtypes)) > 1:
        raise ValueError(f"its bands have several dtypes ({', '.join(sorted(set(raster.dtypes)))})")
    return raster


def _load_archive(path: Path) -> np.ndarray:
    with _NUMPY_HEADERS, np.load(path, allow_pickle=False) as arrays:
        if len(arrays.files) != 1:
            raise ValueError(f"it holds {len(arrays.files)} arrays instead of one")
        return arrays[arrays.files[0]]


def _load_picture(path: Path) -> np.ndarray:
    with open(path, "rb") as stream:
        header = stream.read(26)
    if header.startswith(b"\x89PNG") and header[24:25] == b"\x10" and header[25:] != b"\x00":
        with Source(path, _open_raster(path)) as source:
            return source.read()  # Pillow takes 16-bit colors for 8-bit ones
    with Image.open(path) as image:
        array = np.asarray(image)  # of palette images, the numbers
    return array.astype(np.uint8) if array.dtype == bool else array


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn any error into a DataError with the file's name: damaged files make decoders raise all kinds."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError([f"{path}: cannot be read as an image ({reason})"]) from error


def list_images(folder: str | Path) -> list[Path]:
    """Return the image files of a folder, sorted by name, without hidden files."""
    files = Path(folder).iterdir()
    return sorted(file for file in files if file.suffix.lower() in ENDINGS and not file.name.startswith("."))


def image_info(path: Path) -> ImageInfo:
    """Return size, dtype and nodata value of an image; raise DataError if it cannot be read."""
    with open_image(path) as source:
        return ImageInfo(source.shape, source.dtype, source.nodata)


def read_image(path: Path, window: Window | None = None) -> np.ndarray:
    """Return an image (H, W, C), or a window of it; raise DataError if it cannot be read."""
    with open_image(path) as source:
        return source.read(window)


def read_bands(path: Path, max_values: int) -> Iterator[np.ndarray]:
    """Read an image from top to bottom in bands of rows: at most max_values each, but at least one row."""
    with open_image(path) as source:
        height, width, channels = source.shape
        rows = max(1, max_values // (width * channels))
        for top in range(0, height, rows):
            yield source.read(Window(top, 0, min(rows, height - top), width))


class ImageReader:
    """One image of one or several open files of the same size and dtype: their channels, in this order."""

    def __init__(self, *paths: Path) -> None:
        """
        :raises DataError: if a file cannot be read, or does not fit the first
        """
        with contextlib.ExitStack() as stack:
            self._sources = [stack.enter_context(open_image(path)) for path in paths]
            first = self._sources[0]
            problems = [
                f"{one.path}: it has {one.shape[0]} x {one.shape[1]} pixels in {one.dtype}, {paths[0].name} "
                f"has {first.shape[0]} x {first.shape[1]} in {first.dtype}. Bring all bands onto one grid."
                for one in self._sources
                if (*one.shape[:2], one.dtype) != (*first.shape[:2], first.dtype)
            ]
            if problems:
                raise DataError(problems)
            self._stack = stack.pop_all()
        self.shape = (*first.shape[:2], sum(source.shape[2] for source in self._sources))
        self.dtype, self.nodata, self.block_rows = first.dtype, first.nodata, first.block_rows

    @property
    def grid(self) -> Grid | None:
        """Where on the earth the pixels lie, if the first file states it."""
        return self._sources[0].grid

    def read(self, window: Window) -> np.ndarray:
        """Return a window: (H, W, C) in the dtype of the files."""
        parts = [source.read(window) for source in self._sources]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def sample(self, size: int = 64) -> np.ndarray:
        """Return some pixels (N, C) from nine places all over the image, read without the rest."""
        height, width, channels = self.shape
        rows, columns = min(size, height), min(size, width)
        tops, lefts = (
            {length * part // 2 for part in range(3)} for length in (height - rows, width - columns)
        )
        parts = [
            self.read(Window(top, left, rows, columns)) for top in sorted(tops) for left in sorted(lefts)
        ]
        return np.concatenate([part.reshape(-1, channels) for part in parts])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
