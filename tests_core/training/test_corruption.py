"""Damaged files are noticed, and what they held is taken from elsewhere, or found out again."""

import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.config.project import project_of
from dida_core.data.facts import scan_files, scan_image
from dida_core.errors import ConfigError
from dida_core.runs.lookup import find_rows, read_record, read_run_config
from dida_core.storage.checkpoint import checkpoint_files, load_checkpoint
from dida_core.storage.journal import Event, read_journal
from dida_core.storage.table import rebuild

from dida_tools.utils.logging import read_log, write_log

from .conftest import at_event
from tests.helpers import PACKAGE, bare, fingerprint

KILLED = 9
FEW_TENSORS: dict[str, Any] = {"OPTIMIZER": torch.optim.SGD, "EMA": None, "SCHEDULER": None}  # quick to read

NewTraining = Callable[..., Any]


def flip_a_bit(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def cut_off(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def zero_a_page(content: bytes, chance: random.Random) -> bytes:
    """As a crash leaves a block that was not yet on the disk; also smaller ones: the files are small."""
    size = 2 ** chance.randrange(4, 13)
    start = size * chance.randrange(-(-len(content) // size))
    end = min(len(content), start + size)
    return content[:start] + bytes(end - start) + content[end:]


def damaged(content: bytes, damage: Callable[..., bytes], number: int) -> Iterator[bytes]:
    """So many damages that change something, the same ones each time."""
    chance = random.Random(damage.__name__)
    changed = (text for text in iter(lambda: damage(content, chance), None) if text != content)
    return itertools.islice(changed, number)


each_damage = pytest.mark.parametrize("damage", [flip_a_bit, cut_off, zero_a_page])
how_often = pytest.mark.parametrize("number", [20, pytest.param(500, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def trained(make_training: NewTraining, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished training."""
    training = make_training(tmp_path_factory.mktemp("trained"), **FEW_TENSORS)
    training.finish()
    return training


@pytest.fixture
def damage_file() -> Iterator[Callable[[Path, bytes], None]]:
    """Write over files, and put back what was in them."""
    originals: dict[Path, bytes] = {}

    def write(file: Path, content: bytes) -> None:
        originals.setdefault(file, file.read_bytes())
        file.write_bytes(content)

    yield write
    for file, content in originals.items():
        file.write_bytes(content)


def kill_early(training: Any) -> None:
    """Kill a training after its fifth step is in the journal, but not in a checkpoint."""
    child = training.start(lambda: at_event("step", 5, lambda: os._exit(KILLED), before=False))
    assert child.wait() and child.code == KILLED, child.said()


@how_often
@each_damage
def test_of_a_damaged_checkpoint_the_one_before_is_used(trained, damage_file, damage, number):
    folder = trained.weight_dir()
    newest, _ = checkpoint_files(folder)
    newest_state, content = load_checkpoint(folder), newest.read_bytes()
    newest.unlink()
    expected = fingerprint(load_checkpoint(folder))
    newest.write_bytes(content)
    assert fingerprint(newest_state) != expected
    for text in damaged(content, damage, number):
        damage_file(newest, text)
        said: list[str] = []
        state = load_checkpoint(folder, said.append)
        assert state is not None and fingerprint(state) == expected
        assert len(said) == 1 and newest.name in said[0] and said[0].endswith("The one before is used.")


@how_often
@each_damage
def test_of_a_damaged_config_the_copy_is_used_and_that_is_said(trained, damage_file, damage, number):
    run_dir = trained.log_root / trained.name()
    file, counts = run_dir / "config.json", Counter()
    project = project_of(PACKAGE)
    original, live = read_record(run_dir), read_run_config(run_dir, project)
    for index, text in enumerate(damaged(file.read_bytes(), damage, number)):
        damage_file(file, text)
        said: list[str] = []
        found = read_record(run_dir, said.append)
        counts["fell back" if said else "nothing was changed"] += 1
        if said:
            assert found == {"version": original["version"], "config": original["config"]}
            assert len(said) == 1 and "the copy in the journal is used" in said[0]
        else:
            assert repr(found) == repr(original)
        if index % 20 == 0:
            assert read_run_config(run_dir, project, said.append) == live
    assert counts["fell back"] > 0.9 * number


def test_without_an_undamaged_copy_a_damaged_config_is_an_error(trained, damage_file):
    run_dir = trained.log_root / trained.name()
    journal, config = run_dir / "journal.jsonl", run_dir / "config.json"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert b'"start"' in lines[0] and not any(b'"start"' in line for line in lines[1:])
    chance = random.Random(0)
    for text in damaged(config.read_bytes(), zero_a_page, 50):
        damage_file(config, text)
        damage_file(journal, flip_a_bit(lines[0][:-1], chance) + b"".join([b"\n", *lines[1:]]))
        with pytest.raises(ConfigError, match="damaged or missing"):
            read_record(run_dir)


@how_often
@each_damage
def test_what_is_known_of_the_data_is_found_out_again_where_the_cache_is_damaged(tmp_path, damage, number):
    file, cache = tmp_path / "image.npy", tmp_path / "facts.json"
    np.save(file, np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    facts = scan_files([file], scan_image, cache)
    for text in damaged(cache.read_bytes(), damage, number):
        cache.write_bytes(text)
        assert scan_files([file], scan_image, cache) == facts


def is_part(found: list[Event], events: list[Event]) -> bool:
    """Return whether these are some of those events, in their order."""
    rest = iter(events)
    return all(event in rest for event in found)


@how_often
@each_damage
def test_from_a_damaged_journal_only_what_was_written_is_read(trained, damage_file, damage, number):
    file = trained.log_root / trained.name() / "journal.jsonl"
    events = read_journal(file)
    assert len(events) == 12
    for text in damaged(file.read_bytes(), damage, number):
        damage_file(file, text)
        found = read_journal(file)
        assert is_part(found, events) and len(found) < len(events)
        if damage is flip_a_bit:
            assert len(found) >= len(events) - 2
        if damage is cut_off:
            assert found == events[: text.count(b"\n")]


@pytest.mark.parametrize("lines", [(2,), range(6), pytest.param((0, 4), marks=pytest.mark.slow)])
def test_a_run_whose_config_and_journal_are_damaged_resumes_and_says_so(trained, new_training, lines):
    training, chance = new_training(**FEW_TENSORS), random.Random(0)
    kill_early(training)
    run_dir = training.log_root / training.name()
    file = run_dir / "journal.jsonl"
    written = file.read_bytes().splitlines(keepends=True)
    assert len(written) == 8
    for line in lines:
        text = flip_a_bit(written[line][:-2], chance)
        written[line] = text.replace(b"\n", b" ").replace(b"\r", b" ") + b"}\n"
    file.write_bytes(b"".join(written))
    if 0 not in lines:  # where the copy of the config is
        (run_dir / "config.json").write_bytes(flip_a_bit((run_dir / "config.json").read_bytes(), chance))
    survived = [bare(event) for event in read_journal(file) if event["event"] == "step"]
    training.finish()
    end, expected = training.end(), trained.end()
    said = training.output.read_text()
    assert f"{len(lines)} damaged lines are left out" in said and ("config.json is" in said) == (
        0 not in lines
    )
    read_record(run_dir, pytest.fail)  # it is repaired
    for part in ("state", "best", "test"):
        assert end[part] == expected[part]
    assert sorted(end["epoch"], key=lambda event: event["epoch"]) == expected["epoch"]
    assert is_part(survived, end["step"]) and is_part(end["step"], expected["step"])
    (row,) = training.rows()
    assert row["STATUS"] == "finished" and row["WEIGHTS_DIGEST"] == expected["test"]["digest"]


@how_often
@each_damage
def test_a_damaged_table_is_made_anew_and_takes_rows(trained, tmp_path, damage, number):
    (row,), file = find_rows(trained.log_root), tmp_path / "experiments.csv"
    comments = ('=1+1, "quoted"\nand ä 日本', None, "", "plain", "1.0")
    rows = [row | {"NAME": f"run {index}", "__COMMENT": text} for index, text in enumerate(comments)]
    rebuild(file, rows)
    for text in damaged(file.read_bytes(), damage, number):
        file.write_bytes(text)
        write_log(file, {"NAME": "new", "STATUS": "running", "LOSS": 0.25})
        assert [one["STATUS"] for one in read_log(file) if one.get("NAME") == "new"] == ["running"]
        rebuild(file, rows)
        found = {one["NAME"]: one for one in read_log(file)}
        for one in rows:
            assert {key: found[one["NAME"]].get(key) for key in one} == one
