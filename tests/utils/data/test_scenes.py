"""The scenes are the same bytes everywhere, neither trivial nor impossible, and written all at once."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
    CHANNEL_NAMES,
    CLASS_NAMES,
    NODATA,
    NUM_SCENES,
    make_scene,
    make_scenes,
)
from dida_tools.utils.data.transforms import STANDARD

Arrays = dict[str, list[tuple[np.ndarray, np.ndarray]]]
SPLITS = pytest.mark.parametrize("split", NUM_SCENES)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def arrays(scenes: Path) -> Arrays:
    def read(split: str) -> list[tuple[np.ndarray, np.ndarray]]:
        files = sorted((scenes / split / "x").iterdir())
        return [(np.load(file), np.load(scenes / split / "y" / file.name)) for file in files]

    return {split: read(split) for split in NUM_SCENES}


@pytest.fixture(scope="module")
def every(arrays: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    return [pair for pairs in arrays.values() for pair in pairs]


# ------------------------------------------------------------------------------------------------- properties


def test_there_are_as_many_scenes_as_stated_and_all_differ(scenes: Path, every: list) -> None:
    assert scenes.name == f"scenes-{module.VERSION}" and NUM_SCENES == {"train": 40, "test": 12}
    for kind in ("x", "y"):
        names = [sorted(file.name for file in (scenes / split / kind).iterdir()) for split in NUM_SCENES]
        assert [len(of_split) for of_split in names] == [40, 12]
        assert names[0] + names[1] == [f"scene_{number:03d}.npy" for number in range(52)]
    assert len({image.tobytes() for image, _ in every}) == 52
    for image, mask in every:
        assert (image.shape, image.dtype) == ((module.SIZE, module.SIZE, 12), np.uint16)
        assert (mask.shape, mask.dtype) == ((module.SIZE, module.SIZE), np.uint8)
        assert mask.max() < len(CLASS_NAMES) and image.max() < 20_000


@SPLITS
def test_every_class_covers_a_good_part_and_some_scenes_have_a_border(arrays: Arrays, split: str) -> None:
    counts = np.bincount(np.concatenate([mask.ravel() for _, mask in arrays[split]]), minlength=5)
    assert (counts / counts.sum() > 0.03).all() and (counts / counts.sum() < 0.6).all()
    missing = [(image == NODATA).all(-1) for image, _ in arrays[split]]
    assert all(
        np.array_equal(one, (image == NODATA).any(-1))
        for one, (image, _) in zip(missing, arrays[split], strict=True)
    )
    bordered = [one.mean() for one in missing if one.any()]
    assert 0.05 < len(bordered) / len(missing) < 0.6 and 0 < max(bordered) < 0.5


def test_spectra_are_plausible(every: list) -> None:
    """Plants are dark in red and bright in near infrared, water is dark there, clouds are bright."""

    def mean_spectrum(label: int) -> np.ndarray:
        pixels = [image[(mask == label) & (image > 0).all(-1)] for image, mask in every]
        return np.concatenate(pixels).mean(0) / 10_000

    assert all(
        len(spectrum) == len(CHANNEL_NAMES) == len(module.BLOCK_PIXELS) == 12
        for spectrum in module.SPECTRA.values()
    )
    red, near_infrared, short_wave = (CHANNEL_NAMES.index(name) for name in ("B04", "B08", "B12"))
    forest, water, cloud = (mean_spectrum(label) for label in (module.FOREST, module.WATER, module.CLOUD))
    assert forest[near_infrared] > 3 * forest[red]
    assert water[near_infrared] < water[red] and water[short_wave] < 0.06
    assert (cloud > forest).all() and cloud[:4].min() > 0.25


def test_coarse_bands_are_blurred_and_all_bands_noisy(every: list) -> None:
    inside = [image[:96, :96].astype(int) for image, _ in every if (image > 0).all()]

    def roughness(band: str) -> float:
        number = CHANNEL_NAMES.index(band)
        return float(np.mean([np.abs(np.diff(image[..., number], axis=0)).mean() for image in inside]))

    assert roughness("B01") < 0.75 * roughness("B02") and roughness("B8A") < 0.75 * roughness("B08")
    assert roughness("B01") > 20


def test_color_says_something_about_a_pixel_but_not_all(arrays: Arrays) -> None:
    def pixels_of(split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        kept = [(image > 0).all(-1) for image, _ in arrays[split]]
        x, y = (
            np.concatenate([pair[part][keep] for pair, keep in zip(arrays[split], kept, strict=True)])
            for part in (0, 1)
        )
        chosen = np.random.default_rng(0).choice(len(x), number, replace=False)
        return x[chosen], y[chosen]

    classifier = HistGradientBoostingClassifier(max_iter=100, random_state=0)
    classifier.fit(*pixels_of("train", 40_000))
    x, y = pixels_of("test", 30_000)
    assert 0.5 < f1_score(y, classifier.predict(x), average="macro") < 0.88


# --------------------------------------------------------------------------------------------------- equality

# Of version 0.1: records of it are trained again, and must end with the same weights.
FIRST_SCENES = "662b23fa4066bdf291355ab9173273737c4e708db57278607adf17b24830919a"
HASH = f"""
import hashlib
from {module.__name__} import make_scene
content = hashlib.sha256()
for number in (0, 1, 2, 51):
    for array in make_scene(number):
        content.update(array.tobytes())
print(content.hexdigest())
"""
OLDER_CPU = {"NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX X86_V4", "PYTHONHASHSEED": "7"}


def test_scenes_are_the_same_bytes_in_another_process(arrays: Arrays, run_python: Any) -> None:
    content = hashlib.sha256()
    for pair in (*arrays["train"][:3], arrays["test"][11]):
        for array in pair:
            content.update(array.tobytes())
    for environment in ({}, OLDER_CPU):
        assert run_python(HASH, **environment).strip() == content.hexdigest()
    assert content.hexdigest() == FIRST_SCENES


def test_a_scene_leaves_global_randomness_alone_and_may_have_another_size() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    for size in (24, 61, 256):
        image, mask = make_scene(3, size)
        assert image.shape == (size, size, 12) and mask.shape == (size, size)
    assert np.random.get_state()[1].tolist() == before


# ---------------------------------------------------------------------------------------------------- writing


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_SCENES", {"train": 3, "test": 2})


def folders_in(path: Path) -> list[str]:
    return [one.name for one in path.iterdir() if one.is_dir()]


@pytest.mark.usefixtures("few")
def test_scenes_are_written_once_with_a_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def content() -> dict[str, tuple[bytes, int]]:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}

    folder = make_scenes(tmp_path / "new" / "data")
    before = content()
    assert make_scenes(str(tmp_path / "new" / "data")) == folder and content() == before and len(before) == 11
    about = json.loads((folder / "scenes.json").read_text())
    assert about == {"version": 1, "classes": [*CLASS_NAMES], "channels": [*CHANNEL_NAMES], "nodata": 0}
    if os.name == "posix" and os.geteuid() != 0:  # root may write everywhere
        folder.parent.chmod(0o500)
        assert make_scenes(folder.parent) == folder
        folder.parent.chmod(0o700)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    other = make_scenes(tmp_path / "new" / "data")
    first = [np.load(one / "train" / "x" / "scene_000.npy") for one in (folder, other)]
    assert folder != other and not np.array_equal(*first)


@pytest.mark.usefixtures("few")
def test_scenes_appear_all_at_once_and_a_maker_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return make_scene(number)

    def replace(source: Path, target: Path) -> None:
        assert source.parent == tmp_path and target == tmp_path / "scenes-1"
        assert not target.exists() and len(list(source.rglob("*.npy"))) == 10
        raise OSError("stopped")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "make_scene", fail)
        make_scenes(tmp_path)
    assert folders_in(tmp_path) == []
    with monkeypatch.context() as patch, pytest.raises(OSError, match="stopped"):
        patch.setattr(module.os, "replace", replace)
        make_scenes(tmp_path)
    assert folders_in(tmp_path) == []


MAKE = f"""
import sys
from {module.__name__} import make_scenes
scenes = sys.modules[make_scenes.__module__]
scenes.NUM_SCENES = {{"train": int(sys.argv[2]), "test": 2}}
print("ready", flush=True)
sys.stdin.readline()
print(make_scenes(sys.argv[1]))
"""


@pytest.fixture
def start_maker(tmp_path: Path) -> Callable[[int], subprocess.Popen]:
    """Start a process that waits for a line, and then makes so many scenes for training."""

    def start(number: int) -> subprocess.Popen:
        command = [sys.executable, "-c", MAKE, str(tmp_path), str(number)]
        options: dict[str, Any] = {"cwd": Path(dida_tools.__file__).parents[1], "text": True}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)

    return start


def go(*makers: Any) -> None:
    assert all(maker.stdout.readline() == "ready\n" for maker in makers)
    for maker in makers:
        maker.stdin.write("go\n")
        maker.stdin.flush()


@pytest.mark.usefixtures("few")
def test_makers_write_once_together_and_a_killed_one_leaves_nothing(tmp_path: Path, start_maker: Any) -> None:
    makers = [start_maker(4), start_maker(4)]
    killed = start_maker(1000)
    go(killed)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.npy"))) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "scenes-1").exists()
    go(*makers)
    folders = [Path(maker.communicate()[0].strip()) for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0] and folders == [tmp_path / "scenes-1"] * 2
    assert len(list(folders[0].rglob("*.npy"))) == 12 and folders_in(tmp_path) == ["scenes-1"]
    assert np.array_equal(np.load(folders[0] / "test" / "x" / "scene_005.npy"), make_scene(5)[0])


# ---------------------------------------------------------------------------------------------------- dataset


@SPLITS
def test_the_dataset_passes_its_own_check(scenes: Path, split: str) -> None:
    dataset = SceneDataset(split, scenes.parent)
    dataset.check(num_classes=5)
    contract = dataset.contract()
    assert (len(dataset), contract.channels, contract.dtype, contract.nodata) == (
        NUM_SCENES[split],
        12,
        "uint16",
        0,
    )
    assert (contract.channel_names, contract.class_names) == (CHANNEL_NAMES, CLASS_NAMES)


def test_borders_are_ignored_and_classes_can_be_merged(scenes: Path, arrays: Arrays) -> None:
    dataset = SceneDataset("test", scenes.parent).for_evaluation()
    for (image, _), (x, y) in zip(arrays["test"], dataset, strict=True):
        missing = (image == NODATA).all(-1)
        assert np.array_equal(y.numpy() == 255, missing) and (x.numpy()[:, missing] == 0).all()
    merged = SceneDataset(
        "test", scenes.parent, mask_values={label: int(label == module.WATER) for label in range(5)}
    )
    merged.check(num_classes=2)
    assert all(set(y.unique().tolist()) <= {0, 1, 255} for _, y in merged)


def test_scenes_lie_in_data_dir_unless_another_folder_is_given(
    scenes: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setitem(global_config, "DATA_DIR", str(scenes.parent))
    dataset = SceneDataset("test")
    assert dataset.images[0].parent == scenes / "test" / "x" and dataset.arguments["data_dir"] is None
    with pytest.raises(ValueError, match="split is 'validation': choose one of train, test"):
        SceneDataset("validation", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_dataset_can_be_built_again_from_its_arguments(scenes: Path) -> None:
    options: dict[str, Any] = {"crop": 32, "crops_per_image": 2, "foreground": 0.5, "augment": STANDARD}
    first = SceneDataset("train", scenes.parent, **options)
    for dataset in (first, first.with_mask_values({module.CLOUD: 255})):
        again = SceneDataset(**dataset.arguments)
        samples = []
        for built in (dataset, again):
            torch.manual_seed(0)
            samples.append(built[3])
        assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))
        assert again.arguments == dataset.arguments
