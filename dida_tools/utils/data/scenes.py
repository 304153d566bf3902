"""
The built-in scenes: invented satellite images with masks, for first steps, demonstrations and tests.

They look like Sentinel-2 images (12 bands, 10 m pixels, reflectance times 10,000 in uint16): fields, forest,
water, settlements and clouds, with noise, blurred 20 m and 60 m bands, haze, cloud shadows and borders
without data. Color alone does not tell the classes apart: lush fields have the color of forest but not its
texture, settlements are a mixture of all colors, shadows are as dark as water. Everything follows from the
number of a scene.
"""

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dida_core.storage.locks import locked

from ...config.config import global_config
from .datasets import NpyDataset, Transform

VERSION = 1  # a change of the scenes gets a new number, and with it a new folder
SIZE = 192
NUM_SCENES = {"train": 40, "test": 12}
NODATA = 0

CLASS_NAMES = ("field", "forest", "water", "settlement", "cloud")
FIELD, FOREST, WATER, SETTLEMENT, CLOUD = range(5)
CHANNEL_NAMES = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
BLOCK_PIXELS = (6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 2, 2)  # ground resolution of each band in units of 10 m

# Reflectance of each band.
_REFLECTANCE = {
    "soil": (0.08, 0.10, 0.13, 0.17, 0.20, 0.22, 0.24, 0.26, 0.27, 0.28, 0.34, 0.29),
    "crop": (0.03, 0.04, 0.08, 0.04, 0.11, 0.31, 0.40, 0.43, 0.45, 0.46, 0.22, 0.11),
    "straw": (0.07, 0.09, 0.14, 0.18, 0.22, 0.26, 0.29, 0.32, 0.34, 0.34, 0.38, 0.26),
    "peat": (0.06, 0.06, 0.07, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, 0.04, 0.03),
    "plastic": (0.38, 0.42, 0.43, 0.45, 0.46, 0.48, 0.49, 0.50, 0.50, 0.48, 0.38, 0.31),
    "broadleaf": (0.03, 0.03, 0.06, 0.03, 0.09, 0.27, 0.35, 0.38, 0.40, 0.41, 0.19, 0.09),
    "conifer": (0.02, 0.03, 0.04, 0.03, 0.06, 0.15, 0.19, 0.21, 0.23, 0.23, 0.11, 0.05),
    "water": (0.05, 0.05, 0.05, 0.03, 0.03, 0.02, 0.02, 0.02, 0.02, 0.02, 0.01, 0.01),
    "turbid": (0.07, 0.09, 0.12, 0.11, 0.10, 0.07, 0.06, 0.05, 0.05, 0.04, 0.02, 0.01),
    "asphalt": (0.07, 0.08, 0.09, 0.10, 0.11, 0.12, 0.13, 0.13, 0.14, 0.14, 0.16, 0.15),
    "red roof": (0.06, 0.08, 0.11, 0.19, 0.22, 0.24, 0.26, 0.28, 0.29, 0.29, 0.33, 0.30),
    "bright roof": (0.24, 0.28, 0.31, 0.34, 0.35, 0.36, 0.37, 0.38, 0.39, 0.39, 0.42, 0.40),
    "cloud": (0.55, 0.58, 0.58, 0.60, 0.61, 0.62, 0.63, 0.63, 0.63, 0.58, 0.42, 0.33),
}
SPECTRA = {name: np.array(reflectance) for name, reflectance in _REFLECTANCE.items()}

Scene = tuple[np.ndarray, np.ndarray]


class SceneDataset(NpyDataset):
    """The built-in scenes as an NpyDataset."""

    def __init__(
        self,
        split: str,
        data_dir: str | os.PathLike | None = None,
        crop: int | None = None,
        crops_per_image: int = 1,
        foreground: float = 0.0,
        augment: Transform | Sequence[Transform] = (),
        mask_values: dict | None = None,
    ) -> None:
        """
        :param split: "train" or "test"
        :param data_dir: where make_scenes has written them; None: DATA_DIR of the global config, on first use
        """
        if split not in NUM_SCENES:
            raise ValueError(f"split is {split!r}: choose one of {', '.join(NUM_SCENES)}.")
        # A record may name any folder: nothing is written there.
        home = make_scenes(global_config["DATA_DIR"]).parent if data_dir is None else Path(data_dir)
        folder = home / f"scenes-{VERSION}" / split
        options: dict[str, Any] = {"crop": crop, "crops_per_image": crops_per_image, "foreground": foreground}
        options |= {"augment": augment, "mask_values": mask_values}
        about: dict[str, Any] = {"class_names": CLASS_NAMES, "channel_names": CHANNEL_NAMES, "nodata": NODATA}
        super().__init__(folder / "x", folder / "y", **options, **about)
        data_dir = None if data_dir is None else str(data_dir)
        self.arguments = {"split": split, "data_dir": data_dir, **options}


def make_scenes(data_dir: str | os.PathLike) -> Path:
    """Write the scenes as train/{x,y} and test/{x,y}, unless they are there, and return their folder."""
    folder = Path(data_dir) / f"scenes-{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        try:
            numbers = itertools.count()
            for split, count in NUM_SCENES.items():
                x_dir, y_dir = unfinished / split / "x", unfinished / split / "y"
                x_dir.mkdir(parents=True)
                y_dir.mkdir()
                for number in itertools.islice(numbers, count):
                    image, mask = make_scene(number)
                    np.save(x_dir / f"scene_{number:03d}.npy", image)
                    np.save(y_dir / f"scene_{number:03d}.npy", mask)
            about = {"version": VERSION, "classes": CLASS_NAMES, "channels": CHANNEL_NAMES, "nodata": NODATA}
            (unfinished / "scenes.json").write_text(json.dumps(about, indent=2) + "\n")
            os.replace(unfinished, folder)  # all of them or none
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def make_scene(number: int, size: int = SIZE) -> Scene:
    """
    Invent a scene: the image (size, size, 12) in uint16, and the mask (size, size) in uint8.

    :param number: which one; equal numbers give equal scenes
    """
    rng = np.random.default_rng([VERSION, number])
    land, mask = _land(rng, size)
    land, mask = _waters(rng, size, land, mask)
    image, mask = _clouds(rng, size, land, mask)
    image = _sensor(rng, image)
    image = np.clip(np.round(image * 10_000), 1, 65_535).astype(np.uint16)
    if rng.random() < 0.25:
        image[_beyond_border(rng, size)] = NODATA
    return image, mask.astype(np.uint8)


def _smooth_noise(rng: np.random.Generator, size: int, scale: float) -> np.ndarray:
    """Return noise of mean 0 and std near 1 whose hills are about scale pixels wide."""
    cells = max(2, int(np.ceil(size / scale)) + 2)
    grid = rng.standard_normal((cells, cells))
    position = np.arange(size) / scale
    low = np.minimum(position.astype(int), cells - 2)
    step = position - low
    step = step * step * (3 - 2 * step)
    rows = grid[low] * (1 - step)[:, None] + grid[low + 1] * step[:, None]
    return (rows[:, low] * (1 - step) + rows[:, low + 1] * step) * 1.3


def _land(rng: np.random.Generator, size: int) -> Scene:
    """Return parcels of fields, forest and settlement: reflectance (H, W, 12) and classes (H, W)."""
    y, x = np.mgrid[0:size, 0:size].astype(float)
    bent_y, bent_x = (axis + 5 * _smooth_noise(rng, size, 25) for axis in (y, x))
    num_parcels = max(6, int(size * size / 1100))
    centers = rng.uniform(-10, size + 10, (num_parcels, 2))
    distance = (bent_y[..., None] - centers[:, 0]) ** 2 + (bent_x[..., None] - centers[:, 1]) ** 2
    parcel = distance.argmin(-1)
    kinds = rng.choice([FIELD, FOREST, SETTLEMENT], num_parcels, p=[0.52, 0.28, 0.20])
    # Neighboring parcels often have the same use, as forests and towns do.
    nearest = ((centers[:, None] - centers[None]) ** 2).sum(-1).argsort(1)[:, 1]
    kinds = np.where(rng.random(num_parcels) < 0.4, kinds[nearest], kinds)

    reflectance = np.zeros((size, size, len(CHANNEL_NAMES)))
    crowns = np.exp(0.20 * _smooth_noise(rng, size, 2.2)) * np.exp(0.10 * rng.standard_normal((size, size)))
    for number, kind in enumerate(kinds):
        inside = parcel == number
        if not inside.any():
            continue
        if kind == FIELD:
            surface = _field(rng, y, x, inside)
        elif kind == FOREST:
            share = np.clip(rng.random() + 0.25 * _smooth_noise(rng, size, 12)[inside], 0, 1)[:, None]
            surface = (share * SPECTRA["broadleaf"] + (1 - share) * SPECTRA["conifer"]) * _variety(rng)
            surface = surface * rng.uniform(0.95, 1.35) * crowns[inside][:, None]
        else:
            surface = _settlement(rng, y, x, inside)
        reflectance[inside] = surface
    return reflectance, kinds[parcel]


def _variety(rng: np.random.Generator) -> np.ndarray:
    """Return a factor for each band: plants of one kind differ from parcel to parcel."""
    return np.exp(0.10 * rng.standard_normal(len(CHANNEL_NAMES)) + 0.12 * rng.standard_normal())


def _field(rng: np.random.Generator, y: np.ndarray, x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    growth = rng.choice([rng.uniform(0, 0.3), rng.uniform(0.7, 1.0)], p=[0.4, 0.6])
    ground = SPECTRA[str(rng.choice(["soil", "straw", "peat", "plastic"], p=[0.4, 0.36, 0.12, 0.12]))]
    plants = rng.dirichlet([1, 1, 1]) @ np.array([SPECTRA[name] for name in ("crop", "broadleaf", "conifer")])
    angle, spacing = rng.uniform(0, np.pi), rng.uniform(3.0, 6.0)
    rows = np.sin((y[inside] * np.sin(angle) + x[inside] * np.cos(angle)) * 2 * np.pi / spacing)
    cover = np.clip(growth + 0.06 * rows, 0, 1)[:, None]
    surface = (cover * plants + (1 - cover) * ground) * _variety(rng)
    return surface * rng.uniform(0.7, 1.15) * np.exp(0.06 * rng.standard_normal(len(surface)))[:, None]


def _settlement(rng: np.random.Generator, y: np.ndarray, x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return streets in a grid, and between them houses of several roofs, gardens and trees."""
    angle, spacing = rng.uniform(0, np.pi / 2), rng.uniform(8, 13)
    u = y[inside] * np.cos(angle) + x[inside] * np.sin(angle)
    v = x[inside] * np.cos(angle) - y[inside] * np.sin(angle)
    street = (u % spacing < 1.6) | (v % (1.7 * spacing) < 1.6)
    row, column = (np.floor(axis / 4).astype(np.int64) for axis in (u, v))
    plot = (row * 73_856_093 ^ column * 19_349_663) % 997
    covers = ["red roof", "bright roof", "asphalt", "soil", "crop", "broadleaf", "conifer"]
    of_plot = rng.choice(len(covers), 997, p=[0.12, 0.06, 0.10, 0.16, 0.22, 0.20, 0.14])
    brightness = np.exp(0.2 * rng.standard_normal((997, 1)))
    surface = (np.array([SPECTRA[name] for name in covers])[of_plot] * brightness)[plot]
    surface[street] = SPECTRA["asphalt"]
    return surface * np.exp(0.10 * rng.standard_normal(len(surface)))[:, None]


def _waters(rng: np.random.Generator, size: int, land: np.ndarray, mask: np.ndarray) -> Scene:
    valley = _smooth_noise(rng, size, size / 2.2)
    river = np.abs(valley - rng.normal(0, 0.5)) < rng.uniform(0.05, 0.13)
    lake = _smooth_noise(rng, size, size / 4) > rng.uniform(1.3, 2.2)
    wet = lake | (river if rng.random() < 0.7 else False)
    share = np.clip(rng.random() + 0.2 * _smooth_noise(rng, size, 30), 0, 1)[..., None]
    water = share * SPECTRA["water"] + (1 - share) * SPECTRA["turbid"]
    plants = rng.uniform(0, 0.25) * np.clip(_smooth_noise(rng, size, 15), 0, 1)[..., None]
    water = water * (1 - plants) + plants * SPECTRA["broadleaf"]
    water = water * np.exp(0.05 * rng.standard_normal((size, size, 1)))
    return np.where(wet[..., None], water, land), np.where(wet, WATER, mask)


def _clouds(rng: np.random.Generator, size: int, land: np.ndarray, mask: np.ndarray) -> Scene:
    if rng.random() < 0.35:
        return land, mask
    cover = _smooth_noise(rng, size, size / 5) + 0.4 * _smooth_noise(rng, size, 9) - rng.uniform(0.7, 1.5)
    thickness = np.clip(cover * rng.uniform(0.5, 1.5), 0, 1)
    shift = rng.integers(8, 16, 2) * rng.choice([-1, 1], 2)
    shadow = np.roll(thickness, tuple(shift), (0, 1))
    shaded = land * (1 - 0.85 * shadow[..., None])
    thick = thickness[..., None]
    return (1 - thick) * shaded + thick * SPECTRA["cloud"], np.where(thickness > 0.25, CLOUD, mask)


def _sensor(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Add sun and haze of the day, the bands' ground resolution, and noise."""
    bands = len(CHANNEL_NAMES)
    haze = rng.uniform(0, 0.03) * np.linspace(1, 0, bands) ** 2
    image = image * rng.uniform(0.75, 1.15) * rng.normal(1, 0.04, bands) + haze
    for band, block in enumerate(BLOCK_PIXELS):
        if block > 1:
            image[..., band] = _averaged(image[..., band], block)
    return image + 0.004 * rng.standard_normal(image.shape)


def _averaged(band: np.ndarray, block: int) -> np.ndarray:
    height, width = band.shape
    padded = np.pad(band, ((0, -height % block), (0, -width % block)), mode="edge")
    rows, columns = padded.shape[0] // block, padded.shape[1] // block
    means = padded.reshape(rows, block, columns, block).mean((1, 3))
    return means.repeat(block, 0).repeat(block, 1)[:height, :width]


def _beyond_border(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return the pixels beyond a slanted line, as at the edge of a satellite's track."""
    y, x = np.mgrid[0:size, 0:size] - size / 2
    angle = rng.uniform(0, 2 * np.pi)
    return y * np.sin(angle) + x * np.cos(angle) > rng.uniform(0.3, 0.5) * size
