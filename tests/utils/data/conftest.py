"""Fixtures that write images and datasets in every format."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning


def write_file(path: Path, array: np.ndarray, nodata: float | None = None, **georeference: Any) -> Path:
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
            with rasterio.open(path, "w", **profile, **georeference) as raster:
                raster.write(bands)
    else:
        Image.fromarray(array).save(path)
    return path


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    """Write an array as an image, in the format of the ending."""
    return write_file


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Write images and masks as 0, 1, 2, ... into the folders x and y, and return both."""

    def write_all(
        images: Sequence[np.ndarray],
        masks: Sequence[np.ndarray],
        ending: str = ".npy",
        folder: str = "data",
        nodata: float | None = None,
    ) -> tuple[Path, Path]:
        for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
            write_file(tmp_path / folder / "x" / f"{number}{ending}", image, nodata)
            write_file(tmp_path / folder / "y" / f"{number}{ending}", mask)
        return tmp_path / folder / "x", tmp_path / folder / "y"

    return write_all
