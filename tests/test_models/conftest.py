"""Choose the model that the suite tests, and print its tables at the end."""

from collections.abc import Iterator
from typing import Any

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Test a run or a weights file alone and once, by the first test file."""
    if config.getoption("--run") is None and config.getoption("--weights") is None:
        return
    chosen = [item for item in items if "subject" in getattr(item, "fixturenames", ())]
    files = list(dict.fromkeys(item.path for item in chosen))
    kept = [item for item in chosen if item.path == files[0]]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add to a failure what the check guards against."""
    outcome: Any = yield
    report = outcome.get_result()
    about = getattr(getattr(item, "function", None), "__doc__", None)
    if report.failed and about and "subject" in getattr(item, "fixturenames", ()):
        report.sections.append(("what it is for", about.strip()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tables of the checks."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    shown = [text for report in reports for name, text in report.user_properties if name == "shown"]
    if shown:
        terminalreporter.section("measured")
    for text in dict.fromkeys(shown):
        title, *lines = text.splitlines()
        terminalreporter.write_line("")
        terminalreporter.write_line(title, bold=True)
        for line in lines:
            terminalreporter.write_line(line)
