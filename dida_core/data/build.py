"""
Build the datasets of a config, from DATASET and DATASET_CONFIG, which a folder can fill in: what is in it
suggests a config.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
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
_MOST_CLASSES = 255  # of a map; more values are measured ones
_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")
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
    config: dict[str, Any],
    folder: Path,
    project: Project,
    cache_file: Path | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """
    Return a copy of a config for the images and masks of a folder, with what these suggest: channels,
    classes, crop, loss.

    :param folder: holds train/{x,y} and usually test/{x,y}
    :param project: whose datasets, losses and metrics are taken
    :param say: is given what values of masks are taken for
    :raises DataError: if it does not, if files cannot be read, or if masks may mean several things
    """
    config, folders = copy_config(config), splits_of(folder.resolve())
    splits = {split: Pairs(*places) for split, places in folders.items()}
    for pairs in splits.values():
        pairs.scan(cache_file)
    suggestion = suggest(splits["train"])
    if config.get("MASK_VALUES"):
        suggestion["MASK_VALUES"] = config["MASK_VALUES"]
    else:
        raise_if(f"{folder}: {problem}" for problem in unclear_masks(splits.values()))
    if mapped := suggestion.get("MASK_VALUES"):
        say(f"{folder}: masks are read by MASK_VALUES={mapped}; 255 is ignored unless it is named.")
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


def unclear_masks(splits: Iterable[Pairs]) -> list[str]:
    """Return what the values of masks leave open, of all splits together, with the keys that decide."""
    facts = {file: pairs.fact(file) for pairs in splits for file in pairs.masks}
    single = {file: fact for file, fact in facts.items() if "problem" not in fact and fact["shape"][2] == 1}
    values = {file: {value for value, _ in fact["values"] or []} for file, fact in single.items()}
    of_255 = [file for file, found in values.items() if 255 in found and found <= {0, 255}]
    others = set().union(*(found for file, found in values.items() if file not in of_255))
    problems = []
    if of_255 and 1 in others and others <= {0, 1}:
        keys = "MASK_VALUES={255: 1} if 255 is class 1, or MASK_VALUES={255: 255} if it counts nowhere"
        masks = (
            f"{len(of_255)} masks hold 0 and 255 ({some(file.name for file in of_255)}), the others 0 and 1"
        )
        problems.append(f"{masks}: give {keys}")
    lossy = [file for file, found in values.items() if file.suffix.lower() in _LOSSY and len(found) > 2]
    if lossy:
        about = f"{len(lossy)} masks are JPEG, which mixes classes ({some(file.name for file in lossy)})"
        problems.append(f"{about}: save them as PNG, or give MASK_VALUES")
    return problems


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


def count_values(pairs: Pairs) -> dict[Any, int] | None:
    """Return how many pixels of the masks have each value, or color; None where they are measured ones."""
    masks, counts = [pairs.fact(file) for file in pairs.masks], Counter[Any]()
    for mask in masks:
        for value, number in mask["values"] or []:
            counts[tuple(value) if isinstance(value, list) else value] += number
    in_order = sorted(counts.items(), key=lambda item: np.atleast_1d(item[0]).tolist())
    return None if any(mask["values"] is None for mask in masks) else dict(in_order)


def suggest(pairs: Pairs, cache_file: Path | None = None) -> dict[str, Any]:
    """
    Return the keys of a training config that follow from a dataset. Objects are references, to be resolved.

    What is under "DATASET_CONFIG" is for the training split, except the task, which is for all.
    """
    raise_if(fact["problem"] for fact in pairs.scan(cache_file).values() if "problem" in fact)
    shapes, masks = ([pairs.fact(file)["shape"] for file in files] for files in (pairs.images, pairs.masks))
    side = int(np.median([min(shape[:2]) for shape in shapes]))  # smaller images are padded
    crop = max(32, int(min(_LARGEST_CROP, 0.75 * side)) // 32 * 32) if side >= 32 else side
    area = float(np.mean([shape[0] * shape[1] for shape in shapes]))
    crops_per_image = max(1, round(area / crop**2), -(-_SAMPLES_PER_EPOCH // len(shapes)))
    data: dict[str, Any] = {"crop": crop, "crops_per_image": crops_per_image, "task": "multi-class"}
    values, channels = count_values(pairs), max(shape[2] for shape in masks)
    suggestion: dict[str, Any] = {
        "DATASET": ".utils.data:NpyDataset",
        "DATASET_CONFIG": data,
        "MODEL_CONFIG": {"ch_in": shapes[0][2], "ch_out": channels},
    }
    if values is None or (channels == 1 and len(values) > _MOST_CLASSES + 1):
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


def _classes(values: Iterable[Any], channels: int) -> tuple[list[int] | None, dict | None]:
    """Return the class numbers that mask values stand for, or None for labels, and how to map them."""
    if channels > 1:
        drawn = [np.atleast_1d(value).tolist() for value in values]
        if channels in (2, 4) and all(value[-1] == 255 for value in drawn):  # opacity is no class
            drawn = [value[:-1] for value in drawn]
        parts, is_picture = {part for value in drawn for part in value}, len(drawn[0]) in (1, 3)
        is_grey = len(drawn) > 1 and all(len(set(value)) == 1 for value in drawn)
        if not parts <= {0, 1, 255} or (is_picture and (is_grey or (255 in parts and 1 not in parts))):
            colors = {color: number for number, color in enumerate(values)}
            return list(colors.values()), colors
        return None, {255: 1} if 255 in parts and 1 not in parts else None
    if 255 in values and set(values) <= {0, 255}:
        return [0, 1], {255: 1}
    classes = [value for value in values if value != MaskReading.ignore_index]
    if classes != list(range(len(classes))) and max(classes) >= 2 * len(classes):
        numbers = {value: number for number, value in enumerate(values)}  # 255, too, as white
        return list(numbers.values()), numbers
    return classes, None
