"""
Contains weights files: written whole or not at all, and refused when damaged.

A file is what torch.save writes (a zip archive, tensors and plain data only), with the SHA-256 of all of it in the
archive's comment. Any PyTorch can load it; ours notices a single flipped bit, which torch.load and safetensors do not.
"""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..config.errors import UserError
from .path import write_atomic

_PREFIX = b"sha256:"
_COMMENT_BYTES = len(_PREFIX) + 64


class WeightsError(UserError):
    """A weights file that is missing, damaged, or of another model."""


def save_weights(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """
    Writes tensors and plain data to a file, with their digest.

    :param state: dicts, lists, tensors, strings and numbers
    """

    def write(file: BinaryIO) -> None:
        torch.save(state, file)
        # The archive ends with the length of its comment, in two bytes.
        file.seek(-2, os.SEEK_END)
        file.write(_COMMENT_BYTES.to_bytes(2, "little") + _PREFIX)
        file.flush()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(digest.encode())

    write_atomic(path, write)


def load_weights(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, Any]:
    """
    Reads a file of save_weights or, without that certainty, of torch.save. Nothing in it is executed.

    :raises WeightsError: if there is no such file, if it is damaged, or if it holds anything but tensors and plain data
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such weights file.")
    problem = find_damage(path)
    if problem:
        raise WeightsError(f"{path}: {problem}.")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever a file of unknown origin leads to
        raise WeightsError(f"{path}: cannot be read as weights ({str(error).splitlines()[0]}).") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, weights files hold a dict.")
    return state


def find_damage(path: str | os.PathLike) -> str | None:
    """What is wrong with the bytes of a weights file, or None."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _COMMENT_BYTES))
        comment = file.read()
        if comment.startswith(_PREFIX):
            file.seek(0)
            digest, left = hashlib.sha256(), size - 64
            while left and (block := file.read(min(left, 2**20))):
                digest.update(block)
                left -= len(block)
            is_right = digest.hexdigest().encode() == comment[len(_PREFIX) :]
            return None if is_right else "the file is damaged: its content does not have the digest it was written with"
    try:  # not ours: the checksums of the archive must do
        with zipfile.ZipFile(path) as archive:
            if archive.comment:  # torch.save writes none: this was ours
                return "the file is damaged: its digest cannot be read"
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        return f"the file is damaged or no weights file ({error})"
    return None if damaged is None else f"the file is damaged: {damaged} does not have its checksum"


def model_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters in what load_weights gave: under "model", or bare."""
    return state["model"] if isinstance(state.get("model"), dict) else state


def weights_digest(state: dict[str, Tensor]) -> str:
    """A SHA-256 of names, dtypes, shapes and bits of a state dict: equal only for models that are equal bit for bit."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
