"""Every transform keeps shapes, moves image and mask alike, and is a function of the seed alone."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from dida_core.training.determinism import seed_sample
from torch import Tensor

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
@pytest.mark.parametrize("size", [(16, 16), (12, 21), (1, 7)])
def test_a_transform_is_a_function_of_the_seed_and_keeps_shape_and_dtype(
    transform: Transform, size: tuple[int, int]
) -> None:
    for channels, mask_shape, dtype in ((1, size, torch.int64), (26, (4, *size), torch.float32)):
        image, mask = invent(channels, *size), invent_mask(mask_shape, dtype)
        kept, results = (image.clone(), mask.clone()), []
        for seed in SEEDS:
            new = apply(transform, seed, image, mask)
            assert (new[0].shape, new[0].dtype) == (image.shape, torch.float32) and new[0].isfinite().all()
            assert (new[1].shape, new[1].dtype) == (mask.shape, dtype)
            assert set(new[1].unique().tolist()) <= set(mask.unique().tolist())
            assert all(map(torch.equal, new, apply(transform, seed, image, mask)))
            results.append(new[0])
        assert torch.equal(image, kept[0]) and torch.equal(mask, kept[1])
        assert not all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize(
    ("transform", "size", "number"),
    [(flip, (5, 5), 4), (flip, (4, 6), 4), (quarter_turn, (5, 5), 4), (quarter_turn, (4, 6), 2),
     (lambda image, mask: quarter_turn(*flip(image, mask)), (4, 4), 8)],
)  # fmt: skip
def test_every_flip_and_turn_occurs_and_moves_image_and_mask_alike(
    transform: Transform, size: tuple[int, int], number: int
) -> None:
    mask = torch.arange(size[0] * size[1]).reshape(size)
    found: list[Tensor] = []
    for seed in range(100):
        image, new = apply(transform, seed, mask.float().repeat(5, 1, 1), mask)
        assert (image == new).all()
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


def test_rescale_keeps_class_numbers_and_mirrors_at_the_border() -> None:
    image, mask = torch.ones(2, 16, 16), torch.full((16, 16), 2**40 + 1)
    image, mask = rescale(image, mask, 0.5, 0.5, probability=1.0)
    assert (image - 1).abs().max() < 1e-6 and (mask == 2**40 + 1).all()


def test_rescale_is_applied_in_its_fraction_of_the_cases_and_within_its_bounds() -> None:
    image = torch.zeros(1, 101, 101)
    image[0, 40:61, 40:61] = 1
    transform = partial(rescale, low=0.6, high=1 / 0.6, probability=0.4)
    sizes = [float(apply(transform, seed, image, image[0])[1].sum().sqrt()) for seed in range(300)]
    changed = [size for size in sizes if size != 21]
    assert len(changed) / 300 == pytest.approx(0.4, abs=0.1)
    assert 12 <= min(changed) < 14 and 33 < max(changed) <= 36


def test_colors_are_as_strong_as_they_say_and_leave_the_mask_alone() -> None:
    mask = invent_mask((4, 4))
    image = invent(2000, 4, 4)
    new, same = apply(partial(brightness, std=0.3), 0, image, mask)
    added = new - image
    assert added.std((1, 2)).max() < 1e-6 and same is mask  # a number for each channel
    assert float(added[:, 0, 0].mean()) == pytest.approx(0, abs=0.03)
    assert float(added[:, 0, 0].std()) == pytest.approx(0.3, rel=0.1)
    image = invent(500, 16, 16) + torch.arange(500).reshape(-1, 1, 1)
    new, same = apply(partial(contrast, amount=0.2), 0, image, mask)
    torch.testing.assert_close(new.mean((1, 2)), image.mean((1, 2)))
    factors = new.std((1, 2)) / image.std((1, 2))
    assert 0.8 <= factors.min() < 0.82 and 1.18 < factors.max() <= 1.2 and same is mask
    image = torch.zeros(3, 64, 64)
    new, same = apply(partial(noise, std=0.2), 0, image, mask)
    assert float(new.std()) == pytest.approx(0.2, rel=0.05) and len(new.unique()) > 0.99 * new.numel()
    assert same is mask


def test_the_standard_holds_all_transforms_and_geometry_the_exact_ones() -> None:
    assert [one.__name__ for one in STANDARD] == [*MOVING, *COLORING]
    assert [one.__name__ for one in GEOMETRY] == [*MOVING][:2]
    for transform in (*STANDARD, strong):  # found under their names: a config can record them
        assert getattr(module, transform.__name__) is transform and transform.__module__ == module.__name__


def test_the_number_of_threads_makes_no_difference() -> None:
    image, mask, threads = invent(12, 128, 128), invent_mask((128, 128)), torch.get_num_threads()
    for transform in (*STANDARD, strong):
        found = []
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(apply(transform, 1, image, mask))
        torch.set_num_threads(threads)
        assert all(map(torch.equal, *found))
