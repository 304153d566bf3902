"""Fixtures for all tests: a small dataset that can be learned, and a config that learns it in a second."""

import functools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from dida_core.report import pictures as pictures_module
from dida_core.runs import environment
from dida_core.runs import record as record_module
from hypothesis import settings
from tqdm import tqdm

from dida_tools.config import config as config_module
from dida_tools.config.config import make_global_config
from dida_tools.models import UNET
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.transforms import STANDARD
from dida_tools.utils.loss import f1, multi_class_dice_ce_sum, precision, recall

# Two test processes with two threads each would wait for one another most of the time.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test fails because of the time that something takes.
settings.register_profile("without-deadline", deadline=None)
settings.load_profile("without-deadline")
# tqdm's lock is shared with forked processes: one that is killed while it writes a line would keep it for
# ever, and this process and all others that it forks would wait for it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run", default=None, help="run that tests/test_models tests: a name, latest, best")
    parser.addoption("--weights", default=None, help="weights file that tests/test_models tests")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--run") is None and config.getoption("--weights") is None:
        # Folders of the user's own must not get what tests write.
        for name in ("ROOT_PATH", "LOG_DIR", "WEIGHT_DIR", "DATA_DIR"):
            os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders whose modules take long come first, so that no test process waits for another at the end."""
    tests, first = Path(__file__).parent, ("training", "scripts", "search", "prediction", "test_models")
    order = {folder: number for number, folder in enumerate(first)}
    items.sort(key=lambda item: order.get(item.path.relative_to(tests.parent).parts[1], len(first)))


def write_pairs(
    folder: Path, num_images: int, seed: int, size: int = 32, channels: int = 3, contrast: float = 70
) -> Path:
    """Images in uint8 whose bright blobs are class 1, and bright blobs in the last channel alone class 2."""
    rng = np.random.default_rng(seed)
    for kind in ("x", "y"):
        (folder / kind).mkdir(parents=True)
    y, x = np.mgrid[0:size, 0:size]
    for number in range(num_images):
        image = rng.normal(80, 12, (size, size, channels))
        mask = np.zeros((size, size), np.uint8)
        for blob in range(3):
            top, left = rng.integers(0, size, 2)
            inside = (y - top) ** 2 + (x - left) ** 2 < (size / 5) ** 2
            label = 1 + blob % 2
            mask[inside] = label
            image[inside] = 80
            image[inside, -1 if label == 2 else 0] += contrast
            image[inside] += rng.normal(0, 12, (int(inside.sum()), channels))
        np.save(folder / "x" / f"image_{number:02d}.npy", np.clip(image, 0, 255).astype(np.uint8))
        np.save(folder / "y" / f"image_{number:02d}.npy", mask)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_classes() -> Iterator[None]:
    """Models and datasets of the tests may be restored from records, too."""
    tests = [name for name in sys.modules if name.startswith("tests")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_module, "ALLOWED_ROOTS", (*config_module.ALLOWED_ROOTS, *tests))
        yield


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/{x,y} with 10 and test/{x,y} with 4 pairs, three classes, 32 x 32 pixels, 3 channels."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train", 10, seed=1)
    write_pairs(folder / "test", 4, seed=2)
    return folder


@pytest.fixture(scope="session")
def faint_pairs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise, but so faint that a pixel alone does not tell its class."""
    folder = tmp_path_factory.mktemp("faint")
    write_pairs(folder / "train", 12, seed=1, contrast=30)
    write_pairs(folder / "test", 4, seed=2, contrast=30)
    return folder


@pytest.fixture
def datasets(pairs_dir: Path) -> tuple[NpyDataset, NpyDataset]:
    """The training set with crops and augmentation, and the test set."""
    train = NpyDataset(
        pairs_dir / "train" / "x", pairs_dir / "train" / "y", crop=16, crops_per_image=2, augment=STANDARD
    )
    return train, NpyDataset(pairs_dir / "test" / "x", pairs_dir / "test" / "y")


@pytest.fixture
def global_config(tmp_path: Path) -> dict[str, str]:
    """All folders below the test's own."""
    return make_global_config(tmp_path / "project")


@functools.cache
def describe_once(root: Path, device: torch.device) -> dict:
    return environment.describe_environment(root, device) | {"unrecorded_files": []}


@pytest.fixture(autouse=True)
def _as_committed() -> Iterator[None]:
    """What is not committed while tests run decides no test."""
    describe, described = environment.describe_environment, {"unrecorded_files": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_module, "describe_environment", lambda *about: describe(*about) | described)
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small trainings without what takes most of their time: picture and list of packages."""
    monkeypatch.setattr(pictures_module, "save_picture", lambda path, *_: path.write_bytes(b"picture"))
    monkeypatch.setattr(record_module, "describe_environment", lambda *about: describe_once(*about[:2]))


@pytest.fixture
def tiny_config() -> dict:
    """A U-Net of a few thousand parameters: 4 batches an epoch with the datasets above."""
    return {
        "SESSION_NAME": "tiny",
        "MODEL": UNET,
        "MODEL_CONFIG": {"ch_in": 3, "ch_out": 3, "bulk_ch": 4, "n_recursions": 1, "dropout": 0.1},
        "DATA_LOADER_CONFIG": {"batch_size": 4, "shuffle": True},
        "OPTIMIZER": torch.optim.AdamW,
        "OPTIMIZER_CONFIG": {"lr": 1e-2},
        "EPOCHS": 2,
        "LOSS": multi_class_dice_ce_sum,
        "METRICS": {"f1": f1, "precision": precision, "recall": recall},
        "MONITOR": "max f1",
        "DEVICE": "cpu",
        "PRECISION": "fp32",
    }
