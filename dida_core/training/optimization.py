"""Loss, optimizer, schedule and moving average, as the config names them."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import ConfigError, UserError
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
            raise UserError(
                f"There is not enough memory for a single sample: take a smaller crop or model. ({error})"
            ) from error
        problem = problem or f"{key} cannot be built with {key}_CONFIG"
        raise ConfigError([f"{problem}: {' '.join(str(error).split())}"]) from error


@config_errors("LOSS")
def build_loss(config: dict[str, Any], device: torch.device) -> Loss:
    """Build the loss: a module on the device, or the function with its LOSS_CONFIG."""
    loss, options = config["LOSS"], dict(config["LOSS_CONFIG"])
    with contextlib.suppress(ValueError):  # C functions have no signature
        if "ignore_index" in inspect.signature(loss).parameters:
            options.setdefault("ignore_index", config["IGNORE_INDEX"])
    if isinstance(loss, type):
        return loss(**options).to(device)
    return functools.partial(loss, **options) if options else loss


def of_known(loss: Loss) -> Loss:
    """Return a loss that gets no target that is NaN."""
    if isinstance(loss, nn.Module):
        loss.register_forward_pre_hook(lambda _, pair: known(*pair))
        return loss
    return lambda pred, target: loss(*known(pred, target))


@config_errors("OPTIMIZER")
def build_optimizer(config: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of all parameters that require a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError([f"MODEL {type(model).__name__} has no parameter to train."])
    return config["OPTIMIZER"](parameters, **config["OPTIMIZER_CONFIG"])


@config_errors("SCHEDULER")
def build_scheduler(
    config: dict[str, Any], optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> LRScheduler | None:
    """Build the schedule of the learning rate, with its length and largest rate where they are missing."""
    scheduler, options = config["SCHEDULER"], config["SCHEDULER_CONFIG"]
    if scheduler is None:
        return None
    length = config["EPOCHS"] * (steps_per_epoch if config["SCHEDULER_STEP"] == "step" else 1)
    defaults = {"T_max": length, "max_lr": optimizer.param_groups[0]["lr"]}
    if "epochs" not in options:
        defaults["total_steps"] = length
    if issubclass(scheduler, ReduceLROnPlateau):
        defaults["mode"] = config["MONITOR"].split()[0]
    accepted = inspect.signature(scheduler).parameters
    defaults = {name: value for name, value in defaults.items() if name in accepted}
    return scheduler(optimizer, **(defaults | options))


def build_ema(config: dict[str, Any], model: nn.Module) -> AveragedModel | None:
    """Build the moving average of the weights, if EMA asks for one."""
    if config["EMA"] is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config["EMA"]), use_buffers=True)
