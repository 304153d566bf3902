"""A model, its data contract, and images for the tests of prediction."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from dida_core.data.contract import DataContract
from dida_core.prediction import load_predictor, predict_array
from dida_core.storage.weights import save_weights
from rasterio.transform import from_origin
from torch import nn

STATISTICS = {"mean": (0.1, 0.1, 0.1, 0.3), "std": (0.05, 0.05, 0.05, 0.1)}
STATISTICS |= {"minimum": (1.0,) * 4, "maximum": (10000.0,) * 4, "nodata": 0, "tile_size": 32}
NAMES = {"channel_names": ("B02", "B03", "B04", "B08"), "class_names": ("land", "water", "cloud")}
CONTRACT = DataContract(4, dtype="uint16", scale=1e-4, outputs=3, **STATISTICS, **NAMES)
GRID = {"crs": "EPSG:32633", "transform": from_origin(399_960, 5_900_040, 10, 10)}


class Net(nn.Module):
    """A convolution that counts its calls; slow on request."""

    calls = 0
    seconds = 0.0

    def __init__(self, channels: int = 4, outputs: int = 3, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Conv2d(channels, outputs, 5, padding=2)

    def forward(self, x):
        Net.calls += 1
        time.sleep(Net.seconds)
        return self.layer(x)


class Brightest(nn.Module):
    """Logits are the channels themselves, so that the input can be told from the output."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


def make_config(folder: Path, model: nn.Module, contract: DataContract = CONTRACT) -> dict[str, Any]:
    """Save the weights of a model and return a predict_config for it."""
    save_weights(folder / "best.pt", {"model": model.state_dict(), "contract": contract.to_dict()})
    places = {"WEIGHTS": folder / "best.pt", "OUT_DIR": folder / "out"}
    return places | {"MODEL": type(model), "DEVICE": "cpu", "PRECISION": "fp32", "TILE": 32, "BATCH_SIZE": 3}


def expected(config: dict[str, Any], image: np.ndarray) -> np.ndarray:
    """Return (K, H, W), by what test_windows.py has tested."""
    predictor = load_predictor(config["WEIGHTS"], config["MODEL"], device="cpu", precision="fp32")
    return predict_array(predictor, image, 32, 0.25)


def reflectance(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return an image as a satellite sees it."""
    rng = np.random.default_rng(seed)
    means, stds = (1000, 1000, 1000, 3000), (500, 500, 500, 1000)
    coarse = rng.normal(means, stds, (height // 8 + 1, width // 8 + 1, 4))
    image = coarse.repeat(8, 0).repeat(8, 1)[:height, :width] + rng.normal(0, 100, (height, width, 4))
    return np.clip(image, 1, 10000).astype(np.uint16)


def write_raster(path: Path, image: np.ndarray, **options: Any) -> Path:
    """Write a GeoTIFF."""
    bands = np.moveaxis(image, -1, 0)
    profile = {"driver": "GTiff", "dtype": image.dtype, "count": len(bands), "nodata": 0} | GRID | options
    with rasterio.open(path, "w", height=image.shape[0], width=image.shape[1], **profile) as file:
        file.write(bands)
    return path


def write_arrays(folder: Path, *images: np.ndarray) -> list[Path]:
    """Write images as 0.npy, 1.npy, ..."""
    files = [folder / f"{number}.npy" for number in range(len(images))]
    for file, image in zip(files, images, strict=True):
        np.save(file, image)
    return files
