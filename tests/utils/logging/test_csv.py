"""The tracker's file: what is written is read back, what others add stays, and nothing is lost."""

import csv
import math
import string
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dida_core.storage import table
from dida_core.storage.table import rebuild, remove_rows, write_rows
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dida_tools.utils.logging import read_frame
from dida_tools.utils.logging.csv import read_log, write_log

from tests.helpers import ROOT

# fmt: off
FORMULAS = ["=1+1", "=cmd|' /C calc'!A0", "+49 30 1234", "-2+3", "@SUM(A1)", "\t=1+1", "\r=1+1", "=", "-"]
DECEPTIVE = ["+", "1", "-1", "1.0", "1e5", "nan", "NaN", "inf", "-inf", "Infinity", "True", "False", "007"]
DECEPTIVE += ["\uff11\uff12", "٣"]
AWKWARD = ["", " ", " 1", "1 ", "'", "'=1", "None", ";x", ";=1", "a,b", '"', '""', 'a"b', "\n", "\r", ","]
UNUSUAL = ["a\rb", "a\r", "\ra", "a\nb\r\nc", "ä", "日本語", "🙂", "\x1f", "\x85", "\u2028", "\ufeff"]
STRINGS = [*FORMULAS, *DECEPTIVE, *AWKWARD, *UNUSUAL, "''", "@", "\r\n", "e\u0301", "1_000", "\x0b\x0c"]
NUMBERS: list[Any] = [0, 1, -1, 10**30, -(10**400), 0.1 + 0.2, -0.0, 0.0, 5e-324, -1.5, 1e308]
NUMBERS += [1 / 3, 1.0, 1e16, 123456789.125, math.nan, math.inf, -math.inf, True, False]
# fmt: on

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
plain = st.text(string.ascii_letters + "'=+-@,;\" \n\r\t019.e_", max_size=8)
samples = st.sampled_from(STRINGS) | st.sampled_from(NUMBERS)
values = st.none() | st.booleans() | st.integers() | st.floats() | text | plain | samples
keys = st.text(string.ascii_letters + string.digits + '._ ,"\n\r=ü', min_size=1, max_size=6)
rows = st.dictionaries(keys.filter(lambda key: key != "NAME"), values, min_size=1, max_size=4)


def cells(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.csv"


def check_round_trip(folder: Path, before: list[dict], after: dict, named: bool) -> None:
    path = folder / "experiments.csv"
    before = [{"NAME": f"run {i}"} | row for i, row in enumerate(before)] if named else before
    write_rows(path, before)
    write_log(path, {"NAME": "run 0"} | after if named else after)
    expected = [before[0] | after, *before[1:]] if named else [*before, after]
    columns = dict.fromkeys(key for row in [*before, after] for key in row)
    assert repr(read_log(path)) == repr([{key: row.get(key) for key in columns} for row in expected])


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(before=st.lists(rows, min_size=1, max_size=3), after=rows, named=st.booleans())
def test_rows_are_read_back_exactly(tmp_path_factory, before, after, named):
    check_round_trip(tmp_path_factory.mktemp("log"), before, after, named)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(before=st.lists(rows, min_size=1, max_size=4), after=rows, named=st.booleans())
def test_many_rows_are_read_back_exactly(tmp_path_factory, before, after, named):
    check_round_trip(tmp_path_factory.mktemp("log"), before, after, named)


def test_values_are_read_back_and_marked_only_where_needed(log: Path) -> None:
    found = [*STRINGS, *NUMBERS, None]
    for content in ({}, {"more": 1}):
        write_rows(log, [{"value": value} | content for value in found])
    assert [repr(row["value"]) for row in read_log(log)] == [repr(value) for value in found] * 2
    for value, (cell, *_) in zip(found, cells(log)[1:], strict=False):
        is_marked = value in [*FORMULAS, *DECEPTIVE, "@"] or str(value)[:1] in ("", "'", "\r")
        text = ("'" * is_marked + value) if isinstance(value, str) else "" if value is None else repr(value)
        assert cell == text


class Level(IntEnum):
    LOW = 3


def test_cells_by_example(log: Path) -> None:
    examples = {
        np.float64(0.1): "0.1",
        Level.LOW: "3",
        np.str_("=x"): "'=x",
        "a\0b": "ab",
        "\0": "'",
        "\0=1": "'=1",
    }
    examples |= {np.float64("nan"): "nan", "x\ud800\udc80": "x\\ud800\\udc80"}
    examples |= {same: same for same in ("text", "a=b", "1-2", "a@b", "x'", "2024-01-01", " =1", "1_000")}
    write_rows(log, [{"NAME": f"run {i}", "value": value} for i, value in enumerate(examples)])
    assert [line[1] for line in cells(log)[1:]] == list(examples.values())
    before = log.read_bytes()
    for value in ([1], {"a": 1}, (1,), b"x", 1j, object(), Path("x")):
        with pytest.raises(TypeError, match="a cell holds"):
            write_log(log, {"NAME": "b", "value": value})
    assert log.read_bytes() == before


def test_a_cell_may_be_long(log: Path) -> None:
    long = "file, " * 50_000
    write_log(log, {"NAME": "a", "FILES": long})
    for value in (1, 2):
        write_log(log, {"NAME": "a", "x": value})
    assert read_log(log) == [{"NAME": "a", "FILES": long, "x": 2}]
    assert csv.field_size_limit() == 131072


def test_new_keys_add_columns_and_a_row_is_updated_by_name(log: Path) -> None:
    assert read_log(log) == []
    log.touch()
    assert read_log(log) == []
    for row in ({"NAME": "a", "x": 0.5}, {"NAME": "b", "y": 2}, {"y": 3, "x": 'one, "two"\n', "NAME": "c"}):
        write_log(log, row)
    assert log.read_bytes() == b'NAME,x,y\na,0.5,\nb,,2\nc,"one, ""two""\n",3\n'  # plain CSV
    write_log(log, content := {"NAME": "b", "y": None, "z": "=1"})
    assert cells(log)[2] == ["b", "", "", "'=1"] and len(cells(log)) == 4
    assert content == {"NAME": "b", "y": None, "z": "=1"}
    for row in ({"x": 1}, {"NAME": None, "x": 1}) * 2:  # without a name they are only added
        write_log(log, row)
    assert [row["x"] for row in read_log(log)][3:] == [1] * 4


@pytest.mark.parametrize("name", ["=1+1", "-x", "1", "True", "a,b\n", "ü", 'a"b'])
@pytest.mark.parametrize("first", ["NAME", "value"])
def test_awkward_names_are_found_again(log: Path, name: str, first: str) -> None:
    write_log(log, {first: name, "NAME": name})
    for value in range(2):
        write_log(log, {"NAME": name, "value": value})
    assert read_log(log) == [{"NAME": name, "value": 1}]
    remove_rows(log, [name])
    assert read_log(log) == []


def test_many_rows_are_written_at_once_and_nothing_where_nothing_changes(tmp_path: Path) -> None:
    log = tmp_path / "a" / "b" / "log.csv"
    write_rows(str(log), [{"NAME": "a", "x": 1}, {"NAME": "b", "y": "one, two"}, {"NAME": "a", "x": 2}])
    assert read_log(str(log)) == [{"NAME": "a", "x": 2, "y": None}, {"NAME": "b", "x": None, "y": "one, two"}]
    before = log.stat().st_ino
    write_rows(log, read_log(log))
    assert log.stat().st_ino == before
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    assert isinstance(read_frame(log), pandas.DataFrame) and list(read_frame(log)["NAME"]) == ["a", "b"]


def test_a_rebuilt_file_keeps_what_was_added_by_name(log: Path) -> None:
    log.write_text("mine,STATUS,NAME,gone\nfor Ada,running,a,\nold,finished,z,\n,,,\n")
    before = log.read_bytes()
    rebuild(log, [{"NAME": "b", "STATUS": "finished"}, {"NAME": "a", "STATUS": "killed"}])
    assert {row.pop("NAME"): row for row in read_log(log)} == {
        "a": {"mine": "for Ada", "STATUS": "killed"},
        "z": {"mine": "old", "STATUS": "finished"},
        "b": {"mine": None, "STATUS": "finished"},
    }
    assert log.with_name("log.csv.old").read_bytes() == before


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_rebuilt_file_of_2021_keeps_its_rows_which_have_no_name(log: Path, delimiter: str) -> None:
    old = [["DATE", "SESSION_NAME", "f1"], ["2021-05-01", "roads", "0.81"], ["2021-05-02", "roads", "0.84"]]
    log.write_text("".join(f"{delimiter.join(line)}\n" for line in old))
    for _ in range(2):
        rebuild(log, [{"NAME": "new", "SESSION_NAME": "trees"}])
        lines = [[*line, ""] for line in old[1:]]
        assert cells(log) == [[*old[0], "NAME"], *lines, ["", "trees", "", "new"]]


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"NAME,mine,x\nb,remark,1\na,,2\n", [["NAME", "mine", "x"], ["b", "remark", "1"], ["a", "", "9"]]),
        (b"\xef\xbb\xbfNAME,x\r\na,1\r\n", [["NAME", "x"], ["a", "9"]]),  # as spreadsheets mark the encoding
        (b"NAME;x;mine\r\nb;1;r,s\r\na;2;\r\n", [["NAME", "x", "mine"], ["b", "1", "r,s"], ["a", "9", ""]]),
        (b'"NAME";"x"\n"b";"1"\n"a";"2"\n', [["NAME", "x"], ["b", "1"], ["a", "9"]]),
        ("x\tNAME\n1\tb\n2\ta\n".encode("utf-16"), [["x", "NAME"], ["1", "b"], ["9", "a"]]),
        (b"NAME;x\nb;1,5\na;2,5\n", [["NAME", "x"], ["b", "1,5"], ["a", "9"]]),  # decimal commas
        (b"x,NAME,x\n1,a,2\n", [["x", "NAME", "column 3"], ["9", "a", "2"]]),
        (b"NAME,x,,\na,1,2,3\n", [["NAME", "x", "column 3", "column 4"], ["a", "9", "2", "3"]]),
        (b"NAME,x\na,1,2\n", [["NAME", "x", "column 3"], ["a", "9", "2"]]),
        (b"NAME,x\n5\" pipe,1\na,2\n", [["NAME", "x"], ['5" pipe', "1"], ["a", "9"]]),
        (b'NAME,x\n5" and 6" pipe,1\na,2\n', [["NAME", "x"], ['5" and 6" pipe', "1"], ["a", "9"]]),
        (b'NAME,x\n"b","1,5"\n"a","2"\n', [["NAME", "x"], ["b", "1,5"], ["a", "9"]]),
        (b"NAME,x\nshort\n\na,1", [["NAME", "x"], ["short", ""], ["a", "9"]]),
        (b'NAME,x\na,"cut off, \n', [["NAME", "x"], ["a", "9"]]),
        (b"id,NAME\n007,a\n1e3,b\n", [["id", "NAME", "x"], ["007", "a", "9"], ["1e3", "b", ""]]),
        (b"nonsense", [["nonsense", "NAME", "x"], ["", "a", "9"]]),
    ],
)  # fmt: skip
def test_what_others_wrote_is_kept(log: Path, content: bytes, expected: list[list[str]]) -> None:
    log.write_bytes(content)
    for _ in range(2):
        write_log(log, {"NAME": "a", "x": 9})
        assert cells(log) == expected


def test_bytes_in_another_encoding_survive(log: Path) -> None:
    log.write_bytes("NAME,Größe\na,größer\n".encode("cp1252"))
    write_log(log, {"NAME": "b"})
    assert log.read_bytes() == "NAME,Größe\na,größer\nb,\n".encode("cp1252")


WRITER = """
import sys
from dida_core.storage.table import write_rows
for number in range(40):
    row = {"NAME": f"{sys.argv[2]}-{number}", "text": "x, \\r" * 20, f"c{number // 4}": number}
    write_rows(sys.argv[1], [row])
"""


@pytest.mark.slow
def test_several_processes_lose_no_row(log: Path) -> None:
    commands = [[sys.executable, "-c", WRITER, str(log), str(number)] for number in range(8)]
    writers = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [writer.wait(120) for writer in writers] == [0] * 8
    found = {row["NAME"]: row for row in read_log(log)}
    assert len(found) == len(read_log(log)) == 40 * 8
    assert all(found[f"{i}-{number}"][f"c{number // 4}"] == number for i in range(8) for number in range(40))


def test_what_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.csv"
    monkeypatch.setattr(table, "LOCK_SECONDS", 0.1)
    named = pytest.raises(TimeoutError, match=r"log\.csv: another process has held it")
    with FileLock(log.with_name(".log.csv.lock")), named:
        write_log(log, {"NAME": "a"})
    assert not log.exists()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "log.csv", tmp_path / "file" / "deeper" / "log.csv"):
        with pytest.raises(OSError):
            write_log(path, {"NAME": "a"})
        assert read_log(path) == []
