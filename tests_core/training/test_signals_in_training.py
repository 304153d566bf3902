"""A training that a signal ends has saved its last step, and resumes to the weights of an undisturbed one."""

import contextlib
import importlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.tensorboard  # here, so that processes forked from this one need not
from dida_core.errors import exit_code
from dida_core.prediction import predict
from dida_core.prediction.outputs import OutputFile
from dida_core.runs import run as run_module
from dida_core.storage.checkpoint import checkpoint_files
from dida_core.training.signals import EXIT_CODE, Preempted, stop_requested
from torch import Tensor

from dida_tools.config import config as config_module
from dida_tools.models import UNET

from tests.helpers import (
    FIRST,
    ROOT,
    ROUTINES,
    Child,
    events_of,
    global_config_of,
    load_routine,
    processes_of,
    rows_of,
    wait_until,
)

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
    pytest.mark.usefixtures("quick"),
]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
# What train.py is called with: 6 steps in 2 epochs, each of two batches.
KEYS = [f"MODEL_CONFIG.{one}" for one in ("bulk_ch=4", "n_recursions=1", "dropout=0.1", "norm=None")]
KEYS += ["DATASET_CONFIG.train.crop=16", "DATASET_CONFIG.train.crops_per_image=2"]
KEYS += ["DATA_LOADER_CONFIG.batch_size=3", "EPOCHS=2", "ACCUMULATE=2", "EMA=0.9"]
KEYS += ["PRECISION=fp32", "DEVICE=cpu", "CHECKPOINT_SECONDS=1000"]
WORKERS = "DATA_LOADER_CONFIG.num_workers="


EACH_ROUTINE = pytest.mark.parametrize(
    "routine", [pytest.param(one, marks=() if one == FIRST else pytest.mark.slow) for one in ROUTINES]
)
NAMES = [signum.name for signum in SIGNALS]


def handlers() -> list[Any]:
    return [signal.getsignal(signum) for signum in SIGNALS]


def steps_of(folders: dict[str, str], name: str) -> list[int]:
    return [event["step"] for event in events_of(Path(folders["LOG_DIR"]) / name, "step")]


def assert_saved(folders: dict[str, str], step: int) -> str:
    """Assert that there is one run, preempted after this step, which is saved. Return its name."""
    (row,) = rows_of(folders)
    name = row["NAME"]
    assert row["STATUS"] == "preempted"
    ends = events_of(Path(folders["LOG_DIR"]) / name, "end")
    assert ends and {event["status"] for event in ends} == {"preempted"}
    assert steps_of(folders, name) == list(range(1, step + 1))
    assert checkpoint_files(Path(folders["WEIGHT_DIR"]) / name)[0].name == f"last-{step:08d}.pt"
    assert not list(Path(folders["ROOT_PATH"]).rglob("*.tmp"))
    return name


# ---------------------------------------------------------------------------------- as a notebook calls it


class When:
    """When a process sends itself signals: the how manieth time that something happens."""

    place, at, signals, counted = "", 0, tuple[int, ...](), 0

    @classmethod
    def set(cls, place: str = "", at: int = 0, *signals: int) -> None:
        cls.place, cls.at, cls.signals, cls.counted = place, at, signals, 0

    @classmethod
    def comes(cls, place: str) -> None:
        cls.counted += place == cls.place
        if place == cls.place and cls.counted == cls.at:
            for signum in cls.signals:
                os.kill(os.getpid(), signum)


class SignaledUNET(UNET):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            When.comes("training")
        return super().forward(x)


def signaled_metric(pred: Tensor, target: Tensor) -> float:
    When.comes("evaluation")
    return float((pred.argmax(1) == target).float().mean())


def custom(*_: Any) -> None:
    """A handler of the user's own."""


@pytest.fixture
def config(tiny_config, monkeypatch) -> Iterator[dict[str, Any]]:
    """3 steps an epoch, each of two batches; what is saved is saved at the end, unless a signal comes."""
    When.set()
    original = run_module.Batches.__iter__

    def iterate(self: Any) -> Any:
        When.comes("batches")
        return original(self)

    monkeypatch.setattr(run_module.Batches, "__iter__", iterate)
    tiny_config |= {"MODEL": SignaledUNET, "ACCUMULATE": 2, "EMA": 0.9, "CHECKPOINT_SECONDS": 1000}
    tiny_config |= {"SCHEDULER": torch.optim.lr_scheduler.OneCycleLR}
    tiny_config["DATA_LOADER_CONFIG"] = {"batch_size": 3, "shuffle": True}
    tiny_config["METRICS"] = tiny_config["METRICS"] | {"signaled": signaled_metric}
    tiny_config["REQUIRE_RERUNNABLE"] = False  # a test's function has no place in a record
    originals = handlers()
    for signum in SIGNALS:
        signal.signal(signum, custom)
    yield tiny_config
    assert handlers() == [custom] * 3, "the handlers of before must come back, whatever happens"
    for signum, handler in zip(SIGNALS, originals, strict=True):
        signal.signal(signum, handler)


@pytest.fixture
def wanted(routine, config, datasets, tmp_path) -> tuple:
    """Digest and metrics of a training that nobody ends."""
    result = load_routine(routine).train(*datasets, config, global_config_of(tmp_path / "uninterrupted"))
    return result.digest, result.metrics


# Where the signals of one run come, and after which step it is saved. The metric is called twice in each dry
# run, for 2 validation samples in each epoch, and for 4 test samples. The second batch of a step ends it.
MOMENTS = [
    *[("batches", 1, 1), ("training", 1, 2), ("training", 2, 3), ("evaluation", 3, 3), ("evaluation", 3, 3)],
    *[("training", 6, 6), ("evaluation", 4, 6), ("evaluation", 6, 6)],
]


@EACH_ROUTINE
def test_after_a_signal_the_same_process_can_resume(routine, datasets, config, global_config, wanted):
    train, name = load_routine(routine).train, None
    for (place, at, step), signum in zip(MOMENTS, itertools.cycle(SIGNALS), strict=False):
        When.set(place, at, signum)
        with pytest.raises(Preempted, match="was received"):
            train(*datasets, config | {"RESUME": name}, global_config)
        assert not stop_requested() and handlers() == [custom] * 3
        name = assert_saved(global_config, step)
    When.set()
    result = train(*datasets, config | {"RESUME": name}, global_config)
    assert (result.name, (result.digest, result.metrics)) == (name, wanted)
    assert rows_of(global_config)[0]["STATUS"] == "finished"
    assert steps_of(global_config, name) == list(range(1, 7))


@pytest.mark.slow
@pytest.mark.parametrize(("routine", "num_workers"), list(itertools.product(ROUTINES, (0, 2))))
def test_at_any_moment(routine, num_workers, datasets, config, wanted, tmp_path):
    train = load_routine(routine).train
    config["DATA_LOADER_CONFIG"] |= {"num_workers": num_workers}
    moments = [("training", at) for at in range(1, 13)] + [("evaluation", at) for at in range(3, 11)]
    for (place, at), signum in zip(moments[:: 1 + num_workers], itertools.cycle(SIGNALS), strict=False):
        folders = global_config_of(tmp_path / f"{place}-{at}")
        When.set(place, at, signum)
        with pytest.raises(Preempted):
            train(*datasets, config, folders)
        When.set()
        result = train(*datasets, config | {"RESUME": rows_of(folders)[0]["NAME"]}, folders)
        assert (result.digest, result.metrics) == wanted, (place, at)


@EACH_ROUTINE
def test_a_second_interrupt_ends_at_once_and_a_thread_resumes(
    routine, datasets, config, global_config, wanted
):
    train, results = load_routine(routine).train, []
    When.set("training", 9, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(*datasets, config, global_config)
    (row,) = rows_of(global_config)
    assert handlers() == [custom] * 3 and row["STATUS"] == "interrupted"
    assert steps_of(global_config, row["NAME"]) == [1, 2, 3, 4]
    When.set()
    arguments = (*datasets, config | {"RESUME": row["NAME"]}, global_config)
    thread = threading.Thread(target=lambda: results.append(train(*arguments)))
    thread.start()
    thread.join()
    assert [(result.digest, result.metrics) for result in results] == [wanted]


# ----------------------------------------------------------------------------------- as train.py is started


def start(
    folder: Path, *arguments: str, patch: Callable[[], Any] = lambda: None, script: str = "train"
) -> Child:
    """Run a script in a process forked from this one: with its frameworks imported, it starts in no time."""

    def work() -> int:
        for signum in SIGNALS:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        config_module.global_config |= global_config_of(folder / "project")
        patch()
        sys.argv = [f"{script}.py", *arguments]
        sys.modules["__main__"].__file__ = sys.argv[0]
        return exit_code(importlib.import_module(script).main)

    return Child(work, folder / f"log-{time.monotonic_ns()}")


def assert_ends(child: Child, code: int, seconds: float = 60) -> str:
    """Assert with which code a process ends, with its data loading processes. Return what it said."""
    try:
        assert child.wait(seconds), f"it has not ended:\n{child.said()}"
        assert child.code == code, child.said()
        assert "Traceback" not in child.said() and "DataLoader worker" not in child.said()
        with contextlib.suppress(AssertionError):  # after a kill, they look for it every five seconds
            wait_until(lambda: not processes_of({child.pid}), 0 if code == EXIT_CODE else 15)
        assert processes_of({child.pid}) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    return child.said()


def at_forward(number: int, action: Callable[[], None]) -> Callable[[], None]:
    """Return a patch: something is done before a forward pass, counted in training."""

    def patch() -> None:
        original, counter = UNET.forward, itertools.count(1)

        def forward(self: UNET, x: Tensor) -> Tensor:
            if self.training and torch.is_grad_enabled() and next(counter) == number:
                action()
            return original(self, x)

        UNET.forward = forward  # type: ignore[method-assign]

    return patch


def meet(file: Path, what: Callable[[], Any] = stop_requested) -> Callable[[], None]:
    """Return an action: it shows a file, for which somebody waits, and waits until a signal has come."""

    def wait() -> None:
        file.touch()
        wait_until(what)

    return wait


@pytest.fixture
def arguments(pairs_dir) -> list[str]:
    return ["--data", str(pairs_dir), *KEYS]


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    return global_config_of(tmp_path / "project")


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """The digest that train.py ends with when nobody ends it, in every routine."""
    return []


@pytest.fixture
def assert_resumes(expected, arguments, folders, tmp_path) -> Callable[[], None]:
    """Resume with train.py, and compare with what it ends with when nobody ends it."""

    def resume() -> None:
        if not expected:
            folder = tmp_path / "uninterrupted"
            folder.mkdir()
            assert_ends(start(folder, "--routine", FIRST, *arguments), 0)
            expected.append(rows_of(global_config_of(folder / "project"))[0]["WEIGHTS_DIGEST"])
        assert_ends(start(tmp_path, "--resume", "latest"), 0)
        (row,) = rows_of(folders)
        assert (row["STATUS"], row["WEIGHTS_DIGEST"]) == ("finished", expected[0])
        assert steps_of(folders, row["NAME"]) == list(range(1, 7))

    return resume


def in_each(default: Callable[[str, str], bool]) -> Any:
    """Each routine and signal; what is not default is slow."""
    return pytest.mark.parametrize(
        ("routine", "name"),
        [
            pytest.param(routine, name, marks=() if default(routine, name) else pytest.mark.slow)
            for routine, name in itertools.product(ROUTINES, NAMES)
        ],
    )


# Lightning has handlers of its own.
@in_each(default=lambda routine, name: routine in (FIRST, "lightning") and name == "SIGTERM")
def test_a_signal_ends_the_command_after_its_step(
    routine, name, arguments, folders, assert_resumes, tmp_path
):
    load_routine(routine)
    met, workers = tmp_path / "met", WORKERS + "2"  # which the signal must spare
    child = start(tmp_path, "--routine", routine, *arguments, workers, patch=at_forward(7, meet(met)))
    wait_until(met.exists)
    assert len(processes_of({child.pid})) >= 3
    os.killpg(child.pid, signal.Signals[name])
    said = assert_ends(child, EXIT_CODE)
    run = assert_saved(folders, 4)
    assert said.count(f"{name}: saving what is done") == 1
    resume = (
        rf"Ended by a signal after step 4. Resume it with: \S*python train.py --resume {re.escape(run)}\n"
    )
    assert re.search(resume, said)
    assert_resumes()


@in_each(default=lambda routine, name: routine == FIRST and name == "SIGTERM")
def test_a_second_signal_ends_the_command_at_once(
    routine, name, arguments, folders, assert_resumes, tmp_path
):
    load_routine(routine)
    met, second = tmp_path / "met", signal.Signals[name]
    patch = at_forward(9, meet(met, lambda: False))
    child = start(tmp_path, "--routine", routine, *arguments, WORKERS + "1", patch=patch)
    wait_until(met.exists)
    os.kill(child.pid, second)
    wait_until(lambda: "A second signal ends it at once" in child.said())
    os.kill(child.pid, second)
    said = assert_ends(child, 130 if name == "SIGINT" else -second, 10)
    (row,) = rows_of(folders)
    if name == "SIGINT":
        assert row["STATUS"] == "interrupted" and f"python train.py --resume {row['NAME']}" in said
    else:
        assert_resumes()


def test_a_signal_spares_data_loading_processes_that_only_start(arguments, folders, assert_resumes, tmp_path):
    starting, go_on = tmp_path / "starting", tmp_path / "go_on"

    def patch() -> None:
        from torch.utils.data._utils import worker

        original = worker._generate_state  # called before the worker_init_fn

        def wait(*state: Any) -> Any:
            meet(starting, go_on.exists)()
            return original(*state)

        worker._generate_state = wait

    child = start(tmp_path, "--routine", FIRST, *arguments, WORKERS + "2", patch=patch)
    wait_until(starting.exists)
    os.killpg(child.pid, signal.SIGTERM)
    wait_until(lambda: "A second signal" in child.said())
    go_on.touch()
    assert assert_ends(child, EXIT_CODE).count("A second signal") == 1
    assert_saved(folders, 1)
    assert_resumes()


@pytest.mark.slow
@pytest.mark.parametrize("routine", ROUTINES)
def test_it_resumes_after_signals_at_any_time(routine, arguments, folders, tmp_path):
    load_routine(routine)
    command = ["--resume", "auto", "--routine", routine, *arguments, "EPOCHS=10"]
    command.append(WORKERS + "1")
    started = time.monotonic()
    assert_ends(start(tmp_path, *command, "SESSION_NAME=whole"), 0)
    duration, chance, codes = time.monotonic() - started, random.Random(routine), list[int]()
    while codes[-1:] != [0]:
        child = start(tmp_path, *command, "SESSION_NAME=parts")
        wait_until(lambda: child.output.exists() and " parameters, on " in child.said())  # noqa: B023
        time.sleep(chance.uniform(0, duration) / 4)
        if len(codes) < 12:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, chance.choice(SIGNALS))
        assert child.wait() and child.code in (0, EXIT_CODE), child.said()
        codes.append(assert_ends(child, child.code) and child.code)
    rows = rows_of(folders)
    assert EXIT_CODE in codes and [row["STATUS"] for row in rows] == ["finished"] * 2
    assert rows[0]["WEIGHTS_DIGEST"] == rows[1]["WEIGHTS_DIGEST"]


# ------------------------------------------------------------------------------------ the scripts themselves


@pytest.mark.slow
@pytest.mark.parametrize("routine", ROUTINES)
def test_train_py_ends(routine, arguments, folders, tmp_path):
    load_routine(routine)
    environment = os.environ | {"ROOT_PATH": str(tmp_path / "project"), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "train.py", "--routine", routine, *arguments, "EPOCHS=500", WORKERS + "2"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        journals = Path(folders["LOG_DIR"])
        wait_until(
            lambda: any(b'"step"' in file.read_bytes() for file in journals.glob("*/journal.jsonl")), 60
        )
        os.killpg(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
        assert processes_of({process.pid}) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, said
    assert "DataLoader worker" not in said and "Traceback" not in said
    steps = steps_of(folders, rows_of(folders)[0]["NAME"])
    assert_saved(folders, len(steps))
    assert 1 <= len(steps) < 1500


@pytest.fixture
def trained(datasets, tiny_config, folders) -> Any:
    return load_routine(FIRST).train(*datasets, tiny_config | {"EPOCHS": 1}, folders)


def many_images(folder: Path, number: int) -> Path:
    """Make one image under many names."""
    folder.mkdir()
    np.save(folder / "000.npy", np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    for index in range(1, number):
        os.link(folder / "000.npy", folder / f"{index:03d}.npy")
    return folder


def assert_intact(out_dir: Path, number: int) -> None:
    maps = [np.load(file) for file in out_dir.iterdir() if file.suffix == ".npy"]
    assert len(maps) == number and not list(out_dir.glob(".*")) and not list(out_dir.glob("*.tmp"))
    assert maps[0].shape == (128, 128) and all(np.array_equal(one, maps[0]) for one in maps)


def test_prediction_ends_between_two_images(trained, tiny_config, tmp_path, monkeypatch):
    original, counter = OutputFile.finish, itertools.count(1)

    def finish(*arguments: Any, **options: Any) -> None:
        if next(counter) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        original(*arguments, **options)

    monkeypatch.setattr(OutputFile, "finish", finish)
    images, out_dir = many_images(tmp_path / "images", 8), tmp_path / "out"
    command = [trained.name, "-i", str(images), "-o", str(out_dir)]
    assert_ends(start(tmp_path, *command, script="run_prediction"), EXIT_CODE)
    assert_intact(out_dir, 5)

    config = {key: tiny_config[key] for key in ("MODEL", "MODEL_CONFIG", "DEVICE")} | {"BATCH_SIZE": 1}
    config |= {"WEIGHTS": trained.weights["best"], "OUT_DIR": tmp_path / "notebook", "FILES": images}
    before = handlers()
    with pytest.raises(Preempted, match="was received"):
        predict(config)
    assert handlers() == before
    assert_intact(tmp_path / "notebook", 5)
    assert len(predict(config)) == 8
    assert_intact(tmp_path / "notebook", 8)
