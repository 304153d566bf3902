"""Files are written intact or not at all, and names are safe and used once."""

import os
import re
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import pytest
from dida_core.storage.files import make_unique_dir, relative_path, safe_name, sync_dir, write_atomic
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import PACKAGE, killed_writers

POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_paths_are_shown_relative_where_they_lie_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert relative_path(tmp_path / "a" / "b") == os.path.join("a", "b")
    assert relative_path(tmp_path.parent / "x") == str(tmp_path.parent / "x")


@pytest.mark.parametrize("content", [b"", b"text", bytes(range(256)) * 5000])
@pytest.mark.parametrize("exists", [False, True])
def test_content_is_written_and_nothing_else_left(tmp_path: Path, content: bytes, exists: bool) -> None:
    path = tmp_path / "new" / "file.bin"
    if exists:
        path.parent.mkdir()
        path.write_bytes(b"a long old content")
    write_atomic(str(path) if exists else path, lambda file: file.write(content))
    assert path.read_bytes() == content and names(path.parent) == ["file.bin"]


def test_writer_may_read_back_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def write(file: BinaryIO) -> None:
        file.write(b"header body")
        file.seek(0)
        assert file.read(6) == b"header"
        file.seek(0)
        file.write(b"HEADER")
        (temporary,) = names(tmp_path)
        assert temporary.startswith(".file.") and temporary.endswith(".tmp")

    write_atomic("file", write)  # relative, without a folder
    assert (tmp_path / "file").read_bytes() == b"HEADER body"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [True, False])
def test_failing_writer_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, error: type[BaseException], exists: bool
) -> None:
    if exists:
        (tmp_path / "file").write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half of the new")
        file.flush()
        assert len(names(tmp_path)) == 1 + exists
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        write_atomic(tmp_path / "file", write)
    assert names(tmp_path) == ["file"] * exists
    assert not exists or (tmp_path / "file").read_bytes() == b"old"


def test_folder_in_the_way_is_an_error_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "file", lambda file: file.write(b"new"))
    assert names(tmp_path) == ["file"]


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@POSIX
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: None, mask: int, mode: int) -> None:
    os.umask(mask)
    write_atomic(tmp_path / "file", lambda file: file.write(b"new"))
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


WRITER = f"""
import sys
from {PACKAGE}.utils.files import write_atomic
for turn in range(10**9):
    part = b"ab"[turn % 2:][:1] * 20_000
    write_atomic(sys.argv[1], lambda file: [file.write(part) for _ in range(10)])
    print("written", flush=True)
"""


@POSIX
@pytest.mark.parametrize("num_kills", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_any_moment_leaves_an_intact_file(tmp_path: Path, num_kills: int) -> None:
    for _ in killed_writers(WRITER, tmp_path / "file", num_kills):
        content = (tmp_path / "file").read_bytes()
        assert len(content) == 200_000 and len(set(content)) == 1


def test_readers_and_rival_writers_see_intact_files_only(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(number: int) -> None:
        for _ in range(10):
            write_atomic(path, lambda file: [file.write(bytes([number]) * 10_000) for _ in range(10)])

    write(0)
    with ThreadPoolExecutor(5) as pool:
        writers = [pool.submit(write, number) for number in range(1, 5)]
        while not all(writer.done() for writer in writers):
            content = path.read_bytes()
            assert len(content) == 100_000 and len(set(content)) == 1
        for writer in writers:
            writer.result()
    assert names(tmp_path) == ["file"]


@POSIX
def test_folders_are_synced_where_they_can_be(tmp_path: Path) -> None:
    sync_dir(tmp_path)
    sync_dir(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        sync_dir(tmp_path / "missing")
    if Path("/proc/self").is_dir():  # a file system whose folders cannot be synced
        sync_dir("/proc")


RESERVED = ["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))]
TEXTS = st.one_of(
    st.text(max_size=200),
    st.text("abcCONn1.-_ /\\:é", max_size=40),
    st.builds(
        "{}{}{}".format, st.sampled_from(["", ".", "-", " "]), st.sampled_from(RESERVED), st.text(max_size=5)
    ),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXTS, st.integers(1, 120))
def test_safe_names_are_safe(text: str, max_length: int) -> None:
    name = safe_name(text, max_length)
    assert 1 <= len(name) <= max_length
    assert re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", name)
    assert name.partition(".")[0].lower() not in RESERVED
    assert safe_name(name, max_length) == name


@settings(deadline=None, derandomize=True)
@given(st.from_regex(r"[A-Za-z0-9_]{1,9}([.-][A-Za-z0-9_]{1,9}){0,5}", fullmatch=True))
def test_safe_names_stay(text: str) -> None:
    assert safe_name(text) == (f"_{text}" if text.partition(".")[0].lower() in RESERVED else text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("training-run", "training-run"), ("a run, of mine!", "a-run-of-mine"), ("nul.txt", "_nul.txt"),
        ("../../etc/passwd", "etc-passwd"), ("C:\\temp\\run", "C-temp-run"), ("Zürich café", "Zurich-cafe"),
        ("größe", "gro-e"), ("map 日本 2", "map-2"), ("日本", "unnamed"), ("", "unnamed"), ("..", "unnamed"),
        ("line\nbreak\0", "line-break"), ("v1.2_final.", "v1.2_final"), ("Com1.tar.gz", "_Com1.tar.gz"),
        ("CON", "_CON"), ("COM¹", "_COM1"), ("console", "console"), ("com10", "com10"),
    ],
)  # fmt: skip
def test_safe_name_by_example(text: str, expected: str) -> None:
    assert safe_name(text) == expected


@pytest.mark.parametrize(
    "text, length, expected",
    [
        ("abcdef", 3, "abc"),
        ("ab-cdef", 3, "ab"),
        ("console", 3, "_co"),
        ("", 3, "unn"),
        ("com1.x", 6, "_com1"),
    ],
)
def test_long_names_are_cut_and_stay_safe(text: str, length: int, expected: str) -> None:
    assert safe_name(text, length) == expected


def test_unique_folders_are_numbered(tmp_path: Path) -> None:
    parent = tmp_path / "new" / "logs"
    assert [make_unique_dir(parent, "run") for _ in range(3)] == ["run", "run-2", "run-3"]
    (parent / "run-4").write_text("a file takes the name, too")
    assert make_unique_dir(parent, "run") == "run-5"
    assert make_unique_dir(parent, "../up" * 100) in names(parent)
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == ["logs"]
    with pytest.raises(FileExistsError):
        make_unique_dir(parent / "run-4", "run")


def test_threads_and_processes_get_different_folders(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def take(_: int) -> list[str]:
        start.wait()
        return [make_unique_dir(tmp_path, "run") for _ in range(8)]

    with ThreadPoolExecutor(8) as pool:
        taken = [name for some in pool.map(take, range(8)) for name in some]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        taken += processes.map(make_unique_dir, [tmp_path] * 40, ["run"] * 40)
    assert len(set(taken)) == 104 and set(taken) == {"run", *(f"run-{number}" for number in range(2, 105))}
