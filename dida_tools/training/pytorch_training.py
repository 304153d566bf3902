"""
Contains the raw PyTorch routine: the whole loop, to be read and modified.

Its config is below; variants of it are functions beside it. Keys, defaults and what they may hold: config/keys.py.
"""

from functools import partial
from typing import Any

import torch
from torch.nn import ELU, GroupNorm
from torch.optim.lr_scheduler import OneCycleLR

from ..config.config import global_config as default_global_config
from ..config.device import autocast
from ..config.keys import copy_config
from ..models.unet import UNET
from ..utils.data.scenes import SceneDataset
from ..utils.data.transforms import STANDARD
from ..utils.loss import f1, iou, multi_class_dice_ce_sum, precision, recall
from .determinism import seed_step
from .distributed import join_processes, parallel, rank
from .evaluation import evaluate, to_device
from .preparation import prepare
from .run import Result, start_run

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
        "norm": partial(
            GroupNorm, 8
        ),  # unlike BatchNorm, the same in training and evaluation, for any batch size
    },
    "DATASET": SceneDataset,  # <- your data here: NpyDataset, or any dataset of (input, target) pairs
    "DATASET_CONFIG": {
        "train": {"split": "train", "crop": 128, "crops_per_image": 4, "foreground": 0.3, "augment": STANDARD},
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
    """A variant for laptops: 0.5 million parameters instead of 31, some minutes on two cores."""
    config = copy_config(config)
    config["MODEL_CONFIG"] |= {"bulk_ch": 16, "n_recursions": 3, "dropout": 0.0}
    config["DATASET_CONFIG"]["train"] |= {"crop": 96, "crops_per_image": 3}
    config["DATA_LOADER_CONFIG"] |= {"num_workers": 0}
    config["OPTIMIZER_CONFIG"] |= {"lr": 2e-3}
    config["EPOCHS"] = 40
    return config


VARIANTS = {
    "small": small
}  # <- your variants here: functions that take a config, change some keys, and return it


@join_processes()  # those that torchrun has started
def train(
    train_dataset: Any,
    test_dataset: Any,
    training_config: dict[str, Any] = train_config,
    global_config: dict[str, str] = default_global_config,
    validation_dataset: Any = None,
) -> Result:
    """
    Trains a model, and leaves weights, log and tracker row.

    :param train_dataset: pairs (input, target); conventions for their shapes stand in utils/loss.py
    :param test_dataset: likewise, evaluated once at the end; None: no test
    :param training_config: what to train and how; read only
    :param global_config: where to write
    :param validation_dataset: what MONITOR selects by; None takes VALIDATION_FRACTION of the training set
    :raises ConfigError, DataError: before anything is written, with all problems
    """
    preparation = prepare(
        train_dataset, test_dataset, training_config, global_config, validation_dataset, __name__
    )
    config, device = preparation.config, preparation.device
    optimizer, scheduler = preparation.optimizer, preparation.scheduler
    loss_function, scaler, ema = preparation.loss_function, preparation.scaler, preparation.ema

    with start_run(preparation, global_config) as run:
        state, model = run.state, parallel(preparation.model, device)
        while state.epoch < config["EPOCHS"] and not state.stopped:
            model.train()
            for inputs, targets in run.batches:
                inputs, targets = to_device(inputs, device, config["CHANNELS_LAST"]), targets.to(device)
                seed_step(config["SEED"], run.batch_number, device, rank())
                with autocast(device, preparation.precision):
                    predictions = model(inputs)
                loss = loss_function(predictions.float(), targets)  # in float32, outside of autocast
                scaler.scale(loss * run.loss_weight).backward()
                if not run.record_batch(loss.item()):  # waits for the GPU
                    continue
                learning_rate = optimizer.param_groups[0]["lr"]
                scaler.unscale_(optimizer)
                if config["CLIP_NORM"] is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config["CLIP_NORM"])
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if scheduler is not None and config["SCHEDULER_STEP"] == "step":
                    scheduler.step()
                if ema is not None:
                    ema.update_parameters(preparation.model)
                run.record_step(learning_rate)

            results = {}
            if preparation.validation_loader is not None:
                evaluated, evaluation = preparation.evaluated_model(), preparation.new_evaluation()
                results = evaluate(evaluated, preparation.validation_loader, evaluation, *preparation.place)
            preparation.step_schedule_of_epochs(results.get(run.monitored))
            run.record_epoch(results)
        return run.finish()
