"""Folders of the project."""

from pathlib import Path

import pytest

from dida_tools.utils.path import create_dirs


def test_create_dirs_makes_folders_and_leaves_existing_ones(tmp_path: Path) -> None:
    create_dirs()
    create_dirs(tmp_path / "a" / "b", str(tmp_path / "c"))
    (tmp_path / "a" / "file").write_text("kept")
    create_dirs(tmp_path / "a", tmp_path / "a")
    assert (tmp_path / "a" / "b").is_dir() and (tmp_path / "c").is_dir()
    assert (tmp_path / "a" / "file").read_text() == "kept"
    with pytest.raises(FileExistsError):
        create_dirs(tmp_path / "a" / "file")
