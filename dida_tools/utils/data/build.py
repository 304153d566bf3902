"""Build the datasets of a config, from DATASET and DATASET_CONFIG, which a folder can fill in."""

from pathlib import Path
from typing import Any

from ...config.keys import copy_config, upgrade
from ...config.project import Project
from ...config.references import resolve
from .fingerprint import splits_of, suggest
from .images import DataError
from .pairs import Pairs


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
    splits = {split: config["DATASET"](**arguments) for split, arguments in config["DATASET_CONFIG"].items()}
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
