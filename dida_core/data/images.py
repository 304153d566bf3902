"""
Read images and masks by the ending of their file: NumPy (.npy, .npz), PNG, JPEG, TIFF and GeoTIFF.

An image is (H, W, C), channels last, in the dtype of its file. Windows of .npy (which is memory-mapped) and
TIFF are read without the rest of the image. For a further format, add its ending, and a line to _open.
"""

import contextlib
import mmap
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from ..errors import Problems

ENDINGS = (".npy", ".npz", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
_WARNINGS = threading.Lock()  # threads share their filters
# numpy parses a header as Python text. Python 3.11 cannot parse in two threads at once: now and then it
# raises "AST constructor recursion depth mismatch".
_NUMPY_HEADERS = threading.Lock()


class DataError(Problems):
    """Data that cannot be used."""

    about = "the data"


def raise_if(problems: Iterable[str]) -> None:
    """Raise DataError if there are any problems."""
    if problems := list(problems):
        raise DataError(problems)


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


class ImageReader:
    """
    One image of one or several open files of the same size and dtype: their channels, in this order.

    Close it, or use it in a ``with`` statement. Of formats without windows (.npz, PNG, JPEG), all pixels are
    read when it is opened.
    """

    def __init__(self, *paths: Path) -> None:
        """
        :raises DataError: if a file cannot be read, or does not fit the first
        """
        self._files: list[tuple[Path, Any]] = []  # each with its array, or open dataset of rasterio
        infos = []
        with contextlib.ExitStack() as stack:
            for path in paths:
                with _named(path):
                    pixels = _open(path)
                    if not isinstance(pixels, np.ndarray):
                        stack.callback(pixels.close)
                    infos.append(_describe(pixels))
                self._files.append((path, pixels))
            first = infos[0]
            problems = [
                f"{path}: it has {one.shape[0]} x {one.shape[1]} pixels in {one.dtype}, {paths[0].name} has "
                f"{first.shape[0]} x {first.shape[1]} in {first.dtype}. Bring all bands onto one grid."
                for path, one in zip(paths, infos, strict=True)
                if (*one.shape[:2], one.dtype) != (*first.shape[:2], first.dtype)
            ]
            raise_if(problems)
            self._stack = stack.pop_all()
        self.shape = (*first.shape[:2], sum(one.shape[2] for one in infos))
        self.dtype, self.nodata = first.dtype, first.nodata

    @property
    def block_rows(self) -> int:
        """Rows of a block: reading fewer decodes it again and again."""
        pixels = self._files[0][1]
        return 1 if isinstance(pixels, np.ndarray) else int(pixels.block_shapes[0][0])

    @property
    def grid(self) -> Grid | None:
        """Where on the earth the pixels lie, as the first file states it; None for what is no TIFF."""
        pixels = self._files[0][1]
        if isinstance(pixels, np.ndarray):
            return None
        transform = None if pixels.transform.is_identity else tuple(map(float, pixels.transform.to_gdal()))
        return Grid(pixels.crs.to_wkt() if pixels.crs else "", transform, self.nodata)

    def read(self, window: Window | None = None) -> np.ndarray:
        """
        Return a window, or the entire image: (H, W, C) in the dtype of the files.

        :raises DataError: if it cannot be read
        """
        top, left, height, width = window or (0, 0, *self.shape[:2])
        rows, columns = (top, top + height), (left, left + width)
        parts = []
        for path, pixels in self._files:
            with _named(path):
                if not isinstance(pixels, np.ndarray):
                    parts.append(np.moveaxis(pixels.read(window=(rows, columns)), 0, -1))
                    continue
                parts.append(np.array(pixels[slice(*rows), slice(*columns)]))
                mapped = getattr(pixels, "_mmap", None)
                if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                    mapped.madvise(mmap.MADV_DONTNEED)  # else what was read counts as memory of this process
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def bands(self, max_values: int) -> Iterator[np.ndarray]:
        """Read it from top to bottom in bands of rows: at most max_values each, but at least one row."""
        height, width, channels = self.shape
        rows = max(1, max_values // (width * channels))
        for top in range(0, height, rows):
            yield self.read(Window(top, 0, min(rows, height - top), width))

    def sample(self, size: int = 64) -> np.ndarray:
        """Return some pixels (N, C) from nine places all over the image, read without the rest."""
        height, width, channels = self.shape
        rows, columns = min(size, height), min(size, width)
        tops = sorted({(height - rows) * part // 2 for part in range(3)})
        lefts = sorted({(width - columns) * part // 2 for part in range(3)})
        parts = [self.read(Window(top, left, rows, columns)) for top in tops for left in lefts]
        return np.concatenate([part.reshape(-1, channels) for part in parts])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def image_info(path: Path) -> ImageInfo:
    """Return size, dtype and nodata value of an image; raise DataError if it cannot be read."""
    with ImageReader(path) as image:
        return ImageInfo(image.shape, image.dtype, image.nodata)


def read_image(path: Path, window: Window | None = None) -> np.ndarray:
    """Return an image (H, W, C), or a window of it; raise DataError if it cannot be read."""
    with ImageReader(path) as image:
        return image.read(window)


def list_images(folder: str | Path) -> list[Path]:
    """Return the image files of a folder, sorted by name, without hidden files."""
    files = Path(folder).iterdir()
    return sorted(file for file in files if file.suffix.lower() in ENDINGS and not file.name.startswith("."))


def _open(path: Path) -> Any:
    """Return an array (H, W, C), in memory or mapped into it, or an open dataset of rasterio."""
    ending = path.suffix.lower()
    if ending in (".tif", ".tiff"):
        return _open_raster(path)
    if ending == ".npy":
        with _NUMPY_HEADERS:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    elif ending == ".npz":
        with _NUMPY_HEADERS, np.load(path, allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                raise ValueError(f"it holds {len(arrays.files)} arrays instead of one")
            array = arrays[arrays.files[0]]
    elif ending in ENDINGS:
        array = _load_picture(path)
    else:
        raise ValueError(f"its ending is none of {', '.join(ENDINGS)}")
    return array[:, :, None] if array.ndim == 2 else array


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


def _load_picture(path: Path) -> np.ndarray:
    with open(path, "rb") as stream:
        header = stream.read(26)
    if header.startswith(b"\x89PNG") and header[24:25] == b"\x10" and header[25:] != b"\x00":
        with _open_raster(path) as raster:
            return np.moveaxis(raster.read(), 0, -1)  # Pillow takes 16-bit colors for 8-bit ones
    with Image.open(path) as image:
        array = np.asarray(image)  # of palette images, the numbers
    return array.astype(np.uint8) if array.dtype == bool else array


def _describe(pixels: Any) -> ImageInfo:
    """Return size, dtype and nodata; raise ValueError for what is no image of real numbers."""
    if isinstance(pixels, np.ndarray):
        shape, dtype, nodata = pixels.shape, pixels.dtype, None
    else:
        shape, dtype = (pixels.height, pixels.width, pixels.count), np.dtype(pixels.dtypes[0])
        nodata = pixels.nodata
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"its shape is {shape}, an image has (H, W) or (H, W, C)")
    if dtype.kind not in "buif":
        raise ValueError(f"its dtype is {dtype}, an image holds real numbers")
    return ImageInfo(shape, dtype.name, nodata)


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
