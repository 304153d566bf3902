"""What a run resumes with is compared with what it was trained with, and its files are its own."""

import contextlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.errors import ConfigError, UserError
from dida_core.runs import record as record_module
from dida_core.runs.failures import Pruned, asks_to_end
from dida_core.runs.rerun import read_segments
from dida_core.storage.checkpoint import checkpoint_files
from dida_core.storage.weights import load_weights, save_weights

from dida_tools.training.pytorch_training import train
from dida_tools.utils.data import NpyDataset

from tests.helpers import FIRST, ROUTINES, events_of, load_routine, rows_of

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def environment(monkeypatch) -> dict[str, Any]:
    """What a run depends on, as a test wants it."""
    here = {"git_commit": "a", "git_diff": "", "python": "3.11", "cpu_capability": "AVX2", "threads": 1}
    here["packages"] = {"torch": "2.13", "pytest": "8"}
    monkeypatch.setattr(record_module, "describe_environment", lambda *_: json.loads(json.dumps(here)))
    return here


@pytest.fixture
def plain_config(tiny_config) -> dict[str, Any]:
    """The smallest model there is."""
    model = {"in_channels": 3, "out_channels": 3, "kernel_size": 1}
    return tiny_config | {"MODEL": torch.nn.Conv2d, "MODEL_CONFIG": model}


@pytest.fixture
def resume(datasets, plain_config, global_config, environment):
    """Train an epoch, and resume for another one each time it is called."""

    def one_more(**changes: Any) -> Any:
        sets = changes.pop("sets", datasets)
        config = plain_config | {"EPOCHS": one_more.epochs} | changes
        name = one_more.name
        one_more.result = train(*sets, config | {"RESUME": name}, global_config)
        one_more.epochs, one_more.name = one_more.epochs + 1, one_more.result.name
        return one_more.result

    one_more.epochs, one_more.name = 1, None
    return one_more


def test_each_start_keeps_its_environment_and_the_row_says_what_changed(
    resume, environment, global_config, capsys
):
    log_dir = resume().log_dir
    assert "RESUMED_WITH" not in rows_of(global_config)[0]
    capsys.readouterr()
    resume()
    environment["packages"]["pytest"] = "9"  # no number depends on it
    assert "other conditions" not in capsys.readouterr().out
    environment |= {"git_commit": "b", "threads": 2, "cpu_capability": "AVX512"}
    environment["packages"] = {"torch": "2.14", "pytest": "9"}
    resume()
    line = next(line for line in capsys.readouterr().out.splitlines() if "other conditions" in line)
    expected = (
        "code (commit): a then, b now; CPU capability: AVX2 then, AVX512 now; number of threads: 1 then, "
        "2 now; torch: 2.13 then, 2.14 now."
    )
    assert line == f"{resume.name} resumes under other conditions: {expected}"
    environment |= {"git_commit": "a", "threads": 1, "cpu_capability": "AVX2"}
    resume()
    changed = "another CPU capability, code (commit), number of threads, torch"
    said = rows_of(global_config)[0]["RESUMED_WITH"]
    assert sorted(said.removeprefix("another ").split(", ")) == changed.removeprefix("another ").split(", ")
    segments = read_segments(log_dir)  # the second start found all as it was
    found = [(one["git_commit"], one["threads"], one["packages"]["torch"]) for one in segments]
    assert found == [("a", 1, "2.14"), ("b", 2, "2.14"), ("a", 1, "2.13")]
    assert all(len(one["data"]) == 28 for one in segments)


@pytest.mark.parametrize("content", ["{}", '{"python": "3.11"}', None, "{"])
def test_a_run_that_recorded_less_resumes_silently(resume, environment, content, capsys):
    """As one of an older version, whose checkpoint and record know nothing of their run."""
    result = resume()
    for file in checkpoint_files(result.weight_dir):
        stored = load_weights(file)
        del stored["started"], stored["state"]["best_digest"]
        save_weights(file, stored)
    file = result.log_dir / "environment.json"
    file.unlink() if content is None else file.write_text(content)
    capsys.readouterr()
    resume()
    said = [f"environment.json of {result.name} cannot be read: what has changed is not known."]
    said = [*said[: content in (None, "{")], f"{result.name} resumes after epoch 1, step 4."]
    assert capsys.readouterr().out.splitlines()[: len(said)] == said


def change_masks(folder: Path) -> None:
    for file in (folder / "train" / "y").iterdir():
        np.save(file, (np.load(file) == 0).astype(np.uint8))


def remove_an_image(folder: Path) -> None:
    for kind in "xy":
        (folder / "train" / kind / "image_00.npy").unlink()


def change_the_start(folder: Path) -> None:
    save_weights(
        folder / "start.pt",
        {"model": {k: v + 1 for k, v in load_weights(folder / "start.pt")["model"].items()}},
    )


@pytest.mark.parametrize(
    "change",
    [
        change_masks,
        None,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (remove_an_image, change_the_start)),
    ],
)
def test_other_data_is_another_training(resume, pairs_dir, tmp_path, plain_config, capsys, change):
    folder = shutil.copytree(pairs_dir, tmp_path / "pairs")

    def sets() -> list[NpyDataset]:
        return [NpyDataset(folder / split / "x", folder / split / "y") for split in ("train", "test")]

    model = plain_config["MODEL"](**plain_config["MODEL_CONFIG"])
    save_weights(folder / "start.pt", {"model": model.state_dict()})
    start = {"INIT_WEIGHTS": str(folder / "start.pt")}
    result = resume(sets=sets(), **start)
    written = {file: file.read_bytes() for file in result.log_dir.glob("*.json*")}
    if change is None:
        start = {}
    else:
        change(folder)
    with pytest.raises(
        ConfigError, match=r"files of the data are not what they were.*REQUIRE_RERUNNABLE=False"
    ):
        resume(sets=sets(), **start)
    assert written == {file: file.read_bytes() for file in result.log_dir.glob("*.json*")}
    resume(sets=sets(), REQUIRE_RERUNNABLE=False, **start)
    capsys.readouterr()
    (row,) = rows_of({"LOG_DIR": str(result.log_dir.parent)})
    assert row["RESUMED_WITH"] == "another data" and row["RERUNNABLE"].startswith("no: ")
    resume(sets=sets(), REQUIRE_RERUNNABLE=False, **start)
    assert "other conditions" not in capsys.readouterr().out


def test_the_same_files_elsewhere_and_another_test_set_are_no_other_training(
    resume, pairs_dir, tmp_path, capsys
):
    def sets(folder: Path) -> list[NpyDataset]:
        return [NpyDataset(folder / split / "x", folder / split / "y") for split in ("train", "test")]

    resume(sets=sets(pairs_dir))
    moved = shutil.copytree(pairs_dir, tmp_path / "moved")
    resume(sets=sets(moved))
    assert "other conditions" not in capsys.readouterr().out
    image = moved / "test" / "x" / "image_00.npy"
    np.save(image, np.load(image) // 2)
    resume(sets=sets(moved))
    assert "other conditions: data: 1 files" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ own files


def other_weights(result: Any, file: Path) -> dict[str, Any]:
    stored = load_weights(file)
    return stored | {"model": {name: 2 * value for name, value in stored["model"].items()}}


@pytest.mark.parametrize("problem", ["other", "missing", "damaged"])
def test_best_weights_that_are_not_those_of_the_run_are_refused_before_it_trains(resume, problem):
    best = resume().weights["best"]
    if problem == "other":
        save_weights(best, other_weights(resume.result, best))
    elif problem == "missing":
        best.unlink()
    else:
        best.write_bytes(best.read_bytes()[:-1])
    message = {"other": "holds other weights", "missing": "no such weights", "damaged": "damaged"}[problem]
    with pytest.raises(
        UserError, match=rf"best\.pt: .*{message}.* Put its own file back, or start.*INIT_WEIGHTS="
    ):
        resume()


def test_the_checkpoint_of_another_run_is_refused(resume, datasets, plain_config, global_config):
    result = resume()
    other = train(*datasets, plain_config | {"EPOCHS": 3, "SEED": 1}, global_config)
    foreign = result.weight_dir / other.weights["last"].name
    shutil.copy(other.weights["last"], foreign)
    with pytest.raises(
        UserError, match=rf"{foreign.name} is of a run that started at .* Put its own file back"
    ):
        resume()
    foreign.unlink()
    assert resume().state.epoch == 2


@pytest.mark.parametrize(
    "keep",
    [slice(0, 0), *(pytest.param(one, marks=pytest.mark.slow) for one in (slice(0, 3), slice(6, None)))],
)
def test_a_journal_that_lost_lines_is_noticed_and_restored(resume, environment, global_config, keep, capsys):
    resume()
    environment["threads"] = 2
    result = resume()
    (before,) = rows_of(global_config)
    journal = result.log_dir / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[keep]))
    lost = 8 - sum(line.startswith(b'{"event": "step"') for line in lines[keep])
    capsys.readouterr()
    resume.epochs = 2
    resume()
    assert f"journal.jsonl has lost {lost} of 8 steps, and their losses; " in capsys.readouterr().out
    epochs = events_of(result.log_dir, "epoch")
    assert sorted(event["epoch"] for event in epochs) == [1, 2]
    (row,) = rows_of(global_config)
    same = ("STARTED", "EPOCH", "BEST_EPOCH", "RERUNNABLE", "STATUS", "test.f1", "train.loss", "RESUMED_WITH")
    assert {key: row[key] for key in same} == {key: before[key] for key in same}
    assert "lost" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- ends of a run


@pytest.mark.parametrize("answer", [0.93, 0, 1, "", "no", torch.tensor(True), [], float("nan")], ids=repr)
def test_what_is_no_decision_is_refused(answer):
    with pytest.raises(UserError, match=r"AFTER_EPOCH returned .*: return True to end the run as pruned"):
        asks_to_end(answer)


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ([None, False, np.bool_(False)], "finished"),
        ([None, True], "pruned"),
        ([False, np.bool_(True)], "pruned"),
        ([0.93], "failed"),
    ],
)
def test_only_true_prunes(datasets, plain_config, global_config, answers, status):
    config = plain_config | {"EPOCHS": 3, "AFTER_EPOCH": lambda run: answers[run.state.epoch - 1]}
    with contextlib.suppress(Pruned, UserError):
        train(*datasets, config, global_config)
    (row,) = rows_of(global_config)
    assert (row["STATUS"], row["EPOCH"]) == (status, len(answers))


def test_patience_raised_continues_as_if_it_had_been_so_from_the_start(
    datasets, plain_config, global_config, capsys
):
    config = plain_config | {"OPTIMIZER_CONFIG": {"lr": 0.0}, "EPOCHS": 7}
    expected = train(*datasets, config | {"PATIENCE": 3}, global_config)
    stopped = train(*datasets, config | {"PATIENCE": 2}, global_config)
    assert (stopped.state.epoch, expected.state.epoch) == (3, 4)
    capsys.readouterr()
    for patience, epochs in ((2, 3), (3, 4), (None, 7)):
        again = train(*datasets, config | {"PATIENCE": patience, "RESUME": stopped.name}, global_config)
        said = (
            "it had stopped early: a higher PATIENCE or more EPOCHS continue it." in capsys.readouterr().out
        )
        assert (again.state.epoch, said) == (epochs, patience == 2)
        if patience == 3:
            assert asdict(again.state) | {"seconds": 0} == asdict(expected.state) | {"seconds": 0}


# ------------------------------------------------------------------------------- randomness, and hidden state


class Guessing(torch.nn.Conv2d):
    """A model that draws also where it is evaluated, as Monte-Carlo dropout does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(x), 0.5, training=True) + np.random.rand()


@pytest.mark.parametrize("routine", ROUTINES)
def test_what_a_model_draws_in_evaluation_follows_from_the_batch(
    routine, datasets, plain_config, global_config, results_of_the_first
):
    for workers in (0, 2) if routine == FIRST else (0,):
        loader = plain_config["DATA_LOADER_CONFIG"] | {"num_workers": workers}
        config = plain_config | {"MODEL": Guessing, "EPOCHS": 1, "DATA_LOADER_CONFIG": loader}
        result = load_routine(routine).train(*datasets, config, global_config)
        expected = results_of_the_first.setdefault("all", (result.digest, result.metrics))
        assert (result.digest, result.metrics) == expected


@pytest.fixture(scope="module")
def results_of_the_first() -> dict[str, Any]:
    return {}


class Remembering(torch.utils.data.Dataset):
    """Samples of a generator of its own, whose state no checkpoint has."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(3, 8, 8, generator=self.generator), torch.full((8, 8), index % 3)


def test_a_state_that_is_in_no_state_dict_is_reported_in_the_first_step(plain_config, global_config, capsys):
    config = plain_config | {"DATASET": Remembering, "DATASET_CONFIG": {"train": {}}, "EPOCHS": 3}
    result = train(Remembering(), None, config, global_config)
    last, before = checkpoint_files(result.weight_dir)  # of the end, and of the first epoch
    last.unlink()  # as if it had been killed in the last epoch
    capsys.readouterr()
    step = load_weights(before)["state"]["step"] + 1
    train(Remembering(), None, config | {"RESUME": result.name}, global_config)
    said = capsys.readouterr().out
    assert said.count("differ from those before the interruption") == 1
    assert f"step {step}: its results differ" in said and "a state is in no state_dict" in said
