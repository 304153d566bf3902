"""What prediction writes: kinds of output, and files that get their name when they are complete."""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..utils.data.contract import DataContract
from ..utils.data.images import Grid
from ..utils.files import sync_dir
from ..utils.locks import locked
from .windows import Band

KINDS = ("classes", "probabilities", "confidence", "entropy")
DTYPES = ("float32", "uint8")
NODATA = 255  # in uint8; NaN in float32
_STEPS = 254  # of uint8 from 0 to 1


def make_output(kind: str, band: Band, contract: DataContract, dtype: str = "float32") -> np.ndarray:
    """
    Return what is written of some rows.

    :param kind: "classes": uint8 numbers of the classes, for multi-label a 0 or 1 for each; "probabilities": of each
        class; "confidence": the probability of what was decided; "entropy": from 0 (sure) to 1 (all alike). For
        multi-label the latter two are of each class. Values of a regression stay as they are, whatever the kind.
    :param dtype: of all but classes: "float32", or "uint8" for 0 to 254 instead of 0 to 1
    :return: (rows, W, bands); without data 255 in uint8 and NaN in float32
    """
    values = probabilities = band.probabilities
    is_multi_class = contract.task == "multi-class"
    if contract.task == "values" or kind == "probabilities":
        pass
    elif kind == "classes":
        classes = contract.classes(torch.from_numpy(probabilities)[None])[0].numpy()
        values = classes if classes.ndim == 3 else classes[None]
    elif kind == "confidence":
        of_each = np.maximum(probabilities, 1 - probabilities)
        values = probabilities.max(0, keepdims=True) if is_multi_class else of_each
    else:
        values = _entropy(probabilities, is_multi_class)
    if values.dtype != np.uint8 and dtype == "uint8" and contract.task != "values":
        values = np.rint(values * _STEPS).astype(np.uint8)
    values = np.where(band.valid, values, values.dtype.type(NODATA if values.dtype == np.uint8 else np.nan))
    return np.ascontiguousarray(np.moveaxis(values, 0, -1))


def _entropy(probabilities: np.ndarray, is_multi_class: bool) -> np.ndarray:
    def terms(p: np.ndarray) -> np.ndarray:
        return -p * np.log(np.maximum(p, np.finfo(np.float32).tiny))

    if is_multi_class:
        return terms(probabilities).sum(0, keepdims=True) / np.float32(np.log(max(2, len(probabilities))))
    return (terms(probabilities) + terms(1 - probabilities)) / np.float32(np.log(2))


class Style(NamedTuple):
    """What pictures and rasters say about their values."""

    nodata: float | None = None
    tags: dict[str, str] = {}
    names: tuple[str, ...] = ()  # of the bands
    colors: list[tuple[int, ...]] = []  # of the classes
    scale: float = 1.0


def style_of(kind: str, contract: DataContract, has_nodata: bool, dtype: str) -> Style:
    """Return the style of a kind of output."""
    is_values = contract.task == "values"
    is_classes = kind == "classes" and not is_values
    is_uint8 = is_classes or (dtype == "uint8" and not is_values)
    is_single = contract.task == "multi-class" and kind != "probabilities"
    names = contract.class_names
    tags = {"OUTPUT": "values" if is_values else kind}
    if names:
        tags["CLASSES"] = ", ".join(f"{number}: {name}" for number, name in enumerate(names))
    return Style(
        nodata=(NODATA if is_uint8 else float("nan")) if has_nodata else None,
        tags=tags,
        names=tuple(names) if not is_single and len(names) == contract.outputs else (),
        colors=contract.colors() if is_classes and is_single else [],
        scale=1 / _STEPS if is_uint8 and not is_classes else 1.0,
    )


class OutputFile:
    """An image file that is written from top to bottom. It appears under its name when it is complete."""

    def __init__(self, path: Path, size: tuple[int, int], style: Style, grid: Grid | None = None) -> None:
        """
        :param path: the file, in an existing folder; what a killed process left of it is removed
        :param size: (H, W)
        :param grid: of a raster
        """
        self.path, self.size, self.style, self.grid = path, size, style, grid
        self._folder = path.with_name(f".{path.name}.unfinished")
        self._unfinished = self._folder / f"rows{path.suffix}"
        self._num_rows = 0
        self._stream: Any = None  # what rows are written into
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()

    def write(self, values: np.ndarray) -> None:
        """Append rows (rows, W, bands)."""
        if self._stream is None:
            self._stream = self._open(values.shape[2], values.dtype)
        self._append(values)
        self._num_rows += len(values)

    def finish(self) -> None:
        """Give the file its name."""
        self._stream.close()
        file = self._complete()
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(file, self.path)
        sync_dir(self.path.parent)

    def close(self) -> None:
        """Remove what is unfinished."""
        if self._stream is not None:
            self._stream.close()
        shutil.rmtree(self._folder)

    def _open(self, num_bands: int, dtype: np.dtype) -> Any:
        stream = open(self._unfinished, "wb")  # noqa: SIM115  # pylint: disable=consider-using-with
        shape = self.size if num_bands == 1 else (*self.size, num_bands)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        return stream

    def _append(self, values: np.ndarray) -> None:
        self._stream.write(np.ascontiguousarray(values))

    def _complete(self) -> Path:
        return self._unfinished


class Picture(OutputFile):
    """A PNG, which shows classes in their colors."""

    def _complete(self) -> Path:
        picture = Image.fromarray(np.load(self._unfinished, mmap_mode="r"))
        if self.style.colors:
            picture = picture.convert("P")  # the numbers stay
            picture.putpalette([value for color in self.style.colors for value in color])
        file = self._folder / "picture.png"
        picture.save(file)
        return file


class Raster(OutputFile):
    """A cloud-optimized GeoTIFF: tiles, compressed, with overviews."""

    def _open(self, num_bands: int, dtype: np.dtype) -> Any:
        import rasterio  # imported where used: other formats do not need it

        style, grid = self.style, self.grid or Grid("", None)
        profile = {"driver": "GTiff", "count": num_bands, "dtype": dtype, "nodata": style.nodata, "crs": grid.crs}
        if grid.transform is not None:
            profile["transform"] = rasterio.Affine.from_gdal(*grid.transform)
        profile |= {"height": self.size[0], "width": self.size[1], "bigtiff": "if_safer"}
        raster = rasterio.open(self._unfinished, "w", **profile)
        raster.update_tags(**style.tags)
        raster.scales = (style.scale,) * num_bands
        for band, name in enumerate(style.names, 1):
            raster.set_band_description(band, name)
        if style.colors:
            raster.write_colormap(1, dict(enumerate(style.colors)))
        return raster

    def _append(self, values: np.ndarray) -> None:
        rows = (self._num_rows, self._num_rows + len(values))
        self._stream.write(np.moveaxis(values, -1, 0), window=(rows, (0, self.size[1])))

    def _complete(self) -> Path:
        import rasterio.shutil

        file = self._folder / "complete.tif"
        with rasterio.open(self._unfinished) as raster:
            is_classes = raster.dtypes[0] == "uint8" and self.style.scale == 1
        resampling = "nearest" if is_classes else "average"
        options = {"compress": "deflate", "overview_resampling": resampling, "bigtiff": "if_safer"}
        # pylint: disable-next=c-extension-no-member
        rasterio.shutil.copy(self._unfinished, file, driver="COG", **options)
        return file


# <- your file format here
FORMATS = {".npy": OutputFile, ".png": Picture, ".tif": Raster, ".tiff": Raster}
