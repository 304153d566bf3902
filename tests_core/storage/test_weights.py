"""Weights files are read back bit for bit, and every damage is noticed."""

import hashlib
import io
import pickle
import random
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.storage.weights import (
    WeightsError,
    find_damage,
    load_weights,
    model_state,
    save_weights,
    weights_digest,
)
from torch import nn

from tests.helpers import leaves

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def example() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "model": {
            "weight": torch.randn(3, 2, 2),
            "half": torch.randn(5).bfloat16(),
            "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
            "count": torch.tensor(7),
            "empty": torch.empty(0, 4),
        },
        "state": {"epoch": 3, "best": 0.1 + 0.2, "names": ["a", "ü"], "none": None, "shape": (1, 2)},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "w.pt"


def outcome(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    try:
        return repr(leaves(load_weights(file)))
    except WeightsError:
        return "refused"


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_round_trip_is_equal_bit_for_bit_also_of_plain_pytorch(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "w.pt"
    shapes = [(), (0,), (2, 0, 3), (5,), (2, 3, 4)]
    every = {f"{dtype} {shape}": (torch.randn(shape) * 50).to(dtype) for shape in shapes for dtype in DTYPES}
    for state in (example(), every):
        save_weights(str(file), state)
        for read in (load_weights, lambda file: torch.load(file, mmap=True), torch.load):
            assert leaves(read(str(file))) == leaves(state)
        assert zipfile.ZipFile(file).testzip() is None
        torch.save(state, file)
        assert leaves(load_weights(file)) == leaves(state)


def some(positions: range, number: int, end: int) -> list[int]:
    """Positions at random, and all of the last ones."""
    return sorted({*random.Random(0).sample(positions, min(number, len(positions))), *positions[-end:]})


MANY = pytest.mark.parametrize("number", [100, pytest.param(4000, marks=pytest.mark.slow)])


@MANY
def test_every_damage_is_noticed(file: Path, number: int) -> None:
    save_weights(file, example())
    content = file.read_bytes()
    size = len(content)
    damaged = {
        "flipped": [flipped(content, bit) for bit in some(range(8 * size), number, min(8 * 93, 2 * number))],
        "cut off": [content[:length] for length in some(range(size), number // 4, 25)],
        "zeroed": [
            content[:at] + bytes(len(content[at : at + 512])) + content[at + 512 :]
            for at in some(range(size), number // 4, 25)
        ],
        "appended": [content + more for more in (b"\0", b"PK", b"x" * 71, b"\0" * 4096)],
        "lost": [b""],
    }
    for kind, texts in damaged.items():
        assert {outcome(file, text) for text in texts} == {"refused"}, kind
    file.write_bytes(damaged["flipped"][9])
    assert "digest" in str(find_damage(file))
    with pytest.raises(WeightsError, match=r"w\.pt: the file is damaged.*digest"):
        load_weights(file)
    assert outcome(file, content) == repr(leaves(example()))


def data_bytes(file: Path) -> list[int]:
    content = file.read_bytes()
    positions: list[int] = []
    for part in zipfile.ZipFile(file).infolist():
        if "/data/" in part.filename:
            start = part.header_offset + 30
            start += sum(int.from_bytes(content[part.header_offset + at :][:2], "little") for at in (26, 28))
            positions += range(start, start + part.file_size)
    return positions


@MANY
def test_no_flipped_bit_of_a_plain_file_gives_other_values(file: Path, number: int) -> None:
    torch.save(example(), file)
    content, positions = file.read_bytes(), data_bytes(file)
    tensors = example()["model"].values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == len(positions)
    assert {outcome(file, flipped(content, 8 * at + at % 8)) for at in positions} == {"refused"}
    directory, chance, size = content.index(b"PK\1\2"), random.Random(0), 8 * len(content)
    chosen = chance.sample(range(8 * directory), number // 4)
    chosen += chance.sample(range(8 * directory, size), min(number, size - 8 * directory))
    outcomes = {outcome(file, flipped(content, bit)) for bit in chosen}
    assert outcomes <= {"refused", repr(leaves(example()))}
    entry = -1
    while (entry := content.find(b"PK\1\2", entry + 1)) >= 0:  # data marked as a folder
        assert outcome(file, flipped(content, 8 * (entry + 38) + 4)) == "refused"


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return open, (str(self.target), "w")


@pytest.mark.parametrize("sealed", [False, True])
def test_hostile_objects_are_refused_and_not_run(tmp_path: Path, file: Path, sealed: bool) -> None:
    victim = tmp_path / "victim"
    torch.save({"weight": torch.ones(2), "more": Hostile(victim)}, file)
    if sealed:
        seal(file)
        assert find_damage(file) is None
    with pytest.raises(WeightsError, match=r"io\.open") as refusal:
        load_weights(file)
    assert not victim.exists()
    assert "weights_only" not in str(refusal.value) and "safe_globals" not in str(refusal.value)
    torch.load(file, weights_only=False)["more"].close()
    assert victim.exists()


class Called:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class StoragePickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None


def view(numel: int, shape: tuple, stride: tuple) -> Called:
    """A tensor in a file, as it describes itself."""
    storage = ("storage", torch.FloatStorage, "0", "cpu", numel)
    return Called(torch._utils._rebuild_tensor_v2, storage, 0, shape, stride, False, Called(OrderedDict))


def nested(depth: int, width: int) -> Any:
    value: Any = [1]
    for _ in range(depth):
        value = [value] * width
    return value


ITSELF: list = []
ITSELF.append(ITSELF)
DEFLATED = zipfile.ZIP_DEFLATED
BOMBS = {
    "a compressed tensor": ([view(10**6, (10**6,), (1,))], {"data/0": bytes(4 * 10**6)}, DEFLATED),
    "a compressed pickle": (["a" * 10**7], {}, DEFLATED),
    "stride 0": ([view(1, (10**9,), (0,))], {"data/0": bytes(4)}, 0),
    "strides that overlap": ([view(10**3, (10**9, 1000), (0, 1))], {"data/0": bytes(4000)}, 0),
    "many views": ([view(10**4, (9999 - n,), (1,)) for n in range(900)], {"data/0": bytes(40000)}, 0),
    "a storage that is longer than it": ([view(10**9, (10**9,), (1,))], {"data/0": bytes(4)}, 0),
    "bytearray": ([Called(bytearray, 2 * 10**9)], {}, 0),
    "an empty tensor": ([Called(torch.FloatTensor, 10**9)], {}, 0),
    "an empty storage": ([Called(torch.UntypedStorage, 10**10)], {}, 0),
    "lists of lists": ([nested(30, 2)], {}, 0),
    "itself": ([ITSELF], {}, 0),
    "a second pickle": ([1], {"DATA.pkl": b"cposix\nsystem\n."}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_takes_much_memory_is_refused_before_it_does(file: Path, name: str) -> None:
    state, parts, compression = BOMBS[name]
    stream = io.BytesIO()
    StoragePickler(stream, 2).dump({"model": state})
    with zipfile.ZipFile(file, "w", compression) as archive:
        for part, content in {"data.pkl": stream.getvalue(), "version": b"3\n", **parts}.items():
            archive.writestr(f"archive/{part}", content)
    assert file.stat().st_size < 10**5
    for _ in range(2):
        tracemalloc.start()
        with pytest.raises(WeightsError) as refusal:
            load_weights(file)
        assert tracemalloc.get_traced_memory()[1] < 10**7 and len(str(refusal.value)) < 400
        tracemalloc.stop()
        seal(file)


def seal(file: Path) -> None:
    """End a file as ours do, with a digest: whoever writes it can."""
    content = file.read_bytes()[:-2] + (71).to_bytes(2, "little") + b"sha256:"
    file.write_bytes(content + hashlib.sha256(content).hexdigest().encode())


def test_tied_weights_and_all_that_checkpoints_hold_are_read(file: Path) -> None:
    tied = torch.ones(1000)
    state = {str(number): tied for number in range(200)} | {"milestones": Counter([3]), "set": {1}, "z": 1j}
    state |= {
        "dtype": torch.float16,
        "shape": torch.Size([2]),
        "bytes": b"abc",
        "uint16": torch.ones(2).to(torch.uint16),
    }
    state["parameter"] = nn.Parameter(torch.ones(3))
    save_weights(file, state)
    assert leaves(load_weights(file)) == leaves(state)


def test_other_and_missing_files_are_refused(tmp_path: Path, file: Path) -> None:
    for content in (b"text", pickle.dumps({"a": 1}), b"PK\5\6" + bytes(18), bytes(5000)):
        assert outcome(file, content) == "refused"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_weights(file)
    for other, kind in (([1, 2], "list"), (torch.ones(2), "Tensor"), (5, "int")):
        torch.save(other, file)
        with pytest.raises(WeightsError, match=f"holds a {kind}"):
            load_weights(file)
    for path in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(WeightsError, match="there is no such weights file") as error:
            load_weights(path)
        assert str(path) in str(error.value)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, file: Path) -> None:
    save_weights(file, {"old": 1})
    before, hostile = file.read_bytes(), Hostile(Path("x"))
    for wrong in (lambda: None, np.float64(0.5), np.ones(2), Path("x"), {"deep": [hostile]}):
        about = r".*numpy.*scalar" if isinstance(wrong, np.float64) else ""
        with pytest.raises(WeightsError, match=r"w\.pt: cannot be (written|read) as weights" + about):
            save_weights(file, {"weight": torch.ones(1000), "more": wrong})
        assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_model_state_is_found_under_its_name_or_directly() -> None:
    state = {"weight": torch.ones(1)}
    assert model_state({"model": state, "epoch": 1}) is state
    assert model_state(state) is state
    assert model_state(plain := {"model": torch.ones(1)}) is plain


def test_digest_is_that_of_names_dtypes_shapes_and_bits() -> None:
    content = b"('a', torch.int64, (1, 2))" + np.array([1, 2], "<i8").tobytes()
    content += b"('b', torch.float32, (3,))" + np.arange(3, dtype="<f4").tobytes()
    found = weights_digest({"b": torch.arange(3.0), "a": torch.tensor([[1, 2]])})
    assert found == hashlib.sha256(content).hexdigest()
    turned = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    assert weights_digest({"x": turned}) == weights_digest({"x": turned.clone().contiguous()})


def test_different_states_have_different_digests() -> None:
    states = [
        {},
        {"y": torch.zeros(2)},
        {"x": torch.zeros(2), "y": torch.zeros(0)},
        {"x": torch.tensor([-0.0])},
    ]
    states += [{"x": torch.zeros(shape)} for shape in ((), 0, 1, 2, (2, 3), (3, 2), (0, 2), (2, 0))]
    states += [{"x": torch.zeros(2, dtype=dtype)} for dtype in (torch.int32, torch.bfloat16, torch.float16)]
    states += [{"x": torch.zeros(1), "y": torch.ones(1)}, {"x": torch.ones(1), "y": torch.zeros(1)}]
    for bit in range(128):
        states.append({"x": torch.arange(4.0)})
        states[-1]["x"].view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    assert len({weights_digest(state) for state in states}) == len(states)
