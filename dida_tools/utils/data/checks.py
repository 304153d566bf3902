"""Check what training and prediction rely on, from the facts of files: a sentence for each problem."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .contract import DataContract
from .facts import Facts
from .images import DataError, ImageInfo, image_info
from .pairs import MaskReading, Pairs


def find_problems(
    pairs: Pairs,
    reading: MaskReading,
    cache_file: Path | None = None,
    num_classes: int | None = None,
    training: bool = True,
    crop: int | None = None,
) -> list[str]:
    """
    Read every file once, and return all that is wrong: unreadable files, NaN, mixed channels, dtypes, nodata
    values or sizes, masks of another size than their image or with values outside the classes.

    :param num_classes: number of the model's output channels, if masks are to be checked against it
    :param training: crops are taken; else entire images are evaluated
    :param crop: size of the crops; None trains on entire images
    """
    facts = pairs.scan(cache_file)
    problems = [fact["problem"] for fact in facts.values() if "problem" in fact]
    images = {file: facts[file] for file in pairs.images if "problem" not in facts[file]}
    masks = {file: facts[file] for file in pairs.masks if "problem" not in facts[file]}
    sizes = {file: "{} x {}".format(*fact["shape"]) for file, fact in images.items()}
    problems += _odd_ones_out({file: fact["shape"][2] for file, fact in images.items()}, "channels")
    problems += _odd_ones_out({file: fact["dtype"] for file, fact in images.items()}, "as dtype")
    problems += _odd_ones_out({file: fact["nodata"] for file, fact in images.items()}, "as nodata value")
    problems += _odd_ones_out({file: fact["shape"][2] for file, fact in masks.items()}, "channels")
    if training and crop is None:
        problems += [f"{odd}: images of several sizes need a crop" for odd in _odd_ones_out(sizes, "pixels")]
    for file, fact in images.items():
        if fact["damaged"]:
            remedy = "replace them, or name them as nodata"
            problems.append(f"{file}: {fact['damaged']} values are NaN or infinite: {remedy}")
        if training and crop is not None and crop > min(fact["shape"][:2]):
            problems.append(f"{file}: its size is {sizes[file]} pixels, too small for a crop of {crop}")
    for image, mask in zip(pairs.images, pairs.masks, strict=True):
        if image in images and mask in masks:
            found = mask_problems(images[image], masks[mask], reading, num_classes)
            problems += [f"{mask}: {problem}" for problem in found]
    if training and not problems and _is_all_ignored(masks.values(), reading):
        ignored = reading.ignore_index
        problems.append(
            f"{pairs.masks[0].parent}: the masks hold 0 and {ignored} alone, and {ignored} is ignored: "
            f"map it with MASK_VALUES={{{ignored}: 1}}"
        )
    return problems


def mask_problems(
    image: Facts, mask: Facts, reading: MaskReading, num_classes: int | None = None
) -> list[str]:
    """Return what is wrong with a mask, by itself and as the partner of its image."""
    problems = []
    channels = mask["shape"][2]
    if mask["shape"][:2] != image["shape"][:2]:
        sizes = "{} x {}".format(*mask["shape"]), "{} x {}".format(*image["shape"])
        problems.append(f"its size is {sizes[0]} pixels, that of its image {sizes[1]}")
    if mask["damaged"]:
        problems.append(f"{mask['damaged']} values are NaN or infinite")
    if reading.task == "values":
        return problems
    if mask["values"] is None:
        no_classes = (
            f"its values ({mask['dtype']}) are no class numbers: a mask holds a few different integers"
        )
        return [*problems, no_classes]
    values = [value for value, _ in mask["values"]]
    if reading.task == "multi-label":
        parts = {part for value in values for part in (value if isinstance(value, list) else [value])}
        odd = [
            value for value in sorted(parts) if reading.class_of(value) not in (0, 1, reading.ignore_index)
        ]
        if odd:
            remedy = "map them with MASK_VALUES, such as {255: 1}"
            problems.append(f"the values {_some(odd)} are not 0 or 1: {remedy}")
        if num_classes is not None and channels != num_classes:
            problems.append(f"it has {channels} channels, the model {num_classes} outputs")
        return problems
    odd = [value for value in values if not _is_class(reading.class_of(value), reading, num_classes)]
    if odd and channels > 1:
        problems.append(f"{several_channels(channels)} (unmapped: {_some(map(tuple, odd))})")
    elif odd:
        allowed = f"0 to {num_classes - 1}" if num_classes else "0 and above"
        allowed += f" (ignored: {reading.ignore_index})"
        problems.append(
            f"the values {_some(odd)} are outside of the classes {allowed}: "
            "map them with MASK_VALUES, such as {255: 1}, or correct ch_out"
        )
    return problems


def contract_problems(
    contract: DataContract, files: Iterable[Path], info: Callable[[Path], ImageInfo] = image_info
) -> list[str]:
    """Return in what files are not as a contract has it, channels or dtype, or that they cannot be read."""
    problems = []
    for file in files:
        try:
            about = info(file)
        except DataError as error:
            problems += error.problems
            continue
        found = contract.problems(np.zeros((1, 1, about.shape[2]), about.dtype))
        problems += [f"{file}: {problem}" for problem in found]
    return problems


def dataset_problems(contract: DataContract, pairs: Pairs, with_values: bool = True) -> list[str]:
    """
    Return in what a dataset is not as the contract of the training data has it.

    :param with_values: compare the range of its values too
    """
    folder, problems = pairs.images[0].parent, []
    nodata = pairs.info(pairs.images[0]).nodata if pairs.nodata is None else pairs.nodata
    if nodata not in (None, contract.nodata) and str(nodata) != str(contract.nodata):  # NaN is not NaN
        other = f"its nodata value is {nodata}, that of the training data {contract.nodata}"
        problems.append(f"{folder}: {other}: give both the same nodata")
    problems += contract_problems(contract, pairs.images, pairs.info)
    if with_values and contract.maximum and not problems:
        own = pairs.fit(contract, normalize=False)
        low, high = np.array(own.minimum), np.array(own.maximum)
        found = contract.range_problems(low, high, low, high)
        problems += [f"{folder}: {problem}" for problem in found]
    return problems


def several_channels(channels: int) -> str:
    """Say that a multi-class mask must not have several channels."""
    return (
        f"it has {channels} channels: a multi-class mask has one, or colors that MASK_VALUES names all, such "
        'as {(255, 0, 0): 1}; overlapping classes need task="multi-label"'
    )


def _is_class(label: Any, reading: MaskReading, num_classes: int | None) -> bool:
    is_number = isinstance(label, int)
    return is_number and (label == reading.ignore_index or 0 <= label < (num_classes or 2**31))


def _is_all_ignored(masks: Iterable[Facts], reading: MaskReading) -> bool:
    """Return whether masks hold nothing but 0 and what is ignored, and both of it."""
    if reading.task == "values":
        return False
    values = [value for mask in masks for value, _ in mask["values"]]
    if reading.task == "multi-label":
        values = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return {reading.class_of(value) for value in values} == {0, reading.ignore_index}


def _some(values: Iterable[Any]) -> str:
    return ", ".join(map(str, list(values)[:8]))


def _odd_ones_out(values: dict[Path, Any], what: str) -> list[str]:
    """Return a sentence for each file whose value differs from that of most."""
    if len(set(values.values())) < 2:
        return []
    usual = Counter(values.values()).most_common(1)[0][0]
    odd = {file: value for file, value in values.items() if value != usual}
    return [f"{file}: has {value} {what}, most have {usual}" for file, value in odd.items()]
