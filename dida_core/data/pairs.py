"""
Pairs of images and masks: which files belong together, what is known of them, what their masks mean; and what
is wrong with them: a sentence for each problem, from the facts of the files.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from .contract import DataContract
from .facts import Facts, Moments, merge_moments, scan_files, scan_image, scan_mask
from .images import DataError, ImageInfo, elsewhere, image_info, left_out, list_images, raise_if

_MAP_THEM = "map them with MASK_VALUES, such as {255: 1}"


class Pairs:
    """Images and their masks. Files are scanned when a fact about one of them is first asked for."""

    def __init__(self, x_dir: str | Path, y_dir: str | Path, nodata: float | None = None) -> None:
        """
        :param nodata: value of pixels without data, if the files do not state it
        :raises DataError: if the folders do not hold pairs of the same names, with each missing partner
        """
        self.images, self.masks = pair_files(Path(x_dir), Path(y_dir))
        self.nodata = nodata
        self._facts: dict[Path, Facts] = {}
        self._infos: dict[Path, ImageInfo] = {}

    def only(self, numbers: Sequence[int]) -> Self:
        """Return some of the pairs; what is known of their files is shared."""
        other = object.__new__(type(self))
        other.__dict__ = self.__dict__ | {
            "images": [self.images[number] for number in numbers],
            "masks": [self.masks[number] for number in numbers],
        }
        return other

    @property
    def is_scanned(self) -> bool:
        """Whether all files have been read."""
        return self._facts.keys() >= {*self.images, *self.masks}

    def scan(self, cache_file: Path | None = None) -> dict[Path, Facts]:
        """Read every file once, or take what an earlier scan found, and return the facts; see facts.py."""
        if not self.is_scanned:
            self._facts |= scan_files(self.images, scan_image, cache_file, nodata=self.nodata)
            self._facts |= scan_files(self.masks, scan_mask, cache_file)
        return {file: self._facts[file] for file in [*self.images, *self.masks]}

    def fact(self, file: Path) -> Facts:
        """Return what is known of a file."""
        return self._facts[file] if file in self._facts else self.scan()[file]

    def info(self, file: Path) -> ImageInfo:
        """Return size, dtype and nodata of a file, from its facts if there are any."""
        facts = self._facts.get(file, {})
        if file not in self._infos and "shape" in facts:
            nodata = None if facts["nodata"] is None else float(facts["nodata"])
            self._infos[file] = ImageInfo(tuple(facts["shape"]), facts["dtype"], nodata)
        elif file not in self._infos:
            self._infos[file] = image_info(file)
        return self._infos[file]

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and std of each channel over all pixels that hold data, as they stand in the files."""
        moments: Moments = (0, 0.0, 0.0)
        for facts in map(self.fact, self.images):
            count, mean, m2 = (np.array(facts[name]) for name in ("count", "mean", "m2"))
            moments = merge_moments(moments, (count, mean, m2))
        count, mean, m2 = moments
        return np.asarray(mean), np.sqrt(m2 / np.maximum(count, 1))

    def limits(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the smallest and largest value of each channel, of the images that hold data."""
        facts = map(self.fact, self.images)
        limits = [(one["min"], one["max"]) for one in facts if all(one["count"])]
        return (np.min(limits, 0)[0], np.max(limits, 0)[1]) if limits else None

    def fit(self, contract: DataContract, normalize: bool, cache_file: Path | None = None) -> DataContract:
        """Return a contract with the range of each channel's values, and mean and std to normalize them."""
        self.scan(cache_file)
        if limits := self.limits():
            low, high = (tuple(values.tolist()) for values in limits)
            contract = replace(contract, minimum=low, maximum=high)
        if not normalize:
            return contract
        mean, std = (statistic * contract.scale for statistic in self.mean_and_std())
        std = np.where(std > 1e-12 * np.abs(mean), std, 1.0)  # a constant channel becomes 0
        return replace(contract, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def pair_files(x_dir: Path, y_dir: Path) -> tuple[list[Path], list[Path]]:
    """
    Find images and their masks, by file name without ending.

    :raises DataError: with everything that is missing or left over
    """
    problems = [f"{folder}: there is no such folder" for folder in (x_dir, y_dir) if not folder.is_dir()]
    raise_if(problems)
    by_stem: list[dict[str, Path]] = []
    for folder in (x_dir, y_dir):
        files = list_images(folder)
        by_stem.append({file.stem: file for file in files})
        counts = Counter(file.stem for file in files)
        problems += [f"{folder}: {n} files are called {stem}" for stem, n in counts.items() if n > 1]
        if not files:
            problems.append(f"{folder}: holds no images")
    images, masks = by_stem
    if images and masks:
        problems += [f"{images[stem]}: has no mask in {y_dir}" for stem in images if stem not in masks]
        problems += [f"{masks[stem]}: has no image in {x_dir}" for stem in masks if stem not in images]
    raise_if(problems)
    return list(images.values()), [masks[stem] for stem in images]


@dataclass(frozen=True)
class MaskReading:
    """
    What the values of masks mean.

    :param task: "multi-class", "multi-label" or "values"
    :param mask_values: class number of values, such as {255: 1} or {(255, 0, 0): 1}; others stay
    :param ignore_index: class number of pixels that count nowhere
    """

    task: str = "multi-class"
    mask_values: dict | None = None
    ignore_index: int = 255

    def class_of(self, value: Any) -> Any:
        """Return the class of a value, or of the values of several channels."""
        value = tuple(value) if isinstance(value, list) else value
        return (self.mask_values or {}).get(value, value)

    def values_in(self, mask: Facts) -> set[Any]:
        """Return the values in a mask; of labels, those of single channels."""
        values = [value for value, _ in mask["values"] or []]
        if self.task == "multi-label":
            return {part for value in values for part in (value if isinstance(value, list) else [value])}
        return {tuple(value) if isinstance(value, list) else value for value in values}

    def labels_of(self, value: Any) -> list[int]:
        """Return the classes other than 0 of a pixel that has this value."""
        if self.task == "multi-class":
            label = self.class_of(value)
            return [label] if isinstance(label, int) and label not in (0, self.ignore_index) else []
        row = value if isinstance(value, list) else [value]
        return [label for label, part in enumerate(row) if self.class_of(part) == 1]


def map_values(mask: np.ndarray, mask_values: dict | None) -> np.ndarray:
    """
    Replace values of a mask (H, W, C) by class numbers; values that are not named stay.

    :param mask_values: {value: class}, or {(r, g, b): class}, which makes the mask (H, W, 1)
    """
    if not mask_values:
        return mask
    if isinstance(next(iter(mask_values)), tuple):
        result = np.full((*mask.shape[:2], 1), -1, np.int64)  # the checks refuse colors without a class
        for color, number in mask_values.items():
            result[(mask == np.asarray(color)).all(-1)] = number
        return result
    result = mask.astype(np.int64) if mask.dtype.kind in "bui" else mask.copy()
    for value, number in mask_values.items():
        result[mask == value] = number
    return result


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
    classes = {reading.class_of(value) for mask in masks.values() for value in reading.values_in(mask)}
    sizes = {file: "{} x {}".format(*fact["shape"]) for file, fact in images.items()}
    for files, name, what in (
        (images, "shape", "channels"),
        (images, "dtype", "as dtype"),
        (images, "nodata", "as nodata value"),
        (masks, "shape", "channels"),
    ):
        values = {file: fact[name][2] if name == "shape" else fact[name] for file, fact in files.items()}
        problems += _odd_ones_out(values, what)
    if training and crop is None:
        problems += [f"{odd}: images of several sizes need a crop" for odd in _odd_ones_out(sizes, "pixels")]
    for file, fact in images.items():
        if fact["damaged"]:
            damaged = f"{fact['damaged']} values are NaN or infinite"
            problems.append(f"{file}: {damaged}: replace them, or name them as nodata")
    for image, mask in zip(pairs.images, pairs.masks, strict=True):
        if image in images and mask in masks:
            found = mask_problems(images[image], masks[mask], reading, num_classes)
            problems += [f"{mask}: {problem}" for problem in found]
    ignored = reading.ignore_index
    if images and not any(any(fact["count"]) for fact in images.values()):
        problems.append(f"{pairs.images[0].parent}: no pixel of the images holds data")
    is_empty = [fact["missing"] == fact["shape"][0] * fact["shape"][1] for fact in masks.values()]
    if masks and (all(is_empty) or (reading.task != "values" and classes == {ignored})):
        alone = "the masks hold nothing but pixels that are ignored, or without data"
        problems.append(f"{pairs.masks[0].parent}: {alone}: no pixel would count")
    if training and not problems and reading.task != "values" and classes == {0, ignored}:
        alone = f"the masks hold 0 and {ignored} alone, and {ignored} is ignored"
        problems.append(f"{pairs.masks[0].parent}: {alone}: map it with MASK_VALUES={{{ignored}: 1}}")
    return problems


def find_remarks(pairs: Pairs, reading: MaskReading) -> list[str]:
    """Return what is odd about valid data: files that are not read, and masks of one class alone."""
    remarks = []
    for folder in (pairs.images[0].parent, pairs.masks[0].parent):
        if names := left_out(folder):
            remarks.append(f"{folder}: {len(names)} of its files and folders are not read: {some(names)}")
    if reading.task != "values":
        found = {value for file in pairs.masks for value in reading.values_in(pairs.fact(file))}
        classes = {reading.class_of(value) for value in found} - {reading.ignore_index}
        if len(classes) == 1:
            remarks.append(f"{pairs.masks[0].parent}: all masks hold class {classes.pop()} alone")
    return remarks


def mask_problems(
    image: Facts, mask: Facts, reading: MaskReading, num_classes: int | None = None
) -> list[str]:
    """Return what is wrong with a mask, by itself and as the partner of its image."""
    problems = []
    channels = mask["shape"][2]
    if mask["shape"][:2] != image["shape"][:2]:
        sizes = "{} x {}".format(*mask["shape"]), "{} x {}".format(*image["shape"])
        problems.append(f"its size is {sizes[0]} pixels, that of its image {sizes[1]}")
    elif away := elsewhere(mask["grid"], image["grid"], mask["shape"], "its image"):
        problems.append(f"{away}: bring both onto one grid")
    if mask["damaged"]:
        problems.append(f"{mask['damaged']} values are NaN or infinite")
    if reading.task == "values":
        return problems
    if mask["values"] is None:
        advice = "a mask holds a few different integers"
        return [*problems, f"its values ({mask['dtype']}) are no class numbers: {advice}"]
    values = sorted(reading.values_in(mask))
    if reading.task == "multi-label":
        odd = [value for value in values if reading.class_of(value) not in (0, 1, reading.ignore_index)]
        if odd:
            problems.append(f"the values {some(odd)} are not 0 or 1: {_MAP_THEM}")
        if num_classes is not None and channels != num_classes:
            problems.append(f"it has {channels} channels, the model {num_classes} outputs")
        return problems

    def is_class(label: Any) -> bool:
        return isinstance(label, int) and (
            label == reading.ignore_index or 0 <= label < (num_classes or 2**31)
        )

    odd = [value for value in values if not is_class(reading.class_of(value))]
    if odd and channels > 1:
        problems.append(f"{several_channels(channels)} (unmapped: {some(odd)})")
    elif odd:
        allowed = f"0 to {num_classes - 1}" if num_classes else "0 and above"
        allowed += f" (ignored: {reading.ignore_index})"
        outside = f"the values {some(odd)} are outside of the classes {allowed}"
        problems.append(f"{outside}: {_MAP_THEM}, or correct ch_out")
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
    problems = []
    nodata = pairs.info(pairs.images[0]).nodata if pairs.nodata is None else pairs.nodata
    if nodata not in (None, contract.nodata) and str(nodata) != str(contract.nodata):  # NaN is not NaN
        other = f"its nodata value is {nodata}, that of the training data {contract.nodata}"
        problems.append(f"{pairs.images[0].parent}: {other}: give both the same nodata")
    problems += contract_problems(contract, pairs.images, pairs.info)
    if with_values and contract.maximum and not problems:
        own = pairs.fit(contract, normalize=False)
        low, high = np.array(own.minimum), np.array(own.maximum)
        for problem in contract.range_problems(low, high, low, high):
            problems.append(f"{pairs.images[0].parent}: {problem} (CHECK_VALUES=False takes it anyway)")
    return problems


def several_channels(channels: int) -> str:
    """Say that a multi-class mask must not have several channels."""
    return (
        f"it has {channels} channels: a multi-class mask has one, or colors that MASK_VALUES names all, such "
        'as {(255, 0, 0): 1}; overlapping classes need task="multi-label"'
    )


def some(values: Iterable[Any]) -> str:
    """List the first few of some values."""
    values = list(values)
    return ", ".join(map(str, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")


def _odd_ones_out(values: dict[Path, Any], what: str) -> list[str]:
    """Return a sentence for each file whose value differs from that of most."""
    if len(set(values.values())) < 2:
        return []
    usual = Counter(values.values()).most_common(1)[0][0]
    odd = {file: value for file, value in values.items() if value != usual}
    return [f"{file}: has {value} {what}, most have {usual}" for file, value in odd.items()]
