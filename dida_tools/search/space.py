"""
Contains what a search tries: for dotted keys of the config, ranges of numbers and choices of anything.

    search_space = {"OPTIMIZER_CONFIG.lr": log_uniform(1e-4, 1e-1), "OPTIMIZER": choice(SGD, AdamW)}
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..config.capture import ConfigError, assign, capture, find_problems, flatten
from ..config.errors import UserError
from ..config.keys import KEYS, complete, copy_config

# What all trials must have in common, so that they can be compared, or what names and records them.
_COMMON = (
    *("MONITOR", "METRICS", "VALIDATION_FRACTION", "MASK_VALUES", "IGNORE_INDEX", "DATASET_CONFIG.validation"),
    *("DATE", "SESSION_NAME", "ROUTINE_NAME", "RESUME", "RERUN_OF", "STUDY", "TRIAL", "AFTER_EPOCH", "LOGFILE"),
)


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if not (self.low <= self.high and (not self.log or self.low > 0)):
            what = "rise from above 0" if self.log else "rise"
            raise UserError(f"a range from {self.low} to {self.high}: it must {what}, such as {'1e-4, 1e-1'}.")

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that stand for all."""
        return (self.low, self.high)

    def suggest(self, trial: Any, name: str) -> Any:
        """The value of a trial; drawn when it is asked for first."""
        if self.whole:
            return trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def value(self, stored: Any) -> Any:
        """The value that belongs to what a trial has stored."""
        return stored

    def text(self) -> str:
        """For people, and to tell spaces apart."""
        kind = f"{'log_' * self.log}{'integer' if self.whole else 'uniform'}"
        return f"{kind}({self.low!r}, {self.high!r}{f', step={self.step!r}' if self.step else ''})"


class Choice:
    """One of these: numbers, texts, classes, functions, dicts of arguments, ..."""

    def __init__(self, *options: Any) -> None:
        """:raises UserError: if there is none, if two have the same name, or if one cannot be recorded"""
        self.ends = options
        self.labels = [_label(option) for option in options]
        if not options or len(set(self.labels)) < len(options):
            shown = ", ".join(map(str, self.labels)) or "nothing"
            raise UserError(f"a choice of {shown}: give at least one option, and each one once.")

    def suggest(self, trial: Any, name: str) -> Any:
        """The option of a trial; drawn when it is asked for first."""
        return self.value(trial.suggest_categorical(name, self.labels))

    def value(self, stored: Any) -> Any:
        """The option that belongs to what a trial has stored."""
        return self.ends[self.labels.index(stored)]

    def text(self) -> str:
        """For people, and to tell spaces apart."""
        return f"choice({', '.join(map(str, self.labels))})"


def uniform(low: float, high: float, step: float | None = None) -> Range:
    """Numbers, each as likely as any other."""
    return Range(float(low), float(high), step=step)


def log_uniform(low: float, high: float) -> Range:
    """Numbers, each order of magnitude as likely as any other; low is above 0."""
    return Range(float(low), float(high), log=True)


def integer(low: int, high: int, step: int | None = None) -> Range:
    """Whole numbers."""
    return Range(low, high, step=step, whole=True)


def log_integer(low: int, high: int) -> Range:
    """Whole numbers, each order of magnitude as likely as any other; low is above 0."""
    return Range(low, high, log=True, whole=True)


def choice(*options: Any) -> Choice:
    """One of these: numbers, texts, classes, functions, dicts of arguments, ..."""
    return Choice(*options)


def _label(option: Any) -> Any:
    """What is stored for an option: itself, where a storage can hold it."""
    if option is None or type(option) in (bool, int, float, str):
        return option
    capture({"choice": option})  # refuses what has no name
    texts = {key[len("choice.") :]: text for key, text in flatten({"choice": option}).items()}
    return ", ".join(f"{key}={text}" if key else str(text) for key, text in texts.items())


class Space:
    """All that a search tries."""

    def __init__(self, search_space: dict[str, Range | Choice]) -> None:
        self._parts = search_space

    def check(self, config: dict[str, Any], more: list[str]) -> None:
        """
        Checks every value, and every two together, before the first trial.

        :param config: what is searched around
        :param more: problems that were found before
        :raises ConfigError: with all problems of the space, and of the config
        """
        problems = [*more]
        goal = str(complete(config)["MONITOR"]).split()[-1]
        for key, part in self._parts.items():
            first = key.partition(".")[0]
            if not isinstance(part, Range | Choice):
                problems.append(f"{key} is {part!r} in the search space: it must be a range or a choice.")
            elif any(f"{key}.".startswith(f"{common}.") for common in _COMMON):
                problems.append(f"{key} cannot be searched: it must be the same for all trials.")
            elif first in ("LOSS", "LOSS_CONFIG") and goal == "loss":
                problems.append(f"{key} cannot be searched while MONITOR is {config['MONITOR']!r}: monitor a metric.")
            elif first not in KEYS:
                problems += find_problems({first: None})[:1]
        if not self._parts:
            problems.append("the search space is empty: write into search_space, at the top of hyperparameter.py.")
        if not problems:
            for values in self._pairs():
                candidate = copy_config(config)
                found = [(key, assign(candidate, key, value)) for key, value in values.items()]
                found_now = [f"{key} cannot be searched: {problem}." for key, problem in found if problem]
                problems += found_now or find_problems(candidate)
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))

    def _pairs(self) -> Iterator[dict[str, Any]]:
        first = self.first_values()
        yield first
        for one, other in itertools.combinations_with_replacement(self._parts, 2):
            for pair in itertools.product(self._parts[one].ends, self._parts[other].ends):
                yield first | {one: pair[0], other: pair[1]}

    def first_values(self) -> dict[str, Any]:
        """The lowest number and the first option of each."""
        return {key: part.ends[0] for key, part in self._parts.items()}

    def suggest(self, trial: Any) -> dict[str, Any]:
        """The values of a trial, in the order in which the space is written."""
        return {key: part.suggest(trial, key) for key, part in self._parts.items()}

    def values(self, params: dict[str, Any]) -> dict[str, Any]:
        """The values that belong to what a trial has stored."""
        return {key: part.value(params[key]) for key, part in self._parts.items()}

    def text(self) -> dict[str, str]:
        """For people, and to tell spaces apart."""
        return {key: part.text() for key, part in self._parts.items()}


def with_values(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config, live or captured, with values by dotted keys."""
    config = copy_config(config)
    for key, value in values.items():
        problem = assign(config, key, copy_config(value))
        assert problem is None, problem  # check has seen to it
    return config
