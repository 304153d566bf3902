import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dida_tools
from dida_tools.utils.data import facts as module
from dida_tools.utils.data.facts import has_data, merge_moments, scan_files, scan_image, scan_mask

ROOT = Path(dida_tools.__file__).parents[1]
BANDS = pytest.mark.parametrize("band_values", [1, 500, 2**22])


@pytest.fixture
def images(tmp_path: Path, write: Any) -> list[Path]:
    rng = np.random.default_rng(0)
    return [
        write(tmp_path / "x" / f"{n}.npy", rng.integers(0, 200, (20, 31, 3), dtype=np.uint8) + 10 * n)
        for n in range(4)
    ]


def assert_statistics(facts: dict[str, Any], pixels: np.ndarray) -> None:
    values = pixels.astype(np.float64)
    assert facts["count"] == [len(pixels)] * pixels.shape[1]
    assert facts["min"] == values.min(0).tolist() and facts["max"] == values.max(0).tolist()
    np.testing.assert_allclose(facts["mean"], values.mean(0), rtol=1e-13)
    np.testing.assert_allclose(facts["m2"], values.var(0) * len(values), rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------- images


@BANDS
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_statistics_are_those_of_numpy(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, band_values: int
) -> None:
    monkeypatch.setattr(module, "_BAND_VALUES", band_values)
    image = (np.random.default_rng(0).normal(100, 30, (37, 21, 5)) * np.arange(1, 6) / 5).astype(dtype)
    facts = scan_image(write(tmp_path / "image.npy", image))
    assert_statistics(facts, image.reshape(-1, 5))
    assert (facts["shape"], facts["dtype"], facts["nodata"], facts["damaged"]) == (
        [37, 21, 5],
        dtype,
        None,
        0,
    )


@BANDS
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint32"])
def test_statistics_survive_large_means(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, band_values: int
) -> None:
    monkeypatch.setattr(module, "_BAND_VALUES", band_values)
    image = (1e6 + np.random.default_rng(0).choice([-1, 1], (60, 50, 2))).astype(dtype)
    facts = scan_image(write(tmp_path / "image.npy", image))
    assert_statistics(facts, image.reshape(-1, 2))
    np.testing.assert_allclose(np.sqrt(np.array(facts["m2"]) / 3000), 1, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_merged_statistics_are_those_of_all_pixels_together(tmp_path: Path, write: Any, dtype: str) -> None:
    rng = np.random.default_rng(1)
    parts = [rng.normal(50 * n, 3, (10 + n, 7, 2)).clip(0, 255).astype(dtype) for n in range(5)]
    moments: Any = (0, 0.0, 0.0)
    for number, part in enumerate(parts):
        facts = scan_image(write(tmp_path / f"{number}.npy", part))
        moments = merge_moments(moments, tuple(np.array(facts[name]) for name in ("count", "mean", "m2")))
    pixels = np.concatenate([part.reshape(-1, 2) for part in parts]).astype(np.float64)
    np.testing.assert_allclose(moments[1], pixels.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments[2] / moments[0], pixels.var(0), rtol=1e-10)


@BANDS
@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint8", 0), ("int16", -9999), ("float32", -9999), ("float32", np.nan)]
)
def test_pixels_without_data_are_left_out(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, nodata: float, band_values: int
) -> None:
    monkeypatch.setattr(module, "_BAND_VALUES", band_values)
    rng = np.random.default_rng(2)
    image = rng.integers(1, 100, (24, 25, 3)).astype(dtype)
    missing = rng.random((24, 25)) < 0.4
    missing[:3] = True
    image[missing] = nodata
    facts = scan_image(write(tmp_path / "image.npy", image), nodata=nodata)
    assert_statistics(facts, image[~missing])
    assert facts["damaged"] == 0


def test_a_pixel_lacks_data_only_if_all_its_channels_do(tmp_path: Path, write: Any) -> None:
    image = np.array([[[0, 5], [0, 0], [7, 0]]], np.uint8)
    facts = scan_image(write(tmp_path / "image.npy", image), nodata=0)
    assert_statistics(facts, np.array([[0, 5], [7, 0]]))


def test_the_nodata_value_of_the_file_counts_unless_another_is_given(tmp_path: Path, write: Any) -> None:
    image = np.array([[1, 2], [3, 3]], np.float32)
    path = write(tmp_path / "image.tif", image, nodata=3)
    assert_statistics(scan_image(path), np.array([[1], [2]]))
    assert_statistics(scan_image(path, nodata=1), np.array([[2], [3], [3]]))


def test_an_image_without_any_data_has_empty_statistics(tmp_path: Path, write: Any) -> None:
    facts = scan_image(write(tmp_path / "image.npy", np.zeros((5, 5, 2), np.uint8)), nodata=0)
    assert facts["count"] == [0, 0]
    assert all(facts[name] == [0, 0] for name in ("min", "max", "mean", "m2"))


@BANDS
def test_damaged_values_are_counted_and_left_out(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, band_values: int
) -> None:
    monkeypatch.setattr(module, "_BAND_VALUES", band_values)
    image = np.random.default_rng(3).random((20, 30, 2)).astype(np.float32)
    image[3, 4, 0], image[5, 5, 1], image[19, 29] = np.nan, np.inf, -np.inf
    facts = scan_image(write(tmp_path / "image.npy", image))
    assert facts["damaged"] == 4
    assert_statistics(facts, image[np.isfinite(image).all(-1)])


def test_the_hash_is_that_of_the_file(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "image.png", np.zeros((5, 5), np.uint8))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert scan_image(path)["sha256"] == scan_mask(path)["sha256"] == digest


@pytest.mark.parametrize("nodata", [None, 0, 3, np.nan])
def test_facts_of_images_are_json(tmp_path: Path, write: Any, nodata: float | None) -> None:
    facts = scan_image(write(tmp_path / "image.npy", np.full((3, 3), np.float32(3))), nodata=nodata)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


@pytest.mark.parametrize("nodata", [None, 0, np.nan])
def test_has_data_keeps_all_but_the_last_dimension(nodata: float | None) -> None:
    pixels = np.array([[[0, 0], [0, 1]], [[np.nan, np.nan], [np.nan, 1]]])
    expected = {"None": [[1, 1], [1, 1]], "0": [[0, 1], [1, 1]], "nan": [[1, 1], [0, 1]]}[str(nodata)]
    assert np.array_equal(has_data(pixels, nodata), np.array(expected, bool))


def test_a_large_image_is_scanned_in_little_memory(tmp_path: Path) -> None:
    np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint8, (3000, 3000, 12)).flush()
    code = (
        "import resource, sys; from pathlib import Path\n"
        f"from {dida_tools.__name__}.utils.data.facts import scan_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert scan_image(Path(sys.argv[1]))['count'] == [9_000_000] * 12\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "large.npy")]
    grown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # The pages of the mapped file itself count too, but can be taken back at any time: 103 MiB.
    assert int(grown) / 1024 < 103 + 200


# -------------------------------------------------------------------------------------------------------------- masks


@BANDS
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int64", "bool"])
def test_values_of_a_mask_are_counted(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, band_values: int
) -> None:
    monkeypatch.setattr(module, "_BAND_VALUES", band_values)
    mask = np.random.default_rng(4).choice(np.array([0, 1, 2, 255]).astype(dtype), (30, 41))
    facts = scan_mask(write(tmp_path / "mask.npy", mask))
    values, counts = np.unique(mask, return_counts=True)
    assert facts["values"] == [list(pair) for pair in zip(values.tolist(), counts.tolist(), strict=True)]
    assert (facts["shape"], facts["dtype"], facts["damaged"]) == ([30, 41, 1], dtype, 0)


@BANDS
@pytest.mark.parametrize(
    ("channels", "dtype"), [(2, "uint8"), (3, "uint8"), (4, "int16"), (5, "int16"), (12, "uint8")]
)
def test_colors_of_a_mask_are_counted(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch, channels: int, dtype: str, band_values: int
) -> None:
    monkeypatch.setattr(module, "_BAND_VALUES", band_values)
    rng = np.random.default_rng(5)
    colors = rng.integers(0, 3, (6, channels)).astype(dtype) * 100
    mask = colors[rng.integers(0, 6, (20, 31))]
    facts = scan_mask(write(tmp_path / "mask.npy", mask))
    values, counts = np.unique(mask.reshape(-1, channels), axis=0, return_counts=True)
    assert facts["values"] == [list(pair) for pair in zip(values.tolist(), counts.tolist(), strict=True)]


@BANDS
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
    assert rows.min() == 10 and rows.max() == 29
    assert facts["places"][2] == [39 * 50 + 49]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mask_of_too_many_values_has_none(tmp_path: Path, write: Any, channels: int) -> None:
    mask = np.arange(80 * 80 * channels, dtype=np.uint16).reshape(80, 80, channels)
    facts = scan_mask(write(tmp_path / "mask.npy", mask))
    assert facts["values"] is None and facts["places"] == []


def test_too_many_values_in_several_bands_are_noticed_too(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BAND_VALUES", 80)
    facts = scan_mask(write(tmp_path / "mask.npy", np.arange(80 * 80, dtype=np.uint16).reshape(80, 80)))
    assert facts["values"] is None


def test_noted_places_stay_few_in_a_mask_of_many_values(tmp_path: Path, write: Any) -> None:
    facts = scan_mask(write(tmp_path / "mask.npy", np.arange(400 * 400).reshape(400, 400) % 4000))
    assert len(facts["values"]) == 4000 and sum(map(len, facts["places"])) == 4000


def test_a_mask_of_floats_has_no_values(tmp_path: Path, write: Any) -> None:
    mask = np.array([[0.0, 1.5], [np.nan, np.inf]], np.float32)
    facts = scan_mask(write(tmp_path / "mask.npy", mask))
    assert facts["values"] is None and facts["damaged"] == 2


@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 3)])
def test_facts_of_masks_are_json(tmp_path: Path, write: Any, shape: tuple[int, ...]) -> None:
    mask = np.random.default_rng(0).integers(0, 2, shape, dtype=np.uint8)
    facts = scan_mask(write(tmp_path / "mask.npy", mask))
    assert json.loads(json.dumps(facts)) == facts


# -------------------------------------------------------------------------------------------------------------- cache


def never(file: Path) -> Any:
    raise AssertionError(f"{file} was read again")


never.__name__ = "scan_image"


def test_a_scan_without_a_cache_reads_all_files(images: list[Path]) -> None:
    assert scan_files(images, scan_image) == {file: scan_image(file) for file in images}
    with pytest.raises(AssertionError, match="was read again"):
        scan_files(images, never)


def test_unchanged_files_are_not_read_again(tmp_path: Path, images: list[Path]) -> None:
    cache = tmp_path / "new" / "folder" / "facts.json"
    first = scan_files(images, scan_image, cache)
    assert scan_files(images, never, cache) == first


def test_a_changed_file_alone_is_read_again(tmp_path: Path, write: Any, images: list[Path]) -> None:
    cache, read = tmp_path / "facts.json", []

    def scan(file: Path) -> dict[str, Any]:
        read.append(file)
        return scan_image(file)

    scan.__name__ = "scan_image"
    before = scan_files(images, scan, cache)
    read.clear()
    write(images[2], np.full((20, 31, 3), 7, np.uint8))
    after = scan_files(images, scan, cache)
    assert read == [images[2]] and after[images[2]]["mean"] == [7, 7, 7]
    assert all(after[file] == before[file] for file in images if file != images[2])


def test_a_file_of_the_same_size_and_another_time_is_read_again(
    tmp_path: Path, write: Any, images: list[Path]
) -> None:
    scan_files(images, scan_image, tmp_path / "facts.json")
    stat = images[0].stat()
    os.utime(images[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(AssertionError, match=r"0\.npy was read again"):
        scan_files(images, never, tmp_path / "facts.json")


@pytest.mark.parametrize("options", [{"nodata": 0}, {"nodata": 1.5}, {"nodata": float("nan")}])
def test_another_nodata_value_is_another_scan(
    tmp_path: Path, images: list[Path], options: dict[str, Any]
) -> None:
    cache = tmp_path / "facts.json"
    scan_files(images, scan_image, cache)
    found = scan_files(images, scan_image, cache, **options)
    assert found == {file: scan_image(file, **options) for file in images}


def test_an_image_and_a_mask_in_one_file_have_facts_of_their_own(tmp_path: Path, images: list[Path]) -> None:
    cache = tmp_path / "facts.json"
    assert "mean" in scan_files(images, scan_image, cache)[images[0]]
    assert "places" in scan_files(images, scan_mask, cache)[images[0]]
    assert "mean" in scan_files(images, scan_image, cache)[images[0]]


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", bytes(100), b"\xff\xfe\x00", b'{"a": 1}'])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, images: list[Path], content: bytes) -> None:
    cache = tmp_path / "facts.json"
    expected = scan_files(images, scan_image)
    cache.write_bytes(content)
    assert scan_files(images, scan_image, cache) == expected
    assert scan_files(images, never, cache) == expected


def test_a_truncated_cache_is_made_anew(tmp_path: Path, images: list[Path]) -> None:
    cache = tmp_path / "facts.json"
    expected = scan_files(images, scan_image, cache)
    cache.write_bytes(cache.read_bytes()[:-30])
    assert scan_files(images, scan_image, cache) == expected


def test_a_cache_of_an_older_version_is_not_used(
    tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scan_files(images, scan_image, tmp_path / "facts.json")
    monkeypatch.setattr(module, "_VERSION", module._VERSION + 1)
    with pytest.raises(AssertionError, match="was read again"):
        scan_files(images, never, tmp_path / "facts.json")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, images: list[Path]) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert len(scan_files(images, scan_image, locked / "facts.json")) == len(images)


def test_a_file_in_the_place_of_the_caches_folder_stops_nothing(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "file").touch()
    assert len(scan_files(images, scan_image, tmp_path / "file" / "facts.json")) == len(images)


def test_problems_are_told_and_not_cached(tmp_path: Path, write: Any, images: list[Path]) -> None:
    cache = tmp_path / "facts.json"
    content = images[1].read_bytes()
    stat = images[1].stat()
    images[1].write_bytes(bytes(len(content)))
    os.utime(images[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = scan_files(images, scan_image, cache)
    assert list(found[images[1]]) == ["problem"] and str(images[1]) in found[images[1]]["problem"]
    assert "mean" in found[images[0]]
    images[1].write_bytes(content)
    os.utime(images[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "mean" in scan_files(images, scan_image, cache)[images[1]]


@pytest.mark.parametrize("with_cache", [True, False])
def test_missing_files_and_dead_links_are_problems(
    tmp_path: Path, images: list[Path], with_cache: bool
) -> None:
    dead = tmp_path / "x" / "dead.npy"
    dead.symlink_to(tmp_path / "nowhere.npy")
    cache = tmp_path / "facts.json" if with_cache else None
    for _ in range(2):
        found = scan_files([*images, dead, tmp_path / "missing.tif"], scan_image, cache)
        assert "dead.npy: cannot be read" in found[dead]["problem"]
        assert "missing.tif: cannot be read" in found[tmp_path / "missing.tif"]["problem"]


def test_a_file_that_vanishes_while_it_is_read_is_a_problem(images: list[Path]) -> None:
    def scan(file: Path) -> Any:
        raise FileNotFoundError(2, "No such file", str(file))

    assert str(images[0]) in scan_files(images, scan)[images[0]]["problem"]


def test_no_files_have_no_facts(tmp_path: Path) -> None:
    assert scan_files([], scan_image, tmp_path / "facts.json") == {}
    assert not (tmp_path / "facts.json").exists()


SCAN = """
import sys
from pathlib import Path
from {package}.utils.data.facts import scan_files, scan_image
print("ready", flush=True)
sys.stdin.readline()
files = sorted(Path(sys.argv[1]).iterdir())
for start in range(0, len(files), 2):
    scan_files(files[start : start + 2], scan_image, Path(sys.argv[2]))
"""


def test_two_processes_that_write_the_cache_at_once_lose_nothing(tmp_path: Path, write: Any) -> None:
    cache = tmp_path / "facts.json"
    files: list[Path] = []
    processes = []
    for folder in ("a", "b"):
        files += [write(tmp_path / folder / f"{n}.npy", np.full((4, 4), n, np.uint8)) for n in range(30)]
        command = [
            sys.executable,
            "-c",
            SCAN.format(package=dida_tools.__name__),
            str(tmp_path / folder),
            str(cache),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes.append(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert len(scan_files(files, never, cache)) == 60


def test_many_threads_that_write_the_cache_at_once_lose_nothing(tmp_path: Path, images: list[Path]) -> None:
    cache = tmp_path / "facts.json"
    threads = [threading.Thread(target=scan_files, args=([file], scan_image, cache)) for file in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(scan_files(images, never, cache)) == len(images)


def test_a_large_mask_of_colors_is_scanned_quickly(tmp_path: Path, write: Any) -> None:
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
    path = write(tmp_path / "mask.npy", colors[np.random.default_rng(0).integers(0, 3, (1000, 1000))])
    started = time.process_time()
    scan_mask(path)
    assert time.process_time() - started < 1.0
