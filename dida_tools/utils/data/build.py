"""Contains how a config's datasets are made: from DATASET and DATASET_CONFIG, which can be filled in from a folder."""

from pathlib import Path
from typing import Any

from ...config.keys import copy_config, upgrade
from ...config.project import Project
from .datasets import NpyDataset
from .fingerprint import folders_of, suggest
from .images import DataError


def build_datasets(config: dict[str, Any]) -> tuple[Any, Any, Any]:
    """
    Makes the datasets that a config names.

    :return: the training, test and validation set; None where DATASET_CONFIG has no such part
    :raises DataError: if they cannot be made
    """
    config = upgrade(config)
    if config.get("DATASET") is None or "train" not in (config.get("DATASET_CONFIG") or {}):
        raise DataError(
            ['the config names no training data: set DATASET and DATASET_CONFIG["train"], or give a folder']
        )
    parts = {part: config["DATASET"](**arguments) for part, arguments in config["DATASET_CONFIG"].items()}
    return parts["train"], parts.get("test"), parts.get("validation")


def use_folder(
    config: dict[str, Any], folder: Path, project: Project, cache_file: Path | None = None
) -> dict[str, Any]:
    """
    A copy of a config for the images and masks of a folder, with what they suggest: channels, classes, crop, loss.

    :param folder: holds train/{x,y} and usually test/{x,y}
    :raises DataError: if it does not, or if files cannot be read
    """
    config = copy_config(config)
    places = {part: (str(x_dir), str(y_dir)) for part, (x_dir, y_dir) in folders_of(folder.resolve()).items()}
    suggestion = suggest(NpyDataset(*places["train"]), cache_file)
    for_training = suggestion.pop("DATASET_CONFIG")
    arguments = (config.get("DATASET_CONFIG") or {}).get("train", {})
    for_training["augment"] = arguments.get("augment", ())
    config["DATASET"] = NpyDataset
    config["DATASET_CONFIG"] = {
        part: {"x_dir": x_dir, "y_dir": y_dir}
        | (for_training if part == "train" else {"task": for_training["task"]})
        for part, (x_dir, y_dir) in places.items()
    }
    config["MODEL_CONFIG"] = config.get("MODEL_CONFIG", {}) | suggestion.pop("MODEL_CONFIG")
    return config | suggestion
