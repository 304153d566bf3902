"""Device, memory format and number format of a forward pass, as one object."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DeviceContext:
    """
    Where and how a model computes.

    :param precision: "fp32", "bf16" or "fp16"
    :param channels_last: memory format of images; faster with bf16 and on GPUs
    """

    device: torch.device
    precision: str = "fp32"
    channels_last: bool = True

    def autocast(self) -> torch.autocast:
        """Return the context manager of the forward pass; compute the loss outside of it, in float32."""
        enabled = self.precision != "fp32"
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision], enabled=enabled)

    def move(self, inputs: Any) -> Any:
        """Move inputs to the device; images (N, C, H, W) also into the memory format."""

        def move(one: Tensor) -> Tensor:
            if self.channels_last and one.ndim == 4:
                return one.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            return one.to(self.device, non_blocking=True)

        return map_tensors(move, inputs)

    def move_pair(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """Move inputs and targets to the device."""
        return self.move(batch[0]), map_tensors(lambda one: one.to(self.device), batch[1])


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a value with each tensor changed that is in it, in tuples, lists and dicts all the way down."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(change, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [map_tensors(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a value, in their order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def one_of(batch: Any, index: int) -> Any:
    """Return a sample of a batch, as a batch of one."""
    return map_tensors(lambda all_: all_[index : index + 1], batch)
