"""What ends a training before its time, each with a sentence that says what to do."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from ..config.errors import UserError
from ..utils.files import relative_path
from .checkpoint import checkpoint_files
from .listener import State
from .modules import is_out_of_memory
from .setup import Setup


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite."""


class OutOfMemory(UserError):
    """The memory of the device did not suffice."""


class WriteError(UserError):
    """The run's files cannot be written, such as on a full disk."""


class Pruned(BaseException):
    """AFTER_EPOCH asked to end. Not an Exception, so that nobody who catches those continues."""


@contextlib.contextmanager
def write_errors(what: str, weight_dir: Path) -> Iterator[None]:
    """
    Turn an OSError of what a run writes into one sentence.

    :param what: that is written, such as "checkpoint at step 120"
    :raises WriteError: instead of it
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise WriteError(
            f"Cannot save {what}: {reason}. {last_checkpoint(weight_dir)}. Free some space, then resume: "
            f"python train.py --resume {weight_dir.name}"
        ) from error


def last_checkpoint(weight_dir: Path) -> str:
    """Return a clause about the newest checkpoint of a run."""
    files = checkpoint_files(weight_dir)
    return f"The last good checkpoint is {relative_path(files[0])}" if files else "There is no checkpoint yet"


def non_finite_loss(setup: Setup, state: State, loss: float, weight_dir: Path) -> NonFiniteLoss:
    """Return the error for a loss that is not finite, with the files of its batch."""
    name_of = getattr(setup.data.train, "sample_name", lambda index: f"sample {index}")
    names = ", ".join(
        str(name_of(index)) for index in setup.loaders.batches.indices(state.epoch, state.batch)
    )
    place = f"in step {state.step + 1} (epoch {state.epoch + 1}, batch {state.batch + 1})"
    return NonFiniteLoss(f"the loss is {loss} {place}, with {names}. {remedy(weight_dir)}")


def remedy(weight_dir: Path) -> str:
    """Return what to do about numbers that are not finite."""
    return f"{last_checkpoint(weight_dir)}; try a smaller learning rate, CLIP_NORM=1, or PRECISION=fp32."


def explain(error: BaseException, setup: Setup) -> BaseException:
    """Return the error, or one that says in a sentence what to do."""
    size, device = setup.loaders.batches.batch_size, setup.context.device
    if "Expected more than 1 value per channel" in str(error):
        return UserError(
            "a batch of one small sample is too little for BatchNorm: set DATA_LOADER_CONFIG.drop_last=True, "
            "use a larger crop, or another norm, such as GroupNorm."
        )
    if not is_out_of_memory(error):
        return error
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    smaller = f"DATA_LOADER_CONFIG.batch_size={max(1, size // 2)} ACCUMULATE={2 * setup.config['ACCUMULATE']}"
    return OutOfMemory(
        f"the memory of {device} does not suffice for batch_size={size}: try {smaller}, a smaller crop, or "
        "PRECISION=bf16."
    )
