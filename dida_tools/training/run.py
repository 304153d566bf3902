"""
Contains a run's life: its name, folders, lock, journal, tracker row, TensorBoard, checkpoints, best weights, early
stopping and end. The same for all routines.
"""

import contextlib
import gc
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from ..config.capture import ConfigError, difference, flatten
from ..config.config import CODE_PATH
from ..config.errors import UserError
from ..utils.logging.csv import write_log
from ..utils.name import make_unique_dir, safe_name
from ..utils.path import create_dirs, write_atomic
from ..utils.torchutils import assert_isfinite, fill_model
from ..utils.weights import load_weights, save_weights, weights_digest
from .checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from .environment import describe_environment
from .evaluation import evaluate
from .journal import Journal, read_journal
from .pictures import make_panels, save_picture
from .preparation import Preparation, build_scheduler, is_out_of_memory

_HEARTBEAT_SECONDS = 60
# What may change when a run goes on: silently, or with a word. Anything else is another training.
_FREE_TO_CHANGE = (
    "DATE",
    "SESSION_NAME",
    "ROUTINE_NAME",
    "__COMMENT",
    "EPOCHS",
    "PATIENCE",
    "INIT_WEIGHTS",
    "CHECKPOINT_SECONDS",
    "LOGFILE",
    "DATA_LOADER_CONFIG.num_workers",
    "DATA_LOADER_CONFIG.pin_memory",
)
_CHANGE_IS_SAID = ("DATASET", "DEVICE", "PRECISION", "CHANNELS_LAST", "METRICS", "MASK_VALUES")


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite."""


class OutOfMemory(UserError):
    """The memory of the device did not suffice."""


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


class Run:
    """A run while it trains. Made by start_run."""

    def __init__(self, preparation: Preparation, global_config: dict[str, str]) -> None:
        self.preparation, self.config, self.global_config = preparation, preparation.config, global_config
        log_root, weight_root = Path(global_config["LOG_DIR"]), Path(global_config["WEIGHT_DIR"])
        if self.config["RESUME"] is None:
            wanted = f"{safe_name(self.config['DATE'])}_{safe_name(self.config['SESSION_NAME'])}"
            self.name = make_unique_dir(log_root, wanted)
        else:
            self.name = self.config["RESUME"]
            if not (log_root / self.name / "config.json").is_file():
                raise ConfigError([f"RESUME is {self.name!r}: there is no such run in {log_root}."])
        self.log_dir, self.weight_dir = log_root / self.name, weight_root / self.name
        self._lock = FileLock(self.log_dir / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(f"the run {self.name} is being trained by another process: wait, or end it.") from error
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise

    def _begin(self) -> None:
        preparation = self.preparation
        self._compare_with_record()
        create_dirs(self.weight_dir)
        self.state = State()
        self.journal = Journal(self.log_dir / "journal.jsonl")
        self._restore()
        ran_on = {"device": str(preparation.device), "precision": preparation.precision}
        about = {"name": self.name, "not_rerunnable": preparation.not_rerunnable}
        self._write_json("config.json", preparation.record | about)
        environment = describe_environment(CODE_PATH, preparation.device)
        self._write_json("environment.json", environment | ran_on | {"data": preparation.data_hashes})
        self.writer = self._open_tensorboard()
        self.journal.write({"event": "start", "time": time.time(), "step": self.state.step} | ran_on)
        self._started = time.monotonic() - self.state.seconds
        self._last_checkpoint = self._last_heartbeat = time.monotonic()
        self._last_results: dict[str, float] = {}
        self._step_losses: list[float] = []
        self._say_start()
        total = self.config["EPOCHS"] * self._samples_per_epoch()
        done = self.state.epoch * self._samples_per_epoch() + self.state.num_samples
        # Without a terminal there is no bar, only the line of each epoch.
        self.bar = tqdm(total=total, initial=done, unit=" images", disable=None, leave=False, dynamic_ncols=True)
        self._write_row(self._first_columns())

    # ------------------------------------------------------------------------------------------ what a routine calls

    def batches(self) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """The batches of the current epoch that are not done yet, with their number in the epoch."""
        order = self.preparation.train_batches
        order.epoch, order.first_batch = self.state.epoch, self.state.batch
        yield from enumerate(self.preparation.train_loader, start=self.state.batch)

    def record_batch(self, loss: float, num_samples: int) -> None:
        """
        Takes note of a batch, after its backward pass.

        :param loss: the batch's loss
        :raises NonFiniteLoss: with the step, the batch's files and the last good checkpoint
        """
        if not math.isfinite(loss):
            raise NonFiniteLoss(self._about_non_finite(loss))
        self.state.batch += 1
        self.state.loss_sum += loss * num_samples
        self.state.num_samples += num_samples
        self._step_losses.append(loss)
        self.bar.update(num_samples)

    def record_step(self, learning_rate: float) -> None:
        """Takes note of an optimizer step, and saves a checkpoint when it is time."""
        self.state.step += 1
        loss = sum(self._step_losses) / len(self._step_losses)
        self._step_losses.clear()
        event = {"event": "step", "step": self.state.step, "epoch": self.state.epoch + 1, "loss": loss}
        event["learning_rate"] = learning_rate
        self.journal.write(event)
        self._write_step_scalars(event)
        self._show_progress()
        now = time.monotonic()
        if now - self._last_checkpoint >= self.config["CHECKPOINT_SECONDS"]:
            self.save_checkpoint()
        if now - self._last_heartbeat >= _HEARTBEAT_SECONDS:
            self._write_row({"HEARTBEAT": _clock(), "EPOCH": self.state.epoch})

    def record_epoch(self, results: dict[str, float]) -> float | None:
        """
        Takes note of the end of an epoch: selects the best weights, decides on stopping early.

        :param results: of the validation set; empty where there is none
        :return: the monitored result
        """
        state, goal = self.state, self.monitored
        value = results.get(goal)
        state.epoch += 1
        improved = self._is_better(value)
        if improved:
            state.best, state.best_epoch, state.bad_epochs = value, state.epoch, 0
            self._save_best()
        else:
            state.bad_epochs += 1
            state.stopped = self.config["PATIENCE"] is not None and state.bad_epochs >= self.config["PATIENCE"]
        train_loss = state.loss_sum / max(1, state.num_samples)
        values = {"train.loss": train_loss} | {f"validation.{name}": result for name, result in results.items()}
        seconds = round(time.monotonic() - self._started, 2)
        self.journal.write({"event": "epoch", "epoch": state.epoch, "step": state.step, "seconds": seconds} | values)
        self.writer.add_scalar("train/epoch_loss", train_loss, state.step)
        for name, result in results.items():
            self.writer.add_scalar(f"validation/{name.replace('.', '/')}", result, state.step)
        self._write_pictures()
        state.batch, state.num_samples, state.loss_sum = 0, 0, 0.0
        self._last_results = {goal: value} if value is not None else {}
        self._say_epoch(train_loss, results, improved)
        is_time = time.monotonic() - self._last_checkpoint >= self.config["CHECKPOINT_SECONDS"]
        if is_time or not checkpoint_files(self.weight_dir):
            self.save_checkpoint()
        self._write_row({"EPOCH": state.epoch, "HEARTBEAT": _clock(), "train.loss": train_loss})
        return value

    def save_checkpoint(self) -> None:
        """
        Saves the training state, after an optimizer step.

        :raises NonFiniteLoss: if a parameter is NaN or infinite; such a state is not saved
        """
        preparation = self.preparation
        try:
            assert_isfinite(preparation.model)
        except AssertionError as error:
            raise NonFiniteLoss(
                f"after step {self.state.step} a parameter is not finite ({error}). {self._advice()}"
            ) from error
        self.journal.sync()
        self.writer.flush()
        self.state.seconds = time.monotonic() - self._started
        scheduler, ema = preparation.scheduler, preparation.ema
        save_checkpoint(
            self.weight_dir,
            self.state.step,
            {
                "model": preparation.model.state_dict(),
                "optimizer": preparation.optimizer.state_dict(),
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                "scaler": preparation.scaler.state_dict(),
                "ema": None if ema is None else ema.state_dict(),
                "state": asdict(self.state),
                "contract": preparation.contract.to_dict(),
                "epochs": self.config["EPOCHS"],
            },
        )
        self._last_checkpoint = time.monotonic()

    def finish(self) -> Result:
        """Saves the last state, evaluates the best weights once on the test set, and says what was reached."""
        preparation, state = self.preparation, self.state
        self.bar.close()
        self.save_checkpoint()
        best = self.weight_dir / "best.pt"
        digest = weights_digest(preparation.model.state_dict())
        epochs = [event for event in read_journal(self.journal.path) if event["event"] == "epoch"]
        history = list({event["epoch"]: event for event in epochs}.values())  # the last word on each
        model = preparation.evaluated_model()
        fill_model(model, load_weights(best)["model"], str(best))
        metrics = {}
        if state.best_epoch is not None:
            chosen = next((event for event in history if event["epoch"] == state.best_epoch), {})
            metrics = {key: value for key, value in chosen.items() if key.startswith("validation.")}
        counts, panels = None, []
        if preparation.test_loader is not None:
            device, precision = preparation.device, preparation.precision
            evaluation = preparation.new_evaluation()
            results = evaluate(
                model, preparation.test_loader, evaluation, device, precision, self.config["CHANNELS_LAST"]
            )
            metrics |= {f"test.{name}": value for name, value in results.items()}
            for name, value in results.items():
                self.writer.add_scalar(f"test/{name.replace('.', '/')}", value, state.step)
            counts = next(iter(evaluation.counts.values()), None)
            panels = self._panels()
        self.journal.write({"event": "test", "time": time.time(), "step": state.step, "digest": digest} | metrics)
        if self.journal.contradictions:
            _say(
                f"{len(self.journal.contradictions)} results differ from those before the interruption, first in "
                f"{self.journal.contradictions[0]}: code, data, config or machine are not what they were."
            )
        picture = self.log_dir / "picture.png"
        save_picture(picture, self.name, history, self.monitored, counts, panels, preparation.contract.class_names)
        seconds = round(time.monotonic() - self._started, 1)
        columns = {"STATUS": "finished", "SECONDS": seconds, "EPOCH": state.epoch, "BEST_EPOCH": state.best_epoch}
        self._write_row(columns | metrics | {"HEARTBEAT": _clock(), "WEIGHTS_DIGEST": digest})
        last = checkpoint_files(self.weight_dir)[0]
        weights = {"best": best, "last": last}
        result = Result(self.name, self.log_dir, self.weight_dir, weights, digest, metrics, history, picture, state)
        self._say_end(result, seconds)
        return result

    # ------------------------------------------------------------------------------------------------------ beginning

    def _restore(self) -> None:
        """Takes up the newest training state that is whole, where the run goes on."""
        if self.config["RESUME"] is None:
            return
        if self.journal.num_damaged:
            _say(f"{self.journal.path}: {self.journal.num_damaged} damaged lines are left out.")
        stored = load_checkpoint(self.weight_dir, _say)
        if stored is None:
            _say(f"{self.name} has no checkpoint that is whole: it starts again.")
            return
        preparation = self.preparation
        if stored["contract"] != preparation.contract.to_dict():
            _say(f"{self.name}: the training data is not what it was: its channels, scale or statistics have changed.")
        fill_model(preparation.model, stored["model"], str(self.weight_dir))
        preparation.optimizer.load_state_dict(stored["optimizer"])
        self._restore_schedule(stored)
        preparation.scaler.load_state_dict(stored["scaler"])
        if preparation.ema is not None and stored["ema"] is not None:
            preparation.ema.load_state_dict(stored["ema"])
        self.state = State(**stored["state"])
        if self.config["EPOCHS"] > stored["epochs"] and self.state.stopped:
            self.state.stopped, self.state.bad_epochs = False, 0
        _say(f"{self.name} goes on after epoch {self.state.epoch}, step {self.state.step}.")

    def _open_tensorboard(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # imported where used: it takes a second

        folder, state = str(self.log_dir / "tensorboard"), self.state
        if self.config["RESUME"] is None:
            return SummaryWriter(folder)
        if state.batch < self.preparation.train_batches.num_batches:
            return SummaryWriter(folder, purge_step=state.step + 1)
        # The epoch's results come at its last step too, and may be there or not: that step is written again.
        writer = self.writer = SummaryWriter(folder, purge_step=state.step)
        for event in read_journal(self.journal.path):
            if event["event"] == "step" and event["step"] == state.step:
                self._write_step_scalars(event)
        return writer

    def _restore_schedule(self, stored: dict[str, Any]) -> None:
        scheduler = self.preparation.scheduler
        if scheduler is None or stored["scheduler"] is None:
            return
        saved = stored["scheduler"]
        if stored["epochs"] != self.config["EPOCHS"]:
            # The length of the training is part of some schedules. What a new one of the old length already knows is no
            # state, but comes from the config, so the rest is what has to be restored.
            rates = [group["lr"] for group in self.preparation.optimizer.param_groups]
            old_config = self.config | {"EPOCHS": stored["epochs"]}
            optimizer = self.config["OPTIMIZER"](
                [torch.zeros(1, requires_grad=True)], **self.config["OPTIMIZER_CONFIG"]
            )
            fresh = build_scheduler(old_config, optimizer, self.preparation.steps_per_epoch)
            assert fresh is not None
            as_built = fresh.state_dict()
            saved = {key: value for key, value in saved.items() if value != as_built.get(key)}
            scheduler.load_state_dict(scheduler.state_dict() | saved)
            for group, rate in zip(self.preparation.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        else:
            scheduler.load_state_dict(saved)

    def _compare_with_record(self) -> None:
        """Refuses to go on with another config than that of the run."""
        if self.config["RESUME"] is None:
            return
        stored = json.loads((self.log_dir / "config.json").read_text())
        earlier = {"version": stored["version"], "config": stored["config"]}
        refused = []
        for key, (before, now) in difference(earlier, self.preparation.record).items():
            if key.startswith(_CHANGE_IS_SAID):
                _say(f"{self.name} goes on with another {key}: {before} before, {now} now.")
            elif not key.startswith(_FREE_TO_CHANGE):
                refused.append(f"{key} was {before} and is now {now}: that would be another training.")
        if refused:
            advice = (
                f"Start a new run, if you like from its weights: INIT_WEIGHTS={_shown(self.weight_dir / 'best.pt')}."
            )
            raise ConfigError([*refused, advice])

    def _first_columns(self) -> dict[str, Any]:
        columns: dict[str, Any] = {"NAME": self.name, "STATUS": "running", "STARTED": _clock(), "SECONDS": None}
        columns |= {"EPOCH": self.state.epoch, "BEST_EPOCH": self.state.best_epoch, "HEARTBEAT": _clock()}
        columns |= {"HOST": socket.gethostname(), "PID": os.getpid(), "ERROR": None}
        reason = self.preparation.not_rerunnable
        columns |= {"RAN_ON": f"{self.preparation.device} {self.preparation.precision}"}
        columns["RERUNNABLE"] = f"no: {reason}" if reason else "yes"
        return columns | flatten(self.preparation.record)

    # ------------------------------------------------------------------------------------------------------ selection

    @property
    def monitored(self) -> str:
        """Name of the result that selects the best weights."""
        goal = self.config["MONITOR"].split()[1]
        metric = self.config["METRICS"].get(goal)
        return goal if metric is None or hasattr(metric, "from_counts") else f"{goal}_sample_mean"

    def _is_better(self, value: float | None) -> bool:
        if self.preparation.validation_loader is None:
            return True  # nothing to select by: the last weights are the best
        if value is None or math.isnan(value):
            return self.state.best_epoch is None  # there is always something to predict with
        if self.state.best is None or math.isnan(self.state.best):
            return True
        return value > self.state.best if self.config["MONITOR"].startswith("max") else value < self.state.best

    def _save_best(self) -> None:
        model = self.preparation.evaluated_model()
        contract = self.preparation.contract.to_dict()
        save_weights(self.weight_dir / "best.pt", {"model": model.state_dict(), "contract": contract})

    # --------------------------------------------------------------------------------------------------------- record

    def _write_row(self, columns: dict[str, Any]) -> None:
        self._last_heartbeat = time.monotonic()
        try:
            write_log(Path(self.global_config["LOG_DIR"]) / self.config["LOGFILE"], {"NAME": self.name} | columns)
        except (OSError, TimeoutError) as error:
            _say(f"The tracker's row could not be written ({error}); training goes on, the journal has it all.")

    def _write_step_scalars(self, event: dict[str, Any]) -> None:
        for name in ("loss", "learning_rate"):
            self.writer.add_scalar(f"train/{name}", event[name], event["step"])

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2)
        write_atomic(self.log_dir / name, lambda file: file.write(text.encode()))

    def _panels(self) -> list[Any]:
        preparation = self.preparation
        if preparation.test_set is None:
            return []
        model, contract = preparation.evaluated_model(), preparation.contract
        device, precision = preparation.device, preparation.precision
        return make_panels(model, preparation.test_set, contract, device, precision, self.config["IGNORE_INDEX"])

    def _write_pictures(self) -> None:
        for panel in self._panels():
            self.writer.add_image(f"test/{panel.name}", panel.row(), self.state.step, dataformats="HWC")

    # ----------------------------------------------------------------------------------------------- what people read

    def _samples_per_epoch(self) -> int:
        batches = self.preparation.train_batches
        return min(batches.num_samples, batches.num_batches * batches.batch_size)

    def _say_start(self) -> None:
        preparation = self.preparation
        model = preparation.model
        million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        sets = {"train": preparation.train_set, "validate": preparation.validation_set, "test": preparation.test_set}
        sizes = ", ".join(f"{part} {len(dataset)}" for part, dataset in sets.items() if dataset is not None)
        place = f"{preparation.device}, {preparation.precision}"
        tqdm.write(
            f"{self.name}: {type(model).__name__}, {million:.2f} million parameters, on {place}; samples: {sizes}"
        )

    def _show_progress(self) -> None:
        loss = self.state.loss_sum / max(1, self.state.num_samples)
        shown = {"epoch": f"{self.state.epoch + 1}/{self.config['EPOCHS']}", "loss": f"{loss:.4f}"}
        self.bar.set_postfix(
            shown | {name: f"{value:.4f}" for name, value in self._last_results.items()}, refresh=False
        )

    def _say_epoch(self, train_loss: float, results: dict[str, float], improved: bool) -> None:
        shown = {name: value for name, value in results.items() if "." not in name}
        parts = [f"epoch {self.state.epoch:>3}/{self.config['EPOCHS']}", f"train loss {train_loss:.4f}"]
        parts += [f"{'validation ' if name == 'loss' else ''}{name} {value:.4f}" for name, value in shown.items()]
        mark = "  best" if improved and results else ""
        tqdm.write("  ".join(parts) + mark)
        if self.state.stopped:
            tqdm.write(f"No better {self.monitored} in {self.config['PATIENCE']} epochs: training stops here.")

    def _say_end(self, result: Result, seconds: float) -> None:
        shown = {key: value for key, value in result.metrics.items() if key.startswith("test.") and key.count(".") == 1}
        reached = ", ".join(f"{key[5:]} {value:.4f}" for key, value in shown.items()) or "(there is none)"
        log_file = Path(self.global_config["LOG_DIR"]) / self.config["LOGFILE"]
        python = _shown(sys.executable) if not os.path.relpath(sys.executable).startswith("..") else "python"
        lines = [
            "",
            f"{self.name}: trained {self.state.epoch} epochs in {seconds:.0f} s; best epoch {self.state.best_epoch}",
            f"  test set   {reached}",
            f"  weights    {_shown(result.weights['best'])}  (and {result.weights['last'].name}, to go on from)",
            f"  log        {_shown(self.log_dir)}",
            f"  tracker    {_shown(log_file)}",
            f"  picture    {_shown(result.picture)}",
            "Next:",
            f"  {python} -m tensorboard.main --logdir {_shown(self.global_config['LOG_DIR'])}",
            f"  {python} run_prediction.py {self.name} -i IMAGES -o DIR",
            f"  {python} train.py --resume {self.name} EPOCHS={2 * self.config['EPOCHS']}",
        ]
        for line in lines:
            tqdm.write(line)

    def _about_non_finite(self, loss: float) -> str:
        indices = self.preparation.train_batches.indices(self.state.epoch, self.state.batch)
        name_of = getattr(self.preparation.train_set, "sample_name", lambda index: f"sample {index}")
        names = ", ".join(str(name_of(index)) for index in indices)
        place = f"in step {self.state.step + 1} (epoch {self.state.epoch + 1}, batch {self.state.batch + 1})"
        return f"the loss is {loss} {place}, with {names}. {self._advice()}"

    def _advice(self) -> str:
        files = checkpoint_files(self.weight_dir)
        saved = f"The last good checkpoint is {_shown(files[0])}" if files else "There is no checkpoint yet"
        return f"{saved}; try a smaller learning rate, CLIP_NORM=1, or PRECISION=fp32."

    # ------------------------------------------------------------------------------------------------------------ end

    def fail(self, status: str, error: BaseException) -> None:
        """Takes note that the run ends without a result."""
        self.bar.close()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self.journal.write(
            {"event": "end", "time": time.time(), "step": self.state.step, "status": status, "error": text}
        )
        seconds = round(time.monotonic() - self._started, 1)
        self._write_row({"STATUS": status, "ERROR": text, "SECONDS": seconds, "HEARTBEAT": _clock()})

    def close(self) -> None:
        """Ends all writing."""
        self.bar.close()
        self.writer.close()
        self.journal.close()
        self._lock.release()


@contextlib.contextmanager
def start_run(preparation: Preparation, global_config: dict[str, str]) -> Iterator[Run]:
    """
    Starts a run, or goes on with the one that RESUME names; from here on things are written.

    :raises OutOfMemory: instead of the many errors that mean it
    """
    run = Run(preparation, global_config)
    try:
        yield run
    except KeyboardInterrupt as error:
        run.fail("interrupted", error)
        files = checkpoint_files(run.weight_dir)
        start = f"after {files[0].name}" if files else "from its start"
        _say(f"Interrupted. python train.py --resume {run.name} goes on {start}.")
        raise
    except BaseException as error:
        told = _explained(error, preparation)
        run.fail("failed", told)
        if told is error:
            raise
        raise told from error
    finally:
        run.close()


def _explained(error: BaseException, preparation: Preparation) -> BaseException:
    """The error, or one that says in a sentence what to do."""
    size = preparation.train_batches.batch_size
    if "Expected more than 1 value per channel" in str(error):
        return UserError(
            "a batch of one small sample is too little for BatchNorm: set DATA_LOADER_CONFIG.drop_last=True, take a "
            "larger crop, or another norm, such as GroupNorm."
        )
    if not is_out_of_memory(error):
        return error
    gc.collect()
    if preparation.device.type == "cuda":
        torch.cuda.empty_cache()
    smaller = f"DATA_LOADER_CONFIG.batch_size={max(1, size // 2)} ACCUMULATE={2 * preparation.config['ACCUMULATE']}"
    return OutOfMemory(
        f"the memory of {preparation.device} does not suffice for batch_size={size}: try {smaller}, a smaller crop, or "
        "PRECISION=bf16."
    )


def _clock() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _shown(path: Any) -> str:
    """A path as short as it can be: relative where it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _say(text: str) -> None:
    tqdm.write(text)
