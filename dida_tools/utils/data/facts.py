"""
Contains what is found out about each file of a data set by reading it once: hash, size, dtype, damaged values,
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
from filelock import FileLock

from ..path import write_atomic
from .images import DataError, Window, image_info, read_image

_ROWS_PIXELS = 2**22  # an image is read in bands of about this many pixels, so that memory stays small
_MAX_VALUES = 4096  # a mask with more different values is none

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
    keys = {file: f"{scan.__name__}{sorted(options.items())}:{file.absolute()}" for file in files}
    stamps = {file: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    missing = [file for file in files if cache.get(keys[file], {}).get("stamp") != stamps[file]]

    def scan_one(file: Path) -> Facts:
        try:
            return scan(file, **options)
        except DataError as error:
            return {"problem": error.problems[0]}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file, facts in zip(missing, pool.map(scan_one, missing), strict=True):
            cache[keys[file]] = {"stamp": stamps[file], "facts": facts}
    if missing and cache_file is not None:
        _write_cache(cache_file, {keys[file]: cache[keys[file]] for file in missing})
    return {file: cache[keys[file]]["facts"] for file in files}


def scan_image(file: Path, nodata: float | None = None) -> Facts:
    """
    Reads an image once.

    :param nodata: pixels that have this value in every channel are left out of the statistics
    :return: sha256, shape, dtype, nodata (as the file states it), damaged (number of NaN and infinite values), and for
        each channel min, max, count, mean and m2 (sum of squared differences from the mean) in float64
    """
    info = image_info(file)
    height, width, channels = info.shape
    nodata = info.nodata if nodata is None else nodata
    rows = max(1, _ROWS_PIXELS // width)
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    count, mean, m2 = np.zeros(channels, np.int64), np.zeros(channels), np.zeros(channels)
    damaged = 0
    for top in range(0, height, rows):
        band = read_image(file, Window(top, 0, min(rows, height - top), width)).reshape(-1, channels)
        band = band[has_data(band, nodata)]
        finite = np.isfinite(band)
        damaged += int(band.size - finite.sum())
        if not finite.all():
            band = band[finite.all(1)]
        if len(band) == 0:
            continue
        values = band.astype(np.float64)
        low, high = np.minimum(low, values.min(0)), np.maximum(high, values.max(0))
        count, mean, m2 = merge_moments((count, mean, m2), (len(values), values.mean(0), values.var(0) * len(values)))
    return {
        "sha256": _sha256(file),
        "shape": list(info.shape),
        "dtype": info.dtype,
        "nodata": nodata if nodata is None or np.isfinite(nodata) else str(nodata),
        "damaged": damaged,
        "min": [float(value) for value in np.where(count > 0, low, 0)],
        "max": [float(value) for value in np.where(count > 0, high, 0)],
        "count": count.tolist(),
        "mean": mean.tolist(),
        "m2": m2.tolist(),
    }


def scan_mask(file: Path) -> Facts:
    """
    Reads a mask once.

    :return: sha256, shape, dtype, damaged, and values: [[value, number of pixels], ...] of an integer mask, where the
        value of a mask with several channels is a list; None where there are too many for a mask
    """
    info = image_info(file)
    height, width, channels = info.shape
    rows = max(1, _ROWS_PIXELS // width)
    damaged, totals = 0, {}
    is_integer = np.dtype(info.dtype).kind in "bui"
    for top in range(0, height, rows):
        band = read_image(file, Window(top, 0, min(rows, height - top), width)).reshape(-1, channels)
        damaged += int(band.size - np.isfinite(band).sum())
        if is_integer and totals is not None:
            found, counts = np.unique(band, axis=0 if channels > 1 else None, return_counts=True)
            for value, number in zip(found.tolist(), counts.tolist(), strict=True):
                key = tuple(value) if channels > 1 else value
                totals[key] = totals.get(key, 0) + number
            if len(totals) > _MAX_VALUES:
                totals = None
    values = [[list(key) if channels > 1 else key, number] for key, number in sorted((totals or {}).items())]
    return {
        "sha256": _sha256(file),
        "shape": list(info.shape),
        "dtype": info.dtype,
        "damaged": damaged,
        "values": values if is_integer and totals is not None else None,
    }


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


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_cache(cache_file: Path | None) -> dict[str, Any]:
    if cache_file is not None:
        with contextlib.suppress(OSError, ValueError):  # a missing or damaged cache is made anew
            cache = json.loads(cache_file.read_text())
            return cache if isinstance(cache, dict) else {}
    return {}


def _write_cache(cache_file: Path, new: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nothing depends on it
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cache_file}.lock"):
            merged = json.dumps(_read_cache(cache_file) | new).encode()
            write_atomic(cache_file, lambda stream: stream.write(merged))
