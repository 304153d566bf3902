"""Resuming: which run to continue, with what config, and from what state."""

import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..config.keys import defaults, upgrade
from ..config.tree import difference
from ..errors import ConfigError, UserError
from ..report.console import say
from ..report.listener import State
from ..storage.checkpoint import checkpoint_files
from ..storage.files import relative_path
from ..storage.journal import Event
from ..storage.weights import UnreadableWeights, WeightsError, load_weights, weights_digest
from ..training.modules import fill_model
from ..training.optimization import catch_up, learning_rate, load_optimizer
from ..training.setup import Setup
from .environment import changed_files, find_differences
from .lookup import read_record, run_names
from .rows import clock, current_row, is_in_training

logger = logging.getLogger(__name__)

# Keys that may change when a run is resumed.
RESUME_KEYS = (
    *("DATE", "SESSION_NAME", "ROUTINE_NAME", "__COMMENT", "EPOCHS", "PATIENCE", "INIT_WEIGHTS", "LOGFILE"),
    *("CHECKPOINT_SECONDS", "RERUN_OF", "STUDY", "TRIAL", "NOTIFY", "REQUIRE_RERUNNABLE"),
    *("DATA_LOADER_CONFIG.num_workers", "DATA_LOADER_CONFIG.pin_memory"),
)
# Keys whose change is reported. A change of any other key is refused: it would be another training.
WARN_ON_CHANGE = ("DATASET", "DEVICE", "PRECISION", "CHANNELS_LAST", "METRICS", "MASK_VALUES")


def find_unfinished(log_root: Path, captured: dict[str, Any]) -> str | None:
    """Return the newest run of this config that is neither finished nor in training, or None."""
    found: dict[str, str] = {}
    identity = ("SESSION_NAME", "EPOCHS", "DATASET")  # by these, too, one run is told from another
    free = tuple(key for key in (*RESUME_KEYS, *WARN_ON_CHANGE) if key not in identity)
    for name in run_names(log_root):
        row = current_row(log_root / name)
        if row.get("STATUS") == "finished":
            continue
        try:
            changes = _changes(read_record(log_root / name, logger.debug), captured)
        except ConfigError:
            continue
        if not all(key.startswith(free) for key in changes):
            continue
        if is_in_training(log_root / name):
            say(f"{name}, of the same config, is being trained by another process.")
        else:
            found[name] = str(row.get("STARTED", ""))
    return max(found, key=lambda name: (found[name], name), default=None)


def compare_configs(log_dir: Path, weight_dir: Path, captured: dict[str, Any]) -> dict[str, Any]:
    """
    Refuse to resume a run with a config that would be another training. Return the run's record so far.

    :raises ConfigError: with all keys that have changed
    """
    refused, record = [], read_record(log_dir, say)
    for key, (before, now) in _changes(record, captured).items():
        if key.startswith(WARN_ON_CHANGE):
            say(f"{log_dir.name} resumes with another {key}: {before} before, {now} now.")
        elif not key.startswith(RESUME_KEYS):
            refused.append(f"{key} was {before} and is now {now}: that would be another training.")
    if refused:
        weights = f"INIT_WEIGHTS={relative_path(weight_dir / 'best.pt')}"
        raise ConfigError([*refused, f"Start a new run, if you like from its weights: {weights}."])
    return record


def compare_conditions(
    name: str, segments: list[dict[str, Any]], environment: dict[str, Any], other_data: bool
) -> list[str]:
    """
    Report what is not as it was when a run was last trained, and refuse other data.

    :param segments: the environments it was trained in, the last one first
    :param other_data: whether it resumes with other data all the same
    :return: what differs from any of the segments, such as "number of threads"
    :raises ConfigError: if files are not what they were, but for those of the test set
    """
    differences = [find_differences(before, environment) for before in segments]
    if not segments:
        say(f"environment.json of {name} cannot be read: what has changed is not known.")
    elif differences[0]:
        files = [one for one in changed_files(segments[0], environment) if not one.startswith("test/")]
        if files and not other_data:
            problem = f"{len(files)} files of the data are not what they were, such as {files[0]}"
            remedy = "Put them back or start a new run; REQUIRE_RERUNNABLE=False resumes it all the same"
            raise ConfigError([f"{problem}: that would be another training. {remedy}, never to be rerun."])
        say(f"{name} resumes under other conditions: {'; '.join(differences[0])}.")
    return list(dict.fromkeys(one.partition(":")[0] for some in differences for one in some))


def check_checkpoint(
    stored: dict[str, Any], started: float, events: list[Event], log_dir: Path, weight_dir: Path
) -> None:
    """
    Refuse a checkpoint or best weights of another run, and report what the journal has lost.

    :param started: when the run was started, which tells it from all others
    :param events: those of its journal
    :raises UserError: with the file
    """
    step, file = stored["state"]["step"], relative_path(weight_dir / f"last-{stored['state']['step']:08d}.pt")
    if stored.get("started", started) != started:
        times = f"a run that started at {clock(stored['started'])}, {log_dir.name} did at {clock(started)}"
        remedy = "Put its own file back, or remove this one to resume from the one before"
        raise UserError(f"{file} is of {times}. {remedy}.")
    if (digest := stored["state"].get("best_digest")) is not None:
        load_best(weight_dir, digest, events)
    known = {event.get("step") for event in events if event.get("event") == "step"}
    if lost := len({*range(1, step + 1)} - known):
        journal, kept = relative_path(log_dir / "journal.jsonl"), f"epochs and weights are those of {file}"
        say(f"{journal} has lost {lost} of {step} steps, and their losses; {kept}.")


def load_best(weight_dir: Path, digest: str | None, events: list[Event]) -> dict[str, Tensor]:
    """
    Load the best weights of a run.

    :param digest: of those that the training knows; None: it does not, as in version 0.2
    :param events: of the journal: where the run was killed, the file may be of an epoch after the checkpoint
    :raises UserError: if they are missing, damaged or of another run
    """
    file = weight_dir / "best.pt"
    known = {event.get("digest") for event in events if event.get("event") == "best"}
    try:
        weights = load_weights(file)["model"]
        if digest is not None and weights_digest(weights) not in known | {digest}:
            raise WeightsError(f"{file}: holds other weights than {weight_dir.name} has saved.")
    except WeightsError as error:
        if digest is None or isinstance(error, UnreadableWeights):
            raise
        last = f"INIT_WEIGHTS={relative_path(checkpoint_files(weight_dir)[0])}"
        remedy = f"Put its own file back, or start a new run from its last weights: {last}."
        raise WeightsError(f"{error} {remedy}") from error
    return weights


def changes_on_the_way(starts: list[Event], start: Event, captured: dict[str, Any]) -> list[str]:
    """
    Return why a run that resumes now cannot be rerun in one piece.

    :param starts: the events of its earlier starts
    :param start: the event of this one
    """
    compared = ("device", "precision", "processes")
    changed = {key for event in starts for key in compared if event.get(key) != start[key]}
    config = captured["config"]
    # A longer training has the same weights so far, unless its length is part of what it does.
    is_by_length = any(map(config.get, ("SCHEDULER", "WARMUP", "PATIENCE")))
    by_length = ("EPOCHS", "PATIENCE") if is_by_length else ("PATIENCE",)
    ignored = tuple(key for key in RESUME_KEYS if key not in by_length)
    for event in starts:
        changed |= {key for key in _changes(event, captured) if not key.startswith(ignored)}
    return [f"it was interrupted and resumed with another {', '.join(sorted(changed))}"] if changed else []


def training_state(setup: Setup, state: State, history: dict[int, Event]) -> dict[str, Any]:
    """Return all that a training needs to continue, for a checkpoint."""
    return {
        "model": setup.model.state_dict(),
        "loss": setup.loss_fn.state_dict(),
        "trained": {name: one.requires_grad for name, one in setup.model.named_parameters()},
        "optimizer": setup.optimizer.state_dict(),
        "scheduler": None if setup.scheduler is None else setup.scheduler.state_dict(),
        "scaler": setup.scaler.state_dict(),
        "ema": None if setup.ema is None else setup.ema.state_dict(),
        "state": asdict(state),
        "history": list(history.values()),
        "contract": setup.contract.to_dict(),
        "epochs": setup.config["EPOCHS"],
    }


def restore(setup: Setup, stored: dict[str, Any], name: str) -> tuple[State, dict[int, Event]]:
    """Fill a setup with a stored training state. Return where the training stands, and its history."""
    if stored["contract"] != setup.contract.to_dict():
        say(f"{name}: the training data is not what it was: its channels, scale or statistics have changed.")
    fill_model(setup.model, stored["model"], f"the checkpoint of {name}")
    if stored.get("loss"):  # since version 0.3
        fill_model(setup.loss_fn, stored["loss"], f"the loss in the checkpoint of {name}")
    for parameter_name, parameter in setup.model.named_parameters():
        parameter.requires_grad_(stored.get("trained", {}).get(parameter_name, parameter.requires_grad))
    state, scheduler = State(**stored["state"]), setup.scheduler
    is_prolonged = stored["epochs"] != setup.config["EPOCHS"]
    if scheduler is not None and is_prolonged and not isinstance(scheduler, ReduceLROnPlateau):
        by_step = setup.config["SCHEDULER_STEP"] == "step"
        set_rates = catch_up(scheduler, setup.optimizer, state.step if by_step else state.epoch)
        load_optimizer(setup.optimizer, stored["optimizer"])
        set_rates()
    else:
        load_optimizer(setup.optimizer, stored["optimizer"])
        if scheduler is not None and stored["scheduler"] is not None:
            scheduler.load_state_dict(stored["scheduler"])
    setup.scaler.load_state_dict(stored["scaler"])
    if setup.ema is not None and stored["ema"] is not None:
        setup.ema.load_state_dict(stored["ema"])
    if state.stopped and setup.config["EPOCHS"] > stored["epochs"]:
        state.bad_epochs = 0
    state.stopped &= state.bad_epochs >= (setup.config["PATIENCE"] or math.inf)
    hint = "; it had stopped early: a higher PATIENCE or more EPOCHS continue it" if state.stopped else ""
    say(f"{name} resumes after epoch {state.epoch}, step {state.step}{hint}.")
    if is_prolonged:
        rate = float(learning_rate(setup.optimizer.param_groups[0]))
        before = float(learning_rate(stored["optimizer"]["param_groups"][0]))
        schedule = f"by the schedule of {setup.config['EPOCHS']} epochs" if scheduler else "as it is"
        say(f"The learning rate was {before:.3g}, and continues at {rate:.3g}, {schedule}.")
    return state, {event["epoch"]: event for event in stored["history"]}


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two captured configs. A key that is newer than a run had its default."""
    newer = {key: value for key, value in defaults().items() if key in now["config"]}
    old = {"version": before["version"], "config": newer | upgrade(before["config"])}
    return difference(old, {key: now[key] for key in ("version", "config")})
