"""
Weights files: written intact or not at all, and refused when damaged.

A file is what torch.save writes (a zip archive, tensors and plain data only), with the SHA-256 of all of it
in the archive's comment. Any PyTorch loads it; ours notices a single flipped bit, unlike torch.load and
safetensors.
"""

import errno
import hashlib
import os
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import UserError
from .files import write_atomic

_PREFIX = b"sha256:"
_DIGEST_BYTES = 64
_COMMENT_BYTES = len(_PREFIX) + _DIGEST_BYTES
_END, _END_BYTES = b"PK\5\6", 22  # the end of an archive without a comment, as torch.save writes it
_IS_FOLDER = 0x10
# What torch.save names for tensors and plain data. Of what else torch.load takes, some allocates at will.
_NAMES = re.compile(
    r"collections (OrderedDict|Counter)|torch ([a-z]\w*|\w+Storage|Size)|torch.storage UntypedStorage|"
    r"torch._utils _rebuild_(tensor|parameter)\w*|(__builtin__|builtins) (set|complex)|_codecs encode"
)
_MOST_TIMES = 64  # as many bytes as a file has may its tensors and lists have when each is copied


class WeightsError(UserError):
    """A weights file that is missing, damaged, of another model, or that nobody could read again."""


class UnreadableWeights(WeightsError):
    """A weights file that cannot be read now, by an error of the disk or network; it may be intact."""


def save_weights(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """
    Write tensors and plain data to a file, with their digest.

    :param state: dicts, lists, tensors, strings and numbers
    :raises WeightsError: if it holds anything else, so that it could not be read again; the old file stays
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise WeightsError(f"{path}: cannot be written as weights ({error}).") from error
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # of a full disk, PyTorch only says that it failed
                raise error.__context__ from None
            raise
        file.seek(0)
        _load(file, str(path), "meta")  # without the data, so it takes no time
        file.seek(-2, os.SEEK_END)  # an archive ends with the length of its comment, in two bytes
        file.write(_COMMENT_BYTES.to_bytes(2, "little") + _PREFIX)
        file.write(_digest(file, file.tell()))

    write_atomic(path, write)


def load_weights(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, Any]:
    """
    Read a file of save_weights or, without that certainty, of torch.save. Nothing in it is executed.

    :raises WeightsError: if it is missing, damaged, or holds anything but tensors and plain data
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such weights file.")
    try:
        problem = find_damage(path)
    except OSError as error:
        raise UnreadableWeights(f"{path}: cannot be read ({error.strerror or error}).") from error
    if problem:
        raise WeightsError(f"{path}: {problem}.")
    with open(path, "rb") as file:
        return _load(file, str(path), device)


def find_damage(path: str | os.PathLike) -> str | None:
    """
    Return what is wrong with the bytes of a weights file, or None.

    :raises OSError: if it cannot be read, which says nothing of its bytes
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _COMMENT_BYTES))
        end = file.read()
        if end.startswith(_PREFIX):
            is_right = _digest(file, size - _DIGEST_BYTES) == end[len(_PREFIX) :]
            return None if is_right else "the file is damaged: its content does not have its digest"
        # It is not ours. The archive has checksums of its own.
        if not (end[-_END_BYTES:].startswith(_END) and end.endswith(b"\0\0")):
            return "the file is damaged or no weights file: it does not end as one"
        try:
            _refuse_bombs(file, size)
            with zipfile.ZipFile(file) as archive:
                # PyTorch reads nothing of what is marked as a folder, and takes what lies in the memory.
                folders = (part.filename for part in archive.filelist if part.external_attr & _IS_FOLDER)
                damaged = archive.testzip() or next(folders, None)
        except Exception as error:  # whatever damage leads to
            if isinstance(error, OSError) and error.errno not in (
                None,
                errno.EINVAL,
            ):  # EINVAL: a wrong place
                raise
            return f"the file is damaged or no weights file ({error})"
        return None if damaged is None else f"the file is damaged: {damaged} is not what was written"


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 of a file's first bytes, and leave the file behind them."""
    file.seek(0)
    digest, left = hashlib.sha256(), size
    while left and (block := file.read(min(left, 2**20))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()


def _load(file: BinaryIO, name: str, device: str | torch.device) -> dict[str, Any]:
    try:
        size = file.seek(0, os.SEEK_END)
        _refuse_bombs(file, size)
        file.seek(0)
        state = torch.load(file, map_location=device, weights_only=True)
        if _bytes_of(state, {}) > _MOST_TIMES * size:
            raise ValueError("its tensors or lists repeat the same bytes over and over")
    except Exception as error:  # whatever a file of unknown origin leads to
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        refused = next((line for line in lines if line.startswith("WeightsUnpickler error")), lines[0])
        reason = refused.partition(". Please")[0]  # without PyTorch's advice to trust the file
        raise WeightsError(f"{name}: cannot be read as weights ({reason}).") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{name}: holds a {type(state).__name__}, weights files hold a dict.")
    return state


def _refuse_bombs(file: BinaryIO, size: int) -> None:
    """Raise ValueError if reading an archive would take more memory than it has bytes."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        names, more = {part.filename.lower() for part in parts}, sum(part.file_size for part in parts) > size
        if more or len(names) < len(parts) or any(part.compress_type or part.flag_bits & 1 for part in parts):
            raise ValueError("it is compressed, or has parts that overlap, as torch.save writes none")
        if min(part.header_offset for part in parts):
            raise ValueError("something lies before it")
        for part in parts:
            for operation, named, _ in pickletools.genops(archive.read(part)) if _is_pickle(part) else ():
                if operation.name == "GLOBAL" and not _NAMES.fullmatch(str(named)):
                    name = str(named).replace(" ", ".")
                    raise ValueError(f"it names {name}, and weights files hold tensors and plain data")


def _is_pickle(part: zipfile.ZipInfo) -> bool:
    return part.filename.lower().endswith(".pkl")


def _bytes_of(value: Any, known: dict[Any, int]) -> int:
    """Return the bytes of a value in which nothing is shared but equal views, such as of tied weights."""
    if isinstance(value, Tensor):
        view = (value.data_ptr(), value.shape, value.stride())
        is_new, known[view] = view not in known, 0
        return value.numel() * value.element_size() if is_new else 0
    if not isinstance(value, dict | list | tuple | set):
        return value.nbytes() if isinstance(value, torch.UntypedStorage) else 8
    if id(value) not in known:
        known[id(value)] = 2**63  # contains itself, unless it is found to end
        items = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 8 + sum(_bytes_of(item, known) for item in items)
    return known[id(value)]


def model_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the parameters in what load_weights gave: under "model", or directly."""
    return state["model"] if isinstance(state.get("model"), dict) else state


def weights_digest(state: dict[str, Tensor]) -> str:
    """Return a SHA-256 of names, dtypes, shapes and bits: equal for models that are equal bit for bit."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
