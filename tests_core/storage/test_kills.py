"""Whenever a writer is killed, what it has acknowledged is there: in a file, a journal, and the tracker."""

import os
from pathlib import Path

import pytest
from dida_core.storage.journal import Journal
from dida_core.storage.table import read_rows, write_rows

from tests.helpers import killed_writers

# Two at once have a journal each, and share the file and the tracker.
WRITER = """
import sys
from pathlib import Path
from dida_core.storage.files import write_atomic
from dida_core.storage.journal import Journal
from dida_core.storage.table import write_rows

folder, writer = Path(sys.argv[1]), int(sys.argv[2]) % 2
journal = Journal(folder / f"{writer}.jsonl")
first = 1 + max((event["step"] for event in journal.events if event["event"] == "step"), default=0)
for number in range(first, first + 10**6):
    journal.write({"event": "step", "step": number, "loss": number / 3, "text": "x" * 300})
    if number % 5 == 0:
        journal.write({"event": "epoch", "epoch": number, "loss": float("nan")})
    part = b"ab"[number % 2:][:1] * 20_000
    write_atomic(folder / "file", lambda file: [file.write(part) for _ in range(10)])
    row = {"NAME": f"{writer}-{number}", "text": "x, \\r" * 20, f"{writer}.{number // 9}": number / 3}
    write_rows(folder / "log.csv", [row])
    print(writer, number, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("num_kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_writers_lose_nothing_they_acknowledged(tmp_path: Path, num_kills: int) -> None:
    acknowledged: list[tuple[int, ...]] = []
    for lines in killed_writers(WRITER, tmp_path, num_kills, at_once=2):
        acknowledged += [tuple(map(int, line.split())) for line in lines]
        content = (tmp_path / "file").read_bytes()
        assert len(content) == 200_000 and len(set(content)) == 1
        rows = {row["NAME"]: row for row in read_rows(tmp_path / "log.csv")}
        assert len(rows) == len(read_rows(tmp_path / "log.csv"))
        assert all(rows[f"{writer}-{n}"][f"{writer}.{n // 9}"] == n / 3 for writer, n in acknowledged)
        for writer in (0, 1):
            journal = Journal(tmp_path / f"{writer}.jsonl")
            journal.close()
            losses = {event["step"]: event["loss"] for event in journal.events if event["event"] == "step"}
            assert losses == {number: number / 3 for number in range(1, len(losses) + 1)}
            done = [number for one, number in acknowledged if one == writer]
            assert journal.num_damaged <= 1 and max(done) <= len(losses) <= len(done) + num_kills
            epochs = {event["epoch"] for event in journal.events if event["event"] == "epoch"}
            assert epochs >= {number for number in done if number % 5 == 0}
    assert len(acknowledged) >= 2 * num_kills
    write_rows(tmp_path / "log.csv", [{"NAME": "at last"}])
