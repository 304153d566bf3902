"""
Contains what a search tries: for dotted keys of the config, ranges of numbers and choices of anything.

    search_space = {"OPTIMIZER_CONFIG.lr": log_uniform(1e-4, 1e-1), "OPTIMIZER": choice(SGD, AdamW)}
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..config.capture import capture
from ..config.check import find_problems
from ..config.errors import ConfigError, UserError
from ..config.keys import KEYS, complete, copy_config
from ..config.overrides import assign
from ..config.project import project_of
from ..config.tree import flatten

# What all trials must have in common, so that they can be compared, or what names and records them.
_COMMON = (
    *(
        "MONITOR",
        "METRICS",
        "VALIDATION_FRACTION",
        "MASK_VALUES",
        "IGNORE_INDEX",
        "DATASET_CONFIG.validation",
    ),
    *(
        "DATE",
        "SESSION_NAME",
        "ROUTINE_NAME",
        "RESUME",
        "RERUN_OF",
        "STUDY",
        "TRIAL",
        "AFTER_EPOCH",
        "LOGFILE",
    ),
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


class Choice:
    """One of some options. Trials store the labels: the option itself, where a storage can hold it, else its name."""

    def __init__(self, *options: Any) -> None:
        self.ends, self.labels = options, [_label(option) for option in options]
        if not options or len(set(self.labels)) < len(options):
            shown = ", ".join(map(str, self.labels)) or "nothing"
            raise UserError(
                f"the search space has a choice of {shown}: give at least one option, and each one once."
            )

    def __repr__(self) -> str:
        return f"Choice({', '.join(map(str, self.labels))})"


def uniform(low: float, high: float, step: float | None = None) -> Range:
    """Numbers, each as likely as any other."""
    return Range(float(low), float(high), step)


def log_uniform(low: float, high: float) -> Range:
    """Numbers, each order of magnitude as likely as any other; low is above 0."""
    return Range(float(low), float(high), log=True)


def integer(low: int, high: int, step: int | None = None, log: bool = False) -> Range:
    """Whole numbers, each as likely as any other, or with log each order of magnitude."""
    return Range(low, high, step, log)


def choice(*options: Any) -> Choice:
    """
    One of these: numbers, texts, classes, functions, dicts of arguments, ...

    :raises ConfigError: if one has no name to record
    """
    return Choice(*options)


def _label(option: Any) -> Any:
    if option is None or type(option) in (bool, int, float, str):
        return option
    captured = capture({"choice": option}, project_of(__name__))  # refuses what has no name
    texts = {key[len("choice.") :]: text for key, text in flatten(captured).items()}
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
                problems.append(
                    f"{key} cannot be searched while MONITOR is {config['MONITOR']!r}: monitor a metric."
                )
            elif first not in KEYS:
                problems += find_problems({first: None}, project_of(__name__))[:1]
        if not self._parts:
            problems.append(
                "the search space is empty: write into search_space, at the top of hyperparameter.py."
            )
        if not problems:
            for values in self._pairs():
                candidate = copy_config(config)
                found = [(key, assign(candidate, key, value)) for key, value in values.items()]
                found_now = [f"{key} cannot be searched: {problem}." for key, problem in found if problem]
                problems += found_now or find_problems(candidate, project_of(__name__))
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
        """The values of a trial, drawn in the order in which the space is written, unless it has them already."""
        stored = {}
        for key, part in self._parts.items():
            if isinstance(part, Choice):
                stored[key] = trial.suggest_categorical(key, part.labels)
            elif isinstance(part.low, int):
                stored[key] = trial.suggest_int(key, part.low, part.high, step=part.step or 1, log=part.log)
            else:
                stored[key] = trial.suggest_float(key, part.low, part.high, step=part.step, log=part.log)
        return self.values(stored)

    def values(self, stored: dict[str, Any]) -> dict[str, Any]:
        """The values that belong to what a trial has stored."""
        labels = {key: part.labels for key, part in self._parts.items() if isinstance(part, Choice)}
        return {
            key: part.ends[labels[key].index(stored[key])] if key in labels else stored[key]
            for key, part in self._parts.items()
        }

    def text(self) -> dict[str, str]:
        """For people, and to tell spaces apart."""
        return {key: repr(part) for key, part in self._parts.items()}


def with_values(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config, live or captured, with values by dotted keys."""
    config = copy_config(config)
    for key, value in values.items():
        problem = assign(config, key, copy_config(value))
        assert problem is None, problem  # check has seen to it
    return config
