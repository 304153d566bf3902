"""The Lightning routine: pytorch_training.py's training by a module and a Trainer, in one process."""

import logging
import warnings
from typing import Any

import torch
from dida_core.report.console import ProgressBar
from dida_core.report.listener import Result
from dida_core.report.pictures import Picture
from dida_core.report.tensorboard import TensorBoard
from dida_core.runs.run import Run, start_run
from dida_core.training.device import DeviceContext
from dida_core.training.distributed import refuse_several
from dida_core.training.evaluation import evaluate_batch
from dida_core.training.modules import call_model
from dida_core.training.setup import Setup, prepare
from dida_core.training.signals import install_handlers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from ..config.config import global_config as default_global_config
from ..utils.logging.csv import CsvTracker
from ..utils.notify.smtp import Mail
from .config import VARIANTS, small, train_config  # noqa: F401 (a routine offers them)


class Training(LightningModule):
    """What the Trainer does at each hook, in the order of the other routines."""

    def __init__(self, setup: Setup, run: Run) -> None:
        super().__init__()
        self.built, self.run, self.model = setup, run, setup.model  # Lightning calls a method "setup"
        # Lightning's own way would divide the loss by ACCUMULATE also where a step has fewer batches.
        self.automatic_optimization = False
        self.metrics = setup.metrics()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return that of the config; its schedule is stepped below."""
        return self.built.optimizer

    def train_dataloader(self) -> Any:
        """Return the batches of an epoch: asked for in each, since that of a resumed run may be shorter."""
        install_handlers()  # Lightning has just set its own, which end a training after any batch
        return self.run.batches()

    def val_dataloader(self) -> Any:
        """Return the validation set, or nothing."""
        install_handlers()
        return self.built.loaders.validation or []

    def on_train_epoch_start(self) -> None:
        """Switch the model to training: Lightning leaves the mode to it."""
        self.model.train()

    def training_step(self, batch: tuple[Any, Any], _: int) -> None:
        """Train on a batch, and make an optimizer step when it is time."""
        setup, run, model, config = self.built, self.run, self.model, self.built.config
        optimizer, scheduler, scaler, ema = setup.optimizer, setup.scheduler, setup.scaler, setup.ema
        inputs, targets = batch
        with setup.autocast():
            predictions = call_model(model, inputs)
        loss = setup.loss_fn(predictions, targets)  # in float32, outside of autocast
        self.manual_backward(scaler.scale(loss * run.loss_weight))
        run.end_batch(loss)  # the only CPU-GPU sync point
        if not run.is_update_step:  # gradient accumulation
            return
        scaler.unscale_(optimizer)
        if config["CLIP_NORM"] is not None:
            torch.nn.utils.clip_grad_norm_(setup.parameters(), config["CLIP_NORM"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scheduler is not None and config["SCHEDULER_STEP"] == "step":
            scheduler.step()
        if ema is not None:
            ema.update_parameters(model)
        run.end_step()

    def on_validation_epoch_start(self) -> None:
        """Begin an evaluation."""
        self.built.eval_model.eval()
        self.metrics = self.built.metrics()

    def validation_step(self, batch: tuple[Any, Any], _: int) -> None:
        """Evaluate a batch of the validation set."""
        evaluate_batch(self.built.eval_model, batch, self.metrics, self.built.context)

    def on_train_epoch_end(self) -> None:
        """End the epoch, after its validation."""
        self.end_epoch()
        self.trainer.should_stop = not self.run.epochs_left

    def end_epoch(self) -> None:
        """Step the schedule, and record the epoch."""
        results = self.metrics.results() if self.built.loaders.validation is not None else {}
        self.built.step_schedule(results.get(self.run.monitored))
        self.run.end_epoch(results)


def make_trainer(num_epochs: int, context: DeviceContext) -> Trainer:
    """Return a Trainer that leaves to the run what is the run's."""
    device = context.device
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


def train(
    train_dataset: Any,
    test_dataset: Any,
    training_config: dict[str, Any] = train_config,
    global_config: dict[str, str] = default_global_config,
    validation_dataset: Any = None,
) -> Result:
    """Train a model; parameters and result are those of pytorch_training.train."""
    refuse_several("lightning")
    setup = prepare(train_dataset, test_dataset, training_config, global_config, validation_dataset, __name__)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the run reports on what it trains
    # <- your listener here, such as an experiment tracker of your own
    listeners = [CsvTracker(), TensorBoard(), Picture(), ProgressBar(), Mail()]

    with start_run(setup, listeners) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # advice about loaders and logging
        warnings.filterwarnings("ignore", message="Total length of `list`|`isinstance.treespec")
        module = Training(setup, run)
        try:
            if run.awaits_evaluation:
                if setup.loaders.validation is not None:
                    make_trainer(1, setup.context).validate(module, verbose=False)
                module.end_epoch()
            if run.epochs_left:
                make_trainer(run.epochs_left, setup.context).fit(module)
        except SystemExit as error:
            raise error.__context__ or error from None  # Lightning makes an exit of Ctrl-C
        setup.model.to(setup.context.device)  # Lightning leaves it on the CPU
        return run.finish()
