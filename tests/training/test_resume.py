"""A run that was interrupted ends as the run that was not: weights, results, journal, TensorBoard, row."""

import importlib
import pkgutil
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset

from dida_tools import training
from dida_tools.config.config import make_global_config
from dida_tools.config.errors import ConfigError, UserError
from dida_tools.models import UNET
from dida_tools.training.checkpoint import checkpoint_files
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.logging import read_log
from dida_tools.utils.logging.journal import read_journal
from dida_tools.utils.weights import load_weights

pytestmark = pytest.mark.usefixtures("quick")

ROUTINES = [
    module.name for module in pkgutil.iter_modules(training.__path__) if module.name.endswith("_training")
]
FIRST = "pytorch_training" if "pytorch_training" in ROUTINES else ROUTINES[0]
# What the clock and the process put into otherwise equal events, rows and states.
OWN = {"time", "seconds", "pid", "PID", "STARTED", "HEARTBEAT", "SECONDS"}
UNET_CONFIG = {"ch_in": 3, "ch_out": 3, "bulk_ch": 4, "n_recursions": 1, "dropout": 0.1}


def load(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"{training.__name__}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(training.__name__.partition(".")[0]):
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")


class Interrupted(nn.Module):
    """Raises KeyboardInterrupt in a chosen forward pass of training, as a second Ctrl-C would."""

    interrupt_at: int | None = None
    forwards = 0
    look: Callable[[bool], None] | None = (
        None  # called before each forward pass, with whether it is one of training
    )

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
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ELU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(4, 3, 1),
        )


@pytest.fixture(params=ROUTINES)
def train(request) -> Callable[..., Any]:
    """Each routine's."""
    return load(request.param).train


@pytest.fixture
def train_first() -> Callable[..., Any]:
    """One routine's, for what is the same code in all of them."""
    return load(FIRST).train


@pytest.fixture(autouse=True)
def no_interruption():
    Interrupted.interrupt_at, Interrupted.forwards, Interrupted.look = None, 0, None


@pytest.fixture
def rich_config(tiny_config) -> dict:
    """Everything that has a state: momentum, schedule, accumulation, moving average, dropout, augmentation."""
    tiny_config |= {
        "MODEL": InterruptedNet,
        "MODEL_CONFIG": {},
        "EPOCHS": 3,
        "ACCUMULATE": 2,
        "EMA": 0.9,
        "CLIP_NORM": 1.0,
    }
    tiny_config |= {"SCHEDULER": OneCycleLR, "CHECKPOINT_SECONDS": 0, "DATE": "2021-01-01"}
    tiny_config |= {"DATA_LOADER_CONFIG": {"batch_size": 3, "shuffle": True, "num_workers": 0}}
    return tiny_config


@pytest.fixture(scope="module")
def wholes() -> dict[str, dict[str, Any]]:
    """What each routine leaves of the rich config."""
    return {}


@pytest.fixture
def expected(train, datasets, rich_config, tmp_path, wholes) -> dict[str, Any]:
    """What the routine leaves of the rich config when nothing interrupts it."""
    if train.__module__ not in wholes:
        wholes[train.__module__] = what_is_left(
            train(*datasets, rich_config, make_global_config(tmp_path / "whole"))
        )
    return wholes[train.__module__]


def interrupt(train, datasets, config: dict, global_config: dict, at: int) -> str:
    Interrupted.interrupt_at, Interrupted.forwards = at, 0
    with pytest.raises(KeyboardInterrupt):
        train(*datasets, config, global_config)
    Interrupted.interrupt_at = None
    return config.get("RESUME") or rows_of(global_config)[-1]["NAME"]


def rows_of(global_config: dict) -> list[dict]:
    return read_log(Path(global_config["LOG_DIR"]) / "experiments.csv")


def scalars_of(result) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.log_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def what_is_left(result) -> dict[str, Any]:
    """All that must be as if nothing had happened."""
    events = read_journal(result.log_dir / "journal.jsonl")
    (row,) = [
        row for row in read_log(result.log_dir.parent / "experiments.csv") if row["NAME"] == result.name
    ]
    return {
        "digest": result.digest,
        "last": load_weights(result.weights["last"]),
        "best": load_weights(result.weights["best"]),
        "state": asdict(result.state),
        "metrics": result.metrics,
        "history": result.history,
        "events": [event for event in events if event["event"] not in ("start", "end")],
        "scalars": scalars_of(result),
        "row": {key: value for key, value in row.items() if key != "NAME"},
    }


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """All that nested values hold, by place: tensors by their bits, numbers as written, so that 1, 1.0, -0.0 differ."""
    if isinstance(value, dict | list | tuple):
        items = [
            (key, item) for key, item in (value.items() if isinstance(value, dict) else enumerate(value))
        ]
        items = [(key, item) for key, item in items if key not in OWN]
        found = {path: f"{type(value).__name__} of {len(items)}"}
        for key, item in items:
            found |= leaves(item, f"{path}/{key}")
        return found
    if isinstance(value, Tensor):
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {path: (str(value.dtype), tuple(value.shape), bits)}
    return {path: repr(value)}


def differing(one: Any, other: Any) -> list[str]:
    ones, others = leaves(one), leaves(other)
    return [place for place in ones | others if ones.get(place) != others.get(place)]


def assert_same_end(result, expected, leaving_out: tuple[str, ...] = ()) -> None:
    left, wanted = (one if isinstance(one, dict) else what_is_left(one) for one in (result, expected))
    parts = [part for part in wanted if part not in leaving_out]
    assert {part: places[:9] for part in parts if (places := differing(left[part], wanted[part]))} == {}


# -------------------------------------------------------------------------------------------------------- at every step


class Noisy(Dataset):
    """Images (3, 8, 8) with masks, and with other noise each time one is read."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(8, 8, dtype=torch.int64)
        mask[index % 5 :, index % 7 :] = 1 + index % 2
        return 0.5 * torch.randn(3, 8, 8) + nn.functional.one_hot(mask, 3).movedim(
            -1, 0
        ) * np.random.rand(), mask


@pytest.fixture
def long_training(rich_config):
    """Twelve steps in each of three epochs."""
    data = {"DATASET": Noisy, "DATASET_CONFIG": {"train": {"number": 27}, "test": {"number": 1}}}
    loader = {"batch_size": 2, "shuffle": True, "num_workers": 0}
    metrics = {"f1": rich_config["METRICS"]["f1"]}
    changes = {"ACCUMULATE": 1, "VALIDATION_FRACTION": 0.1, "DATA_LOADER_CONFIG": loader, "METRICS": metrics}
    return (Noisy(27), Noisy(1)), rich_config | data | changes


def train_with_copies(train, sets, config: dict, folder: Path) -> list[tuple[int, Path]]:
    """Trains, and copies all files when they have changed, as a process killed then would leave them."""
    global_config = make_global_config(folder / "whole")
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
    config = config | {
        "CHECKPOINT_SECONDS": 1000
    }  # how often a run is saved may change, and makes no difference
    expected = what_is_left(train(*sets, config, make_global_config(tmp_path / "expected")))
    assert [step for step, _ in expected["scalars"]["train/loss"]] == list(range(1, 37))
    for step, folder in copies:
        result = train(*sets, config | {"RESUME": "2021-01-01_tiny"}, make_global_config(folder))
        assert_same_end(result, expected)
        starts = [
            event for event in read_journal(result.log_dir / "journal.jsonl") if event["event"] == "start"
        ]
        assert [event["step"] for event in starts] == [0, step]
        assert [row["STATUS"] for row in rows_of(make_global_config(folder))] == ["finished"]


@pytest.mark.parametrize(
    ("workers", "every"),
    # By default, each moment of one routine, and every third one of those that share its code for it.
    [(0, 3), pytest.param(0, 1, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)],
)
def test_ended_at_any_moment_it_goes_on_from_there_and_ends_the_same(
    train, long_training, tmp_path, workers, every
):
    sets, config = long_training
    config["DATA_LOADER_CONFIG"]["num_workers"] = workers
    copies = train_with_copies(train, sets, config, tmp_path)
    # Before the first step, and after each one; after an epoch's last one, its results and what follows on them, too;
    # at the end, also what is fitted.
    assert Counter(step for step, _ in copies) == Counter([*range(37), 12, 12, 24, 24, 36, 36, 36])
    every = 1 if train.__module__.endswith(FIRST) else every
    assert_each_copy_ends_as_the_whole(train, sets, config, copies[::every], tmp_path)


def test_a_few_of_these_moments_with_workers(train, long_training, tmp_path):
    sets, config = long_training
    config["DATA_LOADER_CONFIG"]["num_workers"] = 2
    copies = train_with_copies(train, sets, config, tmp_path)
    assert_each_copy_ends_as_the_whole(train, sets, config, [copies[at] for at in (7, 30)], tmp_path)


def test_with_few_checkpoints_what_was_done_since_is_done_again(train, long_training, tmp_path):
    sets, config = long_training
    copies = train_with_copies(train, sets, config | {"CHECKPOINT_SECONDS": 1000}, tmp_path)
    assert Counter(step for step, _ in copies) == {0: 14, 12: 27, 36: 2}
    chosen = [copies[at] for at in (9, 22, 38)]
    assert_each_copy_ends_as_the_whole(train, sets, config, chosen, tmp_path)


@pytest.mark.parametrize(
    "train",
    [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in ROUTINES if name != FIRST)],
    indirect=True,
)
def test_interrupted_at_every_batch_it_ends_the_same(train, datasets, rich_config, global_config, expected):
    assert [step for step, _ in expected["scalars"]["train/loss"]] == list(range(1, 10))
    assert [step for step, _ in expected["scalars"]["validation/f1"]] == [3, 6, 9]
    for at in range(1, 19):
        name = interrupt(train, datasets, rich_config, global_config, at)
        result = train(*datasets, rich_config | {"RESUME": name}, global_config)
        assert result.name == name
        assert_same_end(result, expected)


# ------------------------------------------------------------------------------------------------- what a routine meets


def test_twice_in_one_epoch_and_with_other_workers(train, datasets, rich_config, global_config, expected):
    name = interrupt(train, datasets, rich_config, global_config, at=9)
    assert rows_of(global_config)[-1]["STATUS"] == "interrupted"
    with_workers = rich_config | {
        "DATA_LOADER_CONFIG": rich_config["DATA_LOADER_CONFIG"] | {"num_workers": 2}
    }
    interrupt(train, datasets, with_workers | {"RESUME": name}, global_config, at=3)
    result = train(*datasets, rich_config | {"RESUME": name}, global_config)
    assert_same_end(result, expected)
    assert [row["STATUS"] for row in rows_of(global_config) if row["NAME"] == name] == ["finished"]


@pytest.mark.parametrize("at", [7, 13])
def test_at_an_epochs_boundary(train, datasets, rich_config, global_config, expected, at):
    name = interrupt(train, datasets, rich_config, global_config, at)
    assert rows_of(global_config)[-1]["EPOCH"] == at // 6
    assert_same_end(train(*datasets, rich_config | {"RESUME": name}, global_config), expected)


@pytest.mark.parametrize(
    ("at", "step", "epoch"),
    [
        pytest.param(2, 3, 0, id="second-validation-image"),
        pytest.param(3, 3, 1, id="pictures-after-the-epochs-results"),
        pytest.param(14, 9, 2, id="last-validation"),
        pytest.param(20, 9, 3, id="second-test-image"),
    ],
)
def test_an_interruption_of_an_evaluation(
    train, datasets, rich_config, global_config, expected, at, step, epoch
):
    evaluated = 0

    def look(training: bool) -> None:
        nonlocal evaluated
        evaluated += not training and Interrupted.forwards > 0  # not in the rehearsal before
        if evaluated == at:
            raise KeyboardInterrupt

    Interrupted.look = look
    with pytest.raises(KeyboardInterrupt):
        train(*datasets, rich_config, global_config)
    Interrupted.look = None
    (row,) = rows_of(global_config)
    assert row["STATUS"] == "interrupted"
    events = read_journal(Path(global_config["LOG_DIR"]) / row["NAME"] / "journal.jsonl")
    assert [sum(event["event"] == kind for event in events) for kind in ("step", "epoch")] == [step, epoch]
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


def test_a_finished_run_is_prolonged_as_if_it_had_been_longer(train, datasets, rich_config, global_config):
    rich_config["SCHEDULER"] = None
    expected = train(*datasets, rich_config | {"EPOCHS": 4}, global_config)
    short = train(*datasets, rich_config | {"EPOCHS": 2}, global_config)
    longer = train(*datasets, rich_config | {"EPOCHS": 4, "RESUME": short.name}, global_config)
    assert longer.name == short.name
    assert_same_end(longer, expected, leaving_out=("events", "scalars"))  # where the first test result stays
    assert [event["step"] for event in steps_of(longer)] == list(range(1, 13))
    assert [step for step, _ in scalars_of(longer)["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in scalars_of(longer)["validation/f1"]] == [3, 6, 9, 12]
    assert [row["EPOCHS"] for row in rows_of(global_config) if row["NAME"] == short.name] == [4]


def steps_of(result) -> list[dict]:
    return [event for event in read_journal(result.log_dir / "journal.jsonl") if event["event"] == "step"]


def test_a_finished_run_is_only_tested_again(train, datasets, rich_config, global_config):
    finished = train(*datasets, rich_config, global_config)
    expected = what_is_left(finished)
    forwards = Interrupted.forwards
    again = train(*datasets, rich_config | {"RESUME": finished.name}, global_config)
    assert Interrupted.forwards == forwards
    left = what_is_left(again)
    assert left["events"].pop()["event"] == "test"
    assert differing(left | {"scalars": None}, expected | {"scalars": None}) == []


def test_a_prolonged_schedule_is_that_of_the_new_length(train_first, datasets, rich_config, global_config):
    long = train_first(*datasets, rich_config | {"EPOCHS": 6}, global_config)
    short = train_first(*datasets, rich_config | {"EPOCHS": 3}, global_config)
    prolonged = train_first(*datasets, rich_config | {"EPOCHS": 6, "RESUME": short.name}, global_config)
    rates = [[event["learning_rate"] for event in steps_of(one)] for one in (long, prolonged)]
    assert rates[0][10:] == pytest.approx(rates[1][10:])
    assert rates[0][:9] != pytest.approx(rates[1][:9])


def test_a_run_that_stopped_early_can_go_on(train, datasets, rich_config, global_config):
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


@pytest.mark.parametrize("before", ROUTINES)
def test_what_one_routine_began_another_ends(train, datasets, rich_config, global_config, expected, before):
    name = interrupt(load(before).train, datasets, rich_config, global_config, at=10)
    assert rows_of(global_config)[-1]["ROUTINE_NAME"] == f".training.{before}"
    result = train(*datasets, rich_config | {"RESUME": name}, global_config)
    assert result.name == name
    assert_same_end(result, expected)


# --------------------------------------------------------------------------------------- started again, and RESUME=auto


def test_auto_begins_goes_on_under_the_name_and_begins_anew(
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
def test_auto_leaves_a_run_of_another_config_alone(
    train_first, datasets, rich_config, global_config, changes
):
    name = interrupt(train_first, datasets, rich_config, global_config, at=5)
    before = read_journal(Path(global_config["LOG_DIR"]) / name / "journal.jsonl")
    result = train_first(*datasets, rich_config | {"RESUME": "auto"} | changes, global_config)
    assert result.name != name
    assert read_journal(Path(global_config["LOG_DIR"]) / name / "journal.jsonl") == before
    assert {row["NAME"]: row["STATUS"] for row in rows_of(global_config)} == {
        name: "interrupted", result.name: "finished"
    }  # fmt: skip


def test_auto_takes_up_what_another_routine_or_machine_began(
    train_first, datasets, rich_config, global_config
):
    name = interrupt(load(ROUTINES[0]).train, datasets, rich_config, global_config, at=5)
    loader = rich_config["DATA_LOADER_CONFIG"] | {"num_workers": 2}
    changes = {"DATA_LOADER_CONFIG": loader, "CHECKPOINT_SECONDS": 7, "__COMMENT": "again"}
    result = train_first(*datasets, rich_config | {"RESUME": "auto"} | changes, global_config)
    assert result.name == name


def test_auto_takes_the_newest_and_none_that_is_being_trained(
    train_first, datasets, rich_config, global_config
):
    names = [interrupt(train_first, datasets, rich_config, global_config, at=5) for _ in range(3)]
    assert len(set(names)) == 3
    with FileLock(Path(global_config["LOG_DIR"]) / names[2] / ".lock"):
        result = train_first(*datasets, rich_config | {"RESUME": "auto"}, global_config)
    assert result.name == names[1]
    with (
        FileLock(Path(global_config["LOG_DIR"]) / names[0] / ".lock"),
        FileLock(Path(global_config["LOG_DIR"]) / names[2] / ".lock"),
    ):
        assert train_first(*datasets, rich_config | {"RESUME": "auto"}, global_config).name not in names
    assert train_first(*datasets, rich_config | {"RESUME": "auto"}, global_config).name == names[2]


# --------------------------------------------------------------------------------------------- damaged, locked, changed


def test_a_damaged_checkpoint_is_said_and_the_one_before_used(
    train_first, datasets, rich_config, global_config, capsys
):
    expected = train_first(*datasets, rich_config, global_config)
    name = interrupt(train_first, datasets, rich_config, global_config, at=12)
    newest = max((Path(global_config["WEIGHT_DIR"]) / name).glob("last-*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    result = train_first(*datasets, rich_config | {"RESUME": name}, global_config)
    assert "damaged" in capsys.readouterr().out
    assert_same_end(result, expected)


def test_a_run_in_training_is_locked(train_first, datasets, rich_config, global_config):
    name = interrupt(train_first, datasets, rich_config, global_config, at=5)
    with (
        FileLock(Path(global_config["LOG_DIR"]) / name / ".lock"),
        pytest.raises(UserError, match="trained by another process"),
    ):
        train_first(*datasets, rich_config | {"RESUME": name}, global_config)


def test_another_config_is_refused_and_another_machine_said(
    train_first, datasets, rich_config, global_config, capsys
):
    name = interrupt(train_first, datasets, rich_config, global_config, at=9)
    record = (Path(global_config["LOG_DIR"]) / name / "config.json").read_bytes()
    loss, rich_config["LOSS"] = rich_config["LOSS"], nn.CrossEntropyLoss
    rich_config["OPTIMIZER_CONFIG"] = {"lr": 0.5}
    with pytest.raises(
        ConfigError, match=r"(?s)OPTIMIZER_CONFIG.lr was .* LOSS|LOSS .*OPTIMIZER_CONFIG.lr was"
    ):
        train_first(*datasets, rich_config | {"RESUME": name}, global_config)
    assert record == (Path(global_config["LOG_DIR"]) / name / "config.json").read_bytes()
    rich_config |= {"LOSS": loss, "OPTIMIZER_CONFIG": {"lr": 1e-2}}
    train_first(*datasets, rich_config | {"RESUME": name, "CHANNELS_LAST": False}, global_config)
    assert "goes on with another CHANNELS_LAST" in capsys.readouterr().out


def test_changed_data_is_said(train_first, datasets, pairs_dir, rich_config, global_config, tmp_path, capsys):
    folder = shutil.copytree(pairs_dir / "train", tmp_path / "train")
    own = NpyDataset(folder / "x", folder / "y", crop=16), datasets[1]
    name = interrupt(train_first, own, rich_config, global_config, at=9)
    for file in (folder / "x").iterdir():
        np.save(file, np.load(file) // 2)
    again = NpyDataset(folder / "x", folder / "y", crop=16), datasets[1]
    capsys.readouterr()
    train_first(*again, rich_config | {"RESUME": name}, global_config)
    assert "the training data is not what it was" in capsys.readouterr().out


def test_what_a_killed_process_was_writing_is_removed(train_first, datasets, rich_config, global_config):
    name = interrupt(train_first, datasets, rich_config, global_config, at=9)
    folders = [Path(global_config[key]) / name for key in ("LOG_DIR", "WEIGHT_DIR")]
    for folder in folders:
        (folder / ".last-00000004.pt.0123.tmp").write_bytes(b"half of it")
    train_first(*datasets, rich_config | {"RESUME": name}, global_config)
    assert not [file for folder in folders for file in folder.glob(".*.tmp")]
