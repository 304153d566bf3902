"""
Contains the doctor: what is wrong or odd about a dataset, from the facts of its files.

It does not find images that were copied with a change of their values (compressed, resampled, brightened, cropped), nor
parts of one place without a georeference.
"""

import contextlib
import copy
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .datasets import NpyDataset
from .facts import Facts
from .images import DataError

_NEARLY_ALL = 0.95  # part of the pixels
_SMALLEST_OVERLAP = 0.01  # part of the smaller tile: neighbors may touch
_MOST_CHANNELS = 32  # a first dimension up to this may be channels
_OTHER_RANGE = 10.0  # times larger or smaller, of a part
_OTHER_RANGE_OF_ONE = (
    1000.0  # of a single image; in the dark, images of one microscope differ by some dozen times
)
_FILES_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """
    Something found.

    :param is_problem: whether training would refuse the data, or learn or measure what is wrong
    :param text: what it is and what to do, one sentence
    :param files: the files it is about, or pairs of them ("a = b"), relative to the dataset
    """

    is_problem: bool
    text: str
    files: Sequence[str] = ()

    def __str__(self) -> str:
        head = "  PROBLEM  " if self.is_problem else "  remark   "
        lines = [head + self.text]
        if self.files:
            more = len(self.files) - _FILES_NAMED
            named = ", ".join(self.files[:_FILES_NAMED]) + (f", and {more} more" if more > 0 else "")
            lines.append(" " * len(head) + named)
        return "\n".join(
            textwrap.fill(
                line, 110, subsequent_indent=" " * len(head), break_on_hyphens=False, break_long_words=False
            )
            for line in lines
        )


@dataclass(frozen=True)
class _Pair:
    """An image and its mask: their part, their names, and what is known of them."""

    part: str
    image_name: str
    mask_name: str
    image: Facts
    mask: Facts


def examine(
    parts: dict[str, NpyDataset], root: Path, task: str = "multi-class", mask_values: dict | None = None
) -> list[Finding]:
    """
    What is wrong or odd, problems first.

    :param parts: "train" and possibly "test" and "validation", all of whose files can be read
    :param root: what the names of files are relative to
    :param task: of the training, as suggest() gives it
    :param mask_values: likewise
    """
    pairs = [
        _Pair(part, _name(image, root), _name(mask, root), dataset.scan()[image], dataset.scan()[mask])
        for part, dataset in sorted(parts.items(), key=lambda item: item[0] != "train")
        for image, mask in zip(dataset.images, dataset.masks, strict=True)
    ]
    found = list(_axes(pairs))
    if not found:  # else, sizes and channels are mixed up, and all that follows would be too
        found += _refused(parts, root, task, mask_values or {})
        found += [*_duplicates(pairs), *_overlaps(pairs), *_ranges(pairs), *_channels(pairs), *_empty(pairs)]
        if task != "values":
            found += [*_mask_values(pairs, mask_values or {}), *_ignored(pairs, mask_values or {})]
            found += _classes(pairs, task, mask_values or {})
    return sorted(found, key=lambda finding: not finding.is_problem)


def report(findings: Sequence[Finding]) -> str:
    """The findings as text."""
    problems = sum(finding.is_problem for finding in findings)
    counts = [_count(problems, "problem")] if problems else []
    counts += [_count(len(findings) - problems, "remark")] if len(findings) > problems else []
    return "\n".join([f"doctor: {', '.join(counts) or 'nothing found'}", *map(str, findings)])


# --------------------------------------------------------------------------------------------------------------- checks


def _axes(pairs: list[_Pair]) -> Iterator[Finding]:
    """Arrays (C, H, W), which are read as (H, W, C)."""
    shapes = [(pair.image["shape"], pair.mask["shape"]) for pair in pairs]
    images = [
        pair.image_name
        for pair, (image, mask) in zip(pairs, shapes, strict=True)
        if _is_first(image, mask, True)
    ]
    masks = [
        pair.mask_name
        for pair, (image, mask) in zip(pairs, shapes, strict=True)
        if _is_first(mask, image, False)
    ]
    for noun, names in (("image", images), ("mask", masks)):
        if names:
            advice = "channels are expected last: save np.moveaxis(array, 0, -1)."
            yield Finding(
                True, f"{_count(len(names), noun)} with channels first, as it seems; {advice}", names
            )


def _is_first(shape: Sequence[int], partner: Sequence[int], may_guess: bool) -> bool:
    """Whether the first of three dimensions is the channels, by what the partner's size is, or else by the numbers."""
    if list(shape[:2]) == list(partner[:2]):
        return False
    side = min(shape[1:])
    return list(shape[1:]) == list(partner[:2]) or (
        may_guess and 2 * shape[0] < side > _MOST_CHANNELS >= shape[0]
    )


def _refused(parts: dict[str, NpyDataset], root: Path, task: str, mask_values: dict) -> Iterator[Finding]:
    """What training would refuse."""
    problems: list[str] = []
    contract = parts["train"].contract(normalize=False)
    for part in parts.values():
        dataset = copy.copy(part.with_mask_values(mask_values) if mask_values else part)
        dataset.task = task
        try:
            dataset.check(training=False)
            dataset.with_contract(contract)
        except DataError as error:
            # Other units are told by _ranges, which sees smaller factors, too.
            problems += [problem for problem in error.problems if "as if they had been" not in problem]
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for problem in problems:
        name, _, text = problem.partition(": ")
        groups[re.sub(r"\d+", "0", text)].append((_name(Path(name), root), text))
    for group in groups.values():
        like = ", as the first of them" if len(group) > 1 else ""
        text = f"{_count(len(group), 'file')} would be refused{like}: {group[0][1]}."
        yield Finding(True, text, [name for name, _ in group])


def _duplicates(pairs: list[_Pair]) -> Iterator[Finding]:
    """The same image twice; or the same values in another order, as a flipped or turned copy has them."""
    whole = [pair for pair in pairs if not _is_blank(pair.image)]
    same = _groups(whole, lambda image: (image["shape"], image["dtype"], image["digests"]))
    yield from _copies(same, ("is the same as one", "are the same as others"), ("values", "places"))
    distinct: dict[str, _Pair] = {}
    for pair in whole:
        distinct.setdefault(str((pair.image["shape"], pair.image["digests"])), pair)
    turned = _groups(list(distinct.values()), _statistics)
    yield from _copies(
        turned, ("is a flipped or turned copy of one", "are flipped or turned copies"), ("values",)
    )


def _copies(groups: list[list[_Pair]], says: tuple[str, str], compared: Sequence[str]) -> Iterator[Finding]:
    found: dict[tuple[bool, bool], list[str]] = defaultdict(list)
    for group in groups:
        for number, pair in enumerate(group[1:], 1):
            elsewhere = [other for other in group[:number] if other.part != pair.part]
            other = (elsewhere or group)[0]
            differ = any(pair.mask[name] != other.mask[name] for name in compared)
            found[bool(elsewhere), differ].append(f"{pair.image_name} = {other.image_name}")
    for (is_leak, differ), names in sorted(found.items(), reverse=True):
        text = f"{_count(len(names), 'image')} {says[len(names) > 1]} of {'another' if is_leak else 'the same'} part"
        text += ", with another mask: " if differ else ": "
        text += (
            "results on what was trained on are too good; leave it in one part alone."
            if is_leak
            else "a validation part drawn from it may hold what is trained on; leave one of them."
        )
        yield Finding(is_leak or differ, text, names)


def _overlaps(pairs: list[_Pair]) -> Iterator[Finding]:
    """Georeferenced tiles of two parts that show the same place."""
    tiles = [pair for pair in pairs if pair.image["grid"]]
    found = []
    for crs in {pair.image["grid"]["crs"] for pair in tiles if pair.part != "train"}:
        corners = _projected([pair.image["grid"] for pair in tiles], crs)
        low, high = corners.min(1), corners.max(1)
        for number, pair in enumerate(tiles):
            if pair.part == "train" or pair.image["grid"]["crs"] != crs:
                continue
            near = ((low < high[number]) & (high > low[number])).all(1)  # never of NaN
            for index in np.flatnonzero(near):
                other = tiles[index]
                if other.part == "train" or (other.part != pair.part and index < number):
                    share = shared_area(corners[number], corners[index])
                    if share >= _SMALLEST_OVERLAP:
                        found.append((share, f"{pair.image_name} = {other.image_name} ({share:.0%})"))
    if found:
        found.sort(reverse=True)
        yield Finding(
            True,
            f"{_count(len(found), 'pair')} of tiles from different parts overlap, by up to {found[0][0]:.0%} of the "
            "smaller tile: results on places that were trained on are too good; divide the area, not the tiles.",
            [name for _, name in found],
        )


def _projected(grids: list[dict[str, Any]], crs: str) -> np.ndarray:
    """The corners (n, 4, 2) in a coordinate system; NaN where there is no way."""
    corners = np.array([grid["corners"] for grid in grids], np.float64)
    for other in {grid["crs"] for grid in grids} - {crs}:
        chosen = np.array([grid["crs"] == other for grid in grids])
        points = np.full((int(chosen.sum()) * 4, 2), np.nan)
        if crs and other:
            from rasterio.errors import RasterioError
            from rasterio.warp import transform

            with contextlib.suppress(RasterioError):
                points = np.transpose(transform(other, crs, *corners[chosen].reshape(-1, 2).T))
        corners[chosen] = np.where(np.isfinite(points), points, np.nan).reshape(-1, 4, 2)
    return corners


def shared_area(one: np.ndarray, other: np.ndarray) -> float:
    """
    The area that two convex polygons (n, 2) share, as a part of the smaller one (Sutherland and Hodgman 1974).
    """
    areas = [_area(one), _area(other)]
    smaller = min(abs(area) for area in areas)
    if not smaller > 0:
        return 0.0
    clipped = list(one)
    for start, end in zip(other, np.roll(other, -1, 0), strict=True):
        edge, points, clipped = (end - start) * np.sign(areas[1]), clipped, []
        sides = [edge[0] * (point - start)[1] - edge[1] * (point - start)[0] for point in points]
        for number, (point, side) in enumerate(zip(points, sides, strict=True)):
            last_point, last_side = points[number - 1], sides[number - 1]
            if side * last_side < 0:
                clipped.append(last_point + (point - last_point) * last_side / (last_side - side))
            if side >= 0:
                clipped.append(point)
        if len(clipped) < 3:
            return 0.0
    return float(abs(_area(np.array(clipped))) / smaller)


def _area(polygon: np.ndarray) -> float:
    """Positive where the corners go round counterclockwise."""
    x, y = (polygon - polygon[0]).T  # of large coordinates, products lose the area
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)


def _ranges(pairs: list[_Pair]) -> Iterator[Finding]:
    """Parts or single images whose values are in other units."""
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for pair in pairs:
        if not _is_blank(pair.image):
            values[pair.part][pair.image_name] = _typical(pair.image)
    usual = {part: float(np.median(list(of_images.values()))) for part, of_images in values.items()}
    for part in usual.keys() - {"train"} if "train" in usual else ():
        if _times(usual[part], usual["train"]) >= _OTHER_RANGE:
            text = f"the values of {part} are around {usual[part]:.3g}, those of train around {usual['train']:.3g}: "
            yield Finding(True, text + "bring both to the same units.")
    odd = [
        name
        for part, of_images in values.items()
        for name, value in of_images.items()
        if _times(value, usual[part]) >= _OTHER_RANGE_OF_ONE
    ]
    if odd:
        text = f"{_count(len(odd), 'image')} with values {_OTHER_RANGE_OF_ONE:g} times larger or smaller than usual: "
        yield Finding(False, text + "look at the units.", odd)


def _times(one: float, other: float) -> float:
    return max(one, other) / min(one, other) if min(one, other) > 0 else 1.0


def _channels(pairs: list[_Pair]) -> Iterator[Finding]:
    """Channels that are constant, or equal to another one."""
    whole = [pair for pair in pairs if not _is_blank(pair.image)]
    if not whole or len({pair.image["shape"][2] for pair in whole}) > 1:
        return
    low, high = (np.array([pair.image[name] for pair in whole]) for name in ("min", "max"))
    flat = low == high
    never = flat.all(0) & (low == low[0]).all(0)
    if never.any():
        numbers = _numbers(np.flatnonzero(never))
        yield Finding(
            False, f"channel {numbers} has the same value in all images: it tells nothing; leave it out."
        )
    some = flat & ~never
    for channel in np.flatnonzero(some.any(0)):
        names = [pair.image_name for pair, is_flat in zip(whole, some[:, channel], strict=True) if is_flat]
        text = f"channel {channel} is constant in {_count(len(names), 'image')} of {len(whole)}: was it missing there?"
        yield Finding(False, text, names)
    columns = defaultdict(list)
    for channel in np.flatnonzero(~flat.all(0)):
        columns[tuple(pair.image["digests"][channel] for pair in whole)].append(channel)
    for channels in columns.values():
        if len(channels) > 1:
            text = f"channels {_numbers(channels)} are equal in all images: one of them is enough."
            yield Finding(False, text)


def _empty(pairs: list[_Pair]) -> Iterator[Finding]:
    """Images nearly without data, or of one value."""
    names: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        most = _NEARLY_ALL * pair.image["shape"][0] * pair.image["shape"][1]
        for kind, applies in (
            ("missing", pair.image["missing"] > most),
            ("zeros", pair.image["zeros"] > most),
            ("blank", _is_blank(pair.image)),
        ):
            if applies:
                names[kind].append(pair.image_name)
                break
    for kind, what in (
        ("missing", f"with data in less than {1 - _NEARLY_ALL:.0%} of the pixels: leave them out."),
        (
            "zeros",
            f"with 0 in more than {_NEARLY_ALL:.0%} of the pixels: if that is no data, give nodata=0 to the dataset.",
        ),
        ("blank", "of one value alone: leave them out."),
    ):
        if names[kind]:
            yield Finding(False, f"{_count(len(names[kind]), 'image')} {what}", names[kind])


def _mask_values(pairs: list[_Pair], mask_values: dict) -> Iterator[Finding]:
    """Masks of 0 and 255."""
    if mask_values.get(255) == 1:
        text = "masks of 0 and 255: train.py --data takes 255 for class 1; for a config of your own, "
        yield Finding(False, text + "give MASK_VALUES={255: 1}.")
        return
    values = {pair.mask_name: _values(pair.mask) for pair in pairs if pair.mask["shape"][2] == 1}
    either = [name for name, found in values.items() if 255 in found and found <= {0, 255}]
    if either and all(found <= {0, 1} for name, found in values.items() if name not in either):
        text = f"{_count(len(either), 'mask')} of 0 and 255 among masks of 0 and 1: 255 is ignored in training; if it "
        yield Finding(True, text + "means class 1, give MASK_VALUES={255: 1}.", either)


def _ignored(pairs: list[_Pair], mask_values: dict) -> Iterator[Finding]:
    """Masks that count nearly nowhere."""
    names = []
    for pair in pairs:
        height, width, _ = pair.mask["shape"]
        counted = (
            number for value, number in pair.mask["values"] or [] if not _is_ignored(value, mask_values)
        )
        if pair.mask["values"] is not None and sum(counted) < (1 - _NEARLY_ALL) * height * width:
            names.append(pair.mask_name)
    if names:
        text = f"{_count(len(names), 'mask')} with less than {1 - _NEARLY_ALL:.0%} of the pixels in a class, the others "
        yield Finding(False, text + "ignored or no data: leave them out.", names)


def _classes(pairs: list[_Pair], task: str, mask_values: dict) -> Iterator[Finding]:
    """Classes that one part lacks."""
    if any(pair.mask["values"] is None for pair in pairs):
        return
    of_part: dict[str, set[Any]] = defaultdict(set)
    for pair in pairs:
        of_part[pair.part] |= _labels(pair.mask, task, mask_values)
    train = of_part.pop("train")
    for part, labels in of_part.items():
        for missing, has, lacks, so in (
            (labels - train, part, "train", "nothing can be learned of it."),
            (train - labels, "train", part, f"the results on {part} tell nothing of it."),
        ):
            if missing:
                text = f"{_count(len(missing), 'class', 'classes')} of {has} not in {lacks}: {so}"
                yield Finding(lacks == "train", text, [f"class {label}" for label in sorted(missing)])


# ---------------------------------------------------------------------------------------------------------------- facts


def _name(file: Path, root: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def _numbers(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _is_blank(image: Facts) -> bool:
    """Whether all pixels with data are equal."""
    return image["min"] == image["max"]


def _groups(pairs: list[_Pair], key: Any) -> list[list[_Pair]]:
    groups = defaultdict(list)
    for pair in pairs:
        groups[str(key(pair.image))].append(pair)
    return [group for group in groups.values() if len(group) > 1]


def _statistics(image: Facts) -> Any:
    """What a flipped or turned copy shares with its image, and hardly any other image does."""
    rounded = [[f"{value:.9g}" for value in image[name]] for name in ("mean", "m2")]
    return sorted(image["shape"][:2]), image["dtype"], image["min"], image["max"], image["count"], rounded


def _typical(image: Facts) -> float:
    """The largest root mean square of a channel."""
    count, mean, m2 = (np.array(image[name]) for name in ("count", "mean", "m2"))
    return float(np.sqrt(mean**2 + m2 / np.maximum(count, 1)).max())


def _values(mask: Facts) -> set[Any]:
    found = mask["values"] or []
    return {part for value, _ in found for part in (value if isinstance(value, list) else [value])}


def _is_ignored(value: Any, mask_values: dict) -> bool:
    """Whether a pixel is 255 in all channels, and that is neither a class nor white."""
    return 255 not in mask_values and set(np.atleast_1d(value).tolist()) == {255} and np.size(value) != 3


def _labels(mask: Facts, task: str, mask_values: dict) -> set[Any]:
    """Class numbers or colors of a multi-class mask; of a multi-label one, the channels in which something is."""
    values = [value for value, _ in mask["values"] if not _is_ignored(value, mask_values)]
    if task == "multi-class":
        return {
            tuple(value) if isinstance(value, list) else mask_values.get(value, value) for value in values
        }
    rows = [value if isinstance(value, list) else [value] for value in values]
    return {label for row in rows for label, part in enumerate(row) if part == 1 or part in mask_values}
