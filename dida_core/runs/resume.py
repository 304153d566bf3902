"""Resuming: which run to continue, with what config, and from what state."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..config.keys import defaults, upgrade
from ..config.tree import difference
from ..errors import ConfigError
from ..report.console import say
from ..report.listener import State
from ..storage.files import relative_path
from ..storage.journal import Event
from ..training.modules import fill_model
from ..training.optimization import build_scheduler
from ..training.setup import Setup
from .lookup import read_record, run_names
from .rows import current_row, is_in_training

logger = logging.getLogger(__name__)

# Keys that may change when a run is resumed.
RESUME_KEYS = (
    *("DATE", "SESSION_NAME", "ROUTINE_NAME", "__COMMENT", "EPOCHS", "PATIENCE", "INIT_WEIGHTS", "LOGFILE"),
    *("CHECKPOINT_SECONDS", "RERUN_OF", "STUDY", "TRIAL", "NOTIFY"),
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


def compare_configs(log_dir: Path, weight_dir: Path, captured: dict[str, Any]) -> None:
    """
    Refuse to resume a run with a config that would be another training.

    :raises ConfigError: with all keys that have changed
    """
    refused = []
    for key, (before, now) in _changes(read_record(log_dir, say), captured).items():
        if key.startswith(WARN_ON_CHANGE):
            say(f"{log_dir.name} resumes with another {key}: {before} before, {now} now.")
        elif not key.startswith(RESUME_KEYS):
            refused.append(f"{key} was {before} and is now {now}: that would be another training.")
    if refused:
        weights = f"INIT_WEIGHTS={relative_path(weight_dir / 'best.pt')}"
        raise ConfigError([*refused, f"Start a new run, if you like from its weights: {weights}."])


def changes_on_the_way(starts: list[Event], start: Event, captured: dict[str, Any]) -> list[str]:
    """
    Return why a run that resumes now cannot be rerun in one piece.

    :param starts: the events of its earlier starts
    :param start: the event of this one
    """
    changed = {
        key
        for event in starts
        for key in ("device", "precision", "processes")
        if event.get(key) != start[key]
    }
    config = captured["config"]
    # A longer training has the same weights so far, unless its length is part of what it does.
    by_length = ("EPOCHS", "PATIENCE") if config.get("SCHEDULER") or config.get("PATIENCE") else ("PATIENCE",)
    ignored = tuple(key for key in RESUME_KEYS if key not in by_length)
    for event in starts:
        changed |= {key for key in _changes(event, captured) if not key.startswith(ignored)}
    return [f"it was interrupted and resumed with another {', '.join(sorted(changed))}"] if changed else []


def training_state(setup: Setup, state: State, history: dict[int, Event]) -> dict[str, Any]:
    """Return all that a training needs to continue, for a checkpoint."""
    return {
        "model": setup.model.state_dict(),
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
    setup.optimizer.load_state_dict(stored["optimizer"])
    if setup.scheduler is not None and stored["scheduler"] is not None:
        _restore_schedule(setup, setup.scheduler, stored)
    setup.scaler.load_state_dict(stored["scaler"])
    if setup.ema is not None and stored["ema"] is not None:
        setup.ema.load_state_dict(stored["ema"])
    state = State(**stored["state"])
    if setup.config["EPOCHS"] > stored["epochs"] and state.stopped:
        state.stopped, state.bad_epochs = False, 0
    say(f"{name} resumes after epoch {state.epoch}, step {state.step}.")
    return state, {event["epoch"]: event for event in stored["history"]}


def _restore_schedule(setup: Setup, scheduler: Any, stored: dict[str, Any]) -> None:
    """Fill a scheduler, also one of another length: learning rates stay as they are."""
    config, state = setup.config, stored["scheduler"]
    if stored["epochs"] != config["EPOCHS"]:
        # What a fresh schedule of the old length knows follows from the config: only the rest is state.
        dummy = config["OPTIMIZER"]([torch.zeros(1, requires_grad=True)], **config["OPTIMIZER_CONFIG"])
        fresh = build_scheduler(config | {"EPOCHS": stored["epochs"]}, dummy, setup.loaders.steps_per_epoch)
        assert fresh is not None
        as_built = fresh.state_dict()
        changed = {key: value for key, value in state.items() if value != as_built.get(key)}
        state = scheduler.state_dict() | changed
    scheduler.load_state_dict(state)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two captured configs. A key that is newer than a run had its default."""
    newer = {key: value for key, value in defaults().items() if key in now["config"]}
    old = {"version": before["version"], "config": newer | upgrade(before["config"])}
    return difference(old, {key: now[key] for key in ("version", "config")})
