"""
The training config: what is trained and how, the same for every routine.

dida_core/config/keys.py has all keys with their defaults. Variants are functions beside the config.
"""

from functools import partial
from typing import Any

import torch
from dida_core.config.keys import copy_config
from torch.nn import ELU, GroupNorm
from torch.optim.lr_scheduler import OneCycleLR

from ..models.unet import UNET
from ..utils.data.scenes import SceneDataset
from ..utils.data.transforms import STANDARD
from ..utils.loss import f1, iou, multi_class_dice_ce_sum, precision, recall

# <- your keys here, each with its default, what it may hold and what it is for; see docs/config_keys.md:
# from dida_core.config.keys import KEYS
# from dida_core.config.kinds import NUMBER, Key
# KEYS["MY_WEIGHT"] = Key(0.5, NUMBER, "weight of my second loss", 0)

train_config: dict[str, Any] = {
    "SESSION_NAME": "training-run",
    "MODEL": UNET,  # <- your model here: any class of torch.nn.Module
    "MODEL_CONFIG": {
        "ch_in": 12,
        "ch_out": 5,
        "bulk_ch": 32,
        "n_recursions": 5,
        "dropout": 0.2,
        "activ": ELU,
        # Unlike BatchNorm, the same in training and evaluation, for any batch size.
        "norm": partial(GroupNorm, 8),
    },
    "DATASET": SceneDataset,  # <- your data here: NpyDataset, or any dataset of (input, target) pairs
    "DATASET_CONFIG": {
        "train": {
            "split": "train",
            "crop": 128,
            "crops_per_image": 4,
            "foreground": 0.3,
            "augment": STANDARD,
        },
        "test": {"split": "test"},
    },
    "DATA_LOADER_CONFIG": {"batch_size": 8, "shuffle": True, "pin_memory": True, "num_workers": 2},
    "OPTIMIZER": torch.optim.AdamW,
    "OPTIMIZER_CONFIG": {"lr": 1e-3, "weight_decay": 1e-2},
    "SCHEDULER": OneCycleLR,  # warms up to lr, then cools down to nearly nothing at the end of the last epoch
    "SCHEDULER_CONFIG": {"pct_start": 0.2},
    "CLIP_NORM": 1.0,
    "EPOCHS": 100,
    "LOSS": multi_class_dice_ce_sum,  # <- your loss here: a function of (prediction, target)
    "LOSS_CONFIG": {"batch": True},
    "METRICS": {"f1": f1, "precision": precision, "recall": recall, "iou": iou},
    "MONITOR": "max f1",
    "DEVICE": "auto",
    "LOGFILE": "experiments.csv",
    "__COMMENT": None,
}


def small(config: dict[str, Any] = train_config) -> dict[str, Any]:
    """Return a variant for laptops: 0.5 million parameters instead of 31, some minutes on two cores."""
    config = copy_config(config)
    config["MODEL_CONFIG"] |= {"bulk_ch": 16, "n_recursions": 3, "dropout": 0.0}
    config["DATASET_CONFIG"]["train"] |= {"crop": 96, "crops_per_image": 3}
    config["DATA_LOADER_CONFIG"] |= {"num_workers": 0}
    config["OPTIMIZER_CONFIG"] |= {"lr": 2e-3}
    config["EPOCHS"] = 40
    return config


# <- your variants here: functions that take a config, change some keys, and return it
VARIANTS = {"small": small}
