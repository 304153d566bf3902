"""Every format is read as it was written, whole, by windows and by bands; what cannot be read is named."""

import gc
import os
import pickle
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from dida_core.data import images
from dida_core.data.images import (
    ENDINGS,
    DataError,
    ImageInfo,
    ImageReader,
    Window,
    image_info,
    list_images,
    read_image,
    read_masked,
)
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dida_tools.utils.data import NpyDataset

LOSSLESS = {
    ".npy": [("uint8", 12), ("uint16", 3), ("int16", 1), ("float32", 4), ("float64", 2), ("bool", 1)],
    ".npz": [("uint8", 3), ("float32", 12)],
    ".png": [("uint8", 1), ("uint16", 1), ("uint8", 3), ("uint8", 4)],
    ".tif": [("uint8", 1), ("uint16", 12), ("int16", 2), ("float64", 1)],
    ".tiff": [("float32", 5)],
    ".jp2": [("uint8", 1), ("uint8", 3)],
    ".bmp": [("uint8", 1), ("uint8", 3)],
    ".pgm": [("uint8", 1)],
    ".ppm": [("uint8", 3)],
}
WINDOWS = [Window(0, 0, 37, 53), Window(5, 11, 20, 30), Window(36, 52, 1, 1), Window(0, 40, 37, 13)]
GRID = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)}


def invent(dtype: str, channels: int, height: int = 37, width: int = 53) -> np.ndarray:
    rng = np.random.default_rng(channels)
    shape = (height, width, channels)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    limits = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return rng.integers(*limits, shape, endpoint=True).astype(dtype)


def assert_reads(path: Path, image: np.ndarray) -> None:
    """The image is read as it is by every way of reading."""
    shape, dtype = image.shape, image.dtype.newbyteorder("=")
    assert image_info(path) == ImageInfo(shape, dtype.name)
    found = read_image(path)
    assert found.dtype == dtype and np.array_equal(found, image)
    with ImageReader(path) as reader, ImageReader(path, path) as twice:
        assert (reader.shape, reader.dtype, twice.shape[2]) == (shape, dtype, 2 * shape[2])
        for window in WINDOWS:
            top, left, height, width = window
            part = image[top : top + height, left : left + width]
            for found in (read_image(path, window), reader.read(window)):
                assert np.array_equal(found, part) and found.dtype == dtype
            assert np.array_equal(twice.read(window), np.concatenate([part, part], -1))
        assert len(reader.sample(10)) == 900 and np.isin(reader.sample(10), image).all()
        for max_values in (1, 700, 10**9):
            bands = list(reader.bands(max_values))
            assert np.array_equal(np.concatenate(bands), image)
            assert all(band.size <= max(max_values, shape[1] * shape[2]) for band in bands)


@pytest.mark.parametrize("ending", LOSSLESS)
def test_every_format_is_read_as_it_was_written(tmp_path: Path, write: Any, ending: str) -> None:
    for number, (dtype, channels) in enumerate(LOSSLESS[ending]):
        image = invent(dtype, channels)
        if (ending, channels) == (".png", 4):
            image[..., 3] |= 1  # an alpha of 0 says that there is no data
        assert_reads(write(tmp_path / f"{number}{ending}", image if channels > 1 else image[..., 0]), image)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colors_of_png_keep_their_16_bits(tmp_path: Path, channels: int) -> None:
    image, profile = (
        invent("uint16", channels),
        {"driver": "PNG", "height": 37, "width": 53},
    )  # Pillow has none
    with rasterio.open(tmp_path / "image.png", "w", dtype="uint16", count=channels, **profile) as raster:
        raster.write(np.moveaxis(image, -1, 0))
    assert (tmp_path / "image.png").read_bytes()[24] == 16
    assert_reads(tmp_path / "image.png", image)


@pytest.mark.parametrize(
    ("mode", "ending"), [("L", ".jpg"), ("RGB", ".jpeg"), ("RGB", ".JPG"), ("RGB", ".jfif"), ("RGB", ".webp")]
)
def test_jpeg_and_the_like_are_read_as_pillow_decodes_it(tmp_path: Path, mode: str, ending: str) -> None:
    path = tmp_path / f"image{ending}"
    Image.fromarray(invent("uint8", 3)).convert(mode).save(path)
    assert_reads(path, np.asarray(Image.open(path)).reshape(37, 53, -1))


def test_byte_and_memory_order_make_no_difference(tmp_path: Path) -> None:
    for dtype, order in ((">u2", "C"), ("<u2", "F"), (">f4", "F")):
        image = np.asarray(invent("uint16", 3), dtype, order=order)
        np.save(tmp_path / "image.npy", image)
        assert image_info(tmp_path / "image.npy") == ImageInfo((37, 53, 3), np.dtype(dtype).name)
        assert np.array_equal(read_image(tmp_path / "image.npy", Window(1, 1, 2, 3)), image[1:3, 1:4])


def test_palettes_give_colors_and_as_masks_numbers_and_black_and_white_0_and_1(tmp_path: Path) -> None:
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4) % 5
    image = Image.fromarray(numbers, mode="P")
    image.putpalette([value for number in range(5) for value in (number * 50, 0, 255 - number)])
    image.save(tmp_path / "palette.png")
    assert np.array_equal(read_masked(tmp_path / "palette.png", is_mask=True)[0][..., 0], numbers)
    colors = [number * np.array([50, 0, -1]) + (0, 0, 255) for number in numbers.ravel()]
    assert read_image(tmp_path / "palette.png").reshape(-1, 3).tolist() == np.array(colors).tolist()
    Image.fromarray(numbers > 2).save(tmp_path / "bits.png")
    found = read_image(tmp_path / "bits.png")
    assert found.dtype == np.uint8 and np.array_equal(found[..., 0], numbers > 2)


def test_a_geotiff_has_nodata_and_a_grid_and_others_have_none(tmp_path: Path, write: Any) -> None:
    for nodata in (None, 0.0, -9999.0, float("nan")):
        assert str(image_info(write(tmp_path / "a.tif", invent("float32", 2), nodata)).nodata) == str(nodata)
    image = invent("uint16", 3)
    path = write(tmp_path / "image.tif", image, compress="deflate", **GRID)
    with rasterio.open(path, "r+") as raster:
        raster.build_overviews([2, 4])
    assert_reads(path, image)
    plain = write(tmp_path / "plain.tif", image), write(tmp_path / "plain.npy", image)
    with ImageReader(path) as reader, ImageReader(plain[0]) as tiff, ImageReader(plain[1]) as array:
        assert "UTM zone 33N" in reader.grid.crs
        assert reader.grid.transform == (500_000, 10, 0, 5_000_000, 0, -10)
        assert (tiff.grid, array.grid) == (("", None, None), None)
        assert (reader.block_rows, array.block_rows) == (16, 1)


def test_bands_in_several_files_fit_together_or_are_named(tmp_path: Path, write: Any) -> None:
    files = [write(tmp_path / f"{dtype}{size}.npy", invent(dtype, 2, size, 9))
             for dtype, size in (("uint8", 8), ("uint8", 7), ("int16", 8), ("uint8", 6))]  # fmt: skip
    with pytest.raises(DataError) as caught:
        ImageReader(*files)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [str(file) for file in files[1:]]
    assert "it has 7 x 9 pixels in uint8, uint88.npy has 8 x 9 in uint8" in caught.value.problems[0]


def test_plain_tiffs_give_no_warning_and_what_is_read_is_a_copy(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "image.tif", invent("uint8", 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_info(path)
        read_image(path)
    path = write(tmp_path / "image.npy", np.zeros((4, 4), np.uint8))
    for window in (None, Window(0, 0, 4, 4)):
        read_image(path, window)[:] = 1
    assert not np.load(path).any()


@pytest.mark.parametrize("ending", [".npy", ".tif"])
def test_windows_of_huge_files_take_little_memory(tmp_path: Path, memory_growth: Any, ending: str) -> None:
    shape = (20_000, 20_000, 12)
    for kind, channels in (("x", 12), ("y", 1)):  # sparse files: 10 GB, of which a page is on the disk
        path = tmp_path / kind / f"huge{ending}"
        path.parent.mkdir()
        if ending == ".npy":
            np.lib.format.open_memmap(path, "w+", np.uint16, (*shape[:2], channels))[19_963, 19_963, -1] = 7
        else:
            profile = {"driver": "GTiff", "height": 20_000, "width": 20_000, "count": channels}
            options = {"dtype": "uint16", "tiled": True, "sparse_ok": True, "bigtiff": "yes"}
            with rasterio.open(path, "w", **profile, **options, **GRID) as raster:
                place = ((19_963, 19_964), (19_963, 19_964))
                raster.write(np.full((1, 1), 7, np.uint16), channels, window=place)
        assert os.stat(path).st_blocks * 512 < 50 * 2**20

    def read() -> None:
        part = read_image(tmp_path / "x" / f"huge{ending}", Window(19_900, 19_900, 64, 64))
        assert part.shape == (64, 64, 12) and part[-1, -1, -1] == 7 and part.sum() == 7
        dataset = NpyDataset(tmp_path / "x", tmp_path / "y", crop=128, crops_per_image=10)
        assert all(x.shape == (12, 128, 128) and y.shape == (128, 128) for x, y in dataset)

    assert memory_growth(read) < 100


def test_images_of_a_folder_are_listed_by_name_without_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ("b.npy", "a.PNG", "c.tif", ".hidden.npy", "notes.txt", "a.npy.lock", "c.tif.aux.xml"):
        (tmp_path / name).touch()
    assert [file.name for file in list_images(tmp_path)] == ["a.PNG", "b.npy", "c.tif"]


# -------------------------------------------------------------------------------------- what cannot be read


def refused(path: Path) -> str:
    """Return the one problem, which begins with the file's name, however the file is read."""
    with pytest.raises(DataError) as caught:
        read_image(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: cannot be read as an image (") and "\n" not in problem
    with pytest.raises(DataError, match="cannot be read as an image"):
        list(ImageReader(path).bands(1000))
    return problem


@pytest.mark.parametrize("ending", ENDINGS)
def test_missing_damaged_and_other_files_are_refused(tmp_path: Path, write: Any, ending: str) -> None:
    path = tmp_path / f"image{ending}"
    refused(path)
    content = write(path, invent("uint8", 3)).read_bytes()
    others = [b"", b"no image at all", bytes(200), b"PK\x03\x04 half a zip", b"\x89PNG\r\n\x1a\n"]
    others += [content[: int(part * len(content))] for part in (0.1, 0.5, 0.9)]
    if ending in (".npz", ".png"):  # compressed with a checksum
        place = len(content) // 2
        others.append(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    for other in others:
        path.write_bytes(other)
        refused(path)
    path.unlink()
    path.mkdir()
    refused(path)


@pytest.mark.parametrize("pair", [(".npy", ".npz"), (".npz", ".npy"), (".png", ".npy"), (".npy", ".tif")])
def test_a_wrong_ending_is_refused(tmp_path: Path, write: Any, pair: tuple[str, str]) -> None:
    path = write(tmp_path / f"image{pair[0]}", invent("uint8", 3))
    refused(path.rename(path.with_suffix(pair[1])))


def test_pickled_objects_are_refused_and_not_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    np.save(tmp_path / "bomb.npy", np.array([[Bomb()]], object), allow_pickle=True)
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "bomb.npz", np.array([[Bomb()]], object), allow_pickle=True)
    for name in ("bomb.npy", "plain.npy", "bomb.npz"):
        refused(tmp_path / name)
        assert not (tmp_path / "exploded").exists()


def test_other_shapes_and_values_than_real_numbers_are_refused(tmp_path: Path, write: Any) -> None:
    for shape in ((), (5,), (2, 3, 4, 5), (0, 3), (3, 0, 2), (3, 3, 0)):
        refused(write(tmp_path / "image.npy", np.zeros(shape)))
        assert "its shape is" in refused(write(tmp_path / "image.npz", np.zeros(shape)))
    for dtype in ("complex64", "U5", "datetime64[s]"):
        assert "dtype" in refused(write(tmp_path / "image.npy", np.zeros((3, 3), dtype)))
    assert "complex64" in refused(write(tmp_path / "image.tif", np.zeros((20, 20), "complex64")))


def test_several_images_in_one_file_are_refused_rather_than_cut_to_the_first(tmp_path: Path) -> None:
    for count in (0, 2):
        np.savez(tmp_path / "image.npz", *[np.zeros((3, 3))] * count)
        assert f"{count} arrays instead of one" in refused(tmp_path / "image.npz")
    with zipfile.ZipFile(tmp_path / "image.npz", "w") as archive:
        archive.writestr("readme.txt", "no array")
    refused(tmp_path / "image.npz")
    pages = [Image.fromarray(np.full((20, 20), page, np.uint8)) for page in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    assert "3 images instead of one" in refused(tmp_path / "stack.tif")
    bands = '<VRTRasterBand dataType="Byte" band="1"/><VRTRasterBand dataType="UInt16" band="2"/>'
    (tmp_path / "image.tif").write_text(f'<VRTDataset rasterXSize="4" rasterYSize="4">{bands}</VRTDataset>')
    assert "uint16, uint8" in refused(tmp_path / "image.tif")


def test_too_many_pixels_and_unknown_endings_are_named(tmp_path: Path, write: Any, monkeypatch: Any) -> None:
    path = write(tmp_path / "image.png", invent("uint8", 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert "more pixels than Pillow opens at once: save it as GeoTIFF or .npy" in refused(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 53 - 1)  # Pillow warns only
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).shape == (37, 53, 3)
    (tmp_path / "image.svg").write_bytes(b"<svg/>")
    assert "its ending is none of .npy" in refused(tmp_path / "image.svg")


# -------------------------------------------------------------------------------------------------- DataError


class Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise DataError(["image_07.npy: is broken", "image_08.npy: is broken"])


def test_an_error_in_a_worker_keeps_its_message() -> None:
    with pytest.raises(DataError, match=r"image_07\.npy: is broken\n  - image_08\.npy: is broken"):
        list(DataLoader(Broken(), num_workers=1))


class Garbage:
    """Keep itself alive until the collector comes, and then run Python code."""

    def __init__(self) -> None:
        self.self = self

    def __del__(self) -> None:
        sum(range(50))


def test_one_thread_at_a_time_reads_a_header_of_numpy(tmp_path: Path, monkeypatch: Any) -> None:
    headers, load = images._NUMPY_HEADERS, np.load
    monkeypatch.setattr(np, "load", lambda *args, **more: load(*args, **more) if headers.locked() else None)
    for name, save in (("a.npy", np.save), ("a.npz", np.savez)):
        save(tmp_path / name, np.ones((4, 4)))
        assert read_image(tmp_path / name).sum() == 16


@pytest.mark.slow
def test_many_threads_read_at_once(tmp_path: Path) -> None:
    """Python 3.11 cannot parse, and numpy not read a header, in two threads at once."""
    np.save(tmp_path / "a.npy", np.ones((4, 4, 3), np.uint8))

    def read(depth: int) -> int:
        if depth:
            return read(depth - 1)
        garbage = [Garbage() for _ in range(20)]
        return int(read_image(tmp_path / "a.npy").sum()) + 0 * len(garbage)

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(20)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(read, (number % 30 for number in range(4000)))) == {48}
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
