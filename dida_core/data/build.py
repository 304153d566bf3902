"""
Build the datasets of a config, from DATASET and DATASET_CONFIG, which a folder can fill in: its fingerprint
(what is in it) suggests a config. The doctor prints both.
"""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..config.keys import copy_config, upgrade
from ..config.project import Project
from ..config.references import resolve
from ..errors import UserError
from .images import DataError, raise_if
from .pairs import MaskReading, Pairs, some

_LARGEST_CROP = 192
_SAMPLES_PER_EPOCH = 160  # at least
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "val", "valid"),
}
_METRICS = ("f1", "precision", "recall", "iou", "accuracy")


def build_datasets(config: dict[str, Any]) -> tuple[Any, Any, Any]:
    """
    Build the datasets that a config names.

    :return: the training, test and validation set; None where DATASET_CONFIG has no such split
    :raises DataError: if they cannot be built
    """
    config = upgrade(config)
    if config.get("DATASET") is None or "train" not in (config.get("DATASET_CONFIG") or {}):
        remedy = 'set DATASET and DATASET_CONFIG["train"], or give a folder'
        raise DataError([f"the config names no training data: {remedy}"])
    splits = {}
    for split, arguments in config["DATASET_CONFIG"].items():
        try:
            splits[split] = config["DATASET"](**arguments)
        except UserError:
            raise
        except (OSError, TypeError, ValueError) as error:
            raise DataError([f"DATASET cannot be built with DATASET_CONFIG.{split}: {error}"]) from error
    return splits["train"], splits.get("test"), splits.get("validation")


def use_folder(
    config: dict[str, Any], folder: Path, project: Project, cache_file: Path | None = None
) -> dict[str, Any]:
    """
    Return a copy of a config for the images and masks of a folder, with what these suggest: channels,
    classes, crop, loss.

    :param folder: holds train/{x,y} and usually test/{x,y}
    :param project: whose datasets, losses and metrics are taken
    :raises DataError: if it does not, or if files cannot be read
    """
    config, folders = copy_config(config), splits_of(folder.resolve())
    suggestion = suggest(Pairs(*folders["train"]), cache_file)
    suggestion = {key: _resolved(value, project) for key, value in suggestion.items()}
    for_training = suggestion.pop("DATASET_CONFIG")
    arguments = (config.get("DATASET_CONFIG") or {}).get("train", {})
    for_training["augment"] = arguments.get("augment", ())
    config["DATASET_CONFIG"] = {
        split: {"x_dir": str(x_dir), "y_dir": str(y_dir)}
        | (for_training if split == "train" else {"task": for_training["task"]})
        for split, (x_dir, y_dir) in folders.items()
    }
    config["MODEL_CONFIG"] = config.get("MODEL_CONFIG", {}) | suggestion.pop("MODEL_CONFIG")
    return config | suggestion


def _resolved(value: Any, project: Project) -> Any:
    """Return a suggestion with the objects in place of their references ("module:name")."""
    if isinstance(value, dict):
        return {key: _resolved(item, project) for key, item in value.items()}
    return resolve(value, project) if isinstance(value, str) and ":" in value else value


def splits_of(folder: Path) -> dict[str, tuple[Path, Path]]:
    """
    Find the splits of a dataset: train/{x,y}, test/{x,y}, validation/{x,y}; or {x,y} as the training split.

    :raises DataError: if there is no training split, or one split twice
    """
    places = [place.parent for place in sorted(folder.glob("*/x")) if place.is_dir()]
    found, problems = dict[str, Path](), list[str]()
    for split, names in _SPLITS.items():
        named = [place for place in places if place.name.lower() in names]
        if named:
            found[split] = named[0]
        if len(named) > 1:
            listed = " and ".join(place.name for place in named)
            problems.append(f"{folder}: {listed} are both the {split} set: leave one of them")
    if (folder / "x").is_dir():
        found.setdefault("train", folder)
    if "train" not in found:
        remedy = "put images and masks of the same names into train/x and train/y"
        problems.append(f"{folder}: holds no data: {remedy}")
    if others := [place.name for place in places if place not in found.values()]:
        splits = ", ".join(_SPLITS)
        warnings.warn(f"{folder}: {some(others)} left out, as splits are called {splits}.", stacklevel=2)
    raise_if(problems)
    return {split: (place / "x", place / "y") for split, place in found.items()}


def fingerprint(pairs: Pairs, cache_file: Path | None = None) -> dict[str, Any]:
    """
    Return what is in a dataset: number of images, sizes, channels, dtypes, fraction of each mask value, and
    of each channel min, max, mean, std.

    :raises DataError: if a file cannot be read
    """
    facts = pairs.scan(cache_file)
    raise_if(fact["problem"] for fact in facts.values() if "problem" in fact)
    images, masks = ([facts[file] for file in files] for files in (pairs.images, pairs.masks))
    counts: Counter = Counter()
    for mask in masks:
        for value, number in mask["values"] or []:
            counts[tuple(value) if isinstance(value, list) else value] += number
    in_order = sorted(counts.items(), key=lambda item: np.atleast_1d(item[0]).tolist())
    fractions = {value: number / counts.total() for value, number in in_order}
    channels = Counter(image["shape"][2] for image in images)
    statistics = []
    if len(channels) == 1:
        number = next(iter(channels))
        low, high = pairs.limits() or (np.zeros(number), np.zeros(number))
        columns = {"min": low, "max": high} | dict(zip(("mean", "std"), pairs.mean_and_std(), strict=True))
        statistics = [{name: float(values[c]) for name, values in columns.items()} for c in range(number)]
    return {
        "images": len(images),
        "sizes": Counter("{} x {}".format(*image["shape"]) for image in images),
        "channels": channels,
        "dtypes": Counter(image["dtype"] for image in images),
        "mask channels": Counter(mask["shape"][2] for mask in masks),
        "mask dtypes": Counter(mask["dtype"] for mask in masks),
        "mask values": None if any(mask["values"] is None for mask in masks) else fractions,
        "statistics": statistics,
    }


def suggest(pairs: Pairs, cache_file: Path | None = None) -> dict[str, Any]:
    """
    Return the keys of a training config that follow from a dataset. Objects are references, to be resolved.

    What is under "DATASET_CONFIG" is for the training split, except the task, which is for all.
    """
    facts = fingerprint(pairs, cache_file)
    shapes = [pairs.fact(file)["shape"] for file in pairs.images]
    side = int(np.median([min(shape[:2]) for shape in shapes]))  # smaller images are padded
    crop = max(32, int(min(_LARGEST_CROP, 0.75 * side)) // 32 * 32) if side >= 32 else side
    area = float(np.mean([shape[0] * shape[1] for shape in shapes]))
    crops_per_image = max(1, round(area / crop**2), -(-_SAMPLES_PER_EPOCH // len(shapes)))
    data: dict[str, Any] = {"crop": crop, "crops_per_image": crops_per_image, "task": "multi-class"}
    values, channels = facts["mask values"], max(facts["mask channels"])
    suggestion: dict[str, Any] = {
        "DATASET": ".utils.data:NpyDataset",
        "DATASET_CONFIG": data,
        "MODEL_CONFIG": {"ch_in": next(iter(facts["channels"])), "ch_out": channels},
    }
    if values is None:
        data["task"] = "values"
        loss = "torch.nn.functional:mse_loss"
        return suggestion | {"LOSS": loss, "LOSS_CONFIG": {}, "METRICS": {}, "MONITOR": "min loss"}
    suggestion["METRICS"] = {name: f".utils.loss:{name}" for name in _METRICS}
    classes, mask_values = _classes(values, channels)
    if classes is None:
        data["task"] = "multi-label"
        suggestion["LOSS"] = ".utils.loss:dice_bce_sum"
    else:
        data["foreground"] = 0.3
        suggestion["MODEL_CONFIG"]["ch_out"] = max([1, *classes]) + 1
    return suggestion | ({"MASK_VALUES": mask_values} if mask_values else {})


def _classes(values: dict[Any, float], channels: int) -> tuple[list[int] | None, dict | None]:
    """Return the class numbers that mask values stand for, or None for labels, and how to map them."""
    if channels > 1:
        parts = {part for value in values for part in np.atleast_1d(value).tolist()}
        if not parts <= {0, 1, 255} or (channels == 3 and 255 in parts and 1 not in parts):
            colors = {color: number for number, color in enumerate(values)}
            return list(colors.values()), colors
        return None, {255: 1} if 255 in parts and 1 not in parts else None
    if 255 in values and set(values) <= {0, 255}:
        return [0, 1], {255: 1}
    classes = [value for value in values if value != MaskReading.ignore_index]
    if classes != list(range(len(classes))) and max(classes) >= 2 * len(classes):
        numbers = {value: number for number, value in enumerate(classes)}
        return list(numbers.values()), numbers
    return classes, None
