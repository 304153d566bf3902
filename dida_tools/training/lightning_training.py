"""
Contains the Lightning routine: the same training as pytorch_training.py, with a module and a Trainer. In one process.

Its config is below; variants of it are functions beside it. Keys, defaults and what they may hold: config/keys.py.
"""

import logging
import warnings
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor
from torch.nn import ELU, GroupNorm
from torch.optim.lr_scheduler import OneCycleLR

from ..config.config import global_config as default_global_config
from ..config.device import autocast
from ..config.keys import copy_config
from ..models.unet import UNET
from ..utils.data.scenes import SceneDataset
from ..utils.data.transforms import STANDARD
from ..utils.loss import f1, iou, multi_class_dice_ce_sum, precision, recall
from ..utils.signals import install_handlers
from .determinism import seed_step
from .distributed import refuse_several
from .evaluation import Evaluation, evaluate_batch, to_device
from .preparation import Preparation, prepare
from .run import Result, Run, start_run

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


class Training(LightningModule):
    """What the Trainer does at each hook, in the order of the other routines."""

    def __init__(self, preparation: Preparation, run: Run) -> None:
        super().__init__()
        self.model, self.preparation, self.run, self.config = (
            preparation.model,
            preparation,
            run,
            preparation.config,
        )
        # Lightning's own way would divide the loss by ACCUMULATE also where an epoch's last step has fewer batches.
        self.automatic_optimization = False
        self.evaluation: Evaluation = preparation.new_evaluation()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the config; its schedule is stepped below."""
        return self.preparation.optimizer

    def train_dataloader(self) -> Any:
        """Asked for in each epoch, since the first one of a run that goes on may be shorter."""
        install_handlers()  # Lightning has just put its own in their place, which ends a training after any batch
        return self.run.batches

    def val_dataloader(self) -> Any:
        """The validation set, or nothing."""
        install_handlers()
        return self.preparation.validation_loader or []

    def on_train_epoch_start(self) -> None:
        """Lightning leaves the mode to the model."""
        self.model.train()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """A batch, and an optimizer step when it is time."""
        config, run, (device, number_format, channels_last) = self.config, self.run, self.preparation.place
        preparation, model = self.preparation, self.model
        optimizer, scheduler, scaler = preparation.optimizer, preparation.scheduler, preparation.scaler
        inputs, targets = to_device(batch[0], device, channels_last), batch[1].to(device)
        seed_step(config["SEED"], run.batch_number, device)
        with autocast(device, number_format):
            predictions = model(inputs)
        loss = preparation.loss_function(predictions.float(), targets)  # in float32, outside of autocast
        self.manual_backward(scaler.scale(loss * run.loss_weight))
        if not run.record_batch(loss.item()):  # waits for the GPU
            return
        learning_rate = optimizer.param_groups[0]["lr"]
        scaler.unscale_(optimizer)
        if config["CLIP_NORM"] is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config["CLIP_NORM"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scheduler is not None and config["SCHEDULER_STEP"] == "step":
            scheduler.step()
        if preparation.ema is not None:
            preparation.ema.update_parameters(model)
        run.record_step(learning_rate)

    def on_validation_epoch_start(self) -> None:
        """An empty evaluation."""
        self.preparation.evaluated_model().eval()
        self.evaluation = self.preparation.new_evaluation()

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """A batch of the validation set."""
        evaluate_batch(self.preparation.evaluated_model(), batch, self.evaluation, *self.preparation.place)

    def on_train_epoch_end(self) -> None:
        """Lightning goes on, or not."""
        self.end_epoch()
        self.trainer.should_stop = self.run.state.stopped

    def end_epoch(self) -> None:
        """After the validation."""
        results = self.evaluation.results() if self.preparation.validation_loader is not None else {}
        self.preparation.step_schedule_of_epochs(results.get(self.run.monitored))
        self.run.record_epoch(results)


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
    refuse_several("lightning")
    preparation = prepare(
        train_dataset, test_dataset, training_config, global_config, validation_dataset, __name__
    )
    config, device = preparation.config, preparation.device
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the run says on what it trains

    with start_run(preparation, global_config) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # advice about loaders and logging
        warnings.filterwarnings("ignore", message="Total length of `list`|`isinstance.treespec")
        state, module = run.state, Training(preparation, run)

        def new_trainer(num_epochs: int) -> Trainer:
            return Trainer(
                accelerator={"cuda": "gpu"}.get(device.type, device.type),
                devices=[device.index or 0] if device.type == "cuda" else 1,
                max_epochs=num_epochs,
                deterministic="warn" if device.type == "cuda" else None,  # as start_run has it
                reload_dataloaders_every_n_epochs=1,
                num_sanity_val_steps=0,
                plugins=[LightningEnvironment()],  # not SLURM's: the run takes its signals
                logger=False,  # the run has its own record, checkpoints and bar
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )

        try:
            if run.awaits_evaluation:
                if preparation.validation_loader is not None:
                    new_trainer(1).validate(module, verbose=False)
                module.end_epoch()
            if state.epoch < config["EPOCHS"] and not state.stopped:
                new_trainer(config["EPOCHS"] - state.epoch).fit(module)
        except SystemExit as error:
            raise error.__context__ or error from None  # Lightning makes an exit of Ctrl-C
        preparation.model.to(device)  # Lightning leaves it on the CPU
        return run.finish()
