"""Trainings that are killed at random moments, again and again, end as if nothing had happened."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dida_core.runs import run as run_module
from dida_core.storage.journal import Journal

from tests.helpers import ROUTINES, bare, fingerprint, processes_of, scalars_of, wait_until

MOST_ATTEMPTS = 200
# PyTorch's workers look every five seconds whether their main process is alive.
WORKERS_END_WITHIN_SECONDS = 20
WORKERS = {"batch_size": 1, "shuffle": True, "num_workers": 2}

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
NewTraining = Callable[..., Any]


class Expected:
    """A training that nobody killed: how it ends, all its states on the way, and how long it takes."""

    def __init__(self, training: Any, **changes: Any) -> None:
        began = time.monotonic()
        training.finish(setup=training.take_notes, **changes)
        self.seconds = time.monotonic() - began
        self.end = training.end()
        training.assert_ended_as(self.end)
        self.states = {(note["checkpoint"], note["state"]) for note in training.read_notes("checkpoint")}
        assert {step for step, _ in self.states} == {event["step"] for event in self.end["step"]}


class Storm:
    """Kills one training at random moments until it ends, and checks after each kill that nothing is lost."""

    def __init__(self, training: Any, expected: Expected, seed: str) -> None:
        self.training, self.expected, self.chance = training, expected, random.Random(seed)
        self.counts: Counter[str] = Counter(kills=0, trainings=1)
        self.sessions: set[int] = set()

    def rage(
        self,
        setup: Callable[[], object] = lambda: None,
        after_kill: Callable[[], object] = lambda: None,
        **changes: Any,
    ) -> Counter[str]:
        """Returns how many kills there were, and how much was acknowledged before them."""

        def prepare() -> None:
            setup()
            self.training.take_notes()

        for attempt in range(MOST_ATTEMPTS):
            child = self.training.start(setup=prepare, **changes)
            self.sessions.add(child.pid)
            # Longer with each attempt, since the machine may have become slower.
            if not child.wait(self.chance.uniform(0, (1.1 + attempt / 10) * self.expected.seconds)):
                child.kill()
            assert child.code in (0, -signal.SIGKILL), f"{child.code}: {child.said()}"
            if child.code == 0:
                break
            self.counts["kills"] += 1
            after_kill()
            self.assert_nothing_is_lost()
        else:
            raise AssertionError(f"not at its end after {MOST_ATTEMPTS} attempts: {child.said()}")
        self.assert_nothing_is_lost()
        self.training.assert_ended_as(self.expected.end)
        shown = scalars_of(self.training.log_root / self.training.name())
        steps = [event["step"] for event in self.expected.end["step"]]
        assert [step for step, _ in shown["train/loss"]] == steps, (
            "TensorBoard lacks steps, or shows some twice"
        )
        for kind in ("event", "checkpoint", "row"):
            self.counts[f"acknowledged {kind}s"] = len(self.training.read_notes(kind))
        return self.counts

    def assert_nothing_is_lost(self) -> None:
        training, events = self.training, self.training.events()
        contents = [bare(event) for event in events]
        for note in training.read_notes("event"):
            event, is_there = note["event"], note["event"] in events
            if not note["is_new"]:  # it was there before, and then only the clock may differ
                is_there = bare(event) in contents
            assert is_there, f"an acknowledged event is lost: {event}"
        state = training.assert_files_are_intact()
        saved = [note["checkpoint"] for note in training.read_notes("checkpoint")]
        step = 0 if state is None else state["state"]["step"]
        assert step >= max(saved, default=0), f"an acknowledged checkpoint is lost: {max(saved)}, not {step}"
        if state is not None:
            is_right = (step, fingerprint(state)) in self.expected.states
            assert is_right, f"the checkpoint of step {step} is not what a training has there"
        names = {note["row"] for note in training.read_notes("row")}
        assert names <= {row["NAME"] for row in training.rows()}, "an acknowledged row is lost"
        assert len(training.rows()) <= 1


def storms(make: Callable[[], Any], expected: Expected, num_kills: int, **changes: Any) -> Counter[str]:
    """One training after the other, until there were so many kills."""
    total: Counter[str] = Counter()
    while total["kills"] < num_kills:
        training = make()
        seed = f"{training.routine.__name__} {total['trainings']}"
        total.update(Storm(training, expected, seed).rage(**changes))
    return total


@pytest.mark.parametrize(
    ("routine", "num_kills", "in_full", "changes"),
    [
        ("pytorch", 3, False, {}),
        pytest.param("pytorch", 5, True, {}, marks=pytest.mark.slow),
        *(pytest.param(name, 20, False, {"EPOCHS": 6}, marks=pytest.mark.slow) for name in ROUTINES),
    ],
)
def test_a_training_killed_at_random_moments_loses_nothing(
    new_training, routine, num_kills, in_full, changes
):
    def make() -> Any:
        return new_training(routine, **changes)

    counts = storms(make, Expected(make(), in_full=in_full), num_kills, in_full=in_full)
    assert counts["acknowledged events"] > 10 and counts["acknowledged checkpoints"] > 5
    print(f"{routine}: {', '.join(f'{number} {what}' for what, number in counts.items())}; 0 lost")


@pytest.mark.slow
def test_any_routine_resumes_what_was_killed_of_another(new_training):
    routines = [new_training(name).routine for name in ROUTINES if name != "lightning"]
    training = new_training("pytorch")
    storm = Storm(training, Expected(new_training("pytorch")), "mixed")

    def change() -> None:
        training.routine = storm.chance.choice(routines)

    storm.rage(after_kill=change)


@needs_proc
@pytest.mark.slow
def test_loader_workers_do_not_outlive_a_killed_training_nor_keep_it_from_resuming(new_training):
    expected = Expected(new_training(), DATA_LOADER_CONFIG=WORKERS)
    storm = Storm(new_training(), expected, "workers")
    left: list[str] = []
    storm.rage(after_kill=lambda: left.extend(processes_of(storm.sessions)), DATA_LOADER_CONFIG=WORKERS)
    assert left, "no worker was left behind by any kill"
    wait_until(lambda: not processes_of(storm.sessions), WORKERS_END_WITHIN_SECONDS)


# ----------------------------------------------------------------------------------- would it notice?


def forget_the_journal() -> None:
    Journal.write = lambda *_: True  # type: ignore[method-assign]


def forget_the_optimizer() -> None:
    restore = run_module.restore

    def restore_the_rest(setup: Any, stored: dict[str, Any], name: str) -> Any:
        return restore(setup, stored | {"optimizer": setup.optimizer.state_dict()}, name)

    run_module.restore = restore_the_rest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "noticed"),
    [
        (forget_the_journal, "an acknowledged event is lost"),
        (forget_the_optimizer, "is not what a training has there|state|step"),
    ],
)
def test_the_storm_notices_what_is_done_badly(new_training, fault, noticed):
    with pytest.raises(AssertionError, match=noticed):
        storms(new_training, Expected(new_training()), 50, setup=fault)
