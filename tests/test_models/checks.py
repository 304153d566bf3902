"""
Contains the checks of the suite, which know nothing of a model but what the subject tells.

A test file for a model is its config and ``from .checks import *``: see test_unet.py. Your own checks stand there, or
here for all models: functions of (subject), and of (subject, show) where there is something to tell.
"""

# pylint: disable=redefined-outer-name
import copy
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from dida_tools.config.config import global_config
from dida_tools.config.errors import UserError
from dida_tools.utils.scores import CALIBRATION_BINS
from dida_tools.utils.torchutils import (
    assert_isfinite,
    assert_lowerbound,
    assert_nonzero,
    assert_not_nan,
    assert_upperbound,
    backprop,
    forward,
)

from .measures import (
    PeakMemory,
    Quality,
    as_in_files,
    fit_rows,
    read_export,
    rows_of,
    table,
    with_gain,
    with_noise,
    without_channel,
)
from .subject import Subject, choose_subject

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
    """Takes text for the end of the test session."""
    return lambda text: record_property("shown", text)


def _need(condition: object, reason: str) -> None:
    if not condition:
        pytest.skip(reason)


def _need_data(subject: Subject) -> None:
    _need(not subject.no_data, subject.no_data)


def _need_map(subject: Subject) -> None:
    _need(subject.is_map, "the model answers with no image of the input's size")


def _need_classes(subject: Subject) -> None:
    _need(subject.contract.task != "values", "values have no probabilities")


def _compare(output: Tensor, wanted: Tensor, bound: float, what: str) -> None:
    """Raises AssertionError if outputs differ by more than a part of the largest one."""
    difference = (output - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-6)
    assert difference <= bound, (
        f"{what}: outputs differ by {difference:.2g} of the largest one, {bound:g} is allowed"
    )


# ----------------------------------------------------------------------------------------------------------- parameters


def test_parameters_are_finite_and_within_bounds(subject: Subject) -> None:
    """Protects from weights of a training that diverged, or of a damaged file."""
    assert_not_nan(subject.model)
    assert_isfinite(subject.model)
    assert_upperbound(subject.model, subject.bounds["parameter"])
    assert_lowerbound(subject.model, -subject.bounds["parameter"])
    for name, buffer in subject.model.named_buffers():
        assert bool(torch.isfinite(buffer).all()), f"{name}: NaN or infinite values"


def test_contract_is_that_of_the_model(subject: Subject) -> None:
    """Protects from a contract of other channels or classes, by which prediction would read images wrongly."""
    contract, of_model = subject.contract, (subject.inputs.shape[1], subject.num_outputs)
    assert (contract.channels, contract.outputs) == of_model, (
        f"the contract says {contract.channels} channels and {contract.outputs} outputs, "
        f"the model has {of_model[0]} and {of_model[1]}"
    )
    assert len(contract.class_names) in (0, of_model[1]), (
        f"{len(contract.class_names)} names of {of_model[1]} classes"
    )


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_batches_of_any_size(subject: Subject, batch: int) -> None:
    """Protects from code that drops or squeezes the batch's dimension, as for the last, smaller batch."""
    wanted = subject.answer(subject.inputs[:1])
    inputs = subject.inputs[:1].expand(batch, *subject.inputs.shape[1:])
    output = subject.answer(inputs)
    assert output.shape == (batch, *wanted.shape[1:]), f"{tuple(inputs.shape)} became {tuple(output.shape)}"
    assert_isfinite(output)


@pytest.mark.parametrize("size", [(64, 64), (65, 63), (33, 100), (128, 32), (17, 250), (8, 8), (1, 1)])
def test_images_of_any_size(subject: Subject, size: tuple[int, int]) -> None:
    """Protects from crashes, and shifted maps, at the edge of a scene, where tiles have odd sizes."""
    _need_map(subject)
    inputs = _canvas(subject, max(size))[..., : size[0], : size[1]]
    output = subject.answer(inputs)
    assert output.shape == (len(inputs), subject.num_outputs, *size), f"{size} became {tuple(output.shape)}"
    assert_isfinite(output)


# ------------------------------------------------------------------------------------------------------- what it sees


def test_evaluation_is_deterministic(subject: Subject) -> None:
    """Protects from dropout or running statistics that are at work in prediction: no map could be made again."""
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    first, again = subject.answer(subject.inputs), subject.answer(subject.inputs)
    assert torch.equal(first, again), "two answers to the same images differ"
    changed = [
        name for name, value in subject.model.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert not changed, f"an answer changes the model: {', '.join(changed[:3])}"


def test_answer_depends_on_the_input(subject: Subject) -> None:
    """Protects from a model that has collapsed to a constant, whose loss can look fair."""
    other = subject.inputs.flip(0) if len(subject.inputs) > 1 else subject.inputs + 1
    assert not torch.equal(subject.answer(subject.inputs), subject.answer(other)), (
        "all images get the same answer"
    )


def test_each_channel_matters(subject: Subject) -> None:
    """Protects from channels that are lost on the way, as by a wrong slice: their data would be bought in vain."""
    wanted = subject.answer(subject.inputs)
    for channel in range(subject.inputs.shape[1]):
        changed = subject.inputs.clone()
        changed[:, channel] += 1
        name = dict(enumerate(subject.contract.channel_names)).get(channel, channel)
        assert not torch.equal(subject.answer(changed), wanted), (
            f"the answer does not depend on channel {name}"
        )


def test_neighbors_in_the_batch_change_nothing(subject: Subject) -> None:
    """Protects from normalization over the batch, by which a tile's answer depends on what it is predicted with."""
    alone = subject.answer(subject.inputs[:1])
    others = torch.cat([subject.inputs[1:], 10 * subject.inputs[:1], torch.zeros_like(subject.inputs[:1])])
    batch = torch.cat([subject.inputs[:1], others])
    _compare(subject.answer(batch)[:1], alone, subject.bounds["batch"], "with other neighbors")
    _compare(
        subject.answer(batch.flip(0))[-1:], alone, subject.bounds["batch"], "at another place in the batch"
    )


def test_translation_by_a_tile(subject: Subject) -> None:
    """Protects from a model that knows where in the image a pixel is: scenes cut into other tiles get other maps."""
    _need_map(subject)
    canvas = _canvas(subject, CANVAS)[:1]
    plain = subject.probabilities(canvas)
    moved = subject.probabilities(canvas.roll((SHIFT, SHIFT), (-2, -1))).roll((-SHIFT, -SHIFT), (-2, -1))
    place = torch.arange(CANVAS)
    inside = (place >= MARGIN) & (place < CANVAS - MARGIN) & ((place - (CANVAS - SHIFT)).abs() >= MARGIN)
    change = (moved - plain).abs()[..., inside, :][..., inside].mean().item()
    change /= plain.std().item() if subject.contract.task == "values" else 1
    bound = subject.bounds["translation"]
    assert change <= bound, f"answers change by {change:.3f} on average, {bound:g} is allowed"


def test_flips(subject: Subject, show: Show) -> None:
    """Protects from a model that has learned the direction of light or of flight instead of the classes."""
    _need_data(subject)
    _need_map(subject)
    _need(_learned_flips(subject), "the training has no flips among its augmentation")
    plain = subject.plain_quality
    rows = [["as they are", plain.mean(), *plain.per_class()]]
    for name, dims in FLIPS.items():
        flipped = subject.quality(answer=_flipped(subject, dims))
        rows.append([f"flipped {name}", flipped.mean(), *flipped.per_class()])
    show(table(f"Flips on {_about_sample(subject)}: {plain.name}", ["", "mean", *subject.class_names], rows))
    worst = min(rows[1:], key=lambda row: row[1])
    bound = subject.bounds["flips"]
    assert worst[1] >= plain.mean() - bound, (
        f"{worst[0]}, images have {plain.name} {worst[1]:.3f}, otherwise {plain.mean():.3f}; {bound:g} less is allowed"
    )


# ---------------------------------------------------------------------------------------------------------- odd inputs


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_images(subject: Subject, value: float) -> None:
    """Protects from a division by a deviation of zero, on water, clouds, or where there are no data."""
    output = subject.answer(torch.full_like(subject.inputs, value))
    assert bool(torch.isfinite(output).all()), (
        f"images that are {value:g} all over get NaN or infinite answers"
    )


@pytest.mark.parametrize("factor", [1e2, 1e4])
def test_values_out_of_range(subject: Subject, factor: float) -> None:
    """Protects from overflow by saturated pixels, or by a file in other units."""
    output = subject.answer(subject.inputs * factor)
    assert bool(torch.isfinite(output).all()), f"images times {factor:g} get NaN or infinite answers"


def test_nan_stays_in_its_image(subject: Subject) -> None:
    """Protects from a damaged image that spoils its neighbors' answers, or all later ones; and from its being read."""
    clean = subject.answer(subject.inputs)
    damaged = torch.cat([subject.inputs, subject.inputs[:1]])
    damaged[-1].flatten()[0] = torch.nan
    output = subject.answer(damaged)[:-1]
    assert bool(torch.isfinite(output).all()), "a NaN in one image makes the answer to others NaN"
    _compare(output, clean, subject.bounds["batch"], "beside an image with NaN")
    assert torch.equal(subject.answer(subject.inputs), clean), "after an image with NaN, answers are others"
    if np.dtype(subject.contract.dtype).kind == "f":
        image = np.full((4, 4, subject.contract.channels), np.nan, subject.contract.dtype)
        image[1:] = 1
        assert subject.contract.nodata is not None or subject.contract.problems(image), (
            "the contract lets NaN pass"
        )


# ------------------------------------------------------------------------------------------------------------- training


def test_a_step_reaches_every_parameter(subject: Subject) -> None:
    """Protects from layers that never learn: not connected, cut off by detach(), or not given to the optimizer."""
    model = subject.copy()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    before = {name: one.detach().clone() for name, one in trained.items()}
    backprop(model, subject.loss, subject.optimizer(trained.values()), subject.inputs, subject.targets)
    for name, parameter in trained.items():
        assert parameter.grad is not None, f"{name}: has no gradient"
        assert bool(torch.isfinite(parameter.grad).all()), f"{name}: its gradient is NaN or infinite"
        assert bool((parameter.grad != 0).any()), f"{name}: its gradient is zero"
        assert not torch.equal(parameter, before[name]), f"{name}: the optimizer does not change it"


def test_one_batch_can_be_learned_by_heart(subject: Subject) -> None:
    """Protects from a loss, target or learning rate with which the architecture cannot learn at all."""
    model = subject.untrained()
    optimizer = subject.optimizer([one for one in model.parameters() if one.requires_grad])
    losses: list[float] = []
    while len(losses) < STEPS and (not losses or losses[-1] >= losses[0] / 2):
        losses.append(backprop(model, subject.loss, optimizer, subject.inputs, subject.targets))
        assert np.isfinite(losses[-1]), f"the loss is {losses[-1]} in step {len(losses)}"
    best = min(losses)
    assert best < losses[0] / 2, (
        f"after {STEPS} steps with one batch, the loss is {best:.3g}; it was {losses[0]:.3g}"
    )
    assert_nonzero(subject.targets.float() + 1)  # a batch without a target would prove nothing


# -------------------------------------------------------------------------------------------------- quality on the data


def test_results_are_not_below_the_recorded_ones(subject: Subject) -> None:
    """Protects from weights, data or code that are not those that the recorded results were reached with."""
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
    """Protects from a network not worth its price: always the commonest class, or pixels one by one, do as well."""
    _need_data(subject)
    pytest.importorskip("sklearn", reason="the baselines need scikit-learn")
    model, (trees, trivial) = subject.quality_on_all(), _baselines(subject)
    recorded = [
        subject.recorded.get(f"f1.{name}") if model.name == "F1" else None for name in subject.class_names
    ]
    recorded.append(subject.recorded.get("f1"))
    if len(subject.class_names) == 2 and recorded[1] is None:  # what is called f1 is then that of the second
        recorded[1:] = [recorded[2], None]
    columns = [[*model.per_class(), model.mean()], recorded]
    columns += [[*baseline.per_class(), baseline.mean()] for baseline in (trees, trivial)]
    rows = [list(row) for row in zip([*subject.class_names, "mean"], *columns, strict=True)]
    header = ["", "model", "recorded", "by pixel", "trivial"]
    show(table(f"Quality on all {len(subject.data.data.test)} test samples: {model.name}", header, rows))
    worse, bound = [], subject.bounds["baselines"]
    for name, own, _, *others in rows:
        for what, other in zip(
            ("trees that see a pixel at a time", "the trivial answer"), others, strict=True
        ):
            if not (np.isnan(own) and np.isnan(other)) and not (own > other - bound or own == 1):
                worse.append(f"{name}: {own:.3f}, {what} {other:.3f}")
    assert not worse, f"no better than a baseline: {'; '.join(worse)}"


def test_calibration(subject: Subject, show: Show) -> None:
    """Protects from probabilities that cannot be taken at their word, as for a threshold or a risk."""
    _need_data(subject)
    _need_classes(subject)
    results, scores = subject.evaluated
    centers = (torch.arange(scores.histograms.shape[-1]) + 0.5) / scores.histograms.shape[-1]
    rows = []
    for name, histogram in zip(subject.class_names, scores.histograms.double(), strict=True):
        number, there = histogram.sum(), histogram[1].sum()
        gaps = (histogram[1] - histogram.sum(0) * centers).reshape(CALIBRATION_BINS, -1).sum(-1).abs().sum()
        row = [(histogram.sum(0) * centers).sum() / number, there / number, gaps / number]
        rows.append([name, *(value.item() for value in row)])
    title = (
        f"Calibration at temperature {subject.contract.temperature:.2f}: expected error {results['ece']:.3f}"
    )
    show(table(title, ["", "probability", "frequency", "error"], rows))
    bound = subject.bounds["calibration"]
    assert results["ece"] <= bound, (
        f"the expected calibration error is {results['ece']:.3f}, {bound:g} is allowed"
    )


def test_robustness(subject: Subject, show: Show) -> None:
    """Protects from a model that small changes of the sensor, the light or a lost channel throw off its track."""
    _need_data(subject)
    plain = subject.plain_quality
    rows = [["as they are", plain.mean(), *plain.per_class()]]
    for name, change in _changes(subject):
        changed = subject.quality(change)
        assert np.isfinite(changed.mean()), f"{name}: quality is {changed.mean()}"
        rows.append([name, changed.mean(), *changed.per_class()])
    show(
        table(
            f"Robustness on {_about_sample(subject)}: {plain.name}", ["", "mean", *subject.class_names], rows
        )
    )
    name, mildest = rows[1][:2]
    bound = subject.bounds["robustness"]
    assert mildest >= plain.mean() - bound, (
        f"with {name}, {plain.name} falls from {plain.mean():.3f} to {mildest:.3f}; {bound:g} less is allowed"
    )


def test_gain_and_cost_of_averaged_flips(subject: Subject, show: Show) -> None:
    """Protects from paying for test-time augmentation that gains nothing, or spoils: an average must not be worse."""
    _need_data(subject)
    _need_map(subject)
    _need(_learned_flips(subject), "the training has no flips among its augmentation")
    rows, times = [], []
    for name, answer in {"plain": subject.probabilities, "averaged over 4 flips": _averaged(subject)}.items():
        started = time.perf_counter()
        quality = subject.quality(answer=answer)
        times.append(time.perf_counter() - started)
        rows.append([name, f"{times[-1] / times[0]:.1f} x", quality.mean(), *quality.per_class()])
    show(
        table(
            f"Test-time augmentation: time and {quality.name}",
            ["", "time", "mean", *subject.class_names],
            rows,
        )
    )
    plain, averaged = rows[0][2], rows[1][2]
    bound = subject.bounds["averaged"]
    assert averaged >= plain - bound, (
        f"averaged over flips, {quality.name} falls from {plain:.3f} to {averaged:.3f}; {bound:g} less is allowed"
    )


# ------------------------------------------------------------------------------------------------------ speed and forms


def test_speed_and_memory(subject: Subject, show: Show) -> None:
    """Protects from surprises in use: a model that does not fit the machine. Times are told, and not judged."""
    parameters = sum(one.numel() for one in subject.model.parameters())
    rows = []
    for size in (256, 512) if subject.is_map else (None,):
        inputs = subject.inputs if size is None else _canvas(subject, size)[:1]
        with PeakMemory() as memory:
            subject.answer(inputs)
        assert memory.peak > 0, "no tensor was made"
        seconds = _seconds(subject, inputs)
        speed = (
            f"{size * size / 1e6 / seconds:.2f} MP/s" if size else f"{len(inputs) / seconds:.0f} samples/s"
        )
        rows.append(
            [" x ".join(map(str, inputs.shape)), f"{seconds:.3f} s", speed, f"{memory.peak / 2**20:.0f} MiB"]
        )
    title = f"Speed on {subject.device} in {subject.context.precision}, {torch.get_num_threads()} threads: {parameters:,} parameters"
    show(table(title, ["input", "time", "speed", "peak memory"], rows))


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_exported_forms_agree(subject: Subject, tmp_path: Path, kind: str) -> None:
    """Protects from a delivered file that answers otherwise than the model that was tested."""
    _need(subject.is_trained, "an untrained model is not delivered: give --run NAME or --weights FILE")
    try:
        from dida_tools.prediction.export import export_model
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
    model = copy.deepcopy(subject.model).float().cpu()
    wanted = subject.contract.probabilities(forward(model, subject.inputs.cpu()))
    found = read_export(file)(as_in_files(subject.inputs.cpu(), subject.contract))
    _compare(found, wanted, subject.bounds["export"], file.name)


# -------------------------------------------------------------------------------------------------------------- helpers


def _canvas(subject: Subject, size: int) -> Tensor:
    """Square images of any size from the model's own: mirrored, so that there are no seams, and repeated."""
    images = subject.inputs
    images = torch.cat([images, images.flip(-1)], -1)
    images = torch.cat([images, images.flip(-2)], -2)
    repeats = [-(-size // edge) for edge in images.shape[-2:]]
    return images.repeat(1, 1, *repeats)[..., :size, :size]


def _learned_flips(subject: Subject) -> bool:
    arguments = (subject.data.config["DATASET_CONFIG"] or {}).get("train", {})
    augment = arguments.get("augment", ())
    functions = (augment,) if callable(augment) else augment
    return bool(
        {getattr(getattr(one, "func", one), "__name__", "") for one in functions} & {"flip", "strong"}
    )


def _flipped(subject: Subject, dims: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda inputs: subject.probabilities(inputs.flip(dims)).flip(dims)


def _averaged(subject: Subject) -> Callable[[Tensor], Tensor]:
    ways = [(), *FLIPS.values()]
    return lambda inputs: torch.stack([_flipped(subject, dims)(inputs) for dims in ways]).mean(0)


def _changes(subject: Subject) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """What is done to images, the mildest first."""
    contract = subject.contract
    for deviations in (0.1, 0.3, 1.0):
        yield f"noise of {deviations:g} deviations", functools.partial(with_noise, deviations=deviations)
    for factor in (0.8, 1.25):
        yield f"values times {factor:g}", functools.partial(with_gain, factor=factor, contract=contract)
    names = dict(enumerate(contract.channel_names))
    for channel in range(min(contract.channels, MAX_CHANNELS)):
        name = names.get(channel, f"channel {channel}")
        yield f"without {name}", functools.partial(without_channel, channel=channel, contract=contract)


def _baselines(subject: Subject) -> tuple[Quality, Quality]:
    """Quality on the test set of trees that learn from some rows of the training set, and of the trivial answer."""
    train_set, task, ignored = (
        subject.data.data.train,
        subject.contract.task,
        subject.data.config["IGNORE_INDEX"],
    )
    train_set = train_set.for_evaluation() if hasattr(train_set, "for_evaluation") else train_set
    number = min(len(train_set), TRAINING_SAMPLES if subject.is_map else BASELINE_ROWS)
    samples = (
        train_set[int(index)] for index in np.random.default_rng(0).permutation(len(train_set))[:number]
    )
    learned_from = _some_rows(
        subject, (default_collate([sample]) for sample in samples), BASELINE_ROWS // number + 1
    )
    share = TEST_ROWS // len(subject.data.data.test) + 1
    rows, truth = _some_rows(subject, subject.test_batches(), share)
    trees, trivial = subject.new_quality(), subject.new_quality()
    for quality, predict in zip((trees, trivial), fit_rows(*learned_from, task, ignored), strict=True):
        answers = torch.from_numpy(predict(rows))
        if task == "multi-class":
            answers = torch.nn.functional.one_hot(answers.long(), subject.num_outputs)
        quality.update(answers.float(), torch.from_numpy(truth))
    return trees, trivial


def _some_rows(
    subject: Subject, batches: Iterable[tuple[Tensor, Tensor]], share: int
) -> tuple[np.ndarray, np.ndarray]:
    """Some pixels of each image, always the same ones."""
    rng, parts = np.random.default_rng(0), []
    for inputs, targets in batches:
        rows, truth = rows_of(inputs, *subject.bare(targets), subject.contract.task)
        chosen = rng.permutation(len(rows))[: share * len(inputs)]
        parts.append((rows[chosen], truth[chosen]))
    features, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return features, labels


def _direction(subject: Subject, name: str) -> int:
    """Whether more (1) or less (-1) of a result is better; 0 where nobody knows."""
    config = subject.data.config
    direction, goal = config["MONITOR"].split()
    if name in ("loss", "ece"):
        return -1
    if name in (goal, f"{goal}_sample_mean"):
        return 1 if direction == "max" else -1
    return 1 if name == "average_precision" or hasattr(config["METRICS"].get(name), "from_counts") else 0


def _about_sample(subject: Subject) -> str:
    number, every = sum(len(inputs) for inputs, _ in subject.test_sample), len(subject.data.data.test)
    return f"{number} of {every} test samples" if number < every else f"all {every} test samples"


def _seconds(subject: Subject, inputs: Tensor) -> float:
    """Of an answer, the shortest of some."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < 1:
        started = time.perf_counter()
        subject.answer(inputs).sum().item()  # waits for the GPU
        times.append(time.perf_counter() - started)
    return min(times)
