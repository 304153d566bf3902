"""
Contains the ignite routine: the same training as pytorch_training.py, with engines, events and handlers.
"""

from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, EventEnum, Events

from ..config.config import global_config as default_global_config
from .config import VARIANTS, small, train_config  # noqa: F401 (a routine offers them)
from .determinism import seed_step
from .distributed import join_processes, rank
from .evaluation import evaluate_batch
from .run import Result, start_run
from .setup import prepare


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
    setup = prepare(train_dataset, test_dataset, training_config, global_config, validation_dataset, __name__)
    config, device = setup.config, setup.context.device
    optimizer, scheduler = setup.optimizer, setup.scheduler
    loss_function, scaler, ema = setup.loss_fn, setup.scaler, setup.ema

    with start_run(setup, global_config) as run:
        state, model = run.state, setup.model
        if idist.get_world_size() > 1:  # of one process that sees several GPUs it would make DataParallel
            model = idist.auto_model(model)
        evaluation, learning_rate = setup.metrics(), 0.0

        def training_step(engine: Engine, batch: Any) -> None:
            nonlocal learning_rate
            inputs, targets = batch
            inputs, targets = setup.context.move(inputs), targets.to(device)
            seed_step(config["SEED"], run.batch_number, device, rank())
            with setup.autocast():
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
            evaluate_batch(setup.eval_model, batch, evaluation, setup.context)

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
                ema.update_parameters(setup.model)
            run.record_step(learning_rate)

        @evaluator.on(Events.STARTED)
        def start_evaluation() -> None:
            setup.eval_model.eval()

        @trainer.on(Events.EPOCH_COMPLETED)
        def end_epoch() -> None:
            nonlocal evaluation
            results = {}
            if setup.loaders.validation is not None:
                evaluation = setup.metrics()
                if len(setup.loaders.validation) > 0:  # of many processes, some may have no part of it
                    evaluator.run(setup.loaders.validation)
                results = evaluation.results()
            setup.step_schedule(results.get(run.monitored))
            run.record_epoch(results)
            if state.stopped:
                trainer.terminate()

        if run.awaits_evaluation:
            end_epoch()
        if state.epoch < config["EPOCHS"] and not state.stopped:
            length, max_epochs = setup.loaders.batches.num_batches, config["EPOCHS"]
            trainer.load_state_dict(
                {"iteration": run.batch_number, "epoch_length": length, "max_epochs": max_epochs}
            )
            trainer.run(run.batches)
        return run.finish()
