"""There is always an intact checkpoint, and a damaged one is never used."""

import errno
import os
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


def damage(folder: Path, step: int, at: int = 700) -> None:
    file = folder / f"last-{step:08d}.pt"
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
    folder = tmp_path / "run"
    assert loaded(folder) == (None, []) and GENERATIONS >= 2
    others = [".last-00000099.pt.0123abcd.tmp", "last-00000099.pt.tmp", "last-x.pt", "best.pt", "last-.pt"]
    folder.mkdir()
    for name in others:
        (folder / name).write_bytes(b"x")
    saved: list[int] = []
    for step in (0, 1, 2, 9, 10, 99_999_999, 100_000_000, 123_456_789_012):
        save(folder, step)
        saved.insert(0, step)
        assert steps(folder) == saved[:GENERATIONS] and loaded(folder) == (step, [])
    assert {file.name for file in folder.iterdir()} == {*others, "last-100000000.pt", "last-123456789012.pt"}


def test_a_damaged_one_leads_to_the_one_before_and_is_no_generation(tmp_path: Path, caplog: Any) -> None:
    save(tmp_path, 10, 20)
    newest = tmp_path / "last-00000020.pt"
    content = newest.read_bytes()
    for text in (b"", content[:-1], content[:99], content + b"\0", bytes(len(content))):
        newest.write_bytes(text)
        step, said = loaded(tmp_path)
        assert step == 10 and len(said) == 1 and "last-00000020.pt" in said[0] and "damaged" in said[0]
        assert said[0].endswith("The one before is used.")
    assert load_checkpoint(tmp_path) is not None and "last-00000020.pt" in caplog.text
    torch.save([1], newest)  # plain data, but no dict
    assert loaded(tmp_path)[0] == 10
    newest.write_bytes(content)
    damage(tmp_path, 20)
    save(tmp_path, 15)
    assert steps(tmp_path) == [15, 10] and loaded(tmp_path) == (15, [])
    save(tmp_path, 18)
    save(tmp_path, 5)  # intact ones of later steps are not removed
    assert steps(tmp_path) == [18, 15, 5] and loaded(tmp_path) == (18, [])
    for step in (18, 15, 5):
        damage(tmp_path, step)
    step, said = loaded(tmp_path)
    assert step is None and said[-1].endswith("There is none before it.")
    save(tmp_path, 4)
    assert steps(tmp_path) == [4] and loaded(tmp_path) == (4, [])


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
    damage(tmp_path, 200)
    unreadable.remove("last-00000200.pt")
    with pytest.raises(UnreadableWeights, match="last-00000100"):
        loaded(tmp_path)
    unreadable.clear()
    assert loaded(tmp_path)[0] == 150


def test_a_step_is_saved_again_and_what_cannot_be_saved_costs_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    save_checkpoint(tmp_path, 2, state(2) | {"more": 1})
    assert steps(tmp_path) == [2, 1] and load_checkpoint(tmp_path)["more"] == 1  # type: ignore[index]
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(WeightsError):
        save_checkpoint(tmp_path, 3, state(3) | {"more": np.float64(0.5)})
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
