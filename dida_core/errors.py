"""Errors that a user can fix: scripts print their message without a traceback."""

import functools
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

# What a terminal obeys, instead of showing it: all controls but tab and newline, and what turns text round.
_CONTROLS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text, which may be a stranger's, as it can be shown: control characters as their escapes."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(ValueError):
    """Something that the user gave cannot be used. The message names it, what is allowed, and what to do."""


class Problems(UserError):
    """Everything that is wrong with one thing, a sentence each."""

    about = "the input"
    max_listed = 50

    def __init__(self, problems: str | Sequence[str]) -> None:
        # A single string is what DataLoader passes on from its workers.
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        number, listed = len(self.problems), self.problems[: self.max_listed]
        if number > self.max_listed:
            listed.append(f"and {number - self.max_listed} more")
        text = listed[0] if number == 1 else "".join(f"\n  - {problem}" for problem in listed)
        super().__init__(f"{self.about} has {number} problem{'s' * (number != 1)}: {text}")

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (self.problems,)  # to another process, which lists them again


class ConfigError(Problems):
    """A config that cannot be used."""

    about = "the config"


class Preempted(BaseException):
    """A signal asked to end. No Exception, so that nobody who catches those continues as if nothing were."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: what is done is saved, start it again to continue


def checked_call(function: F) -> F:
    """Have a function refuse arguments that it does not have, such as those of 2021, by showing its call."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        try:
            signature.bind(*arguments, **options)
        except TypeError as error:
            plain = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
            call = signature.replace(parameters=plain, return_annotation=signature.empty)
            raise TypeError(f"{function.__name__}: {error}. The call is {function.__name__}{call}.") from None
        return function(*arguments, **options)

    return checked  # type: ignore[return-value]


def exit_code(main: Callable[[], int], of_each_process: bool = False) -> int:
    """
    Run a script's main function and return its exit code; for an error of the user, print a sentence, and so
    for warnings.

    :param of_each_process: of several, each has errors of its own; otherwise the first one prints them
    """
    formatter = warnings.formatwarning
    warnings.formatwarning = lambda text, kind, *_: f"{kind.__name__}: {printable(str(text))}\n"
    try:
        return main()
    except Preempted as error:
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        if of_each_process or os.environ.get("RANK", "0") == "0":
            print(printable(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = formatter
