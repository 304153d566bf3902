"""
Contains the fingerprint of a dataset: what is in it, what is wrong with it, and what config it suggests.

    python -m dida_tools.utils.data.fingerprint DIR      DIR holds x and y, or train/x, train/y, test/x, test/y

Ends with 1 if the doctor finds problems: what training would refuse, or would learn or measure wrongly. It finds images
that are in two parts, also flipped or turned, or georeferenced to one place, but none that are compressed, resampled or
cropped copies.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn.functional import mse_loss

from ..loss import accuracy, dice_bce_sum, f1, iou, precision, recall
from .datasets import NpyDataset
from .doctor import examine, report
from .images import DataError

_LARGEST_CROP = 192
_SAMPLES_PER_EPOCH = 160  # at least


def fingerprint(dataset: NpyDataset, cache_file: Path | None = None) -> dict[str, Any]:
    """
    What is in a dataset.

    :return: number of images, sizes, channels, dtypes, part of each mask value, and of each channel min, max, mean, std
    :raises DataError: if a file cannot be read
    """
    facts = dataset.scan(cache_file)
    unreadable = [fact["problem"] for fact in facts.values() if "problem" in fact]
    if unreadable:
        raise DataError(unreadable)
    images, masks = [facts[file] for file in dataset.images], [facts[file] for file in dataset.masks]
    values: Counter | None = Counter()
    for mask in masks:
        if mask["values"] is None or values is None:
            values = None
        else:
            values.update({_hashable(value): number for value, number in mask["values"]})
    total = sum(values.values()) if values else 1
    in_order = sorted((values or {}).items(), key=lambda item: np.atleast_1d(item[0]).tolist())
    channels = Counter(image["shape"][2] for image in images)
    summary: dict[str, Any] = {
        "images": len(images),
        "sizes": Counter("{} x {}".format(*image["shape"]) for image in images),
        "channels": channels,
        "dtypes": Counter(image["dtype"] for image in images),
        "mask channels": Counter(mask["shape"][2] for mask in masks),
        "mask dtypes": Counter(mask["dtype"] for mask in masks),
        "mask values": None if values is None else {value: number / total for value, number in in_order},
        "statistics": [],
    }
    if len(channels) == 1:
        mean, std = dataset.mean_and_std(cache_file)
        summary["statistics"] = [
            {
                "min": min(
                    (image["min"][channel] for image in images if image["count"][channel]), default=0.0
                ),
                "max": max(
                    (image["max"][channel] for image in images if image["count"][channel]), default=0.0
                ),
                "mean": float(mean[channel]),
                "std": float(std[channel]),
            }
            for channel in range(len(mean))
        ]
    return summary


def suggest(dataset: NpyDataset, cache_file: Path | None = None) -> dict[str, Any]:
    """
    The keys of a training config that follow from a dataset. What is under "DATASET_CONFIG" is for its training part,
    except the task, which is for all.
    """
    facts = fingerprint(dataset, cache_file)
    shapes = [fact["shape"] for fact in (dataset.scan()[file] for file in dataset.images)]
    side = min(min(shape[:2]) for shape in shapes)
    crop = max(32, int(min(_LARGEST_CROP, 0.75 * side)) // 32 * 32) if side >= 32 else side
    area = float(np.mean([shape[0] * shape[1] for shape in shapes]))
    crops_per_image = max(1, round(area / crop**2), -(-_SAMPLES_PER_EPOCH // len(shapes)))
    suggestion: dict[str, Any] = {
        "MODEL_CONFIG": {"ch_in": next(iter(facts["channels"]))},
        "DATASET_CONFIG": {"crop": crop, "crops_per_image": crops_per_image, "task": "multi-class"},
    }
    values, mask_channels = facts["mask values"], max(facts["mask channels"])
    if values is None:
        suggestion["DATASET_CONFIG"]["task"] = "values"
        suggestion["MODEL_CONFIG"]["ch_out"] = mask_channels
        return suggestion | {"LOSS": mse_loss, "LOSS_CONFIG": {}, "METRICS": {}, "MONITOR": "min loss"}
    metrics = {"f1": f1, "precision": precision, "recall": recall, "iou": iou, "accuracy": accuracy}
    suggestion |= {"METRICS": metrics}
    if mask_channels > 1:
        labels = {number for value in values for number in np.atleast_1d(value).tolist()}
        if not labels <= {0, 1, 255} or (mask_channels == 3 and 255 in labels and 1 not in labels):
            suggestion["MASK_VALUES"] = {color: number for number, color in enumerate(values)}
            suggestion["MODEL_CONFIG"]["ch_out"] = max(2, len(values))
            suggestion["DATASET_CONFIG"]["foreground"] = 0.3
            return suggestion
        suggestion["DATASET_CONFIG"]["task"] = "multi-label"
        suggestion["MODEL_CONFIG"]["ch_out"] = mask_channels
        suggestion |= {"LOSS": dice_bce_sum}
        if 255 in labels and 1 not in labels:
            suggestion["MASK_VALUES"] = {255: 1}
        return suggestion
    classes = [value for value in values if value != dataset.ignore_index]
    if 255 in values and set(values) <= {0, 255}:
        suggestion["MASK_VALUES"] = {255: 1}
        classes = [0, 1]
    elif classes != list(range(len(classes))) and max(classes) >= 2 * len(classes):
        suggestion["MASK_VALUES"] = {value: number for number, value in enumerate(classes)}
        classes = list(range(len(classes)))
    suggestion["MODEL_CONFIG"]["ch_out"] = max(2, max(classes) + 1)
    suggestion["DATASET_CONFIG"]["foreground"] = 0.3
    return suggestion


def folders_of(folder: Path) -> dict[str, tuple[Path, Path]]:
    """
    Finds the parts of a dataset: train/{x,y}, test/{x,y} and validation/{x,y}, or {x,y} as the training part.

    :raises DataError: if there is no training part
    """
    found = {
        part: folder / part for part in ("train", "test", "validation") if (folder / part / "x").is_dir()
    }
    if (folder / "x").is_dir() and "train" not in found:
        found["train"] = folder
    if "train" not in found:
        raise DataError(
            [f"{folder}: holds no data: put images and masks of the same names into train/x and train/y"]
        )
    return {part: (place / "x", place / "y") for part, place in found.items()}


def describe(facts: dict[str, Any]) -> str:
    """A fingerprint as text."""
    lines = [f"  images         {facts['images']}"]
    for name in ("sizes", "channels", "dtypes", "mask channels", "mask dtypes"):
        counts = facts[name].most_common(4)
        more = f", and {len(facts[name]) - 4} more" if len(facts[name]) > 4 else ""
        shown = ", ".join(
            f"{value}" + (f" ({number})" if len(facts[name]) > 1 else "") for value, number in counts
        )
        lines.append(f"  {name:<14} {shown}{more}")
    if facts["mask values"] is None:
        lines.append("  mask values    numbers, no classes")
    else:
        shown_values = list(facts["mask values"].items())
        text = ", ".join(f"{value}: {part:.2%}" for value, part in shown_values[:16])
        lines.append(
            f"  mask values    {text}"
            + (f", and {len(shown_values) - 16} more" if len(shown_values) > 16 else "")
        )
    if facts["statistics"]:
        lines.append("  channel            min         max        mean         std")
        for number, row in enumerate(facts["statistics"]):
            cells = "".join(f"{row[name]:>12.5g}" for name in ("min", "max", "mean", "std"))
            lines.append(f"  {number:>7}   {cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="holds x and y, or train/x, train/y, test/x, test/y"
    )
    folder = parser.parse_args(arguments).folder
    try:
        parts = {part: NpyDataset(*places) for part, places in folders_of(folder).items()}
        for part, dataset in parts.items():
            print(f"{part}: {folder}")
            print(describe(fingerprint(dataset)))
        suggestion = suggest(parts["train"])
        task = suggestion["DATASET_CONFIG"]["task"]
        findings = examine(parts, folder, task, suggestion.get("MASK_VALUES"))
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{report(findings)}")
    print("\nThis suggests (train.py --data does so by itself):")
    for key, value in suggestion.items():
        print(f"  {key} = {_readable(value)}")
    return int(any(finding.is_problem for finding in findings))


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_readable(item)}" for key, item in value.items()) + "}"
    return getattr(value, "__name__", None) or repr(value)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
