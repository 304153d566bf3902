"""
Contains the fastai routine: the same training as pytorch_training.py, with a Learner and callbacks. In one process.

Its config is below; variants of it are functions beside it. Keys, defaults and what they may hold: config/keys.py.
"""

from functools import partial
from typing import Any

import torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelStepException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import Tensor, nn
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
from .distributed import refuse_several
from .evaluation import evaluate_batch, to_device
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


class Forward(nn.Module):
    """The model as the Learner calls it: in the run's precision, with an output in float32."""

    def __init__(self, preparation: Preparation) -> None:
        super().__init__()
        self.model, self.place = preparation.model, preparation.place

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits."""
        device, number_format, channels_last = self.place
        inputs = to_device(inputs, device, channels_last)
        with autocast(device, number_format):
            predictions = self.model(inputs)
        return predictions.float()  # so the loss is computed in float32, outside of autocast


class Training(Callback):
    """What the Learner does at each event, in the order of the other routines."""

    def __init__(self, preparation: Preparation, run: Run) -> None:
        super().__init__()
        self.preparation, self.tracked, self.config = preparation, run, preparation.config
        self.learning_rate, self.evaluation = 0.0, preparation.new_evaluation()

    def __call__(self, event_name: str) -> None:
        """Calls what is defined for an event. fastai's own would put its words before those of an error."""
        if hasattr(type(self), event_name):
            getattr(self, event_name)()

    def before_train(self) -> None:
        """Lets fastai and the model know."""
        self.learn.training = True
        self.model.train()

    def before_batch(self) -> None:
        """Seeds a batch's randomness; evaluates in the validation."""
        if not self.training:
            batch, place = (self.xb[0], self.yb[0]), self.preparation.place
            evaluate_batch(self.preparation.evaluated_model(), batch, self.evaluation, *place)
            raise CancelBatchException
        seed_step(self.config["SEED"], self.tracked.batch_number, self.preparation.device)

    def before_backward(self) -> None:
        """Scales the loss."""
        self.learn.loss_grad = self.preparation.scaler.scale(self.loss_grad * self.tracked.loss_weight)

    def after_backward(self) -> None:
        """Takes note; no step follows on a batch that only accumulates."""
        if not self.tracked.record_batch(self.loss.item()):  # waits for the GPU
            raise CancelBatchException

    def before_step(self) -> None:
        """The optimizer step."""
        optimizer, scaler = self.preparation.optimizer, self.preparation.scaler
        self.learning_rate = optimizer.param_groups[0]["lr"]
        scaler.unscale_(optimizer)
        if self.config["CLIP_NORM"] is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config["CLIP_NORM"])
        scaler.step(optimizer)
        scaler.update()
        raise CancelStepException  # the step is done: not twice

    def after_step(self) -> None:
        """Schedule and moving average."""
        scheduler, ema = self.preparation.scheduler, self.preparation.ema
        if scheduler is not None and self.config["SCHEDULER_STEP"] == "step":
            scheduler.step()
        if ema is not None:
            ema.update_parameters(self.preparation.model)
        self.tracked.record_step(self.learning_rate)

    def before_validate(self) -> None:
        """An empty evaluation."""
        self.learn.training = False
        self.preparation.evaluated_model().eval()
        self.evaluation = self.preparation.new_evaluation()

    def after_epoch(self) -> None:
        """After the validation."""
        results = self.evaluation.results() if self.preparation.validation_loader is not None else {}
        self.preparation.step_schedule_of_epochs(results.get(self.tracked.monitored))
        self.tracked.record_epoch(results)
        if self.tracked.state.stopped:
            raise CancelFitException


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
    refuse_several("fastai")
    preparation = prepare(
        train_dataset, test_dataset, training_config, global_config, validation_dataset, __name__
    )
    config, optimizer = preparation.config, preparation.optimizer

    with start_run(preparation, global_config) as run:
        state = run.state
        learner = Learner(
            DataLoaders(run.batches, preparation.validation_loader or []),
            Forward(preparation),
            loss_func=preparation.loss_function,
            default_cbs=False,  # the run has its own bar, record and modes
            cbs=Training(preparation, run),
        )
        # Finished: fastai's own way of making one would take weight decay off norms and biases, and forget a state that
        # was restored. fit would set the rates, so it gets them as they are; the schedule is the config's.
        learner.opt = OptimWrapper(opt=optimizer)
        if state.epoch < config["EPOCHS"] and not state.stopped:
            rates = [group["lr"] for group in optimizer.param_groups]
            learner.fit(config["EPOCHS"] - state.epoch, lr=rates)
        return run.finish()
