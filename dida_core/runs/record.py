"""What a run writes while it trains: its folder and lock, config.json, environment.json and journal."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..config.tree import difference
from ..errors import ConfigError
from ..report.console import say
from ..report.listener import State
from ..storage.files import make_unique_dir, refuse_links, write_atomic
from ..storage.journal import Event, Journal
from ..storage.locks import locked
from ..training.distributed import num_processes
from ..training.setup import Setup
from .environment import describe_environment
from .lookup import run_names, write_record
from .redaction import Redactor
from .rerun import differences_from, read_segments
from .resume import changes_on_the_way, compare_conditions, compare_configs, find_unfinished
from .rows import is_start

_LOCK_SECONDS = 2.0  # another process may just be looking whether the run is in training


class Record:
    """The files of one run. Of several processes, the main one alone has a record."""

    def __init__(
        self, log_dir: Path, weight_dir: Path, captured: dict[str, Any], before: dict[str, Any] | None
    ) -> None:
        """
        Made by open_record, which has locked the run.

        :param before: the run's record so far; None for a new run
        """
        self.name, self.log_dir, self.weight_dir = log_dir.name, log_dir, weight_dir
        self.captured, self.before, self.is_resumed = captured, before or {}, before is not None
        self.journal = Journal(log_dir / "journal.jsonl")
        if self.journal.num_damaged:
            say(f"{self.journal.path}: {self.journal.num_damaged} damaged lines are left out.")
        self.starts = [event for event in self.journal.events if is_start(event)]
        # Tells the run from all others; a journal that is lost has a copy in config.json.
        self.started = self.before.get("started") or time.time()
        if self.starts:
            self.started = self.starts[0].get("started", self.starts[0]["time"])
        self.environment: dict[str, Any] = {}
        self.segments: list[dict[str, Any]] = []  # environments before this one, the last one first
        self.resumed_with: list[str] = []  # what was another there
        self.differences: list[str] = []  # from the run that it repeats

    def compare_conditions(self, setup: Setup) -> None:
        """
        Report what is not as it was when this run, or the one that it repeats, was trained.

        :raises ConfigError: if a run resumes with other data
        """
        context, config, redactor = setup.context, setup.config, Redactor(config=setup.config)
        ran_on = {"device": str(context.device), "precision": context.precision}
        arguments = (setup.experiment.project.root, context.device, redactor, _known_files(setup))
        self.environment = describe_environment(*arguments) | {"arguments": redactor.arguments(sys.argv)}
        self.environment |= redactor.data({"data": setup.data.hashes} | ran_on)
        if self.is_resumed:
            self.segments, other_data = read_segments(self.log_dir), not config["REQUIRE_RERUNNABLE"]
            self.resumed_with = compare_conditions(self.name, self.segments, self.environment, other_data)
        if config["RERUN_OF"] is not None:
            repeated = self.log_dir.parent / config["RERUN_OF"]
            self.differences = differences_from(repeated, self.environment)
            for change in self.differences:
                say(f"Not as it was: {change}")

    def begin(self, setup: Setup, state: State) -> None:
        """Write what is known at the start; state is where the training starts."""
        self.weight_dir.mkdir(parents=True, exist_ok=True)
        experiment, context = setup.experiment, setup.context
        start: dict[str, Any] = {"step": state.step, "epoch": state.epoch, "best_epoch": state.best_epoch}
        start |= {"device": str(context.device), "precision": context.precision, "processes": num_processes()}
        reasons = [experiment.not_rerunnable]
        reasons += [f"{key} holds a secret" for key in difference(self.captured, experiment.captured)]
        if lost := self.environment.get("unrecorded_files"):
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            reasons.append(f"uncommitted files are not recorded: {', '.join(lost[:3])}{more}")
        reasons += changes_on_the_way(self.starts, start, self.captured)
        reasons += ["it was interrupted and resumed with other data"] if "data" in self.resumed_with else []
        if not self.starts:  # they are lost
            reasons.append(self.before.get("not_rerunnable", ""))
        about = {"name": self.name, "started": self.started, "data_digest": setup.data.digest}
        about["not_rerunnable"] = "; ".join(dict.fromkeys(filter(None, reasons)))
        write_record(self.log_dir, self.captured | about)
        if self.segments[:1] != [self.environment]:
            text = json.dumps(self.environment | {"earlier": self.segments}, indent=2).encode()
            write_atomic(self.log_dir / "environment.json", lambda file: file.write(text))
        process = {"host": socket.gethostname(), "pid": os.getpid()}
        start |= {"resumed_with": ", ".join(self.resumed_with)} if self.resumed_with else {}
        self.write({"event": "start"} | start | about | process | self.captured)

    def write(self, event: Event) -> None:
        """
        Append an event to the journal, unless this step or epoch is there already.

        :raises OSError: if the disk does not take it
        """
        known = len(self.journal.contradictions)
        self.journal.write(event | {"time": time.time()})
        if self.journal.contradictions and not known:
            what = f"{self.journal.contradictions[0]}: its results differ from those before the interruption"
            why = "code, data or machine are not what they were, or a state is in no state_dict"
            say(f"{what}: {why}. The run may end with other weights.")

    def close(self) -> None:
        """End all writing."""
        try:
            self.journal.close()
        except OSError as error:
            say(f"{self.log_dir}: the last lines may not be on the disk ({error}).")


def _known_files(setup: Setup) -> Callable[[str], bool]:
    """Return what tells whether a file is one of the data, whose hashes are recorded, or of a run."""
    sizes: dict[str, set[int]] = {}
    for name, facts in setup.data.hashes.items():
        sizes.setdefault(name.partition("/")[2], set()).add(facts["bytes"])
    folders = [setup.experiment.global_config[key] for key in ("LOG_DIR", "WEIGHT_DIR")]
    of_runs = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)

    def is_known(path: str) -> bool:
        name = "/".join(path.split(os.sep)[-2:])
        return path.startswith(of_runs) or (name in sizes and os.path.getsize(path) in sizes[name])

    return is_known


def without_secrets(setup: Setup) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Return the captured config without the secrets in it, and what takes them out of any text."""
    redactor, captured = Redactor(config=setup.config), setup.experiment.captured
    return captured | {"config": redactor.config(captured["config"])}, redactor.text


def open_record(setup: Setup, captured: dict[str, Any], stack: ExitStack) -> Record:
    """
    Make the folder of a new run, or find the one to resume, and lock it.

    :param captured: the config as plain data, without secrets
    :param stack: releases the lock and closes the record
    :raises ConfigError: if RESUME names no run, or one of another config
    :raises UserError: if another process trains it, or if links lead out of its folders
    """
    log_root, weight_root = (Path(setup.experiment.global_config[key]) for key in ("LOG_DIR", "WEIGHT_DIR"))
    name = setup.config["RESUME"]
    if name == "auto":
        name = find_unfinished(log_root, captured)
    is_resumed = name is not None
    if not is_resumed:
        naming = setup.experiment.project.module(".utils.name")  # the project's own
        name = make_unique_dir(log_root, naming.run_name(setup.config | captured["config"]))
    elif name not in run_names(log_root):
        raise ConfigError([f"RESUME is {name!r}: there is no such run in {log_root}."])
    log_dir, weight_dir = log_root / name, weight_root / name
    refuse_links(log_dir, weight_dir)
    busy = f"the run {name} is being trained by another process: wait, or end it."
    stack.enter_context(locked(log_dir / ".lock", _LOCK_SECONDS, busy))
    for file in (*log_dir.glob(".*.tmp"), *weight_dir.glob(".*.tmp")):  # left by a process that was killed
        file.unlink(missing_ok=True)
    before = compare_configs(log_dir, weight_dir, captured) if is_resumed else None
    record = Record(log_dir, weight_dir, captured, before)
    stack.callback(record.close)
    record.compare_conditions(setup)
    return record
