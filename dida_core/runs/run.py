"""
A run's life: it starts or resumes, records batches, steps and epochs, saves, selects the best weights, stops
early or when asked to, and ends. The same for all routines.
"""

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config.tree import flatten
from ..errors import ConfigError, Preempted, UserError, printable
from ..report.console import next_steps, say
from ..report.listener import Listener, Pending, Result, State
from ..storage.checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from ..storage.journal import Event, read_journal
from ..storage.weights import WeightsError, save_weights, weights_digest
from ..training.calibration import calibrate, describe_fit
from ..training.determinism import deterministic_algorithms
from ..training.distributed import num_processes, on_main, parallel, refuse_disagreement, sum_up, sync_buffers
from ..training.evaluation import evaluate
from ..training.modules import fill_model, find_nonfinite
from ..training.optimization import learning_rate
from ..training.setup import Setup
from ..training.signals import stop_on_signals, stop_requested
from .failures import Pruned, WriteError, asks_to_end, describe_batch, explain, non_finite, write_errors
from .lookup import run_names
from .position import Batches, Position
from .record import Record, open_record, without_secrets
from .rerun import compare_runs, find_end
from .resume import check_checkpoint, load_best, restore, training_state

logger = logging.getLogger(__name__)


class Run(Position):
    """A run while it trains. Made by start_run."""

    def __init__(self, setup: Setup, name: str, state: State, history: dict[int, Event]) -> None:
        """:param history: the events of the epochs done, by epoch"""
        super().__init__(setup, state)
        self.name, self.history = name, history
        self.captured, self.redact = without_secrets(setup)
        self.log_dir = Path(setup.experiment.global_config["LOG_DIR"]) / name
        self.weight_dir = Path(setup.experiment.global_config["WEIGHT_DIR"]) / name
        self.pending = Pending()
        self.record: Record | None = None  # in the main process, as are the listeners
        self.listeners: list[Listener] = []
        self._reported: set[str] = set()  # failures of listeners
        self._phase = "training"  # then "evaluation" (the model may hold the best weights), "finished"
        self._stop = False
        self._started = time.monotonic() - state.seconds
        self._last_checkpoint = time.monotonic()

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the model with gradients averaged over all processes: to be called, not to be saved."""
        return parallel(model, self.setup.context.device)

    def epochs(self) -> Iterator[int]:
        """Iterate over the epochs that are left, counted from 1, until the last one or an early stop."""
        while self.epochs_left:
            yield self.state.epoch + 1

    def batches(self) -> Batches:
        """Return the rest of the epoch: moved to the device, and dropout reseeded for each batch."""
        return Batches(self.setup, self.state)

    def log(self, name: str, value: float) -> None:
        """Log a value of your own; journal and TensorBoard show it with the next step or epoch."""
        self.pending.values[f"log.{name}"] = float(value)

    def log_image(self, name: str, image: Any) -> None:
        """Log an image (H, W, 3) in uint8; TensorBoard and images/ get it with the next step or epoch."""
        self.pending.images[name] = image

    def end_batch(self, loss: Tensor) -> None:
        """
        Record a batch, after its backward pass. Reading the loss waits for the GPU.

        :param loss: of this process's samples
        :raises NonFiniteLoss: with the step, the batch's files and the last good checkpoint
        """
        state, batches, value = self.state, self.setup.loaders.batches, loss.item()
        num_samples = batches.size(state.batch)
        self._stop = stop_requested()
        if num_processes() > 1:
            own = batches.own_size(state.batch)
            loss_sum, stops = sum_up([value * own if own else 0.0, self._stop])
            value, self._stop = loss_sum / num_samples, stops > 0
        if not math.isfinite(value):
            raise non_finite(f"the loss is {value} in {describe_batch(self.setup, state)}", self.weight_dir)
        state.batch += 1
        state.loss_sum += value * num_samples
        state.num_samples += num_samples
        self.pending.losses.append(value)
        self.pending.learning_rate = learning_rate(self.setup.optimizer.param_groups[0])

    def end_step(self) -> None:
        """
        Record an optimizer step, and save a checkpoint when it is time.

        :raises Preempted: if a signal has asked to end; start_run saves a checkpoint then
        """
        state, losses = self.state, self.pending.losses
        state.step += 1
        event = {"event": "step", "step": state.step, "epoch": state.epoch + 1}
        event |= {"loss": sum(losses) / len(losses), "learning_rate": self.pending.learning_rate}
        self._publish(event, lambda listener, event: listener.step(self, event))
        if self.awaits_evaluation:
            sync_buffers(self.setup.model, self.setup.ema)
        if self._stop:
            raise Preempted("a signal was received")
        if self._is_checkpoint_due():
            self.save_checkpoint()

    def end_epoch(self, results: dict[str, float]) -> None:
        """
        Record the end of an epoch: select the best weights, decide on stopping early.

        :param results: of the validation set; empty where there is none
        :raises Pruned: if AFTER_EPOCH asks to end
        """
        state, patience, after_epoch = self.state, self.config["PATIENCE"], self.config["AFTER_EPOCH"]
        value = results.get(self.monitored)
        state.epoch += 1
        is_best = self._is_better(value)
        if is_best:
            state.best, state.best_epoch, state.bad_epochs = value, state.epoch, 0
            self._save_best()
        else:
            state.bad_epochs += 1
            state.stopped = patience is not None and state.bad_epochs >= patience
        event = {"event": "epoch", "epoch": state.epoch, "step": state.step, "best": is_best}
        event["train.loss"] = state.loss_sum / max(1, state.num_samples)
        event |= {f"validation.{name}": result for name, result in results.items()}
        event["seconds"] = round(self._seconds(), 2)
        state.batch, state.num_samples, state.loss_sum = 0, 0, 0.0
        self.history[state.epoch] = event
        self._publish(event, lambda listener, event: listener.epoch(self, event))
        is_pruned = after_epoch is not None and on_main(lambda: asks_to_end(after_epoch(self)))
        if self._is_checkpoint_due() or not checkpoint_files(self.weight_dir):
            self.save_checkpoint()  # with what AFTER_EPOCH has done, such as layers that it has thawed
        if is_pruned:
            raise Pruned(f"pruned after epoch {state.epoch}")

    def save_checkpoint(self) -> None:
        """
        Save the training state, after an optimizer step.

        :raises NonFiniteLoss: if a parameter is NaN or infinite; such a state is not saved
        :raises WriteError: if the disk does not take it; the previous checkpoint is intact
        """
        step, both = self.state.step, nn.ModuleList([self.setup.model, self.setup.loss_fn])
        if (problem := find_nonfinite(both)) is not None:
            raise non_finite(f"after step {step} a parameter is not finite ({problem})", self.weight_dir)
        self._last_checkpoint = time.monotonic()
        if self.record is not None:
            self.state.seconds = self._seconds()
            with write_errors(f"checkpoint at step {step}", self.weight_dir):
                self.record.journal.sync()
                content = training_state(self.setup, self.state, self.history)
                save_checkpoint(self.weight_dir, step, content | {"started": self.record.started})

    def finish(self) -> Result:
        """
        Save the last state, fit temperature and thresholds to the best weights, and evaluate these once on
        the test set, as prediction will use them.

        :raises Preempted: if a signal has asked to end; a resumed run evaluates again
        """
        setup, state = self.setup, self.state
        self.save_checkpoint()
        self._phase = "evaluation"
        digest = weights_digest(setup.model.state_dict())
        best, last = self.weight_dir / "best.pt", on_main(lambda: checkpoint_files(self.weight_dir)[0])
        fill_model(setup.eval_model, on_main(self._load_best), str(best))
        epoch = self.history.get(state.best_epoch or 0, {})
        metrics = {key: value for key, value in epoch.items() if key.startswith("validation.")}
        if (fitted := calibrate(setup, setup.eval_model)) is not None:
            setup.contract = fitted
            on_main(self._save_best)
            metrics |= {f"validation.{name}": value for name, value in describe_fit(fitted).items()}
        evaluation = None
        if setup.loaders.test is not None:
            evaluation = setup.metrics(setup.contract)
            results = evaluate(setup.eval_model, setup.loaders.test, evaluation, setup.context)
            metrics |= {f"test.{name}": value for name, value in results.items()}
        state.seconds = self._seconds()
        identical, comparison = on_main(lambda: self._compare(digest))
        event = {"event": "test", "step": state.step, "digest": digest, "seconds": round(state.seconds, 1)}
        event["best_digest"] = weights_digest(setup.eval_model.state_dict())
        self._write(event | ({} if identical is None else {"identical": identical}) | metrics)
        self._phase = "finished"
        result = Result(
            name=self.name,
            log_dir=self.log_dir,
            weight_dir=self.weight_dir,
            weights={"best": best, "last": last},
            digest=digest,
            metrics=metrics,
            history=[self.history[epoch] for epoch in sorted(self.history)],
            state=state,
            identical=identical,
            evaluation=evaluation,
        )
        self.tell(lambda listener: listener.finished(self, result))
        if comparison:
            say(comparison)
        return result

    def _publish(self, event: Event, tell: Callable[[Listener, Event], None]) -> None:
        """Write an event with the values of the user's own, and tell the listeners of it."""
        event |= self.pending.values
        self._write(event)
        self.tell(lambda listener: tell(listener, event))
        self.pending = Pending()

    def _write(self, event: Event) -> None:
        if self.record is not None:
            with write_errors(f"the journal at step {self.state.step}", self.weight_dir):
                self.record.write(event)

    def tell(self, action: Callable[[Listener], None]) -> None:
        """Do something with each listener. An ordinary failure of one is reported once."""
        for listener in self.listeners:
            try:
                action(listener)
            except Exception as error:  # whatever a listener raises, the training is worth more
                text = self.redact(f"{type(listener).__name__} failed ({type(error).__name__}: {error}).")
                logger.debug(text)
                if text not in self._reported:
                    self._reported.add(text)
                    say(f"{text} Training continues.")

    def _seconds(self) -> float:
        """Return the seconds of training, over all interruptions."""
        return time.monotonic() - self._started

    def _is_checkpoint_due(self) -> bool:
        return time.monotonic() - self._last_checkpoint >= self.config["CHECKPOINT_SECONDS"]

    def _is_better(self, value: float | None) -> bool:
        """Return whether a monitored result is better than the best one so far."""
        best = self.state.best
        if self.setup.loaders.validation is None:
            return True  # nothing to select by: the last weights are the best
        if value is None or math.isnan(value):
            return self.state.best_epoch is None  # there is always something to predict with
        if best is None or math.isnan(best):
            return True
        return value > best if self.config["MONITOR"].startswith("max") else value < best

    def _save_best(self) -> None:
        """Save the weights that are evaluated, with the data contract, as the best ones."""
        state, weights = self.state, self.setup.eval_model.state_dict()
        before, state.best_digest = state.best_digest, weights_digest(weights)
        if self.record is not None:
            content = {"model": weights, "contract": self.setup.contract.to_dict(), "run": self.name}
            with write_errors(f"the best weights at step {state.step}", self.weight_dir):
                if state.best_digest != before:  # first, so that a file after the checkpoint is known as ours
                    self._write({"event": "best", "epoch": state.best_epoch, "digest": state.best_digest})
                save_weights(self.weight_dir / "best.pt", content)

    def _load_best(self) -> dict[str, Tensor]:
        """Return the best weights, in the main process."""
        assert self.record is not None
        events = read_journal(self.record.journal.path, without="step")
        weights, state = load_best(self.weight_dir, self.state.best_digest, events), self.state
        if state.best_digest not in (None, weights_digest(weights)):
            say(f"best.pt is of a later epoch than {state.best_epoch}, before the interruption: it is used.")
        return weights

    def _compare(self, digest: str) -> tuple[bool | None, str]:
        """Return whether the last weights are identical with those of RERUN_OF, and a sentence."""
        if self.config["RERUN_OF"] is None:
            return None, ""
        events = read_journal(self.log_dir / "journal.jsonl")
        assert self.record is not None
        differences = self.record.differences
        return compare_runs(self.log_dir.parent / self.config["RERUN_OF"], events, digest, differences)

    def end(self, error: BaseException) -> None:
        """Record an end without a result, and report how to resume."""
        resume = f"Resume it with: {next_steps(self)['resume']}"
        if isinstance(error, Preempted):

            def preempt() -> None:
                if self._phase == "training" and self.state.step > 0:
                    try:
                        self.save_checkpoint()
                    except UserError as failure:
                        say(f"{failure}")
                self._record_end("preempted", error)
                say(f"Ended by a signal after step {self.state.step}. {resume}")

            with contextlib.suppress(RuntimeError):  # of a process that was killed
                on_main(preempt)  # all wait for it: torchrun ends those that are left
        elif isinstance(error, KeyboardInterrupt):
            self._record_end("interrupted", error)
            files = checkpoint_files(self.weight_dir)
            say(f"Interrupted; {files[0].name if files else 'nothing'} was saved. {resume}")
        else:
            self._record_end("pruned" if isinstance(error, Pruned) else "failed", error)

    def _record_end(self, status: str, error: BaseException) -> None:
        """Record an end. A finished run stays finished, whatever happens to its pictures."""
        if self._phase != "finished":
            text = self.redact(f"{type(error).__name__}: {error}")
            text = printable(" ".join(text.split()))[:500]
            event = {"event": "end", "status": status, "error": text, "seconds": round(self._seconds(), 1)}
            with contextlib.suppress(WriteError):  # of a full disk, which the run may have ended by
                self._write(event)
        self.tell(lambda listener: listener.ended(self, status, error))


@contextlib.contextmanager
def start_run(setup: Setup, listeners: Iterable[Listener] = ()) -> Iterator[Run]:
    """
    Start a run, or resume the one that RESUME names; from here on things are written.

    :param listeners: get to know what happens in the run, in this order
    :raises Preempted: if a signal has asked to end, after saving
    :raises Pruned: if AFTER_EPOCH has asked to end
    :raises OutOfMemory: instead of the many errors that mean it
    """
    with stop_on_signals(), deterministic_algorithms(setup.context.device), contextlib.ExitStack() as stack:
        for loader in (setup.loaders.train, setup.loaders.validation, setup.loaders.test):
            if loader is not None:
                stack.callback(loader.close)
        run = _open_run(setup, list(listeners), stack)
        try:
            run.tell(lambda listener: listener.started(run))
            yield run
        except BaseException as error:
            explained = explain(error, setup)
            run.end(explained)
            if explained is error:
                raise
            raise explained from error


def _open_run(setup: Setup, listeners: list[Listener], stack: contextlib.ExitStack) -> Run:
    """Open the files of a run in the main process, and restore its state in all of them."""
    captured, _ = without_secrets(setup)
    refuse_disagreement(_shared_facts(setup, captured))
    records: list[Record] = []  # one in the main process, none in others

    def open_files() -> tuple[str, dict[str, Any] | None]:
        for listener in listeners:
            listener.check(setup)
        if (repeated := setup.config["RERUN_OF"]) is not None:
            log_root = Path(setup.experiment.global_config["LOG_DIR"])
            if repeated not in run_names(log_root):
                raise ConfigError([f"RERUN_OF is {repeated!r}: there is no such run in {log_root}."])
            find_end(log_root / repeated)
        record = open_record(setup, captured, stack)
        records.append(record)
        if not record.is_resumed:
            return record.name, None
        stored = load_checkpoint(record.weight_dir, say)
        if stored is None:
            say(f"{record.name} has no intact checkpoint: it starts again.")
        else:
            folders = record.log_dir, record.weight_dir
            with _checkpoint_errors(record.name):
                check_checkpoint(stored, record.started, record.journal.events, *folders)
        return record.name, stored

    def begin() -> None:
        run.record, run.listeners = records[0], listeners
        with write_errors("the start of the run", run.weight_dir):
            records[0].begin(setup, run.state)
            for event in run.history.values():
                records[0].write(event)  # is there already, unless the journal was damaged

    name, stored = on_main(open_files)
    with _checkpoint_errors(name):
        state, history = (State(), {}) if stored is None else restore(setup, stored, name)
    run = Run(setup, name, state, history)
    on_main(begin)
    return run


@contextlib.contextmanager
def _checkpoint_errors(name: str) -> Iterator[None]:
    """Turn what a checkpoint that is none of this training leads to into one sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise WeightsError(f"the checkpoint of {name} is none of this training ({error!r}).") from error


def _shared_facts(setup: Setup, captured: dict[str, Any]) -> dict[str, Any]:
    """Return what all processes must agree in; folders and devices may have other names on other machines."""
    config = flatten(captured["config"] | {key: setup.config[key] for key in ("RESUME", "RERUN_OF")})
    ignored = ("DATE", "DEVICE", "DATASET_CONFIG", "INIT_WEIGHTS", "NOTIFY", "LOGFILE")
    files = [(name, fact["sha256"]) for name, fact in sorted(setup.data.hashes.items())]
    return {key: value for key, value in config.items() if not key.startswith(ignored)} | {
        "data (its files differ)": hashlib.sha256(repr(files).encode()).hexdigest(),
        "data contract": setup.contract.to_dict(),
        "number of batches": setup.loaders.batches.num_batches,
    }
