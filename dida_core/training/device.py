"""Device, memory format and number format of a forward pass, as one object."""

from dataclasses import dataclass

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

    def move(self, inputs: Tensor) -> Tensor:
        """Move inputs to the device; images (N, C, H, W) also into the memory format."""
        if self.channels_last and inputs.ndim == 4:
            return inputs.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return inputs.to(self.device, non_blocking=True)
