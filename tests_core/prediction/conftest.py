"""Fixtures for the tests of prediction: a config with an untrained model, and one trained run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dida_core.data.contract import DataContract
from dida_core.storage.weights import load_weights, save_weights

from dida_tools.config.config import make_global_config
from dida_tools.models import UNET
from dida_tools.training.pytorch_training import train
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.loss import multi_class_dice_ce_sum
from dida_tools.utils.torchutils import load_model

from tests_core.prediction.samples import Net, make_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A predict_config of Net."""
    monkeypatch.setattr(Net, "calls", 0)
    return make_config(tmp_path, Net())


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, pairs_dir: Path) -> SimpleNamespace:
    """A run, and its model, whose contract has everything: statistics, nodata, a temperature, names."""
    places = make_global_config(tmp_path_factory.mktemp("project"))
    model_config = {"ch_in": 3, "ch_out": 3, "bulk_ch": 4, "n_recursions": 2}
    config = {"SESSION_NAME": "exported", "MODEL": UNET, "MODEL_CONFIG": model_config, "EPOCHS": 2}
    config |= {"OPTIMIZER": torch.optim.AdamW, "OPTIMIZER_CONFIG": {"lr": 1e-2}, "DEVICE": "cpu"}
    config |= {"LOSS": multi_class_dice_ce_sum, "DATA_LOADER_CONFIG": {"batch_size": 4}, "PRECISION": "fp32"}
    splits = [NpyDataset(pairs_dir / split / "x", pairs_dir / split / "y") for split in ("train", "test")]
    with pytest.MonkeyPatch.context() as patch:  # these take most of the time
        patch.setattr("dida_core.runs.record.describe_environment", lambda *_: {})
        patch.setattr("dida_core.report.pictures.save_picture", lambda path, *_: path.write_bytes(b""))
        name = train(*splits, training_config=config, global_config=places).name
    weights = Path(places["WEIGHT_DIR"]) / name / "best.pt"
    stored = load_weights(weights)
    own = {"nodata": 0, "temperature": 1.7, "class_names": ("ground", "tree", "house")}
    contract = DataContract.from_dict(stored["contract"] | own)
    save_weights(weights, stored | {"contract": contract.to_dict()})
    run = SimpleNamespace(global_config=places, name=name, weights=weights, contract=contract)
    run.model, run.model_config = load_model(weights, UNET, model_config), model_config
    return run
