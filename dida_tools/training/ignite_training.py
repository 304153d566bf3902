"""The ignite routine: pytorch_training.py's training by engines, events and handlers."""

from typing import Any

import ignite.distributed as idist
import torch
from dida_core.report.console import ProgressBar
from dida_core.report.listener import Result
from dida_core.report.pictures import Picture
from dida_core.report.tensorboard import TensorBoard
from dida_core.runs.run import start_run
from dida_core.training.distributed import join_processes
from dida_core.training.evaluation import evaluate_batch
from dida_core.training.modules import call_model
from dida_core.training.setup import prepare
from ignite.engine import Engine, EventEnum, Events

from ..config.config import global_config as default_global_config
from ..utils.logging.csv import CsvTracker
from ..utils.notify.smtp import Mail
from .config import VARIANTS, small, train_config  # noqa: F401 (a routine offers them)


class StepEvents(EventEnum):
    """An optimizer step may be made of several iterations, and ignite has no event for it."""

    STEP_COMPLETED = "step_completed"


@join_processes(idist.initialize, idist.finalize)  # those that torchrun has started
def train(
    train_dataset: Any,
    test_dataset: Any,
    training_config: dict[str, Any] = train_config,
    global_config: dict[str, str] = default_global_config,
    validation_dataset: Any = None,
) -> Result:
    """Train a model; parameters and result are those of pytorch_training.train."""
    setup = prepare(train_dataset, test_dataset, training_config, global_config, validation_dataset, __name__)
    config, loss_fn = setup.config, setup.loss_fn
    optimizer, scheduler, scaler, ema = setup.optimizer, setup.scheduler, setup.scaler, setup.ema
    # <- your listener here, such as an experiment tracker of your own
    listeners = [CsvTracker(), TensorBoard(), Picture(), ProgressBar(), Mail()]

    with start_run(setup, listeners) as run:
        model, metrics = setup.model, setup.metrics()
        if idist.get_world_size() > 1:  # of one process that sees several GPUs it would make DataParallel
            model = idist.auto_model(model)

        def training_step(engine: Engine, batch: Any) -> None:
            inputs, targets = batch
            with setup.autocast():
                predictions = call_model(model, inputs)
            loss = loss_fn(predictions, targets)  # in float32, outside of autocast
            scaler.scale(loss * run.loss_weight).backward()
            run.end_batch(loss)  # the only CPU-GPU sync point
            if not run.is_update_step:  # gradient accumulation
                return
            scaler.unscale_(optimizer)
            if config["CLIP_NORM"] is not None:
                torch.nn.utils.clip_grad_norm_(setup.parameters(), config["CLIP_NORM"])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            engine.fire_event(StepEvents.STEP_COMPLETED)

        def evaluation_step(_: Engine, batch: Any) -> None:
            evaluate_batch(setup.eval_model, batch, metrics, setup.context)

        trainer, evaluator = Engine(training_step), Engine(evaluation_step)
        trainer.register_events(*StepEvents)
        for engine in (trainer, evaluator):
            engine.logger.disabled = True  # it calls a signal an error; the run reports what happened

        @trainer.on(Events.EPOCH_STARTED)
        def start_epoch() -> None:
            model.train()

        @trainer.on(StepEvents.STEP_COMPLETED)
        def end_step() -> None:
            if scheduler is not None and config["SCHEDULER_STEP"] == "step":
                scheduler.step()
            if ema is not None:
                ema.update_parameters(setup.model)
            run.end_step()

        @evaluator.on(Events.STARTED)
        def start_evaluation() -> None:
            setup.eval_model.eval()

        @trainer.on(Events.EPOCH_COMPLETED)
        def end_epoch() -> None:
            nonlocal metrics
            results = {}
            if setup.loaders.validation is not None:
                metrics = setup.metrics()
                if len(setup.loaders.validation) > 0:  # of many processes, some may have no batch of it
                    evaluator.run(setup.loaders.validation)
                results = metrics.results()
            setup.step_schedule(results.get(run.monitored))
            run.end_epoch(results)
            if not run.epochs_left:
                trainer.terminate()

        if run.awaits_evaluation:
            end_epoch()
        if run.epochs_left:
            length, max_epochs = setup.loaders.batches.num_batches, config["EPOCHS"]
            trainer.load_state_dict(
                {"iteration": run.batch_index, "epoch_length": length, "max_epochs": max_epochs}
            )
            trainer.run(run.batches())
        return run.finish()
