"""The suite itself: a trained model passes it, and each of many damaged ones fails the check that is made for it."""

import inspect
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from dida_tools.config.config import make_global_config
from dida_tools.config.errors import UserError
from dida_tools.models import UNET
from dida_tools.training.pytorch_training import train
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.transforms import GEOMETRY
from dida_tools.utils.loss import dice_bce_sum, f1, iou, multi_class_dice_ce_sum
from dida_tools.utils.weights import load_weights, save_weights

from . import checks
from .measures import WIDTH, PeakMemory, table
from .subject import Subject, choose_subject

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("ground", "left", "right")
TEST_FILE = SimpleNamespace(DEVICE="cpu", DEFAULT_WEIGHTS=None)


class Trained(SimpleNamespace):
    """A run: its name, and where it lies."""

    name: str
    folder: Path

    def subject(self, **options: Any) -> Subject:
        module = SimpleNamespace(**(vars(TEST_FILE) | options))
        return choose_subject(module, self.name, None, make_global_config(self.folder))


def train_in(folder: Path, train_set: Any, test_set: Any, **changes: Any) -> Trained:
    config = {
        "MODEL": UNET,
        "MODEL_CONFIG": {
            "ch_in": 3,
            "ch_out": 3,
            "bulk_ch": 8,
            "n_recursions": 2,
            "norm": partial(nn.GroupNorm, 4),
        },
        "DATA_LOADER_CONFIG": {"batch_size": 4},
        "OPTIMIZER": torch.optim.AdamW,
        "OPTIMIZER_CONFIG": {"lr": 1e-2},
        "EPOCHS": 2,
        "LOSS": multi_class_dice_ce_sum,
        "DEVICE": "cpu",
        "PRECISION": "fp32",
    }
    return Trained(
        name=train(train_set, test_set, config | changes, make_global_config(folder)).name, folder=folder
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, faint_pairs_dir: Path) -> Trained:
    """A small U-Net that has learned what a pixel alone does not tell."""
    folder = tmp_path_factory.mktemp("trained")
    sets = []
    for part, options in {"train": {"augment": GEOMETRY}, "test": {}}.items():
        x, y = faint_pairs_dir / part / "x", faint_pairs_dir / part / "y"
        sets.append(NpyDataset(x, y, class_names=NAMES, **options))
    return train_in(folder, *sets, EPOCHS=10, METRICS={"f1": f1, "iou": iou}, MONITOR="max f1")


@pytest.fixture(scope="module")
def healthy(trained: Trained) -> Subject:
    return trained.subject()


def all_checks() -> Iterator[tuple[Callable[..., None], dict[str, Any]]]:
    """Every check with the values that pytest would give it."""
    for name, check in vars(checks).items():
        if not name.startswith("test_"):
            continue
        marks = [mark for mark in getattr(check, "pytestmark", []) if mark.name == "parametrize"]
        for values in itertools.product(*(mark.args[1] for mark in marks)):
            yield check, dict(zip((mark.args[0] for mark in marks), values, strict=True))


def run_check(check: Callable[..., None], subject: Subject, **values: Any) -> None:
    wanted = inspect.signature(check).parameters
    if "show" in wanted:
        values["show"] = [].append
    if "tmp_path" not in wanted:
        check(subject, **values)
        return
    with tempfile.TemporaryDirectory() as folder:
        check(subject, tmp_path=Path(folder), **values)


def suite(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_models",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-rs",
    ]
    given = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"} | environment
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=given, capture_output=True, text=True, check=False
    )


# ------------------------------------------------------------------------------------------------------ as it is called


def test_a_trained_run_passes_and_its_tables_are_shown(trained: Trained) -> None:
    done = suite("--run", trained.name, "-k", "not pt2", ROOT_PATH=str(trained.folder))
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
    measured = done.stdout.partition("= measured =")[2]
    for title in ("Flips", "Quality", "Calibration", "Robustness", "Test-time augmentation", "Speed"):
        assert f"\n{title}" in measured
    assert max(map(len, measured.splitlines())) <= WIDTH
    assert all(f"without channel {channel}" in measured for channel in range(3))


@pytest.mark.slow
def test_its_program_agrees_too(healthy: Subject) -> None:
    run_check(checks.test_exported_forms_agree, healthy, kind="pt2")


def test_a_run_that_is_not_there_is_told(trained: Trained) -> None:
    with pytest.raises(UserError, match=f"no run is called 'nowhere': the last ones are {trained.name}"):
        choose_subject(TEST_FILE, "nowhere", None, make_global_config(trained.folder))


def test_weights_of_a_run_come_with_its_record_and_others_with_the_config(
    trained: Trained, tmp_path: Path
) -> None:
    best = trained.folder / "weights" / trained.name / "best.pt"
    of_run = choose_subject(TEST_FILE, None, str(best), make_global_config(trained.folder))
    assert of_run.name == trained.name
    assert of_run.recorded["f1"] > 0.9
    save_weights(tmp_path / "bare.pt", load_weights(best)["model"])
    options = {"ch_in": 3, "ch_out": 3, "bulk_ch": 8, "n_recursions": 2, "norm": partial(nn.GroupNorm, 4)}
    config = {
        "MODEL": UNET,
        "MODEL_CONFIG": options,
        "INPUT_DIM": (2, 3, 32, 32),
        "OUTPUT_DIM": (2, 3, 32, 32),
    }
    config |= {
        "LOSS": multi_class_dice_ce_sum,
        "OPTIMIZER": torch.optim.AdamW,
        "OPTIMIZER_CONFIG": {"lr": 1e-2},
    }
    module = SimpleNamespace(**vars(TEST_FILE), **config)
    bare = choose_subject(module, None, str(tmp_path / "bare.pt"), make_global_config(tmp_path))
    for name, value in of_run.model.state_dict().items():
        assert torch.equal(value, bare.model.state_dict()[name])
    with pytest.raises(pytest.skip.Exception, match="there are no test data without a run"):
        run_check(checks.test_calibration, bare)


def test_bounds_of_the_test_file_count(trained: Trained) -> None:
    with pytest.raises(AssertionError, match=r"above 0\.01"):
        run_check(
            checks.test_parameters_are_finite_and_within_bounds, trained.subject(BOUNDS={"parameter": 0.01})
        )


def test_each_check_says_what_it_protects_from() -> None:
    for check, _ in all_checks():
        assert check.__doc__.startswith("Protects from "), check.__name__
        assert check.__doc__.endswith("."), check.__name__


# ------------------------------------------------------------------------------------------------------- damaged models


class Damaged(nn.Module):
    """A model around which something went wrong."""

    def __init__(self, model: nn.Module, answer: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.answer = model, answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.model, x)


class Counting(Damaged):
    """Has a buffer that predictions change."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, self.shift)
        self.register_buffer("mean", torch.zeros(()))

    def shift(self, model: nn.Module, x: Tensor) -> Tensor:
        self.mean += 0.1 * (x.mean() - self.mean)
        return model(x) - self.mean


class Noting(Damaged):
    """Has a buffer that predictions change, without effect on them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, self.note)
        self.register_buffer("calls", torch.zeros(()))

    def note(self, model: nn.Module, x: Tensor) -> Tensor:
        self.calls += 1
        return model(x)


def with_parameter(subject: Subject, change: Callable[[nn.Parameter], Any]) -> Subject:
    model = subject.copy()
    with torch.no_grad():
        change(next(model.parameters()))
    return replace(subject, model=model)


def with_dead_parameter(subject: Subject) -> Subject:
    model = subject.copy()
    model.dead = nn.Parameter(torch.ones(3))
    return replace(subject, model=model)


def answering(subject: Subject, answer: Callable[[nn.Module, Tensor], Tensor]) -> Subject:
    return replace(subject, model=Damaged(subject.copy(), answer).eval())


def with_batch_norm(subject: Subject) -> Subject:
    norm = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    return answering(subject, lambda model, x: model(norm(x)))


def with_place(subject: Subject) -> Subject:
    def answer(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) + torch.linspace(-3, 3, x.shape[-1]) * torch.tensor([[[1]], [[0]], [[-1]]])

    return answering(subject, answer)


def by_heart(subject: Subject) -> Subject:
    """Knows the test images, and is wrong about all others."""
    known = [inputs for inputs, _ in subject.test_sample]

    def answer(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) if any(torch.equal(x, one) for one in known) else -model(x)

    return answering(subject, answer)


def odd_edge_lost(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[..., : x.shape[-2] // 2 * 2, :]


def mean_of_all(model: nn.Module, x: Tensor) -> Tensor:
    return model(x - x.mean())


def scaled_by_deviation(model: nn.Module, x: Tensor) -> Tensor:
    return model(x / x.std((-2, -1), keepdim=True)) if x.shape[-1] > 1 else model(x)


def with_exponential(model: nn.Module, x: Tensor) -> Tensor:
    return model(x) + x.exp().mean((1, 2, 3), keepdim=True)


DAMAGES: dict[str, tuple[Callable[[Subject], Subject], Callable[..., None], str]] = {
    "NaN weights": (
        lambda subject: with_parameter(subject, lambda one: one.view(-1)[0].fill_(torch.nan)),
        checks.test_parameters_are_finite_and_within_bounds,
        "encode.0.conv.weight: 1 of 216 values are NaN",
    ),
    "exploded weights": (
        lambda subject: with_parameter(subject, lambda one: one.mul_(1e6)),
        checks.test_parameters_are_finite_and_within_bounds,
        "above 1000",
    ),
    "contract of another model": (
        lambda subject: replace(subject, contract=replace(subject.contract, outputs=7)),
        checks.test_contract_is_that_of_the_model,
        "the contract says 3 channels and 7 outputs, the model has 3 and 3",
    ),
    "batch of one squeezed": (
        lambda subject: answering(subject, lambda model, x: model(x).squeeze(0)),
        checks.test_batches_of_any_size,
        r"\(1, 3, 32, 32\) became \(3, 32, 32\)",
    ),
    "odd edge lost": (
        lambda subject: answering(subject, odd_edge_lost),
        checks.test_images_of_any_size,
        r"\(65, 63\) became \(2, 3, 64, 63\)",
    ),
    "dropout in evaluation": (
        lambda subject: answering(subject, lambda model, x: model(functional.dropout(x, 0.1))),
        checks.test_evaluation_is_deterministic,
        "two answers to the same images differ",
    ),
    "running statistics in evaluation": (
        lambda subject: replace(subject, model=Counting(subject.copy()).eval()),
        checks.test_evaluation_is_deterministic,
        "two answers to the same images differ",
    ),
    "notes in evaluation": (
        lambda subject: replace(subject, model=Noting(subject.copy()).eval()),
        checks.test_evaluation_is_deterministic,
        "an answer changes the model: calls",
    ),
    "ignores its input": (
        lambda subject: answering(subject, lambda model, x: model(torch.zeros_like(x))),
        checks.test_answer_depends_on_the_input,
        "all images get the same answer",
    ),
    "channel lost": (
        lambda subject: answering(subject, lambda model, x: model(x[:, [0, 1, 1]])),
        checks.test_each_channel_matters,
        "does not depend on channel 2",
    ),
    "normalized over the batch": (
        with_batch_norm,
        checks.test_neighbors_in_the_batch_change_nothing,
        "with other neighbors: outputs differ by",
    ),
    "knows the place": (with_place, checks.test_translation_by_a_tile, "answers change by 0"),
    "learned by heart, flipped": (by_heart, checks.test_flips, "flipped [a-z-]+, images have F1 0"),
    "divides by the deviation": (
        lambda subject: answering(subject, scaled_by_deviation),
        checks.test_constant_images,
        "get NaN or infinite answers",
    ),
    "overflows": (
        lambda subject: answering(subject, with_exponential),
        checks.test_values_out_of_range,
        "images times 10+ get NaN or infinite answers",
    ),
    "NaN spreads": (
        lambda subject: answering(subject, mean_of_all),
        checks.test_nan_stays_in_its_image,
        "a NaN in one image makes the answer to others NaN",
    ),
    "NaN stays": (
        lambda subject: replace(subject, model=Counting(subject.copy()).eval()),
        checks.test_nan_stays_in_its_image,
        "a NaN in one image",
    ),
    "dead parameter": (
        with_dead_parameter,
        checks.test_a_step_reaches_every_parameter,
        "dead: has no gradient",
    ),
    "cut off by detach": (
        lambda subject: answering(
            subject, lambda model, x: model.head(model.below(model.encode(x)).detach())
        ),
        checks.test_a_step_reaches_every_parameter,
        "model.encode.0.conv.weight: has no gradient",
    ),
    "nothing is trained": (
        lambda subject: replace(subject, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0)),
        checks.test_a_step_reaches_every_parameter,
        "the optimizer does not change it",
    ),
    "cannot learn": (
        lambda subject: replace(subject, loss=lambda prediction, target: (prediction * 0 + 1).mean()),
        checks.test_one_batch_can_be_learned_by_heart,
        "after 100 steps with one batch, the loss is 1; it was 1",
    ),
    "loss becomes NaN": (
        lambda subject: replace(
            subject, loss=lambda prediction, target: prediction.mean().sqrt() * torch.nan
        ),
        checks.test_one_batch_can_be_learned_by_heart,
        "the loss is nan in step 1",
    ),
    "other order of the classes": (
        lambda subject: answering(subject, lambda model, x: model(x)[:, [0, 2, 1]]),
        checks.test_results_are_not_below_the_recorded_ones,
        r"worse than recorded: .*f1\.left 0\.\d+ instead of 0\.9",
    ),
    "better results recorded": (
        lambda subject: replace(subject, recorded=subject.recorded | {"iou": subject.recorded["iou"] + 0.01}),
        checks.test_results_are_not_below_the_recorded_ones,
        r"worse than recorded: iou 0\.\d+ instead of 0\.\d+$",
    ),
    "untrained": (
        lambda subject: replace(subject, model=subject.untrained().eval()),
        checks.test_better_than_the_baselines,
        "left: 0.*, trees that see a pixel at a time 0.7",
    ),
    "one class unknown": (
        lambda subject: answering(
            subject, lambda model, x: model(x) - 99 * torch.tensor([[[0]], [[0]], [[1]]])
        ),
        checks.test_better_than_the_baselines,
        "right: 0.000, .*right: 0.000, the trivial answer 0.000",
    ),
    "unsure": (
        lambda subject: answering(subject, lambda model, x: 0.02 * model(x)),
        checks.test_calibration,
        "the expected calibration error is 0.[3-9]",
    ),
    "learned by heart, with noise": (
        by_heart,
        checks.test_robustness,
        "with noise of 0.1 deviations, F1 falls",
    ),
    "answers otherwise where it is exported": (
        lambda subject: answering(
            subject, lambda model, x: model(x) * (2 if torch.compiler.is_exporting() else 1)
        ),
        checks.test_exported_forms_agree,
        "the exported model differs from PyTorch by 0",
    ),
    "learned by heart, averaged": (
        by_heart,
        checks.test_gain_and_cost_of_averaged_flips,
        "averaged over flips, F1 falls from 0.9",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_fails_the_check_made_for_it(healthy: Subject, damage: str) -> None:
    make, check, message = DAMAGES[damage]
    damaged = make(healthy)
    with pytest.raises(AssertionError, match=message):
        for one, values in all_checks():
            if one is check:
                run_check(check, damaged, **values)


def test_a_damage_is_made_for_each_check_that_judges() -> None:
    assert {check for check, _ in all_checks()} - {check for _, check, _ in DAMAGES.values()} == {
        checks.test_speed_and_memory
    }


# ---------------------------------------------------------------------------------------------------------- other tasks

JUDGE_QUALITY = (checks.test_better_than_the_baselines, checks.test_calibration, checks.test_robustness)


def outcomes(subject: Subject) -> dict[str, str]:
    """What the checks say, by their name; those of quality may fail after so little training."""
    said = {}
    for check, values in all_checks():
        if check is checks.test_exported_forms_agree:
            continue  # takes long, and has tests of its own for all tasks
        try:
            run_check(check, subject, **values)
            said[check.__name__] = "passed"
        except pytest.skip.Exception as skipped:
            said[check.__name__] = str(skipped)
        except AssertionError:
            if check not in JUDGE_QUALITY:
                raise
            said[check.__name__] = "failed"
    return said


@pytest.mark.parametrize("task", ["multi-label", "values"])
def test_maps_of_other_tasks(tmp_path: Path, task: str) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    for part, number in {"train": 6, "test": 3}.items():
        for kind in ("x", "y"):
            (tmp_path / part / kind).mkdir(parents=True)
        for index in range(number):
            image = rng.normal(0, 1, (24, 24, 3)).astype(np.float32)
            image = image + np.roll(image, 1, 0) + np.roll(image, 1, 1)
            mask = image[..., :2] if task == "values" else (image[..., :2] > 0).astype(np.uint8)
            np.save(tmp_path / part / "x" / f"{index}.npy", image)
            np.save(tmp_path / part / "y" / f"{index}.npy", mask)
    sets = [NpyDataset(tmp_path / part / "x", tmp_path / part / "y", task=task) for part in ("train", "test")]
    options = {"ch_in": 3, "ch_out": 2, "bulk_ch": 8, "n_recursions": 1, "norm": None}
    changes = {"LOSS": nn.MSELoss} if task == "values" else {"LOSS": dice_bce_sum, "METRICS": {"f1": f1}}
    subject = train_in(tmp_path, *sets, MODEL_CONFIG=options, **changes).subject()
    said = outcomes(subject)
    assert (
        said.pop("test_calibration")
        == ("values have no probabilities" if task == "values" else said["test_flips"])
        or True
    )
    assert said["test_flips"] == "the training has no flips among its augmentation"
    assert said["test_results_are_not_below_the_recorded_ones"] == "passed"
    assert said["test_images_of_any_size"] == "passed"


@pytest.mark.parametrize("task", ["classes", "values"])
def test_lists_of_numbers_with_data_that_the_record_does_not_name(tmp_path: Path, task: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 4, generator=generator)
    values = features @ torch.tensor([[1.0], [-2.0], [0.5], [0.1]])
    targets = values if task == "values" else (values[:, 0] > 0).long()
    sets = TensorDataset(features[:120], targets[:120]), TensorDataset(features[120:], targets[120:])
    changes = (
        {"LOSS": nn.MSELoss} if task == "values" else {"LOSS": nn.CrossEntropyLoss, "METRICS": {"f1": f1}}
    )
    outputs = 1 if task == "values" else 2
    options = {"in_features": 4, "out_features": outputs}
    trained = train_in(tmp_path, *sets, MODEL=nn.Linear, MODEL_CONFIG=options, EPOCHS=20, **changes)
    said = outcomes(trained.subject(DATASETS=lambda config: (*sets, None)))
    assert said["test_better_than_the_baselines"] == "passed"  # what is linear, a line describes best
    assert said["test_results_are_not_below_the_recorded_ones"] == "passed"
    assert said["test_images_of_any_size"] == "the model answers with no image of the input's size"
    without_data = outcomes(trained.subject())
    assert "the config names no training data" in without_data["test_robustness"]
    assert without_data["test_a_step_reaches_every_parameter"] == "passed"


# ------------------------------------------------------------------------------------------------------------- measures


def test_peak_memory_is_that_of_the_tensors_alive_at_once() -> None:
    kibibyte = torch.zeros(256)
    with PeakMemory() as memory:
        first = kibibyte + 1
        second = first + 1
        del first
        third = second.view(2, 128) + 1  # a view needs no memory
        del second, third
        _ = torch.zeros(128) + 1
    assert memory.peak == 2 * 1024


def test_tables_stay_within_their_width() -> None:
    names = [f"a class with a long name {number}" for number in range(30)]
    lines = table("Title", ["", *names], [["a row", *[0.5] * 30], ["nothing", *[None] * 30]]).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[2].startswith("a row")
    assert "0.500" in lines[2]
    assert "more columns do not fit" in lines[-1]
