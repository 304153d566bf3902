import csv
import math
import os
import random
import signal
import string
import subprocess
import sys
import time
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dida_tools.utils.logging import csv as module
from dida_tools.utils.logging.csv import read_log, write_log

FORMULAS = [
    "=1+1",
    "=cmd|' /C calc'!A0",
    "+49 30 1234",
    "-2+3",
    "@SUM(A1)",
    "\t=1+1",
    "\r=1+1",
    "=",
    "-",
    "+",
    "@",
]
DECEPTIVE = [
    "1",
    "-1",
    "1.0",
    "1e5",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "Infinity",
    "True",
    "False",
    "007",
    "1_000",
    "\uff11\uff12",
    "٣",
]
AWKWARD = [
    "",
    " ",
    " 1",
    "1 ",
    "'",
    "''",
    "'=1",
    "None",
    ";x",
    ";=1",
    "a,b",
    '"',
    '""',
    'a"b',
    "\n",
    "\r",
    "\r\n",
    ",",
]
UNUSUAL = [
    "a\rb",
    "a\r",
    "\ra",
    "a\nb\r\nc",
    "ä",
    "日本語",
    "🙂",
    "\x1f",
    "\x85",
    "\u2028",
    "\ufeff",
    "e\u0301",
    "\x0b\x0c",
]
STRINGS = [*FORMULAS, *DECEPTIVE, *AWKWARD, *UNUSUAL]
NUMBERS: list[Any] = [
    0,
    1,
    -1,
    10**30,
    -(10**400),
    0.1 + 0.2,
    -0.0,
    0.0,
    5e-324,
    -1.5,
    1e308,
    1 / 3,
    1.0,
    1e16,
    123456789.125,
]
NUMBERS += [math.nan, math.inf, -math.inf, True, False]

ROOT = Path(__file__).parents[3]
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
plain = st.text(string.ascii_letters + "'=+-@,;\" \n\r\t019.e_", max_size=8)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    text,
    plain,
    st.sampled_from(STRINGS),
    st.sampled_from(NUMBERS),
)
keys = st.text(string.ascii_letters + string.digits + '._ ,"\n\r=ü', min_size=1, max_size=6).filter(
    lambda key: key != "NAME"
)


def cells(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def written(path: Path, value: Any) -> str:
    write_log(path, {"NAME": "a", "value": value})
    return cells(path)[-1][1]


# ----------------------------------------------------------------------------------------------------------- round trip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.dictionaries(keys, values, min_size=1, max_size=4), min_size=1, max_size=3))
def test_rows_are_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("log") / "experiments.csv"
    for row in rows:
        write_log(path, row)
    columns = dict.fromkeys(key for row in rows for key in row)
    expected = [{key: row.get(key) for key in columns} for row in rows]
    assert repr(read_log(path)) == repr(expected)


@pytest.mark.parametrize("value", [*STRINGS, *NUMBERS, None], ids=repr)
def test_values_are_read_back_exactly(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "log.csv"
    for content in ({"value": value}, {"value": value, "more": 1}):
        write_log(path, content)
    assert [repr(row["value"]) for row in read_log(path)] == [repr(value)] * 2


@pytest.mark.parametrize("value", FORMULAS)
def test_formulas_are_written_with_an_apostrophe(tmp_path: Path, value: str) -> None:
    assert written(tmp_path / "log.csv", value) == f"'{value}"


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_are_written_as_they_are(tmp_path: Path, value: Any) -> None:
    assert written(tmp_path / "log.csv", value) == repr(value)


@pytest.mark.parametrize("value", DECEPTIVE)
def test_only_strings_that_would_become_another_type_get_an_apostrophe(tmp_path: Path, value: str) -> None:
    marked = f"'{value}" if value != "1_000" else value
    assert written(tmp_path / "log.csv", value) == marked


@pytest.mark.parametrize("value", ["text", "a=b", "1-2", "a@b", "x'", "2024-01-01", "None", " =1", "1_000"])
def test_ordinary_strings_are_written_as_they_are(tmp_path: Path, value: str) -> None:
    assert written(tmp_path / "log.csv", value) == value


def test_an_empty_string_is_not_none(tmp_path: Path) -> None:
    write_log(tmp_path / "log.csv", {"empty": "", "none": None, "text": "None"})
    assert cells(tmp_path / "log.csv")[1] == ["'", "", "None"]
    assert read_log(tmp_path / "log.csv") == [{"empty": "", "none": None, "text": "None"}]


class Level(IntEnum):
    LOW = 3


@pytest.mark.parametrize(
    "value, cell",
    [(np.float64(0.1), "0.1"), (np.float64("nan"), "nan"), (Level.LOW, "3"), (np.str_("=x"), "'=x")],
)
def test_numbers_of_other_classes_are_written_as_plain_ones(tmp_path: Path, value: Any, cell: str) -> None:
    assert written(tmp_path / "log.csv", value) == cell


@pytest.mark.parametrize(
    "value, kept", [("a\0b", "ab"), ("\0", ""), ("\0=1", "=1"), ("x\ud800\udc80", "x\\ud800\\udc80")]
)
def test_what_no_file_can_hold_does_not_hinder_the_row(tmp_path: Path, value: str, kept: str) -> None:
    write_log(tmp_path / "log.csv", {"NAME": "a", "value": value})
    assert read_log(tmp_path / "log.csv") == [{"NAME": "a", "value": kept}]


@pytest.mark.parametrize("value", [[1], {"a": 1}, (1,), b"x", 1j, object(), Path("x")])
def test_other_types_are_refused_and_nothing_changes(tmp_path: Path, value: Any) -> None:
    write_log(tmp_path / "log.csv", {"NAME": "a"})
    before = (tmp_path / "log.csv").read_bytes()
    with pytest.raises(TypeError, match="a cell holds"):
        write_log(tmp_path / "log.csv", {"NAME": "b", "value": value})
    assert (tmp_path / "log.csv").read_bytes() == before


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    long = "file, " * 50_000
    write_log(tmp_path / "log.csv", {"NAME": "a", "FILES": long})
    write_log(tmp_path / "log.csv", {"NAME": "b"})
    assert [row["FILES"] for row in read_log(tmp_path / "log.csv")] == [long, None]
    assert csv.field_size_limit() == 131072


def test_the_file_is_plain_csv(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write_log(path, {"NAME": "a", "f1": 0.5, "note": 'one, "two"\nthree'})
    write_log(path, {"NAME": "b", "f1": None})
    assert path.read_bytes() == b'NAME,f1,note\na,0.5,"one, ""two""\nthree"\nb,,\n'


# ----------------------------------------------------------------------------------------------------- rows and columns


def test_new_keys_add_columns_and_missing_ones_stay_blank(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write_log(path, {"NAME": "a", "x": 1})
    write_log(path, {"NAME": "b", "y": 2})
    write_log(path, {"y": 3, "x": 4, "NAME": "c"})
    assert cells(path) == [["NAME", "x", "y"], ["a", "1", ""], ["b", "", "2"], ["c", "4", "3"]]


def test_a_row_is_updated_by_name_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for name in "abc":
        write_log(path, {"NAME": name, "STATUS": "running", "EPOCH": 0})
    write_log(path, {"NAME": "b", "STATUS": "finished", "f1": 0.5})
    write_log(path, {"NAME": "b", "EPOCH": None})
    assert [row["NAME"] for row in read_log(path)] == ["a", "b", "c"]
    assert read_log(path)[1] == {"NAME": "b", "STATUS": "finished", "EPOCH": None, "f1": 0.5}


@pytest.mark.parametrize("name", ["=1+1", "-x", "1", "True", "a,b\n", "ü"])
def test_awkward_names_are_found_again(tmp_path: Path, name: str) -> None:
    for value in range(2):
        write_log(tmp_path / "log.csv", {"NAME": name, "value": value})
    assert read_log(tmp_path / "log.csv") == [{"NAME": name, "value": 1}]


@pytest.mark.parametrize("row", [{"x": 1}, {"NAME": None, "x": 1}])
def test_rows_without_a_name_are_only_added(tmp_path: Path, row: dict[str, Any]) -> None:
    for _ in range(3):
        write_log(tmp_path / "log.csv", row)
    assert [row["x"] for row in read_log(tmp_path / "log.csv")] == [1, 1, 1]


def test_the_content_is_not_changed(tmp_path: Path) -> None:
    content = {"NAME": "a", "x": "=1"}
    write_log(tmp_path / "log.csv", content)
    assert content == {"NAME": "a", "x": "=1"}


def test_a_missing_or_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.csv") == []
    (tmp_path / "log.csv").touch()
    assert read_log(tmp_path / "log.csv") == []
    write_log(tmp_path / "log.csv", {"NAME": "a"})
    assert read_log(tmp_path / "log.csv") == [{"NAME": "a"}]


def test_folders_are_made(tmp_path: Path) -> None:
    write_log(str(tmp_path / "a" / "b" / "log.csv"), {"NAME": "a"})
    assert read_log(str(tmp_path / "a" / "b" / "log.csv")) == [{"NAME": "a"}]


# ---------------------------------------------------------------------------------------------------- others write, too


def test_what_another_program_wrote_is_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b'\r\nremark,NAME,id\r\n"good, I think",a,007\r\nshort\r\n\r\n,b,1e3\r\n')
    write_log(path, {"NAME": "a", "f1": 0.5})
    write_log(path, {"NAME": "c"})
    assert cells(path) == [
        ["remark", "NAME", "id", "f1"],
        ["good, I think", "a", "007", "0.5"],
        ["short", "", "", ""],
        ["", "b", "1e3", ""],
        ["", "c", "", ""],
    ]


def test_a_spreadsheet_may_mark_the_encoding(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xef\xbb\xbfNAME,x\r\na,1\r\n")
    write_log(path, {"NAME": "a", "x": 2})
    assert read_log(path) == [{"NAME": "a", "x": 2}]


def test_bytes_in_another_encoding_survive(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes("NAME,Größe\na,größer\n".encode("cp1252"))
    write_log(path, {"NAME": "b"})
    assert path.read_bytes() == "NAME,Größe\na,größer\nb,\n".encode("cp1252")


def test_cells_without_a_column_of_their_own_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("NAME,x,,x\na,1,2,3,4\n")
    write_log(path, {"NAME": "a", "y": 5})
    assert cells(path)[1] == ["a", "1", "2", "3", "4", "5"]
    first = read_log(path)
    write_log(path, {"NAME": "a", "x": 1})
    assert read_log(path) == first and len(set(cells(path)[0])) == 6


# -------------------------------------------------------------------------------------------- many writers, and crashes


WRITER = """
import sys, time
from dida_tools.utils.logging.csv import write_log
path, writer, count, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
for number in range(count):
    write_log(path, {"NAME": f"{writer}-{number}", "text": "x, \\r" * 20, f"{writer}.{number // 4}": number / 3})
    print(f"{writer}-{number}", flush=True)
    time.sleep(pause)
"""


def start_writer(path: Path, writer: str, count: int, pause: float = 0.0) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), writer, str(count), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_six_processes_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    writers = [start_writer(path, f"w{number}", 40) for number in range(6)]
    for writer in writers:
        assert len(writer.communicate(timeout=120)[0].split()) == 40 and writer.returncode == 0
    rows = {row["NAME"]: row for row in read_log(path)}
    assert len(rows) == len(read_log(path)) == 240
    for name, row in rows.items():
        writer_name, _, number = name.partition("-")
        assert row[f"{writer_name}.{int(number) // 4}"] == int(number) / 3


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("num_kills", [32, pytest.param(120, marks=pytest.mark.slow)])
def test_killed_writers_lose_no_acknowledged_row(tmp_path: Path, num_kills: int) -> None:
    path = tmp_path / "log.csv"
    chance = random.Random(0)
    acknowledged: list[str] = []
    for pair in range(num_kills // 2):
        writers = [start_writer(path, f"w{2 * pair + number}", 10_000, 0.002) for number in range(2)]
        lines = [writer.stdout.readline().strip() for writer in writers if writer.stdout]
        time.sleep(chance.random() * 0.1)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            time.sleep(chance.random() * 0.01)
        lines += [line for writer in writers for line in writer.communicate()[0].split("\n")[:-1]]
        assert all(writer.returncode == -signal.SIGKILL for writer in writers)
        acknowledged += lines
        names = [row["NAME"] for row in read_log(path)]
        assert len(names) == len(set(names)) and set(acknowledged) <= set(names)
    assert len(acknowledged) >= num_kills
    write_log(path, {"NAME": "at last"})
    assert len(read_log(path)) >= len(acknowledged) + 1


def test_a_writer_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    with (
        FileLock(tmp_path / ".log.csv.lock"),
        pytest.raises(TimeoutError, match=r"log\.csv: another process has held it"),
    ):
        write_log(tmp_path / "log.csv", {"NAME": "a"})
    assert not (tmp_path / "log.csv").exists()


def test_an_unwritable_folder_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "log.csv", tmp_path / "file" / "deeper" / "log.csv"):
        with pytest.raises(OSError):
            write_log(path, {"NAME": "a"})
        assert read_log(path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is unwritable for root")
def test_a_folder_without_permission_is_an_os_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError):
            write_log(tmp_path / "log.csv", {"NAME": "a"})
    finally:
        tmp_path.chmod(0o700)
