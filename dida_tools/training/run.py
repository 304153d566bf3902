"""
Contains a run's life: it begins or goes on, takes note of batches, steps and epochs, saves, selects the best weights,
stops early or when asked to, and ends. The same for all routines.

What is written while it trains is in record.py, what is printed in progress.py.
"""

import contextlib
import copy
import gc
import hashlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.errors import UserError
from ..config.tree import flatten
from ..utils.logging.journal import read_journal
from ..utils.path import create_dirs, shown
from ..utils.redact import Redactor
from ..utils.signals import Preempted, stop_on_signals, stop_requested
from ..utils.weights import load_weights, save_weights, weights_digest
from .calibration import calibrate, describe_fit
from .checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from .determinism import deterministic_algorithms
from .distributed import is_main, num_processes, on_main, refuse_disagreement, sum_up, sync_buffers
from .environment import describe_environment
from .evaluation import evaluate
from .modules import fill_model, find_nonfinite, is_out_of_memory
from .notification import Notification
from .optimization import build_scheduler
from .pictures import choose_samples, make_panels, save_picture
from .progress import Progress, say
from .record import Record, Silent
from .rerun import compare_runs, differences_from, find_end
from .setup import Setup

_HEARTBEAT_SECONDS = 60


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite."""


class OutOfMemory(UserError):
    """The memory of the device did not suffice."""


class Pruned(BaseException):
    """AFTER_EPOCH asked to end. No Exception, so that nobody who catches those goes on as if nothing were."""


@dataclass
class State:
    """Where a training stands."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done of the current epoch
    step: int = 0  # optimizer steps done
    loss_sum: float = 0.0  # over the samples of the current epoch
    num_samples: int = 0
    best: float | None = None
    best_epoch: int | None = None  # counted from 1
    bad_epochs: int = 0  # since the best one
    stopped: bool = False  # early
    seconds: float = 0.0  # of training, over all interruptions


@dataclass
class Result:
    """What a training leaves."""

    name: str
    log_dir: Path
    weight_dir: Path
    weights: dict[str, Path]  # "best" and "last"
    digest: str  # of the last weights; equal for runs that are equal bit for bit
    metrics: dict[str, float]  # "validation.f1" of the best epoch, "test.f1", ...
    history: list[dict[str, Any]]  # one dict an epoch
    picture: Path | None = None
    state: State = field(default_factory=State)
    identical: bool | None = None  # with RERUN_OF: whether the weights are those of that run


class RemainingBatches:
    """The batches of the current epoch that are not done yet, each time it is iterated over."""

    def __init__(self, setup: Setup, state: State) -> None:
        self._setup, self._state = setup, state

    def __len__(self) -> int:
        return self._setup.loaders.batches.num_batches - self._state.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._setup.loaders.batches
        order.epoch, order.first_batch = self._state.epoch, self._state.batch
        if order.first_batch < order.num_batches:
            yield from self._setup.loaders.train


class Run:
    """A run while it trains. Made by start_run."""

    def __init__(self, setup: Setup, global_config: dict[str, str]) -> None:
        self.setup, self.config, self.global_config = setup, setup.config, global_config
        self.redactor = Redactor(config=self.config)  # keeps secrets out of what is written
        self.captured = setup.captured | {"config": self.redactor.config(setup.captured["config"])}
        self.state = State()
        self.history: dict[int, dict[str, Any]] = {}
        self.batches = RemainingBatches(setup, self.state)
        self.record: Any = Silent()
        self.progress: Any = Silent()
        self.notification: Any = Silent()
        self._say = say if is_main() else lambda text: None
        self._step_losses: list[float] = []
        self._stop = False
        self._can_save = True  # while the model holds the training's weights
        self._best: dict[str, Any] | None = None  # the best weights, until they are on the disk
        if self.config["NOTIFY"] is not None and is_main():
            self.notification = Notification(setup, self.redactor)
        try:
            refuse_disagreement(_given(setup, self.captured))
            self.name, stored = on_main(self._open)
            self.log_dir = Path(global_config["LOG_DIR"]) / self.name
            self.weight_dir = Path(global_config["WEIGHT_DIR"]) / self.name
            self._restore(stored)
            on_main(self._begin)
        except BaseException:
            self.record.close()
            self.notification.close()
            raise
        self.notification.started(self)
        self._started = time.monotonic() - self.state.seconds
        self._last_checkpoint = time.monotonic()

    # ------------------------------------------------------------------------------------------ what a routine calls

    @property
    def batch_number(self) -> int:
        """The number of the batch that comes next, counted over all epochs."""
        return self.state.epoch * self.setup.loaders.batches.num_batches + self.state.batch

    @property
    def loss_weight(self) -> float:
        """
        What the next batch's loss counts in its optimizer step: 1 / ACCUMULATE, or more at the epoch's end, where there
        are fewer batches; in each of several processes, whose gradients are averaged, by its part of the samples.
        """
        batches, batch, accumulate = (
            self.setup.loaders.batches,
            self.state.batch,
            self.config["ACCUMULATE"],
        )
        share = batches.own_size(batch) * batches.num_processes / batches.size(batch)
        return share / min(accumulate, batches.num_batches - (batch - batch % accumulate))

    @property
    def awaits_evaluation(self) -> bool:
        """Whether all batches of the epoch are done, but not its evaluation; so goes on what was interrupted there."""
        return self.state.batch == self.setup.loaders.batches.num_batches

    def record_batch(self, loss: float) -> bool:
        """
        Takes note of a batch, after its backward pass.

        :param loss: of this process's samples
        :return: whether an optimizer step follows
        :raises NonFiniteLoss: with the step, the batch's files and the last good checkpoint
        """
        state, batches = self.state, self.setup.loaders.batches
        num_samples = batches.size(state.batch)
        self._stop = stop_requested()
        if num_processes() > 1:
            own = batches.own_size(state.batch)
            loss_sum, stops = sum_up([loss * own if own else 0.0, self._stop])
            loss, self._stop = loss_sum / num_samples, stops > 0
        if not math.isfinite(loss):
            raise NonFiniteLoss(self._about_non_finite(loss))
        state.batch += 1
        state.loss_sum += loss * num_samples
        state.num_samples += num_samples
        self._step_losses.append(loss)
        self.progress.batch(state, num_samples)
        return state.batch % self.config["ACCUMULATE"] == 0 or self.awaits_evaluation

    def record_step(self, learning_rate: float) -> None:
        """
        Takes note of an optimizer step, and saves a checkpoint when it is time.

        :raises Preempted: after saving, if a signal has asked to end
        """
        state = self.state
        state.step += 1
        loss = sum(self._step_losses) / len(self._step_losses)
        self._step_losses.clear()
        event = {"event": "step", "step": state.step, "epoch": state.epoch + 1, "loss": loss}
        self.record.write(event | {"learning_rate": learning_rate})
        if self.awaits_evaluation:
            sync_buffers(self.setup.model, self.setup.ema)
        if self._stop:
            raise Preempted("a signal was received")
        if time.monotonic() - self._last_checkpoint >= self.config["CHECKPOINT_SECONDS"]:
            self._save_checkpoint_if_possible()
        self.record.write_row(older_than_seconds=_HEARTBEAT_SECONDS)

    def record_epoch(self, results: dict[str, float]) -> None:
        """
        Takes note of the end of an epoch: selects the best weights, decides on stopping early.

        :param results: of the validation set; empty where there is none
        :raises Pruned: if AFTER_EPOCH asks to end
        """
        state, value = self.state, results.get(self.monitored)
        state.epoch += 1
        improved = self._is_better(value)
        if improved:
            state.best, state.best_epoch, state.bad_epochs = value, state.epoch, 0
            self._best = self._weights_and_contract() if is_main() else None
            self._save_best_if_possible()
        else:
            state.bad_epochs += 1
            state.stopped = (
                self.config["PATIENCE"] is not None and state.bad_epochs >= self.config["PATIENCE"]
            )
        train_loss = state.loss_sum / max(1, state.num_samples)
        values = {"train.loss": train_loss} | {
            f"validation.{name}": result for name, result in results.items()
        }
        event = {"event": "epoch", "epoch": state.epoch, "step": state.step, "best": improved} | values
        event["seconds"] = round(time.monotonic() - self._started, 2)
        self.history[state.epoch] = event
        self.record.write_epoch(event)
        if is_main():
            for panel in self._panels():
                self.record.board.write_image(f"test/{panel.name}", panel.row(), state.step)
        state.batch, state.num_samples, state.loss_sum = 0, 0, 0.0
        self.progress.epoch(state, train_loss, results, improved)
        is_time = time.monotonic() - self._last_checkpoint >= self.config["CHECKPOINT_SECONDS"]
        if is_time or not checkpoint_files(self.weight_dir):
            self._save_checkpoint_if_possible()
        self.record.write_row()
        if self.config["AFTER_EPOCH"] is not None and on_main(lambda: self.config["AFTER_EPOCH"](self)):
            raise Pruned(f"not worth more after epoch {state.epoch}")

    def _save_checkpoint_if_possible(self) -> None:
        """Saves the training state. On a full disk training goes on, and the next time may find space."""
        try:
            self.save_checkpoint()
        except OSError as error:
            self._say(
                f"The state after step {self.state.step} could not be saved ({error.strerror or error}): free some "
                "space; what was saved before is whole, and training goes on."
            )

    def save_checkpoint(self) -> None:
        """
        Saves the training state, after an optimizer step, and what has to be on the disk before it.

        :raises NonFiniteLoss: if a parameter is NaN or infinite; such a state is not saved
        :raises OSError: if it cannot be written, such as on a full disk; what was saved before is still there
        """
        setup = self.setup
        problem = find_nonfinite(setup.model)
        if problem is not None:
            raise NonFiniteLoss(
                f"after step {self.state.step} a parameter is not finite ({problem}). {self._advice()}"
            )
        self._last_checkpoint = time.monotonic()
        if not is_main():
            return
        self._save_best()
        self.record.sync()
        self.state.seconds = time.monotonic() - self._started
        scheduler, ema = setup.scheduler, setup.ema
        save_checkpoint(
            self.weight_dir,
            self.state.step,
            {
                "model": setup.model.state_dict(),
                "optimizer": setup.optimizer.state_dict(),
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                "scaler": setup.scaler.state_dict(),
                "ema": None if ema is None else ema.state_dict(),
                "state": asdict(self.state),
                "history": list(self.history.values()),
                "contract": setup.contract.to_dict(),
                "epochs": self.config["EPOCHS"],
            },
        )

    def finish(self) -> Result:
        """
        Saves the last state, fits temperature and thresholds to the best weights, evaluates these once on the test set,
        as prediction will use them, and says what was reached.

        :raises Preempted: if a signal has asked to end; going on evaluates again
        """
        setup, state = self.setup, self.state
        self.progress.close()
        self.save_checkpoint()
        self._can_save = False  # from here on, the model may hold the best weights
        digest = weights_digest(setup.model.state_dict())
        best = self.weight_dir / "best.pt"
        model = setup.eval_model
        fill_model(model, on_main(lambda: load_weights(best)["model"]), str(best))
        chosen = self.history.get(state.best_epoch or 0, {})
        metrics = {key: value for key, value in chosen.items() if key.startswith("validation.")}
        fitted, about_fit = calibrate(setup, model), {}
        if fitted is not None:
            setup.contract = fitted
            self._best = self._weights_and_contract() if is_main() else None  # the same weights
            on_main(self._save_best)
            about_fit = {f"validation.{name}": value for name, value in describe_fit(fitted).items()}
            metrics |= about_fit
        contract = setup.contract
        counts: Any = None
        panels: list[Any] = []
        if setup.loaders.test is not None:
            evaluation = setup.metrics(contract)
            results = evaluate(model, setup.loaders.test, evaluation, setup.context)
            metrics |= {f"test.{name}": value for name, value in results.items()}
            counts = None if evaluation.scores is None else evaluation.scores.confusion
            if is_main():
                if evaluation.scores is not None:
                    self.record.board.write_pr_curves(evaluation.scores, contract.class_names, state.step)
                order: Any = setup.loaders.test.batch_sampler
                losses, seed = evaluation.sample_losses, self.config["SEED"]
                panels = self._panels(choose_samples(setup.data.test, order.order, losses, seed))
        self.record.write_scalars(
            {name.replace(".", "/"): value for name, value in about_fit.items()}, state.step
        )
        self.record.write_results(metrics, state.step)
        picture = self.log_dir / "picture.png"
        history = [self.history[epoch] for epoch in sorted(self.history)]
        if is_main():  # <- your report here
            save_picture(picture, self.name, history, self.monitored, counts, panels, contract.class_names)
        seconds = round(time.monotonic() - self._started, 1)
        about: dict[str, Any] = {"step": state.step, "digest": digest, "seconds": seconds}
        identical, comparison = None, ""
        if self.config["RERUN_OF"] is not None:
            identical, comparison = on_main(lambda: self._compare(digest))
            about["identical"] = identical
        self.record.write({"event": "test"} | about | metrics)
        self.record.sync()
        self.record.say_contradictions()
        self.record.write_row()
        last = on_main(lambda: checkpoint_files(self.weight_dir)[0])
        weights = {"best": best, "last": last}
        folders = (self.log_dir, self.weight_dir)
        result = Result(self.name, *folders, weights, digest, metrics, history, picture, state, identical)
        self.notification.finished(self, result)
        self.progress.end(result, seconds, self.record.log_file)
        if comparison:
            self._say(comparison)
        return result

    # ------------------------------------------------------------------------------------------------------ beginning

    def _compare(self, digest: str) -> tuple[bool, str]:
        events = read_journal(self.record.journal.path)
        return compare_runs(self.log_dir.parent / self.config["RERUN_OF"], events, digest)

    def _open(self) -> tuple[str, dict[str, Any] | None]:
        if self.config["RERUN_OF"] is not None:
            find_end(Path(self.global_config["LOG_DIR"]) / self.config["RERUN_OF"])
        self.record = Record(self.config, self.captured, self.global_config, self._say)
        if not self.record.goes_on:
            return self.record.name, None
        stored = load_checkpoint(self.record.weight_dir, self._say)
        if stored is None:
            self._say(f"{self.record.name} has no checkpoint that is whole: it starts again.")
        return self.record.name, stored

    def _begin(self) -> None:
        setup, state = self.setup, self.state
        create_dirs(self.weight_dir)
        ran_on = {"device": str(setup.context.device), "precision": setup.context.precision}
        redactor = self.redactor
        environment = (
            describe_environment(setup.project.root, setup.context.device)
            | {"data": setup.data.hashes}
            | ran_on
        )
        environment = redactor.data(environment) | {"arguments": redactor.arguments(sys.argv)}
        start = {"step": state.step, "epoch": state.epoch, "best_epoch": state.best_epoch} | ran_on
        start["processes"] = num_processes()
        if self.config["RERUN_OF"] is not None:
            for difference in differences_from(self.log_dir.parent / self.config["RERUN_OF"], environment):
                self._say(f"Not as it was: {difference}")
        reasons = [setup.not_rerunnable] if setup.not_rerunnable else []
        if self.captured != setup.captured:
            reasons.append("the config holds a secret")
        self.record.begin(start, environment, "; ".join(reasons + self.record.changes_on_the_way(start)))
        self.record.open_tensorboard(state.step, self.awaits_evaluation)
        for event in self.history.values():
            self.record.write(event)  # is there already, unless the journal was damaged
        self.progress = Progress(self.name, setup, state, self.monitored)

    def _restore(self, stored: dict[str, Any] | None) -> None:
        """Takes up a training state."""
        if stored is None:
            return
        setup = self.setup
        if stored["contract"] != setup.contract.to_dict():
            self._say(
                f"{self.name}: the training data is not what it was: its channels, scale or statistics have changed."
            )
        fill_model(setup.model, stored["model"], str(self.weight_dir))
        setup.optimizer.load_state_dict(stored["optimizer"])
        self._restore_schedule(stored)
        setup.scaler.load_state_dict(stored["scaler"])
        if setup.ema is not None and stored["ema"] is not None:
            setup.ema.load_state_dict(stored["ema"])
        vars(self.state).update(stored["state"])  # in place: batches has the same one
        self.history = {event["epoch"]: event for event in stored["history"]}
        if self.config["EPOCHS"] > stored["epochs"] and self.state.stopped:
            self.state.stopped, self.state.bad_epochs = False, 0
        self._say(f"{self.name} goes on after epoch {self.state.epoch}, step {self.state.step}.")

    def _restore_schedule(self, stored: dict[str, Any]) -> None:
        scheduler = self.setup.scheduler
        if scheduler is None or stored["scheduler"] is None:
            return
        saved = stored["scheduler"]
        if stored["epochs"] != self.config["EPOCHS"]:
            # The length of the training is part of some schedules. What a new one of the old length already knows is no
            # state, but comes from the config, so the rest is what has to be restored.
            rates = [group["lr"] for group in self.setup.optimizer.param_groups]
            old_config = self.config | {"EPOCHS": stored["epochs"]}
            optimizer = self.config["OPTIMIZER"](
                [torch.zeros(1, requires_grad=True)], **self.config["OPTIMIZER_CONFIG"]
            )
            fresh = build_scheduler(old_config, optimizer, self.setup.steps_per_epoch)
            assert fresh is not None
            as_built = fresh.state_dict()
            saved = {key: value for key, value in saved.items() if value != as_built.get(key)}
            scheduler.load_state_dict(scheduler.state_dict() | saved)
            for group, rate in zip(self.setup.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        else:
            scheduler.load_state_dict(saved)

    # ------------------------------------------------------------------------------------------------------ selection

    @property
    def monitored(self) -> str:
        """Name of the result that selects the best weights."""
        goal = self.config["MONITOR"].split()[1]
        metric = self.config["METRICS"].get(goal)
        return goal if metric is None or hasattr(metric, "from_counts") else f"{goal}_sample_mean"

    def _is_better(self, value: float | None) -> bool:
        if self.setup.loaders.validation is None:
            return True  # nothing to select by: the last weights are the best
        if value is None or math.isnan(value):
            return self.state.best_epoch is None  # there is always something to predict with
        if self.state.best is None or math.isnan(self.state.best):
            return True
        return (
            value > self.state.best if self.config["MONITOR"].startswith("max") else value < self.state.best
        )

    def _save_best(self) -> None:
        """Writes the best weights, if they are not on the disk yet."""
        if self._best is not None:
            save_weights(self.weight_dir / "best.pt", self._best)
            self._best = None

    def _save_best_if_possible(self) -> None:
        try:
            self._save_best()
        except OSError as error:
            self._best = copy.deepcopy(self._best)  # the model will go on changing
            why = error.strerror or error
            self._say(
                f"The best weights could not be saved ({why}): they are kept, and written when they can be."
            )

    def _weights_and_contract(self) -> dict[str, Any]:
        model = self.setup.eval_model
        return {"model": model.state_dict(), "contract": self.setup.contract.to_dict()}

    def _panels(self, samples: dict[int, str] | None = None) -> list[Any]:
        setup = self.setup
        if setup.data.test is None:
            return []
        model, contract = setup.eval_model, setup.contract
        ignored = self.config["IGNORE_INDEX"]
        return make_panels(model, setup.data.test, contract, setup.context, ignored, samples)

    # ------------------------------------------------------------------------------------------------------------ end

    def end(self, status: str, error: BaseException) -> None:
        """Takes note that the run ends without a result."""
        self.progress.close()
        text = self.redactor.text(" ".join(f"{type(error).__name__}: {error}".split()))
        self.record.end(status, text[:500], round(time.monotonic() - self._started, 1))
        self.notification.ended(self, status, error)

    def preempt(self, error: Preempted) -> None:
        """Saves the state of the last step and takes note. All wait for that: torchrun ends those that are left."""
        with contextlib.suppress(RuntimeError):  # of a process that was killed
            on_main(lambda: self._preempt(error))

    def _preempt(self, error: Preempted) -> None:
        try:
            if self._can_save and self.state.step > 0:
                self.save_checkpoint()
        except (OSError, UserError) as failure:  # what was saved before is still there
            self._say(f"The last state could not be saved: {failure}")
        self.end("preempted", error)
        self._say(f"Ended by a signal after step {self.state.step}. {self._how_to_go_on()}")

    def interrupt(self, error: BaseException) -> None:
        """Takes note of an end at once, of which nothing was to be saved."""
        self.end("interrupted", error)
        files = checkpoint_files(self.weight_dir)
        self._say(f"Interrupted; {files[0].name if files else 'nothing'} was saved. {self._how_to_go_on()}")

    def close(self) -> None:
        """Ends all writing, and the processes that load data."""
        setup = self.setup
        self.progress.close()
        for loader in (setup.loaders.train, setup.loaders.validation, setup.loaders.test):
            if loader is not None:
                loader.close()
        self.record.close()
        self.notification.close()

    def _how_to_go_on(self) -> str:
        return f"It goes on with: python train.py --resume {self.name}"

    def _about_non_finite(self, loss: float) -> str:
        indices = self.setup.loaders.batches.indices(self.state.epoch, self.state.batch)
        name_of = getattr(self.setup.data.train, "sample_name", lambda index: f"sample {index}")
        names = ", ".join(str(name_of(index)) for index in indices)
        place = f"in step {self.state.step + 1} (epoch {self.state.epoch + 1}, batch {self.state.batch + 1})"
        return f"the loss is {loss} {place}, with {names}. {self._advice()}"

    def _advice(self) -> str:
        files = checkpoint_files(self.weight_dir)
        saved = f"The last good checkpoint is {shown(files[0])}" if files else "There is no checkpoint yet"
        return f"{saved}; try a smaller learning rate, CLIP_NORM=1, or PRECISION=fp32."


@contextlib.contextmanager
def start_run(setup: Setup, global_config: dict[str, str]) -> Iterator[Run]:
    """
    Starts a run, or goes on with the one that RESUME names; from here on things are written.

    :raises Preempted: if a signal has asked to end, after saving
    :raises Pruned: if AFTER_EPOCH has asked to end
    :raises OutOfMemory: instead of the many errors that mean it
    """
    with stop_on_signals(), deterministic_algorithms(setup.context.device):
        run = Run(setup, global_config)
        try:
            yield run
        except Preempted as error:
            run.preempt(error)
            raise
        except KeyboardInterrupt as error:
            run.interrupt(error)
            raise
        except Pruned as error:
            run.end("pruned", error)
            raise
        except BaseException as error:
            told = _explained(error, setup)
            run.end("failed", told)
            if told is error:
                raise
            raise told from error
        finally:
            run.close()


def _given(setup: Setup, captured: dict[str, Any]) -> dict[str, Any]:
    """What all processes must agree in; folders and devices may have other names on other machines."""
    config = flatten(captured["config"] | {key: setup.config[key] for key in ("RESUME", "RERUN_OF")})
    ignored = ("DATE", "DEVICE", "DATASET_CONFIG", "INIT_WEIGHTS", "NOTIFY", "LOGFILE")
    files = [(name, fact["sha256"]) for name, fact in sorted(setup.data.hashes.items())]
    return {key: value for key, value in config.items() if not key.startswith(ignored)} | {
        "data (its files differ)": hashlib.sha256(repr(files).encode()).hexdigest(),
        "data contract": setup.contract.to_dict(),
        "number of batches": setup.loaders.batches.num_batches,
    }


def _explained(error: BaseException, setup: Setup) -> BaseException:
    """The error, or one that says in a sentence what to do."""
    size = setup.loaders.batches.batch_size
    if "Expected more than 1 value per channel" in str(error):
        return UserError(
            "a batch of one small sample is too little for BatchNorm: set DATA_LOADER_CONFIG.drop_last=True, take a "
            "larger crop, or another norm, such as GroupNorm."
        )
    if not is_out_of_memory(error):
        return error
    gc.collect()
    if setup.context.device.type == "cuda":
        torch.cuda.empty_cache()
    smaller = f"DATA_LOADER_CONFIG.batch_size={max(1, size // 2)} ACCUMULATE={2 * setup.config['ACCUMULATE']}"
    return OutOfMemory(
        f"the memory of {setup.context.device} does not suffice for batch_size={size}: try {smaller}, a smaller crop, or "
        "PRECISION=bf16."
    )
