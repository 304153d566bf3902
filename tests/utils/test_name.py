import re
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import datetime, timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dida_tools.utils.name import date_now, make_unique_dir, safe_name

RESERVED = ["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))]
TEXTS = st.one_of(
    st.text(max_size=200),
    st.text("abcCONn1.-_ /\\:é", max_size=40),
    st.builds(
        "{}{}{}".format, st.sampled_from(["", ".", "-", " "]), st.sampled_from(RESERVED), st.text(max_size=5)
    ),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TEXTS, st.integers(1, 120))
def test_safe_names_are_safe(text: str, max_length: int) -> None:
    name = safe_name(text, max_length)
    assert 1 <= len(name) <= max_length
    assert re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", name)
    assert name.partition(".")[0].lower() not in RESERVED
    assert safe_name(name, max_length) == name


@settings(deadline=None, derandomize=True)
@given(
    st.from_regex(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+){0,5}", fullmatch=True).filter(
        lambda text: len(text) <= 100
    )
)
def test_safe_names_stay(text: str) -> None:
    assert safe_name(text) == (f"_{text}"[:100] if text.partition(".")[0].lower() in RESERVED else text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("training-run", "training-run"),
        ("a run, of mine!", "a-run-of-mine"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\temp\\run", "C-temp-run"),
        ("Zürich café", "Zurich-cafe"),
        ("größe", "gro-e"),
        ("map 日本 2", "map-2"),
        ("日本", "unnamed"),
        ("", "unnamed"),
        ("...", "unnamed"),
        ("line\nbreak\0", "line-break"),
        ("v1.2_final.", "v1.2_final"),
        ("CON", "_CON"),
        ("nul.txt", "_nul.txt"),
        ("Com1.tar.gz", "_Com1.tar.gz"),
        ("COM¹", "_COM1"),
        ("console", "console"),
        ("com10", "com10"),
    ],
)
def test_safe_name_by_example(text: str, expected: str) -> None:
    assert safe_name(text) == expected


@pytest.mark.parametrize(
    "text, max_length, expected",
    [
        ("abcdef", 3, "abc"),
        ("ab-cdef", 3, "ab"),
        ("console", 3, "_co"),
        ("", 3, "unn"),
        ("com1.x", 6, "_com1"),
    ],
)
def test_long_names_are_cut_and_stay_safe(text: str, max_length: int, expected: str) -> None:
    assert safe_name(text, max_length) == expected


def test_date_is_now_to_the_second() -> None:
    before = datetime.now()
    text = date_now()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", text)
    found = datetime.strptime(text, "%Y-%m-%d_%H-%M-%S")
    assert before - timedelta(seconds=1) < found <= datetime.now()


def test_date_is_a_safe_name_and_sorts_by_time() -> None:
    text = date_now()
    assert safe_name(text) == text and text <= date_now()


def test_unique_folders_are_numbered(tmp_path: Path) -> None:
    parent = tmp_path / "new" / "logs"
    assert [make_unique_dir(parent, "run") for _ in range(3)] == ["run", "run-2", "run-3"]
    assert sorted(path.name for path in parent.iterdir() if path.is_dir()) == ["run", "run-2", "run-3"]


def test_a_file_takes_the_name_too(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    assert make_unique_dir(str(tmp_path), "run") == "run-2"
    assert (tmp_path / "run").read_text() == "a file"


def test_gaps_are_filled_without_touching_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run-3").mkdir()
    (tmp_path / "run-3" / "weights").write_text("kept")
    assert [make_unique_dir(tmp_path, "run") for _ in range(2)] == ["run-2", "run-4"]
    assert (tmp_path / "run-3" / "weights").read_text() == "kept"


def test_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(FileExistsError):
        make_unique_dir(tmp_path / "logs", "run")


def test_threads_get_different_folders(tmp_path: Path) -> None:
    start = threading.Barrier(16)

    def take(_: int) -> list[str]:
        start.wait()
        return [make_unique_dir(tmp_path, "run") for _ in range(8)]

    with ThreadPoolExecutor(16) as pool:
        names = [name for taken in pool.map(take, range(16)) for name in taken]
    assert len(set(names)) == 128
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_processes_get_different_folders(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        names = list(pool.map(make_unique_dir, [tmp_path] * 100, ["run"] * 100))
    assert set(names) == {"run", *(f"run-{number}" for number in range(2, 101))}
