"""The raw PyTorch routine: the whole loop, to be read and modified. The config is in config.py."""

from typing import Any

import torch
from dida_core.report.console import ProgressBar
from dida_core.report.listener import Result
from dida_core.report.pictures import Picture
from dida_core.report.tensorboard import TensorBoard
from dida_core.runs.run import start_run
from dida_core.training.distributed import join_processes
from dida_core.training.evaluation import evaluate
from dida_core.training.modules import call_model
from dida_core.training.setup import prepare

from ..config.config import global_config as default_global_config
from ..utils.logging.csv import CsvTracker
from ..utils.notify.smtp import Mail
from .config import VARIANTS, small, train_config  # noqa: F401 (a routine offers them)


@join_processes()  # those that torchrun has started
def train(
    train_dataset: Any,
    test_dataset: Any,
    training_config: dict[str, Any] = train_config,
    global_config: dict[str, str] = default_global_config,
    validation_dataset: Any = None,
) -> Result:
    """
    Train a model. It leaves weights, a log and a row in the tracker.

    :param train_dataset: pairs (input, target); conventions for their shapes stand in utils/loss.py
    :param test_dataset: likewise, evaluated once at the end; None: no test
    :param training_config: what to train and how; read only
    :param global_config: where to write
    :param validation_dataset: what MONITOR selects by; None takes VALIDATION_FRACTION of the training set
    :raises ConfigError, DataError: before anything is written, with all problems
    """
    setup = prepare(train_dataset, test_dataset, training_config, global_config, validation_dataset, __name__)
    config, loss_fn = setup.config, setup.loss_fn
    optimizer, scheduler, scaler, ema = setup.optimizer, setup.scheduler, setup.scaler, setup.ema
    # <- your listener here, such as an experiment tracker of your own
    listeners = [CsvTracker(), TensorBoard(), Picture(), ProgressBar(), Mail()]

    with start_run(setup, listeners) as run:
        model = run.parallel(setup.model)
        for _ in run.epochs():
            model.train()
            for inputs, targets in run.batches():  # moved to the device, dropout reseeded for this batch
                with setup.autocast():
                    predictions = call_model(model, inputs)
                loss = loss_fn(predictions, targets)  # in float32, outside of autocast
                scaler.scale(loss * run.loss_weight).backward()
                run.end_batch(loss)  # the only CPU-GPU sync point
                if not run.is_update_step:  # gradient accumulation
                    continue
                scaler.unscale_(optimizer)
                if config["CLIP_NORM"] is not None:
                    torch.nn.utils.clip_grad_norm_(setup.parameters(), config["CLIP_NORM"])
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if scheduler is not None and config["SCHEDULER_STEP"] == "step":
                    scheduler.step()
                if ema is not None:
                    ema.update_parameters(setup.model)
                run.end_step()

            results = {}
            if setup.loaders.validation is not None:
                results = evaluate(setup.eval_model, setup.loaders.validation, setup.metrics(), setup.context)
            setup.step_schedule(results.get(run.monitored))
            run.end_epoch(results)
        return run.finish()
