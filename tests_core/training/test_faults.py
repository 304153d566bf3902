"""A training that is ended, or gets an error, at any of its file operations, resumes to the same end."""

import errno
import functools
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dida_core.storage import files as files_module
from dida_core.storage.checkpoint import checkpoint_files
from dida_core.training import signals

from .conftest import at_event
from tests.helpers import PACKAGE

KILLED = 9
KILLS = ("kill before", "kill after", "kill halfway")
ONCE = {"no space once": errno.ENOSPC, "input/output error once": errno.EIO}
FULL = "disk full from then on"
SCENARIOS = ("begins", "resumes")
KINDS = {"mkdir", "open", "write", "create", "write file", "fsync", "replace", "unlink"}
WATCHED = ("dida_core.", f"{PACKAGE}.")

NewTraining = Callable[..., Any]


class Faults:
    """Counts the file operations of the package in a child, and lets one of them go wrong."""

    def __init__(self, mode: str = "", at: int = 0) -> None:
        self.mode, self.at = mode, at
        self.kinds: list[str] = []

    def install(self) -> None:
        for name in ("write", "replace", "fsync", "open", "ftruncate", "unlink", "mkdir"):
            setattr(os, name, self.watched(name, getattr(os, name)))
        faults = self

        class WatchedFile(io.FileIO):
            """What reaches the disk of a file that is written whole or not at all."""

            def write(self, content: Any) -> int:
                return faults.call("write file", super().write, content)

        def watched_open(file: Path, mode: str, **kwargs: Any) -> Any:
            if mode == "rb":
                return open(file, mode, **kwargs)
            return io.BufferedRandom(self.call("create", WatchedFile, file, mode, **kwargs))

        files_module.open = watched_open  # type: ignore[attr-defined]

    def watched(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame.f_globals["__name__"].startswith("pathlib"):
                frame = frame.f_back  # type: ignore[assignment]
            module = frame.f_globals["__name__"]
            if not module.startswith(WATCHED) or module == signals.__name__:  # which writes to the terminal
                return function(*args, **kwargs)
            return self.call(kind, function, *args, **kwargs)

        return call

    def call(self, kind: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.kinds.append(kind)
        number = len(self.kinds)
        if number == self.at and self.mode in KILLS:
            try:
                if self.mode != "kill before":
                    function(*(halved(args) if self.mode == "kill halfway" else args), **kwargs)
            finally:
                os._exit(KILLED)
        if number == self.at and self.mode in ONCE:
            raise OSError(ONCE[self.mode], os.strerror(ONCE[self.mode]))
        if number >= self.at and self.mode == FULL and needs_space(kind, args):
            if number == self.at and kind.startswith("write"):
                return function(*halved(args), **kwargs)  # what fits is written, and said to be less
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)


def needs_space(kind: str, args: tuple[Any, ...]) -> bool:
    makes = kind in ("create", "mkdir") or (kind == "open" and bool(args[1] & os.O_CREAT))
    return kind.startswith("write") or (makes and not os.path.exists(args[0]))


def halved(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*args[:-1], bytes(args[-1])[: len(args[-1]) // 2])


class Scenarios:
    """Trainings to be disturbed: one that begins, and one that resumes after a bad end."""

    def __init__(self, new_training: NewTraining) -> None:
        self.new_training = new_training
        first = new_training()
        first.finish()
        self.end = first.end()
        first.assert_ended_as(self.end)
        # It ended with half a line in the journal after the third step, whose state was damaged then.
        self.torn = new_training()
        places = [event["event"] for event in first.events()]
        writes = [number for number, kind in enumerate(self.kinds("begins"), 1) if kind == "write"]
        assert len(writes) == len(places)
        child = self.torn.start(Faults("kill halfway", writes[places.index("epoch") + 1]).install)
        assert child.wait() and child.code == KILLED, child.said()
        assert not (self.torn.log_root / self.torn.name() / "journal.jsonl").read_bytes().endswith(b"\n")
        newest = checkpoint_files(self.torn.weight_dir())[0]
        assert newest.name == "last-00000003.pt"
        newest.write_bytes(newest.read_bytes()[:-1])

    def new(self, scenario: str) -> Any:
        training = self.new_training()
        if scenario == "resumes":
            shutil.copytree(self.torn.root, training.root, dirs_exist_ok=True)
        return training

    @functools.cache  # noqa: B019
    def kinds(self, scenario: str) -> list[str]:
        """The operations of an undisturbed training, in order."""
        training, faults = self.new(scenario), Faults()
        listed = training.root / "kinds.json"

        def setup() -> None:
            faults.install()
            train = training.routine.train

            def listing(*args: Any) -> Any:
                result = train(*args)
                listed.write_text(json.dumps(faults.kinds))
                return result

            training.routine.train = listing

        training.finish(setup=setup)
        training.assert_ended_as(self.end)
        return json.loads(listed.read_text())

    def disturb(self, scenario: str, mode: str, at: int) -> str:
        """Return how the disturbed training ended, or what is wrong then."""
        training = self.new(scenario)
        child = training.start(Faults(mode, at).install)
        child.wait()
        child.kill()  # in case it hangs
        said = child.said()
        ends = {KILLED: "killed"} if mode in KILLS else {0: "finished", 1: "refused"}
        if child.code not in ends:
            return f"wrong: it ends with {child.code}\n{said}"
        try:
            if child.code == 0:
                self.assert_right(training, said)
            training.finish()
            training.assert_ended_as(self.end)
        except AssertionError as error:
            return f"wrong after it {ends[child.code]}: {error}\n{said}"
        shutil.rmtree(training.root)  # there are many
        return ends[child.code]

    def assert_right(self, training: Any, said: str) -> None:
        """Assert that only a listener's view is wrong, such as the tracker's, and that this is reported."""
        assert training.end() == self.end
        rows = training.rows() if (training.log_root / "experiments.csv").exists() else []
        if [row["STATUS"] for row in rows] != ["finished"]:
            assert "CsvTracker failed" in said


@pytest.fixture(scope="module")
def scenarios(make_training: NewTraining, tmp_path_factory: pytest.TempPathFactory) -> Scenarios:
    folder, numbers = tmp_path_factory.mktemp("faults"), itertools.count(1)
    return Scenarios(lambda: make_training(folder / str(next(numbers))))


def some(kinds: list[str], mode: str, most: int) -> list[int]:
    """Return numbers of operations that a fault of this kind can befall, of as many kinds as there are."""
    chance, by_kind = random.Random(mode), defaultdict(list)
    numbers = [n for n, kind in enumerate(kinds, 1) if mode != "kill halfway" or kind.startswith("write")]
    for number in chance.sample(numbers, len(numbers)):
        by_kind[kinds[number - 1]].append(number)
    rounds = itertools.zip_longest(*chance.sample(list(by_kind.values()), len(by_kind)))
    return [number for number in itertools.chain.from_iterable(rounds) if number is not None][:most]


@pytest.mark.parametrize("mode", [*KILLS, *ONCE, FULL])
@pytest.mark.parametrize(
    ("scenario", "most"),
    [
        ("begins", 3),
        pytest.param("begins", 40, marks=pytest.mark.slow),
        pytest.param("resumes", 40, marks=pytest.mark.slow),
    ],
)
def test_after_a_fault_in_an_operation_it_resumes_to_the_same_end(scenarios, scenario, most, mode):
    kinds = scenarios.kinds(scenario)
    assert set(kinds) == KINDS | ({"ftruncate"} if scenario == "resumes" else set())
    assert len(kinds) > 100 and all(number > 1 for kind, number in Counter(kinds).items() if kind in KINDS)
    numbers = some(kinds, mode, most)
    ends = {number: scenarios.disturb(scenario, mode, number) for number in numbers}
    wrong = {number: end for number, end in ends.items() if end.startswith("wrong")}
    listed = ", ".join(f"{number} ({kinds[number - 1]})" for number in wrong)
    assert not wrong, f"{len(wrong)} of {len(numbers)} operations: {listed}:\n{next(iter(wrong.values()))}"
    hit = Counter(kinds[number - 1] for number in numbers)
    print(f"{len(numbers)} operations {dict(hit)}, ends {dict(Counter(ends.values()))}")


def test_a_full_disk_ends_the_run_with_one_sentence_and_the_last_checkpoint_intact(scenarios):
    training, faults = scenarios.new("begins"), Faults()

    def fill() -> None:
        faults.mode, faults.at = FULL, len(faults.kinds) + 1

    def setup() -> None:
        faults.install()
        at_event("step", 3, fill)

    child = training.start(setup)
    assert child.wait() and child.code == 1, child.said()
    sentences = [line for line in child.said().splitlines() if line.startswith("WriteError")]
    assert len(sentences) == 1 and "Traceback" not in child.said()
    assert sentences[0].startswith("WriteError: Cannot save the journal at step 3: No space left on device.")
    assert "last-00000002.pt" in sentences[0] and sentences[0].endswith(f"--resume {training.name()}")
    state = training.assert_files_are_intact()
    assert state is not None and state["state"]["step"] == 2
    training.finish()
    training.assert_ended_as(scenarios.end)


def test_a_signal_on_a_full_disk_ends_as_one_and_what_was_saved_before_is_resumed(scenarios):
    training, kinds = scenarios.new("begins"), scenarios.kinds("begins")
    # The disk refuses the midst of the third step's state, which is saved only because of the signal.
    third_step = [number for number, kind in enumerate(kinds, 1) if kind == "write"][3]
    faults = Faults("no space once", kinds.index("write file", third_step) + 1)

    def setup() -> None:
        faults.install()
        at_event("step", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))

    child = training.start(setup)
    assert child.wait() and child.code == signals.EXIT_CODE, child.said()
    assert "Cannot save checkpoint at step 3" in child.said()
    training.finish()
    training.assert_ended_as(scenarios.end)
