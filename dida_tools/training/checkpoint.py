"""
Checkpoints: the training state on disk, in two generations, so that one is always intact.

Each has a name of its own. A damaged one is reported, and never used.
"""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.weights import UnreadableWeights, WeightsError, find_damage, load_weights, save_weights

GENERATIONS = 2

logger = logging.getLogger(__name__)


def checkpoint_files(folder: str | os.PathLike) -> list[Path]:
    """Return the checkpoints in a folder, newest first."""
    found = ((re.fullmatch(r"last-(\d+)\.pt", file.name), file) for file in Path(folder).glob("last-*.pt"))
    files = {int(match[1]): file for match, file in found if match}
    return [files[step] for step in sorted(files, reverse=True)]


def save_checkpoint(folder: str | os.PathLike, step: int, state: dict[str, Any]) -> Path:
    """
    Save the training state of a step, and remove old generations once the new one is verified.

    Damaged ones of later steps, which a run that resumes before them leaves behind, are no generations.

    :return: its file
    :raises WeightsError: if what was written cannot be read back
    """
    file = Path(folder) / f"last-{step:08d}.pt"
    save_weights(file, state)
    problem = find_damage(file)
    if problem:
        raise WeightsError(f"{file}: {problem} right after it was written. Is the disk in order?")
    files = checkpoint_files(folder)
    place = files.index(file)
    damaged = [later for later in files[:place] if _is_damaged(later)]
    for old in [*damaged, *files[place + GENERATIONS :]]:
        old.unlink(missing_ok=True)
    return file


def load_checkpoint(
    folder: str | os.PathLike, say: Callable[[str], None] = logger.warning
) -> dict[str, Any] | None:
    """
    Load the newest checkpoint that is intact.

    :param say: receives a sentence about each one that is damaged
    :return: None where there is none
    :raises UnreadableWeights: if one may be intact, but the disk or network fails: no reason to start again
    """
    files, unreadable = checkpoint_files(folder), None
    for file in files:
        try:
            return load_weights(file)
        except WeightsError as error:
            unreadable = error if isinstance(error, UnreadableWeights) else unreadable
            say(f"{error} {'There is none before it.' if file == files[-1] else 'The one before is used.'}")
    if unreadable is not None:
        raise UnreadableWeights(
            f"{unreadable} Check the disk and try again; or remove the file to start again."
        )
    return None


def _is_damaged(file: Path) -> bool:
    try:
        return find_damage(file) is not None
    except OSError:  # that is no reason to remove it
        return False
