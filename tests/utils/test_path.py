import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

import dida_tools
from dida_tools.utils.path import create_dirs, sync_dir, write_atomic

ROOT = Path(dida_tools.__file__).parents[1]
IMPORT = f"import sys, time; from {dida_tools.__name__}.utils.path import write_atomic\n"
SIZE = 200_000
POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def start_writer(code: str, path: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", IMPORT + code, str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_create_dirs_makes_all_folders_and_what_they_lie_in(tmp_path: Path) -> None:
    create_dirs(tmp_path / "a" / "b", str(tmp_path / "c"))
    assert (tmp_path / "a" / "b").is_dir() and (tmp_path / "c").is_dir()


def test_create_dirs_leaves_existing_folders_as_they_are(tmp_path: Path) -> None:
    create_dirs(tmp_path / "a")
    (tmp_path / "a" / "file").write_text("kept")
    create_dirs(tmp_path / "a", tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "kept"


def test_create_dirs_without_paths_does_nothing() -> None:
    create_dirs()


def test_create_dirs_refuses_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError):
        create_dirs(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"text", bytes(range(256)) * 5000])
@pytest.mark.parametrize("as_text", [False, True])
def test_content_is_written_and_nothing_else_left(tmp_path: Path, content: bytes, as_text: bool) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    write_atomic(str(path) if as_text else path, lambda file: file.write(content))
    assert path.read_bytes() == content and names(path.parent) == ["file.bin"]


def test_old_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a long old content")
    write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and names(tmp_path) == ["file"]


def test_writer_may_read_back_what_it_wrote(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"header body")
        file.seek(0)
        assert file.read(6) == b"header"
        file.seek(0)
        file.write(b"HEADER")

    write_atomic(tmp_path / "file", write)
    assert (tmp_path / "file").read_bytes() == b"HEADER body"


def test_relative_path_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomic("file", lambda file: file.write(b"here"))
    assert (tmp_path / "file").read_bytes() == b"here" and names(tmp_path) == ["file"]


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
    assert names(tmp_path) == (["file"] if exists else [])
    assert not exists or (tmp_path / "file").read_bytes() == b"old"


def test_folder_in_the_way_is_an_error_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "file", lambda file: file.write(b"new"))
    assert names(tmp_path) == ["file"]


def test_temporary_file_lies_in_the_same_folder_and_is_hidden(tmp_path: Path) -> None:
    seen: list[str] = []
    write_atomic(tmp_path / "file.csv", lambda file: seen.extend(names(tmp_path)))
    assert len(seen) == 1 and seen[0].startswith(".file.csv.") and seen[0].endswith(".tmp")


@POSIX
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: None, mask: int, mode: int) -> None:
    os.umask(mask)
    write_atomic(tmp_path / "file", lambda file: file.write(b"new"))
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@POSIX
def test_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "def write(file):\n"
        "    file.write(b'half of the new')\n"
        "    file.flush()\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "write_atomic(sys.argv[1], write)"
    )
    kill(start_writer(code, path))
    assert path.read_bytes() == b"old"
    write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


@POSIX
def test_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * SIZE)
    code = (
        "print('ready', flush=True)\n"
        "for turn in range(10**9):\n"
        f"    write_atomic(sys.argv[1], lambda file: [file.write(b'ab'[turn % 2:][:1] * {SIZE // 10})"
        " for _ in range(10)])"
    )
    moments = random.Random(0)
    for _ in range(12):
        process = start_writer(code, path)
        time.sleep(moments.uniform(0, 0.05))
        kill(process)
        content = path.read_bytes()
        assert len(content) == SIZE and len(set(content)) == 1


def test_readers_and_rival_writers_see_whole_files_only(tmp_path: Path) -> None:
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


def test_folder_is_synced(tmp_path: Path) -> None:
    sync_dir(tmp_path)
    sync_dir(str(tmp_path))


@POSIX
def test_sync_of_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync_dir(tmp_path / "missing")


@pytest.mark.skipif(
    not Path("/proc/self").is_dir(), reason="needs a file system whose folders cannot be synced"
)
def test_folder_that_cannot_be_synced_is_left() -> None:
    handle = os.open("/proc", os.O_RDONLY)
    with pytest.raises(OSError):
        os.fsync(handle)
    os.close(handle)
    sync_dir("/proc")
