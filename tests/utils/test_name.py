import re
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dida_tools.utils.name import date_now, safe_name

RESERVED = ["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))]
TEXTS = st.one_of(
    st.text(max_size=200),
    st.text("abcCONn1.-_ /\\:é", max_size=40),
    st.builds("{}{}{}".format, st.sampled_from(["", ".", "-", " "]), st.sampled_from(RESERVED), st.text(max_size=5)),
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
@given(st.from_regex(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+){0,5}", fullmatch=True).filter(lambda text: len(text) <= 100))
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
    [("abcdef", 3, "abc"), ("ab-cdef", 3, "ab"), ("console", 3, "_co"), ("", 3, "unn"), ("com1.x", 6, "_com1")],
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
