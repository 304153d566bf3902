"""A run that was interrupted ends as the run that was not: weights, results, journal, TensorBoard, row."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.config.check import check
from dida_core.config.keys import KEYS
from dida_core.config.kinds import NUMBER, Key
from dida_core.config.project import project_of
from dida_core.errors import ConfigError, UserError
from dida_core.runs.resume import find_unfinished
from dida_core.storage.checkpoint import checkpoint_files
from dida_core.storage.weights import load_weights
from filelock import FileLock
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset

from dida_tools.models import UNET
from dida_tools.utils.data import NpyDataset

from tests.helpers import (
    FIRST,
    PACKAGE,
    ROUTINES,
    begin_run,
    differing,
    events_of,
    global_config_of,
    load_routine,
    rows_of,
    scalars_of,
)

pytestmark = pytest.mark.usefixtures("quick")

OTHERS = [routine for routine in ROUTINES if routine != FIRST]


class InterruptedNet(nn.Sequential):
    """
    What a U-Net is made of, in so few tensors that files of them are written and read quickly.

    It raises KeyboardInterrupt in a chosen forward pass of training, as a second Ctrl-C would.
    """

    interrupt_at: int | None = None
    forwards = 0
    # Called before each forward pass, with whether it is one of training.
    look: Callable[[bool], None] | None = None

    def __init__(self) -> None:
        conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(4), nn.ELU(), nn.Dropout2d(0.1), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        if InterruptedNet.look is not None:
            InterruptedNet.look(self.training)
        if self.training and torch.is_grad_enabled():
            InterruptedNet.forwards += 1
            if InterruptedNet.forwards == InterruptedNet.interrupt_at:
                raise KeyboardInterrupt
        return super().forward(x)


@pytest.fixture(autouse=True)
def no_interruption():
    InterruptedNet.interrupt_at, InterruptedNet.forwards, InterruptedNet.look = None, 0, None


@pytest.fixture
def rich_config(tiny_config) -> dict:
    """Everything with a state: momentum, schedule, accumulation, moving average, dropout, augmentation."""
    tiny_config |= {"MODEL": InterruptedNet, "MODEL_CONFIG": {}, "EPOCHS": 3, "ACCUMULATE": 2, "EMA": 0.9}
    tiny_config |= {"CLIP_NORM": 1.0, "SCHEDULER": OneCycleLR, "CHECKPOINT_SECONDS": 0, "DATE": "2021-01-01"}
    tiny_config |= {"DATA_LOADER_CONFIG": {"batch_size": 3, "shuffle": True, "num_workers": 0}}
    return tiny_config


@pytest.fixture
def fit(request, datasets, rich_config, global_config) -> Callable[..., Any]:
    """Train by a routine, or that of a parameter: 3 steps an epoch, each of two batches but the last one."""

    def train(routine: str = getattr(request, "param", FIRST), sets: Any = None, **changes: Any) -> Any:
        InterruptedNet.interrupt_at, InterruptedNet.forwards = changes.pop("interrupt_at", None), 0
        root = global_config_of(changes.pop("root")) if "root" in changes else global_config
        return load_routine(routine).train(*(sets or datasets), rich_config | changes, root)

    return train


@pytest.fixture
def interrupt(fit, global_config) -> Callable[..., str]:
    """Interrupt a training in its forward pass of this number. Return its name."""

    def train(at: int, *args: Any, **changes: Any) -> str:
        with pytest.raises(KeyboardInterrupt):
            fit(*args, interrupt_at=at, **changes)
        (name,) = (row["NAME"] for row in rows_of(global_config) if row["STATUS"] == "interrupted")
        return name

    return train


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    return {}


@pytest.fixture
def expected(fit, tmp_path, uninterrupted) -> dict[str, Any]:
    """What the first routine leaves of the rich config when nothing interrupts it."""
    if not uninterrupted:
        uninterrupted.update(what_is_left(fit(FIRST, root=tmp_path / "uninterrupted")))
    return uninterrupted


def what_is_left(result) -> dict[str, Any]:
    """Return all that must be as if nothing had happened."""
    (row,) = [row for row in rows_of({"LOG_DIR": str(result.log_dir.parent)}) if row["NAME"] == result.name]
    events = events_of(result.log_dir, "step", "epoch", "test")
    while not differing(events[-1], events[-2]):  # tested again: a finished run was resumed
        events.pop()
    return {
        "digest": result.digest,
        "last": load_weights(result.weights["last"]),
        "best": load_weights(result.weights["best"]),
        "state": asdict(result.state),
        "metrics": result.metrics,
        "history": result.history,
        "events": events,
        "scalars": scalars_of(result.log_dir),
        "row": {key: value for key, value in row.items() if key not in ("NAME", "ROUTINE_NAME")},
    }


def assert_same_end(result, expected, leaving_out: tuple[str, ...] = ()) -> None:
    left, wanted = (one if isinstance(one, dict) else what_is_left(one) for one in (result, expected))
    parts = [part for part in wanted if part not in leaving_out]
    assert {part: places[:9] for part in parts if (places := differing(left[part], wanted[part]))} == {}


# ------------------------------------------------------------------------------------------- at every step


class Noisy(Dataset):
    """Images (3, 8, 8) with masks, and with other noise each time one is read."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(8, 8, dtype=torch.int64)
        mask[index % 5 :, index % 7 :] = 1 + index % 2
        signal = nn.functional.one_hot(mask, 3).movedim(-1, 0) * np.random.rand()
        return 0.5 * torch.randn(3, 8, 8) + signal, mask


# Before the first step, and after each one; after an epoch's last one, also its results and what follows;
# at the end, also what is fitted, and the test's results.
MOMENTS = Counter([*range(37), 12, 12, 24, 24, 36, 36, 36, 36])
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("fit", "workers", "seconds", "moments", "chosen"),
    [
        pytest.param(FIRST, 0, 0, MOMENTS, slice(None, None, 7), id=f"some-{FIRST}"),
        *(pytest.param(name, 0, 0, MOMENTS, slice(5, 14, 8), id=f"two-{name}") for name in OTHERS),
        pytest.param(FIRST, 2, 1000, {0: 14, 12: 27, 36: 3}, slice(9, 39, 29), id="workers-few-checkpoints"),
        pytest.param(FIRST, 0, 0, MOMENTS, slice(None), marks=slow, id="all"),
        pytest.param(FIRST, 2, 0, MOMENTS, slice(None, None, 4), marks=slow, id="workers"),
        *(pytest.param(n, 0, 0, MOMENTS, slice(0, None, 4), marks=slow, id=f"many-{n}") for n in OTHERS),
    ],
    indirect=["fit"],
)
def test_ended_at_any_moment_it_ends_the_same(fit, rich_config, tmp_path, workers, seconds, moments, chosen):
    """All files are copied when they have changed, as a process killed then would leave them."""
    rich_config |= {"DATASET": Noisy, "DATASET_CONFIG": {"train": {"number": 27}, "test": {"number": 1}}}
    rich_config |= {
        "ACCUMULATE": 1,
        "VALIDATION_FRACTION": 0.1,
        "METRICS": {"f1": rich_config["METRICS"]["f1"]},
    }
    rich_config["DATA_LOADER_CONFIG"] = {"batch_size": 2, "shuffle": True, "num_workers": workers}
    sets, whole = (Noisy(27), Noisy(1)), tmp_path / "whole"
    copies: list[tuple[int, Path]] = []
    seen: list[Any] = []

    def look(_: bool) -> None:
        files = [*whole.glob("logs/*/journal.jsonl"), *(states := sorted(whole.glob("weights/*/*.pt")))]
        state = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
        if not state or state == seen:
            return
        seen[:] = state
        step = max((int(file.stem[5:]) for file in states if file.stem != "best"), default=0)
        copies.append((step, shutil.copytree(whole, tmp_path / f"copy-{len(copies)}")))

    InterruptedNet.look = look
    fit(sets=sets, root=whole, CHECKPOINT_SECONDS=seconds)
    InterruptedNet.look = None
    assert Counter(step for step, _ in copies) == moments
    # How often a run is saved makes no difference.
    expected = what_is_left(fit(sets=sets, root=tmp_path / "expected", CHECKPOINT_SECONDS=1000))
    assert [step for step, _ in expected["scalars"]["train/loss"]] == list(range(1, 37))
    for step, folder in copies[chosen]:
        result = fit(sets=sets, root=folder, CHECKPOINT_SECONDS=1000, RESUME="2021-01-01_tiny")
        assert_same_end(result, expected)
        assert [event["step"] for event in events_of(result.log_dir, "start")] == [0, step]
        assert [row["STATUS"] for row in rows_of(global_config_of(folder))] == ["finished"]


# ------------------------------------------------------------------------------------ what a routine meets


def test_twice_in_one_epoch_and_with_other_workers(fit, interrupt, rich_config, expected, global_config):
    name = interrupt(9)
    loader = rich_config["DATA_LOADER_CONFIG"] | {"num_workers": 2}
    interrupt(3, RESUME=name, DATA_LOADER_CONFIG=loader)
    assert_same_end(fit(RESUME=name), expected)
    assert [row["STATUS"] for row in rows_of(global_config)] == ["finished"]


@pytest.mark.parametrize(
    ("fit", "at", "step", "epoch"),
    [
        pytest.param(FIRST, 2, 3, 0, id="second-validation-image"),
        pytest.param(FIRST, 3, 3, 1, id="pictures-after-the-epochs-results"),
        pytest.param(FIRST, 14, 9, 2, id=f"last-validation-{FIRST}"),
        *(pytest.param(name, 14, 9, 2, marks=slow, id=f"last-validation-{name}") for name in OTHERS),
        pytest.param(FIRST, 20, 9, 3, id="second-test-image"),
    ],
    indirect=["fit"],
)
def test_an_interruption_of_an_evaluation(fit, interrupt, expected, global_config, at, step, epoch):
    evaluated = 0

    def look(training: bool) -> None:
        nonlocal evaluated
        evaluated += not training and InterruptedNet.forwards > 0  # not in the dry run before
        if evaluated == at:
            raise KeyboardInterrupt

    InterruptedNet.look = look
    name = interrupt(0)
    InterruptedNet.look = None
    log_dir = Path(global_config["LOG_DIR"]) / name
    assert [len(events_of(log_dir, kind)) for kind in ("step", "epoch")] == [step, epoch]
    assert_same_end(fit(RESUME=name), expected)


def test_before_the_first_checkpoint_it_starts_again_under_its_name(fit, interrupt, expected, capsys):
    name = interrupt(5, CHECKPOINT_SECONDS=1000)
    result = fit(RESUME=name)
    assert result.name == name and "starts again" in capsys.readouterr().out
    assert_same_end(result, expected)


PAIRS = [(before, after) for before in ROUTINES for after in ROUTINES if before != after]
RING = list(zip(ROUTINES, [*ROUTINES[1:], ROUTINES[0]], strict=True))


@pytest.mark.parametrize(
    ("before", "fit"), [p if p in RING else pytest.param(*p, marks=slow) for p in PAIRS], indirect=["fit"]
)
def test_what_one_routine_began_another_ends(fit, interrupt, expected, global_config, before):
    name = interrupt(10, before)
    (row,) = rows_of(global_config)
    assert row["ROUTINE_NAME"] == f".training.{before}_training"
    result = fit(RESUME="auto", __COMMENT="of another routine")
    assert result.name == name
    assert_same_end(result, expected | {"row": expected["row"] | {"__COMMENT": "of another routine"}})


# ------------------------------------------------------------------------------------ finished, prolonged


def test_a_finished_run_is_only_tested_again_or_prolonged_as_if_it_had_been_longer(fit, tmp_path):
    expected = fit(SCHEDULER=None, EPOCHS=4, root=tmp_path / "expected")
    short = fit(SCHEDULER=None, EPOCHS=2)
    left = what_is_left(short)
    again = fit(SCHEDULER=None, EPOCHS=2, RESUME=short.name)
    assert InterruptedNet.forwards == 0
    assert differing(what_is_left(again), left) == []  # also in TensorBoard, where no step stands twice
    longer = fit(SCHEDULER=None, EPOCHS=4, RESUME=short.name)
    assert longer.name == short.name
    assert_same_end(longer, expected, leaving_out=("events", "scalars"))  # where the first test result stays
    assert [event["step"] for event in events_of(longer.log_dir, "step")] == list(range(1, 13))
    scalars = scalars_of(longer.log_dir)
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in scalars["validation/f1"]] == [3, 6, 9, 12]


def test_a_prolonged_schedule_is_that_of_the_new_length(fit):
    long, short = fit(EPOCHS=6), fit(EPOCHS=3)
    prolonged = fit(EPOCHS=6, RESUME=short.name)
    rates = [[e["learning_rate"] for e in events_of(one.log_dir, "step")] for one in (long, prolonged)]
    assert rates[0][10:] == pytest.approx(rates[1][10:])
    assert rates[0][:9] != pytest.approx(rates[1][:9])


@pytest.mark.parametrize("fit", [FIRST, *(pytest.param(n, marks=slow) for n in OTHERS)], indirect=True)
def test_a_run_that_stopped_early_can_be_prolonged(fit):
    changes = {"PATIENCE": 1, "OPTIMIZER_CONFIG": {"lr": 0.0}, "SCHEDULER": None, "EMA": None}
    stopped = fit(EPOCHS=10, **changes)
    assert stopped.state.epoch < 10
    again = fit(EPOCHS=10, RESUME=stopped.name, **changes)
    assert (again.state.epoch, InterruptedNet.forwards) == (stopped.state.epoch, 0)
    again = fit(EPOCHS=12, RESUME=stopped.name, **changes)
    assert again.state.epoch > stopped.state.epoch


# ---------------------------------------------------------------------------------------------- RESUME=auto


def test_auto_begins_resumes_under_the_name_and_begins_anew(fit, interrupt, expected, global_config):
    name = interrupt(9, RESUME="auto")
    other = fit(RESUME="auto", OPTIMIZER_CONFIG={"lr": 2e-2})
    assert other.name != name
    result = fit(RESUME="auto")
    assert result.name == name
    assert_same_end(result, expected)
    again = fit(RESUME="auto", DATE="another day")
    assert (again.name, again.digest) == ("another-day_tiny", result.digest)
    assert [row["STATUS"] for row in rows_of(global_config)] == ["finished"] * 3


def test_auto_takes_the_newest_of_the_same_config_and_none_that_is_in_training(rich_config, tmp_path):
    def captured(**changes: Any) -> dict[str, Any]:
        return check(rich_config | changes, project_of(PACKAGE))

    config = captured()["config"]
    for hours, name in enumerate("cba"):
        begin_run(tmp_path, name, hours, **config).close()
    assert find_unfinished(tmp_path, captured()) == "c"
    loader = rich_config["DATA_LOADER_CONFIG"] | {"num_workers": 2}
    free = {"DATA_LOADER_CONFIG": loader, "CHECKPOINT_SECONDS": 7, "__COMMENT": "again", "DEVICE": "auto"}
    assert find_unfinished(tmp_path, captured(**free)) == "c"
    unet = {"MODEL": UNET, "MODEL_CONFIG": {"ch_in": 3, "ch_out": 3}}
    for changes in ({"OPTIMIZER_CONFIG": {"lr": 2}}, {"SEED": 1}, {"SESSION_NAME": "a"}, {"EPOCHS": 4}, unet):
        assert find_unfinished(tmp_path, captured(**changes)) is None
    with FileLock(tmp_path / "c" / ".lock"):
        assert find_unfinished(tmp_path, captured()) == "b"
        with FileLock(tmp_path / "b" / ".lock"), FileLock(tmp_path / "a" / ".lock"):
            assert find_unfinished(tmp_path, captured()) is None


# ------------------------------------------------------------------------------------------- locked, changed


def test_a_run_in_training_is_locked_and_leftovers_are_removed(fit, interrupt, global_config):
    name = interrupt(5)
    folders = [Path(global_config[key]) / name for key in ("LOG_DIR", "WEIGHT_DIR")]
    for folder in folders:  # what a killed process was writing
        (folder / ".last-00000004.pt.0123.tmp").write_bytes(b"half of it")
    with FileLock(folders[0] / ".lock"), pytest.raises(UserError, match="trained by another process"):
        fit(RESUME=name)
    fit(RESUME=name)
    assert not [file for folder in folders for file in folder.glob(".*.tmp")]
    assert len(checkpoint_files(folders[1])) == 2


def test_another_config_is_refused_and_another_machine_or_data_reported(
    fit, interrupt, pairs_dir, datasets, global_config, tmp_path, capsys
):
    folder = shutil.copytree(pairs_dir / "train", tmp_path / "train")
    name = interrupt(9, sets=(NpyDataset(folder / "x", folder / "y", crop=16), datasets[1]))
    file = Path(global_config["LOG_DIR"]) / name / "config.json"
    record = file.read_bytes()
    with pytest.raises(ConfigError) as caught:
        fit(RESUME=name, LOSS=nn.CrossEntropyLoss, OPTIMIZER_CONFIG={"lr": 0.5})
    assert "OPTIMIZER_CONFIG.lr was" in str(caught.value) and "LOSS was" in str(caught.value)
    assert record == file.read_bytes()
    for image in (folder / "x").iterdir():
        np.save(image, np.load(image) // 2)
    sets = NpyDataset(folder / "x", folder / "y", crop=16), datasets[1]
    with pytest.raises(
        ConfigError, match=r"10 files of the data .* train/x/image_00\.npy: that would be another"
    ):
        fit(RESUME=name, sets=sets)
    assert record == file.read_bytes()
    fit(RESUME=name, sets=sets, CHANNELS_LAST=False, REQUIRE_RERUNNABLE=False)
    printed = capsys.readouterr().out
    (row,) = rows_of(global_config)
    assert (row["RESUMED_WITH"], row["RERUNNABLE"][:3]) == ("another data", "no:")
    assert "resumes with another CHANNELS_LAST" in printed
    assert "the training data is not what it was" in printed


def test_a_key_that_is_newer_than_a_run_had_its_default(fit, interrupt, monkeypatch):
    name = interrupt(9)
    monkeypatch.setitem(KEYS, "MY_WEIGHT", Key(0.5, NUMBER, "weight of a second loss"))
    with pytest.raises(ConfigError, match=r"MY_WEIGHT was 0\.5 and is now 0\.25"):
        fit(RESUME=name, MY_WEIGHT=0.25)
    assert fit(RESUME=name).name == name
