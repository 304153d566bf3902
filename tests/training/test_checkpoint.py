import errno
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dida_tools.training.checkpoint import GENERATIONS, checkpoint_files, load_checkpoint, save_checkpoint
from dida_tools.utils import weights
from dida_tools.utils.weights import UnreadableWeights, WeightsError


def state(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.full((50,), float(step))}, "state": {"step": step}}


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, step, state(step))


def damage(file: Path, at: int = 700) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def steps(folder: Path) -> list[int]:
    return [int(file.stem.partition("-")[2]) for file in checkpoint_files(folder)]


def loaded(folder: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = load_checkpoint(folder, said.append)
    if found is not None:
        step = found["state"]["step"]
        assert torch.equal(found["model"]["weight"], state(step)["model"]["weight"])
        return step, said
    return None, said


def test_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (1, 2, 5):
        file = save_checkpoint(tmp_path / "run", step, state(step))
        assert file == checkpoint_files(tmp_path / "run")[0] and file.is_file()
        assert loaded(tmp_path / "run") == (step, [])


@pytest.mark.parametrize("exists", [False, True])
def test_without_checkpoints_there_is_none(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path if exists else tmp_path / "missing"
    assert loaded(folder) == (None, []) and checkpoint_files(folder) == []


def test_two_generations_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step)
        assert steps(tmp_path) == list(range(step, max(0, step - GENERATIONS), -1))
    assert GENERATIONS >= 2


def test_a_damaged_newest_is_said_and_the_one_before_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    damage(tmp_path / "last-00000020.pt")
    step, said = loaded(tmp_path)
    assert step == 10 and len(said) == 1
    assert (
        "last-00000020.pt" in said[0] and "damaged" in said[0] and said[0].endswith("The one before is used.")
    )


def test_every_damage_of_the_newest_leads_to_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    newest = tmp_path / "last-00000020.pt"
    content = newest.read_bytes()
    chance = random.Random(0)
    damaged = [b"", content[:-1], content + b"\0", bytes(len(content))]
    damaged += [content[: chance.randrange(len(content))] for _ in range(50)]
    for text in damaged:
        newest.write_bytes(text)
        assert loaded(tmp_path)[0] == 10
    for _ in range(200):
        newest.write_bytes(content)
        damage(newest, chance.randrange(len(content)))
        assert loaded(tmp_path)[0] == 10


def test_where_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    for file in checkpoint_files(tmp_path):
        damage(file)
    step, said = loaded(tmp_path)
    assert step is None and ["last-00000020.pt" in said[0], "last-00000010.pt" in said[1]] == [True, True]
    assert said[0].endswith("The one before is used.") and said[1].endswith("There is none before it.")


def test_a_file_of_plain_data_that_is_no_dict_is_not_used(tmp_path: Path) -> None:
    save(tmp_path, 10)
    torch.save([1], tmp_path / "last-00000020.pt")
    assert loaded(tmp_path)[0] == 10


def test_numbers_beyond_eight_digits_sort_right(tmp_path: Path) -> None:
    numbers = [0, 9, 10, 99_999_999, 100_000_000, 123_456_789_012]
    for before, step in zip([None, *numbers], numbers, strict=False):
        save(tmp_path, step)
        assert steps(tmp_path) == [step] + ([] if before is None else [before])
        assert loaded(tmp_path) == (step, [])


def test_other_files_are_ignored_and_left(tmp_path: Path) -> None:
    others = [
        ".last-00000099.pt.0123abcd.tmp",
        "last-00000099.pt.tmp",
        "last-x.pt",
        "best.pt",
        "last-.pt",
        "last-1.txt",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    save(tmp_path, 1, 2, 3)
    assert steps(tmp_path) == [3, 2] and loaded(tmp_path) == (3, [])
    assert {file.name for file in tmp_path.iterdir()} == {*others, "last-00000002.pt", "last-00000003.pt"}


def test_a_step_that_is_saved_again_replaces_its_file(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    save_checkpoint(tmp_path, 2, state(2) | {"more": 1})
    assert steps(tmp_path) == [2, 1] and load_checkpoint(tmp_path)["more"] == 1  # type: ignore[index]


def test_going_on_before_a_damaged_one_keeps_two_whole_generations(tmp_path: Path) -> None:
    save(tmp_path, 100, 200)
    damage(tmp_path / "last-00000200.pt")
    assert loaded(tmp_path)[0] == 100
    save(tmp_path, 150)
    assert steps(tmp_path) == [150, 100] and loaded(tmp_path) == (150, [])
    save(tmp_path, 180)
    assert steps(tmp_path) == [180, 150]


def test_starting_again_after_all_were_damaged_keeps_what_is_new(tmp_path: Path) -> None:
    save(tmp_path, 100, 200)
    for file in checkpoint_files(tmp_path):
        damage(file)
    save(tmp_path, 10)
    assert steps(tmp_path) == [10] and loaded(tmp_path) == (10, [])


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files whose reading fails, as on a network drive that is gone for a moment."""
    names: set[str] = set()

    def read(path: Any, mode: str = "r") -> Any:
        if Path(path).name in names and "r" in mode:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return open(path, mode)

    monkeypatch.setattr(weights, "open", read, raising=False)
    return names


def test_one_that_cannot_be_read_now_is_not_used_and_not_removed(
    tmp_path: Path, unreadable: set[str]
) -> None:
    save(tmp_path, 100, 200)
    unreadable.add("last-00000200.pt")
    step, said = loaded(tmp_path)
    assert step == 100 and "cannot be read" in said[0] and "The one before is used" in said[0]
    save(tmp_path, 150)
    unreadable.clear()
    assert steps(tmp_path) == [200, 150, 100] and loaded(tmp_path) == (200, [])


def test_where_none_can_be_read_now_the_run_does_not_start_again(
    tmp_path: Path, unreadable: set[str]
) -> None:
    save(tmp_path, 100, 200)
    unreadable |= {"last-00000100.pt", "last-00000200.pt"}
    with pytest.raises(UnreadableWeights, match="Look after the disk, and try again"):
        loaded(tmp_path)
    damage(tmp_path / "last-00000200.pt")
    unreadable.remove("last-00000200.pt")
    with pytest.raises(UnreadableWeights, match="last-00000100"):
        loaded(tmp_path)
    unreadable.clear()
    assert loaded(tmp_path)[0] == 100


def test_whole_ones_of_later_steps_are_not_removed(tmp_path: Path) -> None:
    save(tmp_path, 100, 200)
    save(tmp_path, 50)
    assert steps(tmp_path) == [200, 100, 50] and loaded(tmp_path) == (200, [])


@pytest.mark.parametrize("unsaveable", [np.float64(0.5), lambda: None])
def test_a_state_that_cannot_be_saved_costs_no_checkpoint(tmp_path: Path, unsaveable: Any) -> None:
    save(tmp_path, 1, 2)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(WeightsError):
        save_checkpoint(tmp_path, 3, state(3) | {"more": unsaveable})
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_problems_are_printed_where_nothing_else_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "last-00000002.pt")
    load_checkpoint(tmp_path)
    assert "last-00000002.pt" in capsys.readouterr().out
