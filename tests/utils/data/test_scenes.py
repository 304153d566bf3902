"""The scenes are the same bytes everywhere, neither trivial nor impossible, and written all at once."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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

from tests.helpers import ROOT, Child, wait_until

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


# ------------------------------------------------------------------------------------------------- properties


def test_there_are_as_many_scenes_as_stated_and_all_differ(scenes: Path, arrays: Arrays) -> None:
    every = [pair for pairs in arrays.values() for pair in pairs]
    assert scenes.name == f"scenes-{module.VERSION}" and NUM_SCENES == {"train": 40, "test": 12}
    assert len({image.tobytes() for image, _ in every}) == 52
    for image, mask in every:
        assert (image.shape, image.dtype) == ((module.SIZE, module.SIZE, 12), np.uint16)
        assert (mask.shape, mask.dtype) == ((module.SIZE, module.SIZE), np.uint8)
        assert mask.max() < len(CLASS_NAMES) and image.max() < 20_000
    about = {"version": 1, "classes": [*CLASS_NAMES], "channels": [*CHANNEL_NAMES], "nodata": 0}
    assert json.loads((scenes / "scenes.json").read_text()) == about


@SPLITS
def test_every_class_covers_a_good_part_and_some_scenes_have_a_border(arrays: Arrays, split: str) -> None:
    counts = np.bincount(np.concatenate([mask.ravel() for _, mask in arrays[split]]), minlength=5)
    assert (counts / counts.sum() > 0.03).all() and (counts / counts.sum() < 0.6).all()
    missing = [image == NODATA for image, _ in arrays[split]]
    assert all(np.array_equal(one.all(-1), one.any(-1)) for one in missing)
    bordered = [one.mean() for one in missing if one.any()]
    assert 0.05 < len(bordered) / len(missing) < 0.6 and 0 < max(bordered) < 0.5


@pytest.mark.slow
def test_color_says_something_about_a_pixel_but_not_all(arrays: Arrays) -> None:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import f1_score

    def pixels_of(split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        x = np.concatenate([image.reshape(-1, 12) for image, _ in arrays[split]])
        y = np.concatenate([mask.ravel() for _, mask in arrays[split]])
        chosen = np.random.default_rng(0).choice(np.flatnonzero((x > 0).all(1)), number, replace=False)
        return x[chosen], y[chosen]

    classifier = HistGradientBoostingClassifier(max_iter=100, random_state=0)
    classifier.fit(*pixels_of("train", 40_000))
    x, y = pixels_of("test", 30_000)
    assert 0.5 < f1_score(y, classifier.predict(x), average="macro") < 0.88


# --------------------------------------------------------------------------------------------------- equality

# Of version 0.1: records of it are trained again, and must end with the same weights.
FIRST_SCENES = "662b23fa4066bdf291355ab9173273737c4e708db57278607adf17b24830919a"


def test_scenes_are_the_same_bytes_as_ever(arrays: Arrays) -> None:
    content = hashlib.sha256()
    for array in sum((*arrays["train"][:3], arrays["test"][11]), ()):
        content.update(array.tobytes())
    assert content.hexdigest() == FIRST_SCENES
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    image, mask = make_scene(3, 61)  # it leaves global randomness alone, and may have another size
    assert image.shape == (61, 61, 12) and mask.shape == (61, 61)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.slow
def test_scenes_are_the_same_bytes_on_an_older_cpu() -> None:
    code = f"""if True:
        import hashlib
        from {module.__name__} import make_scene
        content = [array.tobytes() for number in (0, 1, 2, 51) for array in make_scene(number)]
        print(hashlib.sha256(b"".join(content)).hexdigest())"""
    older = {"NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX X86_V4", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    output = subprocess.check_output(command, text=True, cwd=ROOT, env=os.environ | older)
    assert output.strip() == FIRST_SCENES


# ---------------------------------------------------------------------------------------------------- writing


def folders_in(path: Path) -> list[str]:
    return [one.name for one in path.iterdir() if one.is_dir()]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(module, "NUM_SCENES", {"train": 3, "test": 2})
    monkeypatch.setattr(module, "make_scene", lambda number: make_scene(number, 24))
    return monkeypatch


def test_scenes_are_written_once_and_appear_all_at_once(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return make_scene(number, 24)

    with small.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "make_scene", fail)
        make_scenes(tmp_path)
    assert folders_in(tmp_path) == []
    folder = make_scenes(tmp_path / "new" / "data")
    names = [sorted(file.name for file in (folder / split / "y").iterdir()) for split in NUM_SCENES]
    assert names == [[f"scene_{n:03d}.npy" for n in range(3)], ["scene_003.npy", "scene_004.npy"]]
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert make_scenes(str(tmp_path / "new" / "data")) == folder
    assert times == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_makers_write_once_together_and_a_killed_one_leaves_nothing(tmp_path: Path, small: Any) -> None:
    data = tmp_path / "data"

    def make() -> None:
        print(make_scenes(data))

    small.setattr(module, "NUM_SCENES", {"train": 100_000, "test": 2})
    killed = Child(make, tmp_path / "killed")
    wait_until(lambda: len(list(data.rglob("*.npy"))) >= 5)
    killed.kill()
    assert not (data / "scenes-1").exists()
    small.setattr(module, "NUM_SCENES", {"train": 40, "test": 2})
    makers = [Child(make, tmp_path / f"maker {number}") for number in range(3)]
    assert all(maker.wait() and maker.code == 0 for maker in makers)
    assert [maker.said() for maker in makers] == [f"{data / 'scenes-1'}\n"] * 3
    assert len(list(data.rglob("*.npy"))) == 84 and folders_in(data) == ["scenes-1"]


# ---------------------------------------------------------------------------------------------------- dataset


def test_the_dataset_passes_its_own_check_and_ignores_borders(scenes: Path, arrays: Arrays) -> None:
    dataset = SceneDataset("test", scenes.parent).for_evaluation()
    dataset.check(num_classes=5, training=False)
    contract = dataset.contract()
    assert (len(dataset), contract.channels, contract.dtype, contract.nodata) == (12, 12, "uint16", 0)
    assert (contract.channel_names, contract.class_names) == (CHANNEL_NAMES, CLASS_NAMES)
    for (image, _), (x, y) in zip(arrays["test"], dataset, strict=True):
        missing = (image == NODATA).all(-1)
        assert np.array_equal(y.numpy() == 255, missing) and (x.numpy()[:, missing] == 0).all()
    merged = SceneDataset("test", scenes.parent, mask_values={n: int(n == module.WATER) for n in range(5)})
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
    first = SceneDataset("test", scenes.parent, **options)
    for dataset in (first, first.with_mask_values({module.CLOUD: 255})):
        again = SceneDataset(**dataset.arguments)
        samples = []
        for built in (dataset, again):
            torch.manual_seed(0)
            samples.append(built[3])
        assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))
        assert again.arguments == dataset.arguments
