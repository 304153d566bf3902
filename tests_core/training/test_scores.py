"""
Scores add up in any order, and give what scikit-learn gives for all pixels at once.

The last part has a test for each error of this kind that is known from other systems.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.data.contract import DataContract
from dida_core.training.scores import CALIBRATION_BINS, NUM_BINS, Scores, counts_by_threshold
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from torch import Tensor
from torch.nn import functional

from dida_tools.utils.metrics import f1

TASKS = ("multi-class", "multi-label", "binary")
METRICS: dict[str, Any] = {
    "f1": reference.f1_score,
    "precision": reference.precision_score,
    "recall": reference.recall_score,
    "iou": reference.jaccard_score,
}


def draw(
    task: str, shape: tuple[int, ...] = (6, 9, 11), classes: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits and targets that agree more often than not."""
    generator = torch.Generator().manual_seed(seed)
    number, *size = shape
    classes = 1 if task == "binary" else classes
    logits = 2 * torch.randn(number, classes, *size, generator=generator)
    if task == "multi-class":
        targets = torch.randint(0, classes, shape, generator=generator)
        return logits + 2 * functional.one_hot(targets, classes).movedim(-1, 1), targets
    labels = (torch.rand(number, classes, *size, generator=generator) < 0.3).long()
    return logits + 3 * labels - 1, labels


def score(task: str, logits: Tensor, targets: Tensor, valid: Tensor | None = None, **options: Any) -> Scores:
    scores = Scores(logits.shape[1], task == "multi-class", **options)
    scores.update(logits, targets, valid)
    return scores


def state(scores: Scores) -> tuple[Any, ...]:
    tensors = (scores.confusion, scores.histograms, scores.confidences)
    assert all(tensor.dtype == torch.int64 for tensor in tensors)
    return (*(tensor.tolist() for tensor in tensors), scores.num_ignored)


def pixels(task: str, logits: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all pixels: truth and guess, unless multi-class a row of 0 and 1 each, and rows of probabilities."""
    classes = logits.shape[1]
    rows = logits.movedim(1, -1).reshape(-1, classes)
    if task == "multi-class":
        return targets.flatten().numpy(), rows.argmax(1).numpy(), rows.softmax(1).numpy()
    truth = targets.movedim(1, -1).reshape(-1, classes).numpy()
    return truth, (rows >= 0).long().numpy(), rows.sigmoid().numpy()


def labels_of(task: str, truth: np.ndarray, classes: int) -> np.ndarray:
    """Truth as a row of 0 and 1 for each pixel."""
    return np.eye(classes, dtype=int)[truth] if task == "multi-class" else truth


def approx(value: float) -> Any:
    return pytest.approx(value, rel=1e-12, abs=1e-12)


# ------------------------------------------------------------------------------- the same however it is split


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from(TASKS), st.integers(1, 6), st.integers(3, 12), st.integers(2, 12))
def test_any_split_into_batches_tiles_and_processes_in_any_order_gives_the_same(
    data, task, batch_size, height, width
):
    logits, targets = draw(task, seed=height)
    targets[1, ..., 2:5, :] = 255
    valid = torch.rand(6, 9, 11, generator=torch.Generator().manual_seed(width)) < 0.8
    parts = [
        (logits[batch, :, top, left], targets[batch, ..., top, left], valid[batch, top, left])
        for batch in map(slice, range(0, 6, batch_size), range(batch_size, 6 + batch_size, batch_size))
        for top in map(slice, range(0, 9, height), range(height, 9 + height, height))
        for left in map(slice, range(0, 11, width), range(width, 11 + width, width))
    ]
    processes = [Scores(logits.shape[1], task == "multi-class") for _ in range(data.draw(st.integers(1, 3)))]
    for number, part in enumerate(data.draw(st.permutations(parts))):
        processes[number % len(processes)].update(*part)
    total = sum(processes[1:], processes[0])
    whole = score(task, logits, targets, valid)
    assert state(total) == state(whole) and str(total.results()) == str(whole.results())


@pytest.mark.parametrize("task", TASKS)
def test_the_place_of_a_pixel_in_memory_does_not_matter(task):
    """In float32, softmax and sigmoid differ in the last bit, and some pixels are in another bin."""
    logits, targets = draw(task, (200_003,))
    as_image = logits.T.contiguous()[None], (targets if task == "multi-class" else targets.T)[None]
    assert state(score(task, *as_image)) == state(score(task, logits, targets))


@pytest.mark.parametrize("task", TASKS)
def test_all_pixels_are_valid_or_ignored(task):
    logits, targets = draw(task)
    targets[0], targets[1, ..., 3] = 255, 255
    valid = torch.ones(6, 9, 11)
    valid[2] = 0
    scores = score(task, logits, targets, valid)
    ignored = int(((targets == 255) | (torch.arange(6).reshape(-1, *[1] * (targets.ndim - 1)) == 2)).sum())
    assert scores.num_ignored == scores.results()["ignored_pixels"] == ignored
    assert scores.results()["valid_pixels"] == targets.numel() - ignored
    times = logits.shape[1] if task == "multi-class" else 1  # in the histogram of each class
    assert scores.histograms.sum() == times * scores.confusion.sum() == times * (targets.numel() - ignored)
    with_other_numbers = score(task, logits, torch.where(targets == 255, 9, targets), valid, ignore_index=9)
    assert state(with_other_numbers) == state(scores)


def test_scores_of_other_classes_or_labels_are_refused():
    for num_classes, multi_class in ((3, True), (4, False)):
        with pytest.raises(
            ValueError, match=f"of {num_classes} (classes|labels); the prediction has .*4, 9, 11"
        ):
            Scores(num_classes, multi_class).update(*draw("multi-class"))


# --------------------------------------------------------------------------------------- against scikit-learn


@pytest.mark.parametrize("task", TASKS)
def test_confusion_and_metrics_are_those_of_scikit_learn(task):
    logits, targets = draw(task)
    truth, guess, _ = pixels(task, logits, targets)
    scores, several = score(task, logits, targets), task != "binary"
    multilabel, plain = reference.multilabel_confusion_matrix, reference.confusion_matrix
    expected = (multilabel if task == "multi-label" else plain)(truth, guess)
    assert scores.confusion.tolist() == (expected if several else expected[None]).tolist()
    found = scores.results()
    for name, metric in METRICS.items():
        for average in ("macro", "micro"):
            value = metric(truth, guess, average=average if several else "binary")
            assert found[f"{name}_{average}"] == approx(value)
        assert found[name] == found[f"{name}_macro"]
        each = metric(truth, guess, average=None) if several else []
        assert [found[f"{name}.{number}"] for number in range(len(each))] == [approx(one) for one in each]
    assert found["accuracy"] == approx((truth == guess).mean())
    if task == "multi-label":
        each = [reference.accuracy_score(*column) for column in zip(truth.T, guess.T, strict=True)]
        assert [found[f"accuracy.{number}"] for number in range(4)] == [approx(value) for value in each]
    else:
        assert "accuracy.0" not in found
    names = ("average_precision", "ece", "ignored_pixels")
    trust = {key: value for key, value in found.items() if key.partition(".")[0] in names}
    assert scores.reliability() == trust and len(trust) == (7 if several else 3)


@pytest.mark.parametrize("task", TASKS)
def test_average_precision_is_that_of_scikit_learn_on_the_same_bins(task):
    logits, targets = draw(task)
    truth, _, probabilities = pixels(task, logits, targets)
    classes = logits.shape[1]
    labels = labels_of(task, truth, classes)
    binned = np.floor(probabilities * NUM_BINS)
    scores = score(task, logits, targets)
    found = scores.results()
    each = [
        reference.average_precision_score(labels[:, number], binned[:, number]) for number in range(classes)
    ]
    assert scores.average_precision().tolist() == [approx(value) for value in each]
    assert found["average_precision"] == found["average_precision_macro"] == approx(float(np.mean(each)))
    pooled = reference.average_precision_score(labels.ravel(), binned.ravel())
    assert found["average_precision_micro"] == approx(pooled)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0001, 3.0))
def test_average_precision_is_within_its_bound_of_that_without_bins(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    truth = (torch.rand(3000, 1, generator=generator) < 0.2).long()
    logits = spread * (torch.randn(3000, 1, generator=generator) + truth) - 2
    scores = score("binary", logits, truth)
    exact = reference.average_precision_score(
        truth.numpy().ravel(), logits.double().sigmoid().numpy().ravel()
    )
    of_bins = scores.histograms[0]
    found = of_bins.sum(0).flip(0).cumsum(0).flip(0).clamp(min=1)
    bound = (of_bins[1] / of_bins[1].sum() * of_bins.sum(0) / found).sum().item()
    assert abs(scores.average_precision().item() - exact) <= bound + 1e-9


# --------------------------------------------------------------------------------- thresholds and calibration


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.5), st.floats(0.01, 3.0))
def test_the_best_threshold_is_within_its_bound_of_the_best_of_all(seed, frequency, spread):
    generator = torch.Generator().manual_seed(seed)
    truth = (torch.rand(2000, 1, generator=generator) < frequency).long()
    logits = spread * (torch.randn(2000, 1, generator=generator) + 2 * truth) - 1
    scores = score("binary", logits, truth)
    threshold = scores.best_threshold(0)
    labels, probabilities = truth.numpy().ravel(), logits.sigmoid().numpy().ravel()
    found = reference.f1_score(labels, probabilities >= np.float32(threshold), zero_division=0)
    precision, recall, every = reference.precision_recall_curve(labels, probabilities)
    exact = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    edges = np.searchsorted(every, np.arange(0, 1, 1 / NUM_BINS))
    assert found >= exact[edges].max() - 1e-12
    best = int(exact.argmax())
    if best < len(every):
        in_bin = scores.histograms[0, :, int(np.floor(every[best] * NUM_BINS))].sum().item()
        assert exact[best] - found <= in_bin / (labels.sum() + (probabilities >= every[best]).sum()) + 1e-12


@pytest.mark.parametrize("task", ["multi-label", "binary"])
def test_counts_at_the_best_threshold_are_those_of_the_histogram_and_of_prediction(task):
    logits, targets = draw(task, (6, 40, 50))
    classes, temperature = logits.shape[1], 1.7
    scores = score(task, logits, targets, temperature=temperature)
    best = [scores.best_threshold(number) for number in range(classes)]
    assert len({*best, 0.5}) == classes + 1
    again = score(task, logits, targets, temperature=temperature, threshold=best)
    fitted = {"threshold": tuple(best), "temperature": temperature}
    contract = DataContract(1, task="multi-label", outputs=classes, **fitted)
    predicted = contract.classes(contract.probabilities(logits)).reshape(targets.shape)
    for number in range(classes):
        counts = counts_by_threshold(scores.histograms[number])
        at = round(best[number] * NUM_BINS)
        hits, extra = counts["true_positives"][at].item(), counts["false_positives"][at].item()
        assert again.confusion[number, :, 1].tolist() == [extra, hits]
        pair = targets[:, number].flatten(), predicted[:, number].flatten()
        assert again.results()["f1" if classes == 1 else f"f1.{number}"] == approx(reference.f1_score(*pair))
        assert again.confusion[number].tolist() == reference.confusion_matrix(*pair).tolist()


def test_of_equally_good_thresholds_the_one_nearest_to_one_half_is_taken():
    probabilities = torch.tensor([0.1, 0.2, 0.9, 0.95]).logit().reshape(-1, 1)
    assert score("binary", probabilities, torch.tensor([[0], [0], [1], [1]])).best_threshold(0) == 0.5
    higher = score("binary", probabilities, torch.tensor([[0], [0], [0], [1]])).best_threshold(0)
    assert 0.9 < higher < 0.9 + 1 / NUM_BINS
    lower = score("binary", probabilities, torch.tensor([[0], [1], [1], [1]])).best_threshold(0)
    assert 0.2 - 1 / NUM_BINS < lower <= 0.2
    assert score("binary", probabilities, torch.zeros(4, 1)).best_threshold(0) == 0.5


def calibration_error(probabilities: np.ndarray, is_right: np.ndarray) -> float:
    number = np.minimum((probabilities * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    inside = [number == one for one in range(CALIBRATION_BINS) if (number == one).any()]
    return sum(one.mean() * abs(probabilities[one].mean() - is_right[one].mean()) for one in inside)


@pytest.mark.parametrize("task", TASKS)
def test_the_calibration_error_is_that_of_a_plain_computation(task):
    logits, targets = draw(task)
    truth, guess, probabilities = pixels(task, logits, targets)
    probabilities = probabilities.astype(np.float64)
    if task == "multi-class":
        expected = calibration_error(probabilities.max(1), guess == truth)
    else:
        expected = np.mean([calibration_error(p, t) for p, t in zip(probabilities.T, truth.T, strict=True)])
    found = score(task, logits, targets).results()["ece"]
    assert expected > 0.02 and found == pytest.approx(expected, abs=0.1 / NUM_BINS)
    assert score(task, 3 * logits, targets).results()["ece"] > found + 0.01


def test_certain_answers_are_in_the_outermost_bins():
    logits = torch.tensor([[50.0], [-50.0], [math.inf], [-math.inf]])
    histogram = score("binary", logits, torch.tensor([[1], [0], [1], [0]])).histograms[0]
    assert histogram[1, -1] == histogram[0, 0] == 2 and histogram.sum() == 4


# ------------------------------------------------------------------------------------------- rules of absence


def test_an_empty_mask_is_nan_without_and_zero_with_false_positives():
    empty, quiet = torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), -3.0)
    found = score("binary", quiet, empty).results()
    assert all(math.isnan(found[name]) for name in ("f1", "iou", "precision", "recall", "average_precision"))
    assert found["accuracy"] == 1
    noisy = quiet.clone()
    noisy[0, 0, 0, 0] = 3
    found = score("binary", noisy, empty).results()
    assert all(found[name] == 0 for name in ("f1", "iou", "precision", "recall"))
    assert found["accuracy"] == approx(127 / 128)


@pytest.mark.parametrize("task", TASKS)
def test_where_all_is_ignored_everything_is_nan(task):
    logits, targets = draw(task)
    scores = score(task, logits, torch.full_like(targets, 255))
    found = scores.results()
    assert found.pop("ignored_pixels") == targets.numel() and found.pop("valid_pixels") == 0
    assert all(math.isnan(value) for value in found.values()) and len(found) > 10
    assert scores.best_threshold(0) == 0.5


# ------------------------------------------------------------------------------- errors that others have made


def test_the_mean_of_f1_over_batches_is_not_the_f1():
    """The same predictions gave 0.225 by batches of one and 0.893 in truth: most tiles are empty."""
    targets = torch.zeros(256, 1, 16, 16)
    targets[:64, :, 4:12] = 1
    logits = torch.where(targets == 1, 2.0, -2.0)
    flipped = torch.rand(targets.shape, generator=torch.Generator().manual_seed(0)) < 0.04
    logits = torch.where(flipped, -logits, logits)
    truth = reference.f1_score(targets.flatten(), logits.flatten() >= 0)
    tiles = [f1(*pair).item() for pair in zip(logits.split(1), targets.split(1), strict=True)]
    assert sum(tiles) / 256 < 0.3 and truth > 0.8
    for batch_size in (1, 4, 32, 256):
        scores = Scores(1, multi_class=False)
        for pair in zip(logits.split(batch_size), targets.split(batch_size), strict=True):
            scores.update(*pair)
        assert scores.results()["f1"] == approx(truth)


def test_no_pixel_of_a_whole_scene_is_lost():
    """
    In float32, 72 % of the pixels of 10,980 x 10,980 are: beyond 2 ** 24, adding 1 changes nothing. That none
    is lost in one call either, see test_targets.py.
    """
    strip = torch.tensor([-1.0, 1.0]).reshape(1, 2, 1, 1).expand(1, 2, 1220, 10_980)
    scores = score("multi-class", strip[..., :61, :], torch.ones(1, 61, 10_980, dtype=torch.int64))
    strip_scores = sum([scores] * 19, scores)
    scene = sum([strip_scores] * 8, strip_scores)
    assert scene.confusion.tolist() == [[0, 0], [0, 10_980**2]] and scene.confusion.sum() == 120_560_400
    assert scene.histograms[1, 1].sum() == scene.confidences[1].sum() == 10_980**2


def test_a_channel_of_one_is_not_broadcast_against_the_batch():
    """(N, 1, H, W) against (N, H, W) became (N, N, H, W): ignored pixels of an image hid all others'."""
    logits, targets = draw("binary")
    with pytest.raises(ValueError, match="has the shape"):
        score("binary", logits, targets[:, 0])
    with pytest.raises(ValueError, match="valid has the shape"):
        score("binary", logits, targets, torch.ones(6, 1, 9, 11))
    targets[0] = 255
    assert state(score("binary", logits, targets))[:3] == state(score("binary", logits[1:], targets[1:]))[:3]


def test_255_in_a_mask_is_ignored_or_refused_but_no_class():
    """It was counted as a class, multiplied into sums, or a TypeError where nothing was to be ignored."""
    logits, targets = draw("multi-class")
    targets[2, :3] = 255
    kept = targets != 255
    truth, guess = targets[kept], logits.argmax(1)[kept]
    expected = reference.confusion_matrix(truth, guess).tolist()
    assert score("multi-class", logits, targets).confusion.tolist() == expected
    with pytest.raises(ValueError, match=r"number 255, the prediction has the classes 0 to 3.*IGNORE_INDEX"):
        score("multi-class", logits, targets, ignore_index=-1)
    with pytest.raises(ValueError, match="class number -1"):
        score("multi-class", logits, torch.full_like(targets, -1))


def test_integer_and_half_precision_logits_are_taken_and_nothing_is_changed_in_place():
    logits, targets = draw("multi-label")
    logits = logits.round()
    before = logits.clone(), targets.clone()
    scores = score("multi-label", logits, targets, temperature=2.0)
    assert torch.equal(logits, before[0]) and torch.equal(targets, before[1])
    for dtype in (torch.int32, torch.float16, torch.bfloat16, torch.float64):
        found = score("multi-label", logits.to(dtype), targets.to(torch.uint8), temperature=2.0)
        assert state(found) == state(scores)
