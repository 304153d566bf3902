"""
Augmentation: functions of an image and its mask, for any number of channels.

Each takes the image (C, H, W) in float32, normalized, and the mask (H, W) or (K, H, W), and returns both.
They draw from PyTorch's generator, which the routines seed for each sample from (seed, epoch, index): a
sample is the same with any number of workers. Set strengths with functools.partial, so that a config can
record them: ``augment=(flip, quarter_turn, partial(noise, std=0.1))``.
"""

import torch
from torch import Tensor
from torch.nn import functional

Pair = tuple[Tensor, Tensor]


def flip(image: Tensor, mask: Tensor) -> Pair:
    """Mirror top and bottom, and left and right, each in half of the cases."""
    for dim in (-2, -1):
        if torch.rand(()) < 0.5:
            image, mask = image.flip(dim), mask.flip(dim)
    return image, mask


def quarter_turn(image: Tensor, mask: Tensor) -> Pair:
    """Rotate by a multiple of 90 degrees; what is not square by 180 degrees, so that the size stays."""
    square = image.shape[-2] == image.shape[-1]
    turns = int(torch.randint(4, ())) if square else 2 * int(torch.randint(2, ()))
    return image.rot90(turns, (-2, -1)), mask.rot90(turns, (-2, -1))


def rescale(
    image: Tensor, mask: Tensor, low: float = 0.8, high: float = 1.25, probability: float = 0.5
) -> Pair:
    """Magnify around the center by a factor between low and high; what comes in from outside is mirrored."""
    if torch.rand(()) >= probability:
        return image, mask
    # Even in the logarithm: half as large is as likely as twice as large.
    factor = torch.empty(()).uniform_(float(torch.tensor(low).log()), float(torch.tensor(high).log())).exp()
    theta = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]) / factor
    grid = functional.affine_grid(theta[None], [1, 1, *image.shape[-2:]], align_corners=False)
    stretched = functional.grid_sample(image[None], grid, "bilinear", "reflection", align_corners=False)[0]
    layers = mask.reshape(1, -1, *mask.shape[-2:]).double()  # exact for class numbers
    layers = functional.grid_sample(layers, grid.double(), "nearest", "reflection", align_corners=False)
    return stretched, layers.reshape(mask.shape).to(mask.dtype)


def brightness(image: Tensor, mask: Tensor, std: float = 0.1) -> Pair:
    """Add a number to each channel, in units of its std where images are normalized."""
    return image + std * torch.randn(image.shape[0], 1, 1), mask


def contrast(image: Tensor, mask: Tensor, amount: float = 0.1) -> Pair:
    """Stretch each channel around its mean in this image by a factor between 1 - amount and 1 + amount."""
    factor = torch.empty(image.shape[0], 1, 1).uniform_(1 - amount, 1 + amount)
    # By numpy: torch's sums depend on the number of threads, which is another in a worker.
    mean = torch.from_numpy(image.numpy().mean((-2, -1), keepdims=True))
    return (image - mean) * factor + mean, mask


def noise(image: Tensor, mask: Tensor, std: float = 0.05) -> Pair:
    """Add noise to each value, in units of the channel's std where images are normalized."""
    return image + std * torch.randn(image.shape), mask


# <- your augmentation here: a function of (image, mask), at the top of a module

GEOMETRY = (flip, quarter_turn)
STANDARD = (flip, quarter_turn, rescale, brightness, contrast, noise)


def strong(image: Tensor, mask: Tensor) -> Pair:
    """Apply all of STANDARD with larger changes: for few images that differ much."""
    image, mask = rescale(*quarter_turn(*flip(image, mask)))
    image, mask = contrast(*brightness(image, mask, std=0.5), amount=0.4)
    return noise(image, mask, std=0.1)
