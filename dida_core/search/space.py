"""What a search tries: for dotted keys of the config, ranges of numbers and choices of anything."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..config.capture import capture
from ..config.check import find_problems, takes
from ..config.keys import KEYS, complete, copy_config
from ..config.overrides import assign
from ..config.project import Project
from ..config.tree import flatten
from ..errors import ConfigError, UserError

# What names and records a trial, or must be the same for all, so that they can be compared.
_COMMON = (
    *("DATE", "SESSION_NAME", "ROUTINE_NAME", "RESUME", "RERUN_OF", "STUDY", "TRIAL", "AFTER_EPOCH"),
    *("LOGFILE", "MONITOR", "METRICS", "VALIDATION_FRACTION", "MASK_VALUES", "IGNORE_INDEX"),
    "DATASET_CONFIG.validation",
)


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if not (self.low <= self.high and (self.low > 0 or not self.log)):  # NaN never is
            rule = "it must rise, from above 0" if self.log else "it must rise"
            raise UserError(f"the search space has a range from {self.low} to {self.high}: {rule}.")

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that stand for all."""
        return self.low, self.high


@dataclass(frozen=True)
class Choice:
    """One of some options, which may be live objects."""

    ends: tuple[Any, ...]


def uniform(low: float, high: float, step: float | None = None) -> Range:
    """Return a range of numbers, each as likely as any other."""
    return Range(float(low), float(high), step)


def log_uniform(low: float, high: float) -> Range:
    """Return a range of numbers, each order of magnitude as likely as any other; low is above 0."""
    return Range(float(low), float(high), log=True)


def integer(low: int, high: int, step: int | None = None, log: bool = False) -> Range:
    """Return a range of integers, each as likely as any other, or with log each order of magnitude."""
    return Range(low, high, step, log)


def choice(*options: Any) -> Choice:
    """Return a choice of these: numbers, texts, classes, functions, dicts of arguments, ..."""
    return Choice(options)


class Space:
    """
    All that a search tries. An argument that only some options take, such as OPTIMIZER_CONFIG.momentum some
    of OPTIMIZER, is searched with these alone.

    :raises UserError: with all problems of the parts, such as an option that has no name to record
    """

    def __init__(self, search_space: dict[str, Range | Choice], project: Project) -> None:
        self._parts, self._project, problems = search_space, project, []
        # Trials store labels of options: the option itself, where a storage can hold it, else its name.
        self._labels: dict[str, list[Any]] = {}
        for key, part in search_space.items():
            if isinstance(part, Choice):
                labels = self._labels[key] = [_label(option, project) for option in part.ends]
                if not labels or len(set(labels)) < len(labels):
                    problems.append(
                        f"{key} is a choice of {labels}: give at least one option, and each one once."
                    )
            elif not isinstance(part, Range):
                problems.append(f"{key} is {part!r} in the search space: it must be a range or a choice.")
        if not search_space:
            problems.append("the search space is empty: fill search_space, at the top of hyperparameter.py.")
        if problems:
            raise ConfigError(problems)

    def check(self, config: dict[str, Any], more: list[str]) -> None:
        """
        Check every value, and every two together, before the first trial.

        :param config: what is searched around
        :param more: problems that were found before
        :raises ConfigError: with all problems of the space, and of the config
        """
        problems, monitor = [*more], complete(config)["MONITOR"]
        for key in self._parts:
            first = key.partition(".")[0]
            if any(f"{key}.".startswith(f"{common}.") for common in _COMMON):
                problems.append(f"{key} cannot be searched: it must be the same for all trials.")
            elif first in ("LOSS", "LOSS_CONFIG") and str(monitor).endswith(" loss"):
                problems.append(f"{key} cannot be searched while MONITOR is {monitor!r}: monitor a metric.")
            elif first not in KEYS:
                problems += find_problems({first: None}, self._project)[:1]
        first_values = {key: part.ends[0] for key, part in self._parts.items()}
        for one, other in itertools.combinations_with_replacement(self._parts if not problems else (), 2):
            for values in itertools.product(self._parts[one].ends, self._parts[other].ends):
                candidate = copy_config(config)
                tried = self._fitting(first_values | {one: values[0], other: values[1]})
                found = [(key, assign(candidate, key, value)) for key, value in tried.items()]
                refused = [f"{key} cannot be searched: {problem}." for key, problem in found if problem]
                problems += refused or map(self._advised, find_problems(candidate, self._project))
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))

    def _advised(self, problem: str) -> str:
        """Return a problem with advice that helps where the space itself is its cause."""
        key = problem.partition(" ")[0]
        if key not in self._parts:
            return problem
        text = problem.removesuffix(f" {key.partition('.')[0]}={{}} clears old ones.")
        return f"{text} Change or remove {key} in search_space, in hyperparameter.py."

    def first_values(self) -> dict[str, Any]:
        """Return the lowest number and the first option of each."""
        return self._fitting({key: part.ends[0] for key, part in self._parts.items()})

    def _fitting(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return values without the arguments that only other options than those chosen take."""
        return {key: value for key, value in values.items() if self._fits(key, values)}

    def _fits(self, key: str, values: dict[str, Any]) -> bool:
        able = self._able(key)
        return not able or any(values[key.partition("_CONFIG.")[0]] is option for option in able)

    def _able(self, key: str) -> list[Any]:
        """Return the options that take an argument, if there are others that do not."""
        name, _, argument = key.partition("_CONFIG.")
        part = self._parts.get(name)
        options = part.ends if isinstance(part, Choice) and argument else ()
        able = [option for option in options if takes(option, argument.partition(".")[0])]
        return able if len(able) < len(options) else []

    def suggest(self, trial: Any) -> None:
        """Draw what a trial stores, in the order in which the space is written, unless it has it already."""
        drawn: dict[str, Any] = {}
        for key, part in sorted(self._parts.items(), key=lambda item: bool(self._able(item[0]))):
            if not self._fits(key, drawn):
                continue
            if isinstance(part, Choice):
                label = trial.suggest_categorical(key, self._labels[key])
                drawn[key] = part.ends[self._labels[key].index(label)]
            elif isinstance(part.low, int):
                trial.suggest_int(key, part.low, part.high, step=part.step or 1, log=part.log)
            else:
                trial.suggest_float(key, part.low, part.high, step=part.step, log=part.log)

    def values(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Return the values that belong to what a trial has stored."""
        values = {key: stored[key] for key in self._parts if key in stored}
        for key, labels in self._labels.items():
            if key in values:
                values[key] = self._parts[key].ends[labels.index(stored[key])]
        return values

    def left_out(self, stored: dict[str, Any]) -> list[str]:
        """Return the keys that a trial has not tried."""
        return [key for key in self._parts if key not in stored]

    def text(self) -> dict[str, str]:
        """Return each part as text, for people, and to tell spaces apart."""
        choices = {key: f"Choice({', '.join(map(str, labels))})" for key, labels in self._labels.items()}
        return {key: choices.get(key) or repr(part) for key, part in self._parts.items()}


def _label(option: Any, project: Project) -> Any:
    if option is None or type(option) in (bool, int, float, str):
        return option
    captured = capture({"choice": option}, project)  # refuses what has no name
    texts = {key.removeprefix("choice").lstrip("."): text for key, text in flatten(captured).items()}
    return ", ".join(f"{key}={text}" if key else str(text) for key, text in texts.items())


def with_values(
    config: dict[str, Any], values: dict[str, Any], left_out: Iterable[str] = ()
) -> dict[str, Any]:
    """
    Return a copy of a config, live or captured, with values by dotted keys, which check has seen.

    :param left_out: dotted keys that it does not have
    """
    config = copy_config(config)
    for key in left_out:
        inner, (*places, last) = config, key.split(".")
        for place in places:
            inner = inner.get(place, {})
        inner.pop(last, None)
    for key, value in values.items():
        problem = assign(config, key, copy_config(value))
        assert problem is None, problem
    return config
