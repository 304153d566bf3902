"""There is always an intact checkpoint, and a damaged one is never used."""

import errno
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.storage import weights
from dida_core.storage.checkpoint import GENERATIONS, checkpoint_files, load_checkpoint, save_checkpoint
from dida_core.storage.weights import UnreadableWeights, WeightsError


def state(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.full((50,), float(step))}, "state": {"step": step}}


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        file = save_checkpoint(folder, step, state(step))
        assert file in checkpoint_files(folder) and file.is_file()


def damage(file: Path, at: int = 700) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def steps(folder: Path) -> list[int]:
    return [int(file.stem.partition("-")[2]) for file in checkpoint_files(folder)]


def loaded(folder: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = load_checkpoint(folder, said.append)
    if found is None:
        return None, said
    step = found["state"]["step"]
    assert torch.equal(found["model"]["weight"], state(step)["model"]["weight"])
    return step, said


def test_the_newest_generations_stay_and_the_newest_is_loaded(tmp_path: Path) -> None:
    assert loaded(tmp_path / "run") == (None, []) and GENERATIONS >= 2
    others = [".last-00000099.pt.0123abcd.tmp", "last-00000099.pt.tmp", "last-x.pt", "best.pt", "last-.pt"]
    (tmp_path / "run").mkdir()
    for name in others:
        (tmp_path / "run" / name).write_bytes(b"x")
    saved: list[int] = []
    for step in (0, 1, 2, 9, 10, 99_999_999, 100_000_000, 123_456_789_012):
        save(tmp_path / "run", step)
        saved.insert(0, step)
        assert steps(tmp_path / "run") == saved[:GENERATIONS]
        assert loaded(tmp_path / "run") == (step, [])
    left = {file.name for file in (tmp_path / "run").iterdir()}
    assert left == {*others, "last-100000000.pt", "last-123456789012.pt"}


def test_every_damage_of_the_newest_leads_to_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    newest, chance = tmp_path / "last-00000020.pt", random.Random(0)
    content = newest.read_bytes()
    damaged = [b"", content[:-1], content + b"\0", bytes(len(content))]
    damaged += [content[: chance.randrange(len(content))] for _ in range(10)]
    for text in damaged:
        newest.write_bytes(text)
        assert loaded(tmp_path)[0] == 10
    for _ in range(30):
        newest.write_bytes(content)
        damage(newest, chance.randrange(len(content)))
        step, said = loaded(tmp_path)
        assert step == 10 and len(said) == 1 and "last-00000020.pt" in said[0]
        assert "damaged" in said[0] and said[0].endswith("The one before is used.")
    torch.save([1], newest)  # plain data, but no dict
    assert loaded(tmp_path)[0] == 10


def test_where_all_are_damaged_there_is_none_and_what_is_new_stays(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    for file in checkpoint_files(tmp_path):
        damage(file)
    step, said = loaded(tmp_path)
    assert step is None and "last-00000020.pt" in said[0] and "last-00000010.pt" in said[1]
    assert said[0].endswith("The one before is used.") and said[1].endswith("There is none before it.")
    save(tmp_path, 5)
    assert steps(tmp_path) == [5] and loaded(tmp_path) == (5, [])


def test_resuming_before_a_damaged_one_keeps_two_intact_generations(tmp_path: Path) -> None:
    save(tmp_path, 100, 200)
    damage(tmp_path / "last-00000200.pt")
    assert loaded(tmp_path)[0] == 100
    save(tmp_path, 150)
    assert steps(tmp_path) == [150, 100] and loaded(tmp_path) == (150, [])
    save(tmp_path, 180)
    assert steps(tmp_path) == [180, 150]
    save(tmp_path, 50)  # intact ones of later steps are not removed
    assert steps(tmp_path) == [180, 150, 50] and loaded(tmp_path) == (180, [])


def test_what_cannot_be_read_now_is_neither_used_nor_removed(tmp_path: Path, monkeypatch: Any) -> None:
    def read(path: Any, mode: str = "r") -> Any:  # as on a network drive that is gone for a moment
        if Path(path).name in unreadable and "r" in mode:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return open(path, mode)

    monkeypatch.setattr(weights, "open", read, raising=False)
    unreadable: set[str] = set()
    save(tmp_path, 100, 200)
    unreadable.add("last-00000200.pt")
    step, said = loaded(tmp_path)
    assert step == 100 and "cannot be read" in said[0] and "The one before is used" in said[0]
    save(tmp_path, 150)
    assert steps(tmp_path) == [200, 150, 100]
    unreadable |= {"last-00000150.pt", "last-00000100.pt"}
    with pytest.raises(UnreadableWeights, match="Check the disk and try again"):
        loaded(tmp_path)  # the run must not start again
    damage(tmp_path / "last-00000200.pt")
    unreadable.remove("last-00000200.pt")
    with pytest.raises(UnreadableWeights, match="last-00000100"):
        loaded(tmp_path)
    unreadable.clear()
    assert loaded(tmp_path)[0] == 150


def test_a_state_that_cannot_be_saved_costs_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(WeightsError):
        save_checkpoint(tmp_path, 3, state(3) | {"more": np.float64(0.5)})
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_step_is_saved_again_and_problems_are_logged(tmp_path: Path, caplog: Any) -> None:
    save(tmp_path, 1, 2)
    save_checkpoint(tmp_path, 2, state(2) | {"more": 1})
    assert steps(tmp_path) == [2, 1] and load_checkpoint(tmp_path)["more"] == 1  # type: ignore[index]
    damage(tmp_path / "last-00000002.pt")
    assert "more" not in (load_checkpoint(tmp_path) or {"more": 0})
    assert "last-00000002.pt" in caplog.text
