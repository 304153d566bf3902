import pickle
from pathlib import Path

import pytest
from dida_core.config.project import Project, find_project, project_of
from dida_core.errors import ConfigError, Preempted, Problems, UserError, exit_code

import dida_tools
from dida_tools.config import config, device
from dida_tools.config.config import ALIASES

CHECKOUT = Path(dida_tools.__file__).parents[1]


def test_a_module_tells_its_project():
    for name in ("dida_tools", "dida_tools.training.pytorch_training"):
        project = project_of(name)
        assert project == Project("dida_tools", CHECKOUT, config.ALLOWED_ROOTS, ALIASES)
        assert hash(project) == hash(project_of(name))
        assert project.module(".config.device") is device
    for name in ("json", "my_train", "torch.nn", "tests_core.config.test_project"):
        with pytest.raises(UserError, match=rf"{name} belongs to no project.*not found.*into your package"):
            project_of(name)


def test_without_a_module_the_project_is_in_the_working_directory_or_beside_the_library(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert find_project() == find_project("torch.nn.modules") == project_of("dida_tools")
    monkeypatch.syspath_prepend(tmp_path)
    for package in ("found_here", "found_too"):
        (tmp_path / package / "config").mkdir(parents=True)
        (tmp_path / package / "config" / "config.py").write_text("ALLOWED_ROOTS, ALIASES = (), {}")
        assert find_project("dida_tools.models") == project_of("dida_tools")
        # Of two, none is guessed: the one beside the library is taken.
        assert find_project().package == ("found_here" if package == "found_here" else "dida_tools")
    monkeypatch.setattr("dida_core.config.project.__file__", str(tmp_path / "dida_core/config/project.py"))
    with pytest.raises(UserError, match="No project is found: run this in the folder that holds your pac"):
        find_project()


def test_a_settings_module_that_fails_is_not_taken_for_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_project" / "config").mkdir(parents=True)
    (tmp_path / "broken_project" / "config" / "config.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        project_of("broken_project.training")


def test_problems_are_counted_and_listed_also_by_another_process():
    assert str(ConfigError(["A is wrong."])) == "the config has 1 problem: A is wrong."
    assert str(ConfigError(["A.", "B."])) == "the config has 2 problems: \n  - A.\n  - B."
    many = Problems([str(number) for number in range(60)])
    assert str(many).startswith("the input has 60 problems:") and str(many).endswith("- 49\n  - and 10 more")
    again = pickle.loads(pickle.dumps(many))
    assert (again.problems, str(again)) == (many.problems, str(many)) and len(many.problems) == 60
    assert issubclass(ConfigError, UserError) and issubclass(UserError, ValueError)


RAISED = [
    (None, 0, ""),
    (UserError("no such run."), 1, "UserError: no such run.\n"),
    (ConfigError(["A."]), 1, "ConfigError: the config has 1 problem: A.\n"),
    (OSError("disk full"), 1, "OSError: disk full\n"),
    (Preempted("SIGTERM was received"), 75, ""),
    (KeyboardInterrupt(), 130, ""),
]


@pytest.mark.parametrize(("error", "code", "message"), RAISED)
def test_a_script_turns_what_was_raised_into_its_exit_code(error, code, message, capsys, monkeypatch):
    def main():
        if error is not None:
            raise error
        return 0

    monkeypatch.delenv("RANK", raising=False)
    assert (exit_code(main), capsys.readouterr().err) == (code, message)
    monkeypatch.setenv("RANK", "1")
    assert (exit_code(main), capsys.readouterr().err) == (code, "")
    assert (exit_code(main, of_each_process=True), capsys.readouterr().err) == (code, message)


def test_a_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)
