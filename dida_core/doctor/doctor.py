"""
The doctor: what is in a dataset, what is wrong with it, and what config it suggests.

    python -m dida_core.doctor DIR      DIR holds x and y, or train/x, train/y, test/x, test/y

Exit codes: 0 no problem; 1 training would refuse the data, or learn or measure what is wrong. It does not
find images that were copied with other values (compressed, resampled, brightened, cropped), nor images of one
place without a georeference.
"""

import argparse
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.build import count_values, splits_of, suggest, unclear_masks
from ..data.contract import DataContract
from ..data.facts import Facts
from ..data.images import into_crs, raise_if
from ..data.pairs import MaskReading, Pairs, dataset_problems, find_problems, find_remarks

_SMALLEST_OVERLAP = 0.01  # of the smaller tile: neighbors may touch
_MOST_CHANNELS = 32  # a first dimension up to this may be channels
_OTHER_RANGE = 10.0  # times larger or smaller, of a split
_OTHER_RANGE_OF_ONE = 1000.0  # of an image; in the dark, images of one microscope differ by some dozen times


class Finding(NamedTuple):
    """A problem or a remark: what it is and what to do, and the files, or pairs of files, concerned."""

    is_problem: bool
    text: str
    files: Sequence[str] = ()


class _Pair(NamedTuple):
    split: str
    name: str  # of the image
    mask_name: str
    image: Facts
    mask: Facts


def examine(splits: dict[str, Pairs], root: Path, reading: MaskReading) -> list[Finding]:
    """
    Return what is wrong or odd, problems first.

    :param splits: "train" and possibly "test" and "validation", all of whose files can be read
    :param root: what the names of files are relative to
    :param reading: what the masks mean
    """
    pairs = [
        _Pair(split, _name(image, root), _name(mask, root), of_split.fact(image), of_split.fact(mask))
        for split, of_split in sorted(splits.items(), key=lambda item: item[0] != "train")
        for image, mask in zip(of_split.images, of_split.masks, strict=True)
    ]
    found = list(_axes(pairs))
    if not found:  # else, sizes and channels are mixed up, and all that follows would be too
        remarks = [remark for pairs in splits.values() for remark in find_remarks(pairs, reading)]
        found += [Finding(remark.endswith(" alone"), f"{remark}.") for remark in remarks]
        found += [*_refused(splits, root, reading), *_copies(pairs), *_overlaps(pairs), *_ranges(pairs)]
        if reading.task != "values":
            found += [*_mask_values(splits.values(), reading), *_classes(pairs, reading)]
    return sorted(found, key=lambda finding: not finding.is_problem)


def _axes(pairs: list[_Pair]) -> Iterator[Finding]:
    """Find arrays (C, H, W), which are read as (H, W, C), by the partner's size, or else by the numbers."""

    def is_first(shape: Sequence[int], partner: Sequence[int], may_guess: bool) -> bool:
        few = may_guess and 2 * shape[0] < min(shape[1:]) > _MOST_CHANNELS >= shape[0]
        return shape[:2] != partner[:2] and (shape[1:] == partner[:2] or few)

    names = [one.name for one in pairs if is_first(one.image["shape"], one.mask["shape"], True)]
    names += [one.mask_name for one in pairs if is_first(one.mask["shape"], one.image["shape"], False)]
    if names:
        advice = "channels are expected last: save np.moveaxis(array, 0, -1)."
        yield Finding(True, f"{_count(names, 'file')} with channels first, as it seems; {advice}", names)


def _refused(splits: dict[str, Pairs], root: Path, reading: MaskReading) -> Iterator[Finding]:
    """Find what training would refuse."""
    train = splits["train"]
    contract = train.fit(DataContract.of(train.info(train.images[0]), nodata=train.nodata), normalize=False)
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for pairs in splits.values():
        for problem in find_problems(pairs, reading, training=False) or dataset_problems(contract, pairs):
            name, _, text = problem.partition(": ")
            if "as if they had been" not in text:  # _ranges sees smaller factors, too
                groups[re.sub(r"\d+", "0", text)].append((_name(Path(name), root), text))
    for group in groups.values():
        like = ", as the first of them" if len(group) > 1 else ""
        text = f"{_count(group, 'file')} would be refused{like}: {group[0][1]}."
        yield Finding(True, text, [name for name, _ in group])


def _copies(pairs: list[_Pair]) -> Iterator[Finding]:
    """Find images twice, and the same values in another order, as a flipped or rotated copy has them."""

    def values(image: Facts) -> Any:
        return image["shape"], image["dtype"], image["digests"]

    def statistics(image: Facts) -> Any:
        rounded = [f"{value:.9g}" for name in ("mean", "m2") for value in image[name]]
        return sorted(image["shape"][:2]), image["dtype"], image["min"], image["max"], image["count"], rounded

    groups = _groups([pair for pair in pairs if not _is_blank(pair.image)], values)
    yield from _copies_in(groups, "is the same as one", ("values", "places"))
    turned = _groups([group[0] for group in groups], statistics)
    yield from _copies_in(turned, "is a flipped or rotated copy of one", ("values",))


def _groups(pairs: list[_Pair], key: Callable[[Facts], Any]) -> list[list[_Pair]]:
    groups = defaultdict(list)
    for pair in pairs:
        groups[str(key(pair.image))].append(pair)
    return list(groups.values())


def _copies_in(groups: list[list[_Pair]], verb: str, compared: Sequence[str]) -> Iterator[Finding]:
    found: dict[tuple[bool, bool], list[str]] = defaultdict(list)
    for group in groups:
        for number, pair in enumerate(group[1:], 1):
            elsewhere = [other for other in group[:number] if other.split != pair.split]
            other = (elsewhere or group)[0]
            differ = any(pair.mask[name] != other.mask[name] for name in compared)
            found[bool(elsewhere), differ].append(f"{pair.name} = {other.name}")
    for (is_leak, differ), names in sorted(found.items(), reverse=True):
        text = f"{_count(names, 'image')}: each {verb} of {'another' if is_leak else 'the same'} split"
        text += f"{', with another mask' if differ else ''}; "
        if is_leak:
            text += "results on what was trained on are too good. Leave it in one split alone."
        else:
            text += "a validation set drawn from this split may hold what is trained on. Leave one of them."
        yield Finding(is_leak or differ, text, names)


def _overlaps(pairs: list[_Pair]) -> Iterator[Finding]:
    """Find georeferenced tiles of two splits that show the same place."""
    tiles = [pair for pair in pairs if pair.image["grid"]]
    found = []
    for crs in {pair.image["grid"]["crs"] for pair in tiles if pair.split != "train"}:
        rectangles = _rectangles([pair.image["grid"] for pair in tiles], crs)
        for number, pair in enumerate(tiles):
            if pair.split != "train" and pair.image["grid"]["crs"] == crs:
                shared = _shared_area(rectangles[number], rectangles)
                for index in np.flatnonzero(shared >= _SMALLEST_OVERLAP):  # NaN never is
                    other = tiles[index]
                    if other.split == "train" or (other.split != pair.split and index < number):
                        found.append((shared[index], f"{pair.name} = {other.name} ({shared[index]:.0%})"))
    if found:
        found.sort(reverse=True)
        text = f"{_count(found, 'pair')} of tiles from different splits overlap, by up to {found[0][0]:.0%}"
        advice = "results on places that were trained on are too good. Divide the area, not the tiles."
        yield Finding(True, f"{text} of the smaller tile: {advice}", [names for _, names in found])


def _rectangles(grids: list[dict[str, Any]], crs: str) -> np.ndarray:
    """
    Return center and size (n, 2, 2) of tiles in a coordinate system; NaN where there is no way into it.

    A tile that is slightly rotated there counts as an upright one of its size: its bounding box would overlap
    those of its neighbors.
    """
    corners = np.array([grid["corners"] for grid in grids], np.float64)
    for other in {grid["crs"] for grid in grids} - {crs}:
        chosen = np.array([grid["crs"] == other for grid in grids])
        corners[chosen] = into_crs(corners[chosen].reshape(-1, 2), other, crs).reshape(-1, 4, 2)
    edges = np.diff(corners, axis=1)[:, :2]  # along the first row, and down the last column
    sizes = np.linalg.norm(edges, axis=2)
    is_rotated = abs(edges[:, 0, 0]) < abs(edges[:, 0, 1])  # by a right angle
    return np.stack([corners.mean(1), np.where(is_rotated[:, None], sizes[:, ::-1], sizes)], 1)


def _shared_area(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return what fraction of the smaller rectangle one (center, size) and others (n, 2, 2) share."""
    (center, size), (centers, sizes) = one, others.swapaxes(0, 1)
    shared = np.minimum((size + sizes) / 2 - abs(center - centers), np.minimum(size, sizes))
    return shared.clip(0).prod(1) / np.minimum(size.prod(), sizes.prod(1))


def _ranges(pairs: list[_Pair]) -> Iterator[Finding]:
    """Find splits or single images whose values are in other units."""

    def times(one: float, other: float) -> float:
        return max(one, other) / min(one, other) if min(one, other) > 0 else 1.0

    def root_mean_square(image: Facts) -> float:  # of the channel in which it is largest
        count, mean, m2 = (np.array(image[name]) for name in ("count", "mean", "m2"))
        return float(np.sqrt(mean**2 + m2 / np.maximum(count, 1)).max())

    values = [(pair, root_mean_square(pair.image)) for pair in pairs if not _is_blank(pair.image)]
    usual = {
        split: float(np.median([value for pair, value in values if pair.split == split]))
        for split in dict.fromkeys(pair.split for pair, _ in values)
    }
    train = usual.get("train", 0.0)
    for split, value in usual.items():
        if times(value, train) >= _OTHER_RANGE:
            text = f"the values of {split} are around {value:.3g}, those of train around {train:.3g}"
            yield Finding(True, f"{text}: bring both to the same units.")
    odd = [pair.name for pair, value in values if times(value, usual[pair.split]) >= _OTHER_RANGE_OF_ONE]
    if odd:
        text = (
            f"{_count(odd, 'image')} with values {_OTHER_RANGE_OF_ONE:g} times larger or smaller than usual"
        )
        yield Finding(False, f"{text}: look at the units.", odd)


def _mask_values(splits: Iterable[Pairs], reading: MaskReading) -> Iterator[Finding]:
    """Find what values of masks may mean, or are taken for."""
    for problem in unclear_masks(splits):
        yield Finding(True, f"{problem}.")
    if 255 in (reading.mask_values or {}):  # which is ignored otherwise
        text = f"train.py --data takes the values of masks for classes by MASK_VALUES={reading.mask_values}"
        yield Finding(False, f"{text}; for a config of your own, give the same.")


def _classes(pairs: list[_Pair], reading: MaskReading) -> Iterator[Finding]:
    """Find classes that one split lacks."""

    def labels(mask: Facts) -> set[Any]:
        if reading.task == "multi-label":
            return {label for value, _ in mask["values"] or [] for label in reading.labels_of(value)}
        return {reading.class_of(value) for value in reading.values_in(mask)} - {reading.ignore_index}

    of_split: dict[str, set[Any]] = defaultdict(set)
    for pair in pairs:
        of_split[pair.split] |= labels(pair.mask)
    train = of_split.pop("train")
    for split, found in of_split.items():
        for missing, has, lacks, so in (
            (found - train, split, "train", "nothing can be learned of it"),
            (train - found, "train", split, f"the results on {split} say nothing about it"),
        ):
            if missing:
                text = f"{_count(missing, 'class')} of {has} not in {lacks}: {so}."
                yield Finding(lacks == "train", text, [f"class {label}" for label in sorted(missing)])


def _name(file: Path, root: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def _count(things: Any, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{len(things)} {noun if len(things) == 1 else plural}"


def _is_blank(image: Facts) -> bool:
    """Return whether all pixels with data are equal: that such images are copies means nothing."""
    return image["min"] == image["max"]


def fingerprint(pairs: Pairs) -> dict[str, Any]:
    """
    Return what is in a dataset: number of images, sizes, channels, dtypes, fraction of each mask value, and
    of each channel min, max, mean, std.

    :raises DataError: if a file cannot be read
    """
    facts = pairs.scan()
    raise_if(fact["problem"] for fact in facts.values() if "problem" in fact)
    images, masks = ([facts[file] for file in files] for files in (pairs.images, pairs.masks))
    values = count_values(pairs)
    total = sum((values or {}).values())
    fractions = None if values is None else {value: number / total for value, number in values.items()}
    channels = Counter(image["shape"][2] for image in images)
    statistics = []
    if len(channels) == 1:
        number = next(iter(channels))
        low, high = pairs.limits() or (np.zeros(number), np.zeros(number))
        columns = {"min": low, "max": high} | dict(zip(("mean", "std"), pairs.mean_and_std(), strict=True))
        statistics = [{name: float(values[c]) for name, values in columns.items()} for c in range(number)]
    return {
        "images": len(images),
        "sizes": Counter("{} x {}".format(*image["shape"]) for image in images),
        "channels": channels,
        "dtypes": Counter(image["dtype"] for image in images),
        "mask channels": Counter(mask["shape"][2] for mask in masks),
        "mask dtypes": Counter(mask["dtype"] for mask in masks),
        "mask values": fractions,
        "statistics": statistics,
    }


def describe(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Give a fingerprint as rows of a report."""
    yield "images", str(facts["images"])
    for name in ("sizes", "channels", "dtypes", "mask channels", "mask dtypes"):
        counts = facts[name].most_common()
        texts = [f"{value} ({number})" if len(counts) > 1 else str(value) for value, number in counts]
        yield name, _first(texts, 4)
    values = facts["mask values"]
    texts = [f"{value}: {part:.2%}" for value, part in (values or {}).items()]
    yield "mask values", "numbers, no classes" if values is None else _first(texts, 16)
    for number, channel in enumerate(facts["statistics"]):
        yield f"channel {number}", ", ".join(f"{name} {value:.5g}" for name, value in channel.items())


def _print(rows: Iterable[tuple[str, str]]) -> None:
    """Print rows of a head and a text, which is wrapped beside it."""
    for head, text in rows:
        print(textwrap.fill(text, 110, initial_indent=f"  {head:<14} ", subsequent_indent=" " * 17,
                            break_on_hyphens=False, break_long_words=False))  # fmt: skip


def _first(texts: Sequence[str], number: int) -> str:
    more = len(texts) - number
    return ", ".join(texts[:number]) + (f", and {more} more" if more > 0 else "")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_readable(item)}" for key, item in value.items()) + "}"
    return value.partition(":")[2] if isinstance(value, str) and ":" in value else repr(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds x and y, or train/x, train/y, ...")
    folder = parser.parse_args(arguments).folder
    splits = {split: Pairs(*places) for split, places in splits_of(folder).items()}
    for split, pairs in splits.items():
        _print([(split, str(folder)), *describe(fingerprint(pairs)), ("", "")])
    suggestion = suggest(splits["train"])
    reading = MaskReading(suggestion["DATASET_CONFIG"]["task"], suggestion.get("MASK_VALUES"))
    findings = examine(splits, folder, reading)
    rows = [("doctor", "nothing found" if not findings else _count(findings, "finding"))]
    for is_problem, text, files in findings:
        rows.append(("PROBLEM" if is_problem else "remark", text))
        if files:
            rows.append(("", _first(files, 3)))
    _print(rows)
    print("\nThis suggests (train.py --data does so by itself):")
    print("\n".join(f"  {key} = {_readable(value)}" for key, value in suggestion.items()))
    return int(any(finding.is_problem for finding in findings))
