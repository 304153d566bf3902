"""Files are written intact or not at all, names are safe and used once, locks are seen."""

import os
import re
import stat
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import pytest
from dida_core.errors import UserError
from dida_core.storage.files import make_unique_dir, relative_path, safe_name, sync_dir, write_atomic
from dida_core.storage.locks import Busy, is_locked, locked
from hypothesis import given, settings
from hypothesis import strategies as st


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_paths_are_shown_relative_where_they_lie_below(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert relative_path(tmp_path / "a" / "b") == os.path.join("a", "b")
    assert relative_path(tmp_path.parent / "x") == str(tmp_path.parent / "x")


def test_content_is_written_read_back_by_its_writer_and_nothing_else_left(tmp_path, monkeypatch):
    def write(file: BinaryIO) -> None:
        file.write(b"header body")
        file.seek(0)
        assert file.read(6) == b"header"
        file.seek(0)
        file.write(b"HEADER")
        assert re.search(r"\.file\..+\.tmp", " ".join(names(tmp_path)))

    monkeypatch.chdir(tmp_path)
    write_atomic("file", write)  # relative, without a folder
    for content in (b"", bytes(range(256)) * 5000):
        for path in (tmp_path / "new" / "file.bin", str(tmp_path / "file")):
            write_atomic(path, lambda file: file.write(content))  # noqa: B023
            assert Path(path).read_bytes() == content
    assert names(tmp_path) == ["file", "new"] and names(tmp_path / "new") == ["file.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failing_writer_leaves_the_old_file_and_no_temporary_one(tmp_path, error, exists):
    if exists:
        (tmp_path / "file").write_bytes(b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half of the new")
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        write_atomic(tmp_path / "file", write)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"] * exists
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "folder", lambda file: file.write(b"new"))
    assert names(tmp_path) == ["file"] * exists + ["folder"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_permissions_follow_the_umask_and_folders_are_synced_where_they_can_be(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write_atomic(tmp_path / "file", lambda file: file.write(b"new"))
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    with pytest.raises(FileNotFoundError):
        sync_dir(tmp_path / "missing")
    if Path("/proc/self").is_dir():  # a file system whose folders cannot be synced
        sync_dir("/proc")


def test_readers_and_rival_writers_see_intact_files_only(tmp_path):
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


# ----------------------------------------------------------------------------------------------------- names

RESERVED = ["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))]
STARTS = st.builds(
    "{}{}{}".format, st.sampled_from(["", ".", "- "]), st.sampled_from(RESERVED), st.text(max_size=3)
)


@settings(max_examples=60, derandomize=True)
@given(st.one_of(st.text(max_size=40), st.text("abcCONn1.-_ /\\:é", max_size=40), STARTS), st.integers(1, 60))
def test_safe_names_are_safe(text, max_length):
    name = safe_name(text, max_length)
    assert 1 <= len(name) <= max_length
    assert re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", name)
    assert name.partition(".")[0].lower() not in RESERVED
    assert safe_name(name, max_length) == name


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
def test_safe_name_by_example(text, expected):
    assert safe_name(text) == expected


def test_unique_folders_are_numbered(tmp_path):
    parent = tmp_path / "new" / "logs"
    assert [make_unique_dir(parent, "run") for _ in range(3)] == ["run", "run-2", "run-3"]
    (parent / "run-4").write_text("a file takes the name, too")
    assert make_unique_dir(parent, "run") == "run-5"
    assert make_unique_dir(parent, "../up" * 100) in names(parent)
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == ["logs"]
    with pytest.raises(FileExistsError):
        make_unique_dir(parent / "run-4", "run")


@pytest.mark.parametrize(
    "pool", [ThreadPoolExecutor, pytest.param(ProcessPoolExecutor, marks=pytest.mark.slow)]
)
def test_threads_and_processes_get_different_folders(tmp_path, pool):
    options = {"mp_context": get_context("spawn")} if pool is ProcessPoolExecutor else {}
    with pool(8, **options) as workers:
        taken = list(workers.map(make_unique_dir, [tmp_path] * 64, ["run"] * 64))
    assert set(taken) == {"run", *(f"run-{number}" for number in range(2, 65))}


# ----------------------------------------------------------------------------------------------------- locks


def test_looking_at_a_lock_writes_nothing_and_keeps_nobody_away(tmp_path):
    file, stop, seen = tmp_path / ".lock", threading.Event(), []
    assert not is_locked(file) and not file.exists()
    file.touch()

    def look() -> None:
        while not stop.is_set():
            seen.append(is_locked(file))

    with ThreadPoolExecutor(4) as pool:
        lookers = [pool.submit(look) for _ in range(4)]
        while len(seen) < 500:
            time.sleep(0.01)
        stop.set()
    for looker in lookers:
        looker.result()
    assert set(seen) == {False}  # those that look do not see one another
    with locked(file):
        assert is_locked(file)
        for busy, message in (("", r"\.lock is locked by another process"), ("wait a bit", "^wait a bit$")):
            with pytest.raises(Busy, match=message) as caught, locked(file, 0.01, busy):
                pass
            assert isinstance(caught.value, UserError) and isinstance(caught.value, TimeoutError)
    with pytest.raises(KeyError), locked(file, 0):
        raise KeyError
    assert not is_locked(file)
