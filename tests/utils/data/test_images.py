import gc
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import dida_tools
from dida_tools.utils.data.images import (
    ENDINGS,
    DataError,
    ImageInfo,
    Window,
    image_info,
    list_images,
    read_bands,
    read_image,
)

ROOT = Path(dida_tools.__file__).parents[1]
LOSSLESS = [
    (".npy", "uint8", 12),
    (".npy", "uint16", 3),
    (".npy", "int16", 1),
    (".npy", "float32", 4),
    (".npy", "float64", 2),
    (".npy", "bool", 1),
    (".npz", "uint8", 3),
    (".npz", "float32", 12),
    (".png", "uint8", 1),
    (".png", "uint16", 1),
    (".png", "uint8", 3),
    (".png", "uint8", 4),
    (".tif", "uint8", 1),
    (".tif", "uint16", 12),
    (".tif", "int16", 2),
    (".tiff", "float32", 5),
    (".tif", "float64", 1),
]
ALL = pytest.mark.parametrize(("ending", "dtype", "channels"), LOSSLESS)
WINDOWS = [Window(0, 0, 37, 53), Window(5, 11, 20, 30), Window(36, 52, 1, 1), Window(0, 40, 37, 13)]


def invent(dtype: str, channels: int, height: int = 37, width: int = 53) -> np.ndarray:
    rng = np.random.default_rng(channels)
    shape = (height, width, channels)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, endpoint=True, dtype=dtype)


def without_channel(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.shape[-1] == 1 else image


def png_16_bit(path: Path, image: np.ndarray) -> Path:
    """Pillow does not write 16-bit colors."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


@ALL
def test_every_format_is_read_as_it_was_written(
    tmp_path: Path, write: Any, ending: str, dtype: str, channels: int
) -> None:
    image = invent(dtype, channels)
    path = write(tmp_path / f"image{ending}", without_channel(image))
    found = read_image(path)
    assert found.dtype == image.dtype and np.array_equal(found, image)
    assert image_info(path) == ImageInfo((37, 53, channels), dtype)


@ALL
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_the_slice_of_the_whole(
    tmp_path: Path, write: Any, ending: str, dtype: str, channels: int, window: Window
) -> None:
    image = invent(dtype, channels)
    path = write(tmp_path / f"image{ending}", without_channel(image))
    top, left, height, width = window
    part = read_image(path, window)
    assert np.array_equal(part, image[top : top + height, left : left + width]) and part.dtype == image.dtype


@ALL
@pytest.mark.parametrize("max_values", [1, 700, 10**9])
def test_bands_are_the_whole_image(
    tmp_path: Path, write: Any, ending: str, dtype: str, channels: int, max_values: int
) -> None:
    image = invent(dtype, channels)
    bands = list(read_bands(write(tmp_path / f"image{ending}", without_channel(image)), max_values))
    assert np.array_equal(np.concatenate(bands), image)
    assert all(
        band.size <= max(max_values, 53 * channels) and band.shape[1:] == (53, channels) for band in bands
    )


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("ending", [".jpg", ".jpeg", ".JPG"])
def test_jpeg_is_read_as_pillow_decodes_it(tmp_path: Path, mode: str, ending: str) -> None:
    image = Image.fromarray(invent("uint8", 3)).convert(mode)
    image.save(tmp_path / f"image{ending}")
    decoded = np.asarray(Image.open(tmp_path / f"image{ending}")).reshape(37, 53, -1)
    assert np.array_equal(read_image(tmp_path / f"image{ending}"), decoded)
    part = read_image(tmp_path / f"image{ending}", Window(3, 4, 10, 12))
    assert np.array_equal(part, decoded[3:13, 4:16])


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colors_of_png_keep_their_16_bits(tmp_path: Path, channels: int) -> None:
    image = invent("uint16", channels)
    path = png_16_bit(tmp_path / "image.png", image)
    assert image_info(path) == ImageInfo((37, 53, channels), "uint16")
    assert np.array_equal(read_image(path), image)
    assert np.array_equal(read_image(path, Window(1, 2, 3, 4)), image[1:4, 2:6])


def test_palette_images_give_their_numbers(tmp_path: Path) -> None:
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4) % 5
    image = Image.fromarray(numbers, mode="P")
    image.putpalette([value for number in range(5) for value in (number * 50, 0, 255 - number)])
    image.save(tmp_path / "mask.png")
    assert np.array_equal(read_image(tmp_path / "mask.png")[..., 0], numbers)


def test_black_and_white_images_are_0_and_1(tmp_path: Path) -> None:
    mask = invent("bool", 1)[..., 0]
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = read_image(tmp_path / "mask.png")
    assert found.dtype == np.uint8 and np.array_equal(found[..., 0], mask.astype(np.uint8))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [">u2", "<u2", ">f4"])
def test_byte_and_memory_order_make_no_difference(tmp_path: Path, order: Any, dtype: str) -> None:
    image = np.arange(60).reshape(4, 5, 3)
    np.save(tmp_path / "image.npy", np.asarray(image, dtype, order=order))
    assert image_info(tmp_path / "image.npy") == ImageInfo((4, 5, 3), np.dtype(dtype).name)
    assert np.array_equal(read_image(tmp_path / "image.npy", Window(1, 1, 2, 3)), image[1:3, 1:4])


@pytest.mark.parametrize("nodata", [None, 0, -9999, float("nan"), 0.5])
def test_nodata_is_read_from_a_geotiff(tmp_path: Path, write: Any, nodata: float | None) -> None:
    path = write(tmp_path / "image.tif", invent("float32", 2), nodata)
    assert str(image_info(path).nodata) == str(None if nodata is None else float(nodata))


def test_a_geotiff_with_its_grid_is_read_like_any_other(tmp_path: Path) -> None:
    image = invent("uint16", 3)
    grid = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)}
    profile = {
        "driver": "GTiff",
        "height": 37,
        "width": 53,
        "count": 3,
        "dtype": "uint16",
        "compress": "deflate",
    }
    with rasterio.open(tmp_path / "image.tif", "w", **profile, **grid) as raster:
        raster.write(np.moveaxis(image, -1, 0))
        raster.build_overviews([2, 4])
    assert np.array_equal(read_image(tmp_path / "image.tif"), image)


def test_plain_tiffs_give_no_warning(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "image.tif", invent("uint8", 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_info(path)
        read_image(path)


def test_what_is_read_is_a_copy_that_may_be_written_to(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "image.npy", np.zeros((4, 4), np.uint8))
    for window in (None, Window(0, 0, 4, 4)):
        read_image(path, window)[:] = 1
    assert not np.load(path).any()


READ_WINDOW = """
import resource, sys
from pathlib import Path
from {package}.utils.data.images import Window, image_info, read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
part = read_image(Path(sys.argv[1]), Window(19_900, 19_900, 64, 64))
assert part.shape == (64, 64, 12) and part[-1, -1, -1] == 7 and part.sum() == 7
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("ending", [".npy", ".tif"])
def test_a_window_of_a_file_larger_than_memory_takes_little_memory(tmp_path: Path, ending: str) -> None:
    path, shape = tmp_path / f"huge{ending}", (20_000, 20_000, 12)
    if ending == ".npy":
        array = np.lib.format.open_memmap(
            path, "w+", np.uint16, shape
        )  # 10 GB, of which a page is on the disk
        array[19_963, 19_963, -1] = 7
        array.flush()
    else:
        profile = {
            "driver": "GTiff",
            "height": shape[0],
            "width": shape[1],
            "count": shape[2],
            "dtype": "uint16",
        }
        options = {"tiled": True, "sparse_ok": True, "bigtiff": "yes"}
        grid = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)}
        with rasterio.open(path, "w", **profile, **options, **grid) as raster:
            raster.write(np.full((1, 1), 7, np.uint16), 12, window=((19_963, 19_964), (19_963, 19_964)))
    assert os.stat(path).st_blocks * 512 < 50 * 2**20
    code = READ_WINDOW.format(package=dida_tools.__name__)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100 * 1024


def test_images_of_a_folder_are_listed_by_name_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name in ("b.npy", "a.PNG", "c.tif", ".hidden.npy", "notes.txt", "a.npy.lock", "c.tif.aux.xml"):
        (tmp_path / name).touch()
    assert [file.name for file in list_images(tmp_path)] == ["a.PNG", "b.npy", "c.tif"]


# ----------------------------------------------------------------------------------------------- what cannot be read


def refused(path: Path) -> str:
    """The message of reading a file in any way: it is one problem, that begins with the file's name."""
    with pytest.raises(DataError) as caught:
        read_image(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: cannot be read as an image (") and "\n" not in problem
    with pytest.raises(DataError, match="cannot be read as an image"):
        list(read_bands(path, 10**6))
    return problem


@pytest.mark.parametrize("ending", ENDINGS)
def test_missing_files_are_named(tmp_path: Path, ending: str) -> None:
    with pytest.raises(DataError):
        image_info(tmp_path / f"missing{ending}")
    refused(tmp_path / f"missing{ending}")


@pytest.mark.parametrize(
    "content", [b"", b"no image at all", bytes(200), b"PK\x03\x04 half a zip", b"\x89PNG\r\n\x1a\n"]
)
@pytest.mark.parametrize("ending", ENDINGS)
def test_foreign_content_is_refused(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"image{ending}"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("ending", [".npy", ".npz", ".png", ".jpg", ".tif"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, write: Any, ending: str, part: float) -> None:
    path = write(tmp_path / f"image{ending}", invent("uint8", 3))
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    refused(path)


@pytest.mark.parametrize("ending", [".npz", ".png"])
def test_a_flipped_bit_in_compressed_pixels_is_noticed(tmp_path: Path, write: Any, ending: str) -> None:
    path = write(tmp_path / f"image{ending}", invent("uint8", 3))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
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


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 5), (0, 3), (3, 0, 2), (3, 3, 0)])
@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_other_shapes_than_those_of_images_are_refused(
    tmp_path: Path, write: Any, ending: str, shape: tuple[int, ...]
) -> None:
    path = write(tmp_path / f"image{ending}", np.zeros(shape))
    problem = refused(path)
    assert ending == ".npy" or "its shape is" in problem


@pytest.mark.parametrize("dtype", ["complex64", "U5", "datetime64[s]"])
def test_other_values_than_real_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "image.npy", np.zeros((3, 3), dtype))
    assert "dtype" in refused(tmp_path / "image.npy")


def test_complex_rasters_are_refused(tmp_path: Path, write: Any) -> None:
    assert "complex64" in refused(write(tmp_path / "image.tif", np.zeros((20, 20), np.complex64)))


@pytest.mark.parametrize("count", [0, 2])
def test_archives_of_another_number_of_arrays_are_refused(tmp_path: Path, count: int) -> None:
    np.savez(tmp_path / "image.npz", *[np.zeros((3, 3))] * count)
    assert f"{count} arrays instead of one" in refused(tmp_path / "image.npz")


def test_archives_of_something_else_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "image.npz", "w") as archive:
        archive.writestr("readme.txt", "no array")
    refused(tmp_path / "image.npz")


def test_tiffs_of_several_pages_are_refused_rather_than_cut_to_the_first(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((20, 20), page, np.uint8)) for page in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    assert "3 images instead of one" in refused(tmp_path / "stack.tif")


def test_rasters_of_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    bands = "".join(
        f'<VRTRasterBand dataType="{dtype}" band="{number}"/>'
        for number, dtype in ((1, "Byte"), (2, "UInt16"))
    )
    (tmp_path / "image.tif").write_text(f'<VRTDataset rasterXSize="4" rasterYSize="4">{bands}</VRTDataset>')
    assert "uint16, uint8" in refused(tmp_path / "image.tif")


def test_images_that_pillow_takes_for_a_bomb_are_named(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "image.png", invent("uint8", 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert "exceeds limit" in refused(path)


def test_a_folder_with_the_name_of_an_image_is_refused(tmp_path: Path) -> None:
    for ending in (".npy", ".png", ".tif"):
        (tmp_path / f"folder{ending}").mkdir()
        refused(tmp_path / f"folder{ending}")


def test_unknown_endings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "image.bmp").write_bytes(b"BM")
    assert "its ending is none of .npy" in refused(tmp_path / "image.bmp")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_named(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "image.npy", np.zeros((3, 3)))
    path.chmod(0)
    assert "Permission" in refused(path)


# --------------------------------------------------------------------------------------------------------- DataError


def test_an_error_lists_its_problems() -> None:
    assert str(DataError(["one"])) == "the data has 1 problem:\n  - one"
    assert str(DataError(["one", "two"])) == "the data has 2 problems:\n  - one\n  - two"


def test_an_error_with_many_problems_keeps_them_all_and_shows_some() -> None:
    error = DataError([f"problem {number}" for number in range(70)])
    assert len(error.problems) == 70
    assert str(error).count("\n  - problem ") == 50 and str(error).endswith("\n  - and 20 more")


class Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise DataError(["image_07.npy: is broken", "image_08.npy: is broken"])


def test_an_error_in_a_worker_keeps_its_message() -> None:
    with pytest.raises(DataError, match=r"image_07\.npy: is broken\n  - image_08\.npy: is broken") as caught:
        list(DataLoader(Broken(), num_workers=1))
    assert len(caught.value.problems) == 1


def test_a_pickled_error_keeps_its_message() -> None:
    assert "  - one\n  - two" in str(pickle.loads(pickle.dumps(DataError(["one", "two"]))))


class Garbage:
    """Keeps itself alive until the collector comes, and then runs Python code."""

    def __init__(self) -> None:
        self.self = self

    def __del__(self) -> None:
        sum(range(50))


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
