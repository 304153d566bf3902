"""Loss, optimizer, schedule and moving average, as the config names them."""

import contextlib
import copy
import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config.check import ENDS, LENGTHS, schedules
from ..errors import ConfigError, UserError
from .distributed import num_processes
from .modules import is_out_of_memory
from .targets import known

Loss = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def config_errors(key: str, problem: str = "") -> Iterator[None]:
    """Turn whatever the user's classes and functions raise into a problem of the config."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            remedy = "take a smaller crop or model"
            raise UserError(f"There is not enough memory for a single sample: {remedy}. ({error})") from error
        problem = problem or f"{key} cannot be built with {key}_CONFIG"
        raise ConfigError([f"{problem}: {' '.join(str(error).split())}"]) from error


@config_errors("LOSS")
def build_loss(config: dict[str, Any], device: torch.device, ndim: int = 4) -> Loss:
    """
    Build the loss: a module on the device, or the function with its LOSS_CONFIG.

    :param ndim: number of dimensions of the predictions
    """
    loss, options = config["LOSS"], dict(config["LOSS_CONFIG"])
    with contextlib.suppress(ValueError):  # C functions have no signature
        if "ignore_index" in inspect.signature(loss).parameters:
            options.setdefault("ignore_index", config["IGNORE_INDEX"])
    loss = _with_tensors(functools.partial(loss, **options), device, ndim)
    if isinstance(loss.func, type):
        return loss().to(device)
    return loss if loss.args or loss.keywords else loss.func


def _with_tensors(value: Any, device: torch.device, ndim: int) -> Any:
    """Return partials, also those within, with tensors where they have lists for arguments that are such."""
    again = functools.partial(_with_tensors, device=device, ndim=ndim)
    if isinstance(value, list | tuple):
        return type(value)(map(again, value))
    if isinstance(value, dict):
        return {key: again(item) for key, item in value.items()}
    if not isinstance(value, functools.partial):
        return value
    options = {key: again(item) for key, item in value.keywords.items()}
    with contextlib.suppress(ValueError):
        for key, parameter in inspect.signature(value.func).parameters.items():
            if isinstance(options.get(key), list | tuple) and "Tensor" in str(parameter.annotation):
                tensor = torch.tensor(options[key], dtype=torch.float32, device=device)
                # One number for each class: the classes are the second dimension, not the last one.
                is_per_class = key == "pos_weight" and tensor.ndim == 1
                options[key] = tensor.reshape(-1, *[1] * (ndim - 2)) if is_per_class else tensor
    return functools.partial(value.func, *map(again, value.args), **options)


def of_known(loss: Loss) -> Loss:
    """Return a loss that gets no target that is NaN, and is 0 where there is no other."""

    def some(pred: Any, target: Any) -> tuple[Any, Any]:
        pair = known(pred, target)
        is_empty = isinstance(target, Tensor) and not pair[1].numel()
        return (pred * 0, torch.zeros_like(pred)) if is_empty else pair

    if isinstance(loss, nn.Module):
        loss.register_forward_pre_hook(lambda _, pair: some(*pair))
        return loss
    return lambda pred, target: loss(*some(pred, target))


@config_errors("OPTIMIZER")
def build_optimizer(config: dict[str, Any], model: nn.Module, loss_fn: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of all parameters of model and loss, also of frozen ones: they may thaw."""
    own = list(loss_fn.parameters())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError([f"MODEL {type(model).__name__} has no parameter to train."])
    if own and num_processes() > 1:
        name = config["LOSS"].__name__
        raise ConfigError([f"LOSS {name} has parameters, which several processes cannot train: take one."])
    both = dict.fromkeys([*model.parameters(), *own])
    parameters = [one for one in both if one.is_floating_point() or one.is_complex()]
    return config["OPTIMIZER"](parameters, **config["OPTIMIZER_CONFIG"])


def load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Load the state of an optimizer, also of one that had no frozen parameters, as those of version 0.2."""
    numbers, groups, first = dict[int, int](), list[dict[str, Any]](), 0
    for own, group in zip(optimizer.param_groups, stored["param_groups"], strict=True):
        places = range(first, first := first + len(own["params"]))
        trained = [place for place, one in zip(places, own["params"], strict=True) if one.requires_grad]
        all_there = len(group["params"]) == len(places)
        numbers |= dict(zip(group["params"], places if all_there else trained, strict=True))
        groups.append(group | {"params": [*places]})
    state = {numbers[number]: value for number, value in stored["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def watch_gradients(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Report parameters that have a gradient, but that no optimizer steps or no other process hears of."""
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = {one for group in optimizer.param_groups for one in group["params"]}
        trained = {name: one for name, one in model.named_parameters() if one.grad is not None}
        if num_processes() > 1 and (thawed := [name for name, one in trained.items() if one in frozen]):
            about = f"{thawed[0]} was frozen when the training started, and now has a gradient"
            raise UserError(f"{about}: several processes do not share it. Thaw it at the start, or take one.")
        if lost := [name for name, one in trained.items() if one not in stepped]:
            about = f"{len(lost)} parameters, such as {lost[0]}, have a gradient, but are in no optimizer"
            warnings.warn(f"{about}: they are not trained.", stacklevel=2)
            handle.remove()

    handle = optimizer.register_step_pre_hook(look)


@config_errors("SCHEDULER")
def build_scheduler(
    config: dict[str, Any], optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> LRScheduler | None:
    """
    Build the schedule of the learning rate, with lengths and largest rates where they are missing.

    All its steps are tried before.

    :raises ConfigError: if it ends too early, or if a rate is negative or not finite
    """
    unit = 1 if config["SCHEDULER_STEP"] == "step" else steps_per_epoch
    length = config["EPOCHS"] * steps_per_epoch // unit
    trial = copy.copy(optimizer)  # without what schedules and warm-up add to its methods
    trial.param_groups = [{**group, "params": group["params"][:1]} for group in optimizer.param_groups]
    schedule, rates = _build_schedule(config, trial, steps_per_epoch, length), list[list[float]]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for step in range(1, length + 1):
            rates.append([float(group["lr"]) for group in trial.param_groups])
            if schedule is not None and not isinstance(schedule, ReduceLROnPlateau):
                with config_errors("SCHEDULER", f"SCHEDULER fails after step {step} of {length}"):
                    schedule.step()
    _check_rates(rates, unit)
    return _build_schedule(config, optimizer, steps_per_epoch, length)


def _check_rates(rates: list[list[float]], unit: int) -> None:
    """
    Refuse rates that are none, and report where all of them are 0.

    :param unit: number of optimizer steps that a rate holds for
    """
    for step, groups in enumerate(rates, start=1):
        for rate in groups:
            if not 0 <= rate < math.inf:
                raise ConfigError([f"SCHEDULER has the learning rate {rate} in step {step} of {len(rates)}."])
    numbered = itertools.groupby(enumerate(rates, start=1), lambda pair: not any(pair[1]))
    for (first, _), *others in (list(group) for is_zero, group in numbered if is_zero):
        if (len(others) + 1) * unit > 1:
            steps = f"steps {first} to {first + len(others)} of {len(rates)} of the schedule"
            warnings.warn(f"the learning rate is 0 in the {steps}: nothing is learned there.", stacklevel=5)


def _build_schedule(
    config: dict[str, Any], optimizer: torch.optim.Optimizer, steps_per_epoch: int, length: int
) -> LRScheduler | None:
    rates = [group["lr"] for group in optimizer.param_groups]

    def build(schedule: Any, options: dict[str, Any], length: int) -> LRScheduler:
        if isinstance(schedule, functools.partial):
            schedule, options = schedule.func, schedule.keywords | options
        accepted = inspect.signature(schedule).parameters
        filled = dict.fromkeys(LENGTHS, length) | {"max_lr": rates if len(rates) > 1 else rates[0]}
        if "epochs" in options:
            filled = filled | {"steps_per_epoch": steps_per_epoch, "total_steps": None}
        if issubclass(schedule, ReduceLROnPlateau):
            filled["mode"] = config["MONITOR"].split()[0]
        options = {name: value for name, value in filled.items() if name in accepted} | options
        if late := [end for end in options.get("milestones", ()) if end >= length]:
            problem = f"SCHEDULER_CONFIG.milestones has {late}, and the training has {length} steps"
            warnings.warn(f"{problem}: they are not reached.", stacklevel=6)
        if "schedulers" in options:  # some are one after the other, some all at once
            ends = [*options.get("milestones", ()), length]
            spans = [max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]
            spans += [length] * len(options["schedulers"])
            parts = zip(options["schedulers"], spans, strict=False)
            options["schedulers"] = [build(part, {}, span) for part, span in parts]
        if "optimizer" in accepted:
            return schedule(optimizer=optimizer, **options)
        return schedule(optimizer, **options)

    match [(schedule, options) for _, schedule, options in schedules(config)]:
        case []:
            return None
        case [(schedule, options)] if not isinstance(config["SCHEDULER"], list | tuple):
            return build(schedule, options, length)
        case parts:
            partials = [
                functools.partial(schedule, **{key: one for key, one in options.items() if key != "length"})
                for schedule, options in parts
            ]
            milestones = _milestones([options for _, options in parts], length)
            return build(SequentialLR, {"schedulers": partials, "milestones": milestones}, length)


def _milestones(parts: list[dict[str, Any]], length: int) -> list[int]:
    """
    Return the steps at which one schedule gives way to the next.

    :param parts: the arguments of each; "length" is how long it lasts, in steps or as a share of all
    """
    lasts = [next((part[name] for name in ("length", *ENDS) if name in part), None) for part in parts]
    steps = [round(one * length) if isinstance(one, float) else one for one in lasts]
    rest = length - sum(one for one in steps if one is not None)
    if steps.count(None) > 1 or rest < 0 or (None in steps and rest == 0):
        named = ", ".join("the rest" if one is None else str(one) for one in steps)
        problem = f"SCHEDULER_CONFIG has the lengths {named}, and the training has {length} steps: give each"
        raise ConfigError([f"{problem} but one its length, which together leave some for that one."])
    return [*itertools.accumulate(rest if one is None else one for one in steps)][:-1]


def warm_up(config: dict[str, Any], optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    """
    Let the learning rate rise to that of the schedule, whichever it is, in the first steps (WARMUP).

    It is scaled during the step alone, so the schedule knows nothing of it; the groups keep the count.

    :param num_steps: of the training
    :raises ConfigError: if the warm-up is longer than the training
    """
    wanted = config["WARMUP"]
    length = round(wanted * num_steps) if wanted < 1 else int(wanted)
    if length > num_steps:
        raise ConfigError([f"WARMUP is {wanted}, and the training has {num_steps} steps: take less."])
    if length == 0:
        return
    for group in optimizer.param_groups:
        group |= {"warmup_steps": length, "warmup_done": 0}

    def raise_rate(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"], group["unscaled_lr"] = learning_rate(group), group["lr"]

    def restore_rate(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"], group["warmup_done"] = group.pop("unscaled_lr"), group["warmup_done"] + 1

    optimizer.register_step_pre_hook(raise_rate)
    optimizer.register_step_post_hook(restore_rate)


def learning_rate(group: dict[str, Any]) -> Any:
    """Return the rate that the next step of a parameter group has: the schedule's, or less in a warm-up."""
    done, steps = group.get("warmup_done", 0), group.get("warmup_steps", 0)
    return group["lr"] * (done + 1) / steps if done < steps else group["lr"]


def catch_up(scheduler: LRScheduler, optimizer: torch.optim.Optimizer, num_steps: int) -> Callable[[], None]:
    """
    Step a new schedule as often as a run has been stepped before it was prolonged.

    :param optimizer: the schedule's, new as well
    :return: sets the rates, and all else that a schedule sets, in the optimizer, once that is restored
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(num_steps):
            scheduler.step()
    groups = [dict(group) for group in optimizer.param_groups]

    def apply() -> None:
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            kept = ("params", "warmup_steps", "warmup_done")
            group |= {name: value for name, value in values.items() if name not in kept}

    return apply


def build_ema(config: dict[str, Any], model: nn.Module) -> AveragedModel | None:
    """Build the moving average of the weights, if EMA asks for one."""
    if config["EMA"] is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config["EMA"]), use_buffers=True)
