"""Histograms of probabilities add up, and give the curves of an independent implementation."""

import pytest
import torch
from sklearn.metrics import average_precision_score

from dida_tools.utils.scores import NUM_BINS, count_scores, counts_by_threshold


def draw(classes: int, shape: tuple[int, ...] = (6, 9, 11)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    number, *size = shape
    target = torch.randint(0, classes, shape, generator=generator)
    pred = torch.randn(number, classes, *size, generator=generator)
    return pred + torch.nn.functional.one_hot(target, classes).movedim(-1, 1), target


def test_every_valid_pixel_is_counted_once_in_each_class():
    pred, target = draw(4)
    target[0] = 255
    scores = count_scores(pred, target)
    assert scores.shape == (4, 2, NUM_BINS) and scores.dtype == torch.int64
    assert scores.sum((1, 2)).tolist() == [5 * 9 * 11] * 4
    assert scores[:, 1].sum(-1).tolist() == [(target == number).sum().item() for number in range(4)]


def test_batches_add_up_to_the_whole():
    pred, target = draw(3)
    parts = sum(count_scores(pred[start : start + 2], target[start : start + 2]) for start in (0, 2, 4))
    assert torch.equal(parts, count_scores(pred, target))


@pytest.mark.parametrize("kind", ["multi-class", "multi-label"])
def test_average_precision_is_that_of_scikit_learn_on_the_same_bins(kind):
    pred, target = draw(3)
    if kind == "multi-class":
        probabilities, truth = pred.softmax(1), torch.nn.functional.one_hot(target, 3).movedim(-1, 1).bool()
    else:
        truth = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).bool() | (pred > 2)
        probabilities, target = pred.sigmoid(), truth.float()
    scores = count_scores(pred, target)
    for number in range(3):
        counts = counts_by_threshold(scores[number])
        hits = counts["true_positives"].double().flip(0)
        found = hits + counts["false_positives"].double().flip(0)
        recall = hits / hits[-1]
        precision = hits / found.clamp(min=1)
        average = (torch.diff(recall, prepend=torch.zeros(1)) * precision).sum().item()
        binned = (probabilities[:, number] * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        assert average == pytest.approx(average_precision_score(truth[:, number].flatten(), binned.flatten()))
        total = sum(one[5].item() for one in counts.values())
        assert total == target[:, 0].numel() if kind == "multi-label" else target.numel()


def test_pixels_that_do_not_count_are_left_out():
    pred, target = draw(3)
    valid = torch.zeros_like(target)
    valid[2] = 1
    assert torch.equal(count_scores(pred, target, valid), count_scores(pred[2:3], target[2:3]))
    labels = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    labels[:, 1, :4] = 255
    assert count_scores(pred, labels).sum((1, 2)).tolist() == [6 * 99, 6 * 55, 6 * 99]


def test_certain_answers_are_in_the_outermost_bins():
    scores = count_scores(torch.tensor([[[[50.0, -50.0]]]]), torch.tensor([[[[1.0, 0.0]]]]))
    assert scores[0, 1, -1] == 1 and scores[0, 0, 0] == 1 and scores.sum() == 2
