"""
Contains the ignite routine: the same training as pytorch_training.py, with engines, events and handlers.

Its config is below; variants of it are functions beside it. Keys, defaults and what they may hold: config/keys.py.
"""

from functools import partial
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, EventEnum, Events
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
from .distributed import join_processes, rank
from .evaluation import evaluate_batch, to_device
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


class StepEvents(EventEnum):
    """What ignite has no event for, since an optimizer step may be made of several iterations."""

    STEP_COMPLETED = "step_completed"


@join_processes(idist.initialize, idist.finalize)  # those that torchrun has started
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
        state, model = run.state, preparation.model
        if idist.get_world_size() > 1:  # of one process that sees several GPUs it would make DataParallel
            model = idist.auto_model(model)
        evaluation, learning_rate = preparation.new_evaluation(), 0.0

        def training_step(engine: Engine, batch: Any) -> None:
            nonlocal learning_rate
            inputs, targets = batch
            inputs, targets = to_device(inputs, device, config["CHANNELS_LAST"]), targets.to(device)
            seed_step(config["SEED"], run.batch_number, device, rank())
            with autocast(device, preparation.precision):
                predictions = model(inputs)
            loss = loss_function(predictions.float(), targets)  # in float32, outside of autocast
            scaler.scale(loss * run.loss_weight).backward()
            if not run.record_batch(loss.item()):  # waits for the GPU
                return
            learning_rate = optimizer.param_groups[0]["lr"]
            scaler.unscale_(optimizer)
            if config["CLIP_NORM"] is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config["CLIP_NORM"])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            engine.fire_event(StepEvents.STEP_COMPLETED)

        def evaluation_step(_: Engine, batch: Any) -> None:
            evaluate_batch(preparation.evaluated_model(), batch, evaluation, *preparation.place)

        trainer, evaluator = Engine(training_step), Engine(evaluation_step)
        trainer.register_events(*StepEvents)
        for engine in (trainer, evaluator):
            engine.logger.disabled = True  # it calls a signal an error; the run tells what happened

        @trainer.on(Events.EPOCH_STARTED)
        def start_epoch() -> None:
            model.train()

        @trainer.on(StepEvents.STEP_COMPLETED)
        def end_step() -> None:
            if scheduler is not None and config["SCHEDULER_STEP"] == "step":
                scheduler.step()
            if ema is not None:
                ema.update_parameters(preparation.model)
            run.record_step(learning_rate)

        @evaluator.on(Events.STARTED)
        def start_evaluation() -> None:
            preparation.evaluated_model().eval()

        @trainer.on(Events.EPOCH_COMPLETED)
        def end_epoch() -> None:
            nonlocal evaluation
            results = {}
            if preparation.validation_loader is not None:
                evaluation = preparation.new_evaluation()
                if len(preparation.validation_loader) > 0:  # of many processes, some may have no part of it
                    evaluator.run(preparation.validation_loader)
                results = evaluation.results()
            preparation.step_schedule_of_epochs(results.get(run.monitored))
            run.record_epoch(results)
            if state.stopped:
                trainer.terminate()

        if run.awaits_evaluation:
            end_epoch()
        if state.epoch < config["EPOCHS"] and not state.stopped:
            length, max_epochs = preparation.train_batches.num_batches, config["EPOCHS"]
            trainer.load_state_dict(
                {"iteration": run.batch_number, "epoch_length": length, "max_epochs": max_epochs}
            )
            trainer.run(run.batches)
        return run.finish()
