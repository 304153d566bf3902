"""The fixtures of the project's own tests, and one trained run for all that need no more than that."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dida_core.data.contract import DataContract
from dida_core.storage.weights import load_weights
from torch import nn

from dida_tools.config.config import make_global_config
from dida_tools.models import UNET
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.transforms import GEOMETRY
from dida_tools.utils.loss import f1, iou, multi_class_dice_ce_sum
from dida_tools.utils.torchutils import load_model

from tests.conftest import (
    _as_committed,
    datasets,
    faint_pairs_dir,
    global_config,
    own_classes,
    pairs_dir,
    quick,
    tiny_config,
)
from tests.helpers import FIRST, load_routine

__all__ = ["_as_committed", "datasets", "faint_pairs_dir", "global_config", "own_classes", "pairs_dir"]
__all__ += ["quick", "tiny_config"]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, faint_pairs_dir: Path) -> SimpleNamespace:
    """A small U-Net that has learned what a single pixel does not tell, with all that its run consists of."""
    root, sets = tmp_path_factory.mktemp("small_run"), []
    for split, options in {"train": {"augment": GEOMETRY}, "test": {}}.items():
        x, y = faint_pairs_dir / split / "x", faint_pairs_dir / split / "y"
        sets.append(NpyDataset(x, y, nodata=0, class_names=("ground", "left", "right"), **options))
    norm = {"bulk_ch": 8, "n_recursions": 2, "norm": partial(nn.GroupNorm, 4)}
    config = {"SESSION_NAME": "small", "MODEL": UNET, "MODEL_CONFIG": {"ch_in": 3, "ch_out": 3} | norm}
    config |= {"OPTIMIZER": torch.optim.AdamW, "OPTIMIZER_CONFIG": {"lr": 1e-2}, "EPOCHS": 10}
    config |= {"LOSS": multi_class_dice_ce_sum, "DATA_LOADER_CONFIG": {"batch_size": 4}, "DEVICE": "cpu"}
    config |= {"METRICS": {"f1": f1, "iou": iou}, "MONITOR": "max f1", "PRECISION": "fp32"}
    with pytest.MonkeyPatch.context() as patch:  # these take most of the time
        patch.setattr("dida_core.runs.record.describe_environment", lambda *_: {})
        patch.setattr("dida_core.report.pictures.save_picture", lambda path, *_: path.write_bytes(b""))
        name = load_routine(FIRST).train(*sets, config, make_global_config(root)).name
    weights = root / "weights" / name / "best.pt"
    run = SimpleNamespace(name=name, root=root, global_config=make_global_config(root), weights=weights)
    run.contract = DataContract.from_dict(load_weights(weights)["contract"])
    run.config, run.model = config, load_model(weights, UNET, config["MODEL_CONFIG"])
    return run
