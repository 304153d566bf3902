"""Fixtures that write images and datasets in every format."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

Write = Callable[..., Path]


def write_file(path: Path, array: np.ndarray, nodata: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, array)
    elif path.suffix in (".tif", ".tiff"):
        bands = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
        profile = {"driver": "GTiff", "dtype": array.dtype, "nodata": nodata, "tiled": True, "blockxsize": 16}
        profile |= {"blockysize": 16, "count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, "w", **profile) as raster:
                raster.write(bands)
    else:
        Image.fromarray(array).save(path)
    return path


@pytest.fixture(scope="session")
def write() -> Write:
    """Writes an array as an image, in the format of the ending."""
    return write_file


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes images and masks as 0, 1, 2, ... into the folders x and y, and gives both."""

    def write_all(
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        ending: str = ".npy",
        folder: str = "data",
        nodata: float | None = None,
    ) -> tuple[Path, Path]:
        for kind, arrays in (("x", images), ("y", masks)):
            for number, array in enumerate(arrays):
                write_file(
                    tmp_path / folder / kind / f"{number}{ending}", array, nodata if kind == "x" else None
                )
        return tmp_path / folder / "x", tmp_path / folder / "y"

    return write_all
