"""
Contains the datasets: folders of images and masks as PyTorch datasets.

The routines train on any dataset of (input, target) pairs. These offer more, which the routines use where it is there
and which your own dataset may offer too:

- ``arguments``: what it was built with, for the record
- ``check(cache_file, num_classes, training)``: raises DataError with everything that is wrong, before training starts
- ``contract(normalize)``, ``with_contract(contract)``: how images are read, fitted on this dataset, applied to all
- ``split(fraction, seed)``: two datasets; ``for_evaluation()``: without augmentation, every pixel once
- ``sample_name(index)``: for messages; ``sample_shape(index)``: evaluation batches samples of the same shape
"""

import copy
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .contract import TASKS, DataContract, default_scale
from .facts import Facts, Moments, mask_nodata, merge_moments, scan_files, scan_image, scan_mask
from .images import DataError, ImageInfo, Window, image_info, list_images, read_image

Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class NpyDataset(Dataset):
    """
    Pairs of images and masks of the same file name in two folders, in any format of images.py.

    In training it gives random crops with augmentation, read without the rest of the image; in evaluation
    (``for_evaluation()``) every pixel once, in windows of at most ``tile`` pixels.
    """

    def __init__(
        self,
        x_dir: str | os.PathLike,
        y_dir: str | os.PathLike,
        crop: int | None = None,
        crops_per_image: int = 1,
        foreground: float = 0.0,
        augment: Transform | Sequence[Transform] = (),
        task: str = "multi-class",
        class_names: Sequence[str] = (),
        channel_names: Sequence[str] = (),
        mask_values: dict | None = None,
        ignore_index: int = 255,
        nodata: float | None = None,
        scale: float | None = None,
        tile: int = 1024,
        class_colors: Sequence[Sequence[int]] = (),
    ) -> None:
        """
        :param x_dir: folder of the images, (H, W) or (H, W, C)
        :param y_dir: folder of the masks: (H, W) of class numbers for "multi-class", (H, W) or (H, W, C) of 0 and 1 for
            "multi-label" (binary is one such class), numbers of any kind for "values"
        :param crop: edge of the random crops in pixels; None takes whole images, which then need the same size
        :param crops_per_image: samples of each image in an epoch
        :param foreground: part of the crops that are drawn to hold a class other than 0, each class as often as another
            (not for "values")
        :param augment: functions of transforms.py, such as transforms.STANDARD, or a single one
        :param task: "multi-class", "multi-label" or "values"
        :param class_names: names of the classes, in the order of their numbers
        :param channel_names: names of the channels of the images, in their order
        :param mask_values: class number of values in the masks, such as {255: 1} or {(255, 0, 0): 1}; others stay
        :param ignore_index: class number of pixels that count nowhere
        :param nodata: value of pixels without data, if the files do not state it; they count nowhere (but for "values")
        :param scale: what images are multiplied with; None divides integers by the largest value of their type
        :param tile: largest edge of a sample in evaluation, in pixels
        :param class_colors: a color of each class on maps, (red, green, blue) from 0 to 255
        :raises DataError: if the folders do not hold pairs, with every missing or surplus partner
        """
        self.arguments = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.arguments |= {"x_dir": str(x_dir), "y_dir": str(y_dir)}
        if task not in TASKS:
            raise ValueError(f"task is {task!r}: choose one of {', '.join(TASKS)}.")
        for name, edge in {"crop": crop, "crops_per_image": crops_per_image, "tile": tile}.items():
            if edge is not None and edge < 1:
                raise ValueError(f"{name} is {edge}: it is at least 1.")
        self.images, self.masks = pair_files(Path(x_dir), Path(y_dir))
        self.crop, self.crops_per_image, self.foreground = crop, crops_per_image, foreground
        self.augment = (augment,) if callable(augment) else tuple(augment)
        self.task, self.class_names, self.channel_names = task, tuple(class_names), tuple(channel_names)
        self.mask_values, self.ignore_index = mask_values, ignore_index
        self.nodata, self.scale, self.tile = nodata, scale, tile
        self.class_colors = tuple(tuple(color) for color in class_colors)
        self._info: dict[Path, ImageInfo] = {}
        self._facts: dict[Path, Facts] = {}
        self._is_part = False  # of a dataset that was split: its values are as they are
        self._contract: DataContract | None = None
        self._windows: list[tuple[int, Window]] | None = None  # in evaluation: (file, window) of each sample

    def __len__(self) -> int:
        return len(self.images) * self.crops_per_image if self._windows is None else len(self._windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """
        :return: the image (C, H, W) in float32, and its mask: (H, W) in int64 for "multi-class", (C, H, W) in float32
            for "multi-label" and "values"
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number, window = self._choose_window(index)
        image, valid = self._reading().prepare(read_image(self.images[number], window))
        mask = self._read_mask(number, window)
        if self.task != "values":
            mask[..., ~valid] = self.ignore_index
        if self._windows is None:
            for transform in self.augment:
                image, mask = transform(image, mask)
        return image.contiguous(), mask.contiguous()

    # ------------------------------------------------------------------------------------------------ windows and masks

    def _choose_window(self, index: int) -> tuple[int, Window]:
        if self._windows is not None:
            return self._windows[index]
        number = index // self.crops_per_image
        height, width, _ = self._image_info(number).shape
        if self.crop is None:
            return number, Window(0, 0, height, width)
        if self.foreground and self.task != "values" and torch.rand(()) < self.foreground:
            places = list(self._foreground_places(number).values())
            if places:
                of_class = places[int(torch.randint(len(places), ()))]
                return number, self._random_window(
                    height, width, of_class[int(torch.randint(len(of_class), ()))]
                )
        return number, self._random_window(height, width)

    def _random_window(self, height: int, width: int, place: int | None = None) -> Window:
        """A window anywhere, or one that holds a place (row * width + column)."""
        size = self.crop or 0
        if size > min(height, width):
            raise DataError([f"the crop of {size} pixels is larger than an image of {height} x {width}"])
        row, column = (None, None) if place is None else divmod(place, width)
        return Window(_random_start(height, size, row), _random_start(width, size, column), size, size)

    def _foreground_places(self, number: int) -> dict[int, list[int]]:
        """Some places of each class other than 0 in a mask."""
        fact = self._fact(self.masks[number])
        places: dict[int, list[int]] = {}
        for (value, _), noted in zip(fact.get("values") or [], fact.get("places") or [], strict=True):
            for label in self._labels(value):
                places.setdefault(label, []).extend(noted)
        return places

    def _labels(self, value: Any) -> list[int]:
        """The classes other than 0 of a pixel that has this value."""
        if self.task == "multi-class":
            label = self._class_of(value)
            return [label] if isinstance(label, int) and label not in (0, self.ignore_index) else []
        row = value if isinstance(value, list) else [value]
        return [label for label, part in enumerate(row) if self._class_of(part) == 1]

    def _class_of(self, value: Any) -> Any:
        value = tuple(value) if isinstance(value, list) else value
        return value if self.mask_values is None else self.mask_values.get(value, value)

    def _read_mask(self, number: int, window: Window) -> Tensor:
        stored = read_image(self.masks[number], window)
        mask = map_values(stored, self.mask_values)
        nodata = mask_nodata(self._info_of(self.masks[number]))
        if nodata is not None and self.task != "values":
            mask[(stored == nodata).all(-1)] = self.ignore_index
        if self.task == "multi-class":
            if mask.shape[-1] != 1:
                raise DataError([f"{self.masks[number]}: {_several_channels(mask.shape[-1])}"])
            return torch.from_numpy(mask[..., 0].astype(np.int64))
        return torch.from_numpy(np.moveaxis(mask, -1, 0).astype(np.float32))

    # --------------------------------------------------------------------------------------------------- reading images

    def _image_info(self, number: int) -> ImageInfo:
        return self._info_of(self.images[number])

    def _info_of(self, file: Path) -> ImageInfo:
        if file not in self._info:
            self._info[file] = image_info(file)
        return self._info[file]

    def _fact(self, file: Path, cache_file: Path | None = None) -> Facts:
        if file not in self._facts:
            self.scan(cache_file)
        return self._facts[file]

    def scan(self, cache_file: Path | None = None) -> dict[Path, Facts]:
        """Reads every file once, or takes what an earlier scan found; see facts.py."""
        if not all(file in self._facts for file in [*self.images, *self.masks]):
            self._facts = scan_files(self.images, scan_image, cache_file, nodata=self.nodata)
            self._facts |= scan_files(self.masks, scan_mask, cache_file)
            for file in [*self.images, *self.masks]:
                fact = self._facts[file]
                if "problem" not in fact:  # saves opening the file for them
                    nodata = None if fact["nodata"] is None else float(fact["nodata"])
                    height, width, channels = fact["shape"]
                    self._info[file] = ImageInfo((height, width, channels), fact["dtype"], nodata)
        return self._facts

    def _reading(self) -> DataContract:
        """The contract that was set, or one without normalization."""
        if self._contract is None:
            self._contract = self._plain_contract()
        return self._contract

    def _plain_contract(self) -> DataContract:
        info = self._image_info(0)
        return DataContract(
            channels=info.shape[2],
            channel_names=self.channel_names,
            dtype=info.dtype,
            scale=default_scale(info.dtype) if self.scale is None else self.scale,
            nodata=info.nodata if self.nodata is None else self.nodata,
            task=self.task,
            class_names=self.class_names,
            class_colors=self.class_colors,
        )

    def contract(self, normalize: bool = True, cache_file: Path | None = None) -> DataContract:
        """
        How these images are read, and what values they hold. With normalize, mean and deviation of each channel are
        fitted on them.
        """
        facts = [self._fact(file, cache_file) for file in self.images]
        edges = [min(self.tile, max(fact["shape"][:2])) for fact in facts]
        minimum, maximum = self._ranges(facts)
        contract = dataclasses.replace(
            self._plain_contract(), minimum=minimum, maximum=maximum, tile_size=self.crop or max(edges)
        )
        if not normalize:
            return contract
        mean, std = (statistic * contract.scale for statistic in self.mean_and_std(cache_file))
        std = np.where(std > 1e-12 * np.abs(mean), std, 1.0)  # a constant channel becomes 0
        return dataclasses.replace(contract, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def _ranges(self, facts: Sequence[Facts]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Smallest and largest value of each channel, as they stand in the files."""
        ranges = [(fact["min"], fact["max"]) for fact in facts if all(fact["count"])]
        if not ranges:
            return (), ()
        low, high = np.array(ranges).transpose(1, 0, 2)
        return tuple(low.min(0).tolist()), tuple(high.max(0).tolist())

    def mean_and_std(self, cache_file: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of each channel over all pixels that hold data, as they stand in the files."""
        moments: Moments = (0, 0.0, 0.0)
        for file in self.images:
            facts = self._fact(file, cache_file)
            part = (np.array(facts["count"]), np.array(facts["mean"]), np.array(facts["m2"]))
            moments = merge_moments(moments, part)
        count, mean, m2 = moments
        return np.asarray(mean), np.sqrt(m2 / np.maximum(count, 1))

    # ------------------------------------------------------------------------------------------- what the routines call

    def with_contract(self, contract: DataContract) -> "NpyDataset":
        """
        A copy that reads its images by this contract, usually that of the training set.

        :raises DataError: with each image that has other channels or another dtype, and if nodata is another value
        """
        problems = []
        nodata = self._plain_contract().nodata
        if (
            nodata is not None and nodata != contract.nodata and str(nodata) != str(contract.nodata)
        ):  # NaN is not NaN
            problems.append(
                f"{self.images[0].parent}: its nodata value is {nodata}, that of the training data {contract.nodata}: "
                "give both the same nodata"
            )
        for number, file in enumerate(self.images):
            problems += _contract_problems(contract, file, self._image_info(number))
        if self._facts and not problems and not self._is_part:
            low, high = (np.array(one) for one in self._ranges([self._facts[file] for file in self.images]))
            if contract.maximum and low.size:
                found = contract.range_problems(low, high, low, high)
                problems += [f"{self.images[0].parent}: {problem}" for problem in found]
        if problems:
            raise DataError(problems)
        other = copy.copy(self)
        other._contract = contract
        return other

    def with_mask_values(self, mask_values: dict) -> "NpyDataset":
        """A copy with other mask_values."""
        other = copy.copy(self)
        other.mask_values = mask_values
        other.arguments = self.arguments | {"mask_values": mask_values}
        return other

    def for_evaluation(self) -> "NpyDataset":
        """A copy without crops and augmentation that gives every pixel once, in the order of the files."""
        other = copy.copy(self)
        shapes = [self._image_info(number).shape for number in range(len(self.images))]
        other._windows = [
            (number, Window(top, left, min(self.tile, height - top), min(self.tile, width - left)))
            for number, (height, width, _) in enumerate(shapes)
            for top in range(0, height, self.tile)
            for left in range(0, width, self.tile)
        ]
        return other

    def split(self, fraction: float, seed: int) -> tuple["NpyDataset", "NpyDataset"]:
        """Splits by whole files, at least one in each part: the larger part, and a random fraction."""
        if len(self.images) < 2:
            raise DataError(
                ["one image cannot be split: add images, give a validation set, or VALIDATION_FRACTION=0"]
            )
        number = min(max(1, round(fraction * len(self.images))), len(self.images) - 1)
        order = np.random.default_rng(seed).permutation(len(self.images))
        return self._only(np.sort(order[number:])), self._only(np.sort(order[:number]))

    def _only(self, numbers: np.ndarray) -> "NpyDataset":
        other = copy.copy(self)
        other.images = [self.images[number] for number in numbers]
        other.masks = [self.masks[number] for number in numbers]
        other._is_part = True
        return other if self._windows is None else other.for_evaluation()

    def select(self, indices: Sequence[int]) -> "NpyDataset":
        """Return a dataset of the images alone that these samples are taken from."""
        windows, crops = self._windows, self.crops_per_image
        numbers = {index // crops if windows is None else windows[index][0] for index in indices}
        return self._only(np.array(sorted(numbers)))

    def sample_name(self, index: int) -> str:
        """The image's file name, for messages."""
        return (
            self.images[index // self.crops_per_image]
            if self._windows is None
            else self.images[self._windows[index][0]]
        ).name

    def sample_shape(self, index: int) -> tuple[int, int]:
        """Height and width of a sample in evaluation."""
        _, window = self._choose_window(index)
        return window.height, window.width

    def check(
        self, cache_file: Path | None = None, num_classes: int | None = None, training: bool = True
    ) -> None:
        """
        Reads every file once and checks all that training relies on.

        :param num_classes: number of the model's output channels, if class numbers are to be checked against it
        :param training: whether crops are taken, or whole images evaluated
        :raises DataError: with everything that is wrong: unreadable files, NaN, mixed channels, dtypes, nodata values
            or sizes, masks of another size than their image or with values outside the classes
        """
        facts = self.scan(cache_file)
        problems = [
            facts[file]["problem"] for file in [*self.images, *self.masks] if "problem" in facts[file]
        ]
        images = {file: facts[file] for file in self.images if "problem" not in facts[file]}
        problems += _odd_ones_out({file: fact["shape"][2] for file, fact in images.items()}, "channels")
        problems += _odd_ones_out({file: fact["dtype"] for file, fact in images.items()}, "as dtype")
        problems += _odd_ones_out({file: fact["nodata"] for file, fact in images.items()}, "as nodata value")
        masks = {file: facts[file]["shape"][2] for file in self.masks if "problem" not in facts[file]}
        problems += _odd_ones_out(masks, "channels")
        if training and self.crop is None:
            odd = _odd_ones_out(
                {file: "{} x {}".format(*fact["shape"]) for file, fact in images.items()}, "pixels"
            )
            problems += [f"{problem}: images of several sizes need a crop" for problem in odd]
        for file, fact in images.items():
            if fact["damaged"]:
                problems.append(
                    f"{file}: {fact['damaged']} values are NaN or infinite: replace them, or name them as nodata"
                )
            if training and self.crop is not None and self.crop > min(fact["shape"][:2]):
                size = "{} x {}".format(*fact["shape"])
                problems.append(f"{file}: its size is {size} pixels, too small for a crop of {self.crop}")
        for image, mask in zip(self.images, self.masks, strict=True):
            if "problem" not in facts[image] and "problem" not in facts[mask]:
                problems += [
                    f"{mask}: {problem}"
                    for problem in self._mask_problems(facts[image], facts[mask], num_classes)
                ]
        if (
            training
            and not problems
            and self.task != "values"
            and self._flat_classes() == {0, self.ignore_index}
        ):
            problems.append(
                f"{self.masks[0].parent}: the masks hold 0 and {self.ignore_index} alone, and {self.ignore_index} is "
                f"ignored: map it with MASK_VALUES={{{self.ignore_index}: 1}}"
            )
        if problems:
            raise DataError(problems)

    def _mask_problems(self, image: Facts, mask: Facts, num_classes: int | None) -> list[str]:
        problems = []
        if mask["shape"][:2] != image["shape"][:2]:
            sizes = "{} x {}".format(*mask["shape"]), "{} x {}".format(*image["shape"])
            problems.append(f"its size is {sizes[0]} pixels, that of its image {sizes[1]}")
        if mask["damaged"]:
            problems.append(f"{mask['damaged']} values are NaN or infinite")
        if self.task == "values":
            return problems
        if mask["values"] is None:
            return [
                *problems,
                f"its values ({mask['dtype']}) are no class numbers: a mask holds a few different integers",
            ]
        if self.task == "multi-class":
            values = [tuple(value) if isinstance(value, list) else value for value, _ in mask["values"]]
            found = [str(value) for value in values if not self._is_class(self._class_of(value), num_classes)]
            if found and mask["shape"][2] > 1:
                problems.append(_several_channels(mask["shape"][2]) + f" (unmapped: {', '.join(found[:8])})")
            elif found:
                allowed = f"0 to {num_classes - 1}" if num_classes else "0 and above"
                problems.append(
                    f"the values {', '.join(found[:8])} are outside of the classes {allowed} "
                    f"(ignored: {self.ignore_index}): map them with MASK_VALUES, such as {{255: 1}}, or correct ch_out"
                )
            return problems
        flat = {v for value, _ in mask["values"] for v in (value if isinstance(value, list) else [value])}
        odd = [str(v) for v in sorted(flat) if self._class_of(v) not in (0, 1, self.ignore_index)]
        if odd:
            problems.append(
                f"the values {', '.join(odd[:8])} are not 0 or 1: map them with MASK_VALUES, such as {{255: 1}}"
            )
        if num_classes is not None and mask["shape"][2] != num_classes:
            problems.append(f"it has {mask['shape'][2]} channels, the model {num_classes} outputs")
        return problems

    def _is_class(self, value: Any, num_classes: int | None) -> bool:
        if not isinstance(value, int):
            return False
        return value == self.ignore_index or 0 <= value < (num_classes or 2**31)

    def _flat_classes(self) -> set[Any]:
        """What the masks hold after mapping, in any channel."""
        values = [value for file in self.masks for value, _ in self._fact(file).get("values") or []]
        if self.task == "multi-label":
            values = [part for value in values for part in (value if isinstance(value, list) else [value])]
        return {self._class_of(value) for value in values}


class NpyPredictionDataset(Dataset):
    """Images without masks, whole, read by a contract: for prediction."""

    def __init__(self, files: Sequence[str | os.PathLike], contract: DataContract | None = None) -> None:
        """
        :param files: image files in any format of images.py
        :param contract: how to read them; None takes what the first file suggests, without normalization
        :raises DataError: if there are no files, with each one that cannot be read or is not as the contract says
        """
        self.files = [Path(file) for file in files]
        if not self.files:
            raise DataError(["there are no files to predict"])
        if contract is None:
            info = image_info(self.files[0])
            contract = DataContract(
                info.shape[2], dtype=info.dtype, scale=default_scale(info.dtype), nodata=info.nodata
            )
        self.contract = contract
        problems = []
        for file in self.files:
            try:
                problems += _contract_problems(contract, file, image_info(file))
            except DataError as error:
                problems += error.problems
        if problems:
            raise DataError(problems)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """
        :return: the image (C, H, W) in float32 as the model expects it, and its file's name
        :raises DataError: if the image holds what the contract does not allow, such as NaN
        """
        image = read_image(self.files[index])
        problems = self.contract.problems(image)
        if problems:
            raise DataError([f"{self.files[index]}: {problem}" for problem in problems])
        return self.contract.prepare(image)[0], self.files[index].name


def pair_files(x_dir: Path, y_dir: Path) -> tuple[list[Path], list[Path]]:
    """
    Finds the images and their masks, by file name without ending.

    :raises DataError: with everything that is missing or left over
    """
    problems = [f"{folder}: there is no such folder" for folder in (x_dir, y_dir) if not folder.is_dir()]
    if problems:
        raise DataError(problems)
    by_stem: list[dict[str, Path]] = []
    for folder in (x_dir, y_dir):
        files = list_images(folder)
        if not files:
            problems.append(f"{folder}: holds no images")
        for stem, number in Counter(file.stem for file in files).items():
            if number > 1:
                problems.append(f"{folder}: {number} files are called {stem}")
        by_stem.append({file.stem: file for file in files})
    images, masks = by_stem
    if images and masks:
        problems += [f"{images[stem]}: has no mask in {y_dir}" for stem in images if stem not in masks]
        problems += [f"{masks[stem]}: has no image in {x_dir}" for stem in masks if stem not in images]
    if problems:
        raise DataError(problems)
    return list(images.values()), [masks[stem] for stem in images]


def _contract_problems(contract: DataContract, file: Path, info: ImageInfo) -> list[str]:
    pixel = np.zeros((1, 1, info.shape[2]), info.dtype)
    return [f"{file}: {problem}" for problem in contract.problems(pixel)]


def map_values(mask: np.ndarray, mask_values: dict | None) -> np.ndarray:
    """
    Replaces values of a mask (H, W, C) by class numbers; values that are not named stay.

    :param mask_values: {value: class}, or {(r, g, b): class}, which makes the mask (H, W, 1)
    """
    if not mask_values:
        return mask
    if isinstance(next(iter(mask_values)), tuple):
        result = np.full((*mask.shape[:2], 1), -1, np.int64)  # colors without a class are refused by check()
        for color, number in mask_values.items():
            result[(mask == np.asarray(color)).all(-1)] = number
        return result
    result = mask.astype(np.int64) if mask.dtype.kind in "bui" else mask.copy()
    for value, number in mask_values.items():
        result[mask == value] = number
    return result


def _random_start(length: int, size: int, place: int | None) -> int:
    """Where a part of some size begins, so that it is within the length, and holds the place if there is one."""
    low, high = 0, length - size
    if place is not None:
        low, high = max(low, place - size + 1), min(high, place)
    return low + int(torch.randint(high - low + 1, ()))


def _several_channels(channels: int) -> str:
    return (
        f"it has {channels} channels: a multi-class mask has one, or colors that MASK_VALUES names all, such as "
        '{(255, 0, 0): 1}; overlapping classes need task="multi-label"'
    )


def _odd_ones_out(values: dict[Path, Any], what: str) -> list[str]:
    """Files whose value differs from that of most, a sentence each."""
    if len(set(values.values())) < 2:
        return []
    usual = Counter(values.values()).most_common(1)[0][0]
    return [
        f"{file}: has {value} {what}, most have {usual}" for file, value in values.items() if value != usual
    ]
