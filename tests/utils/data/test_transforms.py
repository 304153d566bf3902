"""Every transform keeps shapes, moves image and mask alike, and is a function of the seed alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.training import determinism
from dida_core.training.determinism import seed_sample
from torch import Tensor

from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data import transforms as module
from dida_tools.utils.data.transforms import (
    GEOMETRY,
    STANDARD,
    brightness,
    contrast,
    flip,
    noise,
    quarter_turn,
    rescale,
    strong,
)

Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
COLORING = {"brightness": brightness, "contrast": contrast, "noise": noise}
MOVING = {"flip": flip, "quarter_turn": quarter_turn, "rescale": partial(rescale, probability=1.0)}
ALL = [pytest.param(transform, id=name) for name, transform in (MOVING | COLORING).items()]
SEEDS = range(12)


def invent(channels: int, height: int, width: int) -> Tensor:
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(channels))


def invent_mask(shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    mask = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask[..., 0, 0] = 255
    return mask


def apply(transform: Transform, seed: int, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    seed_sample(0, 0, seed)
    return transform(image, mask)


@pytest.mark.parametrize("transform", ALL)
@pytest.mark.parametrize("channels", [1, 3, 26])
@pytest.mark.parametrize("size", [(16, 16), (12, 21), (1, 7)])
def test_shape_dtype_and_inputs_stay(transform: Transform, channels: int, size: tuple[int, int]) -> None:
    for mask_channels in ((), (4,)):
        for dtype in (torch.int64, torch.float32):
            image, mask = invent(channels, *size), invent_mask((*mask_channels, *size), dtype)
            kept = image.clone(), mask.clone()
            for seed in SEEDS:
                new_image, new_mask = apply(transform, seed, image, mask)
                assert (new_image.shape, new_image.dtype) == (image.shape, torch.float32)
                assert (new_mask.shape, new_mask.dtype) == (mask.shape, dtype)
                assert new_image.isfinite().all()
                assert set(new_mask.unique().tolist()) <= set(mask.unique().tolist())
            assert torch.equal(image, kept[0]) and torch.equal(mask, kept[1])


@pytest.mark.parametrize("transform", ALL)
def test_a_transform_is_a_function_of_the_seed_and_does_something(transform: Transform) -> None:
    image, mask = invent(3, 10, 10), invent_mask((10, 10))
    results = [apply(transform, seed, image, mask) for seed in SEEDS]
    again = [apply(transform, seed, image, mask) for seed in SEEDS]
    assert all(torch.equal(a, b) for a, b in zip(sum(results, ()), sum(again, ()), strict=True))
    assert not all(torch.equal(results[0][0], result[0]) for result in results)


@pytest.mark.parametrize("transform", [flip, quarter_turn])
@pytest.mark.parametrize("size", [(16, 16), (12, 21)])
def test_flips_and_turns_move_image_mask_and_channels_alike(
    transform: Transform, size: tuple[int, int]
) -> None:
    mask = invent_mask(size)
    for seed in SEEDS:
        new_image, new_mask = apply(transform, seed, mask.float().repeat(5, 1, 1), mask)
        assert (new_image == new_mask).all()
        assert (apply(transform, seed, invent(3, *size), mask.repeat(3, 1, 1))[1] == new_mask).all()


@pytest.mark.parametrize(
    ("transform", "size", "number"),
    [
        (flip, (5, 5), 4),
        (flip, (4, 6), 4),
        (quarter_turn, (5, 5), 4),
        (quarter_turn, (4, 6), 2),
        (lambda image, mask: quarter_turn(*flip(image, mask)), (4, 4), 8),
    ],
)
def test_every_flip_and_turn_occurs(transform: Transform, size: tuple[int, int], number: int) -> None:
    image = torch.arange(size[0] * size[1]).float().reshape(1, *size)
    found: list[Tensor] = []
    for seed in range(100):
        new = apply(transform, seed, image, image[0])[0]
        if not any(torch.equal(new, other) for other in found):
            found.append(new)
    assert len(found) == number


@pytest.mark.parametrize("size", [(33, 33), (24, 40)])
@pytest.mark.parametrize("factor", [0.5, 0.8, 1.25, 2.0])
def test_rescale_moves_image_and_mask_alike(size: tuple[int, int], factor: float) -> None:
    """Of an image that is the mask, blurred borders aside, each pixel has the value of the mask."""
    y, x = torch.meshgrid(*(torch.arange(length) for length in size), indexing="ij")
    mask = ((y // 8 + x // 8) % 2).long()
    image, new_mask = rescale(mask[None].float(), mask, factor, factor, probability=1.0)
    is_sharp = (image[0] - 0.5).abs() > 0.01
    assert torch.equal(image[0].round().long()[is_sharp], new_mask[is_sharp])
    assert not torch.equal(mask, new_mask)


def test_rescale_keeps_the_center_and_magnifies() -> None:
    image = torch.zeros(1, 41, 41)
    image[0, 15:26, 15:26] = 1
    for factor in (0.75, 2.0):
        new, mask = rescale(image, image[0], factor, factor, probability=1.0)
        assert torch.equal(mask, mask.flip(0)) and torch.equal(mask, mask.T)
        assert float(mask.sum().sqrt()) == pytest.approx(11 * factor, abs=1)
        assert float(new.sum().sqrt()) == pytest.approx(11 * factor, abs=1)


def test_rescale_by_one_changes_nothing_and_keeps_class_numbers_and_borders() -> None:
    image, mask = invent(3, 20, 31), invent_mask((20, 31))
    new_image, new_mask = rescale(image, mask, 1.0, 1.0, probability=1.0)
    torch.testing.assert_close(new_image, image, rtol=1e-4, atol=1e-4)
    assert torch.equal(new_mask, mask)
    image, mask = torch.ones(2, 16, 16), torch.full((16, 16), 2**40 + 1)
    new_image, new_mask = rescale(image, mask, 0.5, 0.5, probability=1.0)
    assert (new_image - 1).abs().max() < 1e-6 and (new_mask == 2**40 + 1).all()  # mirrored from outside


def test_rescale_is_applied_in_its_fraction_of_the_cases_and_within_its_bounds() -> None:
    image = torch.zeros(1, 101, 101)
    image[0, 40:61, 40:61] = 1
    transform = partial(rescale, low=0.6, high=1 / 0.6, probability=0.4)
    sizes = [float(apply(transform, seed, image, image[0])[1].sum().sqrt()) for seed in range(300)]
    changed = [size for size in sizes if size != 21]
    assert len(changed) / 300 == pytest.approx(0.4, abs=0.1)
    assert 12 <= min(changed) < 14 and 33 < max(changed) <= 36
    assert sum(size > 21 for size in changed) / len(changed) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("transform", COLORING.values(), ids=COLORING.keys())
def test_colors_leave_the_mask_alone_and_a_strength_of_zero_all(transform: Transform) -> None:
    image, mask = invent(2, 8, 8), invent_mask((3, 8, 8), torch.float32)
    assert all(apply(transform, seed, image, mask)[1] is mask for seed in SEEDS)
    strength = {"amount": 0.0} if transform is contrast else {"std": 0.0}
    torch.testing.assert_close(transform(image, mask, **strength)[0], image)


def test_colors_are_as_strong_as_they_say() -> None:
    image = invent(2000, 4, 4)
    added = apply(partial(brightness, std=0.3), 0, image, image[0])[0] - image
    assert added.std((1, 2)).max() < 1e-6  # a number for each channel
    assert float(added[:, 0, 0].mean()) == pytest.approx(0, abs=0.03)
    assert float(added[:, 0, 0].std()) == pytest.approx(0.3, rel=0.1)
    image = invent(500, 16, 16) + torch.arange(500).reshape(-1, 1, 1)
    new = apply(partial(contrast, amount=0.2), 0, image, image[0])[0]
    torch.testing.assert_close(new.mean((1, 2)), image.mean((1, 2)))
    factors = new.std((1, 2)) / image.std((1, 2))
    assert 0.8 <= factors.min() < 0.82 and 1.18 < factors.max() <= 1.2
    image = torch.zeros(3, 64, 64)
    new = apply(partial(noise, std=0.2), 0, image, image[0])[0]
    assert float(new.std()) == pytest.approx(0.2, rel=0.05) and len(new.unique()) > 0.99 * new.numel()


def test_the_standard_holds_all_transforms_and_geometry_the_exact_ones() -> None:
    assert [one.__name__ for one in STANDARD] == [*MOVING, *COLORING]
    assert [one.__name__ for one in GEOMETRY] == [*MOVING][:2]
    for transform in (*STANDARD, strong):  # found under their names: a config can record them
        assert getattr(module, transform.__name__) is transform and transform.__module__ == module.__name__


DIGESTS = f"""
import hashlib, sys
import torch
from {determinism.__name__} import seed_sample
from {module.__name__} import STANDARD
torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
for index in range(4):
    seed_sample(1, 2, index)
    image, mask = torch.randn(12, 128, 128), torch.randint(0, 5, (128, 128))
    for transform in STANDARD:
        image, mask = transform(image, mask)
    digest.update(image.contiguous().numpy().tobytes() + mask.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_number_of_threads_makes_no_difference(run_python: Any) -> None:
    first, other = run_python(DIGESTS, 1), run_python(DIGESTS, 3)
    assert first == other and len(first) > 60


def test_a_single_function_is_an_augmentation_too(write_pairs: Any) -> None:
    folders = write_pairs([np.zeros((8, 8, 2), np.uint8)], [np.zeros((8, 8), np.uint8)])
    dataset = NpyDataset(*folders, augment=strong)
    samples = []
    for _ in range(2):
        torch.manual_seed(0)
        samples += [dataset[0][0], dataset[0][0]]
    assert torch.equal(samples[0], samples[2]) and not torch.equal(samples[0], samples[1])
