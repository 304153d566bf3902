"""
Contains what is found out about each file of a dataset by reading it once: hash, size, dtype, damaged values,
statistics of the channels, values of a mask. The answers are cached by path, size and time of change.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomic
from ..locks import locked
from .images import DataError, ImageInfo, image_info, raster_grid, read_bands

_VERSION = 3  # a change of what is found out gets a new number, so that older caches are not used
_BAND_VALUES = 2**22  # an image is read in bands of at most so many values, so that memory stays small
_MAX_VALUES = 4096  # a mask with more different values is none
_MAX_PLACES = 16  # places of each value that are noted in each band

Facts = dict[str, Any]


def scan_files(
    files: Iterable[Path], scan: Callable[..., Facts], cache_file: Path | None = None, **options: Any
) -> dict[Path, Facts]:
    """
    Scans files, or takes the answer of an earlier scan of the unchanged file.

    :param scan: scan_image or scan_mask
    :param cache_file: a json file; None scans without a cache
    :param options: further arguments of scan
    :return: the facts of each file; of one that cannot be read {"problem": why}
    """
    files = list(files)
    cache = _read_cache(cache_file)
    keys = {file: f"{_VERSION}:{scan.__name__}{sorted(options.items())}:{file.absolute()}" for file in files}
    stamps = {file: _stamp(file) for file in files}
    missing = [
        file for file in files if not stamps[file] or cache.get(keys[file], {}).get("stamp") != stamps[file]
    ]

    def scan_one(file: Path) -> Facts:
        try:
            return scan(file, **options)
        except (DataError, OSError) as error:
            return {"problem": error.problems[0] if isinstance(error, DataError) else f"{file}: {error}"}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file, facts in zip(missing, pool.map(scan_one, missing), strict=True):
            cache[keys[file]] = {"stamp": stamps[file], "facts": facts}
    if missing and cache_file is not None:
        entries = {keys[file]: cache[keys[file]] for file in missing}
        # What cannot be read may be readable later without a change of the file, such as of its permissions.
        _write_cache(
            cache_file, {key: entry for key, entry in entries.items() if "problem" not in entry["facts"]}
        )
    return {file: cache[keys[file]]["facts"] for file in files}


def scan_image(file: Path, nodata: float | None = None) -> Facts:
    """
    Reads an image once.

    :param nodata: pixels that have this value in every channel are left out of the statistics
    :return: sha256, shape, dtype, nodata (as the file states it), damaged (number of NaN and infinite values), missing
        (number of pixels without data), zeros (number of pixels that are 0 in all channels), grid (see raster_grid),
        and for each channel its digest (of the values, whatever the format of the file), min, max, count, mean and m2
        (sum of squared differences from the mean) in float64
    """
    info = image_info(file)
    channels = info.shape[2]
    nodata = info.nodata if nodata is None else nodata
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    count, mean, m2 = np.zeros(channels, np.int64), np.zeros(channels), np.zeros(channels)
    damaged, missing, zeros = 0, 0, 0
    digests = [hashlib.sha256() for _ in range(channels)]
    for band in read_bands(file, _BAND_VALUES):
        for channel, digest in enumerate(digests):
            digest.update(band[..., channel].tobytes())
        zeros += int(np.count_nonzero(~band.any(-1)))
        valid = has_data(band, nodata)
        missing += int(valid.size - np.count_nonzero(valid))
        band = band[valid]
        finite = np.isfinite(band)
        damaged += int(band.size - finite.sum())
        if not finite.all():
            band = band[finite.all(1)]
        if len(band) == 0:
            continue
        values = band.astype(np.float64)
        low, high = np.minimum(low, values.min(0)), np.maximum(high, values.max(0))
        count, mean, m2 = merge_moments(
            (count, mean, m2), (len(values), values.mean(0), values.var(0) * len(values))
        )
    return {
        "sha256": _sha256(file),
        "shape": list(info.shape),
        "dtype": info.dtype,
        "nodata": nodata if nodata is None or np.isfinite(nodata) else str(nodata),
        "damaged": damaged,
        "missing": missing,
        "zeros": zeros,
        "grid": raster_grid(file),
        "digests": [digest.hexdigest()[:32] for digest in digests],
        "min": [float(value) for value in np.where(count > 0, low, 0)],
        "max": [float(value) for value in np.where(count > 0, high, 0)],
        "count": count.tolist(),
        "mean": mean.tolist(),
        "m2": m2.tolist(),
    }


def scan_mask(file: Path) -> Facts:
    """
    Reads a mask once.

    :return: sha256, shape, dtype, nodata, damaged, and values: [[value, number of pixels], ...] of a mask of whole
        numbers, without nodata; where the value of a mask with several channels is a list; None for other numbers, and
        where there are too many for a mask. places: for each value the numbers (row * width + column) of some pixels
    """
    info = image_info(file)
    channels = info.shape[2]
    damaged, first_pixel = 0, 0
    found: dict[Any, tuple[int, list[int]]] | None = {}
    for band in read_bands(file, _BAND_VALUES):
        pixels = band.reshape(-1, channels)
        finite = np.isfinite(pixels)
        damaged += int(pixels.size - finite.sum())
        if pixels.dtype.kind == "f":  # class numbers may be stored as floats
            is_whole = finite.all() and (pixels == np.floor(pixels)).all()
            pixels, found = (pixels.astype(np.int64), found) if is_whole else (pixels, None)
        if found is not None:
            codes = _codes(pixels)
            order = codes.argsort(kind="stable")
            starts = np.flatnonzero(np.diff(codes[order], prepend=~codes[order[:1]]))
            if len(starts) > _MAX_VALUES:
                found = None
                continue
            most = min(_MAX_PLACES, _MAX_VALUES // len(starts))
            for same in np.split(order, starts[1:]):
                value = pixels[same[0]].tolist()
                number, places = found.get(tuple(value), (0, []))
                some = same[np.linspace(0, len(same) - 1, min(len(same), most)).astype(int)] + first_pixel
                found[tuple(value)] = number + len(same), places + some.tolist()
            found = None if len(found) > _MAX_VALUES else found
        first_pixel += len(pixels)
    nodata = mask_nodata(info)
    in_order = [item for item in sorted((found or {}).items()) if any(value != nodata for value in item[0])]
    return {
        "sha256": _sha256(file),
        "shape": list(info.shape),
        "dtype": info.dtype,
        "nodata": info.nodata,
        "damaged": damaged,
        "values": None
        if found is None
        else [[list(v) if channels > 1 else v[0], n] for v, (n, _) in in_order],
        "places": [places for _, (_, places) in in_order],
    }


def mask_nodata(info: ImageInfo) -> float | None:
    """
    The value of a mask's pixels that count nowhere, as its GeoTIFF states it.

    0 is not believed: many programs state it where 0 is simply the first class.
    """
    return info.nodata or None


def _codes(pixels: np.ndarray) -> np.ndarray:
    """A number for each pixel (N, C), the same for equal ones alone."""
    if pixels.shape[1] == 1:
        return pixels[:, 0]
    size = pixels.shape[1] * pixels.itemsize
    if size > 8:
        return np.unique(pixels, axis=0, return_inverse=True)[1].ravel()
    codes = np.zeros((len(pixels), 8), np.uint8)  # many times faster than np.unique
    codes[:, :size] = np.ascontiguousarray(pixels).view(np.uint8)
    return codes.view(np.uint64)[:, 0]


def has_data(pixels: np.ndarray, nodata: float | None) -> np.ndarray:
    """Which pixels (..., C) hold data: not those that are nodata in every channel."""
    if nodata is None:
        return np.ones(pixels.shape[:-1], bool)
    missing = np.isnan(pixels) if np.isnan(nodata) else pixels == nodata
    return ~missing.all(-1)


Moments = tuple[Any, Any, Any]


def merge_moments(one: Moments, other: Moments) -> Moments:
    """Count, mean and m2 of two sets of values together (Chan et al. 1979), without loss for large means."""
    count = one[0] + other[0]
    delta = other[1] - one[1]
    share = other[0] / np.maximum(count, 1)
    return count, one[1] + delta * share, one[2] + other[2] + delta**2 * one[0] * share


def _stamp(file: Path) -> list[int]:
    try:
        return [file.stat().st_size, file.stat().st_mtime_ns]
    except OSError:
        return []  # a link to nothing, say; scanning will tell


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_cache(cache_file: Path | None) -> dict[str, Any]:
    if cache_file is not None:
        with contextlib.suppress(
            OSError, ValueError, RecursionError
        ):  # a missing or damaged cache is made anew
            digest, _, content = cache_file.read_bytes().partition(b"\n")
            if digest == hashlib.sha256(content).hexdigest().encode():
                return json.loads(content)
    return {}


def _write_cache(cache_file: Path, new: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nothing depends on it
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with locked(f"{cache_file}.lock"):
            content = json.dumps(_read_cache(cache_file) | new).encode()
            digest = hashlib.sha256(content).hexdigest().encode()
            write_atomic(cache_file, lambda stream: stream.write(digest + b"\n" + content))
