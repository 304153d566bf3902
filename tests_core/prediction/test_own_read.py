"""A custom dataset's own `read`: its model predicts the very files that it was trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.data.images import DataError
from dida_core.prediction.predict import predict_run
from dida_core.storage.weights import load_weights
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from dida_tools.config import config as config_module
from dida_tools.utils.torchutils import load_model

from tests.helpers import FIRST, load_routine

pytestmark = pytest.mark.usefixtures("quick")


CONV = {"in_channels": 3, "out_channels": 1, "kernel_size": 1}


class Silent(Dataset):
    """Pictures as differences from gray, and where they are bright; it does not say how it reads."""

    def __init__(self, folder: str, number: int) -> None:
        self.files = sorted(Path(folder).glob("*.png"))[:number]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Reading.read(self.files[index])
        return image, (image[:1] > 0).float()


class Reading(Silent):
    @staticmethod
    def read(file: Path) -> Tensor:
        return (torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0) - 128) / 40


class Shrinking(Reading):
    @staticmethod
    def read(file: Path) -> Tensor:
        return Reading.read(file)[:, ::2]


class Failing(Reading):
    @staticmethod
    def read(file: Path, mode: str) -> Tensor:
        return Reading.read(file)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config_module, "ALLOWED_ROOTS", (__name__,))
    (tmp_path / "images").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def train(dataset: Any, folder: Path, tiny_config: dict, global_config: dict) -> Any:
    splits = {"train": {"folder": str(folder), "number": 6}, "test": {"folder": str(folder), "number": 2}}
    changes = {"MODEL": nn.Conv2d, "MODEL_CONFIG": CONV}
    changes |= {"DATASET": dataset, "DATASET_CONFIG": splits, "LOSS": nn.BCEWithLogitsLoss, "EPOCHS": 1}
    changes |= {"METRICS": {}, "MONITOR": "min loss"}
    sets = [dataset(**arguments) for arguments in splits.values()]
    return load_routine(FIRST).train(*sets, tiny_config | changes, global_config)


def test_the_files_of_training_are_predicted_as_their_samples(folder, tiny_config, global_config, tmp_path):
    result = train(Reading, folder, tiny_config, global_config)
    options = {"OUTPUT": "probabilities", "FORMAT": ".npy", "DEVICE": "cpu", "PRECISION": "fp32"}
    maps = predict_run(result.name, folder, tmp_path / "maps", global_config, **options)
    model = load_model(result.weights["best"], nn.Conv2d, CONV)
    temperature = load_weights(result.weights["best"])["contract"]["temperature"]
    for file, made in zip(sorted(folder.glob("*.png")), maps, strict=True):
        with torch.no_grad():
            wanted = (model(Reading.read(file)[None])[0] / temperature).sigmoid().movedim(0, -1)
        assert np.load(made).squeeze() == pytest.approx(wanted.squeeze().numpy(), abs=1e-6)


WITHOUT = "it is uint8, the model was trained on what its dataset made of files: give the class in DATASET"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Silent, WITHOUT),
        (Shrinking, "gives 6 x 16 pixels, the file 12 x 16"),
        (Failing, "read fails (TypeError"),
    ],
)
def test_what_cannot_be_read_so_is_refused_in_a_sentence(
    dataset, message, folder, tiny_config, global_config, tmp_path
):
    result = train(dataset, folder, tiny_config, global_config)
    with pytest.raises(DataError) as caught:
        predict_run(result.name, folder, tmp_path / "maps", global_config)
    assert message in str(caught.value) and not (tmp_path / "maps").exists()
