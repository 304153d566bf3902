"""How runs are named, and folders of the project."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from dida_core.storage.files import safe_name

from dida_tools.utils.name import date_now, run_name
from dida_tools.utils.path import create_dirs


def test_runs_are_named_by_date_and_session() -> None:
    before, date = datetime.now(), date_now()
    found = datetime.strptime(date, "%Y-%m-%d_%H-%M-%S")
    assert before - timedelta(seconds=1) < found <= datetime.now() and date <= date_now()
    names = [run_name({"DATE": "a/b", "SESSION_NAME": name}) for name in ("../x y", "roads")]
    assert names[0] != names[1] and "x-y" in names[0] and all(name == safe_name(name) for name in names)


def test_create_dirs_makes_folders_and_leaves_existing_ones(tmp_path: Path) -> None:
    create_dirs(tmp_path / "a" / "b", str(tmp_path / "c"))
    (tmp_path / "a" / "file").write_text("kept")
    create_dirs(tmp_path / "a", tmp_path / "a")
    assert (tmp_path / "a" / "b").is_dir() and (tmp_path / "c").is_dir()
    assert (tmp_path / "a" / "file").read_text() == "kept"
    with pytest.raises(FileExistsError):
        create_dirs(tmp_path / "a" / "file")
