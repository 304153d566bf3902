"""The suite itself: a trained model passes it, each of many damaged ones fails the check made for it."""

import inspect
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.errors import UserError
from dida_core.storage.weights import load_weights, save_weights
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from dida_tools.config.config import global_config, make_global_config
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.loss import dice_bce_sum, f1

from tests.helpers import FIRST, ROOT, Child, load_routine
from tests.test_models import checks
from tests.test_models.measures import WIDTH, PeakMemory, table
from tests.test_models.subject import Subject, choose_subject

TEST_FILE = SimpleNamespace(DEVICE="cpu", DEFAULT_WEIGHTS=None)


def subject_of(run: Any, **options: Any) -> Subject:
    return choose_subject(SimpleNamespace(**(vars(TEST_FILE) | options)), run.name, None, run.global_config)


@pytest.fixture(scope="module")
def healthy(small_run: SimpleNamespace) -> Subject:
    return subject_of(small_run)


def all_checks() -> Iterator[tuple[Callable[..., None], dict[str, Any]]]:
    """Every check with the values that pytest would give it."""
    for name, check in vars(checks).items():
        if name.startswith("test_"):
            marks = [mark for mark in getattr(check, "pytestmark", []) if mark.name == "parametrize"]
            for values in itertools.product(*(mark.args[1] for mark in marks)):
                yield check, dict(zip((mark.args[0] for mark in marks), values, strict=True))


def run_check(check: Callable[..., None], subject: Subject, **values: Any) -> None:
    wanted = inspect.signature(check).parameters
    if "show" in wanted:
        values["show"] = [].append
    with tempfile.TemporaryDirectory() as folder:
        check(subject, **values, **({"tmp_path": Path(folder)} if "tmp_path" in wanted else {}))


# ------------------------------------------------------------------------------------------- as it is called


def test_a_trained_run_passes_and_its_tables_are_shown(small_run: Any, tmp_path: Path) -> None:
    def run_suite() -> int:
        global_config.update(small_run.global_config)
        os.environ["COLUMNS"] = "100"
        os.chdir(ROOT)
        options = ["-n", "0", "-p", "no:cacheprovider", "-rs", "-k", "not exported", "--run", small_run.name]
        return int(pytest.main(["tests/test_models", *options]))

    suite = Child(run_suite, tmp_path / "said")
    assert suite.wait() and suite.code == 0, suite.said()
    assert "skipped" not in suite.said()
    measured = suite.said().partition("= measured =")[2]
    for title in ("Flips", "Quality", "Calibration", "Robustness", "Test-time augmentation", "Speed"):
        assert f"\n{title}" in measured
    assert max(map(len, measured.splitlines())) <= WIDTH
    assert all(f"without channel {channel}" in measured for channel in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_its_exported_forms_agree(healthy: Subject, kind: str) -> None:
    run_check(checks.test_exported_forms_agree, healthy, kind=kind)


def test_an_exported_form_of_a_small_model_agrees(healthy: Subject) -> None:
    run_check(checks.test_exported_forms_agree, damaged(healthy, lambda model, x: 2 * x), kind="pt2")


def test_weights_of_a_run_come_with_its_record_and_others_with_the_config(
    small_run: Any, tmp_path: Path
) -> None:
    best, places = str(small_run.weights), small_run.global_config
    of_run = choose_subject(TEST_FILE, None, best, places)
    assert of_run.name == small_run.name and of_run.recorded["f1"] > 0.9
    with pytest.raises(UserError, match=f"nowhere.*{small_run.name}"):
        choose_subject(TEST_FILE, "nowhere", None, places)
    save_weights(tmp_path / "plain.pt", load_weights(best)["model"])
    size = (2, 3, 32, 32)
    module = SimpleNamespace(**vars(TEST_FILE) | small_run.config, INPUT_DIM=size, OUTPUT_DIM=size)
    plain = choose_subject(module, None, str(tmp_path / "plain.pt"), make_global_config(tmp_path))
    loaded = plain.model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in of_run.model.state_dict().items())
    with pytest.raises(pytest.skip.Exception, match="there are no test data without a run"):
        run_check(checks.test_calibration, plain)


def test_bounds_and_multiple_of_the_test_file_count(small_run: Any) -> None:
    subject = subject_of(small_run, BOUNDS={"parameter": 0.01}, MULTIPLE=4)
    with pytest.raises(AssertionError, match=r"not below 0\.01"):
        run_check(checks.test_parameters_are_finite_and_within_bounds, subject)
    halving = damaged(
        subject, lambda model, x: functional.pixel_shuffle(functional.pixel_unshuffle(model(x), 4), 4)
    )
    for check, values in all_checks():
        if check in (checks.test_images_of_any_size, checks.test_translation_by_a_tile):
            run_check(check, halving, **values)


def test_each_check_says_what_it_guards_against() -> None:
    for check, _ in all_checks():
        assert check.__doc__.startswith("Guard against "), check.__name__
        assert check.__doc__.rstrip().endswith("."), check.__name__


# -------------------------------------------------------------------------------------------- damaged models

Output = Callable[[nn.Module, Tensor], Tensor]


class Damaged(nn.Module):
    """A model around which something goes wrong; with a buffer for what a prediction may change."""

    def __init__(self, model: nn.Module, output: Output) -> None:
        super().__init__()
        self.model, self.damage = model, output
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.damage(self.model, x)


def damaged(subject: Subject, output: Output) -> Subject:
    return replace(subject, model=Damaged(subject.copy(), output).eval())


def remembering(subject: Subject, weight: float) -> Subject:
    """A prediction changes a buffer, and by it the next outputs where weight is not 0."""

    def output(model: nn.Module, x: Tensor) -> Tensor:
        changed.model.seen += 0.1 * (x.mean() - changed.model.seen) + (weight == 0)
        return model(x) - weight * changed.model.seen

    changed = damaged(subject, output)
    return changed


def with_parameter(subject: Subject, change: Callable[[nn.Parameter], Any]) -> Subject:
    model = subject.copy()
    with torch.no_grad():
        change(next(model.parameters()))
    return replace(subject, model=model)


def with_dead_parameter(subject: Subject) -> Subject:
    model = subject.copy()
    model.dead = nn.Parameter(torch.ones(3))
    return replace(subject, model=model)


def memorized(subject: Subject) -> Subject:
    """Knows the test images, and is wrong about all others."""
    known = [inputs for inputs, _ in subject.test_sample]

    def output(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) if any(torch.equal(x, one) for one in known) else -model(x)

    return damaged(subject, output)


NO_CLASS_2 = torch.tensor([[[0]], [[0]], [[-99]]])
SLOPE = torch.linspace(-3, 3, checks.CANVAS) * torch.tensor([[[1]], [[0]], [[-1]]])
# Models that output something wrong.
OUTPUTS: dict[str, Output] = {
    "squeezed": lambda model, x: model(x).squeeze(0),
    "odd row lost": lambda model, x: model(x)[..., : x.shape[-2] // 2 * 2, :],
    "dropout": lambda model, x: model(functional.dropout(x, 0.1)),
    "constant": lambda model, x: model(torch.zeros_like(x)),
    "channel lost": lambda model, x: model(x[:, [0, 1, 1]]),
    "batch norm": lambda model, x: model(functional.batch_norm(x, None, None, training=True)),
    "position": lambda model, x: model(x) + SLOPE[..., : x.shape[-1]],
    "divided by std": lambda model, x: model(x / x.std((-2, -1), keepdim=True) if x.shape[-1] > 1 else x),
    "exponential": lambda model, x: model(x) + x.exp().mean((1, 2, 3), keepdim=True),
    "mean of all": lambda model, x: model(x - x.mean()),
    "detached": lambda model, x: model.head(model.below(model.encode(x)).detach()),
    "classes swapped": lambda model, x: model(x)[:, [0, 2, 1]],
    "class lost": lambda model, x: model(x) + NO_CLASS_2,
    "unsure": lambda model, x: 0.02 * model(x),
    "export differs": lambda model, x: x * (2 if torch.compiler.is_exporting() else 1),
}
# Subjects that are wrong in another way.
DAMAGED: dict[str, Callable[[Subject], Subject]] = {
    "NaN weight": lambda subject: with_parameter(subject, lambda one: one.view(-1)[0].fill_(torch.nan)),
    "exploded weights": lambda subject: with_parameter(subject, lambda one: one.mul_(1e6)),
    "other contract": lambda subject: replace(subject, contract=replace(subject.contract, outputs=7)),
    "drifts": lambda subject: remembering(subject, weight=1),
    "counts": lambda subject: remembering(subject, weight=0),
    "memorized": memorized,
    "dead parameter": with_dead_parameter,
    "lr is 0": lambda subject: replace(subject, optimizer=partial(torch.optim.SGD, lr=0.0)),
    "constant loss": lambda subject: replace(subject, loss=lambda pred, _: (pred * 0 + 1).mean()),
    "NaN loss": lambda subject: replace(subject, loss=lambda pred, _: pred.mean() * torch.nan),
    "better recorded": lambda subject: replace(subject, recorded={"iou": subject.recorded["iou"] + 0.01}),
    "untrained": lambda subject: replace(subject, model=subject.untrained().eval()),
}
# What is damaged, the check that must notice (without test_), what it says.
DAMAGES = [
    ("NaN weight", "parameters_are_finite_and_within_bounds", "conv.weight: 1 of 216 values are NaN"),
    ("exploded weights", "parameters_are_finite_and_within_bounds", "not below 1000"),
    ("other contract", "contract_matches_the_model", r"of the contract: \(3, 7\), of the model: \(3, 3\)"),
    ("squeezed", "batches_of_any_size", r"\(1, 3, 32, 32\) became \(3, 32, 32\)"),
    ("odd row lost", "images_of_any_size", r"\(65, 63\) became \(2, 3, 64, 63\)"),
    ("dropout", "evaluation_is_deterministic", "two outputs of the same images differ"),
    ("drifts", "evaluation_is_deterministic", "two outputs of the same images differ"),
    ("counts", "evaluation_is_deterministic", "a prediction changes the model: seen"),
    ("constant", "output_depends_on_the_input", "all outputs are equal"),
    ("channel lost", "each_channel_matters", "does not depend on channel 2"),
    ("batch norm", "neighbors_in_the_batch_change_nothing", "with other neighbors: outputs differ"),
    ("position", "translation_by_a_tile", "outputs change by 0"),
    ("memorized", "flips", "flipped [a-z-]+: F1 falls from 0.9"),
    ("divided by std", "constant_images", "NaN or infinite outputs"),
    ("exponential", "values_out_of_range", "images times 10+: NaN or infinite outputs"),
    ("mean of all", "nan_stays_in_its_image", "a NaN in one image makes the output of others NaN"),
    ("drifts", "nan_stays_in_its_image", "a NaN in one image"),
    ("dead parameter", "a_step_reaches_every_parameter", "dead: no gradient"),
    ("detached", "a_step_reaches_every_parameter", "model.encode.0.conv.weight: no gradient"),
    ("lr is 0", "a_step_reaches_every_parameter", "not changed by the optimizer"),
    ("constant loss", "one_batch_can_be_memorized", "with one batch, the loss is 1; it was 1"),
    ("NaN loss", "one_batch_can_be_memorized", "the loss is nan in step 1"),
    ("classes swapped", "results_are_not_below_the_recorded_ones", r"f1\.left 0\.\d+ instead of 0\.9"),
    ("better recorded", "results_are_not_below_the_recorded_ones", r": iou 0\.\d+ instead of 0\.\d+$"),
    ("untrained", "better_than_the_baselines", "left: 0.*, trees on single pixels 0.7"),
    ("class lost", "better_than_the_baselines", "right: 0.000, the trivial prediction 0.000"),
    ("unsure", "calibration", "the expected calibration error is 0.[3-9]"),
    ("memorized", "robustness", "noise of 0.1 std: F1 falls"),
    ("memorized", "gain_and_cost_of_averaged_flips", "averaged over flips: F1 falls from 0.9"),
    ("export differs", "exported_forms_agree", "the exported model differs from PyTorch by 0"),
]


@pytest.mark.parametrize(("damage", "name", "message"), DAMAGES)
def test_a_damaged_model_fails_the_check_made_for_it(
    healthy: Subject, damage: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "STEPS", 10)
    subject = DAMAGED[damage](healthy) if damage in DAMAGED else damaged(healthy, OUTPUTS[damage])
    with pytest.raises(AssertionError, match=message):
        for check, values in all_checks():
            if check.__name__ == f"test_{name}":
                run_check(check, subject, **values)


def test_a_damage_is_made_for_each_check_that_judges() -> None:
    judging = {check.__name__.removeprefix("test_") for check, _ in all_checks()} - {"speed_and_memory"}
    assert judging == {name for _, name, _ in DAMAGES}


# ----------------------------------------------------------------------------------------------- other tasks

JUDGE_QUALITY = (checks.test_better_than_the_baselines, checks.test_calibration, checks.test_robustness)


def outcomes(subject: Subject) -> dict[str, str]:
    """What the checks say, by name; those of quality may fail after so little training."""
    said = {}
    for check, values in all_checks():
        if check is checks.test_exported_forms_agree:
            continue  # slow, and tested for all tasks elsewhere
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


def outcomes_of_training(folder: Path, sets: Any, **changes: Any) -> Callable[..., dict[str, str]]:
    """Train, and return a function of a test file's names that runs the checks."""
    config = {"OPTIMIZER": torch.optim.AdamW, "OPTIMIZER_CONFIG": {"lr": 0.05}, "EPOCHS": 5, "DEVICE": "cpu"}
    config |= {"DATA_LOADER_CONFIG": {"batch_size": 4}, "PRECISION": "fp32"} | changes
    run = SimpleNamespace(global_config=make_global_config(folder))
    run.name = load_routine(FIRST).train(*sets, config, run.global_config).name
    return lambda **options: outcomes(subject_of(run, **options))


@pytest.mark.parametrize("task", ["multi-label", "values"])
def test_maps_of_other_tasks(quick: None, tmp_path: Path, task: str) -> None:
    rng, sets = np.random.default_rng(0), []
    for split, number in {"train": 6, "test": 3}.items():
        x, y = tmp_path / split / "x", tmp_path / split / "y"
        for folder in (x, y):
            folder.mkdir(parents=True)
        for index in range(number):
            image = rng.normal(0, 1, (24, 24, 3)).astype(np.float32)
            image = image + np.roll(image, 1, 0) + np.roll(image, 1, 1)
            mask = image[..., :2] if task == "values" else (image[..., :2] > 0).astype(np.uint8)
            np.save(x / f"{index}.npy", image)
            np.save(y / f"{index}.npy", mask)
        sets.append(NpyDataset(x, y, task=task))
    changes = {"LOSS": nn.MSELoss} if task == "values" else {"LOSS": dice_bce_sum, "METRICS": {"f1": f1}}
    options = {"in_channels": 3, "out_channels": 2, "kernel_size": 3, "padding": 1}
    said = outcomes_of_training(tmp_path, sets, MODEL=nn.Conv2d, MODEL_CONFIG=options, **changes)()
    assert (said["test_calibration"] == "values have no probabilities") == (task == "values")
    assert said["test_flips"] == "the training has no flips among its augmentation"
    assert said["test_results_are_not_below_the_recorded_ones"] == "passed"
    assert said["test_images_of_any_size"] == "passed"


@pytest.mark.parametrize("task", ["classes", "values"])
def test_vectors_with_data_that_the_record_does_not_name(quick: None, tmp_path: Path, task: str) -> None:
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    values = features @ torch.tensor([[1.0], [-2.0], [0.5], [0.1]])
    targets = values if task == "values" else (values[:, 0] > 0).long()
    sets = TensorDataset(features[:120], targets[:120]), TensorDataset(features[120:], targets[120:])
    changes: dict[str, Any] = {"LOSS": nn.CrossEntropyLoss, "METRICS": {"f1": f1}}
    if task == "values":
        changes = {"LOSS": nn.MSELoss}
    options = {"in_features": 4, "out_features": 1 if task == "values" else 2}
    of_run = outcomes_of_training(tmp_path, sets, MODEL=nn.Linear, MODEL_CONFIG=options, **changes)
    said = of_run(DATASETS=lambda config: (*sets, None))
    assert said["test_better_than_the_baselines"] == "passed"  # a line describes best what is linear
    assert said["test_results_are_not_below_the_recorded_ones"] == "passed"
    assert said["test_images_of_any_size"] == "the model's output is no image of the input's size"
    without_data = of_run()
    assert "the config names no training data" in without_data["test_robustness"]
    assert without_data["test_a_step_reaches_every_parameter"] == "passed"


# -------------------------------------------------------------------------------------------------- measures


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
    assert lines[2].startswith("a row") and "0.500" in lines[2]
    assert "more columns do not fit" in lines[-1]
