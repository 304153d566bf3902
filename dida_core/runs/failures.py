"""What ends a training before its time, each with a sentence that says what to do."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..report.listener import State
from ..storage.checkpoint import checkpoint_files
from ..storage.files import relative_path
from ..training.modules import is_out_of_memory
from ..training.setup import Setup


class NonFiniteLoss(UserError):
    """The loss, or a parameter, became NaN or infinite."""


class OutOfMemory(UserError):
    """The memory of the device did not suffice."""


class WriteError(UserError):
    """The run's files cannot be written, such as on a full disk."""


class Pruned(BaseException):
    """AFTER_EPOCH asked to end. Not an Exception, so that nobody who catches those continues."""


def asks_to_end(answer: Any) -> bool:
    """
    Return whether AFTER_EPOCH asks to end, by its answer.

    :raises UserError: if it is none: a number, such as a result, is no decision
    """
    if answer is not None and not isinstance(answer, bool | np.bool_):
        remedy = "return True to end the run as pruned, else False or None"
        raise UserError(f"AFTER_EPOCH returned {answer!r}: {remedy}.")
    return bool(answer)


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
        raise WriteError(
            f"Cannot save {what}: {error.strerror or error}. {_last_checkpoint(weight_dir)}. "
            f"Free some space, then resume: python train.py --resume {weight_dir.name}"
        ) from error


def non_finite(what: str, weight_dir: Path) -> NonFiniteLoss:
    """Return the error for a number that is not finite, with what to do about it."""
    remedy = "try a smaller learning rate, CLIP_NORM=1, or PRECISION=fp32"
    gpu = "on a GPU, a wrong target is NaN, too"
    return NonFiniteLoss(f"{what}. {_last_checkpoint(weight_dir)}; {remedy}; {gpu}.")


def describe_batch(setup: Setup, state: State) -> str:
    """Return where the batch that has just ended stands, and of which files it is."""
    name_of = getattr(setup.data.train, "sample_name", lambda index: f"sample {index}")
    indices = setup.loaders.batches.indices(state.epoch, state.batch)
    names = ", ".join(str(name_of(index)) for index in indices)
    return f"step {state.step + 1} (epoch {state.epoch + 1}, batch {state.batch + 1}), with {names}"


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


def _last_checkpoint(weight_dir: Path) -> str:
    files = checkpoint_files(weight_dir)
    return f"The last good checkpoint is {relative_path(files[0])}" if files else "There is no checkpoint yet"
