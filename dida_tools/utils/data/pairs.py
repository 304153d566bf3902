"""Pairs of images and masks: which files belong together, what is known of them, what their masks mean."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from .contract import DataContract
from .facts import Facts, Moments, merge_moments, scan_files, scan_image, scan_mask
from .images import DataError, ImageInfo, image_info, list_images


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

    def fact(self, file: Path, cache_file: Path | None = None) -> Facts:
        """Return what is known of a file."""
        return self._facts[file] if file in self._facts else self.scan(cache_file)[file]

    def info(self, file: Path) -> ImageInfo:
        """Return size, dtype and nodata of a file, from its facts if there are any."""
        if file not in self._infos:
            facts = self._facts.get(file, {})
            if "shape" in facts:
                nodata = None if facts["nodata"] is None else float(facts["nodata"])
                self._infos[file] = ImageInfo(tuple(facts["shape"]), facts["dtype"], nodata)
            else:
                self._infos[file] = image_info(file)
        return self._infos[file]

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and std of each channel over all pixels that hold data, as they stand in the files."""
        moments: Moments = (0, 0.0, 0.0)
        for file in self.images:
            facts = self.fact(file)
            count, mean, m2 = (np.array(facts[name]) for name in ("count", "mean", "m2"))
            moments = merge_moments(moments, (count, mean, m2))
        count, mean, m2 = moments
        return np.asarray(mean), np.sqrt(m2 / np.maximum(count, 1))

    def fit(self, contract: DataContract, normalize: bool, cache_file: Path | None = None) -> DataContract:
        """Return a contract with the range of each channel's values, and mean and std to normalize them."""
        facts = [self.fact(file, cache_file) for file in self.images]
        if limits := [(one["min"], one["max"]) for one in facts if all(one["count"])]:
            low, high = np.array(limits).transpose(1, 0, 2)
            contract = replace(contract, minimum=_tuple(low.min(0)), maximum=_tuple(high.max(0)))
        if not normalize:
            return contract
        mean, std = (statistic * contract.scale for statistic in self.mean_and_std())
        std = np.where(std > 1e-12 * np.abs(mean), std, 1.0)  # a constant channel becomes 0
        return replace(contract, mean=_tuple(mean), std=_tuple(std))


def _tuple(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist())


def pair_files(x_dir: Path, y_dir: Path) -> tuple[list[Path], list[Path]]:
    """
    Find images and their masks, by file name without ending.

    :raises DataError: with everything that is missing or left over
    """
    problems = [f"{folder}: there is no such folder" for folder in (x_dir, y_dir) if not folder.is_dir()]
    if problems:
        raise DataError(problems)
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
    if problems:
        raise DataError(problems)
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
