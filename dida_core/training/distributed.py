"""
The processes of one training: torchrun starts them, and each computes its part of every batch.

Without torchrun there is one process, and all of this does nothing.
"""

import contextlib
import functools
import gc
import itertools
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError


def num_launched() -> int:
    """Return the number of processes that torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_processes() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this is the process that writes and reports: number 0."""
    return rank() == 0


_times = itertools.count(1)  # that this process has joined others


@contextlib.contextmanager
def join_processes(
    join: Callable[[str], object] = dist.init_process_group,
    leave: Callable[[], object] = dist.destroy_process_group,
) -> Iterator[None]:
    """
    Join this process with the others that torchrun has started, as PyTorch or a framework on top of it does.

    :param join: is called with the name of the backend
    """
    if num_launched() == 1 or dist.is_initialized():
        yield
        return
    # Its functions keep the group that there is when they are imported, as their default arguments.
    import torch.distributed.nn.functional  # pylint: disable=redefined-outer-name

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if (time := next(_times)) == 1:
        join(backend)
    else:  # torchrun's store still holds the addresses of the first time
        store, number, size = next(dist.rendezvous("env://"))  # pylint: disable=stop-iteration-return
        store = dist.PrefixStore(f"training-{time}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        leave()
        # The threads of a group end with its last reference. One that still lived when the interpreter ends
        # could abort a process that has done all: https://github.com/pytorch/pytorch/issues/190489
        _cpu_group.cache_clear()
        gc.collect()


@functools.cache
def _cpu_group(_: Any) -> Any:
    """Return the group for everything but gradients of all these processes."""
    return dist.new_group(backend="gloo")


def refuse_several(routine: str) -> None:
    """Raise UserError if torchrun has started several processes, for routines that train in one."""
    if num_launched() > 1:
        about = f"The {routine} routine runs as one process, but torchrun has started {num_launched()}"
        raise UserError(f"{about}. Start it without torchrun, or use --routine pytorch or ignite.")


def own_device(device: torch.device) -> torch.device:
    """
    Return the GPU of this process, if several processes train on GPUs, or else the device.

    :raises UserError: if there are too few, or if DEVICE wants to leave them unused, which frameworks do not
    """
    if num_processes() == 1 or not torch.cuda.is_available():
        return device
    if device.type != "cuda":
        remedy = "hide them, CUDA_VISIBLE_DEVICES=''"
        raise UserError(f"DEVICE is {device}, but several processes take the GPUs: {remedy}.")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= num_gpus:
        about = f"torchrun has started more processes than there are GPUs ({num_gpus})"
        raise UserError(f"{about}: use --nproc-per-node.")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with gradients averaged over all processes: to be called, not to be saved."""
    if num_processes() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def on_main(function: Callable[[], Any]) -> Any:
    """Call a function in the main process and return its result in all. If it raises there, all raise."""
    if num_processes() == 1:
        return function()
    outcome: list[Any] = [None, None]
    failure = None
    if is_main():
        try:
            outcome[0] = function()
        except Exception as error:  # whatever it is, the others must not wait for it
            failure, outcome[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0, group=_cpu_group(dist.group.WORLD))
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value, group=_cpu_group(dist.group.WORLD))
    return values


def refuse_disagreement(facts: dict[str, Any]) -> None:
    """
    Compare what each process was given, before any of them trains with it: machines may have other files.

    :raises UserError: in all processes, with what differs
    """
    main, *others = gather({name: repr(value) for name, value in facts.items()})  # as text, NaN equals NaN
    for number, other in enumerate(others, 1):
        names = [name for name in {**main, **other} if main.get(name) != other.get(name)]
        if names:
            about = f"process {number} was given another {', '.join(names)} than process 0"
            raise UserError(f"{about}: give all the same.")


def sum_up(values: Sequence[float]) -> list[float]:
    """Return each of these numbers, summed over all processes in float64."""
    if num_processes() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=_cpu_group(dist.group.WORLD))
    return total.tolist()


def sync_buffers(*modules: nn.Module | None) -> None:
    """Give all processes the main one's buffers, such as BatchNorm's running statistics."""
    if num_processes() == 1:
        return
    for buffer in (buffer for module in modules if module is not None for buffer in module.buffers()):
        value = buffer.cpu()
        dist.broadcast(value, src=0, group=_cpu_group(dist.group.WORLD))
        buffer.copy_(value)
