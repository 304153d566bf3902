"""What prediction writes: kinds of output, and files that get their name when they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..data.contract import DataContract
from ..data.images import Grid
from ..storage.files import sync_dir
from ..storage.locks import locked
from .windows import Band

_STEPS = 254  # of uint8 from 0 to 1


class Output:
    """One kind of output: its values, and what pictures and rasters say about them."""

    def __init__(
        self, kind: str, contract: DataContract, dtype: str = "float32", lacks_data: bool = True
    ) -> None:
        """
        :param kind: "classes": uint8 numbers of the classes, for multi-label a 0 or 1 for each;
            "probabilities": of each class; "confidence": the probability of what was decided; "entropy":
            from 0 (sure) to 1 (all alike). For multi-label the latter two are of each class. Values of a
            regression stay as they are.
        :param dtype: of all but classes: "float32", or "uint8" for 0 to 254 instead of 0 to 1
        :param lacks_data: whether some pixels may hold no data
        """
        self.kind, self.contract = "values" if contract.task == "values" else kind, contract
        self.is_classes = self.kind == "classes"
        self.is_uint8 = self.is_classes or (dtype == "uint8" and self.kind != "values")
        self.dtype = np.dtype(np.uint8 if self.is_uint8 else np.float32)
        self.fill = 255 if self.is_uint8 else float("nan")  # where there is no data
        self.lacks_data = lacks_data
        self.scale = 1 / _STEPS if self.is_uint8 and not self.is_classes else 1.0
        is_decision = contract.task == "multi-class" and kind != "probabilities"
        self.num_bands = 1 if is_decision else contract.outputs
        self.fits_picture = self.is_uint8 and self.num_bands == 1
        self.colors = contract.colors() if self.is_classes and is_decision else []
        names = contract.class_names
        self.band_names = list(names) if not is_decision and len(names) == contract.outputs else []
        numbered = ", ".join(f"{number}: {name}" for number, name in enumerate(names))
        self.tags = {"OUTPUT": self.kind} | ({"CLASSES": numbered} if names else {})

    def values(self, band: Band) -> np.ndarray:
        """Return what is written of some rows: (rows, W, bands)."""
        values, is_multi_class = band.probabilities, self.contract.task == "multi-class"
        if self.is_classes:
            classes = self.contract.classes(torch.from_numpy(values)[None]).numpy()
            values = classes.reshape(self.num_bands, *band.valid.shape)
        elif self.kind == "confidence":
            values = values.max(0, keepdims=True) if is_multi_class else np.maximum(values, 1 - values)
        elif self.kind == "entropy":
            outcomes = values[:, None] if is_multi_class else np.stack([values, 1 - values])
            terms = -outcomes * np.log(np.maximum(outcomes, np.finfo(np.float32).tiny))
            values = terms.sum(0) / np.float32(np.log(max(2, len(outcomes))))
        if self.is_uint8 and not self.is_classes:
            values = np.rint(values * _STEPS).astype(np.uint8)
        values = np.where(band.valid, values, self.dtype.type(self.fill))
        return np.ascontiguousarray(np.moveaxis(values, 0, -1))


class OutputFile:
    """An image file that is written from top to bottom. It appears under its name when it is complete."""

    def __init__(
        self, path: Path, folder: Path, size: tuple[int, int], output: Output, grid: Grid | None
    ) -> None:
        """:param folder: holds what is unfinished"""
        self.path, self.folder, self.size, self.output, self.grid = path, folder, size, output, grid
        self.unfinished = folder / f"rows{path.suffix}"
        self.stream = self._open()

    def _open(self) -> Any:
        shape = self.size if self.output.num_bands == 1 else (*self.size, self.output.num_bands)
        header = {"descr": self.output.dtype.str, "fortran_order": False, "shape": shape}
        stream = open(self.unfinished, "wb")  # noqa: SIM115  # pylint: disable=consider-using-with
        np.lib.format.write_array_header_1_0(stream, header)
        return stream

    def write(self, values: np.ndarray) -> None:
        """Append rows (rows, W, bands)."""
        self.stream.write(values)

    def finish(self) -> None:
        """Give the file its name."""
        self.stream.close()
        file = self._complete()
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(file, self.path)
        sync_dir(self.path.parent)

    def _complete(self) -> Path:
        return self.unfinished


class Picture(OutputFile):
    """A PNG, which shows classes in their colors."""

    def _complete(self) -> Path:
        picture = Image.fromarray(np.load(self.unfinished))
        if self.output.colors:
            colors = bytes(value for color in self.output.colors for value in color)
            picture.putpalette(colors.ljust(256 * 3, b"\0"))
        info = PngInfo()
        for name, value in self.output.tags.items():
            info.add_text(name, value)
        picture.save(self.unfinished, pnginfo=info)
        return self.unfinished


class Raster(OutputFile):
    """A cloud-optimized GeoTIFF: tiles, compressed, with overviews. Its rows go into a plain one first."""

    num_rows = 0

    def _open(self) -> Any:
        import rasterio  # imported where used: other formats do not need it

        output, (height, width), grid = self.output, self.size, self.grid or Grid("", None)
        profile: dict[str, Any] = {"dtype": output.dtype, "crs": grid.crs or None, "bigtiff": "if_safer"}
        profile["photometric"] = "minisblack"  # three classes are no red, green and blue
        if grid.transform is not None:
            profile["transform"] = rasterio.Affine.from_gdal(*grid.transform)
        if output.lacks_data:
            profile["nodata"] = output.fill
        profile |= grid.points or {}
        raster = rasterio.open(self.unfinished, "w", "GTiff", width, height, output.num_bands, **profile)
        raster.update_tags(**output.tags)
        raster.scales = [output.scale] * output.num_bands
        raster.descriptions = output.band_names or [""] * output.num_bands
        if output.colors:
            raster.write_colormap(1, dict(enumerate(output.colors)))
        return raster

    def write(self, values: np.ndarray) -> None:
        """Append rows."""
        rows = (self.num_rows, self.num_rows + len(values))
        self.stream.write(np.moveaxis(values, -1, 0), window=(rows, (0, self.size[1])))
        self.num_rows += len(values)

    def _complete(self) -> Path:
        import rasterio.shutil

        file = self.folder / "complete.tif"
        between = "nearest" if self.output.is_classes else "average"  # of pixels, in overviews
        options = {"compress": "deflate", "overview_resampling": between, "bigtiff": "if_safer"}
        rasterio.shutil.copy(self.unfinished, file, driver="COG", **options)
        return file


# <- your file format here
FORMATS = {".npy": OutputFile, ".png": Picture, ".tif": Raster, ".tiff": Raster}


@contextmanager
def open_output(path: Path, size: tuple[int, int], output: Output, grid: Grid | None) -> Iterator[OutputFile]:
    """Begin a file that no other process can write meanwhile; what is not finished at the end is removed."""
    folder = path.with_name(f".{path.name}.unfinished")
    with only_writer(path):
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
        folder.mkdir()
        try:
            file = FORMATS[path.suffix.lower()](path, folder, size, output, grid)
            with closing(file.stream):
                yield file
        finally:
            shutil.rmtree(folder)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """
    Keep other processes from writing a file, until this one has ended, however it ends.

    :raises UserError: if another process writes it
    """
    lock = path.with_name(f".{path.name}.lock")
    busy = f"{path.parent}: another prediction is writing {path.name} there: wait until it has ended, "
    with locked(lock, 0, busy + "or give another OUT_DIR."):
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                lock.unlink()  # while it is held: whoever has opened it by then is refused, for it is gone
