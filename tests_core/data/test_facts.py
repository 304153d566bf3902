"""Facts of files are those of numpy, found by bands in little memory; the cache is never wrong."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dida_core.data import facts as module
from dida_core.data.facts import has_data, scan_files, scan_image, scan_mask

from tests.helpers import Child

Scan = Callable[..., dict[str, Any]]


@pytest.fixture
def scan(tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> Scan:
    """Scan an array by bands of one row, of several, and at once: the facts are the same."""

    def scan_all(array: np.ndarray, scan: Scan = scan_image, name: str = "a.npy", **options: Any) -> dict:
        path = write(tmp_path / name, array)
        found = []
        for band_values in (1, 500, 2**22):
            monkeypatch.setattr(module, "_BAND_VALUES", band_values)
            found.append(scan(path, **options))
            assert json.loads(json.dumps(found[-1], allow_nan=False)) == found[-1]
            for key in ("mean", "m2"):  # sums of bands round otherwise
                np.testing.assert_allclose(found[-1].get(key, 0), found[0].get(key, 0), rtol=1e-9, atol=1e-9)
        same = [{key: one[key] for key in one if key not in ("mean", "m2", "places")} for one in found]
        assert same[0] == same[1] == same[2]
        return found[-1]

    return scan_all


def assert_statistics(facts: dict[str, Any], pixels: np.ndarray) -> None:
    values = pixels.astype(np.float64)
    assert facts["count"] == [len(pixels)] * pixels.shape[1]
    assert facts["min"] == values.min(0).tolist() and facts["max"] == values.max(0).tolist()
    np.testing.assert_allclose(facts["mean"], values.mean(0), rtol=1e-13)
    np.testing.assert_allclose(facts["m2"], values.var(0) * len(values), rtol=1e-9)


# ----------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_statistics_are_those_of_numpy(tmp_path: Path, scan: Scan, dtype: str) -> None:
    image = (np.random.default_rng(0).normal(100, 30, (37, 21, 5)) * np.arange(1, 6) / 5).astype(dtype)
    facts = scan(image)
    assert_statistics(facts, image.reshape(-1, 5))
    expected = {
        "shape": [37, 21, 5],
        "dtype": dtype,
        "nodata": None,
        "damaged": 0,
        "missing": 0,
        "grid": None,
    }
    assert expected.items() <= facts.items()
    assert facts["sha256"] == hashlib.sha256((tmp_path / "a.npy").read_bytes()).hexdigest()
    if dtype[0] == "f":  # they survive large means
        image = (1e6 + np.random.default_rng(0).choice([-1, 1], (60, 50, 2))).astype(dtype)
        np.testing.assert_allclose(np.sqrt(np.array(scan(image)["m2"]) / 3000), 1, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint8", 0), ("int16", -9999), ("float32", -9999), ("float32", np.nan)]
)
def test_pixels_without_data_are_left_out(scan: Scan, dtype: str, nodata: float) -> None:
    rng = np.random.default_rng(2)
    image = rng.integers(1, 100, (24, 25, 3)).astype(dtype)
    missing = rng.random((24, 25)) < 0.4
    missing[:3] = True
    image[missing] = nodata
    facts = scan(image, nodata=nodata)
    assert_statistics(facts, image[~missing])
    assert (facts["damaged"], facts["missing"]) == (0, missing.sum())


def test_a_pixel_lacks_data_if_a_channel_does_but_in_8_bits_if_all_do(
    tmp_path: Path, scan: Scan, write: Any
) -> None:
    image = np.array([[[0, 5], [0, 0], [7, 0]]], np.uint8)
    facts = scan(image, nodata=0)
    assert_statistics(facts, np.array([[0, 5], [7, 0]]))
    assert (facts["missing"], facts["zeros"]) == (1, 1)
    pixels = np.array([[[0, 0], [0, 1]], [[np.nan, np.nan], [np.nan, 1]]])
    for nodata, expected in ((None, "11 11"), (0, "00 11"), (np.nan, "11 00"), ([0, np.nan], "00 01"),
                             ([None, 1], "10 10"), ([0, 0], "00 11")):  # fmt: skip
        assert "".join(map(str, has_data(pixels, nodata).astype(int).ravel())) == expected.replace(" ", "")
    assert has_data(np.array([[[0, 0], [0, 1]]], np.uint8), 0).tolist() == [[False, True]]
    facts = scan(np.zeros((5, 5, 2), np.uint8), nodata=0)
    assert all(facts[name] == [0, 0] for name in ("count", "min", "max", "mean", "m2"))
    path = write(tmp_path / "image.tif", np.array([[1, 2], [3, 3]], np.float32), nodata=3)
    assert_statistics(scan_image(path), np.array([[1], [2]]))
    assert_statistics(scan_image(path, nodata=1), np.array([[2]]))  # what the file states counts too


def test_damaged_values_are_counted_and_left_out(scan: Scan) -> None:
    image = np.random.default_rng(3).random((20, 30, 2)).astype(np.float32)
    image[3, 4, 0], image[5, 5, 1], image[19, 29] = np.nan, np.inf, -np.inf
    facts = scan(image)
    assert facts["damaged"] == 4
    assert_statistics(facts, image[np.isfinite(image).all(-1)])


def test_digests_are_of_values_and_corners_of_the_grid(tmp_path: Path, write: Any) -> None:
    image = np.random.default_rng(0).integers(0, 9, (20, 30, 2), dtype=np.uint8)
    grid = {"crs": "EPSG:32633", "transform": (10, 0, 500_000, 0, -10, 5_000_000)}
    facts = [scan_image(write(tmp_path / name, image)) for name in ("a.npy", "a.npz")]
    facts.append(scan_image(write(tmp_path / "a.tif", image[..., ::-1], **grid)))
    digests = [one["digests"] for one in facts]
    assert digests[0] == digests[1] == digests[2][::-1] and len({*digests[0]}) == 2
    corners = [[500_000, 5_000_000], [500_300, 5_000_000], [500_300, 4_999_800], [500_000, 4_999_800]]
    assert facts[2]["grid"]["corners"] == corners and "UTM zone 33N" in facts[2]["grid"]["crs"]


def test_a_large_image_is_scanned_in_little_memory(
    tmp_path: Path, memory_growth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BAND_VALUES", 2**18)
    np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint8, (1000, 1000, 24)).flush()
    # The pages of the mapped file itself count too, but can be taken back at any time: 23 MiB.
    assert memory_growth(lambda: scan_image(tmp_path / "large.npy")) < 23 + 30


# ------------------------------------------------------------------------------------------------------ masks


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    found = {
        f"numbers in {dtype}": rng.choice(np.array([0, 1, 2, 255]).astype(dtype), (30, 41, 1))
        for dtype in ("uint8", "int16", "uint16", "int64", "float32", "bool")
    }
    for channels, dtype in ((2, "uint8"), (3, "uint8"), (4, "int16"), (5, "int16"), (12, "uint8")):
        colors = rng.integers(0, 3, (6, channels)).astype(dtype) * 100
        found[f"{channels} channels"] = colors[rng.integers(0, 6, (20, 31))]
    return found


@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
def test_values_of_a_mask_are_counted(scan: Scan, mask: np.ndarray) -> None:
    facts = scan(mask, scan_mask)
    channels = mask.shape[2]
    values, counts = np.unique(mask.reshape(-1, channels), axis=0, return_counts=True)
    values = values if channels > 1 else values[:, 0]
    assert facts["values"] == [list(pair) for pair in zip(values.tolist(), counts.tolist(), strict=True)]
    about = {"shape": list(mask.shape), "dtype": mask.dtype.name, "damaged": 0, "nodata": None}
    assert about.items() <= facts.items()


@pytest.mark.parametrize("band_values", [1, 500, 2**22])
@pytest.mark.parametrize("channels", [1, 3])
def test_noted_places_hold_their_value_and_are_spread(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, channels: int, band_values: int
) -> None:
    monkeypatch.setattr(module, "_BAND_VALUES", band_values)
    mask = np.zeros((40, 50, channels), np.uint8)
    mask[10:30, 5:45, 0], mask[39, 49, 0] = 1, 2
    facts = scan_mask(write(tmp_path / "mask.npy", mask))
    for (value, number), places in zip(facts["values"], facts["places"], strict=True):
        assert len(set(places)) == len(places) >= min(16, number)
        assert all(np.array_equal(mask.reshape(-1, channels)[place], np.ravel(value)) for place in places)
    rows = np.array(facts["places"][1]) // 50
    assert (rows.min(), rows.max(), facts["places"][2]) == (10, 29, [39 * 50 + 49])


def test_a_mask_of_floats_or_too_many_values_has_none(scan: Scan) -> None:
    many = np.arange(80 * 80 * 3, dtype=np.uint16).reshape(80, 80, 3)
    for mask in (many, many[..., 0], np.array([[0.0, 1.5], [np.nan, np.inf]], np.float32)):
        facts = scan(mask, scan_mask)
        assert (facts["values"], facts["places"]) == (None, [])
    assert facts["damaged"] == 2


def test_noted_places_stay_few(tmp_path: Path, write: Any) -> None:
    facts = scan_mask(write(tmp_path / "mask.npy", np.arange(400 * 400).reshape(400, 400) % 4000))
    assert len(facts["values"]) == sum(map(len, facts["places"])) == 4000


def test_nodata_of_a_mask_is_no_value_but_0_is_a_class(tmp_path: Path, write: Any) -> None:
    mask = np.array([[0, 1], [200, 200]], np.uint8)
    assert scan_mask(write(tmp_path / "a.tif", mask, nodata=200))["values"] == [[0, 1], [1, 1]]
    assert scan_mask(write(tmp_path / "b.tif", mask, nodata=0))["values"] == [[0, 1], [1, 1], [200, 2]]


# ------------------------------------------------------------------------------------------------------ cache


@pytest.fixture
def images(tmp_path: Path, write: Any) -> list[Path]:
    rng = np.random.default_rng(0)
    return [write(tmp_path / "x" / f"{n}.npy", rng.integers(0, 200, (20, 31, 3), dtype=np.uint8) + 10 * n)
            for n in range(4)]  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, images: list[Path]) -> Path:
    """A cache of all images, in a new folder."""
    scan_files(images, scan_image, tmp_path / "new" / "folder" / "facts.json")
    return tmp_path / "new" / "folder" / "facts.json"


def never(file: Path) -> Any:
    raise AssertionError(f"{file} was read again")


never.__name__ = "scan_image"


def replace_content(file: Path, content: bytes, later: int = 0) -> None:
    """Replace a file's content without a change of its time of modification, or with a small one."""
    stat = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + later))


def test_unchanged_files_are_not_read_again(images: list[Path], cache: Path) -> None:
    expected = {file: scan_image(file) for file in images}
    assert scan_files(images, never, cache) == scan_files(images, scan_image) == expected
    assert scan_files([], scan_image, cache.with_name("other.json")) == {}
    assert not cache.with_name("other.json").exists()
    with pytest.raises(AssertionError, match="was read again"):
        scan_files(images, never)


def test_a_changed_file_alone_is_read_again(write: Any, images: list[Path], cache: Path) -> None:
    before, read = scan_files(images, never, cache), []

    def scan(file: Path) -> dict[str, Any]:
        read.append(file)
        return scan_image(file)

    scan.__name__ = "scan_image"
    write(images[2], np.full((20, 31, 3), 7, np.uint8))
    after = scan_files(images, scan, cache)
    assert read == [images[2]] and after[images[2]]["mean"] == [7, 7, 7]
    assert all(after[file] == before[file] for file in images if file != images[2])
    assert scan_files(images, never, cache) == after
    replace_content(images[0], images[0].read_bytes(), later=1)
    with pytest.raises(AssertionError, match=r"0\.npy was read again"):
        scan_files(images, never, cache)


def test_another_scan_of_a_file_has_facts_of_its_own(images: list[Path], cache: Path) -> None:
    for options in ({"nodata": 0}, {"nodata": 1.5}, {"nodata": float("nan")}):
        found = scan_files(images, scan_image, cache, **options)
        assert found == {file: scan_image(file, **options) for file in images}
    for scan, key in ((scan_image, "mean"), (scan_mask, "places"), (scan_image, "mean")):
        assert key in scan_files(images, scan, cache)[images[0]]


def test_a_damaged_truncated_or_older_cache_is_made_anew(
    images: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, content = scan_files(images, scan_image), cache.read_bytes()
    for damaged in (content[:-30], b"", b"{", b"[1, 2]", b"null", bytes(100), b"\xff\xfe\x00", b'{"a": 1}'):
        cache.write_bytes(damaged)
        assert scan_files(images, scan_image, cache) == expected
        assert scan_files(images, never, cache) == expected
    cache.parent.joinpath("file").touch()  # where a cache cannot be written
    assert scan_files(images, scan_image, cache.parent / "file" / "facts.json") == expected
    monkeypatch.setattr(module, "_VERSION", module._VERSION + 1)
    with pytest.raises(AssertionError, match="was read again"):
        scan_files(images, never, cache)


def test_problems_are_reported_and_not_cached(images: list[Path], tmp_path: Path) -> None:
    cache, content = tmp_path / "facts.json", images[1].read_bytes()
    replace_content(images[1], bytes(len(content)))
    dead, missing = tmp_path / "x" / "dead.npy", tmp_path / "missing.tif"
    dead.symlink_to(tmp_path / "nowhere.npy")
    for _ in range(2):
        found = scan_files([*images, dead, missing], scan_image, cache)
        for file in (images[1], dead, missing):
            assert list(found[file]) == ["problem"]
            assert found[file]["problem"].startswith(f"{file}: cannot be read")
        assert "mean" in found[images[0]]
    replace_content(images[1], content)
    assert "mean" in scan_files(images, scan_image, cache)[images[1]]


def test_processes_and_threads_that_write_the_cache_at_once_lose_nothing(tmp_path: Path, write: Any) -> None:
    cache = tmp_path / "facts.json"
    files = [write(tmp_path / "x" / f"{n}.npy", np.full((4, 4), n, np.uint8)) for n in range(70)]

    def scan(first: int, last: int) -> None:
        for start in range(first, last, 2):
            scan_files(files[start : start + 2], scan_image, cache)

    children = [Child(partial(scan, first, first + 30), tmp_path / f"{first}") for first in (0, 30)]
    threads = [threading.Thread(target=scan, args=(number, number + 1)) for number in range(60, 70)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(child.wait() and child.code == 0 for child in children)
    assert len(scan_files(files, never, cache)) == 70
