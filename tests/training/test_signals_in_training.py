"""
A training that a signal ends has saved its last step, says so everywhere, and goes on to the very weights of the
training that nobody has ended.
"""

import contextlib
import importlib
import itertools
import multiprocessing
import os
import pkgutil
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.tensorboard  # here, so that processes forked from this one need not
from torch import Tensor

from dida_tools import training
from dida_tools.config.config import make_global_config
from dida_tools.models import UNET
from dida_tools.prediction import predict
from dida_tools.prediction.outputs import OutputFile
from dida_tools.training import run as run_module
from dida_tools.training.checkpoint import checkpoint_files
from dida_tools.utils.logging import read_log
from dida_tools.utils.logging.journal import read_journal
from dida_tools.utils.signals import EXIT_CODE, Preempted, stop_requested

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
    pytest.mark.usefixtures("quick"),
]

ROOT = Path(__file__).resolve().parents[2]
ROUTINES = [
    one.name[:-9] for one in pkgutil.iter_modules(training.__path__) if one.name.endswith("_training")
]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
EACH_ROUTINE = pytest.mark.parametrize("routine", ROUTINES)


def name_of(signum: int) -> str:
    return signal.Signals(signum).name


EACH_SIGNAL = pytest.mark.parametrize("signum", SIGNALS, ids=name_of)
ONE_SIGNAL = pytest.mark.parametrize(
    "signum",
    [SIGNALS[0], *(pytest.param(signum, marks=pytest.mark.slow) for signum in SIGNALS[1:])],
    ids=name_of,
)

# What train.py is called with: 6 steps in 2 epochs, each of two batches.
KEYS = (
    "MODEL_CONFIG.bulk_ch=4",
    "MODEL_CONFIG.n_recursions=1",
    "MODEL_CONFIG.dropout=0.1",
    "MODEL_CONFIG.norm=None",
)
KEYS += (
    "DATASET_CONFIG.train.crop=16",
    "DATASET_CONFIG.train.crops_per_image=2",
    "DATA_LOADER_CONFIG.batch_size=3",
)
KEYS += ("EPOCHS=2", "ACCUMULATE=2", "EMA=0.9", "PRECISION=fp32", "DEVICE=cpu", "CHECKPOINT_SECONDS=1000")


def load(routine: str) -> ModuleType:
    try:
        return importlib.import_module(f"dida_tools.training.{routine}_training")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dida_tools"):
            raise
        pytest.skip(f"{error.name} is not installed")


def handlers() -> list:
    return [signal.getsignal(signum) for signum in SIGNALS]


def the_row(folders: dict[str, str], name: str | None = None) -> dict[str, Any]:
    rows = read_log(Path(folders["LOG_DIR"]) / "experiments.csv")
    rows = [row for row in rows if name in (None, row["NAME"])]
    assert len(rows) == 1
    return rows[0]


def events(folders: dict[str, str], name: str, kind: str) -> list[dict[str, Any]]:
    return [
        event
        for event in read_journal(Path(folders["LOG_DIR"]) / name / "journal.jsonl")
        if event["event"] == kind
    ]


def assert_saved(folders: dict[str, str], step: int, status: str = "preempted") -> str:
    """That there is one run, ended with this status, whose last step is this one and is saved. Returns its name."""
    row = the_row(folders)
    name = row["NAME"]
    assert row["STATUS"] == status
    assert [event["status"] for event in events(folders, name, "end")] == [status]
    assert [event["step"] for event in events(folders, name, "step")] == list(range(1, step + 1))
    newest = checkpoint_files(Path(folders["WEIGHT_DIR"]) / name)[0]
    assert newest.name == f"last-{step:08d}.pt"
    assert not list(Path(folders["ROOT_PATH"]).rglob("*.tmp"))
    return name


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.01)


# --------------------------------------------------------------------------------------------- as a notebook calls it


class When:
    """When a process sends itself signals: in the training's forward passes, or in the calls of a metric."""

    place = ""
    at = 0
    signals: tuple[int, ...] = ()
    counted = 0

    @classmethod
    def set(cls, place: str = "", at: int = 0, *signals: int) -> None:
        cls.place, cls.at, cls.signals, cls.counted = place, at, signals, 0

    @classmethod
    def comes(cls, place: str) -> None:
        if place == cls.place:
            cls.counted += 1
            if cls.counted == cls.at:
                for signum in cls.signals:
                    os.kill(os.getpid(), signum)


class SignaledUNET(UNET):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            When.comes("training")
        return super().forward(x)


def signaled_metric(pred: Tensor, target: Tensor) -> float:
    When.comes("evaluation")
    return float((pred.argmax(1) == target).float().mean())


@pytest.fixture
def config(tiny_config) -> dict[str, Any]:
    """3 steps an epoch, each of two batches; what is saved is saved at the end, unless a signal comes."""
    When.set()
    tiny_config |= {"MODEL": SignaledUNET, "ACCUMULATE": 2, "EMA": 0.9, "CHECKPOINT_SECONDS": 1000}
    tiny_config |= {"SCHEDULER": torch.optim.lr_scheduler.OneCycleLR}
    tiny_config["DATA_LOADER_CONFIG"] = {"batch_size": 3, "shuffle": True}
    tiny_config["METRICS"] = tiny_config["METRICS"] | {"signaled": signaled_metric}
    return tiny_config


@pytest.fixture(scope="module")
def expected() -> dict[Any, Any]:
    """Results of trainings that nobody has ended, by what they trained."""
    return {}


def uninterrupted(routine: str, expected: dict, datasets: tuple, config: dict, folder: Path) -> Any:
    if routine not in expected:
        expected[routine] = load(routine).train(
            *datasets, config, make_global_config(folder / "uninterrupted")
        )
    return expected[routine]


# Two calls of the metric when everything is checked, 2 validation samples in each of 2 epochs, 4 test samples.
@pytest.mark.parametrize(
    ("place", "at", "step"),
    [
        ("training", 1, 1),
        ("training", 4, 2),
        ("training", 6, 3),
        ("evaluation", 3, 3),
        ("evaluation", 6, 6),
        ("evaluation", 8, 6),
    ],
    ids=["first-batch", "end-of-a-step", "end-of-an-epoch", "validation", "end-of-a-validation", "test"],
)
@EACH_ROUTINE
def test_after_a_signal_the_same_process_can_go_on(
    routine, place, at, step, datasets, config, global_config, expected, tmp_path
):
    wanted = uninterrupted(routine, expected, datasets, config, tmp_path)
    module, before = load(routine), handlers()
    When.set(place, at, signal.SIGTERM)
    with pytest.raises(Preempted, match="was received"):
        module.train(*datasets, config, global_config)
    assert not stop_requested()
    assert handlers() == before
    name = assert_saved(global_config, step)
    When.set()
    result = module.train(*datasets, config | {"RESUME": name}, global_config)
    assert (result.name, result.digest, result.metrics) == (name, wanted.digest, wanted.metrics)
    assert the_row(global_config)["STATUS"] == "finished"
    assert [event["step"] for event in events(global_config, name, "step")] == list(range(1, 7))
    assert handlers() == before


@EACH_ROUTINE
def test_before_the_first_batch(routine, datasets, config, global_config, expected, tmp_path, monkeypatch):
    wanted = uninterrupted(routine, expected, datasets, config, tmp_path)
    train = load(routine).train
    for method in ("__len__", "__iter__"):
        original = getattr(run_module.RemainingBatches, method)

        def signaling(self: Any, original: Callable = original) -> Any:
            When.comes("batches")
            return original(self)

        monkeypatch.setattr(run_module.RemainingBatches, method, signaling)
    When.set("batches", 1, signal.SIGTERM)
    with pytest.raises(Preempted):
        train(*datasets, config, global_config)
    name = assert_saved(global_config, 1)
    result = train(*datasets, config | {"RESUME": name}, global_config)
    assert (result.digest, result.metrics) == (wanted.digest, wanted.metrics)


@EACH_ROUTINE
def test_twice_in_the_same_validation(routine, datasets, config, global_config, expected, tmp_path):
    wanted = uninterrupted(routine, expected, datasets, config, tmp_path)
    train = load(routine).train
    name = None
    for _ in range(2):
        When.set("evaluation", 3, signal.SIGTERM)
        with pytest.raises(Preempted):
            train(*datasets, config | {"RESUME": name}, global_config)
        name = the_row(global_config)["NAME"]
        assert [event["status"] for event in events(global_config, name, "end")][-1] == "preempted"
    When.set()
    result = train(*datasets, config | {"RESUME": name}, global_config)
    assert (result.digest, result.metrics) == (wanted.digest, wanted.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@EACH_ROUTINE
def test_at_any_moment(routine, num_workers, datasets, config, global_config, expected, tmp_path):
    wanted = uninterrupted(routine, expected, datasets, config, tmp_path)
    train = load(routine).train
    config["DATA_LOADER_CONFIG"] |= {"num_workers": num_workers}
    moments = [("training", at) for at in range(1, 13)] + [("evaluation", at) for at in range(3, 11)]
    for (place, at), signum in zip(moments[:: 1 + num_workers], itertools.cycle(SIGNALS), strict=False):
        folders = make_global_config(tmp_path / f"{place}-{at}")
        When.set(place, at, signum)
        with pytest.raises(Preempted):
            train(*datasets, config, folders)
        When.set()
        result = train(*datasets, config | {"RESUME": the_row(folders)["NAME"]}, folders)
        assert (result.digest, result.metrics) == (wanted.digest, wanted.metrics), (place, at)


@EACH_ROUTINE
def test_a_second_interrupt_ends_at_once(routine, datasets, config, global_config, expected, tmp_path):
    wanted = uninterrupted(routine, expected, datasets, config, tmp_path)
    train, before = load(routine).train, handlers()
    When.set("training", 9, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(*datasets, config, global_config)
    assert handlers() == before
    row = the_row(global_config)
    assert row["STATUS"] == "interrupted"
    assert [event["step"] for event in events(global_config, row["NAME"], "step")] == [1, 2, 3, 4]
    When.set()
    result = train(*datasets, config | {"RESUME": row["NAME"]}, global_config)
    assert (result.digest, result.metrics) == (wanted.digest, wanted.metrics)


def broken_loss(pred: Tensor, target: Tensor) -> Tensor:
    if pred.requires_grad:
        raise RuntimeError("broken loss")
    return pred.mean()


@EACH_ROUTINE
def test_the_handlers_of_before_come_back(routine, datasets, config, global_config):
    def custom(*_: Any) -> None:
        """A handler of the user's own."""

    train, originals = load(routine).train, handlers()
    try:
        for signum in SIGNALS:
            signal.signal(signum, custom)
        train(*datasets, config | {"EPOCHS": 1}, global_config)
        assert handlers() == [custom] * 3
        with pytest.raises(RuntimeError, match="broken loss"):
            train(*datasets, config | {"LOSS": broken_loss}, global_config)
        assert handlers() == [custom] * 3
    finally:
        for signum, handler in zip(SIGNALS, originals, strict=True):
            signal.signal(signum, handler)


@EACH_ROUTINE
def test_a_thread_can_train(routine, datasets, config, global_config, expected, tmp_path):
    wanted = uninterrupted(routine, expected, datasets, config, tmp_path)
    train, before, results = load(routine).train, handlers(), []
    thread = threading.Thread(target=lambda: results.append(train(*datasets, config, global_config)))
    thread.start()
    thread.join()
    assert [result.digest for result in results] == [wanted.digest]
    assert handlers() == before


# ---------------------------------------------------------------------------------------------- as train.py is started


class Started:
    """A process that runs train.py, forked from this one: with its frameworks imported, it starts in no time."""

    def __init__(
        self, folder: Path, arguments: list[str], patch: Callable[[], Any], own_group: bool = False
    ) -> None:
        self.log = folder / f"log-{time.monotonic_ns()}"
        self.log.touch()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._run, args=(folder, arguments, patch, own_group))
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    def _run(self, folder: Path, arguments: list[str], patch: Callable[[], Any], own_group: bool) -> None:
        if own_group:
            os.setsid()
        handle = os.open(self.log, os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        for signum in SIGNALS:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        script = importlib.import_module("train")
        script.global_config = make_global_config(folder / "project")
        patch()
        sys.argv = ["train.py", *arguments]
        sys.exit(script.main())

    def exit_code(self, seconds: float = 60) -> int | None:
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            pytest.fail(f"it has not ended:\n{self.told()}")
        return self._process.exitcode

    def told(self) -> str:
        return self.log.read_text()


def at_forward(number: int, action: Callable[[], None]) -> Callable[[], None]:
    """Has the forward pass with this number, counted in training, do something before."""

    def patch() -> None:
        original, counter = UNET.forward, itertools.count(1)

        def forward(self: UNET, x: Tensor) -> Tensor:
            if self.training and next(counter) == number:
                action()
            return original(self, x)

        UNET.forward = forward  # type: ignore[method-assign]

    return patch


def meet(file: Path) -> Callable[[], None]:
    """Waits until a signal has come, for the file's sight of which somebody waits."""

    def wait() -> None:
        file.touch()
        wait_until(stop_requested)

    return wait


def nothing() -> None:
    """Patches nothing."""


@pytest.fixture
def arguments(pairs_dir) -> list[str]:
    return ["--data", str(pairs_dir), *KEYS]


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    return make_global_config(tmp_path / "project")


def digest_of_script(routine: str, expected: dict, arguments: list[str], folder: Path) -> str:
    """Digest of the weights that train.py ends with."""
    if ("script", routine) not in expected:
        folder = folder / "uninterrupted"
        folder.mkdir()
        process = Started(folder, ["--routine", routine, *arguments], nothing)
        assert process.exit_code() == 0, process.told()
        expected["script", routine] = the_row(make_global_config(folder / "project"))["WEIGHTS_DIGEST"]
    return expected["script", routine]


def assert_goes_on(folder: Path, folders: dict[str, str], digest: str) -> None:
    process = Started(folder, ["--resume", "latest"], nothing)
    assert process.exit_code() == 0, process.told()
    row = the_row(folders)
    assert (row["STATUS"], row["WEIGHTS_DIGEST"]) == ("finished", digest)
    assert [event["step"] for event in events(folders, row["NAME"], "step")] == list(range(1, 7))


@EACH_SIGNAL
@EACH_ROUTINE
def test_a_signal_ends_the_command_after_its_step(routine, signum, arguments, folders, expected, tmp_path):
    load(routine)
    wanted = digest_of_script(routine, expected, arguments, tmp_path)
    met = tmp_path / "met"
    process = Started(tmp_path, ["--routine", routine, *arguments], at_forward(7, meet(met)))
    wait_until(met.exists)
    os.kill(process.pid, signum)
    assert process.exit_code() == EXIT_CODE == 75, process.told()
    name = assert_saved(folders, 4)
    assert process.told().count(f"{name_of(signum)}: what is done so far will be saved") == 1
    assert (
        f"Ended by a signal after step 4. It goes on with: python train.py --resume {name}" in process.told()
    )
    assert "Traceback" not in process.told()
    assert_goes_on(tmp_path, folders, wanted)


@pytest.mark.parametrize(
    "second",
    [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)],
    ids=name_of,
)
@EACH_ROUTINE
def test_a_second_signal_ends_the_command_at_once(routine, second, arguments, folders, expected, tmp_path):
    load(routine)

    def sleep() -> None:
        met.touch()
        time.sleep(100)

    met = tmp_path / "met"
    process = Started(tmp_path, ["--routine", routine, *arguments], at_forward(9, sleep))
    wait_until(met.exists)
    os.kill(process.pid, second)
    wait_until(lambda: "A second signal ends it at once" in process.told())
    os.kill(process.pid, second)
    ended = process.exit_code(10)
    row = the_row(folders)
    if second == signal.SIGINT:
        assert ended == 130, process.told()
        assert row["STATUS"] == "interrupted"
        assert f"python train.py --resume {row['NAME']}" in process.told()
        assert "Traceback" not in process.told()
    else:
        assert ended == -second
        assert_goes_on(tmp_path, folders, digest_of_script(routine, expected, arguments, tmp_path))


def test_what_torchrun_passes_on_again_is_the_same_signal(monkeypatch, arguments, folders, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    met = tmp_path / "met"

    def wait() -> None:
        meet(met)()
        (tmp_path / "first").touch()
        wait_until((tmp_path / "second").exists)

    process = Started(tmp_path, arguments, at_forward(7, wait))
    wait_until(met.exists)
    os.kill(process.pid, signal.SIGINT)
    wait_until((tmp_path / "first").exists)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    (tmp_path / "second").touch()
    assert process.exit_code() == EXIT_CODE, process.told()
    assert_saved(folders, 4)


# ------------------------------------------------------------------------------------------- processes that load data


def living(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    table = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat=,pid=,args="], capture_output=True, text=True, check=True
    )
    lines = [line.split(maxsplit=2) for line in table.stdout.splitlines()]
    return [rest for pgid, state, rest in lines if pgid == str(group) and not state.startswith("Z")]


def workers_are_there(group: int) -> bool:
    return len(living(group)) >= 3


@contextlib.contextmanager
def no_survivors(group: int, seconds: float = 0) -> Iterator[None]:
    try:
        yield
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not living(group), seconds)
        assert living(group) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


@ONE_SIGNAL
@EACH_ROUTINE
def test_a_signal_to_the_whole_group_spares_those_that_load_data(
    routine, signum, arguments, folders, expected, tmp_path
):
    load(routine)
    wanted = digest_of_script(routine, expected, arguments, tmp_path)
    met = tmp_path / "met"
    command = ["--routine", routine, *arguments, "DATA_LOADER_CONFIG.num_workers=2"]
    process = Started(tmp_path, command, at_forward(9, meet(met)), own_group=True)
    with no_survivors(process.pid):
        wait_until(met.exists)
        assert workers_are_there(process.pid)
        os.killpg(process.pid, signum)
        sent = time.monotonic()
        assert process.exit_code() == EXIT_CODE, process.told()
        assert time.monotonic() - sent < 10
    assert "DataLoader worker" not in process.told() and "Traceback" not in process.told()
    assert process.told().count("A second signal") == 1
    assert_saved(folders, 5)
    assert_goes_on(tmp_path, folders, wanted)


@EACH_SIGNAL
def test_a_signal_to_the_whole_group_spares_those_that_only_start(
    signum, arguments, folders, expected, tmp_path
):
    wanted = digest_of_script(ROUTINES[0], expected, arguments, tmp_path)
    starting, go_on = tmp_path / "starting", tmp_path / "go_on"

    def patch() -> None:
        from torch.utils.data._utils import worker

        original = worker._generate_state  # called before the worker_init_fn

        def wait(*state: Any) -> Any:
            starting.touch()
            wait_until(go_on.exists)
            return original(*state)

        worker._generate_state = wait

    command = ["--routine", ROUTINES[0], *arguments, "DATA_LOADER_CONFIG.num_workers=2"]
    process = Started(tmp_path, command, patch, own_group=True)
    with no_survivors(process.pid):
        wait_until(starting.exists)
        os.killpg(process.pid, signum)
        wait_until(lambda: "A second signal" in process.told())
        go_on.touch()
        assert process.exit_code() == EXIT_CODE, process.told()
    assert process.told().count("A second signal") == 1
    assert_saved(folders, 1)
    assert_goes_on(tmp_path, folders, wanted)


@pytest.mark.parametrize("second", SIGNALS, ids=name_of)
@pytest.mark.slow
def test_those_that_load_data_end_with_the_process(second, arguments, folders, tmp_path):
    def sleep() -> None:
        met.touch()
        time.sleep(100)

    met = tmp_path / "met"
    process = Started(
        tmp_path, [*arguments, "DATA_LOADER_CONFIG.num_workers=2"], at_forward(9, sleep), own_group=True
    )
    with no_survivors(process.pid, 15):  # they look for it every five seconds
        wait_until(met.exists)
        assert workers_are_there(process.pid)
        os.killpg(process.pid, second)
        wait_until(lambda: "A second signal" in process.told())
        os.killpg(process.pid, second)
        assert process.exit_code(10) == (130 if second == signal.SIGINT else -second), process.told()


@pytest.mark.slow
@EACH_ROUTINE
def test_it_goes_on_after_signals_at_any_time(routine, arguments, folders, tmp_path):
    load(routine)
    command = [
        "--resume",
        "auto",
        "--routine",
        routine,
        *arguments,
        "EPOCHS=10",
        "DATA_LOADER_CONFIG.num_workers=1",
    ]
    started = time.monotonic()
    process = Started(tmp_path, [*command, "SESSION_NAME=whole"], nothing)
    assert process.exit_code() == 0, process.told()
    duration = time.monotonic() - started

    chance, codes = random.Random(routine), []
    while codes[-1:] != [0]:
        process = Started(tmp_path, [*command, "SESSION_NAME=parts"], nothing, own_group=True)
        with no_survivors(process.pid):
            wait_until(lambda: "million parameters" in process.told())  # noqa: B023
            time.sleep(chance.uniform(0, duration) / 4)
            if len(codes) < 12:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, chance.choice(SIGNALS))
            codes.append(process.exit_code())
            assert codes[-1] in (0, EXIT_CODE), process.told()
    assert EXIT_CODE in codes
    rows = read_log(Path(folders["LOG_DIR"]) / "experiments.csv")
    assert [row["STATUS"] for row in rows] == ["finished"] * 2
    assert rows[0]["WEIGHTS_DIGEST"] == rows[1]["WEIGHTS_DIGEST"]


# ----------------------------------------------------------------------------------------------- the scripts themselves


def script(project: Path, *command: object, **options: Any) -> subprocess.Popen:
    environment = os.environ | {"ROOT_PATH": str(project), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, **pipes, **options
    )


@pytest.mark.parametrize(
    "routine", [ROUTINES[-1], *(pytest.param(routine, marks=pytest.mark.slow) for routine in ROUTINES[:-1])]
)
def test_train_py_ends(routine, arguments, folders, tmp_path):
    load(routine)
    long = [*arguments, "EPOCHS=500", "DATA_LOADER_CONFIG.num_workers=2"]
    process = script(tmp_path / "project", "train.py", "--routine", routine, *long, start_new_session=True)
    with no_survivors(process.pid):
        journals = Path(folders["LOG_DIR"])
        wait_until(
            lambda: any(b'"step"' in file.read_bytes() for file in journals.glob("*/journal.jsonl")), 60
        )
        os.killpg(process.pid, signal.SIGTERM)
        told, _ = process.communicate(timeout=30)
        assert process.returncode == 75, told
    assert "DataLoader worker" not in told and "Traceback" not in told
    row = the_row(folders)
    steps = events(folders, row["NAME"], "step")
    assert_saved(folders, len(steps))
    assert 1 <= len(steps) < 1500


# ----------------------------------------------------------------------------------------------------------- prediction


def many_images(folder: Path, number: int) -> Path:
    """One image under many names."""
    folder.mkdir()
    np.save(
        folder / "image_000.npy", np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    )
    for index in range(1, number):
        os.link(folder / "image_000.npy", folder / f"image_{index:03d}.npy")
    return folder


@pytest.fixture
def trained(datasets, tiny_config, folders) -> Any:
    return load(ROUTINES[0]).train(*datasets, tiny_config | {"EPOCHS": 1}, folders)


def assert_whole(out_dir: Path, number: range) -> None:
    files = sorted(file for file in out_dir.iterdir() if file.name != "predictions.jsonl")
    assert len(files) in number
    assert all(file.suffix == ".npy" and not file.name.startswith(".") for file in files)
    first = np.load(files[0])
    assert first.shape == (128, 128) and first.dtype == np.uint8
    assert all(np.array_equal(np.load(file), first) for file in files)


@ONE_SIGNAL
def test_prediction_stops_between_two_images(signum, trained, tmp_path):
    images = many_images(tmp_path / "images", 500)
    out_dir = tmp_path / "predicted"
    process = script(tmp_path / "project", "run_prediction.py", trained.name, "-i", images, "-o", out_dir)
    wait_until(lambda: out_dir.is_dir() and len(list(out_dir.glob("image_*"))) >= 3, 60)
    process.send_signal(signum)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 75, told
    assert "are intact: repeat the call" in told and "Traceback" not in told
    assert_whole(out_dir, range(3, 500))


@EACH_SIGNAL
def test_prediction_as_a_notebook_calls_it(signum, trained, tiny_config, tmp_path, monkeypatch):
    images = many_images(tmp_path / "images", 8)
    original, counter = OutputFile.finish, itertools.count(1)

    def finish(*arguments: Any, **options: Any) -> None:
        if next(counter) == 5:
            os.kill(os.getpid(), signum)
        original(*arguments, **options)

    monkeypatch.setattr(OutputFile, "finish", finish)
    keys = {key: tiny_config[key] for key in ("MODEL", "MODEL_CONFIG", "DEVICE")} | {"BATCH_SIZE": 1}
    predict_config = keys | {"WEIGHTS": trained.weights["best"], "FILES": images, "OUT_DIR": tmp_path / "out"}
    before = handlers()
    with pytest.raises(Preempted, match="was received"):
        predict(predict_config)
    assert handlers() == before
    assert_whole(tmp_path / "out", range(5, 6))
    assert len(predict(predict_config)) == 8
    assert_whole(tmp_path / "out", range(8, 9))
