"""The vocabulary of a predict_config: every key, its default, what it may hold and what it is for."""

import os
from typing import Any

from .keys import KEYS
from .kinds import DATASET, NUMBER, PATH, REQUIRED, TEXT, WHOLE, Key, Kind, as_list, one_of

OUTPUTS = ("classes", "probabilities", "confidence", "entropy")


def _are_paths(value: Any) -> bool:
    return all(isinstance(one, str | os.PathLike) for one in as_list(value)) and value not in ("", [], ())


def _are_outputs(value: Any) -> bool:
    return all(isinstance(one, str) and one in OUTPUTS for one in as_list(value)) and len(value) > 0


_PATHS = Kind("a path or a list of them", _are_paths)
_OUTPUTS = Kind(f"one or several of {', '.join(OUTPUTS)}", _are_outputs)
_DTYPE, _AUGMENT = one_of("float32", "uint8"), one_of("none", "flips", "all")

PREDICT_KEYS = {
    **{key: KEYS[key] for key in ("MODEL", "MODEL_CONFIG", "MASK_VALUES", "IGNORE_INDEX")},
    "CHECK_VALUES": KEYS["CHECK_VALUES"],
    **{key: KEYS[key] for key in ("DEVICE", "PRECISION")},
    "WEIGHTS": Key(REQUIRED, PATH, "weights file"),
    "DATASET": Key(None, DATASET, "class whose own `read` gives the images; a run enters its own"),
    "FILES": Key(REQUIRED, _PATHS, "images, folders, or patterns such as in/*.tif"),
    "BANDS": Key(None, _PATHS, "patterns of the files of a folder that are one image's channels"),
    "OUT_DIR": Key(REQUIRED, PATH, "folder of the predictions"),
    "OUTPUT": Key("classes", _OUTPUTS, _OUTPUTS.name),
    "OUTPUT_DTYPE": Key("float32", _DTYPE, "of all but classes; uint8: 0 to 254 instead of 0 to 1"),
    "FORMAT": Key(None, one_of(".npy", ".png", ".tif"), "npy, png or tif; without it as the image"),
    "PREFIX": Key("", TEXT, "put before the names of the images"),
    "SUFFIX": Key("", TEXT, "put after the names of the images"),
    "TILE": Key(None, WHOLE, "size of the windows; without it that of training, at least 256", 1),
    "OVERLAP": Key(0.25, NUMBER, "fraction of a window that the next one shares", 0, 1),
    "BATCH_SIZE": Key(4, WHOLE, "windows that are computed at once", 1),
    "AUGMENT": Key("none", _AUGMENT, "average over views: none, flips (4 x the time), or all (8 x)"),
    "MASKS": Key(None, PATH, "folder of masks with the images' names, to score the predictions"),
}
