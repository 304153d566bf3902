import hashlib
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dida_tools.utils.weights import (
    WeightsError,
    find_damage,
    load_weights,
    model_state,
    save_weights,
    weights_digest,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


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


def bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return repr(value)


def seal(content: bytes) -> bytes:
    content = content[:-2] + (71).to_bytes(2, "little") + b"sha256:"
    return content + hashlib.sha256(content).hexdigest().encode()


def outcome(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    try:
        return repr(bits(load_weights(file)))
    except WeightsError:
        return "refused"


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


# ----------------------------------------------------------------------------------------------------------- round trip


def test_round_trip_is_equal_bit_for_bit(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.pt", example())
    assert bits(load_weights(tmp_path / "w.pt")) == bits(example())


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5,), (2, 3, 4)])
def test_round_trip_of_every_dtype_and_shape(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(shape) * 50).to(dtype)
    save_weights(tmp_path / "w.pt", {"tensor": tensor})
    assert bits(load_weights(tmp_path / "w.pt")) == bits({"tensor": tensor})


def test_round_trip_of_a_model_and_its_optimizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_weights(tmp_path / "w.pt", state)
    loaded = load_weights(tmp_path / "w.pt")
    assert weights_digest(loaded["model"]) == weights_digest(state["model"])
    assert bits(loaded["optimizer"]["state"]) == bits(state["optimizer"]["state"])


def test_plain_pytorch_reads_the_file(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.pt", example())
    for mmap in (False, True):
        assert bits(torch.load(tmp_path / "w.pt", weights_only=True, mmap=mmap)) == bits(example())
    assert zipfile.ZipFile(tmp_path / "w.pt").testzip() is None


def test_files_of_plain_pytorch_are_read(tmp_path: Path) -> None:
    torch.save(example(), tmp_path / "w.pt")
    assert bits(load_weights(tmp_path / "w.pt")) == bits(example())


def test_folders_are_made(tmp_path: Path) -> None:
    save_weights(str(tmp_path / "a" / "b" / "w.pt"), {"x": 1})
    assert load_weights(str(tmp_path / "a" / "b" / "w.pt")) == {"x": 1}


# --------------------------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    save_weights(file, example())
    content = file.read_bytes()
    chosen = random.Random(0).sample(range(8 * len(content)), 2000)
    assert {outcome(file, flipped(content, bit)) for bit in chosen} == {"refused"}


def test_every_flipped_bit_of_the_digest_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    save_weights(file, {"x": torch.ones(2)})
    content = file.read_bytes()
    end = range(8 * (len(content) - 93), 8 * len(content))
    assert {outcome(file, flipped(content, bit)) for bit in end} == {"refused"}


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    save_weights(file, example())
    content = file.read_bytes()
    lengths = {
        *random.Random(0).sample(range(len(content)), 500),
        *range(len(content) - 100, len(content)),
        0,
        1,
    }
    assert {outcome(file, content[:length]) for length in lengths} == {"refused"}


def test_every_zeroed_block_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    save_weights(file, example())
    content = file.read_bytes()
    starts = {*random.Random(0).sample(range(len(content)), 500), *range(len(content) - 100, len(content))}
    damaged = [
        content[:at] + bytes(len(content[at : at + 512])) + content[at + 512 :] for at in sorted(starts)
    ]
    assert {outcome(file, text) for text in damaged} == {"refused"}


@pytest.mark.parametrize("addition", [b"\0", b"PK", b"x" * 71, b"\0" * 4096])
def test_what_is_appended_is_noticed(tmp_path: Path, addition: bytes) -> None:
    file = tmp_path / "w.pt"
    save_weights(file, example())
    assert outcome(file, file.read_bytes() + addition) == "refused"


def data_bytes(file: Path) -> list[int]:
    content = file.read_bytes()
    positions: list[int] = []
    for part in zipfile.ZipFile(file).infolist():
        if "/data/" in part.filename:
            start = part.header_offset + 30
            start += sum(int.from_bytes(content[part.header_offset + at :][:2], "little") for at in (26, 28))
            positions += range(start, start + part.file_size)
    return positions


def test_every_flipped_bit_in_the_data_of_a_plain_file_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(example(), file)
    content, positions = file.read_bytes(), data_bytes(file)
    assert sum(len(bits(item)[2]) for item in example()["model"].values()) == len(positions)
    assert {outcome(file, flipped(content, 8 * at + bit)) for at in positions for bit in (0, 3, 7)} == {
        "refused"
    }


def test_no_flipped_bit_in_the_rest_of_a_plain_file_gives_other_values(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(example(), file)
    content = file.read_bytes()
    directory = content.index(b"PK\1\2")
    chosen = random.Random(0).sample(range(8 * directory), 300)
    chosen += random.Random(0).sample(range(8 * directory, 8 * len(content)), 700)
    outcomes = [outcome(file, flipped(content, bit)) for bit in chosen]
    assert all(found in ("refused", repr(bits(example()))) for found in outcomes)


def test_data_marked_as_a_folder_in_a_plain_file_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(example(), file)
    content = file.read_bytes()
    entry = -1
    while (entry := content.find(b"PK\1\2", entry + 1)) >= 0:
        assert outcome(file, flipped(content, 8 * (entry + 38) + 4)) == "refused"


def test_damage_is_described(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    save_weights(file, example())
    assert find_damage(file) is None
    file.write_bytes(flipped(file.read_bytes(), 4000))
    assert "digest" in str(find_damage(file))
    with pytest.raises(WeightsError, match=r"w\.pt: the file is damaged.*digest"):
        load_weights(file)


# --------------------------------------------------------------------------------------------------- what is no weights


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return open, (str(self.target), "w")


@pytest.mark.parametrize("sealed", [False, True])
def test_hostile_objects_are_refused_and_not_run(tmp_path: Path, sealed: bool) -> None:
    file, victim = tmp_path / "w.pt", tmp_path / "victim"
    torch.save({"weight": torch.ones(2), "more": Hostile(victim)}, file)
    if sealed:
        file.write_bytes(seal(file.read_bytes()))
        assert find_damage(file) is None
    with pytest.raises(WeightsError, match=r"io\.open") as refusal:
        load_weights(file)
    assert not victim.exists()
    assert "weights_only" not in str(refusal.value) and "safe_globals" not in str(refusal.value)
    torch.load(file, weights_only=False)["more"].close()
    assert victim.exists()


@pytest.mark.parametrize(
    "content", [b"", b"text", pickle.dumps({"a": 1}), b"PK\5\6" + bytes(18), bytes(5000)]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    assert outcome(tmp_path / "w.pt", content) == "refused"


def test_other_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("content, kind", [([1, 2], "list"), (torch.ones(2), "Tensor"), (5, "int")])
def test_file_of_something_else_than_a_dict_is_refused(tmp_path: Path, content: Any, kind: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=f"holds a {kind}"):
        load_weights(tmp_path / "w.pt")


def test_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "w.pt", tmp_path):
        with pytest.raises(WeightsError, match="there is no such weights file") as error:
            load_weights(path)
        assert str(path) in str(error.value)


# --------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize(
    "unsaveable", [lambda: None, np.float64(0.5), np.ones(2), Path("x"), {"deep": [Hostile(Path("x"))]}]
)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, unsaveable: Any) -> None:
    file = tmp_path / "w.pt"
    save_weights(file, example())
    before = file.read_bytes()
    with pytest.raises(WeightsError, match=r"w\.pt: cannot be (written|read) as weights"):
        save_weights(file, {"weight": torch.ones(1000), "more": unsaveable})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_refusal_to_write_names_the_culprit(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"w\.pt: .*numpy.*scalar"):
        save_weights(tmp_path / "w.pt", {"best": np.float64(0.5)})
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces_the_file(tmp_path: Path) -> None:
    for value in range(3):
        save_weights(tmp_path / "w.pt", {"value": value})
        assert load_weights(tmp_path / "w.pt") == {"value": value}
    assert [file.name for file in tmp_path.iterdir()] == ["w.pt"]


# --------------------------------------------------------------------------------------------------- states and digests


def test_model_state_is_found_under_its_name_or_bare() -> None:
    state = {"weight": torch.ones(1)}
    assert model_state({"model": state, "epoch": 1}) is state
    assert model_state(state) is state
    assert model_state(bare := {"model": torch.ones(1)}) is bare


def test_equal_states_have_equal_digests() -> None:
    state = example()["model"]
    copy = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in state.items()}
    assert weights_digest(state) == weights_digest(copy) == weights_digest(dict(reversed(state.items())))
    assert weights_digest({"x": torch.arange(6).reshape(2, 3).T}) == weights_digest(
        {"x": torch.arange(6).reshape(2, 3).T.contiguous()}
    )


def test_digest_is_that_of_names_dtypes_shapes_and_bits() -> None:
    content = b"('a', torch.int64, (1, 2))" + np.array([1, 2], "<i8").tobytes()
    content += b"('b', torch.float32, (3,))" + np.arange(3, dtype="<f4").tobytes()
    found = weights_digest({"b": torch.arange(3.0), "a": torch.tensor([[1, 2]])})
    assert found == hashlib.sha256(content).hexdigest()


def test_every_flipped_bit_changes_the_digest() -> None:
    tensor = torch.arange(4.0)
    digests = {weights_digest({"x": tensor})}
    for bit in range(128):
        changed = tensor.clone()
        changed.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
        digests.add(weights_digest({"x": changed}))
    assert len(digests) == 129


@pytest.mark.parametrize(
    "one, other",
    [
        ({"x": torch.tensor([0.0])}, {"x": torch.tensor([-0.0])}),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2, dtype=torch.int32)}),
        ({"x": torch.zeros(2, dtype=torch.bfloat16)}, {"x": torch.zeros(2, dtype=torch.float16)}),
        ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(3, 2)}),
        ({"x": torch.zeros(())}, {"x": torch.zeros(1)}),
        ({"x": torch.zeros(0, 2)}, {"x": torch.zeros(2, 0)}),
        ({"x": torch.zeros(2)}, {"y": torch.zeros(2)}),
        ({"x": torch.zeros(1)}, {"x": torch.zeros(1), "y": torch.zeros(0)}),
        ({"x": torch.zeros(1), "y": torch.ones(1)}, {"x": torch.ones(1), "y": torch.zeros(1)}),
        ({}, {"x": torch.zeros(0)}),
        (
            {"a": torch.tensor([65], dtype=torch.uint8), "b": torch.tensor([66], dtype=torch.uint8)},
            {"a:torch.uint8:(1,):Ab": torch.tensor([66], dtype=torch.uint8)},
        ),
    ],
)
def test_different_states_have_different_digests(one: dict, other: dict) -> None:
    assert weights_digest(one) != weights_digest(other)
