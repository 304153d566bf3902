"""Scores add up, and give the values of independent implementations on all pixels at once."""

import torch

from dida_tools.utils.scores import Scores


def test_batches_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(6, 3, 9, 11, generator=generator), torch.randint(0, 3, (6, 9, 11), generator=generator)
    whole, parts = Scores(3, multi_class=True), Scores(3, multi_class=True)
    whole.update(logits, target)
    for start in (0, 2, 4):
        parts.update(logits[start : start + 2], target[start : start + 2])
    assert torch.equal(parts.histograms, whole.histograms) and torch.equal(parts.confusion, whole.confusion)
