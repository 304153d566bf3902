"""Fixtures for tests that end trainings by force: a small training, in forked processes."""

import contextlib
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.errors import Preempted, UserError
from dida_core.report import pictures as pictures_module
from dida_core.runs import record as record_module
from dida_core.runs import run as run_module
from dida_core.runs.environment import describe_environment
from dida_core.runs.lookup import run_names
from dida_core.runs.rows import row_of
from dida_core.storage.checkpoint import checkpoint_files, load_checkpoint
from dida_core.storage.journal import Event, Journal
from dida_core.storage.weights import find_damage, load_weights
from torch import Tensor, nn

from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.transforms import STANDARD
from dida_tools.utils.logging import csv as csv_module
from dida_tools.utils.loss import f1, multi_class_dice_ce_sum

from tests import helpers
from tests.helpers import ROOT, Child, bare, events_of, fingerprint, load_routine

FINISHED, REFUSED = 0, 1  # exit codes of a training in a child, as of train.py


class SmallModel(nn.Module):
    """Parameters, running statistics and randomness in few tensors: most of the time goes into saving."""

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
        self.config, self.global_config = self.default_config | changes, helpers.global_config_of(root)
        self.log_root = Path(self.global_config["LOG_DIR"])
        self.output, self.notes = root / "output.txt", root / "notes.jsonl"

    # ------------------------------------------------------------------------------------------ processes

    def start(
        self, setup: Callable[[], object] = lambda: None, in_full: bool = False, **changes: Any
    ) -> Child:
        """
        Begin, or resume as somebody would who only knows the folder.

        :param setup: runs in the child first
        :param in_full: also with what has no part in the weights: picture, list of packages
        :param changes: of the config
        """
        config = self.config | {"RESUME": self.to_resume()} | changes

        def work() -> int:
            torch.set_num_threads(1)
            if not in_full:
                record_module.describe_environment = lambda *_: dict(self.environment)
                pictures_module.save_picture = lambda path, *_: path.write_bytes(b"picture")
            setup()
            try:
                self.routine.train(*self.datasets, config, self.global_config)
            except Preempted as error:
                return error.exit_code
            except (UserError, OSError) as error:
                print(f"{type(error).__name__}: {error}")
                return REFUSED
            return FINISHED

        self.children.append(Child(work, self.output))
        return self.children[-1]

    def finish(self, **changes: Any) -> None:
        """Begin or resume, and train to the end."""
        child = self.start(**changes)
        child.wait()
        child.kill()
        assert child.code == FINISHED, f"{child.code}: {child.said()}"

    def to_resume(self) -> str:
        """Return auto, unless the run is finished: then auto would begin another one."""
        finished = [n for n in run_names(self.log_root) if row_of(self.events(n)).get("STATUS") == "finished"]
        return finished[0] if finished else "auto"

    # --------------------------------------------------------------------------------------- what is left

    def name(self) -> str | None:
        """Return the run, once something is known of it."""
        weights = self.root / "weights"
        names = [n for n in run_names(self.log_root) if self.events(n) or checkpoint_files(weights / n)]
        assert len(names) < 2, f"one training became {len(names)} runs: {names}"
        return names[0] if names else None

    def events(self, name: str | None = None, *kinds: str) -> list[Event]:
        name = name or self.name()
        return events_of(self.log_root / name, *kinds) if name else []

    def weight_dir(self) -> Path:
        return Path(self.global_config["WEIGHT_DIR"]) / (self.name() or "none")

    def rows(self) -> list[dict[str, Any]]:
        return helpers.rows_of(self.global_config)

    def assert_files_are_intact(self) -> dict[str, Any] | None:
        """Return the newest training state."""
        folder, said = self.weight_dir(), []
        state = load_checkpoint(folder, said.append)
        assert said == []
        for file in (*checkpoint_files(folder), *folder.glob("best.pt")):
            assert find_damage(file) is None, file
        return state

    def end(self) -> dict[str, Any]:
        """Return what has to be equal after any interruption."""
        state, events = self.assert_files_are_intact(), [bare(event) for event in self.events()]
        assert state is not None
        of_kind = {kind: [e for e in events if e["event"] == kind] for kind in ("step", "epoch", "test")}
        tests = of_kind.pop("test")
        assert tests and all(test == tests[0] for test in tests)
        best = load_weights(self.weight_dir() / "best.pt")
        assert best.pop("run") == self.name()
        return {"state": fingerprint(state), "best": fingerprint(best), "test": tests[0]} | of_kind

    def assert_ended_as(self, expected: dict[str, Any]) -> None:
        """Assert that the run is finished, and that nothing tells what it went through."""
        end, num_epochs = self.end(), self.config["EPOCHS"]
        for part, value in expected.items():
            assert end[part] == value, part
        assert [event["step"] for event in end["step"]] == list(range(1, 3 * num_epochs + 1))
        assert [event["epoch"] for event in end["epoch"]] == list(range(1, num_epochs + 1))
        (row,) = self.rows()
        assert row["STATUS"] == "finished" and row["NAME"] == self.name() and row["EPOCH"] == num_epochs
        assert row["WEIGHTS_DIGEST"] == end["test"]["digest"]
        assert "results differ" not in self.output.read_text(errors="replace")

    # ---------------------------------------------------------------------------------------------- notes

    def take_notes(self) -> None:
        """Note what a child, which calls this, is told to be safe, outside of the run's files."""
        handle = os.open(self.notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        write, save, write_log = Journal.write, run_module.save_checkpoint, csv_module.write_log

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
        csv_module.write_log = noted_write_log

    def read_notes(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return what was acknowledged: each event, checkpoint or row, or all of them."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [note for note in map(json.loads, lines) if kind is None or kind in note]


def at_event(kind: str, number: int, act: Callable[[], object], before: bool = True) -> None:
    """Do something in this child before, or after, its journal takes the event of a step or epoch."""
    write = Journal.write

    def acting_write(journal: Journal, event: Event) -> bool:
        is_it = event["event"] == kind and event[kind] == number
        if is_it and before:
            act()
        is_new = write(journal, event)
        if is_it and not before:
            act()
        return is_new

    Journal.write = acting_write  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def small_datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Six samples for training, after one image is taken for validation, and two for the test."""
    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    for split, num_images in (("train", 4), ("test", 2)):
        for kind in ("x", "y"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(num_images):
            mask = rng.integers(0, 3, (16, 16), np.uint8)
            image = rng.integers(0, 80, (16, 16, 3), np.uint8) + 40 * mask[..., None]
            np.save(folder / split / "x" / f"{number}.npy", image)
            np.save(folder / split / "y" / f"{number}.npy", mask)
    (train_x, train_y), test = ((folder / split / "x", folder / split / "y") for split in ("train", "test"))
    return NpyDataset(train_x, train_y, crop=8, crops_per_image=2, augment=STANDARD), NpyDataset(*test)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory, small_datasets: tuple[Any, Any]) -> Iterator[None]:
    """Import once for all children what a training imports. Skip where a forked process cannot train."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    import matplotlib.figure  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    torch.optim.AdamW([torch.zeros(1)])  # the first optimizer imports a thousand modules
    SmallTraining.environment = describe_environment(ROOT, torch.device("cpu")) | {"unrecorded_files": []}
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
    """Make a small training in a folder."""
    return lambda root, *args, **changes: SmallTraining(root, small_datasets, *args, **changes)


@pytest.fixture
def new_training(make_training: Callable[..., SmallTraining], tmp_path: Path) -> Callable[..., SmallTraining]:
    """Make small trainings, each in a folder of its own below the test's."""
    numbers = itertools.count(1)
    return lambda *args, **changes: make_training(tmp_path / str(next(numbers)), *args, **changes)
