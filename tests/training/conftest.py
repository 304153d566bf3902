"""Fixtures for tests that end trainings by force: a small training, run in forked processes that may be killed."""

import contextlib
import gc
import hashlib
import importlib
import itertools
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dida_tools.config.config import make_global_config
from dida_tools.config.errors import UserError
from dida_tools.config.project import project_of
from dida_tools.training import record as record_module
from dida_tools.training import run as run_module
from dida_tools.training.checkpoint import checkpoint_files, load_checkpoint
from dida_tools.training.environment import describe_environment
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.transforms import STANDARD
from dida_tools.utils.logging import read_log
from dida_tools.utils.logging.journal import Event, Journal, read_journal
from dida_tools.utils.logging.rows import row_of
from dida_tools.utils.logging.runs import run_names
from dida_tools.utils.loss import f1, multi_class_dice_ce_sum
from dida_tools.utils.signals import EXIT_CODE, Preempted
from dida_tools.utils.weights import find_damage

FINISHED, REFUSED, CRASHED = (
    0,
    1,
    86,
)  # how a training in a child ends: as train.py, or by an error that is no answer
HANGS_AFTER_SECONDS = 60.0


class Child:
    """A forked process in a session of its own, that runs a function and ends with the number that it returns."""

    def __init__(self, work: Callable[[], int], output: Path) -> None:
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
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # nothing of the test process, which this was, is to run on

    def wait(self, seconds: float = HANGS_AFTER_SECONDS) -> bool:
        """Whether it ends in that time; its code is negative after a signal."""
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

    def kill(self) -> None:
        """As kill -9 does, or the system when it lacks memory."""
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def said(self) -> str:
        return self.output.read_text(errors="replace")


class SmallModel(nn.Module):
    """Has parameters, running statistics and randomness in few tensors, since most of the time goes into saving."""

    def __init__(self, ch_in: int, ch_out: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(ch_in, 4, 3, padding=1), nn.Conv2d(4, ch_out, 1)
        self.norm, self.dropout = nn.BatchNorm2d(4), nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.relu(self.norm(self.first(x)))))


class SmallTraining:
    """A training of three steps an epoch, with everything that has a state, and what it has left so far."""

    default_config: dict[str, Any] = {  # noqa: RUF012
        "SESSION_NAME": "small",
        "MODEL": SmallModel,
        "MODEL_CONFIG": {"ch_in": 3, "ch_out": 3},
        "DATA_LOADER_CONFIG": {"batch_size": 1, "shuffle": True},
        "OPTIMIZER": torch.optim.AdamW,
        "OPTIMIZER_CONFIG": {"lr": 1e-2},
        "SCHEDULER": torch.optim.lr_scheduler.OneCycleLR,
        "EPOCHS": 2,
        "ACCUMULATE": 2,
        "EMA": 0.9,
        "CLIP_NORM": 1.0,
        "LOSS": multi_class_dice_ce_sum,
        "METRICS": {"f1": f1},
        "MONITOR": "max f1",
        "DEVICE": "cpu",
        "PRECISION": "fp32",
        "CHECKPOINT_SECONDS": 0,
    }
    environment: dict[str, Any] = {}  # noqa: RUF012
    children: list[Child] = []  # noqa: RUF012

    def __init__(
        self, root: Path, datasets: tuple[Any, Any], routine: str = "pytorch", **changes: Any
    ) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.datasets, self.routine = root, datasets, load_routine(routine)
        self.config = self.default_config | changes
        self.global_config = make_global_config(root)
        self.log_root = Path(self.global_config["LOG_DIR"])
        self.output, self.notes = root / "output.txt", root / "notes.jsonl"

    # ------------------------------------------------------------------------------------------------------- processes

    def start(
        self, setup: Callable[[], object] = lambda: None, in_full: bool = False, **changes: Any
    ) -> Child:
        """
        Begins, or goes on as somebody would who only knows the folder.

        :param setup: runs in the child first
        :param in_full: also what takes most of the time and has no part in the weights: picture, list of packages
        :param changes: of the config
        """
        config = self.config | {"RESUME": self.to_resume()} | changes

        def work() -> int:
            torch.set_num_threads(1)
            if not in_full:
                run_module.describe_environment = lambda *_: dict(self.environment)
                run_module.save_picture = lambda path, *_: path.write_bytes(b"picture")
            setup()
            try:
                self.routine.train(*self.datasets, config, self.global_config)
            except Preempted:
                return EXIT_CODE
            except (UserError, OSError) as error:
                print(f"{type(error).__name__}: {error}")
                return REFUSED
            return FINISHED

        self.children.append(Child(work, self.output))
        return self.children[-1]

    def finish(self, **changes: Any) -> None:
        """Begins or goes on, to the end."""
        child = self.start(**changes)
        child.wait()
        child.kill()
        assert child.code == FINISHED, f"{child.code}: {child.said()}"

    def to_resume(self) -> str:
        """Auto, unless the run is finished: then auto would begin another one."""
        finished = [
            name for name in run_names(self.log_root) if row_of(self.events(name)).get("STATUS") == "finished"
        ]
        return finished[0] if finished else "auto"

    # ---------------------------------------------------------------------------------------------------- what is left

    def name(self) -> str | None:
        """The run, once something is known of it."""
        names = [
            name
            for name in run_names(self.log_root)
            if self.events(name) or checkpoint_files(self.root / "weights" / name)
        ]
        assert len(names) < 2, f"one training became {len(names)} runs: {names}"
        return names[0] if names else None

    def events(self, name: str | None = None) -> list[Event]:
        name = name or self.name()
        return read_journal(self.log_root / name / "journal.jsonl") if name else []

    def weight_dir(self) -> Path:
        return Path(self.global_config["WEIGHT_DIR"]) / (self.name() or "none")

    def rows(self) -> list[dict[str, Any]]:
        return read_log(self.log_root / "experiments.csv")

    def assert_files_are_whole(self) -> dict[str, Any] | None:
        """Returns the newest training state."""
        folder, said = self.weight_dir(), []
        state = load_checkpoint(folder, said.append)
        assert said == []
        for file in (*checkpoint_files(folder), *folder.glob("best.pt")):
            assert find_damage(file) is None, file
        return state

    def end(self) -> dict[str, Any]:
        """What has to be equal after any interruption."""
        state, events = self.assert_files_are_whole(), self.events()
        assert state is not None
        tests = [bare(event) for event in events if event["event"] == "test"]
        assert tests and all(test == tests[0] for test in tests)
        return {
            "state": fingerprint(state),
            "best": hashlib.sha256((self.weight_dir() / "best.pt").read_bytes()).hexdigest(),
            "steps": [bare(event) for event in events if event["event"] == "step"],
            "epochs": [bare(event) for event in events if event["event"] == "epoch"],
            "test": tests[0],
        }

    def assert_ended_as(self, expected: dict[str, Any]) -> None:
        """The run is finished, and nothing tells what it went through."""
        end, num_epochs = self.end(), self.config["EPOCHS"]
        for part, value in expected.items():
            assert end[part] == value, part
        assert [event["step"] for event in end["steps"]] == list(range(1, 3 * num_epochs + 1))
        assert [event["epoch"] for event in end["epochs"]] == list(range(1, num_epochs + 1))
        (row,) = self.rows()
        assert row["STATUS"] == "finished" and row["NAME"] == self.name() and row["EPOCH"] == num_epochs
        assert row["WEIGHTS_DIGEST"] == end["test"]["digest"]
        assert "results differ" not in self.output.read_text(errors="replace")

    # ----------------------------------------------------------------------------------------------------------- notes

    def take_notes(self) -> None:
        """To be called in a child: what it is told to be safe is noted, outside of the run's files."""
        handle = os.open(self.notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        write, save, write_log = Journal.write, run_module.save_checkpoint, record_module.write_log

        def note(**values: Any) -> None:
            os.write(handle, json.dumps(values).encode() + b"\n")

        def noted_write(journal: Journal, event: Event) -> bool:
            is_new = write(journal, event)
            note(event=event, is_new=is_new)
            return is_new

        def noted_save(folder: Path, step: int, state: dict[str, Any]) -> Path:
            file = save(folder, step, state)
            note(checkpoint=step, state=fingerprint(state))
            return file

        def noted_write_log(path: Path, content: dict[str, Any]) -> None:
            write_log(path, content)
            note(row=content["NAME"])

        Journal.write = noted_write  # type: ignore[method-assign]
        run_module.save_checkpoint = noted_save
        record_module.write_log = noted_write_log

    def read_notes(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What was acknowledged: each event, checkpoint or row, or all of them."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [note for note in map(json.loads, lines) if kind is None or kind in note]

    # ---------------------------------------------------------------------------- for the tests, which cannot import it

    @staticmethod
    def bare(event: Event) -> Event:
        return bare(event)

    @staticmethod
    def fingerprint(state: Any) -> str:
        return fingerprint(state)

    @staticmethod
    def processes_of(sessions: set[int]) -> list[str]:
        return processes_of(sessions)


def load_routine(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"dida_tools.training.{name}_training")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dida_tools"):
            raise
        pytest.skip(f"{error.name} is not installed")


def bare(event: Event) -> Event:
    """An event without what the clock says."""
    return {key: value for key, value in event.items() if key not in ("time", "seconds")}


def fingerprint(value: Any) -> str:
    """A digest of everything in a training state but its clock."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            part = part.detach().contiguous()
            digest.update(repr((part.dtype, tuple(part.shape))).encode())
            digest.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            digest.update(f"dict {len(part)}".encode())
            for key, one in bare(part).items():
                digest.update(repr(key).encode())
                add(one)
        elif isinstance(part, list | tuple):
            digest.update(f"list {len(part)}".encode())
            for one in part:
                add(one)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


def processes_of(sessions: set[int]) -> list[str]:
    """Processes that are alive in one of these sessions, by what the kernel says."""
    alive = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                line = re.fullmatch(
                    r"\d+ \((.*)\) (\S) \d+ \d+ (\d+) .*", (folder / "stat").read_text(), re.S
                )
                assert line is not None
                if int(line[3]) in sessions and line[2] not in "ZX":
                    alive.append(f"{folder.name} {line[1]} {line[2]}")
    return alive


@pytest.fixture(scope="session")
def small_datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Six samples for training, after one image is taken for validation, and two for the test."""
    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    for part, num_images in (("train", 4), ("test", 2)):
        for kind in ("x", "y"):
            (folder / part / kind).mkdir(parents=True)
        for number in range(num_images):
            mask = rng.integers(0, 3, (16, 16), np.uint8)
            image = rng.integers(0, 80, (16, 16, 3), np.uint8) + 40 * mask[..., None]
            np.save(folder / part / "x" / f"{number}.npy", image)
            np.save(folder / part / "y" / f"{number}.npy", mask)
    train = NpyDataset(
        folder / "train" / "x", folder / "train" / "y", crop=8, crops_per_image=2, augment=STANDARD
    )
    return train, NpyDataset(folder / "test" / "x", folder / "test" / "y")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory, small_datasets: tuple[Any, Any]) -> Iterator[None]:
    """Imports what a training imports as it goes, once for all children. Skips where a forked process cannot train."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    import matplotlib.figure  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    torch.optim.AdamW([torch.zeros(1)])  # the first optimizer imports a thousand modules
    SmallTraining.environment = describe_environment(project_of("dida_tools").root, torch.device("cpu"))
    training = SmallTraining(tmp_path_factory.mktemp("forks"), small_datasets)
    listed = training.root / "modules.txt"

    def work() -> int:
        # Not in this process: where there is a GPU, nothing that it forks later could compute a gradient.
        training.routine.train(*training.datasets, training.config, training.global_config)
        listed.write_text("\n".join(sorted(sys.modules)))
        return FINISHED

    child = Child(work, training.output)
    child.wait()
    child.kill()
    if child.code != FINISHED:
        assert "fork" in child.said(), child.said()
        pytest.skip(f"a forked process cannot train here: {child.said()}")
    for name in listed.read_text().splitlines():
        with contextlib.suppress(ImportError):  # a few are made up as they are used
            importlib.import_module(name)
    yield
    for child in SmallTraining.children:
        child.kill()


@pytest.fixture(scope="session")
def make_training(forks: None, small_datasets: tuple[Any, Any]) -> Callable[..., SmallTraining]:
    """Makes a small training in a folder."""
    return lambda root, *args, **changes: SmallTraining(root, small_datasets, *args, **changes)


@pytest.fixture
def new_training(make_training: Callable[..., SmallTraining], tmp_path: Path) -> Callable[..., SmallTraining]:
    """Makes small trainings, each in a folder of its own below the test's."""
    numbers = itertools.count(1)
    return lambda *args, **changes: make_training(tmp_path / str(next(numbers)), *args, **changes)
