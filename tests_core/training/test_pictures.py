"""Which samples the picture of a run shows."""

import math

from dida_core.report import pictures
from dida_core.report.pictures import choose_samples
from PIL import Image

from dida_tools.training.pytorch_training import train


class Named:
    """A dataset that names its samples."""

    def sample_name(self, index: int) -> str:
        return f"tile_{index}.tif"


def test_the_worst_the_best_and_some_at_random():
    order = [7, 3, 5, 1, 0, 2, 6, 4]
    losses = [0.7, 0.3, 0.5, 0.1, 0.0, 0.2, math.nan, 0.4]
    chosen = choose_samples(Named(), order, losses, seed=0)
    assert list(chosen)[:4] == [7, 5, 0, 1]
    assert chosen[7] == "worst: tile_7.tif, loss 0.700" and chosen[0] == "best: tile_0.tif, loss 0.000"
    assert set(list(chosen)[4:]) <= {2, 3, 4} and len(chosen) == 6
    assert all(chosen[index].startswith("random: ") for index in list(chosen)[4:])
    assert choose_samples(Named(), order, losses, seed=0) == chosen
    others = {tuple(choose_samples(Named(), order, losses, seed=seed))[4:] for seed in range(20)}
    assert len(others) > 1


def test_few_samples_are_shown_once_each():
    assert sorted(choose_samples(object(), [0, 1], [0.5, 0.2], seed=0)) == [0, 1]
    assert choose_samples(object(), [0], [math.nan], seed=0) == {}


def test_the_losses_belong_to_the_samples(datasets, tiny_config, global_config, monkeypatch):
    seen = {}

    def note(dataset, order, losses, seed):
        seen.update(zip(order, losses, strict=True))
        return {}

    monkeypatch.setattr(pictures, "choose_samples", note)
    result = train(*datasets, tiny_config | {"DATA_LOADER_CONFIG": {"batch_size": 3}}, global_config)
    assert sorted(seen) == list(range(len(datasets[1])))
    assert sum(seen.values()) / len(seen) == result.metrics["test.loss"]
    assert Image.open(result.picture).size[0] > 500
