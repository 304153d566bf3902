import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import dida_tools
from dida_tools.config.project import project_of
from dida_tools.config.references import name_of, resolve
from dida_tools.training.determinism import seed_sample
from dida_tools.utils.data.transforms import (
    GEOMETRY,
    STANDARD,
    brightness,
    contrast,
    flip,
    noise,
    quarter_turn,
    rescale,
)

ROOT = Path(dida_tools.__file__).parents[1]
Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

MOVING = [flip, quarter_turn, partial(rescale, probability=1.0)]
COLOURING = [brightness, contrast, noise]
ALL = [*MOVING, *COLOURING]
NAMES = ["flip", "quarter_turn", "rescale", "brightness", "contrast", "noise"]
SEEDS = range(12)


def invent(channels: int, height: int, width: int) -> Tensor:
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(channels))


def invent_mask(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    mask = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask[..., 0, 0] = 255
    return mask


def apply(transform: Transform, seed: int, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    seed_sample(0, 0, seed)
    return transform(image, mask)


@pytest.mark.parametrize("transform", ALL, ids=NAMES)
@pytest.mark.parametrize("channels", [1, 3, 26])
@pytest.mark.parametrize("size", [(16, 16), (12, 21), (1, 7)])
@pytest.mark.parametrize("mask_channels", [(), (4,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_shape_and_dtype_stay(
    transform: Transform,
    channels: int,
    size: tuple[int, int],
    mask_channels: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    image, mask = invent(channels, *size), invent_mask((*mask_channels, *size), dtype)
    for seed in SEEDS:
        new_image, new_mask = apply(transform, seed, image, mask)
        assert (new_image.shape, new_image.dtype) == (image.shape, torch.float32)
        assert (new_mask.shape, new_mask.dtype) == (mask.shape, dtype)
        assert new_image.isfinite().all() and set(new_mask.unique().tolist()) <= set(mask.unique().tolist())


@pytest.mark.parametrize("transform", ALL, ids=NAMES)
def test_what_comes_in_is_not_changed(transform: Transform) -> None:
    image, mask = invent(3, 9, 9), invent_mask((9, 9), torch.int64)
    kept = image.clone(), mask.clone()
    for seed in SEEDS:
        apply(transform, seed, image, mask)
    assert torch.equal(image, kept[0]) and torch.equal(mask, kept[1])


@pytest.mark.parametrize("transform", ALL, ids=NAMES)
def test_a_transform_is_a_function_of_the_seed_and_does_something(transform: Transform) -> None:
    image, mask = invent(3, 10, 10), invent_mask((10, 10), torch.int64)
    results = [apply(transform, seed, image, mask) for seed in SEEDS]
    again = [apply(transform, seed, image, mask) for seed in SEEDS]
    assert all(torch.equal(a, b) for a, b in zip(sum(results, ()), sum(again, ()), strict=True))
    assert not all(torch.equal(results[0][0], result[0]) for result in results)


@pytest.mark.parametrize("transform", [flip, quarter_turn], ids=NAMES[:2])
@pytest.mark.parametrize("size", [(16, 16), (12, 21)])
def test_flips_and_turns_move_image_and_mask_alike(transform: Transform, size: tuple[int, int]) -> None:
    image, mask = invent(3, *size), invent_mask(size, torch.int64)
    image[1] = mask
    for seed in SEEDS:
        new_image, new_mask = apply(transform, seed, image, mask)
        assert torch.equal(new_image[1], new_mask.float())


@pytest.mark.parametrize("transform", [flip, quarter_turn], ids=NAMES[:2])
def test_all_channels_and_labels_move_alike(transform: Transform) -> None:
    plane = invent(1, 8, 8)
    for seed in SEEDS:
        new_image, new_mask = apply(transform, seed, plane.repeat(5, 1, 1), plane.repeat(3, 1, 1))
        assert (new_image == new_image[0]).all() and (new_mask == new_image[0]).all()


def views(transform: Transform, size: tuple[int, int]) -> list[Tensor]:
    image = torch.arange(size[0] * size[1]).float().reshape(1, *size)
    found: list[Tensor] = []
    for seed in range(100):
        new = apply(transform, seed, image, image[0])[0]
        if not any(torch.equal(new, other) for other in found):
            found.append(new)
    return found


@pytest.mark.parametrize(
    ("transform", "size", "number"),
    [(flip, (5, 5), 4), (flip, (4, 6), 4), (quarter_turn, (5, 5), 4), (quarter_turn, (4, 6), 2)],
)
def test_every_flip_and_turn_occurs(transform: Transform, size: tuple[int, int], number: int) -> None:
    assert len(views(transform, size)) == number


def test_flips_and_turns_together_give_all_eight_views() -> None:
    both: Transform = lambda image, mask: quarter_turn(*flip(image, mask))  # noqa: E731
    assert len(views(both, (4, 4))) == 8


@pytest.mark.parametrize("size", [(33, 33), (24, 40)])
@pytest.mark.parametrize("factor", [0.5, 0.8, 1.25, 2.0])
def test_rescale_moves_image_and_mask_alike(size: tuple[int, int], factor: float) -> None:
    """Of an image that is the mask, blurred edges aside, each pixel has the value of the mask."""
    y, x = torch.meshgrid(*(torch.arange(length) for length in size), indexing="ij")
    mask = ((y // 8 + x // 8) % 2).long()
    image, new_mask = rescale(mask[None].float(), mask, factor, factor, probability=1.0)
    assert torch.equal(
        image[0].round().long()[(image[0] - 0.5).abs() > 0.01], new_mask[(image[0] - 0.5).abs() > 0.01]
    )
    assert not torch.equal(mask, new_mask)


def test_rescale_keeps_the_center_and_magnifies() -> None:
    image = torch.zeros(1, 41, 41)
    image[0, 15:26, 15:26] = 1
    for factor in (0.75, 2.0):
        new, mask = rescale(image, image[0], factor, factor, probability=1.0)
        assert torch.equal(mask, mask.flip(0)) and torch.equal(mask, mask.T)
        assert float(mask.sum().sqrt()) == pytest.approx(11 * factor, abs=1)
        assert float(new.sum().sqrt()) == pytest.approx(11 * factor, abs=1)


def test_rescale_by_one_changes_nothing() -> None:
    image, mask = invent(3, 20, 31), invent_mask((20, 31), torch.int64)
    new_image, new_mask = rescale(image, mask, 1.0, 1.0, probability=1.0)
    torch.testing.assert_close(new_image, image, rtol=1e-4, atol=1e-4)
    assert torch.equal(new_mask, mask)


def test_rescale_keeps_class_numbers_of_any_size() -> None:
    mask = torch.full((16, 16), 2**40 + 1)
    assert (rescale(torch.zeros(1, 16, 16), mask, 0.8, 0.8, probability=1.0)[1] == 2**40 + 1).all()


def test_rescale_mirrors_what_comes_in_at_the_edges() -> None:
    image = torch.ones(2, 16, 16)
    assert (rescale(image, image[0], 0.5, 0.5, probability=1.0)[0] - 1).abs().max() < 1e-6


def test_rescale_is_applied_in_its_part_of_the_cases_and_within_its_bounds() -> None:
    image = torch.zeros(1, 101, 101)
    image[0, 40:61, 40:61] = 1
    edges = []
    for seed in range(300):
        _, mask = apply(partial(rescale, low=0.6, high=1 / 0.6, probability=0.4), seed, image, image[0])
        edges.append(float(mask.sum().sqrt()))
    changed = [edge for edge in edges if edge != 21]
    assert len(changed) / 300 == pytest.approx(0.4, abs=0.1)
    assert 12 <= min(changed) < 14 and 33 < max(changed) <= 36
    assert sum(edge > 21 for edge in changed) / len(changed) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("transform", COLOURING, ids=NAMES[3:])
def test_colors_leave_the_mask_alone(transform: Transform) -> None:
    mask = invent_mask((3, 8, 8), torch.float32)
    for seed in SEEDS:
        assert apply(transform, seed, invent(2, 8, 8), mask)[1] is mask


def test_brightness_adds_a_number_to_each_channel() -> None:
    image = invent(2000, 4, 4)
    added = apply(partial(brightness, std=0.3), 0, image, image[0])[0] - image
    assert added.std((1, 2)).max() < 1e-6
    assert float(added[:, 0, 0].mean()) == pytest.approx(0, abs=0.03)
    assert float(added[:, 0, 0].std()) == pytest.approx(0.3, rel=0.1)


def test_contrast_stretches_each_channel_around_its_mean() -> None:
    image = invent(500, 16, 16) + torch.arange(500).reshape(-1, 1, 1)
    new = apply(partial(contrast, amount=0.2), 0, image, image[0])[0]
    torch.testing.assert_close(new.mean((1, 2)), image.mean((1, 2)))
    factors = new.std((1, 2)) / image.std((1, 2))
    assert 0.8 <= factors.min() < 0.82 and 1.18 < factors.max() <= 1.2


def test_noise_is_another_for_each_value() -> None:
    image = torch.zeros(3, 64, 64)
    new = apply(partial(noise, std=0.2), 0, image, image[0])[0]
    assert float(new.std()) == pytest.approx(0.2, rel=0.05) and len(new.unique()) > 0.99 * new.numel()


@pytest.mark.parametrize("transform", COLOURING, ids=NAMES[3:])
def test_a_strength_of_zero_changes_nothing(transform: Transform) -> None:
    image = invent(3, 8, 8)
    strength = {"amount": 0.0} if transform is contrast else {"std": 0.0}
    torch.testing.assert_close(transform(image, image[0], **strength)[0], image)


def test_the_standard_holds_all_transforms_and_geometry_the_exact_ones() -> None:
    bare = [getattr(transform, "func", transform).__name__ for transform in STANDARD]
    assert bare == NAMES and (flip, quarter_turn) == GEOMETRY


@pytest.mark.parametrize(
    "transform", [getattr(transform, "func", transform) for transform in STANDARD], ids=NAMES
)
def test_a_config_can_record_each_transform(transform: Transform) -> None:
    assert resolve(name_of(transform, project_of("dida_tools")), project_of("dida_tools")) is transform


DIGESTS = """
import hashlib, sys
import torch
from {package}.training.determinism import seed_sample
from {package}.utils.data.transforms import STANDARD
torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
for index in range(10):
    seed_sample(1, 2, index)
    image, mask = torch.randn(12, 192, 192), torch.randint(0, 5, (192, 192))
    for transform in STANDARD:
        image, mask = transform(image, mask)
    digest.update(image.contiguous().numpy().tobytes() + mask.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_number_of_threads_makes_no_difference() -> None:
    code = DIGESTS.format(package=dida_tools.__name__)
    commands = [[sys.executable, "-c", code, threads] for threads in ("1", "3")]
    first, other = (
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout for command in commands
    )
    assert first == other and len(first) > 60


def test_a_single_function_is_an_augmentation_too(tmp_path):
    from dida_tools.utils.data import NpyDataset
    from dida_tools.utils.data.transforms import strong

    for kind, array in (("x", np.zeros((8, 8, 2), np.uint8)), ("y", np.zeros((8, 8), np.uint8))):
        (tmp_path / kind).mkdir()
        np.save(tmp_path / kind / "a.npy", array)
    dataset = NpyDataset(tmp_path / "x", tmp_path / "y", augment=strong)
    torch.manual_seed(0)
    first, again = dataset[0][0], dataset[0][0]
    assert not torch.equal(first, again)
    torch.manual_seed(0)
    assert torch.equal(dataset[0][0], first)
