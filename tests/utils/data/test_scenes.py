import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import f1_score

import dida_tools
from dida_tools.config.config import global_config
from dida_tools.utils.data import SceneDataset
from dida_tools.utils.data import scenes as module
from dida_tools.utils.data.scenes import (
    BLOCK_PIXELS,
    CHANNEL_NAMES,
    CLASS_NAMES,
    CLOUD,
    FOREST,
    NODATA,
    NUM_SCENES,
    SIZE,
    SPECTRA,
    VERSION,
    WATER,
    make_scene,
    make_scenes,
)
from dida_tools.utils.data.transforms import STANDARD

ROOT = Path(dida_tools.__file__).parents[1]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def arrays(scenes: Path) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    return {
        part: [
            (np.load(file), np.load(scenes / part / "y" / file.name))
            for file in sorted((scenes / part / "x").iterdir())
        ]
        for part in NUM_SCENES
    }


def every(arrays: dict[str, list]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [pair for pairs in arrays.values() for pair in pairs]


def test_there_are_as_many_scenes_as_stated(scenes: Path) -> None:
    assert scenes.name == f"scenes-{VERSION}" and NUM_SCENES == {"train": 40, "test": 12}
    numbers: list[int] = []
    for part, count in NUM_SCENES.items():
        names = [sorted(file.name for file in (scenes / part / kind).iterdir()) for kind in ("x", "y")]
        assert names[0] == names[1] and len(names[0]) == count
        numbers += [int(name[6:9]) for name in names[0]]
    assert numbers == list(range(52))


def test_scenes_have_12_bands_in_uint16_and_masks_in_uint8(arrays: dict[str, list]) -> None:
    for image, mask in every(arrays):
        assert (image.shape, image.dtype) == ((SIZE, SIZE, 12), np.uint16)
        assert (mask.shape, mask.dtype) == ((SIZE, SIZE), np.uint8)
        assert mask.max() < len(CLASS_NAMES) and image.max() < 20_000


@pytest.mark.parametrize("part", NUM_SCENES)
def test_every_class_covers_a_good_part(arrays: dict[str, list], part: str) -> None:
    shares = np.bincount(np.concatenate([mask.ravel() for _, mask in arrays[part]]), minlength=5)
    assert (shares / shares.sum() > 0.03).all() and (shares / shares.sum() < 0.6).all()


@pytest.mark.parametrize("part", NUM_SCENES)
def test_some_scenes_have_a_border_without_data(arrays: dict[str, list], part: str) -> None:
    shares = []
    for image, _ in arrays[part]:
        missing = (image == NODATA).all(-1)
        assert np.array_equal(missing, (image == NODATA).any(-1))
        shares.append(float(missing.mean()))
    bordered = [share for share in shares if share > 0]
    assert 0.05 < len(bordered) / len(shares) < 0.6 and 0 < max(bordered) < 0.5


def test_scenes_differ(arrays: dict[str, list]) -> None:
    assert len({image.tobytes() for image, _ in every(arrays)}) == 52


def mean_spectrum(pairs: list, label: int) -> np.ndarray:
    pixels = [image[(mask == label) & (image > 0).all(-1)] for image, mask in pairs]
    return np.concatenate(pixels).mean(0) / 10_000


def test_spectra_are_plausible(arrays: dict[str, list]) -> None:
    """Plants are dark in red and bright in near infrared, water is dark there, clouds are bright everywhere."""
    assert all(
        len(spectrum) == len(CHANNEL_NAMES) == len(BLOCK_PIXELS) == 12 for spectrum in SPECTRA.values()
    )
    red, near_infrared, short_wave = (CHANNEL_NAMES.index(name) for name in ("B04", "B08", "B12"))
    forest, water, cloud = (mean_spectrum(every(arrays), label) for label in (FOREST, WATER, CLOUD))
    assert (
        forest[near_infrared] > 3 * forest[red]
        and water[near_infrared] < water[red]
        and water[short_wave] < 0.06
    )
    assert (cloud > forest).all() and cloud[:4].min() > 0.25


def test_coarse_bands_are_blurred_and_all_bands_noisy(arrays: dict[str, list]) -> None:
    def roughness(band: str) -> float:
        number = CHANNEL_NAMES.index(band)
        return float(
            np.mean([np.abs(np.diff(image[:96, :96, number].astype(int), axis=0)).mean() for image in inside])
        )

    inside = [image for image, _ in every(arrays) if (image > 0).all()]
    assert roughness("B01") < 0.75 * roughness("B02") and roughness("B8A") < 0.75 * roughness("B08")
    assert roughness("B01") > 20


def digest(numbers: range) -> str:
    content = hashlib.sha256()
    for number in numbers:
        for array in make_scene(number):
            content.update(array.tobytes())
    return content.hexdigest()


DIGEST = """
import hashlib
from {package}.utils.data.scenes import make_scene
content = hashlib.sha256()
for number in range(3):
    for array in make_scene(number):
        content.update(array.tobytes())
print(content.hexdigest())
"""
OLDER_CPU = {"NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX X86_V4", "PYTHONHASHSEED": "7"}


@pytest.mark.parametrize("environment", [{}, OLDER_CPU], ids=["same", "older CPU"])
def test_scenes_are_the_same_bytes_in_another_process(environment: dict[str, str]) -> None:
    code = DIGEST.format(package=dida_tools.__name__)
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest(range(3))


def test_written_scenes_are_those_of_their_number(arrays: dict[str, list]) -> None:
    for number, (image, mask) in ((0, arrays["train"][0]), (51, arrays["test"][11])):
        assert np.array_equal(make_scene(number)[0], image) and np.array_equal(make_scene(number)[1], mask)


def test_a_scene_leaves_global_randomness_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    make_scene(0, size=32)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("size", [24, 61, 256])
def test_scenes_of_other_sizes_can_be_made(size: int) -> None:
    image, mask = make_scene(3, size)
    assert image.shape == (size, size, 12) and mask.shape == (size, size)


# ---------------------------------------------------------------------------------------------------------- difficulty


def pixels_of(pairs: list, number: int) -> tuple[np.ndarray, np.ndarray]:
    kept = [(image > 0).all(-1) for image, _ in pairs]
    x = np.concatenate([image[keep] for (image, _), keep in zip(pairs, kept, strict=True)])
    y = np.concatenate([mask[keep] for (_, mask), keep in zip(pairs, kept, strict=True)])
    chosen = np.random.default_rng(0).choice(len(x), number, replace=False)
    return x[chosen], y[chosen]


def test_color_says_something_about_a_pixel_but_not_all(arrays: dict[str, list]) -> None:
    classifier = HistGradientBoostingClassifier(max_iter=100, random_state=0)
    classifier.fit(*pixels_of(arrays["train"], 40_000))
    x, y = pixels_of(arrays["test"], 30_000)
    assert 0.5 < f1_score(y, classifier.predict(x), average="macro") < 0.88


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_SCENES", {"train": 3, "test": 2})


MAKE = """
import sys
from {package}.utils.data import scenes
scenes.NUM_SCENES = {{"train": int(sys.argv[2]), "test": 2}}
print("ready", flush=True)
sys.stdin.readline()
print(scenes.make_scenes(sys.argv[1]))
"""


def start_maker(folder: Path, number: int) -> subprocess.Popen:
    command = [sys.executable, "-c", MAKE.format(package=dida_tools.__name__), str(folder), str(number)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(process: subprocess.Popen) -> None:
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.usefixtures("few")
def test_scenes_are_written_once(tmp_path: Path) -> None:
    folder = make_scenes(tmp_path / "new" / "data")
    before = content(folder)
    assert (
        len(before) == 11
        and make_scenes(str(tmp_path / "new" / "data")) == folder
        and content(folder) == before
    )


@pytest.mark.usefixtures("few")
def test_a_description_lies_beside_the_scenes(tmp_path: Path) -> None:
    about = json.loads((make_scenes(tmp_path) / "scenes.json").read_text())
    assert about == {"version": 1, "classes": [*CLASS_NAMES], "channels": [*CHANNEL_NAMES], "nodata": 0}


@pytest.mark.usefixtures("few")
def test_another_version_gets_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_scenes(tmp_path)
    monkeypatch.setattr(module, "VERSION", VERSION + 1)
    second = make_scenes(tmp_path)
    assert first != second and first.is_dir()
    assert not np.array_equal(
        *(np.load(folder / "train" / "x" / "scene_000.npy") for folder in (first, second))
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("few")
def test_scenes_in_a_folder_that_cannot_be_written_are_used(tmp_path: Path) -> None:
    folder = make_scenes(tmp_path)
    tmp_path.chmod(0o500)
    assert make_scenes(tmp_path) == folder
    tmp_path.chmod(0o700)


@pytest.mark.usefixtures("few")
def test_a_maker_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return make_scene(number)

    monkeypatch.setattr(module, "make_scene", fail)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    monkeypatch.undo()


@pytest.mark.usefixtures("few")
def test_scenes_appear_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []

    def replace(source: Path, target: Path) -> None:
        assert not target.exists() and len(list(source.rglob("*.npy"))) == 10
        moved.append((source.parent, target))
        raise OSError("stopped")

    monkeypatch.setattr(module.os, "replace", replace)
    with pytest.raises(OSError, match="stopped"):
        make_scenes(tmp_path)
    assert moved == [(tmp_path, tmp_path / "scenes-1")]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_makers_at_the_same_time_write_the_same_scenes_once(tmp_path: Path) -> None:
    makers = [start_maker(tmp_path, 4) for _ in range(2)]
    for maker in makers:
        go(maker)
    folders = [Path(maker.communicate()[0].strip()) for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0] and folders == [tmp_path / "scenes-1"] * 2
    assert len(list(folders[0].rglob("*.npy"))) == 12
    assert np.array_equal(np.load(folders[0] / "test" / "x" / "scene_005.npy"), make_scene(5)[0])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["scenes-1"]


@pytest.mark.usefixtures("few")
def test_a_killed_maker_leaves_nothing_half_made(tmp_path: Path) -> None:
    maker = start_maker(tmp_path, 1000)
    go(maker)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.npy"))) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    maker.send_signal(signal.SIGKILL)
    maker.communicate()
    assert not (tmp_path / "scenes-1").exists()
    folder = make_scenes(tmp_path)
    assert len(list(folder.rglob("*.npy"))) == 10
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["scenes-1"]


# ------------------------------------------------------------------------------------------------------------ dataset


@pytest.mark.parametrize("part", NUM_SCENES)
def test_the_data_set_passes_its_own_check(scenes: Path, part: str) -> None:
    dataset = SceneDataset(part, scenes.parent)
    dataset.check(num_classes=5)
    assert len(dataset) == NUM_SCENES[part]
    contract = dataset.contract()
    assert (contract.channels, contract.dtype, contract.nodata) == (12, "uint16", 0)
    assert (contract.channel_names, contract.class_names) == (CHANNEL_NAMES, CLASS_NAMES)


def test_borders_are_ignored(scenes: Path, arrays: dict[str, list]) -> None:
    dataset = SceneDataset("test", scenes.parent).for_evaluation()
    for (image, _), (x, y) in zip(arrays["test"], dataset, strict=True):
        missing = (image == NODATA).all(-1)
        assert np.array_equal(y.numpy() == 255, missing) and (x.numpy()[:, missing] == 0).all()


def test_scenes_lie_in_data_dir_unless_another_folder_is_given(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(global_config, "DATA_DIR", str(scenes.parent))
    dataset = SceneDataset("test")
    assert dataset.images[0].parent == scenes / "test" / "x" and dataset.arguments["data_dir"] is None


def test_a_data_set_can_be_built_again_from_its_arguments(scenes: Path) -> None:
    options: dict[str, Any] = {"crop": 32, "crops_per_image": 2, "foreground": 0.5, "augment": STANDARD}
    for dataset in (
        SceneDataset("train", scenes.parent, **options),
        SceneDataset("train", scenes.parent, **options).with_mask_values({CLOUD: 255}),
    ):
        again = SceneDataset(**dataset.arguments)
        samples = []
        for built in (dataset, again):
            torch.manual_seed(0)
            samples.append(built[3])
        assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))
        assert again.arguments == dataset.arguments


def test_classes_can_be_merged(scenes: Path) -> None:
    dataset = SceneDataset(
        "test", scenes.parent, mask_values={label: int(label == WATER) for label in range(5)}
    )
    dataset.check(num_classes=2)
    assert all(set(y.unique().tolist()) <= {0, 1, 255} for _, y in dataset)


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="part is 'validation': choose one of train, test"):
        SceneDataset("validation", tmp_path)
    assert not list(tmp_path.iterdir())
