"""
Contains what prediction writes: kinds of output, and files that are filled band by band. A file gets its name when it
is whole; until then its rows lie beside it, so that a prediction that was killed goes on where it was.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import torch
from PIL import Image

from ..utils.data.contract import DataContract
from ..utils.data.images import Grid
from ..utils.files import sync_dir, write_atomic
from ..utils.locks import locked
from .windows import Band

KINDS = ("classes", "probabilities", "confidence", "entropy")
DTYPES = ("float32", "uint8")
NODATA = 255  # in uint8; NaN in float32
_STEPS = 254  # of uint8 from 0 to 1
_CHECK_BYTES = 2**22
_GDAL_TYPES = {"uint8": "Byte", "float32": "Float32"}


def make_output(kind: str, band: Band, contract: DataContract, dtype: str = "float32") -> np.ndarray:
    """
    What is written of some rows.

    :param kind: "classes": uint8 numbers of the classes, for multi-label a 0 or 1 for each; "probabilities": of each
        class; "confidence": the probability of what was decided; "entropy": from 0 (sure) to 1 (all alike). For
        multi-label the latter two are of each class. Values of a regression stay as they are, whatever the kind.
    :param dtype: of all but classes: "float32", or "uint8" for 0 to 254 instead of 0 to 1
    :return: (rows, W, bands); without data 255 in uint8 and NaN in float32
    """
    probabilities = band.probabilities
    if contract.task == "values":
        values = probabilities
    elif kind == "classes":
        classes = contract.classes(torch.from_numpy(probabilities)[None])[0].numpy()
        values = classes if classes.ndim == 3 else classes[None]
    elif kind == "probabilities":
        values = probabilities
    elif kind == "confidence":
        of_each = np.maximum(probabilities, 1 - probabilities)
        values = probabilities.max(0, keepdims=True) if contract.task == "multi-class" else of_each
    else:
        values = _entropy(probabilities, contract.task == "multi-class")
    if values.dtype != np.uint8 and dtype == "uint8" and contract.task != "values":
        values = np.rint(values * _STEPS).astype(np.uint8)
    values = np.where(band.valid, values, values.dtype.type(NODATA if values.dtype == np.uint8 else np.nan))
    return np.ascontiguousarray(np.moveaxis(values, 0, -1))


def _entropy(probabilities: np.ndarray, multi_class: bool) -> np.ndarray:
    def terms(p: np.ndarray) -> np.ndarray:
        return -p * np.log(np.maximum(p, np.finfo(np.float32).tiny))

    if multi_class:
        return terms(probabilities).sum(0, keepdims=True) / np.float32(np.log(max(2, len(probabilities))))
    return (terms(probabilities) + terms(1 - probabilities)) / np.float32(np.log(2))


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """
    Keeps other processes from writing a file, until this one has ended, however it ends.

    :param path: the file, in a folder that is there
    :raises UserError: if another process writes it
    """
    lock_file = path.with_name(f".{path.name}.lock")
    busy = (
        f"{path.parent}: another prediction is writing {path.name} there. Wait until it has ended, or give another "
        "OUT_DIR."
    )
    with locked(lock_file, 0, busy):
        try:
            yield
        finally:
            # Removed while it is held: whoever has opened it by then is refused, since the lock sees that it is gone.
            with contextlib.suppress(
                OSError
            ):  # Windows removes no open file; the lock does, once it is closed
                lock_file.unlink()


class GrowingFile:
    """An image file that is written from top to bottom, and appears under its name when it is whole."""

    def __init__(self, path: Path, size: tuple[int, int], about: dict[str, Any]) -> None:
        """
        Begins a file, or goes on with one. No other process can until it is closed.

        :param path: the file; its ending decides on the format: .npy, .png, .tif or .tiff
        :param size: (H, W)
        :param about: all that the content depends on, as plain data: one with other rows is begun anew
        :raises UserError: if another process writes it
        """
        self.path, self.size, self.num_rows = path, size, 0
        self._about = json.dumps(about, sort_keys=True)
        self._folder = path.with_name(f".{path.name}.unfinished")
        self._rows, self._state = self._folder / "rows.npy", self._folder / "state.json"
        self._checksum = 0
        self._file: Any = None  # stays open between writes
        self._header_bytes = 0
        self._until_closed = contextlib.ExitStack()
        self._until_closed.enter_context(only_writer(path))
        with contextlib.suppress(OSError, ValueError, KeyError):  # what is damaged is begun anew
            state = json.loads(self._state.read_bytes())
            if state["about"] == self._about and self._matches(state):
                self.num_rows, self._checksum = state["rows"], state["checksum"]

    def _matches(self, state: dict[str, Any]) -> bool:
        """Whether the rows on the disk are those that were written."""
        end, checksum = state["end"], 0
        with open(self._rows, "rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self._header_bytes = file.tell()
            while file.tell() < end and (block := file.read(min(_CHECK_BYTES, end - file.tell()))):
                checksum = zlib.crc32(block, checksum)
            return file.tell() == end and checksum == state["checksum"]

    def write(self, values: np.ndarray) -> None:
        """
        Appends rows.

        :param values: (rows, W, bands)
        """
        if self._file is None:
            self._open(values)
        content = np.ascontiguousarray(values).tobytes()
        self._file.write(content)
        self._checksum = zlib.crc32(content, self._checksum)
        self.num_rows += len(values)
        if self.num_rows < self.size[0]:
            self._file.flush()
            os.fsync(self._file.fileno())
            state = {
                "about": self._about,
                "rows": self.num_rows,
                "checksum": self._checksum,
                "end": self._file.tell(),
            }
            write_atomic(self._state, lambda file: file.write(json.dumps(state).encode()))

    def _open(self, values: np.ndarray) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self.num_rows:
            self._file = open(self._rows, "r+b")  # noqa: SIM115  # pylint: disable=consider-using-with
            row_bytes = values.itemsize * values.shape[1] * values.shape[2]
            self._file.seek(self._header_bytes + self.num_rows * row_bytes)
            self._file.truncate()
            return
        self._state.unlink(missing_ok=True)
        self._file = open(self._rows, "w+b")  # noqa: SIM115  # pylint: disable=consider-using-with
        shape = self.size if values.shape[2] == 1 else (*self.size, values.shape[2])
        description = {
            "descr": np.lib.format.dtype_to_descr(values.dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(self._file, description)
        self._header_bytes = self._file.tell()

    def finish(self, grid: Grid | None = None, style: dict[str, Any] | None = None) -> None:
        """
        Gives the file its name.

        :param grid: of a raster
        :param style: for pictures and rasters: "names" of the bands, "colors" of the classes, "scale" of values in
            uint8, "nodata", "tags"
        """
        if self._file is None:  # all rows were there already
            self._file = open(self._rows, "r+b")  # noqa: SIM115  # pylint: disable=consider-using-with
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        style = style or {}
        if self.path.suffix == ".npy":
            os.replace(self._rows, self.path)
            sync_dir(self.path.parent)
        elif self.path.suffix == ".png":
            _write_picture(self.path, np.load(self._rows, mmap_mode="r"), style.get("colors"))
        else:  # <- your file format here
            _write_raster(self.path, self._rows, self._header_bytes, grid, style)
        shutil.rmtree(self._folder)

    def close(self) -> None:
        """Leaves the file as it is, whole or to go on later."""
        if self._file is not None:
            self._file.close()
        self._until_closed.close()


def _write_picture(path: Path, values: np.ndarray, colors: Any) -> None:
    picture = Image.fromarray(np.asarray(values))
    if colors:
        picture = picture.convert("P") if picture.mode != "P" else picture
        picture.putpalette(_all_colors(colors).tobytes())  # the numbers stay, and are shown in colors
    write_atomic(path, lambda file: picture.save(file, format="png"))


def _all_colors(colors: Any) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    return table


def _write_raster(
    path: Path, rows: Path, header_bytes: int, grid: Grid | None, style: dict[str, Any]
) -> None:
    """Makes a cloud-optimized GeoTIFF: tiles, compressed, with overviews."""
    import rasterio  # imported where used: other formats do not need it
    import rasterio.shutil

    values = np.load(rows, mmap_mode="r")
    description = rows.with_name("rows.vrt")
    description.write_text(_describe(rows, values, header_bytes, grid, style))
    unfinished = rows.with_name("rows.tif")
    is_classes = bool(style.get("colors")) or (values.dtype == np.uint8 and "scale" not in style)
    options = {"overview_resampling": "nearest" if is_classes else "average", "bigtiff": "if_safer"}
    with rasterio.Env(GDAL_VRT_RAWRASTERBAND_ALLOWED_SOURCE="ALL"):
        # pylint: disable-next=c-extension-no-member
        rasterio.shutil.copy(description, unfinished, driver="COG", compress="deflate", **options)
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync_dir(path.parent)


def _describe(
    rows: Path, values: np.ndarray, header_bytes: int, grid: Grid | None, style: dict[str, Any]
) -> str:
    """The rows on the disk as GDAL's virtual raster."""
    height, width = values.shape[:2]
    num_bands = 1 if values.ndim == 2 else values.shape[2]
    item = values.dtype.itemsize
    parts = [f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">']
    if grid is not None and grid.crs:
        parts.append(f"<SRS>{escape(grid.crs)}</SRS>")
    if grid is not None and grid.transform is not None:
        parts.append(f"<GeoTransform>{', '.join(map(repr, grid.transform))}</GeoTransform>")
    tags = [
        f"<MDI key={quoteattr(key)}>{escape(str(tag))}</MDI>" for key, tag in style.get("tags", {}).items()
    ]
    parts += ["<Metadata>", *tags, "</Metadata>"]
    names = style.get("names") or [""] * num_bands
    for band in range(num_bands):
        parts.append(f'<VRTRasterBand dataType="{_GDAL_TYPES[values.dtype.name]}" band="{band + 1}" ')
        parts.append('subClass="VRTRawRasterBand">')
        parts.append(f"<Description>{escape(names[band])}</Description>" if names[band] else "")
        if style.get("nodata") is not None:
            parts.append(f"<NoDataValue>{style['nodata']}</NoDataValue>")
        if "scale" in style:
            parts.append(f"<Scale>{style['scale']!r}</Scale>")
        if style.get("colors"):
            colors = [
                f'<Entry c1="{r}" c2="{g}" c3="{b}" c4="255"/>' for r, g, b in _all_colors(style["colors"])
            ]
            parts += ["<ColorInterp>Palette</ColorInterp><ColorTable>", *colors, "</ColorTable>"]
        parts.append(f'<SourceFilename relativeToVRT="1">{escape(rows.name)}</SourceFilename>')
        parts.append(f"<ImageOffset>{header_bytes + band * item}</ImageOffset><ByteOrder>LSB</ByteOrder>")
        parts.append(f"<PixelOffset>{num_bands * item}</PixelOffset>")
        parts.append(f"<LineOffset>{width * num_bands * item}</LineOffset></VRTRasterBand>")
    return "\n".join([*parts, "</VRTDataset>"])


def style_of(kind: str, contract: DataContract, has_nodata: bool, dtype: str) -> dict[str, Any]:
    """What GrowingFile.finish is told about a kind of output."""
    is_classes = kind == "classes" and contract.task != "values"
    is_uint8 = is_classes or (dtype == "uint8" and contract.task != "values")
    single = contract.task == "multi-class" and kind != "probabilities"
    style: dict[str, Any] = {"nodata": (NODATA if is_uint8 else "nan") if has_nodata else None}
    style["tags"] = {"OUTPUT": "values" if contract.task == "values" else kind}
    if contract.class_names:
        style["tags"]["CLASSES"] = ", ".join(
            f"{number}: {name}" for number, name in enumerate(contract.class_names)
        )
    if is_classes and single:
        style["colors"] = contract.colors()
    if not single and len(contract.class_names) == contract.outputs:
        style["names"] = list(contract.class_names)
    if is_uint8 and not is_classes:
        style["scale"] = 1 / _STEPS
    return style
