"""Device, memory format and number format of a forward pass, as one object."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config.project import Project
from .distributed import own_device

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

    def move(self, inputs: Tensor) -> Tensor:
        """Move inputs to the device; images (N, C, H, W) also into the memory format."""
        if self.channels_last and inputs.ndim == 4:
            return inputs.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return inputs.to(self.device, non_blocking=True)


def choose_context(
    project: Project, device: Any = "auto", precision: str | None = "auto", channels_last: bool = True
) -> DeviceContext:
    """
    Return the context for DEVICE and PRECISION as the project's config/device.py chooses them.

    :raises UserError: if this machine does not have them
    """
    choice = project.module(".config.device")
    found = own_device(choice.get_device(device))
    return DeviceContext(found, choice.get_precision(found, precision), channels_last)
