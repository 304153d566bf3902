"""
The checks of the suite, which know nothing of a model but its subject.

A test file for a model is its config and ``from .checks import *``: see test_unet.py. Write your own
checks there, or here for all models: functions of (subject), and of (subject, show) that print a table.
"""

# pylint: disable=redefined-outer-name
import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from dida_core.errors import UserError
from dida_core.training.scores import CALIBRATION_BINS
from torch import Tensor
from torch.utils.data import default_collate

from dida_tools.config.config import global_config
from dida_tools.utils.torchutils import (
    assert_isfinite,
    assert_lowerbound,
    assert_nonzero,
    assert_not_nan,
    assert_upperbound,
    backprop,
    forward,
)

from tests.test_models import measures
from tests.test_models.measures import Quality, table
from tests.test_models.subject import Subject, choose_subject

Show = Callable[[str], None]
CANVAS, SHIFT, MARGIN = 256, 64, 24  # pixels; <- SHIFT: a multiple of your model's stride
FLIPS = {"left-right": (-1,), "up-down": (-2,), "both": (-2, -1)}
MAX_CHANNELS = 16  # of the table of missing channels
STEPS = 100  # in which one batch is to be learned
TRAINING_SAMPLES, BASELINE_ROWS = 64, 10_000  # images, and pixels of them, that baselines learn from
TEST_ROWS = 100_000  # pixels that they are tested on


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Subject:
    """The model under test."""
    run, weights = request.config.getoption("--run"), request.config.getoption("--weights")
    try:
        return choose_subject(request.module, run, weights, global_config)
    except UserError as error:
        return pytest.fail(f"{type(error).__name__}: {error}", pytrace=False)


@pytest.fixture
def show(record_property: Callable[[str, object], None]) -> Show:
    """Take text for the end of the test session."""
    return lambda text: record_property("shown", text)


def _need(condition: object, reason: str) -> None:
    if not condition:
        pytest.skip(reason)


def _need_data(subject: Subject) -> None:
    _need(not subject.no_data, subject.no_data)


def _need_map(subject: Subject) -> None:
    _need(subject.is_map, "the model's output is no image of the input's size")


def _need_flips(subject: Subject) -> None:
    _need_data(subject)
    _need_map(subject)
    augment = (subject.run.config["DATASET_CONFIG"] or {}).get("train", {}).get("augment", ())
    names = {getattr(getattr(one, "func", one), "__name__", "") for one in np.atleast_1d(augment).flat}
    _need(names & {"flip", "strong"}, "the training has no flips among its augmentation")


def _compare(output: Tensor, wanted: Tensor, bound: float, what: str) -> None:
    """Fail if outputs differ by more than a fraction of the largest one."""
    difference = (output - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-6)
    differ = f"outputs differ by {difference:.2g} of the largest"
    assert difference <= bound, f"{what}: {differ}; allowed: {bound:g}"


# ---------------------------------------------------------------------------------------------- parameters


def test_parameters_are_finite_and_within_bounds(subject: Subject) -> None:
    """Guard against weights of a training that diverged, or of a damaged file."""
    assert_not_nan(subject.model)
    assert_isfinite(subject.model)
    assert_upperbound(subject.model, subject.bounds["parameter"])
    assert_lowerbound(subject.model, -subject.bounds["parameter"])
    for name, buffer in subject.model.named_buffers():
        assert bool(torch.isfinite(buffer).all()), f"{name}: NaN or infinite values"


def test_contract_matches_the_model(subject: Subject) -> None:
    """Guard against a contract of other channels or classes, by which prediction would misread images."""
    contract = subject.contract
    stated, found = (contract.channels, contract.outputs), (subject.inputs.shape[1], subject.num_outputs)
    assert stated == found, f"channels and outputs of the contract: {stated}, of the model: {found}"
    names = len(contract.class_names)
    assert names in (0, subject.num_outputs), f"{names} names of {subject.num_outputs} classes"


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_batches_of_any_size(subject: Subject, batch: int) -> None:
    """Guard against code that drops or squeezes the batch dimension, as for the last, smaller batch."""
    wanted = subject.output(subject.inputs[:1])
    inputs = subject.inputs[:1].expand(batch, *subject.inputs.shape[1:])
    output = subject.output(inputs)
    assert output.shape == (batch, *wanted.shape[1:]), f"{tuple(inputs.shape)} became {tuple(output.shape)}"
    assert_isfinite(output)


@pytest.mark.parametrize("size", [(64, 64), (65, 63), (33, 100), (128, 32), (17, 250), (8, 8), (1, 1)])
def test_images_of_any_size(subject: Subject, size: tuple[int, int]) -> None:
    """Guard against crashes, and shifted maps, at the edge of a scene, where tiles have odd sizes."""
    _need_map(subject)
    size = tuple(-(-length // subject.multiple) * subject.multiple for length in size)
    inputs = _canvas(subject, max(size))[..., : size[0], : size[1]]
    output = subject.output(inputs)
    assert output.shape == (len(inputs), subject.num_outputs, *size), f"{size} became {tuple(output.shape)}"
    assert_isfinite(output)


# ------------------------------------------------------------------------------------------------ behavior


def test_evaluation_is_deterministic(subject: Subject) -> None:
    """Guard against dropout or running statistics in prediction: no map could be reproduced."""
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    first, again = subject.output(subject.inputs), subject.output(subject.inputs)
    assert torch.equal(first, again), "two outputs of the same images differ"
    after = subject.model.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert not changed, f"a prediction changes the model: {', '.join(changed[:3])}"


def test_output_depends_on_the_input(subject: Subject) -> None:
    """Guard against a model that has collapsed to a constant, whose loss can look fair."""
    other = subject.inputs.flip(0) if len(subject.inputs) > 1 else subject.inputs + 1
    assert not torch.equal(subject.output(subject.inputs), subject.output(other)), "all outputs are equal"


def test_each_channel_matters(subject: Subject) -> None:
    """Guard against channels that are lost on the way, as by a wrong slice: they would be bought in vain."""
    wanted, names = subject.output(subject.inputs), dict(enumerate(subject.contract.channel_names))
    for channel in range(subject.inputs.shape[1]):
        changed = subject.inputs.clone()
        changed[:, channel] += 1
        depends = not torch.equal(subject.output(changed), wanted)
        assert depends, f"the output does not depend on channel {names.get(channel, channel)}"


def test_neighbors_in_the_batch_change_nothing(subject: Subject) -> None:
    """Guard against normalization over the batch: a tile's prediction would depend on the other tiles."""
    first = subject.inputs[:1]
    alone, bound = subject.output(first), subject.bounds["batch"]
    batch = torch.cat([subject.inputs, 10 * first, torch.zeros_like(first)])
    _compare(subject.output(batch)[:1], alone, bound, "with other neighbors")
    _compare(subject.output(batch.flip(0))[-1:], alone, bound, "at another index of the batch")


def test_translation_by_a_tile(subject: Subject) -> None:
    """Guard against a model that knows a pixel's position: scenes cut into other tiles get other maps."""
    _need_map(subject)
    canvas = _canvas(subject, CANVAS)[:1]
    plain = subject.probabilities(canvas)
    moved = subject.probabilities(canvas.roll((SHIFT, SHIFT), (-2, -1))).roll((-SHIFT, -SHIFT), (-2, -1))
    place = torch.arange(CANVAS)
    inside = (place >= MARGIN) & (place < CANVAS - MARGIN) & ((place - (CANVAS - SHIFT)).abs() >= MARGIN)
    change = (moved - plain).abs()[..., inside, :][..., inside].mean().item()
    change /= plain.std().item() if subject.contract.task == "values" else 1
    bound = subject.bounds["translation"]
    assert change <= bound, f"outputs change by {change:.3f} on average; allowed: {bound:g}"


def test_flips(subject: Subject, show: Show) -> None:
    """Guard against a model that has learned the direction of light or of flight instead of the classes."""
    _need_flips(subject)
    ways = {f"flipped {name}": _flipped(subject, dims) for name, dims in FLIPS.items()}
    flipped = {name: subject.quality(predict=way) for name, way in ways.items()}
    _show_qualities(subject, show, "Flips", flipped)
    worst = min(flipped, key=lambda name: flipped[name].mean())
    _keeps_quality(subject, "flips", worst, flipped[worst])


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_images(subject: Subject, value: float) -> None:
    """Guard against a division by a std of zero, on water, clouds, or where there are no data."""
    output = subject.output(torch.full_like(subject.inputs, value))
    assert bool(torch.isfinite(output).all()), f"images of {value:g} alone: NaN or infinite outputs"


@pytest.mark.parametrize("factor", [1e2, 1e4])
def test_values_out_of_range(subject: Subject, factor: float) -> None:
    """Guard against overflow by saturated pixels, or by a file in other units."""
    output = subject.output(subject.inputs * factor)
    assert bool(torch.isfinite(output).all()), f"images times {factor:g}: NaN or infinite outputs"


def test_nan_stays_in_its_image(subject: Subject) -> None:
    """Guard against a damaged image that spoils the predictions of its neighbors, or all later ones."""
    clean, contract = subject.output(subject.inputs), subject.contract
    damaged = torch.cat([subject.inputs, subject.inputs[:1]])
    damaged[-1].flatten()[0] = torch.nan
    output = subject.output(damaged)[:-1]
    assert bool(torch.isfinite(output).all()), "a NaN in one image makes the output of others NaN"
    _compare(output, clean, subject.bounds["batch"], "beside an image with NaN")
    assert torch.equal(subject.output(subject.inputs), clean), "after an image with NaN, outputs change"
    if np.dtype(contract.dtype).kind == "f":
        image = np.full((4, 4, contract.channels), np.nan, contract.dtype)
        image[1:] = 1
        assert contract.nodata is not None or contract.problems(image), "the contract lets NaN pass"


def test_a_step_reaches_every_parameter(subject: Subject) -> None:
    """Guard against layers that never learn: not connected, detached, or missing in the optimizer."""
    model = subject.copy()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    before = {name: one.detach().clone() for name, one in trained.items()}
    backprop(model, subject.loss, subject.optimizer(trained.values()), subject.inputs, subject.targets)
    for name, parameter in trained.items():
        assert parameter.grad is not None, f"{name}: no gradient"
        assert bool(torch.isfinite(parameter.grad).all()), f"{name}: NaN or infinite gradient"
        assert bool((parameter.grad != 0).any()), f"{name}: zero gradient"
        assert not torch.equal(parameter, before[name]), f"{name}: not changed by the optimizer"


def test_one_batch_can_be_memorized(subject: Subject) -> None:
    """Guard against a loss, target or learning rate with which the architecture cannot learn at all."""
    model = subject.untrained()
    optimizer = subject.optimizer([one for one in model.parameters() if one.requires_grad])
    losses: list[float] = []
    while len(losses) < STEPS and (not losses or losses[-1] >= losses[0] / 2):
        losses.append(backprop(model, subject.loss, optimizer, subject.inputs, subject.targets))
        assert np.isfinite(losses[-1]), f"the loss is {losses[-1]} in step {len(losses)}"
    first, best = losses[0], min(losses)
    assert best < first / 2, f"after {STEPS} steps with one batch, the loss is {best:.3g}; it was {first:.3g}"
    assert_nonzero(subject.targets.float() + 1)  # a batch without a target would prove nothing


# ---------------------------------------------------------------------------------------- quality on the data


def test_results_are_not_below_the_recorded_ones(subject: Subject) -> None:
    """Guard against weights, data or code that are not those of the recorded results."""
    _need_data(subject)
    _need(subject.recorded, "the run has no recorded test results: it is not finished")
    results, _ = subject.evaluated
    bound = subject.bounds["recorded"] * (1 if subject.context.precision == "fp32" else 5)
    worse = []
    for name, recorded in subject.recorded.items():
        direction, now = _direction(subject, name.partition(".")[0]), results.get(name, np.nan)
        is_kept = direction * now >= direction * recorded - bound * max(1, abs(recorded))  # NaN never is
        if direction and not is_kept and not np.isnan(recorded):
            worse.append(f"{name} {now:.4f} instead of {recorded:.4f}")
    assert not worse, f"worse than recorded: {', '.join(worse)}"


def test_better_than_the_baselines(subject: Subject, show: Show) -> None:
    """Guard against a network not worth its price: the most frequent class, or single pixels, do as well."""
    _need_data(subject)
    pytest.importorskip("sklearn", reason="the baselines need scikit-learn")
    qualities = [subject.quality(batches=subject.test_batches()), *_baselines(subject)]
    names, metric = [*subject.class_names, "mean"], qualities[0].name
    recorded = [subject.recorded.get(f"f1.{name}") for name in names[:-1]] + [subject.recorded.get("f1")]
    if len(names) == 3 and recorded[1] is None:  # f1 is then that of the second class
        recorded[1:] = [recorded[2], None]
    columns = [[*quality.per_class(), quality.mean()] for quality in qualities]
    columns.insert(1, recorded if metric == "F1" else [None] * len(names))
    rows = [list(row) for row in zip(names, *columns, strict=True)]
    title = f"Quality on all {len(subject.test_set)} test samples: {metric}"
    show(table(title, ["", "model", "recorded", "by pixel", "trivial"], rows))
    worse, bound = [], subject.bounds["baselines"]
    for name, own, _, *others in rows:
        for what, other in zip(("trees on single pixels", "the trivial prediction"), others, strict=True):
            if not (np.isnan(own) and np.isnan(other)) and not (own > other - bound or own == 1):
                worse.append(f"{name}: {own:.3f}, {what} {other:.3f}")
    assert not worse, f"no better than a baseline: {'; '.join(worse)}"


def test_calibration(subject: Subject, show: Show) -> None:
    """Guard against probabilities that cannot be trusted, as for a threshold or a risk."""
    _need_data(subject)
    _need(subject.contract.task != "values", "values have no probabilities")
    results, scores = subject.evaluated
    centers = (torch.arange(scores.histograms.shape[-1]) + 0.5) / scores.histograms.shape[-1]
    histograms = scores.histograms.double()
    number, predicted = histograms.sum((1, 2)), histograms.sum(1) * centers
    gaps = (histograms[:, 1] - predicted).unflatten(1, (CALIBRATION_BINS, -1)).sum(-1).abs().sum(1)
    columns = [(one / number).tolist() for one in (predicted.sum(1), histograms[:, 1].sum(1), gaps)]
    rows = [list(row) for row in zip(subject.class_names, *columns, strict=True)]
    error, bound = results["ece"], subject.bounds["calibration"]
    title = f"Calibration at temperature {subject.contract.temperature:.2f}: expected error {error:.3f}"
    show(table(title, ["", "probability", "frequency", "error"], rows))
    assert error <= bound, f"the expected calibration error is {error:.3f}; allowed: {bound:g}"


def test_robustness(subject: Subject, show: Show) -> None:
    """Guard against a model that small changes of the sensor, the light or a lost channel confuse."""
    _need_data(subject)
    perturbed = {name: subject.quality(perturb) for name, perturb in _perturbations(subject).items()}
    _show_qualities(subject, show, "Robustness", perturbed)
    for name, quality in perturbed.items():
        assert np.isfinite(quality.mean()), f"{name}: quality is {quality.mean()}"
    _keeps_quality(subject, "robustness", *next(iter(perturbed.items())))


def test_gain_and_cost_of_averaged_flips(subject: Subject, show: Show) -> None:
    """Guard against paying for test-time augmentation that gains nothing, or harms."""
    _need_flips(subject)
    started = time.perf_counter()
    subject.quality()
    plain_seconds = time.perf_counter() - started
    ways = [_flipped(subject, dims) for dims in ((), *FLIPS.values())]
    quality = subject.quality(predict=lambda inputs: torch.stack([way(inputs) for way in ways]).mean(0))
    times = (time.perf_counter() - started - plain_seconds) / plain_seconds
    _show_qualities(subject, show, "Test-time augmentation", {f"4 flips, {times:.1f} x the time": quality})
    _keeps_quality(subject, "averaged", "averaged over flips", quality)


def test_speed_and_memory(subject: Subject, show: Show) -> None:
    """Guard against a model that does not fit the machine. Times are reported, not judged."""
    rows = []
    for size in (256, 512) if subject.is_map else (None,):
        inputs = subject.inputs if size is None else _canvas(subject, size)[:1]
        with measures.PeakMemory() as memory:
            subject.output(inputs)
        assert memory.peak > 0, "no tensor was made"
        times: list[float] = []
        while len(times) < 3 and sum(times) < 1:
            started = time.perf_counter()
            subject.output(inputs).sum().item()  # CPU-GPU sync point
            times.append(time.perf_counter() - started)
        seconds = min(times)
        speed = f"{size**2 / 1e6 / seconds:.2f} MP/s" if size else f"{len(inputs) / seconds:.0f} samples/s"
        shape, peak = " x ".join(map(str, inputs.shape)), f"{memory.peak / 2**20:.0f} MiB"
        rows.append([shape, f"{seconds:.3f} s", speed, peak])
    parameters, threads = sum(one.numel() for one in subject.model.parameters()), torch.get_num_threads()
    title = f"Speed on {subject.device} in {subject.context.precision}, {threads} threads"
    show(table(f"{title}: {parameters:,} parameters", ["input", "time", "speed", "peak memory"], rows))


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_exported_forms_agree(subject: Subject, tmp_path: Path, kind: str) -> None:
    """Guard against a delivered file that predicts otherwise than the model that was tested."""
    _need(subject.is_trained, "an untrained model is not delivered: give --run NAME or --weights FILE")
    try:
        from dida_core.export.export import export_model
    except ImportError:
        pytest.skip("this project exports no models")
    _need(subject.inputs.ndim == 4, "only models of images are exported")
    for library in ("onnxruntime", "onnxscript") if kind == "onnx" else ():
        pytest.importorskip(library, reason=f'{library} is not installed: pip install -e ".[export]"')
    file = tmp_path / f"model.{kind}"
    try:
        export_model(subject.model, subject.contract, file)
    except UserError as error:
        raise AssertionError(str(error)) from error
    inputs = subject.inputs.cpu()
    wanted = subject.contract.probabilities(forward(subject.copy().float().cpu(), inputs))
    found = measures.read_export(file)(measures.as_in_files(inputs, subject.contract))
    _compare(found, wanted, subject.bounds["export"], file.name)


# ------------------------------------------------------------------------------------------------- helpers


def _canvas(subject: Subject, size: int) -> Tensor:
    """Return square images of any size from the model's own: mirrored, for lack of seams, and repeated."""
    images = subject.inputs
    images = torch.cat([images, images.flip(-1)], -1)
    images = torch.cat([images, images.flip(-2)], -2)
    repeats = [-(-size // length) for length in images.shape[-2:]]
    return images.repeat(1, 1, *repeats)[..., :size, :size]


def _flipped(subject: Subject, dims: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda inputs: subject.probabilities(inputs.flip(dims)).flip(dims)


def _perturbations(subject: Subject) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what is done to images, the mildest first."""
    contract, partial = subject.contract, functools.partial
    found = {f"noise of {std:g} std": partial(measures.with_noise, std=std) for std in (0.1, 0.3, 1.0)}
    for factor in (0.8, 1.25):
        found[f"values times {factor:g}"] = partial(measures.with_gain, factor=factor, contract=contract)
    names = dict(enumerate(contract.channel_names))
    for channel in range(min(contract.channels, MAX_CHANNELS)):
        name = names.get(channel, f"channel {channel}")
        found[f"without {name}"] = partial(measures.without_channel, channel=channel, contract=contract)
    return found


def _show_qualities(subject: Subject, show: Show, title: str, qualities: dict[str, Quality]) -> None:
    rows = {"unchanged": subject.plain_quality} | qualities
    number, every = sum(len(inputs) for inputs, _ in subject.test_sample), len(subject.test_set)
    title = f"{title} on {number} of {every} test samples: {subject.plain_quality.name}"
    cells = [[name, quality.mean(), *quality.per_class()] for name, quality in rows.items()]
    show(table(title, ["", "mean", *subject.class_names], cells))


def _keeps_quality(subject: Subject, bound: str, what: str, quality: Quality) -> None:
    """Fail if a quality lies by more than a bound below the unchanged one."""
    plain, changed, allowed = subject.plain_quality.mean(), quality.mean(), subject.bounds[bound]
    message = f"{what}: {quality.name} falls from {plain:.3f} to {changed:.3f}; allowed: {allowed:g}"
    assert changed >= plain - allowed, message


def _baselines(subject: Subject) -> tuple[Quality, Quality]:
    """Return the test quality of trees trained on some rows of the training set, and of the trivial one."""
    train_set, contract = subject.run.data.train, subject.contract
    train_set = train_set.for_evaluation() if hasattr(train_set, "for_evaluation") else train_set
    number = min(len(train_set), TRAINING_SAMPLES if subject.is_map else BASELINE_ROWS)
    chosen = np.random.default_rng(0).permutation(len(train_set))[:number]
    samples = (default_collate([train_set[int(index)]]) for index in chosen)
    learned_from = _some_rows(subject, samples, BASELINE_ROWS // number + 1)
    rows, truth = _some_rows(subject, subject.test_batches(), TEST_ROWS // len(subject.test_set) + 1)
    trees, trivial = subject.new_quality(), subject.new_quality()
    fitted = measures.fit_rows(*learned_from, contract.task, subject.run.config["IGNORE_INDEX"])
    for quality, predict in zip((trees, trivial), fitted, strict=True):
        predicted = torch.from_numpy(predict(rows))
        if contract.task == "multi-class":
            predicted = torch.nn.functional.one_hot(predicted.long(), subject.num_outputs)
        quality.update(predicted.float(), torch.from_numpy(truth))
    return trees, trivial


def _some_rows(
    subject: Subject, batches: Iterable[tuple[Tensor, Tensor]], per_image: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return some pixels of each image, always the same ones."""
    rng, parts = np.random.default_rng(0), []
    for inputs, targets in batches:
        rows, truth = measures.rows_of(inputs, *subject.unmasked(targets), subject.contract.task)
        chosen = rng.permutation(len(rows))[: per_image * len(inputs)]
        parts.append((rows[chosen], truth[chosen]))
    features, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return features, labels


def _direction(subject: Subject, name: str) -> int:
    """Return whether more (1) or less (-1) of a result is better; 0 where nobody knows."""
    config = subject.run.config
    direction, goal = config["MONITOR"].split()
    if name in ("loss", "ece"):
        return -1
    if name in (goal, f"{goal}_sample_mean"):
        return 1 if direction == "max" else -1
    return 1 if name == "average_precision" or hasattr(config["METRICS"].get(name), "from_counts") else 0
