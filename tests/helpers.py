"""Helpers that several test modules share."""

import contextlib
import gc
import hashlib
import importlib
import io
import itertools
import os
import random
import re
import runpy
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from types import ModuleType
from typing import Any

import pytest
import torch
from dida_core.storage.journal import Event
from torch import Tensor

import dida_tools

PACKAGE = dida_tools.__name__
ROOT = Path(dida_tools.__file__).resolve().parents[1]
ROUTINES = sorted(
    file.name.removesuffix("_training.py")
    for file in (Path(dida_tools.__file__).parent / "training").glob("*_training.py")
)
FIRST = "pytorch" if "pytorch" in ROUTINES else ROUTINES[0]
# What the clock and the process put into otherwise equal events, rows and states.
VOLATILE = {"time", "seconds", "started", "pid", "PID", "STARTED", "HEARTBEAT", "SECONDS"}
CRASHED = 86  # exit code of a child whose function raised
HANGS_AFTER_SECONDS = 60.0


def load_routine(name: str) -> ModuleType:
    """Import a routine by its name, such as "pytorch". Skip where its framework is not installed."""
    try:
        return importlib.import_module(f"{PACKAGE}.training.{name}_training")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(PACKAGE):
            raise
        pytest.skip(f"{error.name} is not installed")


def global_config_of(root: Path) -> dict[str, str]:
    """Return the global config of a project in this folder."""
    from dida_tools.config.config import make_global_config

    return make_global_config(root)


def folder_of(root: Path, key: str) -> Path:
    """Return the folder of a project's logs, weights or data, by its key in the global config."""
    return Path(global_config_of(root)[key])


def rows_of(global_config: dict[str, str]) -> list[dict[str, Any]]:
    """Return the rows of the tracker."""
    from dida_tools.utils.logging import read_log

    return read_log(Path(global_config["LOG_DIR"]) / "experiments.csv")


def events_of(run_dir: Path, *kinds: str) -> list[Event]:
    """Return the events of a run's journal, all of them or those of some kinds."""
    from dida_core.storage.journal import read_journal

    events = read_journal(run_dir / "journal.jsonl")
    return [event for event in events if not kinds or event["event"] in kinds]


def scalars_of(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a run: (step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    shown.Reload()
    return {tag: [(one.step, one.value) for one in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


# ------------------------------------------------------------------------------------------------ bit by bit


def bare(event: Event) -> Event:
    """Return an event without the clock's values."""
    return {key: value for key, value in event.items() if key not in ("time", "seconds")}


def leaves(value: Any, path: str = "", ignored: frozenset[str] | set[str] = VOLATILE) -> dict[str, Any]:
    """Return all values by place: tensors by their bits, numbers as text, so that 1, 1.0, -0.0 differ."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        items = [(key, item) for key, item in pairs if key not in ignored]
        found: dict[str, Any] = {path: f"{type(value).__name__} of {len(items)}"}
        for key, item in items:
            found |= leaves(item, f"{path}/{key}", ignored)
        return found
    if isinstance(value, Tensor):
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {path: (str(value.dtype), tuple(value.shape), bits)}
    return {path: repr(value)}


def differing(one: Any, other: Any, ignored: frozenset[str] | set[str] = VOLATILE) -> list[str]:
    """Return the places at which two nested values differ by at least a bit."""
    ones, others = leaves(one, "", ignored), leaves(other, "", ignored)
    return [place for place in ones | others if ones.get(place) != others.get(place)]


def fingerprint(state: Any) -> str:
    """Return a digest of everything in a training state but its clock."""
    digest = hashlib.sha256()
    for place, value in leaves(state, "", {"time", "seconds", "started"}).items():
        digest.update(repr((place, value)).encode())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------- processes


class Child:
    """A forked process in a session of its own. It runs a function and exits with the number it returns."""

    def __init__(self, work: Callable[[], int | None], output: Path) -> None:
        self.output = output
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = CRASHED
            try:
                gc.freeze()  # collecting what the test process holds would copy its memory
                os.setsid()
                sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115
                os.dup2(sys.stderr.fileno(), 2)
                code = work() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # nothing of the test process, which this was, is to run on

    def wait(self, seconds: float = HANGS_AFTER_SECONDS) -> bool:
        """Wait for its end. Return False if it takes longer; code is negative after a signal."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return False
            else:
                time.sleep(0.001)
        return True

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """End it by a signal, as kill -9 does, or the system when memory runs out."""
        if self.code is None:
            os.kill(self.pid, signum)
            assert self.wait(), "it does not end"

    def said(self) -> str:
        """Return what it printed."""
        return self.output.read_text(errors="replace")


def wait_until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait until a condition holds; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.01)


def killed_writers(code: str, path: Path, num_kills: int, at_once: int = 1) -> Iterator[list[str]]:
    """
    Run programs that print what they have written, and kill them at random moments.

    :param code: of a program; its arguments are the path and a number that no other gets
    :return: all whole lines that the programs of one turn printed
    """
    chance, number = random.Random(0), itertools.count()
    for _ in range(num_kills):
        commands = [[sys.executable, "-c", code, str(path), str(next(number))] for _ in range(at_once)]
        writers = [Popen(command, stdout=PIPE, text=True, cwd=ROOT) for command in commands]
        lines = [writer.stdout.readline().strip() for writer in writers if writer.stdout]
        time.sleep(chance.random() * 0.05)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            time.sleep(chance.random() * 0.01)
        lines += [line for writer in writers for line in writer.communicate()[0].split("\n")[:-1]]
        assert all(writer.returncode == -signal.SIGKILL for writer in writers)
        yield lines


def processes_of(sessions: set[int]) -> list[str]:
    """Return the processes that are alive in one of these sessions, by what the kernel says."""
    alive = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                text = (folder / "stat").read_text()
                line = re.fullmatch(r"\d+ \((.*)\) (\S) \d+ \d+ (\d+) .*", text, re.S)
                assert line is not None
                if int(line[3]) in sessions and line[2] not in "ZX":
                    alive.append(f"{folder.name} {line[1]} {line[2]}")
    return alive


def run_script(
    script: str, *arguments: object, root: Path | None = None, given: str | io.StringIO = "", **variables: str
) -> "CompletedProcess[str]":
    """
    Run a script of the repository's root in this process, where everything is imported already.

    :param root: the project's folder, for logs, weights and data
    :param given: what is typed
    :param variables: of the environment
    :return: returncode, stdout, stderr
    """
    from dida_tools.config import config as config_module

    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        if root is not None:
            for key, value in global_config_of(root).items():
                patch.setitem(config_module.global_config, key, value)
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(given) if isinstance(given, str) else given)
        code: Any = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        if isinstance(code, str):  # as Python does with a text
            print(code, file=sys.stderr)
            code = 1
    return CompletedProcess([script, *map(str, arguments)], code, out.getvalue(), err.getvalue())


# ------------------------------------------------------------------------------------------------------ runs


def begin_run(log_dir: Path, name: str, hours_ago: float = 0, host: str = "", **config: Any) -> Any:
    """Write what a run writes first, without training, and return its journal."""
    from dida_core.runs.lookup import write_record
    from dida_core.storage.journal import Journal

    record = {"version": 1, "config": {"LOGFILE": "experiments.csv", "MONITOR": "max f1"} | config}
    about = {"name": name, "not_rerunnable": ""}
    write_record(log_dir / name, record | about)
    journal = Journal(log_dir / name / "journal.jsonl")
    event = {"event": "start", "epoch": 0, "best_epoch": None, "device": "cpu", "precision": "fp32"} | about
    event |= {"time": time.time() - 3600 * hours_ago, "host": host or socket.gethostname(), "pid": 1}
    journal.write(event | record)
    return journal


def write_run(
    log_dir: Path, name: str, results: dict[str, Any], hours_ago: float = 0, digest: str = "d", **config: Any
) -> None:
    """Write the journal of a finished run with these results, such as {"validation.f1": 0.5}."""
    journal = begin_run(log_dir, name, hours_ago, **config)
    about = {"seconds": 1.0, "digest": digest, "time": time.time() - 3600 * hours_ago}
    journal.write({"event": "test"} | about | results)
    journal.close()
