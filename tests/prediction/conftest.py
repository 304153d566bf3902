"""Fixtures for the tests of prediction: a config with an untrained model, and one trained run."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dida_tools.config.config import make_global_config
from dida_tools.models import UNET
from dida_tools.training.pytorch_training import train
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.contract import DataContract
from dida_tools.utils.loss import multi_class_dice_ce_sum
from dida_tools.utils.torchutils import load_model
from dida_tools.utils.weights import load_weights, save_weights
from tests.prediction.samples import Net, make_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A predict_config of Net."""
    monkeypatch.setattr(Net, "calls", 0)
    return make_config(tmp_path, Net())


@dataclasses.dataclass
class Run:
    """A run, and its model."""

    global_config: dict[str, str]
    name: str
    weights: Path
    model: nn.Module
    model_config: dict[str, Any]
    contract: DataContract


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, pairs_dir: Path) -> Run:
    """A run whose contract has everything: statistics, nodata, a temperature, names and thresholds."""
    places = make_global_config(tmp_path_factory.mktemp("project"))
    model_config = {"ch_in": 3, "ch_out": 3, "bulk_ch": 4, "n_recursions": 2}
    config = {
        "SESSION_NAME": "exported", "MODEL": UNET, "MODEL_CONFIG": model_config, "LOSS": multi_class_dice_ce_sum,
        "OPTIMIZER": torch.optim.AdamW, "OPTIMIZER_CONFIG": {"lr": 1e-2}, "EPOCHS": 2, "MONITOR": "min loss",
        "DATA_LOADER_CONFIG": {"batch_size": 4}, "DEVICE": "cpu", "PRECISION": "fp32", "METRICS": {},
    }  # fmt: skip
    splits = [NpyDataset(pairs_dir / split / "x", pairs_dir / split / "y") for split in ("train", "test")]
    name = train(*splits, training_config=config, global_config=places).name
    weights = Path(places["WEIGHT_DIR"]) / name / "best.pt"
    stored = load_weights(weights)
    contract = dataclasses.replace(
        DataContract.from_dict(stored["contract"]),
        nodata=0,
        temperature=1.7,
        class_names=("ground", "tree", "house"),
    )
    save_weights(weights, stored | {"contract": contract.to_dict()})
    model = load_model(weights, UNET, model_config)
    return Run(places, name, weights, model, model_config, contract)
