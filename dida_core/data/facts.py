"""
Scan each file of a dataset once: hash, size, dtype, damaged values, statistics of channels, values of masks.

What is found is cached by path, size and modification time, also of the files beside that state more.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .images import DataError, ImageInfo, ImageReader, files_beside, has_data

_VERSION = 4  # of what is found; older caches are not used
_BAND_VALUES = 2**22  # an image is read in bands of at most so many values, so that memory stays small
_MAX_VALUES = 4096  # a mask with more different values is none
_MAX_PLACES = 16  # pixels that are noted of each value in each band

Facts = dict[str, Any]
Moments = tuple[Any, Any, Any]
Counts = dict[Any, tuple[int, list[int]]]  # of each value, the number of pixels, and where some are


def scan_files(
    files: Iterable[Path], scan: Callable[..., Facts], cache_file: Path | None = None, **options: Any
) -> dict[Path, Facts]:
    """
    Scan files, or take what an earlier scan found of the unchanged file.

    :param scan: scan_image or scan_mask
    :param cache_file: a JSON file; None scans without a cache
    :param options: further arguments of scan
    :return: the facts of each file; of an unreadable one {"problem": why}
    """
    files = list(files)
    cache = _read_cache(cache_file)
    keys = {file: f"{_VERSION}:{scan.__name__}{sorted(options.items())}:{file.absolute()}" for file in files}
    stamps = {file: _stamp(file) for file in files}
    old = {file: cache.get(keys[file], {}).get("stamp") for file in files}
    missing = [file for file in files if not stamps[file] or old[file] != stamps[file]]

    def scan_one(file: Path) -> Facts:
        try:
            return scan(file, **options)
        except DataError as error:
            return {"problem": error.problems[0]}
        except OSError as error:
            return {"problem": f"{file}: {error}"}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = {keys[file]: {"stamp": stamps[file], "facts": facts}
                 for file, facts in zip(missing, pool.map(scan_one, missing), strict=True)}  # fmt: skip
    # An unreadable file may become readable without a change, such as of its permissions.
    _append_to_cache(cache_file, {key: one for key, one in found.items() if "problem" not in one["facts"]})
    cache |= found
    return {file: cache[keys[file]]["facts"] for file in files}


def scan_image(file: Path, nodata: float | None = None) -> Facts:
    """
    Read an image once.

    :param nodata: pixels with this value hold no data, besides those of which the file states it
    :return: sha256, shape, dtype, nodata, damaged (number of NaN and infinite values), missing (pixels
        without data), zeros (pixels that are 0 in all channels), grid ({"crs": WKT, "corners": four [x, y]}
        or None); of each channel a digest of its values, min, max, count, mean, m2 (sum of squared
        differences from the mean)
    """
    with ImageReader(file) as image:
        channels, nodata = image.shape[2], image.nodata if nodata is None else nodata
        low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
        moments: Moments = (np.zeros(channels, np.int64), np.zeros(channels), np.zeros(channels))
        damaged, missing, zeros = 0, 0, 0
        digests = [hashlib.sha256() for _ in range(channels)]
        for band, valid in map(image.read_masked, image.windows(_BAND_VALUES)):
            for channel, digest in enumerate(digests):
                digest.update(band[..., channel].tobytes())
            zeros += int(np.count_nonzero(~band.any(-1)))
            valid = valid & has_data(band, nodata)
            missing += int(valid.size - np.count_nonzero(valid))
            pixels = band[valid]
            finite = np.isfinite(pixels)
            damaged += int(pixels.size - finite.sum())
            values = pixels[finite.all(1)].astype(np.float64)
            if len(values):
                low, high = np.minimum(low, values.min(0)), np.maximum(high, values.max(0))
                moments = merge_moments(moments, (len(values), values.mean(0), values.var(0) * len(values)))
    count, mean, m2 = moments
    return {
        **_about(file, image, damaged),
        "nodata": _stored(nodata),
        "missing": missing,
        "zeros": zeros,
        "grid": image.place,
        "digests": [digest.hexdigest()[:32] for digest in digests],
        "min": [float(value) for value in np.where(count > 0, low, 0)],
        "max": [float(value) for value in np.where(count > 0, high, 0)],
        "count": count.tolist(),
        "mean": mean.tolist(),
        "m2": m2.tolist(),
    }


def scan_mask(file: Path) -> Facts:
    """
    Read a mask once.

    :return: sha256, shape, dtype, nodata, damaged, missing, grid as of an image; values: [[value, number of
        pixels], ...] without nodata, where the value of several channels is a list, and None where there are
        other numbers than whole ones, or too many; places: of each value some pixels, as row * width + column
    """
    with ImageReader(file, is_mask=True) as mask:
        channels, damaged, missing, first_pixel = mask.shape[2], 0, 0, 0
        found: Counts | None = {}
        for band, valid in map(mask.read_masked, mask.windows(_BAND_VALUES)):
            pixels, numbers = band[valid], first_pixel + np.flatnonzero(valid)
            finite = np.isfinite(pixels)
            damaged += int(pixels.size - finite.sum())
            missing += int(valid.size - len(numbers))
            is_whole = pixels.dtype.kind != "f" or (finite.all() and (pixels == np.floor(pixels)).all())
            if len(numbers) or not is_whole:
                found = _count(pixels, numbers, found) if is_whole and found is not None else None
            first_pixel += valid.size
    in_order = sorted((found or {}).items())
    values = [[list(value) if channels > 1 else value[0], number] for value, (number, _) in in_order]
    return {
        **_about(file, mask, damaged),
        "nodata": _stored(mask.nodata),
        "missing": missing,
        "grid": mask.place,
        "values": None if found is None else values,
        "places": [places for _, (_, places) in in_order],
    }


def _stored(nodata: float | None) -> float | str | None:
    return nodata if nodata is None or np.isfinite(nodata) else str(nodata)  # JSON has no NaN


def _count(pixels: np.ndarray, numbers: np.ndarray, found: Counts) -> Counts | None:
    """Count the values of pixels (N, C) with those found above them; None if there are too many."""
    if pixels.dtype.kind == "f":  # class numbers may be stored as floats
        pixels = pixels.astype(np.int64)
    codes = _codes(pixels)
    order = codes.argsort(kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=~codes[order[:1]]))
    if len(starts) > _MAX_VALUES:
        return None
    most = min(_MAX_PLACES, _MAX_VALUES // len(starts))
    for same in np.split(order, starts[1:]):
        value = tuple(pixels[same[0]].tolist())
        number, places = found.get(value, (0, []))
        some = numbers[same[np.linspace(0, len(same) - 1, min(len(same), most)).astype(int)]]
        found[value] = number + len(same), places + some.tolist()
    return None if len(found) > _MAX_VALUES else found


def mask_nodata(info: ImageInfo | ImageReader) -> float | None:
    """
    Return the value of a mask's pixels that count nowhere, as its GeoTIFF states it.

    0 is not believed: many programs state it where 0 is simply the first class.
    """
    return info.nodata or None


def merge_moments(one: Moments, other: Moments) -> Moments:
    """Return count, mean and m2 of two sets of values together (Chan et al. 1979), exact for large means."""
    count = one[0] + other[0]
    delta = other[1] - one[1]
    fraction = other[0] / np.maximum(count, 1)
    return count, one[1] + delta * fraction, one[2] + other[2] + delta**2 * one[0] * fraction


def _codes(pixels: np.ndarray) -> np.ndarray:
    """Return a number for each pixel (N, C), the same for equal ones alone."""
    if pixels.shape[1] == 1:
        return pixels[:, 0]
    size = pixels.shape[1] * pixels.itemsize
    if size > 8:
        return np.unique(pixels, axis=0, return_inverse=True)[1].ravel()
    codes = np.zeros((len(pixels), 8), np.uint8)  # many times faster than np.unique
    codes[:, :size] = np.ascontiguousarray(pixels).view(np.uint8)
    return codes.view(np.uint64)[:, 0]


def _stamp(file: Path) -> list[int]:
    try:
        stats = [one.stat() for one in (file, *files_beside(file))]
        return [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)]
    except OSError:
        return []  # such as a link to nothing, which cannot be scanned either


def _about(file: Path, image: ImageReader, damaged: int) -> Facts:
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": digest, "shape": list(image.shape), "dtype": image.dtype, "damaged": damaged}


def _read_cache(cache_file: Path | None) -> dict[str, Any]:
    """Return what is cached: the last line of each key, without lines that are cut off or damaged."""
    entries = {}
    with contextlib.suppress(OSError):  # nothing depends on it
        for line in cache_file.read_bytes().splitlines() if cache_file else ():
            checksum, _, text = line.partition(b" ")
            if checksum == b"%08x" % zlib.crc32(text):
                key, entry = json.loads(text)
                entries[key] = entry
    return entries


def _append_to_cache(cache_file: Path | None, found: dict[str, Any]) -> None:
    lines = [json.dumps(entry).encode() for entry in found.items()]
    if cache_file is not None and lines:
        with contextlib.suppress(OSError):
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            with open(cache_file, "ab", buffering=0) as stream:  # at once, so that processes do not mix
                stream.write(b"".join(b"\n%08x %s" % (zlib.crc32(line), line) for line in lines))
