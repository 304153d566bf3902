"""Contains what predicted maps are worth where masks are at hand: the same counts as in training and in the suite."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..utils.data.contract import DataContract
from ..utils.data.datasets import map_values
from ..utils.data.images import DataError, ImageReader, Window, list_images
from ..utils.scores import Scores

_ROWS = 256


def find_masks(images: Sequence[str], folder: str | Path) -> list[Path]:
    """
    The mask of each image, by the name without ending.

    :raises DataError: with each that is missing
    """
    masks = {file.stem: file for file in list_images(folder)}
    missing = [f"{folder}: there is no mask called {stem}" for stem in images if stem not in masks]
    if missing:
        raise DataError(missing)
    return [masks[stem] for stem in images]


def score_maps(
    maps: Sequence[Path],
    masks: Sequence[Path],
    contract: DataContract,
    ignore_index: int = 255,
    mask_values: dict | None = None,
) -> Scores:
    """
    Compares maps of probabilities with masks, row by row; pixels without data count nowhere.

    :param maps: outputs of the kind "probabilities", in float32 or uint8
    :param masks: one for each, as in training
    :raises DataError: if a mask has another size than its map, or values that are no classes
    """
    multi_class = contract.task == "multi-class"
    scores = Scores(contract.outputs, multi_class, ignore_index, contract.threshold)
    for map_file, mask_file in zip(maps, masks, strict=True):
        with ImageReader(map_file) as predicted, ImageReader(mask_file) as mask:
            height, width, _ = predicted.shape
            if mask.shape[:2] != (height, width):
                sizes = "{} x {}".format(*mask.shape), "{} x {}".format(*predicted.shape)
                raise DataError([f"{mask_file}: its size is {sizes[0]} pixels, that of the map {sizes[1]}"])
            for top in range(0, height, _ROWS):
                window = Window(top, 0, min(_ROWS, height - top), width)
                values = predicted.read(window)
                missing = (values == 255 if values.dtype == np.uint8 else np.isnan(values)).all(-1)
                p = np.clip(
                    values / 254 if values.dtype == np.uint8 else values.astype(np.float64), 1e-12, 1 - 1e-12
                )
                logits = np.log(p) if multi_class else np.log(p / (1 - p))
                targets = map_values(mask.read(window), mask_values)
                targets = targets.astype(np.int64 if multi_class else np.float32)
                targets[missing] = ignore_index
                try:
                    scores.update(
                        _batch(np.where(missing[..., None], 0, logits)).float(), _batch(targets, multi_class)
                    )
                except ValueError as error:
                    raise DataError([f"{mask_file}: {error}"]) from error
    return scores


def _batch(values: np.ndarray, single: bool = False) -> torch.Tensor:
    """(H, W, C) as (1, C, H, W), or as (1, H, W)."""
    tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 0)))
    return tensor if single else tensor[None]
