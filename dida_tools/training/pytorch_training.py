"""
Contains the raw PyTorch routine: the whole loop, to be read and modified.
"""

from typing import Any

import torch

from ..config.config import global_config as default_global_config
from .config import VARIANTS, small, train_config  # noqa: F401 (a routine offers them)
from .determinism import seed_step
from .distributed import join_processes, parallel, rank
from .evaluation import evaluate
from .run import Result, start_run
from .setup import prepare


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
    setup = prepare(train_dataset, test_dataset, training_config, global_config, validation_dataset, __name__)
    config, device = setup.config, setup.context.device
    optimizer, scheduler = setup.optimizer, setup.scheduler
    loss_function, scaler, ema = setup.loss_fn, setup.scaler, setup.ema

    with start_run(setup, global_config) as run:
        state, model = run.state, parallel(setup.model, device)
        while state.epoch < config["EPOCHS"] and not state.stopped:
            model.train()
            for inputs, targets in run.batches:
                inputs, targets = setup.context.move(inputs), targets.to(device)
                seed_step(config["SEED"], run.batch_number, device, rank())
                with setup.autocast():
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
                    ema.update_parameters(setup.model)
                run.record_step(learning_rate)

            results = {}
            if setup.loaders.validation is not None:
                results = evaluate(setup.eval_model, setup.loaders.validation, setup.metrics(), setup.context)
            setup.step_schedule(results.get(run.monitored))
            run.record_epoch(results)
        return run.finish()
