"""What a file states about itself counts, or is refused: validity, values, orientation, place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from dida_core.data.contract import DataContract
from dida_core.data.facts import scan_files, scan_image, scan_mask
from dida_core.data.images import DataError, ImageReader, Window, image_info, read_image, read_masked
from dida_core.data.pairs import MaskReading, mask_problems
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine

SIZE = (20, 30)
MISSING = np.zeros(SIZE, bool)
MISSING[:, :9] = MISSING[3:5] = True
NORTH_UP = Affine(10, 0, 500_000, 0, -10, 5_000_000)
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def invent(channels: int = 3, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(channels).integers(60, 200, (*SIZE, channels)).astype(dtype)


def filled(value: Any, dtype: str = "uint8", channel: Any = slice(None)) -> np.ndarray:
    image = invent(3, dtype)
    image[MISSING, channel] = value
    return image


def write(path: Path, image: np.ndarray, mask: bool = False, internal: bool = True, **profile: Any) -> None:
    bands = np.moveaxis(image, -1, 0)
    about = {"driver": "GTiff", "dtype": image.dtype, "count": len(bands), "height": len(image)} | profile
    tags = {name: about.pop(name) for name in ("scales", "offsets") if name in about}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal),
        rasterio.open(path, "w", width=image.shape[1], **about) as raster,
    ):
        raster.write(bands)
        for name, values in tags.items():
            setattr(raster, name, values)
        if mask:
            raster.write_mask(~MISSING)


def picture(path: Path, array: np.ndarray, mode: str | None = None, **options: Any) -> None:
    image = Image.fromarray(array.squeeze())
    (image.convert(mode) if mode else image).save(path, **options)


def vrt(path: Path, image: np.ndarray, nodata: tuple[Any, ...]) -> None:
    """Write a raster whose bands state nodata of their own."""
    write(path.with_name("bands.tif"), image)
    source = '<SourceFilename relativeToVRT="1">bands.tif</SourceFilename>'
    bands = "".join(
        f'<VRTRasterBand dataType="{image.dtype.name.title().replace("Uint8", "Byte")}" band="{number}">'
        + (f"<NoDataValue>{value}</NoDataValue>" if value is not None else "")
        + f"<SimpleSource>{source}<SourceBand>{number}</SourceBand></SimpleSource></VRTRasterBand>"
        for number, value in enumerate(nodata, 1)
    )
    path.write_text(f'<VRTDataset rasterXSize="{SIZE[1]}" rasterYSize="{SIZE[0]}">{bands}</VRTDataset>')


def beside(path: Path, image: np.ndarray) -> None:
    """Write a PNG with an external mask."""
    picture(path, image)
    write(path.with_name("m.tif"), np.where(MISSING, 0, 255).astype(np.uint8)[..., None])
    with rasterio.open(path.with_name("m.tif"), "r+") as mask:
        mask.update_tags(INTERNAL_MASK_FLAGS_1=2)
    path.with_name("m.tif").rename(f"{path}.msk")


def deep(path: Path, image: np.ndarray) -> None:
    write(path, image, driver="PNG")


ALPHA = np.where(MISSING, 0, np.random.default_rng(0).integers(1, 256, SIZE)).astype(np.uint8)[..., None]
RGBA, GREY_ALPHA = np.dstack([invent(), ALPHA]), np.dstack([invent(1), ALPHA])
INDICES = np.where(MISSING, 7, invent(1)[..., 0] % 5).astype(np.uint8)
KEYED = np.where(MISSING[..., None], (1, 2, 3), invent()).astype(np.uint8)
EMPTY = np.float32(-3.4028234663852886e38)

VALIDITY: dict[str, tuple[Any, ...]] = {
    "internal_mask.tif": (write, invent(), True),
    "external_mask.tif": (write, invent(), True, False),
    "rgba.tif": (write, RGBA),
    "grey_alpha.tif": (lambda path: picture(path, GREY_ALPHA),),
    "one_band.tif": (lambda path: write(path, filled(-9999, "float32", 1), nodata=-9999),),
    "one_band_of_16_bits.tif": (lambda path: write(path, filled(0, "uint16", 2), nodata=0),),
    "all_bands_of_8_bits.tif": (lambda path: write(path, filled(0), nodata=0),),
    "nan.tif": (lambda path: write(path, filled(np.nan, "float32", 0), nodata=np.nan),),
    "float_min.tif": (lambda path: write(path, filled(EMPTY, "float32"), nodata=EMPTY),),
    "infinite.tif": (lambda path: write(path, filled(-np.inf, "float32"), nodata=-np.inf),),
    "scaled.tif": (lambda path: write(path, filled(-1, "int16"), nodata=-1, scales=(0.5,) * 3),),
    "nodata_and_mask.tif": (lambda path: write(path, invent(3, "int16"), True, nodata=-1),),
    "own_of_each_band.tif": (vrt, filled((1, 2, 3)), (1, 2, 3)),
    "of_some_bands.tif": (vrt, filled((1, 0, 3)), (1, None, 3)),
    "rgba.png": (picture, RGBA),
    "grey_alpha.png": (picture, GREY_ALPHA),
    "key.png": (lambda path: picture(path, KEYED, transparency=(1, 2, 3)),),
    "palette.png": (lambda path: picture(path, INDICES, "P", transparency=7),),
    "mask_beside.png": (beside, invent()),
    "deep_alpha.png": (deep, np.dstack([invent(3, "uint16"), ALPHA.astype(np.uint16) * 257])),
}


@pytest.mark.parametrize("name", VALIDITY)
def test_pixels_without_data_are_those_the_file_states(tmp_path: Path, name: str) -> None:
    make, *arguments = VALIDITY[name]
    make(tmp_path / name, *arguments)
    pixels, valid = read_masked(tmp_path / name)
    assert np.array_equal(valid, ~MISSING)
    with ImageReader(tmp_path / name) as image:
        assert image.lacks_data and np.array_equal(
            image.read_masked(Window(2, 5, 7, 11))[1], ~MISSING[2:9, 5:16]
        )
        assert len(image.sample()) == (~MISSING).sum()
        contract = DataContract.of(image_info(tmp_path / name))
        assert contract.problems(pixels, valid) == []
        assert (contract.prepare(pixels, valid)[0].numpy()[:, MISSING] == 0).all()
    facts = scan_image(tmp_path / name)
    json.dumps(facts, allow_nan=False)
    assert (facts["missing"], facts["damaged"]) == (MISSING.sum(), 0)
    assert facts["min"] == pixels[valid].min(0).tolist() and facts["max"] == pixels[valid].max(0).tolist()


@pytest.mark.parametrize("name", ["internal_mask.tif", "external_mask.tif", "float_min.tif", "nan.tif"])
def test_pixels_of_masks_without_data_count_nowhere(tmp_path: Path, name: str) -> None:
    options = {"float_min.tif": EMPTY, "nan.tif": np.float32(np.nan)}
    labels = np.where(MISSING, options.get(name, 1), invent(1)[..., 0] % 2).astype(
        np.float32 if name in options else np.uint8
    )[..., None]
    nodata = {"nodata": options[name]} if name in options else {"mask": True, "internal": "int" in name}
    write(tmp_path / name, labels, **nodata)
    facts = scan_mask(tmp_path / name)
    counts = [[value, int((labels[~MISSING] == value).sum())] for value in (0, 1)]
    assert (facts["values"], facts["missing"], facts["damaged"]) == (counts, MISSING.sum(), 0)
    for number, places in enumerate(facts["places"]):
        assert (labels.ravel()[places] == number).all() and not MISSING.ravel()[places].any()


def test_a_mask_beside_an_image_is_seen_when_it_comes_later(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.tif", tmp_path / "cache.json"
    write(path, invent())
    assert scan_files([path], scan_image, cache)[path]["missing"] == 0
    write(tmp_path / "b.tif", invent(), mask=True, internal=False)
    (tmp_path / "b.tif.msk").rename(tmp_path / "a.tif.msk")
    assert scan_files([path], scan_image, cache)[path]["missing"] == MISSING.sum()


def test_in_masks_neither_a_nodata_of_0_nor_an_alpha_channel_is_believed(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", filled(0)[..., :1], nodata=0)
    picture(tmp_path / "a.png", RGBA)
    for name in ("a.tif", "a.png"):
        assert read_masked(tmp_path / name, is_mask=True)[1].all()


NUMBERS = (np.arange(600).reshape(SIZE) % 5).astype(np.uint8)
COLORS = np.random.default_rng(5).integers(0, 256, (5, 3)).astype(np.uint8)


def with_palette(path: Path) -> None:
    image = Image.fromarray(NUMBERS, mode="P")
    image.putpalette(COLORS.ravel().tolist())
    image.save(path)


GREY = invent(1)
UPRIGHT = {1: GREY, 2: GREY[:, ::-1], 3: GREY[::-1, ::-1], 4: GREY[::-1], 5: GREY.swapaxes(0, 1),
           6: np.rot90(GREY, -1), 7: np.rot90(GREY, 2).swapaxes(0, 1), 8: np.rot90(GREY)}  # fmt: skip
OFFSETS = {"scales": (0.5, 2.0, 1.0), "offsets": (-3.0, 0.0, 7.0)}
VALUES: dict[str, tuple[Any, np.ndarray]] = {
    "palette.tif": (with_palette, COLORS[NUMBERS]),
    "palette.png": (with_palette, COLORS[NUMBERS]),
    "min_is_white.tif": (lambda path: write(path, GREY, photometric="miniswhite"), 255 - GREY),
    "white_of_16_bits.tif": (
        lambda path: write(path, GREY.astype("uint16"), photometric="miniswhite"),
        65535 - GREY.astype("uint16"),
    ),
    "white_bits.tif": (lambda path: write(path, GREY % 2, nbits=1, photometric="miniswhite"), 1 - GREY % 2),
    "bits.tif": (lambda path: picture(path, GREY > 99), (GREY > 99).astype(np.uint8)),
    "scaled.tif": (
        lambda path: write(path, invent(3, "uint16"), **OFFSETS),
        (invent() * np.array(OFFSETS["scales"]) + OFFSETS["offsets"]).astype(np.float32),
    ),
    "scaled_32_bits.tif": (
        lambda path: write(path, invent(3, "int32"), **OFFSETS),
        invent() * np.array(OFFSETS["scales"]) + OFFSETS["offsets"],
    ),
    "float.tif": (lambda path: write(path, invent(2, "float32")), invent(2, "float32")),
    **{
        f"turned_{number}.png": (lambda path, number=number: picture(path, GREY, exif=turn(number)), image)
        for number, image in UPRIGHT.items()
    },
}


def turn(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = number
    return exif


@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_the_file_shows(tmp_path: Path, name: str) -> None:
    make, expected = VALUES[name]
    make(tmp_path / name)
    found = read_image(tmp_path / name)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    info = image_info(tmp_path / name)
    assert (info.shape, info.dtype) == (expected.shape, expected.dtype.name)
    assert np.array_equal(read_image(tmp_path / name, Window(3, 4, 5, 6)), expected[3:8, 4:10])
    if "palette" in name:
        indices = read_masked(tmp_path / name, is_mask=True)[0]
        assert np.array_equal(indices, NUMBERS[..., None])


def turned(path: Path, **tags: Any) -> None:
    about = ImageFileDirectory_v2()
    about[274] = 6
    picture(path, GREY, tiffinfo=about)


def turned_in_a_place(path: Path) -> None:
    picture(path, invent(), exif=turn(6))
    path.with_suffix(".jgw").write_text("1\n0\n0\n-1\n500000\n5000000\n")


def animated(path: Path) -> None:
    picture(path, GREY, save_all=True, append_images=[Image.fromarray(GREY[..., 0] + 1)])


REFUSED: dict[str, tuple[Any, str]] = {
    "turned.tif": (turned, "orientation 6"),
    "turned.jpg": (turned_in_a_place, "EXIF turns it"),
    "animated.png": (animated, "2 images instead of one"),
    "cmyk.jpg": (lambda path: picture(path, invent(), "CMYK"), "its colors are CMYK: convert them to RGB"),
    "cmyk.tif": (lambda path: picture(path, invent(), "CMYK"), "its colors are CMYK"),
    "lab.tif": (lambda path: write(path, invent(), photometric="CIELAB"), "its colors are CIELAB"),
    "white.tif": (lambda path: write(path, invent(1, "int16"), photometric="miniswhite"), "its 0 is white"),
    "complex.tif": (lambda path: write(path, invent(1, "complex64")), "an image holds real numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_count_is_refused(tmp_path: Path, name: str) -> None:
    make, reason = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(DataError, match=reason):
        read_image(tmp_path / name)
    write(tmp_path / "white_mask.tif", GREY, photometric="miniswhite")
    with pytest.raises(DataError, match="its 0 is white"):
        read_masked(tmp_path / "white_mask.tif", is_mask=True)


# ---------------------------------------------------------------------------------------------------- places


def gcps(shift: float = 0.0) -> list[GroundControlPoint]:
    ends = [(row, column) for row in (0, SIZE[0]) for column in (0, SIZE[1])]
    return [GroundControlPoint(row, col, 10 + shift + col / 100, 50 - row / 100) for row, col in ends]


UTM = {"crs": "EPSG:32633", "transform": NORTH_UP}
PLACES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {  # of two rasters, and whether they are one
    "same": (UTM, UTM, True),
    "a third of a pixel": (UTM, UTM | {"transform": NORTH_UP @ Affine.translation(0.3, 0)}, True),
    "one pixel": (UTM, UTM | {"transform": NORTH_UP @ Affine.translation(0, 1)}, False),
    "resolution": (UTM, UTM | {"transform": NORTH_UP @ Affine.scale(2)}, False),
    "zone": (UTM, UTM | {"crs": "EPSG:32632"}, False),
    "no way between": (UTM, UTM | {"crs": 'LOCAL_CS["site",UNIT["metre",1]]'}, False),
    "south up": (UTM, UTM | {"transform": Affine(10, 0, 500_000, 0, 10, 4_999_800)}, False),
    "rotated": (UTM, UTM | {"transform": NORTH_UP @ Affine.rotation(5)}, False),
    "both rotated": (*[UTM | {"transform": NORTH_UP @ Affine.rotation(30)}] * 2, True),
    "nowhere": (UTM, {}, True),
    "without crs": (UTM, {"transform": NORTH_UP}, True),
    "same points": (*[{"gcps": gcps(), "crs": "EPSG:4326"}] * 2, True),
    "other points": ({"gcps": gcps(), "crs": "EPSG:4326"}, {"gcps": gcps(1), "crs": "EPSG:4326"}, False),
}


@pytest.mark.parametrize("case", PLACES)
def test_bands_and_masks_lie_where_their_image_lies(tmp_path: Path, case: str) -> None:
    one, other, is_same = PLACES[case]
    write(tmp_path / "a.tif", invent(), **one)
    write(tmp_path / "b.tif", invent(1), **other)
    facts = scan_image(tmp_path / "a.tif"), scan_mask(tmp_path / "b.tif")
    found = mask_problems(*facts, MaskReading("values"))
    if is_same:
        with ImageReader(tmp_path / "b.tif", tmp_path / "a.tif") as stacked:
            assert found == [] and stacked.shape == (*SIZE, 4)
            with ImageReader(tmp_path / ("b.tif" if "crs" in other else "a.tif")) as placed:
                assert str(stacked.grid) == str(placed.grid) or case == "without crs"
        return
    assert len(found) == 1 and found[0].startswith("it lies at (") and "its image at (" in found[0]
    with pytest.raises(DataError, match=r"b\.tif: it lies at \(.* a\.tif at \(.* onto one grid"):
        ImageReader(tmp_path / "a.tif", tmp_path / "b.tif")


def test_bands_keep_their_own_nodata(tmp_path: Path) -> None:
    for name, value in (("a", 0), ("b", 9999), ("c", None)):
        image = invent(1, "uint16")
        image["abc".index(name)] = 0 if value is None else value
        write(tmp_path / f"{name}.tif", image, nodata=value)
    with ImageReader(*(tmp_path / f"{name}.tif" for name in "abc")) as stacked:
        valid = stacked.read_masked()[1]
        assert stacked.nodata is None and not valid[:2].any() and valid[2:].all()


@pytest.mark.parametrize(("name", "world"), [("a.png", "a.pgw"), ("a.jpg", "a.wld"), ("a.PNG", "a.PGW")])
def test_a_world_file_tells_where_a_picture_lies(tmp_path: Path, name: str, world: str) -> None:
    picture(tmp_path / name, invent())
    (tmp_path / world).write_text("10\n0\n0\n-10\n500005\n4999995\n")
    with ImageReader(tmp_path / name) as image:
        assert image.grid is not None and image.grid.transform == (500_000, 10, 0, 5_000_000, 0, -10)
        assert image.place is not None and image.place["corners"][2] == [500_300, 4_999_800]
