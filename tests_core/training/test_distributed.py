"""
Several processes that torchrun starts train as one would, write as one, and end together.

The tests start this very file as a script by torchrun: its session() trains one thing after the other, since
starting takes longer than training, and leaves for each process what came out.
"""

import contextlib
import importlib
import itertools
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from dida_core.errors import UserError, exit_code
from dida_core.report import pictures as pictures_module
from dida_core.runs import record as record_module
from dida_core.runs import run as run_module
from dida_core.storage.checkpoint import checkpoint_files, save_checkpoint
from dida_core.storage.weights import load_weights
from dida_core.training import distributed
from dida_core.training.calibration import calibrate, describe_fit
from dida_core.training.determinism import EvaluationBatches, TrainingBatches
from dida_core.training.evaluation import Evaluation, evaluate
from dida_core.training.modules import fill_model
from dida_core.training.setup import prepare
from dida_core.training.signals import EXIT_CODE, Preempted
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dida_tools.models import UNET
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.transforms import STANDARD
from dida_tools.utils.loss import f1, multi_class_dice_ce_sum, precision, recall

from tests.helpers import (
    PACKAGE,
    ROOT,
    ROUTINES,
    events_of,
    global_config_of,
    load_routine,
    processes_of,
    rows_of,
    run_script,
)

DISTRIBUTED = [routine for routine in ("pytorch", "ignite") if routine in ROUTINES]
ALONE = [routine for routine in ROUTINES if routine not in DISTRIBUTED]
needs_processes = pytest.mark.skipif(
    os.name != "posix" or not dist.is_available() or not DISTRIBUTED, reason="torchrun with gloo"
)

# Sums of gradients are rounded in another order: after 12 steps in float32, weights of some 0.1 differed by
# 1.2e-7 at most, a fiftieth of what is allowed here. Wrong weights of the parts change them by 3e-3, another
# seed by 0.8.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


# -------------------------------------------------------------------------------------------- what is trained


def make_datasets(pairs: Path, crops_per_image: int) -> tuple[NpyDataset, NpyDataset]:
    options: dict[str, Any] = {"crop": 16, "crops_per_image": crops_per_image, "augment": STANDARD}
    train = NpyDataset(pairs / "train" / "x", pairs / "train" / "y", **options)
    return train, NpyDataset(pairs / "test" / "x", pairs / "test" / "y")


def exact_config() -> dict[str, Any]:
    """
    What two processes must train as one does. Of 36 samples, the parts of a batch of 5 are unequal. One
    process has nothing of the last batch, a single sample, and nothing of the one validation image.
    """
    norm = partial(nn.GroupNorm, 4)
    model = {"ch_in": 3, "ch_out": 3, "bulk_ch": 8, "n_recursions": 1, "norm": norm}
    config: dict[str, Any] = {"MODEL": UNET, "MODEL_CONFIG": model}
    config |= {"DATA_LOADER_CONFIG": {"batch_size": 5, "shuffle": True}, "VALIDATION_FRACTION": 0.1}
    config |= {"OPTIMIZER": torch.optim.SGD, "OPTIMIZER_CONFIG": {"lr": 0.1, "momentum": 0.9}}
    config |= {"SCHEDULER": torch.optim.lr_scheduler.OneCycleLR, "CLIP_NORM": 1.0, "EMA": 0.9}
    config |= {"ACCUMULATE": 2, "EPOCHS": 3, "LOSS": nn.CrossEntropyLoss, "MONITOR": "max f1"}
    config |= {"METRICS": {"f1": f1, "precision": precision, "recall": recall}, "CHECKPOINT_SECONDS": 1000}
    return config | {"SESSION_NAME": "exact", "DEVICE": "cpu", "PRECISION": "fp32"}


def rich_config() -> dict[str, Any]:
    """What depends on the number of processes: BatchNorm, dropout, batch Dice. 3 steps an epoch."""
    config = exact_config() | {"SESSION_NAME": "rich", "ACCUMULATE": 1, "EPOCHS": 2}
    config["MODEL_CONFIG"] |= {"norm": nn.BatchNorm2d, "dropout": 0.1}
    config |= {"DATA_LOADER_CONFIG": {"batch_size": 4, "shuffle": True}, "VALIDATION_FRACTION": 0.4}
    config |= {"OPTIMIZER": torch.optim.AdamW, "OPTIMIZER_CONFIG": {"lr": 1e-2}}
    return config | {"LOSS": multi_class_dice_ce_sum}


# -------------------------------------------------------------------------------- what happens while training


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Leave out what takes longer than these trainings."""
    with (
        patch.object(pictures_module, "save_picture", lambda *_: None),
        patch.object(record_module, "describe_environment", lambda *_: {}),
    ):
        yield


def signaled(owner: Any, method: str, at: int, by_rank: int, in_training: bool = False) -> Any:
    """Have one process send itself SIGTERM at a certain call of a method."""
    original, counter = getattr(owner, method), itertools.count(1)

    def call(self: Any, *arguments: Any) -> Any:
        is_meant = not in_training or (self.training and torch.is_grad_enabled())
        if distributed.rank() == by_rank and is_meant and next(counter) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    return patch.object(owner, method, call)


def in_training(at: int, by_rank: int = 0) -> Any:
    """A signal in a forward pass of training."""
    return signaled(UNET, "forward", at, by_rank, in_training=True)


def in_evaluation(at: int, by_rank: int = 0) -> Any:
    """A signal at an evaluated batch; the first two are those of the dry run."""
    return signaled(Evaluation, "update", at, by_rank)


def interrupted(train: Callable[..., Any], *arguments: Any) -> str:
    """Return the name of a run that a signal ends."""
    try:
        train(*arguments)
    except Preempted:
        return rows_of(arguments[3])[-1]["NAME"]
    raise AssertionError("no signal has ended it")


def outcome(result: Any) -> dict[str, Any]:
    """What came out, as plain data and tensors."""
    about = {name: getattr(result, name) for name in ("name", "digest", "metrics", "history")}
    return about | {"model": load_weights(result.weights["last"])["model"]}


def slow_save(*arguments: Any) -> Path:
    time.sleep(0.5)
    return save_checkpoint(*arguments)


def state_on_disk(project: Path, run: str) -> tuple[str, str]:
    """What the tracker says of a run, and its newest checkpoint."""
    row = rows_of(global_config_of(project))[-1]
    return row["STATUS"], next((file.name for file in checkpoint_files(project / "weights" / run)), "")


def fail() -> None:
    raise OSError("the disk is full")


class Written:
    """What a process writes below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = str(folder), list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        changes = event in {
            f"os.{name}" for name in ["mkdir", "rename", "remove", "rmdir", "truncate", "link", "symlink"]
        }
        if event == "open":
            _, mode, flags = arguments
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            changes = bool(set(mode or "") & set("wax+") or writes)
        if changes and str(arguments[0]).startswith(self.folder):
            self.paths.append(f"{event} {arguments[0]}")


def join(routine: str) -> Any:
    """Join the processes as a routine does."""
    if routine == "pytorch":
        return distributed.join_processes()
    idist = importlib.import_module("ignite.distributed")
    return distributed.join_processes(idist.initialize, idist.finalize)


def gloo_threads() -> list[str]:
    """Return the threads of process groups, by what the kernel says."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    return [name for name in names if "gloo" in name]


def session(routine: str, pairs: Path, folder: Path) -> None:
    """All that one of the processes trains: joined to the other, then once more as the command does it."""
    torch.set_num_threads(1)
    with quick(), join(routine):
        outcomes = together(routine, pairs, folder)
    outcomes["threads"] = gloo_threads()
    with in_training(5, by_rank=1):
        arguments = ["--routine", routine, "--data", str(pairs), *KEYS, "EPOCHS=2000"]
        outcomes["code"] = command(folder / "command", *arguments)
    outcomes["threads"] += gloo_threads()
    torch.save(outcomes, folder / f"outcomes-{os.environ['RANK']}.pt")


def together(routine: str, pairs: Path, folder: Path) -> dict[str, Any]:
    """Train with the other process. Return what came out, by name."""
    number, outcomes = dist.get_rank(), dict[str, Any]()
    written = Written(folder)
    train = load_routine(routine).train
    exact, rich = (make_datasets(pairs, 4), exact_config()), (make_datasets(pairs, 2), rich_config())

    def go(name: str, datasets: tuple, config: dict[str, Any], **keys: Any) -> None:
        folders = global_config_of(folder / name.split()[0])
        outcomes[name] = outcome(train(*datasets, config | keys, folders))

    go("exact", *exact)
    go("rich", *rich)
    for name, signals in {
        "preempted-in-validation": in_evaluation(3, by_rank=1),
        "preempted-in-test": in_evaluation(2 + 2 + 2 + 1, by_rank=1),
    }.items():
        with signals, patch.object(run_module, "save_checkpoint", slow_save):
            run = interrupted(train, *rich[0], rich[1], global_config_of(folder / name))
        seen = [state_on_disk(folder / name, run)]
        dist.barrier()
        seen.append(state_on_disk(folder / name, run))
        dist.barrier()
        outcomes[name] = seen
        go(f"{name} resumed", *rich, RESUME=run)
    with in_training(5, by_rank=1):
        interrupted(train, *exact[0], exact[1], global_config_of(folder / "two-to-one"))
    go("one-to-two", *exact, RESUME=rows_of(global_config_of(folder / "one-to-two"))[-1]["NAME"])
    outcomes["written"] = list(written.paths)
    sums = distributed.sum_up([number + 1.5, 2.0**60 * number])
    outcomes["together"] = [distributed.on_main(lambda: number), distributed.gather(number), sums]
    try:
        distributed.on_main(fail)
    except Exception as error:
        outcomes["failure"] = f"{type(error).__name__}: {error}"
    return outcomes | {"refused": refused(train, pairs, folder / f"machine-{number}")}


def refused(train: Callable[..., Any], pairs: Path, own: Path) -> list[str]:
    """Return what trainings say whose second process was given something else: a learning rate, a file."""
    shutil.copytree(pairs, own)
    said, is_second = [], dist.get_rank() == 1
    for changes in ({"lr": 2e-2 if is_second else 1e-2}, {"lr": 1e-2}):
        config = exact_config() | {"EPOCHS": 1, "OPTIMIZER_CONFIG": changes}
        with pytest.raises(UserError) as error:
            train(*make_datasets(own, 4), config, global_config_of(own.parent / "refused"))
        said.append(str(error.value))
        for kind in "xy" if is_second else "":
            min((own / "train" / kind).iterdir()).unlink()
    return said


def ends(routine: str, pairs: Path, folder: Path) -> None:
    """
    Train in two processes and let their interpreters end, again and again.

    They are forks of this one, so that they start in no time.
    """
    import torch._dynamo  # as DistributedDataParallel does

    torch.set_num_threads(1)
    train, codes = load_routine(routine).train, list[int]()
    for turn in range(12):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = list[int]()
        for rank in range(2):
            pids.append(os.fork())
            if pids[-1] == 0:
                number = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                os.environ |= number | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                config = rich_config() | {"EPOCHS": 1}
                with quick():
                    train(*make_datasets(pairs, 2), config, global_config_of(folder / str(turn)))
                return  # and the interpreter ends, in its own time
        codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    (folder / "codes").write_text(repr(codes))


def on_gpus(routine: str, pairs: Path, folder: Path) -> None:
    """Train exactly, each process on a GPU of its own."""
    with quick():
        config = exact_config() | {"DEVICE": "cuda"}
        result = load_routine(routine).train(*make_datasets(pairs, 4), config, global_config_of(folder))
    torch.save(outcome(result), folder / f"outcome-{os.environ['RANK']}.pt")


def command(folder: Path, *arguments: str) -> int:
    """Run train.py, and note with what exit code this process will end."""
    from dida_tools.config import config as config_module

    folder.mkdir(exist_ok=True)
    config_module.global_config |= global_config_of(folder)
    sys.argv = ["train.py", *arguments]
    with quick():
        code = exit_code(importlib.import_module("train").main)
    (folder / f"code-{os.environ['RANK']}").write_text(str(code))
    return code


# ----------------------------------------------------------------------------------------- starting processes


def start(job: str, routine: str, *paths: Path, gpus: bool = False, processes: int = 2) -> subprocess.Popen:
    """Start this file as a script, by torchrun."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words += [str(Path(__file__).resolve()), job, routine, *map(str, paths)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=environment, start_new_session=True, **pipes)


def end(process: subprocess.Popen, seconds: float = 120) -> str:
    """Return what the processes have printed, when they have ended."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        pytest.fail(f"they have not ended:\n{process.communicate()[0]}")


def children(process: subprocess.Popen) -> list[int]:
    """Return what torchrun has started, each in a session of its own."""
    command = ["ps", "-A", "-o", "ppid=,pid="]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(pid) for ppid, pid in map(str.split, table.splitlines()) if int(ppid) == process.pid]


def kill(process: subprocess.Popen) -> None:
    for group in [*children(process), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def biggest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float((one["model"][name] - other["model"][name]).abs().max()) for name in other["model"])


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, wanted in other["model"].items():
        assert torch.allclose(one["model"][name], wanted, **CLOSE), (name, biggest_difference(one, other))
    for event, wanted in zip(one["history"], other["history"], strict=True):
        assert event["step"] == wanted["step"]
        assert event["train.loss"] == pytest.approx(wanted["train.loss"], rel=1e-4)


class Session:
    """What two processes have trained, and what the same trainings give in this one."""

    def __init__(self, routine: str, pairs: Path, folder: Path) -> None:
        self.routine, self.pairs, self.folder = routine, pairs, folder
        (folder / "two").mkdir()
        train = load_routine(routine).train
        folders = global_config_of(folder / "two" / "one-to-two")
        with quick(), in_training(7):
            self.before_two = interrupted(train, *make_datasets(pairs, 4), exact_config(), folders)
        process = start("session", routine, pairs, folder / "two")
        self.said = end(process)
        assert process.returncode == 0, self.said
        files = [folder / "two" / f"outcomes-{rank}.pt" for rank in range(2)]
        self.ranks: list[dict[str, Any]] = [torch.load(file, weights_only=False) for file in files]
        self.one = self.alone("one")

    def alone(self, name: str, **keys: Any) -> dict[str, Any]:
        """The outcome of the exact training in one process."""
        datasets, folders = make_datasets(self.pairs, 4), global_config_of(self.folder / name)
        with quick():
            return outcome(load_routine(self.routine).train(*datasets, exact_config() | keys, folders))

    def log_dir(self, name: str) -> Path:
        """The folder of the only run of a training."""
        folders = [file.parent for file in (self.folder / "two" / name / "logs").glob("*/config.json")]
        assert len(folders) == 1
        return folders[0]


EACH_ROUTINE = [
    pytest.param(one, marks=pytest.mark.slow if one != DISTRIBUTED[0] else ()) for one in DISTRIBUTED
]


@pytest.fixture(scope="module", params=EACH_ROUTINE)
def two(request, pairs_dir, tmp_path_factory) -> Session:
    load_routine(request.param)
    return Session(request.param, pairs_dir, tmp_path_factory.mktemp(request.param))


# -------------------------------------------------------------------------------------------------- the parts


SIZES = {
    "num_samples": st.integers(1, 200),
    "batch_size": st.integers(1, 33),
    "num_processes": st.integers(1, 9),
    "shuffle": st.booleans(),
    "drop_last": st.booleans(),
    "epoch": st.integers(0, 3),
}


def parts(sizes: dict[str, Any]) -> list[TrainingBatches]:
    """The batches of each process."""
    sizes = sizes | {"seed": 3}
    epoch, number = sizes.pop("epoch"), sizes.pop("num_processes")
    batches = [TrainingBatches(**sizes, rank=rank, num_processes=number) for rank in range(number)]
    for one in batches:
        one.epoch = epoch
    return batches


@given(sizes=st.fixed_dictionaries(SIZES), accumulate=st.integers(1, 5))
def test_each_sample_is_counted_once_by_one_process_and_weighs_the_same(sizes, accumulate):
    own, whole = parts(sizes), parts(sizes | {"num_processes": 1})[0]
    drawn, counted = [list(one) for one in own], list[int]()
    assert {len(batches) for batches in drawn} == {whole.num_batches}
    for number, batch in enumerate(whole):
        assert [index for _, index in batch] == whole.indices(sizes["epoch"], number)
        counts = [one.own_size(number) for one in own]
        assert sum(counts) == whole.size(number) == len(batch) and max(counts) - min(counts) <= 1
        pieces = [batches[number] for batches in drawn]  # each process must take part
        assert all(len(piece) == max(count, 1) for piece, count in zip(pieces, counts, strict=True))
        together = [key for piece, count in zip(pieces, counts, strict=True) for key in piece[:count]]
        assert together == batch
        counted += [index for _, index in together]
        size_of_step = min(accumulate, whole.num_batches - (number - number % accumulate))
        for one, count in zip(own, counts, strict=True):
            run = SimpleNamespace(
                setup=SimpleNamespace(loaders=SimpleNamespace(batches=one)),
                state=SimpleNamespace(batch=number),
                config={"ACCUMULATE": accumulate},
            )
            weight = run_module.Run.loss_weight.fget(run)  # type: ignore[attr-defined]
            # The mean over own samples becomes their sum; gradients are averaged over the processes.
            of_a_sample = weight / len(own) / max(1, count)
            expected = 1 / one.size(number) / size_of_step if count else 0.0
            assert of_a_sample == pytest.approx(expected, rel=1e-12)
    assert sizes["shuffle"] or counted == list(range(len(counted)))
    rest = sizes["num_samples"] % sizes["batch_size"] if sizes["drop_last"] else 0
    assert len(counted) == len(set(counted)) == sizes["num_samples"] - rest


@given(
    shapes=st.lists(st.sampled_from([None, (4, 4), (8, 4), (40, 40)]), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    max_pixels=st.sampled_from([None, 32, 100]),
    number=st.integers(1, 9),
)
def test_each_sample_is_evaluated_by_one_process_in_the_same_batch(shapes, batch_size, max_pixels, number):
    class Shaped:
        def __len__(self) -> int:
            return len(shapes)

        def sample_shape(self, index: int) -> Any:
            return shapes[index]

    def batches(rank: int, number: int) -> list:
        return list(EvaluationBatches(Shaped(), batch_size, max_pixels, rank, number))

    whole, own = batches(0, 1), [batches(rank, number) for rank in range(number)]
    assert sorted(itertools.chain(*own)) == sorted(whole)
    assert max(map(len, own)) - min(map(len, own)) <= 1
    assert sorted(itertools.chain(*whole)) == [(0, index) for index in range(len(shapes))]
    left = Counter(shapes)
    for batch in whole:
        (shape,) = {shapes[index] for _, index in batch}
        most = max(1, max_pixels // (shape[0] * shape[1])) if shape and max_pixels else batch_size
        assert len(batch) == min(batch_size, most, left[shape])  # filled as far as may be
        left[shape] -= len(batch)


# ------------------------------------------------------------------------------------------------ one process


def test_one_process_has_nobody_to_wait_for():
    def never(*_: Any) -> None:
        raise AssertionError

    with distributed.join_processes(never, never):
        assert not dist.is_initialized() and distributed.is_main()
    assert (distributed.num_launched(), distributed.num_processes(), distributed.rank()) == (1, 1, 0)
    assert distributed.on_main(lambda: 3) == 3
    with pytest.raises(OSError, match="disk is full"):
        distributed.on_main(fail)
    assert distributed.gather("a") == ["a"] and distributed.sum_up([1.0, 2.0]) == [1.0, 2.0]
    model, device = nn.BatchNorm2d(3), torch.device("cpu")
    assert distributed.parallel(model, device) is model and distributed.own_device(device) is device
    distributed.sync_buffers(model, None)
    distributed.refuse_several("fastai")


def test_the_processes_are_left_again_after_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls: list[Any] = []
    with pytest.raises(ValueError), distributed.join_processes(calls.append, lambda: calls.append("left")):
        raise ValueError
    assert calls == ["gloo", "left"]


@pytest.mark.parametrize(
    "routine", [pytest.param(one, marks=pytest.mark.slow if one == "fastai" else ()) for one in ALONE]
)
def test_routines_for_one_process_refuse_several_in_a_sentence(routine, pairs_dir, tmp_path, monkeypatch):
    load_routine(routine)
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run_script("train.py", "--routine", routine, "--data", pairs_dir, root=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"UserError: The {routine} routine runs as one process")
    assert "torchrun has started 2" in done.stderr and "--routine pytorch or ignite" in done.stderr
    assert {file.name.split(".json")[0] for file in tmp_path.glob("**/*.*")} <= {"data_facts"}


def test_what_is_not_a_number_is_no_disagreement(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, pickle.loads(pickle.dumps(value))])
    distributed.refuse_disagreement({"data contract": {"nodata": float("nan")}, "lr": 0.1})


@pytest.mark.parametrize(
    ("device", "num_gpus", "local_rank", "message"),
    [
        ("cpu", 2, 0, "hide them, CUDA_VISIBLE_DEVICES=''"),
        ("cuda", 1, 1, r"more processes than there are GPUs \(1\): use --nproc-per-node"),
    ],
)
def test_what_frameworks_would_do_wrong_with_gpus_is_refused(
    monkeypatch, device, num_gpus, local_rank, message
):
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(UserError, match=message):
        distributed.own_device(torch.device(device))


# ---------------------------------------------------------------------------------------------- two processes


@needs_processes
class TestTwo:
    """Two processes, compared with one."""

    def test_they_train_as_one(self, two):
        assert_close(two.ranks[0]["exact"], two.one)
        assert [event["step"] for event in two.one["history"]] == [4, 8, 12]

    def test_they_all_end_with_the_same(self, two):  # also BatchNorm's running statistics
        for name in ("exact", "rich"):
            one, other = (rank[name] for rank in two.ranks)
            assert one["digest"] == other["digest"]
            assert one["metrics"] == other["metrics"]
            assert one["name"] == other["name"]

    @pytest.mark.parametrize("name", ["exact", "rich"])
    def test_they_evaluate_as_one(self, two, name, tmp_path):
        config, crops = (exact_config(), 4) if name == "exact" else (rich_config(), 2)
        prepared = prepare(
            *make_datasets(two.pairs, crops), config, global_config_of(tmp_path), None, PACKAGE
        )
        best = two.folder / "two" / name / "weights" / two.ranks[0][name]["name"] / "best.pt"
        model = prepared.eval_model
        fill_model(model, load_weights(best)["model"], str(best))
        contract = calibrate(prepared, model)
        assert load_weights(best)["contract"] == contract.to_dict() and contract.temperature != 1
        results = {f"validation.{key}": value for key, value in describe_fit(contract).items()} | {
            f"{part}.{key}": value
            for part, loader, how in (
                ("validation", prepared.loaders.validation, None),
                ("test", prepared.loaders.test, contract),
            )
            for key, value in evaluate(model, loader, prepared.metrics(how), prepared.context).items()
        }
        assert len(prepared.loaders.validation) == (1 if name == "exact" else 4)
        assert results == two.ranks[0][name]["metrics"]

    def test_only_the_first_one_writes_and_speaks(self, two):
        assert two.said.count(f"{two.ranks[0]['exact']['name']}: trained 3 epochs") == 1
        # The cache of what is known about files is everybody's: who has read one enters it, under a lock.
        others = [path for path in two.ranks[1]["written"] if "data_facts.json" not in path]
        assert [path for path in others if not re.fullmatch(r"os.mkdir .*/(logs|[\w-]+)", path)] == []
        assert any("journal.jsonl" in path for path in two.ranks[0]["written"])
        for name in ("exact", "rich"):
            log_dir = two.log_dir(name)
            rows = rows_of(global_config_of(log_dir.parents[1]))
            assert [(row["NAME"], row["STATUS"]) for row in rows] == [(log_dir.name, "finished")]
            steps = [event["step"] for event in events_of(log_dir, "step")]
            assert steps == list(range(1, steps[-1] + 1))
            assert [event["processes"] for event in events_of(log_dir, "start")] == [2]
            assert len(list((log_dir / "tensorboard").iterdir())) == 1
            assert [path.name for path in (log_dir.parents[1] / "weights").iterdir()] == [log_dir.name]

    @pytest.mark.parametrize(("name", "step"), [("preempted-in-validation", 3), ("preempted-in-test", 6)])
    def test_a_signal_to_one_of_them_ends_all_and_they_resume(self, two, name, step):
        for rank in two.ranks:
            # Nobody leaves before the state is saved: torchrun kills the others half a minute later.
            assert rank[name] == [("preempted", f"last-{step:08d}.pt")] * 2
            for key in ("digest", "metrics"):
                assert rank[f"{name} resumed"][key] == rank["rich"][key]
        assert [event["step"] for event in events_of(two.log_dir(name), "step")] == list(range(1, 7))

    def test_what_two_have_begun_one_ends(self, two):
        name = two.log_dir("two-to-one").name
        assert rows_of(global_config_of(two.folder / "two" / "two-to-one"))[0]["STATUS"] == "preempted"
        result = two.alone("two/two-to-one", RESUME=name)
        assert result["name"] == name
        assert_close(result, two.one)

    def test_what_one_has_begun_two_end(self, two):
        result = two.ranks[0]["one-to-two"]
        assert result["name"] == two.before_two
        assert_close(result, two.one)
        log_dir = two.log_dir("one-to-two")
        assert [event["processes"] for event in events_of(log_dir, "start")] == [1, 2]
        assert [event["step"] for event in events_of(log_dir, "step")] == list(range(1, 13))

    def test_they_tell_one_another(self, two):
        assert [rank["together"] for rank in two.ranks] == [[0, [0, 1], [4.0, 2.0**60]]] * 2
        expected = ["OSError: the disk is full", "UserError: OSError: the disk is full"]
        assert [rank["failure"] for rank in two.ranks] == expected

    def test_processes_that_were_given_something_else_are_refused_before_they_train(self, two):
        for rank in two.ranks:
            rate, files = rank["refused"]
            assert (
                rate == "process 1 was given another OPTIMIZER_CONFIG.lr than process 0: give all the same."
            )
            assert "data (its files differ)" in files and "OPTIMIZER_CONFIG" not in files
        assert not list(two.folder.glob("two/refused/*/*/config.json"))  # nothing was begun

    def test_the_command_joins_them_again_ends_with_75_and_resumes_in_one(self, two):
        folder = two.folder / "two" / "command"
        assert [rank["code"] for rank in two.ranks] == [EXIT_CODE] * 2
        assert_preempted_and_resumed(folder, two.said)

    def test_no_thread_of_a_group_lives_on(self, two):
        # It could abort the process when its interpreter ends. The last training was ended by an exception.
        assert [rank["threads"] for rank in two.ranks] == [[]] * 2


# --------------------------------------------------------------------------------------------------- commands


KEYS = ["MODEL_CONFIG.bulk_ch=4", "MODEL_CONFIG.n_recursions=1", "MODEL_CONFIG.norm=None", "SCHEDULER=None"]
KEYS += [f"DATA_LOADER_CONFIG.{one}" for one in ("batch_size=4", "num_workers=1")]
KEYS += ["DATASET_CONFIG.train.crop=16", "PRECISION=fp32", "DEVICE=cpu", "CHECKPOINT_SECONDS=1000"]


def assert_preempted_and_resumed(project: Path, said: str) -> None:
    """Assert that the command's run was saved, and that one process ends it."""
    folders = global_config_of(project)
    assert "DataLoader worker" not in said and 'train.py", line' not in said
    (row,) = rows_of(folders)
    commands = (
        f"python train.py --resume {row['NAME']}\n",
        f'train(train_dataset, test_dataset, config | {{"RESUME": "{row["NAME"]}"}}',
    )
    assert sum(said.count(f"Resume it with: {command}") for command in commands) == 1
    assert row["STATUS"] == "preempted"
    steps = [event["step"] for event in events_of(Path(folders["LOG_DIR"]) / row["NAME"], "step")]
    assert steps == list(range(1, len(steps) + 1))
    (newest, *_) = checkpoint_files(Path(folders["WEIGHT_DIR"]) / row["NAME"])
    assert newest.name == f"last-{len(steps):08d}.pt"
    with quick():
        done = run_script("train.py", "--resume", row["NAME"], f"EPOCHS={row['EPOCH'] + 1}", root=project)
    assert done.returncode == 0 and rows_of(folders)[0]["STATUS"] == "finished", done.stderr


def signal_torchrun(process: subprocess.Popen) -> None:
    process.terminate()


def interrupt_torchrun(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)


def signal_everyone(process: subprocess.Popen) -> None:
    for pid in [*children(process), process.pid]:
        os.kill(pid, signal.SIGTERM)


@needs_processes
@pytest.mark.slow
@pytest.mark.parametrize("routine", DISTRIBUTED)
@pytest.mark.parametrize("send", [signal_torchrun, interrupt_torchrun, signal_everyone])
def test_a_signal_ends_the_command_in_all_processes(send, routine, pairs_dir, tmp_path):
    load_routine(routine)
    process = start("command", routine, pairs_dir, tmp_path)
    try:
        limit, log_dir, events = time.monotonic() + 120, tmp_path / "logs", list[Any]()
        while "step" not in [event["event"] for event in events]:
            assert time.monotonic() < limit and process.poll() is None, end(process, 1)
            time.sleep(0.05)
            events = [one for file in log_dir.glob("*/journal.jsonl") for one in events_of(file.parent)]
        sessions = children(process)
        assert len(sessions) == 2 and events[0]["pid"] in sessions
        send(process)
        said = end(process, 45)
        assert processes_of(set(sessions)) == []
    finally:
        kill(process)
    # torchrun has no exit code of its own for it: it reports those of its processes, and fails.
    assert process.returncode == 1, said
    assert [(tmp_path / f"code-{rank}").read_text() for rank in range(2)] == [str(EXIT_CODE)] * 2, said
    assert_preempted_and_resumed(tmp_path, said)


@needs_processes
@pytest.mark.slow
@pytest.mark.parametrize("routine", DISTRIBUTED)
def test_finished_trainings_end_with_0_on_a_busy_machine(routine, pairs_dir, tmp_path):
    load_routine(routine)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        command = [sys.executable, __file__, "ends", routine, pairs_dir, tmp_path]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    finally:
        for process in busy:
            process.kill()
    assert (tmp_path / "codes").read_text() == repr([0] * 24), said


@needs_processes
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("routine", DISTRIBUTED)
def test_two_gpus_train_as_one(routine, pairs_dir, tmp_path):
    outcomes = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        process = start("on_gpus", routine, pairs_dir, folder, gpus=True, processes=processes)
        said = end(process)
        assert process.returncode == 0, said
        files = sorted(folder.glob("outcome-*.pt"))
        outcomes += [torch.load(file, weights_only=False) for file in files]
    one, *two = outcomes
    assert two[0]["digest"] == two[1]["digest"] and biggest_difference(two[0], one) < 1e-3


if __name__ == "__main__":
    job, routine, *paths = sys.argv[1:]
    pairs, folder = map(Path, paths)
    if job == "command":
        sys.exit(command(folder, "--routine", routine, "--data", str(pairs), *KEYS, "EPOCHS=2000"))
    {"session": session, "ends": ends, "on_gpus": on_gpus}[job](routine, pairs, folder)
