"""
Read images and masks by the ending of their file: NumPy (.npy, .npz), pictures (PNG, JPEG, WebP, BMP, ...),
GeoTIFF, other TIFFs, and JPEG 2000.

An image is (H, W, C), channels last, in the dtype of its file. Windows of .npy (which is memory-mapped) and
TIFF are read without the rest of the image. For a format more that Pillow or rasterio reads, add its ending.

What a file states about itself counts: which pixels hold no data (nodata, masks inside and beside it, alpha
of 0), scale and offset, palette, orientation, place. What does not count is refused.
"""

import contextlib
import mmap
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ..errors import Problems

ARRAYS, _RASTERS = (".npy", ".npz"), (".tif", ".tiff", ".jp2")
PICTURES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".gif", ".pgm", ".ppm")
ENDINGS = ARRAYS + PICTURES + _RASTERS
_SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")
_ORIENTATION, _TURNED = 274, range(2, 9)  # a tag of EXIF and TIFF, and what it holds where pixels are turned
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
    nodata: float | None = None  # as a GeoTIFF states it, of all channels


class Grid(NamedTuple):
    """Where the pixels of a raster lie."""

    crs: str  # as WKT, or ""
    transform: tuple[float, ...] | None  # GDAL's six numbers
    points: dict[str, Any] | None = None  # control points ("gcps") and coefficients ("rpcs"), for rasterio


Place = dict[str, Any]  # {"crs": WKT, "corners": four [x, y], in order round it}


class ImageReader:
    """
    One image of one or several open files of the same size, dtype and place: their channels, in this order.

    Close it, or use it in a ``with`` statement. Of formats without windows (.npz, PNG, JPEG), all pixels are
    read when it is opened.
    """

    def __init__(self, *paths: Path, is_mask: bool = False) -> None:
        """
        :param is_mask: read class numbers: of a palette the indices instead of the colors. Nodata of 0 and
            alpha channels are not believed then: many programs state them where 0 is simply the first class
        :raises DataError: if a file cannot be read, or does not fit the first
        """
        self._files: list[_File] = []
        with contextlib.ExitStack() as stack:
            for path in paths:
                with _named(path):
                    self._files.append(_File(path, is_mask, stack))
            first = self._files[0]
            remedy = "Bring all bands onto one grid"
            problems = [
                f"{one.path}: it has {one.shape[0]} x {one.shape[1]} pixels in {one.dtype}, "
                f"{first.path.name} has {first.shape[0]} x {first.shape[1]} in {first.dtype}. {remedy}."
                for one in self._files
                if (*one.shape[:2], one.dtype) != (*first.shape[:2], first.dtype)
            ]
            placed = next((one for one in self._files if one.place), first)
            for one in self._files if not problems else ():
                if away := elsewhere(one.place, placed.place, first.shape, placed.path.name):
                    problems.append(f"{one.path}: {away}. {remedy}.")
            raise_if(problems)
            self._stack = stack.pop_all()
        self.shape = (*first.shape[:2], sum(one.shape[2] for one in self._files))
        self.grid, self.place = placed.grid, placed.place  # None for what lies nowhere
        nodata = {str(value): value for one in self._files for value in one.nodata}
        self.dtype, self.nodata = first.dtype, nodata.popitem()[1] if len(nodata) == 1 else None
        self.lacks_data = any(one.lacks_data for one in self._files)  # some pixels, as the files state it

    @property
    def block_rows(self) -> int:
        """Rows of a block: reading fewer decodes it again and again."""
        file = self._files[0]
        return 1 if file.array is not None else int(file.raster.block_shapes[0][0])

    def read(self, window: Window | None = None) -> np.ndarray:
        """
        Return a window, or the entire image: (H, W, C) in the dtype of the files.

        :raises DataError: if it cannot be read
        """
        return self.read_masked(window)[0]

    def read_masked(self, window: Window | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the same, and which pixels hold data as the files state it, (H, W) bool."""
        top, left, height, width = window or (0, 0, *self.shape[:2])
        parts = []
        for file in self._files:
            with _named(file.path):
                parts.append(file.read((top, top + height), (left, left + width)))
        if len(parts) == 1:
            return parts[0]
        pixels, valid = zip(*parts, strict=True)
        return np.concatenate(pixels, axis=-1), np.logical_and.reduce(valid)

    def windows(self, max_values: int) -> Iterator[Window]:
        """Divide it from top to bottom into bands of rows: at most max_values each, but at least one row."""
        height, width, channels = self.shape
        rows = max(1, max_values // (width * channels))
        for top in range(0, height, rows):
            yield Window(top, 0, min(rows, height - top), width)

    def bands(self, max_values: int) -> Iterator[np.ndarray]:
        """Read it by such windows."""
        return map(self.read, self.windows(max_values))

    def sample(self, size: int = 64) -> np.ndarray:
        """Return some pixels with data (N, C) from nine places all over the image, read without the rest."""
        height, width, _ = self.shape
        rows, columns = min(size, height), min(size, width)
        tops = sorted({(height - rows) * part // 2 for part in range(3)})
        lefts = sorted({(width - columns) * part // 2 for part in range(3)})
        parts = [self.read_masked(Window(top, left, rows, columns)) for top in tops for left in lefts]
        return np.concatenate([pixels[valid] for pixels, valid in parts])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def image_info(path: Path, is_mask: bool = False) -> ImageInfo:
    """Return size, dtype and nodata value of an image; raise DataError if it cannot be read."""
    with ImageReader(path, is_mask=is_mask) as image:
        return ImageInfo(image.shape, image.dtype, image.nodata)


def read_image(path: Path, window: Window | None = None) -> np.ndarray:
    """Return an image (H, W, C), or a window of it; raise DataError if it cannot be read."""
    return read_masked(path, window)[0]


def read_masked(path: Path, window: Window | None = None, is_mask: bool = False) -> Any:
    """Return the same, and which of its pixels hold data; see ImageReader.read_masked."""
    with ImageReader(path, is_mask=is_mask) as image:
        return image.read_masked(window)


def has_data(pixels: np.ndarray, nodata: float | Sequence[float | None] | None) -> np.ndarray:
    """
    Return which pixels (..., C) hold data: not those that are nodata in any channel. In 8 bits, where a
    color may hold any value, not those that are nodata in every channel.

    :param nodata: a value for all channels, or one for each
    """
    if isinstance(nodata, Sequence) and len({str(value) for value in nodata}) > 1:
        missing = np.stack([~has_data(pixels[..., [one]], value) for one, value in enumerate(nodata)], -1)
        return np.logical_not(missing.any(-1))
    nodata = nodata[0] if isinstance(nodata, Sequence) else nodata
    if nodata is None:
        return np.ones(pixels.shape[:-1], bool)
    missing = np.isnan(pixels) if np.isnan(nodata) else pixels == nodata
    return np.logical_not(missing.all(-1) if pixels.dtype == np.uint8 else missing.any(-1))


def elsewhere(place: Place | None, other: Place | None, shape: Sequence[int], name: str) -> str:
    """
    Return a sentence if the pixels of two rasters of a shape do not lie on one another, to half a pixel.

    :param name: what the sentence calls the other
    """
    if not place or not other:
        return ""
    corners, others = np.array(place["corners"]), np.array(other["corners"])
    if place["crs"] and other["crs"]:
        corners = into_crs(corners, place["crs"], other["crs"])
    pixel = np.linalg.norm(np.diff(others, axis=0)[:2], axis=1) / (shape[1], shape[0])
    if (abs(corners - others) <= pixel.min() / 2).all():
        return ""

    def extent(of: Place) -> str:
        (left, top), (right, bottom) = of["corners"][0], of["corners"][2]
        crs = of["crs"].split('"')[1] if '"' in of["crs"] else "no coordinate system"
        return f"({left:.10g}, {top:.10g}) to ({right:.10g}, {bottom:.10g}) in {crs}"

    return f"it lies at {extent(place)}, {name} at {extent(other)}"


def into_crs(points: np.ndarray, crs: str, other: str) -> np.ndarray:
    """Return points (n, 2) in another coordinate system; NaN where there is no way into it."""
    if crs == other:
        return points
    from rasterio.warp import transform

    found = np.full(points.shape, np.nan)
    if crs and other:
        with contextlib.suppress(Exception):  # of many kinds
            found = np.transpose(transform(crs, other, *points.T))
    return np.where(np.isfinite(found), found, np.nan)


def files_beside(image: Path) -> list[Path]:
    """Return the files that state more about an image: where it lies, its mask."""
    ending = image.suffix
    worlds = [f".{ending[1]}{ending[-1]}w", f"{ending}w", ".wld"]
    names = [image.with_suffix(one) for way in (str.lower, str.upper) for one in map(way, worlds)]
    names += [Path(f"{image}{one}") for one in (".aux.xml", ".msk")]
    return [name for name in names if name.exists()]


def list_images(folder: str | Path) -> list[Path]:
    """Return the image files of a folder, sorted by name, without hidden files."""
    files = Path(folder).iterdir()
    return sorted(file for file in files if file.suffix.lower() in ENDINGS and not _is_hidden(file.name))


def left_out(folder: str | Path) -> list[str]:
    """Return what a folder holds besides images, and what belongs to them such as a.tfw, by name."""
    images = {file.name for file in list_images(folder)}
    stems = {Path(name).stem for name in images}
    names = sorted(file.name for file in Path(folder).iterdir() if not _is_hidden(file.name))
    return [name for name in names if name not in images and name.partition(".")[0] not in stems]


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name.lower() in _SYSTEM_FILES


class _File:
    """One open file: its pixels, in memory or read by windows, and what it states about them."""

    def __init__(self, path: Path, is_mask: bool, stack: contextlib.ExitStack) -> None:
        """:param stack: closes it"""
        self.path = path
        self.array, self.raster, self._alpha = _open(path, is_mask, stack)
        self.grid: Grid | None = None
        self.place: Place | None = None
        self._stated: Sequence[float | None] = [None]  # nodata of each channel, as it is stored
        self._mask_bands: list[int] = []  # those that have a mask of their own
        self._table: np.ndarray | None = None  # what stored numbers stand for, (N, C): a palette
        self._scaling: tuple[np.ndarray, np.ndarray] | None = None
        if self.array is None:
            shape = (self.raster.height, self.raster.width, self.raster.count)
            dtype = np.dtype(self.raster.dtypes[0])
        else:
            shape, dtype = self.array.shape, self.array.dtype
        if len(shape) != 3 or 0 in shape:
            raise ValueError(f"its shape is {shape}, an image has (H, W) or (H, W, C)")
        if dtype.kind not in "buif":
            raise ValueError(f"its dtype is {dtype}, an image holds real numbers")
        if self.raster is not None:
            self._describe(dtype, is_mask)
        self.nodata = self._stated  # as it is read
        if self._table is not None:
            shape, dtype, self.nodata = (*shape[:2], self._table.shape[1]), self._table.dtype, [None]
        if self._scaling is not None:
            dtype = np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)
            self.nodata = [None if value is None else np.nan for value in self.nodata]
        self.shape, self.dtype = shape, dtype.name
        has_mask = self._alpha is not None or bool(self._mask_bands)
        self.lacks_data = has_mask or any(value is not None for value in self._stated)

    def _describe(self, dtype: np.dtype, is_mask: bool) -> None:
        """Take what GDAL knows of the file."""
        from rasterio.enums import ColorInterp, MaskFlags

        raster, kinds = self.raster, list(self.raster.colorinterp)
        self.grid, self.place = _grid(raster)
        self._stated = [value or None if is_mask else value for value in raster.nodatavals]
        of_values = {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha}
        flags = raster.mask_flag_enums
        self._mask_bands = [band for band, own in enumerate(flags, 1) if not of_values & set(own)]
        if (set(raster.scales), set(raster.offsets)) != ({1.0}, {0.0}):
            self._scaling = np.array(raster.scales), np.array(raster.offsets)
        about = raster.tags(ns="IMAGE_STRUCTURE")
        if (colors := about.get("SOURCE_COLOR_SPACE", "YCbCr")) != "YCbCr":
            raise ValueError(f"its colors are {colors}: convert them to RGB")
        if self.array is not None and len(kinds) != self.array.shape[2]:
            return  # the colors of a palette
        if ColorInterp.alpha in kinds and not is_mask and self._alpha is None:
            self._alpha = kinds.index(ColorInterp.alpha)
        if "MINISWHITE" in about:
            if is_mask or dtype.kind != "u" or dtype.itemsize > 2:
                raise ValueError("its 0 is white (MINISWHITE): save it with 0 as black, or as class 0")
            bits = int(raster.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8 * dtype.itemsize))
            self._table = np.arange(2**bits - 1, -1, -1).astype(dtype)[:, None]
        elif kinds[0] == ColorInterp.palette and not is_mask:
            palette = raster.colormap(1)
            colors = np.array([palette.get(one, (0, 0, 0))[:3] for one in range(max(palette) + 1)], np.uint8)
            if colors[:2].tolist() != [[0] * 3, [255] * 3]:  # as black and white pictures have it
                self._table = colors

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return a window (H, W, C), and which of its pixels hold data, (H, W)."""
        part = slice(*rows), slice(*columns)
        if self.array is None:
            pixels = np.moveaxis(self.raster.read(window=(rows, columns)), 0, -1)
        else:
            pixels = np.array(self.array[part])
            mapped = getattr(self.array, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)  # else what was read counts as memory of this process
        valid = has_data(pixels, self._stated)
        if self._alpha is not None:
            valid &= (pixels[..., self._alpha] if isinstance(self._alpha, int) else self._alpha[part]) != 0
        if self._mask_bands:
            valid &= self.raster.read_masks(self._mask_bands, window=(rows, columns)).all(0)
        if self._table is not None:
            pixels = self._table[pixels[..., 0]]
        if self._scaling is not None:
            pixels = (pixels * self._scaling[0] + self._scaling[1]).astype(self.dtype)
            pixels[~valid] = np.nan
        return pixels, valid


def _open(path: Path, is_mask: bool, stack: contextlib.ExitStack) -> tuple[np.ndarray | None, Any, Any]:
    """
    Return what there is of a file: an array (H, W, C), in memory or mapped into it; an open dataset of
    rasterio; its transparency (H, W).
    """
    ending, raster, alpha = path.suffix.lower(), None, None
    if ending in _RASTERS:
        raster = _open_raster(path, stack)
        if raster.driver == "GTiff" and (turned := _orientation(path)) in _TURNED:
            raise ValueError(f"its pixels are stored turned (orientation {turned}): save it upright")
        return None, raster, None
    if ending == ".npy":
        with _NUMPY_HEADERS:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    elif ending == ".npz":
        with _NUMPY_HEADERS, np.load(path, allow_pickle=False) as arrays:
            if len(arrays.files) != 1:
                raise ValueError(f"it holds {len(arrays.files)} arrays instead of one")
            array = arrays[arrays.files[0]]
    elif ending in PICTURES:
        array, raster, alpha = _load_picture(path, is_mask, stack)
    else:
        raise ValueError(f"its ending is none of {', '.join(ENDINGS)}")
    return (array[:, :, None] if array.ndim == 2 else array), raster, alpha


def _open_raster(path: Path, stack: contextlib.ExitStack) -> Any:
    import rasterio  # imported where used: the file formats of most projects do not need it
    from rasterio.errors import NotGeoreferencedWarning

    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # plain TIFFs are welcome
        raster = stack.enter_context(rasterio.open(path))
    if raster.subdatasets:
        raise ValueError(f"it holds {len(raster.subdatasets)} images instead of one")
    if len(set(raster.dtypes)) > 1:
        raise ValueError(f"its bands have several dtypes ({', '.join(sorted(set(raster.dtypes)))})")
    return raster


def _orientation(path: Path) -> int:
    """Return how a TIFF is turned, which GDAL does not tell."""
    with open(path, "rb") as stream:
        header = stream.read(16)
        tags = ImageFileDirectory_v2(header if header[2] == 43 else header[:8])  # 43: BigTIFF
        stream.seek(tags.next)
        tags.load(stream)
    return tags.get(_ORIENTATION, 1)


def _grid(raster: Any) -> tuple[Grid, Place | None]:
    """Return where a raster lies, and its corners if they are known."""
    from rasterio.transform import from_gcps

    (control, crs), coefficients = raster.gcps, raster.rpcs
    points = ({"gcps": control} if control else {}) | ({"rpcs": coefficients} if coefficients else {})
    transform = None if raster.transform.is_identity else raster.transform
    crs = raster.crs or crs
    numbers = None if transform is None else tuple(map(float, transform.to_gdal()))
    grid = Grid(crs.to_wkt() if crs else "", numbers, points or None)
    if transform is None and len(control) > 2:
        transform = from_gcps(control)
    if transform is None:
        return grid, None
    (c, a, b, f, d, e), width, height = transform.to_gdal(), raster.width, raster.height
    ends = ((0, 0), (width, 0), (width, height), (0, height))
    corners = [[a * x + b * y + c, d * x + e * y + f] for x, y in ends]
    return grid, {"crs": grid.crs, "corners": corners}


def _load_picture(path: Path, is_mask: bool, stack: contextlib.ExitStack) -> tuple[np.ndarray, Any, Any]:
    with open(path, "rb") as stream:
        header = stream.read(26)
    is_deep = header.startswith(b"\x89PNG") and header[24:25] == b"\x10" and header[25:] != b"\x00"
    raster = _open_raster(path, stack) if is_deep or files_beside(path) else None
    alpha = None
    with _opened_picture(path) as image:
        number = getattr(image, "n_frames", 1)
        if number > 1 and image.format != "MPO":  # a photo's others are previews
            raise ValueError(f"it holds {number} images instead of one")
        if image.mode in ("CMYK", "LAB", "HSV", "YCbCr"):
            raise ValueError(f"its colors are {image.mode}: convert them to RGB")
        if image.getexif().get(_ORIENTATION) in _TURNED and raster is not None:
            raise ValueError("EXIF turns it, but no file beside it, nor 16-bit colors: save it upright")
        if is_deep and raster is not None:  # Pillow takes 16-bit colors for 8-bit ones
            return np.moveaxis(raster.read(), 0, -1), raster, None
        picture: Image.Image = ImageOps.exif_transpose(image)
        if picture.has_transparency_data and not is_mask:
            alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
        if picture.mode in ("P", "PA") and not is_mask:
            picture = picture.convert("RGBA").convert("RGB")
        array = np.asarray(picture)
    return (array.astype(np.uint8) if array.dtype == bool else array), raster, alpha


def _opened_picture(path: Path) -> Image.Image:
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large images are welcome
        try:
            return Image.open(path)
        except Image.DecompressionBombError as error:
            remedy = "save it as GeoTIFF or .npy, or raise PIL.Image.MAX_IMAGE_PIXELS"
            raise ValueError(f"it has more pixels than Pillow opens at once: {remedy}") from error


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn any error into a DataError with the file's name: damaged files make decoders raise all kinds."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ if type(error).__module__.startswith("rasterio") else None
        reason = " ".join(str(cause or error).split()) or type(error).__name__  # rasterio says: see its cause
        raise DataError([f"{path}: cannot be read as an image ({reason})"]) from error
