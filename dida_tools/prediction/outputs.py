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

from ..utils.data.contract import DataContract
from ..utils.data.images import Grid
from ..utils.files import sync_dir
from ..utils.locks import locked
from .windows import Band

NODATA = 255  # in uint8; NaN in float32
_STEPS = 254  # of uint8 from 0 to 1


class Output:
    """One kind of output: its values, and what pictures and rasters say about them."""

    def __init__(self, kind: str, contract: DataContract, dtype: str = "float32") -> None:
        """
        :param kind: "classes": uint8 numbers of the classes, for multi-label a 0 or 1 for each;
            "probabilities": of each class; "confidence": the probability of what was decided; "entropy":
            from 0 (sure) to 1 (all alike). For multi-label the latter two are of each class. Values of a
            regression stay as they are.
        :param dtype: of all but classes: "float32", or "uint8" for 0 to 254 instead of 0 to 1
        """
        self.kind, self.contract = "values" if contract.task == "values" else kind, contract
        self.is_classes = self.kind == "classes"
        self.is_uint8 = self.is_classes or (dtype == "uint8" and self.kind != "values")
        self.fill = NODATA if self.is_uint8 else float("nan")  # where there is no data
        self.scale = 1 / _STEPS if self.is_uint8 and not self.is_classes else 1.0
        is_decision = contract.task == "multi-class" and kind != "probabilities"
        self.is_single = is_decision or contract.outputs == 1  # one value a pixel
        self.colors = contract.colors() if self.is_classes and is_decision else []
        names = contract.class_names
        self.band_names = list(names) if not is_decision and len(names) == contract.outputs else []
        self.tags = {"OUTPUT": self.kind}
        if names:
            self.tags["CLASSES"] = ", ".join(f"{number}: {name}" for number, name in enumerate(names))

    def values(self, band: Band) -> np.ndarray:
        """Return what is written of some rows: (rows, W, bands)."""
        values = p = band.probabilities
        is_multi_class = self.contract.task == "multi-class"
        if self.is_classes:
            classes = self.contract.classes(torch.from_numpy(p)[None])[0].numpy()
            values = classes if classes.ndim == 3 else classes[None]
        elif self.kind == "confidence":
            values = p.max(0, keepdims=True) if is_multi_class else np.maximum(p, 1 - p)
        elif self.kind == "entropy":
            outcomes = p[:, None] if is_multi_class else np.stack([p, 1 - p])
            terms = -outcomes * np.log(np.maximum(outcomes, np.finfo(np.float32).tiny))
            values = terms.sum(0) / np.float32(np.log(max(2, len(outcomes))))
        if self.is_uint8 and not self.is_classes:
            values = np.rint(values * _STEPS).astype(np.uint8)
        values = np.where(band.valid, values, values.dtype.type(self.fill))
        return np.ascontiguousarray(np.moveaxis(values, 0, -1))


class OutputFile:
    """An image file that is written from top to bottom. It appears under its name when it is complete."""

    def __init__(self, path: Path, size: tuple[int, int], output: Output, grid: Grid | None) -> None:
        """
        :param path: the file, in an existing folder; what a killed process left of it is removed
        :param size: (H, W)
        :param grid: of a raster
        """
        self.path, self.size, self.output, self.grid = path, size, output, grid
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
        self._stream.write(values)

    def _complete(self) -> Path:
        return self._unfinished


class Picture(OutputFile):
    """A PNG, which shows classes in their colors."""

    def _complete(self) -> Path:
        picture = Image.fromarray(np.load(self._unfinished))
        if self.output.colors:
            palette = np.zeros((256, 3), np.uint8)
            palette[: len(self.output.colors)] = self.output.colors
            picture = picture.convert("P")  # the numbers stay
            picture.putpalette(palette.tobytes())
        picture.save(self._unfinished)
        return self._unfinished


class Raster(OutputFile):
    """A cloud-optimized GeoTIFF: tiles, compressed, with overviews. Its rows go into a plain one first."""

    def _open(self, num_bands: int, dtype: np.dtype) -> Any:
        import rasterio  # imported where used: other formats do not need it

        output, grid = self.output, self.grid or Grid("", None)
        profile: dict[str, Any] = {"dtype": dtype, "crs": grid.crs or None, "bigtiff": "if_safer"}
        profile["photometric"] = "minisblack"  # three classes are no red, green and blue
        if grid.transform is not None:
            profile["transform"] = rasterio.Affine.from_gdal(*grid.transform)
        if output.contract.nodata is not None:
            profile["nodata"] = output.fill
        height, width = self.size
        raster = rasterio.open(self._unfinished, "w", "GTiff", width, height, num_bands, **profile)
        raster.update_tags(**output.tags)
        raster.scales = [output.scale] * num_bands
        raster.descriptions = output.band_names or [""] * num_bands
        if output.colors:
            raster.write_colormap(1, dict(enumerate(output.colors)))
        return raster

    def _append(self, values: np.ndarray) -> None:
        rows = (self._num_rows, self._num_rows + len(values))
        self._stream.write(np.moveaxis(values, -1, 0), window=(rows, (0, self.size[1])))

    def _complete(self) -> Path:
        import rasterio.shutil

        file = self._folder / "complete.tif"
        between = "nearest" if self.output.is_classes else "average"  # of pixels, in overviews
        options = {"compress": "deflate", "overview_resampling": between, "bigtiff": "if_safer"}
        rasterio.shutil.copy(self._unfinished, file, driver="COG", **options)
        return file


# <- your file format here
FORMATS = {".npy": OutputFile, ".png": Picture, ".tif": Raster, ".tiff": Raster}


@contextmanager
def open_output(path: Path, size: tuple[int, int], output: Output, grid: Grid | None) -> Iterator[OutputFile]:
    """Begin a file that no other process can write meanwhile; what is not finished at the end is removed."""
    with only_writer(path), closing(FORMATS[path.suffix.lower()](path, size, output, grid)) as file:
        yield file


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
