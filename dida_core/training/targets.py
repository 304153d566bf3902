"""
Conventions for predictions and targets, shared by losses, metrics and evaluation.

=============  ======================  =======================================================
task           prediction (logits)     target
=============  ======================  =======================================================
binary         (N, 1, H, W), float     (N, 1, H, W), 0 or 1, of any dtype
multi-label    (N, C, H, W), float     (N, C, H, W), 0 or 1, of any dtype; classes may overlap
multi-class    (N, C, H, W), float     (N, H, W), class numbers 0 to C - 1, of an integer dtype
=============  ======================  =======================================================

Without H and W the same holds for classification: (N, C) with (N, C) or (N,). Target values equal to
ignore_index count nowhere; nor does NaN in the target of a regression. A masked target has one more channel,
the first: a usability mask of 0 and 1 (weights in between work too). A masked multi-class target is
(N, 2, H, W), the mask and the class numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .device import map_tensors, tensors_of

IGNORE_INDEX = 255


def is_multi_class(pred: Tensor, target: Tensor) -> bool:
    """Return whether a target holds class numbers: it has no channels."""
    return target.ndim == pred.ndim - 1


def check_shapes(pred: Tensor, target: Tensor, multi_class: bool | None = None) -> None:
    """
    Check a prediction and its target against the conventions.

    :param multi_class: which of the two is wanted; None accepts both
    :raises ValueError: naming both shapes and what is wanted
    """
    shapes = f"the prediction has the shape {tuple(pred.shape)} and the target {tuple(target.shape)}"
    if pred.ndim < 2:
        raise ValueError(f"{shapes}: a prediction has the shape (N, C, ...).")
    if multi_class is None:
        multi_class = is_multi_class(pred, target)
    if not multi_class:
        if target.shape != pred.shape:
            raise ValueError(f"{shapes}: a binary or multi-label target has the shape of the prediction.")
        return
    wanted = (pred.shape[0], *pred.shape[2:])
    if pred.shape[1] < 2:
        raise ValueError(f"{shapes}: with one channel, the target has the shape of the prediction.")
    if target.shape != wanted:
        raise ValueError(f"{shapes}: a multi-class target holds class numbers in the shape {wanted}.")
    if target.is_floating_point():
        raise ValueError(f"the multi-class target is {target.dtype}: class numbers are integers.")


def check_pixels(name: str, pixels: Tensor, pred: Tensor) -> None:
    """Raise ValueError unless there is one value for each pixel, (N, ...)."""
    wanted = (pred.shape[0], *pred.shape[2:])
    if pixels.shape != wanted:
        raise ValueError(f"{name} has the shape {tuple(pixels.shape)}, it needs {wanted}.")


def wrong_values(target: Tensor, keep: Tensor, classes: int | None) -> Tensor:
    """Return where a target that counts is none of the class numbers, or without classes neither 0 nor 1."""
    if classes is None:
        return keep & (target != 0) & (target != 1)
    return keep & ((target < 0) | (target >= classes))


def refuse_values(target: Tensor, wrong: Tensor, classes: int | None, ignore_index: int) -> None:
    """Raise UserError with the first wrong value of a target, if there is one."""
    if wrong.any():
        allowed = "a binary or multi-label target has 0 and 1"
        if classes is not None:
            allowed = f"the prediction has the classes 0 to {classes - 1}"
        value = f"{'the class number ' * (classes is not None)}{target[wrong][0]:g}"
        remedy = "map the mask's values, or set IGNORE_INDEX"
        raise UserError(f"the target holds {value}, {allowed}, and {ignore_index} is ignored: {remedy}.")


def unmask(pred: Tensor, target: Tensor, multi_class: bool | None = None) -> tuple[Tensor, Tensor]:
    """
    Split a masked target into the target, and the usability mask (N, ...).

    :param multi_class: None decides by the number of channels
    :raises ValueError: if the target does not have one channel more
    """
    channels = pred.shape[1]
    if multi_class is None:
        multi_class = channels > 1 and target.ndim == pred.ndim and target.shape[1] == 2
    wanted = 2 if multi_class else channels + 1
    if target.ndim != pred.ndim or target.shape[1] != wanted:
        shapes = f"the shape {tuple(pred.shape)} and the masked target {tuple(target.shape)}"
        needs = f"it needs {wanted} channels, the first of them the usability mask"
        raise ValueError(f"the prediction has {shapes}: {needs}.")
    return target[:, 1].long() if multi_class else target[:, 1:], target[:, 0].float()


def counting(
    pred: Tensor, target: Tensor, valid: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """
    Return which pixels count, as bool in the shape of the target: valid ones that are not ignored.

    :param valid: (N, ...), 0 where a pixel does not count
    :raises ValueError: if the shapes disagree
    """
    check_shapes(pred, target)
    keep = target != ignore_index
    if valid is None:
        return keep
    check_pixels("valid", valid, pred)
    return keep & (valid > 0 if is_multi_class(pred, target) else (valid > 0).unsqueeze(1))


def main_output(outputs: Any, targets: Any = None) -> Any:
    """
    Return what counts in evaluation and prediction: of several outputs the first, where there is one target.

    Where the targets are several, in a tuple or dict, they are for all of the outputs.
    """
    several = targets is not None and not isinstance(targets, Tensor)
    return outputs if several or isinstance(outputs, Tensor) else next(iter(tensors_of(outputs)), outputs)


class OutputLoss(nn.Module):
    """
    A loss of all that a model returns, in float32.

    Of several outputs for one target (deep supervision, auxiliary heads), each is compared with the target
    in its own size, and weighs half as much as the one before it. Several targets are the given loss's own.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of a batch."""
        outputs = map_tensors(Tensor.float, outputs)
        if isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            return self.loss(outputs, targets)
        levels = tensors_of(outputs)
        losses = [self.loss(one, resize_nearest(targets, one.shape[2:])) for one in levels]
        weights = [0.5**level for level in range(len(levels))]
        return sum(weight / sum(weights) * one for weight, one in zip(weights, losses, strict=True))


def resize_nearest(target: Tensor, size: Sequence[int]) -> Tensor:
    """Return a target (..., H, W) of values that it has: class numbers, ignored pixels and masks as well."""
    for axis, length in zip(range(-len(size), 0), size, strict=True):
        if target.shape[axis] != length:
            numbers = torch.arange(length, device=target.device)
            target = target.index_select(axis, (2 * numbers + 1) * target.shape[axis] // (2 * length))
    return target


def known(pred: Any, target: Any) -> tuple[Any, Any]:
    """Return a prediction and its target, or where some of the target is NaN, what is not, (n,) each."""
    if not isinstance(target, Tensor) or not target.is_floating_point() or target.shape != pred.shape:
        return pred, target
    is_known = ~target.isnan()
    return (pred, target) if is_known.all() else (pred[is_known], target[is_known])


def precise(logits: Tensor) -> Tensor:
    """
    Return logits in float64, so that what follows, rounded to float32, is the same wherever a pixel stands.
    """
    # In float32, softmax and sigmoid differ in the last bits at the end of vector units.
    return logits if logits.device.type == "mps" else logits.double()  # Apple GPUs have no float64
