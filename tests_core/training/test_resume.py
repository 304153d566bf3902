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
from dida_core.errors import ConfigError, UserError
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
    ROUTINES,
    bare,
    differing,
    events_of,
    global_config_of,
    load_routine,
    rows_of,
    scalars_of,
)

pytestmark = pytest.mark.usefixtures("quick")

UNET_CONFIG = {"ch_in": 3, "ch_out": 3, "bulk_ch": 4, "n_recursions": 1, "dropout": 0.1}
OTHERS = [routine for routine in ROUTINES if routine != FIRST]
# The routines share the code for it: the first one by default, the others in the slow tier.
first_by_default = pytest.mark.parametrize(
    "train", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)], indirect=True
)
every_routine = pytest.mark.parametrize("train", ROUTINES, indirect=True)


class Interrupted(nn.Module):
    """Raises KeyboardInterrupt in a chosen forward pass of training, as a second Ctrl-C would."""

    interrupt_at: int | None = None
    forwards = 0
    # Called before each forward pass, with whether it is one of training.
    look: Callable[[bool], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if Interrupted.look is not None:
            Interrupted.look(self.training)
        if self.training:
            Interrupted.forwards += 1
            if Interrupted.forwards == Interrupted.interrupt_at:
                raise KeyboardInterrupt
        return super().forward(x)


class InterruptedUNET(Interrupted, UNET):
    pass


class InterruptedNet(Interrupted, nn.Sequential):
    """What a U-Net is made of, in so few tensors that files of them are written and read quickly."""

    def __init__(self) -> None:
        conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(4), nn.ELU(), nn.Dropout2d(0.1), nn.Conv2d(4, 3, 1))


@pytest.fixture
def train(request) -> Callable[..., Any]:
    """The first routine's, or that of a parameter."""
    return load_routine(getattr(request, "param", FIRST)).train


@pytest.fixture(autouse=True)
def no_interruption():
    Interrupted.interrupt_at, Interrupted.forwards, Interrupted.look = None, 0, None


@pytest.fixture
def rich_config(tiny_config) -> dict:
    """Everything with a state: momentum, schedule, accumulation, moving average, dropout, augmentation."""
    tiny_config |= {"MODEL": InterruptedNet, "MODEL_CONFIG": {}, "EPOCHS": 3, "ACCUMULATE": 2, "EMA": 0.9}
    tiny_config |= {"CLIP_NORM": 1.0, "SCHEDULER": OneCycleLR, "CHECKPOINT_SECONDS": 0, "DATE": "2021-01-01"}
    tiny_config |= {"DATA_LOADER_CONFIG": {"batch_size": 3, "shuffle": True, "num_workers": 0}}
    return tiny_config


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, dict[str, Any]]:
    """What each routine leaves of the rich config."""
    return {}


@pytest.fixture
def expected(train, datasets, rich_config, tmp_path, uninterrupted) -> dict[str, Any]:
    """What the routine leaves of the rich config when nothing interrupts it."""
    if train.__module__ not in uninterrupted:
        result = train(*datasets, rich_config, global_config_of(tmp_path / "uninterrupted"))
        uninterrupted[train.__module__] = what_is_left(result)
    return uninterrupted[train.__module__]


def interrupt(train, datasets, config: dict, global_config: dict, at: int) -> str:
    """Interrupt a training in its forward pass of this number. Return its name."""
    Interrupted.interrupt_at, Interrupted.forwards = at, 0
    with pytest.raises(KeyboardInterrupt):
        train(*datasets, config, global_config)
    Interrupted.interrupt_at = None
    return config.get("RESUME") or rows_of(global_config)[-1]["NAME"]


def what_is_left(result) -> dict[str, Any]:
    """Return all that must be as if nothing had happened."""
    (row,) = [row for row in rows_of({"LOG_DIR": str(result.log_dir.parent)}) if row["NAME"] == result.name]
    events = events_of(result.log_dir, "step", "epoch", "test")
    while bare(events[-1]) == bare(events[-2]):  # tested again: a finished run was resumed
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
        "row": {key: value for key, value in row.items() if key != "NAME"},
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


@pytest.fixture
def long_training(rich_config):
    """Twelve steps in each of three epochs."""
    data = {"DATASET": Noisy, "DATASET_CONFIG": {"train": {"number": 27}, "test": {"number": 1}}}
    loader = {"batch_size": 2, "shuffle": True, "num_workers": 0}
    metrics = {"f1": rich_config["METRICS"]["f1"]}
    changes = {"ACCUMULATE": 1, "VALIDATION_FRACTION": 0.1, "DATA_LOADER_CONFIG": loader, "METRICS": metrics}
    return (Noisy(27), Noisy(1)), rich_config | data | changes


def train_with_copies(train, sets, config: dict, folder: Path) -> list[tuple[int, Path]]:
    """Train, and copy all files when they have changed, as a process killed then would leave them."""
    global_config = global_config_of(folder / "whole")
    log_dir, weight_dir = (Path(global_config[key]) / "2021-01-01_tiny" for key in ("LOG_DIR", "WEIGHT_DIR"))
    copies: list[tuple[int, Path]] = []
    seen: list = []

    def look(_: bool) -> None:
        files = [log_dir / "journal.jsonl", *weight_dir.glob("*.pt")]
        state = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]
        if not state or state == seen:
            return
        seen[:] = state
        step = max((int(file.stem[5:]) for file in checkpoint_files(weight_dir)), default=0)
        copies.append((step, shutil.copytree(folder / "whole", folder / f"copy-{len(copies)}")))

    Interrupted.look = look
    train(*sets, config, global_config)
    Interrupted.look = None
    return copies


def assert_each_copy_ends_as_the_whole(train, sets, config: dict, copies: list, tmp_path: Path) -> None:
    config = config | {"CHECKPOINT_SECONDS": 1000}  # how often a run is saved makes no difference
    expected = what_is_left(train(*sets, config, global_config_of(tmp_path / "expected")))
    assert [step for step, _ in expected["scalars"]["train/loss"]] == list(range(1, 37))
    for step, folder in copies:
        result = train(*sets, config | {"RESUME": "2021-01-01_tiny"}, global_config_of(folder))
        assert_same_end(result, expected)
        assert [event["step"] for event in events_of(result.log_dir, "start")] == [0, step]
        assert [row["STATUS"] for row in rows_of(global_config_of(folder))] == ["finished"]


SLOW = [(name, workers, 1) for name in ROUTINES for workers in (0, 2)]


@pytest.mark.parametrize(
    ("train", "workers", "every"),
    # By default, every third moment of the first routine, and three of each of the others.
    [(FIRST, 0, 3), *((name, 0, 15) for name in OTHERS)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
    indirect=["train"],
)
def test_ended_at_any_moment_it_ends_the_same(train, long_training, tmp_path, workers, every):
    sets, config = long_training
    config["DATA_LOADER_CONFIG"]["num_workers"] = workers
    copies = train_with_copies(train, sets, config, tmp_path)
    # Before the first step, and after each one; after an epoch's last one, also its results and what follows;
    # at the end, also what is fitted, and the test's results.
    assert Counter(step for step, _ in copies) == Counter([*range(37), 12, 12, 24, 24, 36, 36, 36, 36])
    assert_each_copy_ends_as_the_whole(train, sets, config, copies[::every], tmp_path)


@first_by_default
def test_with_workers_and_few_checkpoints_it_trains_again_since_the_last_one(train, long_training, tmp_path):
    sets, config = long_training
    config["DATA_LOADER_CONFIG"]["num_workers"] = 2
    copies = train_with_copies(train, sets, config | {"CHECKPOINT_SECONDS": 1000}, tmp_path)
    assert Counter(step for step, _ in copies) == {0: 14, 12: 27, 36: 3}
    chosen = [copies[at] for at in (9, 22, 38)]
    assert_each_copy_ends_as_the_whole(train, sets, config, chosen, tmp_path)


@pytest.mark.slow
@every_routine
def test_interrupted_at_every_batch_it_ends_the_same(train, datasets, rich_config, global_config, expected):
    for at in range(1, 19):
        name = interrupt(train, datasets, rich_config, global_config, at)
        result = train(*datasets, rich_config | {"RESUME": name}, global_config)
        assert result.name == name
        assert_same_end(result, expected)


# ------------------------------------------------------------------------------------ what a routine meets


@first_by_default
def test_twice_in_one_epoch_and_with_other_workers(train, datasets, rich_config, global_config, expected):
    name = interrupt(train, datasets, rich_config, global_config, at=9)
    assert rows_of(global_config)[-1]["STATUS"] == "interrupted"
    loader = rich_config["DATA_LOADER_CONFIG"] | {"num_workers": 2}
    with_workers = rich_config | {"DATA_LOADER_CONFIG": loader, "RESUME": name}
    interrupt(train, datasets, with_workers, global_config, at=3)
    result = train(*datasets, rich_config | {"RESUME": name}, global_config)
    assert_same_end(result, expected)
    assert [row["STATUS"] for row in rows_of(global_config) if row["NAME"] == name] == ["finished"]


@every_routine
def test_at_an_epochs_boundary(train, datasets, rich_config, global_config, expected):
    name = interrupt(train, datasets, rich_config, global_config, at=13)
    assert rows_of(global_config)[-1]["EPOCH"] == 2
    assert_same_end(train(*datasets, rich_config | {"RESUME": name}, global_config), expected)


@pytest.mark.parametrize(
    ("train", "at", "step", "epoch"),
    [
        pytest.param(FIRST, 2, 3, 0, id="second-validation-image"),
        pytest.param(FIRST, 3, 3, 1, id="pictures-after-the-epochs-results"),
        *(pytest.param(name, 14, 9, 2, id=f"last-validation-{name}") for name in ROUTINES),
        pytest.param(FIRST, 20, 9, 3, id="second-test-image"),
    ],
    indirect=["train"],
)
def test_an_interruption_of_an_evaluation(
    train, datasets, rich_config, global_config, expected, at, step, epoch
):
    evaluated = 0

    def look(training: bool) -> None:
        nonlocal evaluated
        evaluated += not training and Interrupted.forwards > 0  # not in the dry run before
        if evaluated == at:
            raise KeyboardInterrupt

    Interrupted.look = look
    with pytest.raises(KeyboardInterrupt):
        train(*datasets, rich_config, global_config)
    Interrupted.look = None
    (row,) = rows_of(global_config)
    assert row["STATUS"] == "interrupted"
    log_dir = Path(global_config["LOG_DIR"]) / row["NAME"]
    assert [len(events_of(log_dir, kind)) for kind in ("step", "epoch")] == [step, epoch]
    assert_same_end(train(*datasets, rich_config | {"RESUME": row["NAME"]}, global_config), expected)


def test_before_the_first_checkpoint_it_starts_again_under_its_name(
    train, datasets, rich_config, global_config, expected, capsys
):
    name = interrupt(train, datasets, rich_config | {"CHECKPOINT_SECONDS": 1000}, global_config, at=5)
    assert rows_of(global_config)[-1]["STATUS"] == "interrupted"
    result = train(*datasets, rich_config | {"RESUME": name}, global_config)
    assert result.name == name
    assert "starts again" in capsys.readouterr().out
    assert_same_end(result, expected)


@first_by_default
def test_a_finished_run_is_prolonged_as_if_it_had_been_longer(train, datasets, rich_config, global_config):
    rich_config["SCHEDULER"] = None
    expected = train(*datasets, rich_config | {"EPOCHS": 4}, global_config)
    short = train(*datasets, rich_config | {"EPOCHS": 2}, global_config)
    longer = train(*datasets, rich_config | {"EPOCHS": 4, "RESUME": short.name}, global_config)
    assert longer.name == short.name
    assert_same_end(longer, expected, leaving_out=("events", "scalars"))  # where the first test result stays
    assert [event["step"] for event in events_of(longer.log_dir, "step")] == list(range(1, 13))
    scalars = scalars_of(longer.log_dir)
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in scalars["validation/f1"]] == [3, 6, 9, 12]
    assert [row["EPOCHS"] for row in rows_of(global_config) if row["NAME"] == short.name] == [4]


@first_by_default
def test_a_finished_run_is_only_tested_again(train, datasets, rich_config, global_config):
    finished = train(*datasets, rich_config, global_config)
    expected, forwards = what_is_left(finished), Interrupted.forwards
    again = what_is_left(train(*datasets, rich_config | {"RESUME": finished.name}, global_config))
    assert Interrupted.forwards == forwards
    assert differing(again, expected) == []  # also in TensorBoard, where no step stands twice


def test_a_prolonged_schedule_is_that_of_the_new_length(train, datasets, rich_config, global_config):
    long = train(*datasets, rich_config | {"EPOCHS": 6}, global_config)
    short = train(*datasets, rich_config | {"EPOCHS": 3}, global_config)
    prolonged = train(*datasets, rich_config | {"EPOCHS": 6, "RESUME": short.name}, global_config)
    rates = [[e["learning_rate"] for e in events_of(one.log_dir, "step")] for one in (long, prolonged)]
    assert rates[0][10:] == pytest.approx(rates[1][10:])
    assert rates[0][:9] != pytest.approx(rates[1][:9])


@every_routine
def test_a_run_that_stopped_early_can_be_prolonged(train, datasets, rich_config, global_config):
    rich_config |= {
        "PATIENCE": 1,
        "EPOCHS": 10,
        "OPTIMIZER_CONFIG": {"lr": 0.0},
        "SCHEDULER": None,
        "EMA": None,
    }
    stopped = train(*datasets, rich_config, global_config)
    assert stopped.state.epoch < 10
    forwards = Interrupted.forwards
    again = train(*datasets, rich_config | {"RESUME": stopped.name}, global_config)
    assert (again.state.epoch, Interrupted.forwards) == (stopped.state.epoch, forwards)
    again = train(*datasets, rich_config | {"EPOCHS": 12, "RESUME": stopped.name}, global_config)
    assert again.state.epoch > stopped.state.epoch


@pytest.mark.parametrize(
    ("before", "train"),
    [
        pytest.param(one, other, marks=() if FIRST in (one, other) else pytest.mark.slow)
        for one in ROUTINES
        for other in ROUTINES
        if one != other
    ],
    indirect=["train"],
)
def test_what_one_routine_began_another_ends(train, datasets, rich_config, global_config, expected, before):
    name = interrupt(load_routine(before).train, datasets, rich_config, global_config, at=10)
    assert rows_of(global_config)[-1]["ROUTINE_NAME"] == f".training.{before}_training"
    result = train(*datasets, rich_config | {"RESUME": name}, global_config)
    assert result.name == name
    assert_same_end(result, expected)


# -------------------------------------------------------------------------- started again, and RESUME=auto


def test_auto_begins_resumes_under_the_name_and_begins_anew(
    train, datasets, rich_config, global_config, expected
):
    auto = rich_config | {"RESUME": "auto"}
    Interrupted.interrupt_at = Interrupted.forwards + 9
    with pytest.raises(KeyboardInterrupt):
        train(*datasets, auto, global_config)
    (row,) = rows_of(global_config)
    result = train(*datasets, auto, global_config)
    assert result.name == row["NAME"]
    assert_same_end(result, expected)
    again = train(*datasets, auto | {"DATE": "another day"}, global_config)
    assert (again.name, again.digest) == ("another-day_tiny", result.digest)
    assert [row["STATUS"] for row in rows_of(global_config)] == ["finished", "finished"]


@pytest.mark.parametrize(
    "changes",
    [
        {"OPTIMIZER_CONFIG": {"lr": 2e-2}},
        {"SEED": 1},
        {"SESSION_NAME": "another"},
        {"EPOCHS": 4},
        {"MODEL": InterruptedUNET, "MODEL_CONFIG": UNET_CONFIG},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_auto_leaves_a_run_of_another_config_alone(train, datasets, rich_config, global_config, changes):
    name = interrupt(train, datasets, rich_config, global_config, at=5)
    before = events_of(Path(global_config["LOG_DIR"]) / name)
    result = train(*datasets, rich_config | {"RESUME": "auto"} | changes, global_config)
    assert result.name != name
    assert events_of(Path(global_config["LOG_DIR"]) / name) == before
    statuses = {row["NAME"]: row["STATUS"] for row in rows_of(global_config)}
    assert statuses == {name: "interrupted", result.name: "finished"}


def test_auto_resumes_what_another_routine_or_machine_began(train, datasets, rich_config, global_config):
    name = interrupt(load_routine(ROUTINES[0]).train, datasets, rich_config, global_config, at=5)
    loader = rich_config["DATA_LOADER_CONFIG"] | {"num_workers": 2}
    changes = {"DATA_LOADER_CONFIG": loader, "CHECKPOINT_SECONDS": 7, "__COMMENT": "again"}
    result = train(*datasets, rich_config | {"RESUME": "auto"} | changes, global_config)
    assert result.name == name


def test_auto_takes_the_newest_and_none_that_is_in_training(train, datasets, rich_config, global_config):
    names = [interrupt(train, datasets, rich_config, global_config, at=5) for _ in range(3)]
    assert len(set(names)) == 3
    locks = [FileLock(Path(global_config["LOG_DIR"]) / name / ".lock") for name in names]
    auto = rich_config | {"RESUME": "auto"}
    with locks[2]:
        assert train(*datasets, auto, global_config).name == names[1]
    with locks[0], locks[2]:
        assert train(*datasets, auto, global_config).name not in names
    assert train(*datasets, auto, global_config).name == names[2]


# ---------------------------------------------------------------------------------- damaged, locked, changed


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    train, datasets, rich_config, global_config, expected, capsys
):
    name = interrupt(train, datasets, rich_config, global_config, at=12)
    newest = max((Path(global_config["WEIGHT_DIR"]) / name).glob("last-*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    result = train(*datasets, rich_config | {"RESUME": name}, global_config)
    assert "damaged" in capsys.readouterr().out
    assert_same_end(result, expected)


def test_a_run_in_training_is_locked_and_leftovers_are_removed(train, datasets, rich_config, global_config):
    name = interrupt(train, datasets, rich_config, global_config, at=5)
    folders = [Path(global_config[key]) / name for key in ("LOG_DIR", "WEIGHT_DIR")]
    for folder in folders:  # what a killed process was writing
        (folder / ".last-00000004.pt.0123.tmp").write_bytes(b"half of it")
    config = rich_config | {"RESUME": name}
    with FileLock(folders[0] / ".lock"), pytest.raises(UserError, match="trained by another process"):
        train(*datasets, config, global_config)
    train(*datasets, config, global_config)
    assert not [file for folder in folders for file in folder.glob(".*.tmp")]


def test_another_config_is_refused_and_another_machine_reported(
    train, datasets, rich_config, global_config, capsys
):
    name = interrupt(train, datasets, rich_config, global_config, at=9)
    file = Path(global_config["LOG_DIR"]) / name / "config.json"
    record, config = file.read_bytes(), rich_config | {"RESUME": name}
    with pytest.raises(ConfigError) as caught:
        changes = {"LOSS": nn.CrossEntropyLoss, "OPTIMIZER_CONFIG": {"lr": 0.5}}
        train(*datasets, config | changes, global_config)
    assert "OPTIMIZER_CONFIG.lr was" in str(caught.value) and "LOSS was" in str(caught.value)
    assert record == file.read_bytes()
    train(*datasets, config | {"CHANNELS_LAST": False}, global_config)
    assert "resumes with another CHANNELS_LAST" in capsys.readouterr().out


def test_changed_data_is_reported(train, datasets, pairs_dir, rich_config, global_config, tmp_path, capsys):
    folder = shutil.copytree(pairs_dir / "train", tmp_path / "train")
    own = NpyDataset(folder / "x", folder / "y", crop=16), datasets[1]
    name = interrupt(train, own, rich_config, global_config, at=9)
    for file in (folder / "x").iterdir():
        np.save(file, np.load(file) // 2)
    again = NpyDataset(folder / "x", folder / "y", crop=16), datasets[1]
    capsys.readouterr()
    train(*again, rich_config | {"RESUME": name}, global_config)
    assert "the training data is not what it was" in capsys.readouterr().out
