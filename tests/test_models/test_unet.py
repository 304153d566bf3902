"""
The suite for a model, new or trained. checks.py has its checks, and what each guards against.

    python -m pytest tests/test_models -n 0                 the config below: an untrained U-Net
    python -m pytest tests/test_models -n 0 --run NAME      a run, by its record; or latest, best
    python -m pytest tests/test_models -n 0 --weights weights/NAME/last-9.pt

Your own model: copy this file, and edit the config.
"""

from functools import partial

import torch
from torch import nn

from dida_tools.models import UNET
from dida_tools.utils.loss import multi_class_dice_ce_sum

from tests.test_models.checks import *  # noqa: F403

DEFAULT_WEIGHTS = None  # <- a weights file, such as weights/NAME/best.pt; None tests a new model
INPUT_DIM = (2, 12, 64, 64)
OUTPUT_DIM = (2, 5, 64, 64)
TASK = "multi-class"  # or multi-label, values
LOSS = multi_class_dice_ce_sum
MODEL = UNET  # <- your model here
MODEL_CONFIG = {"ch_in": 12, "ch_out": 5, "bulk_ch": 16, "n_recursions": 3, "norm": partial(nn.GroupNorm, 8)}
OPTIMIZER = torch.optim.AdamW
OPTIMIZER_CONFIG = {"lr": 1e-2}
DEVICE = "auto"
MULTIPLE = 1  # <- of which heights and widths of your model's images have to be multiples
BOUNDS: dict[str, float] = {}  # <- other bounds than those of subject.py, such as {"flips": 0.1}
