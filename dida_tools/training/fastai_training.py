"""The fastai routine: pytorch_training.py's training by a Learner and callbacks, in one process."""

from typing import Any

import torch
from dida_core.report.console import ProgressBar
from dida_core.report.listener import Result
from dida_core.report.pictures import Picture
from dida_core.report.tensorboard import TensorBoard
from dida_core.runs.run import Run, start_run
from dida_core.training.distributed import refuse_several
from dida_core.training.evaluation import evaluate_batch
from dida_core.training.modules import call_model
from dida_core.training.setup import Setup, prepare
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelStepException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn

from ..config.config import global_config as default_global_config
from ..utils.logging.csv import CsvTracker
from ..utils.notify.smtp import Mail
from .config import VARIANTS, small, train_config  # noqa: F401 (a routine offers them)


class Forward(nn.Module):
    """The model as the Learner calls it: in the run's precision."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.model, self.setup = setup.model, setup

    def forward(self, inputs: Any) -> Any:
        """Return the predictions for a batch; the loss is computed in float32, outside of autocast."""
        with self.setup.autocast():
            return call_model(self.model, inputs)


class Training(Callback):
    """What the Learner does at each event, in the order of the other routines."""

    def __init__(self, setup: Setup, run: Run) -> None:
        super().__init__()
        self.setup, self.recorded, self.evaluation = setup, run, setup.metrics()  # fastai calls a flag "run"

    def __call__(self, event_name: str) -> None:
        """Call what is defined for an event. fastai's own would put its words before those of an error."""
        if hasattr(type(self), event_name):
            getattr(self, event_name)()

    def before_train(self) -> None:
        """Switch fastai and the model to training."""
        self.learn.training = True
        self.model.train()

    def before_batch(self) -> None:
        """Evaluate a batch of the validation set."""
        if not self.training:
            evaluate_batch(
                self.setup.eval_model, (self.xb[0], self.yb[0]), self.evaluation, self.setup.context
            )
            raise CancelBatchException

    def before_backward(self) -> None:
        """Scale the loss."""
        self.learn.loss_grad = self.setup.scaler.scale(self.loss_grad * self.recorded.loss_weight)

    def after_backward(self) -> None:
        """Record the batch."""
        self.recorded.end_batch(self.loss)  # the only CPU-GPU sync point
        if not self.recorded.is_update_step:  # gradient accumulation
            raise CancelBatchException

    def before_step(self) -> None:
        """Make the optimizer step."""
        optimizer, scaler, clip_norm = self.setup.optimizer, self.setup.scaler, self.setup.config["CLIP_NORM"]
        scaler.unscale_(optimizer)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.setup.parameters(), clip_norm)
        scaler.step(optimizer)
        scaler.update()
        raise CancelStepException  # the step is done: not twice

    def after_step(self) -> None:
        """Step schedule and moving average."""
        scheduler, ema = self.setup.scheduler, self.setup.ema
        if scheduler is not None and self.setup.config["SCHEDULER_STEP"] == "step":
            scheduler.step()
        if ema is not None:
            ema.update_parameters(self.setup.model)
        self.recorded.end_step()

    def before_validate(self) -> None:
        """Begin an evaluation."""
        self.learn.training = False
        self.setup.eval_model.eval()
        self.evaluation = self.setup.metrics()

    def after_epoch(self) -> None:
        """End the epoch, after its validation."""
        results = self.evaluation.results() if self.setup.loaders.validation is not None else {}
        self.setup.step_schedule(results.get(self.recorded.monitored))
        self.recorded.end_epoch(results)
        if not self.recorded.epochs_left:
            raise CancelFitException


def train(
    train_dataset: Any,
    test_dataset: Any,
    training_config: dict[str, Any] = train_config,
    global_config: dict[str, str] = default_global_config,
    validation_dataset: Any = None,
) -> Result:
    """Train a model; parameters and result are those of pytorch_training.train."""
    refuse_several("fastai")
    setup = prepare(train_dataset, test_dataset, training_config, global_config, validation_dataset, __name__)
    # <- your listener here, such as an experiment tracker of your own
    listeners = [CsvTracker(), TensorBoard(), Picture(), ProgressBar(), Mail()]

    with start_run(setup, listeners) as run:
        learner = Learner(
            DataLoaders(run.batches(), setup.loaders.validation or []),
            Forward(setup),
            loss_func=setup.loss_fn,
            default_cbs=False,  # the run has its own bar, record and modes
            cbs=Training(setup, run),
        )
        # Ready-made: one of fastai's own would take weight decay off norms and biases, and forget its state.
        # fit would set the learning rates, so it gets them as they are; the schedule is the config's.
        learner.opt = OptimWrapper(opt=setup.optimizer)
        if run.epochs_left:
            learner.fit(run.epochs_left, lr=[group["lr"] for group in setup.optimizer.param_groups])
        return run.finish()
