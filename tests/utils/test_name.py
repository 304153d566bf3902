"""How runs are named."""

from datetime import datetime, timedelta

from dida_tools.utils.name import date_now, run_name


def test_the_date_is_now_to_the_second_and_sorts_by_time() -> None:
    before, date = datetime.now(), date_now()
    found = datetime.strptime(date, "%Y-%m-%d_%H-%M-%S")
    assert before - timedelta(seconds=1) < found <= datetime.now() and date <= date_now()


def test_runs_are_named_by_date_and_session() -> None:
    assert run_name({"DATE": "2026-01-01_10-00-00", "SESSION_NAME": "roads"}) == "2026-01-01_10-00-00_roads"
    assert run_name({"DATE": "a/b", "SESSION_NAME": "../x y"}) == "a-b_x-y"
