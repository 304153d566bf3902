"""
Make the runs of version 0.1 that tests_core/runs/test_old_runs.py reads: records, journals, weights.

Version 0.1 is commit bc95658. In a checkout of it, with its environment:

    python make_runs.py FOLDER

FOLDER then holds data/, logs/ and weights/, with paths relative to it.
"""

import os
import platform
import shutil
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(sys.argv[1]).resolve()
sys.path.insert(0, os.getcwd())
socket.gethostname = lambda: "host"
platform.platform = lambda *_, **__: "Linux"
os.environ["ROOT_PATH"] = str(ROOT)
sys.argv = ["train.py"]


def main() -> None:
    """Make data, then runs."""
    ROOT.mkdir(parents=True)
    os.chdir(ROOT)
    rng = np.random.default_rng(0)
    for split, number in (("train", 5), ("test", 2)):
        for kind in ("x", "y"):
            Path("data", split, kind).mkdir(parents=True)
        for index in range(number):
            mask = rng.integers(0, 3, (4, 4), np.uint8).repeat(4, 0).repeat(4, 1)
            image = rng.integers(0, 80, (16, 16, 3), np.uint8) + 40 * mask[..., None]
            np.save(Path("data", split, "x", f"{index}.npy"), image)
            np.save(Path("data", split, "y", f"{index}.npy"), np.where(mask == 2, 200, mask).astype(np.uint8))

    import torch
    from torch.nn import CrossEntropyLoss, GroupNorm
    from torch.optim.lr_scheduler import OneCycleLR, StepLR

    from dida_tools.config.config import make_global_config
    from dida_tools.models import UNET
    from dida_tools.training import fastai_training, ignite_training, pytorch_training
    from dida_tools.utils.data import NpyDataset
    from dida_tools.utils.data.scenes import SceneDataset
    from dida_tools.utils.data.transforms import STANDARD
    from dida_tools.utils.loss import f1, iou, multi_class_dice_ce_sum

    torch.set_num_threads(1)
    config = {
        "MODEL": UNET,
        "MODEL_CONFIG": {"ch_in": 3, "ch_out": 3, "bulk_ch": 2, "n_recursions": 1, "dropout": 0.1},
        "DATASET": NpyDataset,
        "DATASET_CONFIG": {
            "train": {
                "x_dir": "data/train/x", "y_dir": "data/train/y", "crop": 8, "crops_per_image": 4,
                "augment": STANDARD,
                "class_names": ("none", "first", "second"), "mask_values": {200: 2},
            },
            "test": {"x_dir": "data/test/x", "y_dir": "data/test/y", "mask_values": {200: 2}},
        },
        "DATA_LOADER_CONFIG": {"batch_size": 4, "shuffle": True},
        "OPTIMIZER": torch.optim.AdamW,
        "OPTIMIZER_CONFIG": {"lr": 1e-2, "betas": (0.9, 0.99)},
        "SCHEDULER": OneCycleLR,
        "EPOCHS": 4,
        "LOSS": multi_class_dice_ce_sum,
        "METRICS": {"f1": f1, "iou": iou},
        "MONITOR": "max f1",
        "NORMALISE": True,
        "DEVICE": "cpu",
        "PRECISION": "fp32",
        "CHECKPOINT_SECONDS": 0,
        "__COMMENT": "made by version 0.1",
    }  # fmt: skip
    own_loss = {"LOSS": CrossEntropyLoss, "LOSS_CONFIG": {"ignore_index": 255, "label_smoothing": 0.1}}
    norm = {"MODEL_CONFIG": config["MODEL_CONFIG"] | {"norm": partial(GroupNorm, 2), "activ": torch.nn.ReLU}}
    scenes = {
        "DATASET": SceneDataset,
        "DATASET_CONFIG": {
            "train": {"part": "train", "crop": 16, "augment": STANDARD},
            "test": {"part": "test"},
        },
        "MODEL_CONFIG": config["MODEL_CONFIG"] | {"ch_in": 12, "ch_out": 5},
    }

    def train(routine, name: str, **changes) -> None:
        one = config | {"SESSION_NAME": name, "DATE": "2026-11-01_12-00-00"} | changes
        sets = [one["DATASET"](**one["DATASET_CONFIG"][split]) for split in ("train", "test")]
        routine.train(*sets, one, make_global_config(ROOT))

    def kill_after_two_epochs(run) -> None:
        if run.state.epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    train(pytorch_training, "finished", EMA=0.8, ACCUMULATE=2, CLIP_NORM=1.0)
    train(
        ignite_training, "own loss", SCHEDULER=StepLR, SCHEDULER_CONFIG={"step_size": 3}, **own_loss, **norm
    )
    train(pytorch_training, "scenes", EPOCHS=1, **scenes)
    for routine in (pytorch_training, fastai_training):
        name = f"killed-{routine.__name__.rpartition('.')[2]}"
        if os.fork() == 0:
            train(routine, name, AFTER_EPOCH=kill_after_two_epochs)
        os.wait()
        train(routine, name.replace("killed", "whole"))  # how the killed one would have ended
    shutil.rmtree(ROOT / "data" / "scenes-1")
    for folder in ROOT.glob("logs/*/tensorboard"):
        shutil.rmtree(folder)
    for file in [*ROOT.glob("logs/*/picture.png"), *ROOT.rglob(".*lock"), ROOT / "logs" / "data_facts.json"]:
        file.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
